"""Writes docs/ecosystem.md from the tests that it names: ``python tests/ecosystem/page.py``."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ecosystem.md"
WORKFLOWS = "tests/ecosystem/test_workflows.py"
TRAINING = "tests/training/test_weight_decay.py"
LIGHTNING = "tests/training/test_lightning_hook.py"
DEPLOYMENT = "tests/ecosystem/test_deployment.py"
REMOTE = "tests/saving/test_remote_code.py"
QUANTIZED = "tests/saving/test_quantized.py"
ADAPTERS = "tests/conversion/test_adapters.py"
PREFIXES = "tests/saving/test_peft_hook.py"
WRAPPERS = "tests/conversion/test_wrappers.py"

HEAD = """# Ecosystem

What works with a converted model, and what is an error and why. Each row comes from a test, which its last column names
(`python -m pytest "FILE::TEST"`): "equal" means that values were compared, with an oracle or with plain eager calls.
`python tests/ecosystem/page.py` writes this page; a test compares it.

The tests run on the newest versions (torch 2.14.1, transformers 5.24, peft 0.21.2, accelerate, timm). On torch 2.11
with transformers 5.17, torchao 0.18 and onnxruntime 1.32 the rows hold as well; of compiled adapters and wrappers a
sample was run there, of bitsandbytes and ExecuTorch nothing.

An adapter of peft's that was put onto a converted model has an entry "sigswap" in its `adapter_config.json`. With
sigswap imported, loading it onto softmax attention is an error; without, peft warns of an entry that it does not know.

*Wrappers* hand their calls on to one model (what `torch.compile` returns, DDP, FSDP, a `PeftModel`): every function
sees through them, or refuses before anything changes and says what to pass. Anything else around a converted model, a
LightningModule or an `nn.Sequential`, is seen through where nothing is run.

"""


class Row(NamedTuple):
    workflow: str
    outcome: str
    test: str

    def __str__(self) -> str:
        return f"| {self.workflow} | {self.outcome} | `{self.test}` |"


def literal(file: str, name: str) -> ast.expr:
    """What a module assigns to ``name``, unevaluated: tests import much."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return node.value
    raise KeyError(name)


def keys(file: str, name: str) -> list[str]:
    value = literal(file, name)
    assert isinstance(value, ast.Dict)
    return [ast.literal_eval(key) for key in value.keys if key is not None]


def functions(file: str) -> Iterator[ast.FunctionDef]:
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node


def workflows(file: str = WORKFLOWS, starts: tuple[str, ...] = ("test_",)) -> Iterator[Row]:
    for node in functions(file):
        if not node.name.startswith(starts):
            continue
        what, _, error = (ast.get_docstring(node) or "").partition(": error, ")
        if not what:  # a test that is no workflow, in a file that has others
            continue
        outcome = f"an error: {error}" if error else "a warning" if what.endswith(": a warning") else "equal"
        yield Row(what.removesuffix(": a warning").replace("|", "or"), outcome, f"{file}::{node.name}")


def adapters() -> Iterator[Row]:
    unmergeable = ast.literal_eval(literal(ADAPTERS, "UNMERGEABLE"))
    for tuner in keys(ADAPTERS, "TUNERS"):
        merged = "" if tuner in unmergeable else ", merged"
        how = f"put on before and after `convert`{merged}, saved, loaded, switched off, taken off"
        yield Row(f"peft {tuner}: {how}", "equal", f"{ADAPTERS}::test_a_tuner[{tuner}]")
        yield Row(f"peft {tuner}: compiled", "equal", f"{ADAPTERS}::test_a_tuner_compiled[{tuner}]")
    yield from workflows(ADAPTERS, ("test_poly", "test_xlora"))
    for tuner in ("POLY", "XLORA"):
        yield Row(f"peft {tuner}: compiled", "equal", f"{ADAPTERS}::test_a_mixture_compiled[{tuner}]")
    for kind in keys(PREFIXES, "CONFIGS"):
        test = f"{PREFIXES}::test_an_adapter_of_a_converted_model[{kind}]"
        yield Row(f"peft {kind}: saved, loaded onto a converted model", "equal", test)
        yield Row(f"peft {kind}: loaded onto a softmax model", "an error: it was trained on sigmoid attention", test)


REASONS = {
    "ConversionError": "an error: parameters would come, go or change in one process, or unseen by what wraps them",
    "CheckpointError": "an error: not all of it would be saved",
    "NotConvertedError": "an error: names the part to pass",
    "ArgumentError": "an error: names what to pass",
    "CalibrationError": "an error: names what to pass",
    "ExampleInputsError": "an error: `example_inputs` is needed",
}


def refusals() -> dict[str, dict[str, str]]:
    """By wrapper, by function, the name of the error."""
    table = literal(WRAPPERS, "REFUSED")
    shared = {"DISTRIBUTED": read(literal(WRAPPERS, "DISTRIBUTED"), {})}
    assert isinstance(table, ast.Dict)
    return {
        ast.literal_eval(key): read(value, shared) for key, value in zip(table.keys, table.values, strict=True) if key
    }


def read(node: ast.expr, shared: dict[str, dict[str, str]]) -> dict[str, str]:
    if isinstance(node, ast.Name):
        return shared[node.id]
    if isinstance(node, ast.Call):  # dict.fromkeys(names, error)
        return dict.fromkeys(ast.literal_eval(node.args[0]), error_of(node.args[1]))
    assert isinstance(node, ast.Dict)
    found: dict[str, str] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        found |= read(value, shared) if key is None else {ast.literal_eval(key): error_of(value)}
    return found


def error_of(node: Any) -> str:
    return node.id if isinstance(node, ast.Name) else str(node.attr)


def wrappers() -> Iterator[Row]:
    refused = refusals()
    for wrapper in keys(WRAPPERS, "WRAPPERS"):
        for function in keys(WRAPPERS, "FUNCTIONS"):
            error = refused[wrapper].get(function)
            outcome = "seen through" if error is None else f"{REASONS[error]} (`{error}`)"
            if error == "ConversionError" and wrapper.startswith("compiled") and function in ("convert", "inspect"):
                outcome = "an error: convert first, compile afterwards (`ConversionError`)"
            yield Row(f"`{function}` of a model in: {wrapper}", outcome, f"{WRAPPERS}::test_a_function_on_a_wrapper")


def page() -> str:
    parts = [HEAD]
    sections = {
        "Tools": workflows(),
        "Training": itertools.chain(workflows(TRAINING), workflows(LIGHTNING)),
        "Deployment": itertools.chain(workflows(DEPLOYMENT), workflows(REMOTE)),
        "Quantized": workflows(QUANTIZED),
        "Adapters": adapters(),
        "Wrappers": wrappers(),
    }
    for title, rows in sections.items():
        table = "\n".join(["| workflow | outcome | test |", "|---|---|---|", *map(str, rows)])
        parts.append(f"## {title}\n\n{table}\n")
    return "\n".join(parts).replace("\n\n\n", "\n\n")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
