"""A program that uses transformers runs as before once sigswap is imported: the same results, the same errors."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import sigswap
from sigswap.errors import CheckpointError

WRAPPED = ("from_pretrained", "save_pretrained")


@contextmanager
def without_sigswap() -> Iterator[None]:
    """transformers as it is without ``import sigswap``."""
    ours = {name: PreTrainedModel.__dict__[name] for name in WRAPPED}
    registries = [auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING]
    entries = [registry.pop("sigswap") for registry in registries]
    save, load = PreTrainedModel._sigswap_wrapped  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save  # type: ignore[method-assign]
    PreTrainedModel.from_pretrained = classmethod(load)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for name, method in ours.items():
            setattr(PreTrainedModel, name, method)
        for registry, entry in zip(registries, entries, strict=True):
            registry["sigswap"] = entry


def outcome(situation: Callable[[], Any]) -> Any:
    """What a call gives, in a form that can be compared: the weights of a model, or its error."""
    try:
        given = situation()
    except Exception as error:
        supported = str(error).partition(" - supported types are")[0]  # sigswap's is one of them
        return type(error), supported
    model, others = given if isinstance(given, tuple) else (given, None)
    if not isinstance(model, nn.Module):
        return given
    return type(model), {name: float(x.double().sum()) for name, x in model.state_dict().items()}, others


def small() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip


class Own(LlamaForCausalLM):
    """A user's subclass with a from_pretrained of its own."""

    @classmethod
    def from_pretrained(cls, path: Any, *, extra: int = 0, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().from_pretrained(path, **kwargs), extra


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories of ordinary models, whole and broken."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = LlamaForCausalLM(small())
    names = ("whole", "not json", "a list", "deep", "no type", "quantized", "odd quantization", "no weights", "bytes")
    for name in (*names, "sub/folder"):
        model.save_pretrained(root / name)
    config = json.loads((root / "whole" / "config.json").read_text())
    broken = {
        "not json": "{",
        "a list": "[1]",
        "deep": "[" * 100_000,
        "no type": json.dumps({k: v for k, v in config.items() if k not in ("model_type", "architectures")}),
        "quantized": json.dumps({**config, "quantization_config": {"quant_method": "unheard of"}}),
        "odd quantization": json.dumps({**config, "quantization_config": ["sigswap"]}),
    }
    for name, text in broken.items():
        (root / name / "config.json").write_text(text)
    (root / "bytes" / "config.json").write_bytes(b"\xff\xfe\x00")
    (root / "no weights" / "model.safetensors").unlink()
    return root


PLACES = ("whole", "not json", "a list", "deep", "no type", "quantized", "odd quantization", "no weights", "bytes", "?")
CALLS: dict[str, Callable[[str], Any]] = {
    "by position": lambda path: LlamaForCausalLM.from_pretrained(path),
    "by keyword": lambda path: LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=path),
    "a path": lambda path: LlamaForCausalLM.from_pretrained(Path(path)),
    "with a config": lambda path: LlamaForCausalLM.from_pretrained(path, config=small()),
    "AutoModel": lambda path: AutoModel.from_pretrained(path),
    "for causal language models": lambda path: AutoModelForCausalLM.from_pretrained(path),
    "with its information": lambda path: LlamaForCausalLM.from_pretrained(path, output_loading_info=True),
    "a subclass": lambda path: Own.from_pretrained(path, extra=3),
    "a dtype": lambda path: LlamaForCausalLM.from_pretrained(path, dtype=torch.float16),
}


@pytest.mark.parametrize("call", CALLS)
def test_loading_is_as_before(call: str, saved: Path) -> None:
    for place in PLACES:
        path = str(saved / place)
        with without_sigswap():
            expected = outcome(lambda path=path: CALLS[call](path))  # type: ignore[misc]
        assert outcome(lambda path=path: CALLS[call](path)) == expected, place  # type: ignore[misc]


@pytest.mark.parametrize(
    "call",
    [
        lambda root: LlamaForCausalLM.from_pretrained(),
        lambda root: LlamaForCausalLM.from_pretrained(None),
        lambda root: LlamaForCausalLM.from_pretrained(None, config=small(), state_dict={}),
        lambda root: LlamaForCausalLM.from_pretrained(root / "sub", subfolder="folder"),
        lambda root: LlamaForCausalLM.from_pretrained(root / "sub", subfolder=None),
        lambda root: LlamaForCausalLM.from_pretrained(root / "whole", None, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
        lambda root: LlamaForCausalLM.from_pretrained(root / "whole", no_such=1),
        lambda root: LlamaForCausalLM.from_pretrained(3),
        lambda root: LlamaForCausalLM.save_pretrained(),
        lambda root: LlamaForCausalLM(small()).save_pretrained(),
        lambda root: LlamaForCausalLM(small()).save_pretrained(save_directory=root / "whole" / "config.json"),
        lambda root: LlamaForCausalLM(small()).save_pretrained(root / "again", True, None, no_such=1),
        lambda root: PreTrainedModel.save_pretrained(3, root / "again"),
    ],
)
def test_odd_calls_are_as_before(call: Callable[[Path], Any], saved: Path) -> None:
    with without_sigswap():
        torch.manual_seed(0)
        expected = outcome(lambda: call(saved))
    torch.manual_seed(0)
    assert outcome(lambda: call(saved)) == expected


def test_the_wrapped_methods_have_the_signatures_of_before() -> None:
    for name, method in zip(("save_pretrained", "from_pretrained"), PreTrainedModel._sigswap_wrapped, strict=True):  # type: ignore[attr-defined]
        wrapped = inspect.unwrap(getattr(PreTrainedModel, name))
        assert inspect.signature(getattr(wrapped, "__func__", wrapped)) == inspect.signature(method)


def test_a_directory_of_sigmoid_attention_is_not_loaded_as_softmax_by_keyword_either(tmp_path: Path) -> None:
    sigswap.save(sigswap.convert(LlamaForCausalLM(small()).eval()), tmp_path / "a" / "b")
    config = AutoConfig.from_pretrained(tmp_path / "a" / "b")
    del config.quantization_config
    plain = small()
    for call in (
        lambda: LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path / "a" / "b", config=plain),
        lambda: LlamaForCausalLM.from_pretrained(tmp_path / "a", config=plain, subfolder="b"),
        lambda: LlamaForCausalLM.from_pretrained(str(tmp_path / "a" / "b"), config=plain, output_loading_info=True),
    ):
        with pytest.raises(CheckpointError, match="sigmoid attention"):
            call()


IMPORTS = """
import sys, threading, warnings
warnings.simplefilter("error", UserWarning)
import torch, rich.console
errors = []
def other():
    try:
        import transformers.modeling_utils
    except BaseException as error:
        errors.append(error)
{before}
thread = threading.Thread(target=other)
thread.start()
{wait}
import sigswap
thread.join()
assert not errors, errors
from transformers import PreTrainedModel
assert hasattr(PreTrainedModel, "_sigswap_wrapped")
assert not any(getattr(finder, "target", "") == "transformers.modeling_utils" for finder in sys.meta_path)
"""
UNTIL_IT_IS_UNDER_WAY = "while 'transformers.modeling_utils' not in sys.modules: pass"
LOOKED_FOR = """
import importlib.util, sigswap
importlib.util.find_spec("transformers.modeling_utils")
importlib.util.find_spec("transformers.modeling_utils")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "wait"), [("", UNTIL_IT_IS_UNDER_WAY), (LOOKED_FOR, ""), ("import sigswap.errors", "")]
)
def test_imports_of_both_may_overlap(before: str, wait: str) -> None:
    program = IMPORTS.format(before=before, wait=wait)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_another_version_of_transformers_can_be_imported(tmp_path: Path) -> None:
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "modeling_utils.py").write_text("class PreTrainedModel: pass")
    program = (
        "import sys, warnings; sys.path.insert(0, sys.argv[1]); warnings.simplefilter('always')\n"
        "import sigswap, transformers.modeling_utils"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "needs 5.17 or newer" in done.stderr, done.stderr
