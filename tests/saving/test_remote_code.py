"""Directories with the Python file by which transformers loads a converted model without sigswap."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sigswap
from sigswap.errors import ArgumentError, CheckpointError
from sigswap.saving import modeling_sigswap, remote_code

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
IDS = torch.arange(1, 13).view(2, 6)
PADDED = torch.ones_like(IDS)
PADDED[0, :2] = 0
T5 = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
COMMIT = "0123456789" * 4
OTHER = {"first_token": False, "bias": 7, "qk_norm": "layer"}
EVERYTHING = sigswap.SigmoidConfig(
    query_bias=True, first_token=True, row_cap=0.5, qk_norm="rms", layer_scale=1.0, hybrid_norm=True,
    overrides={"*layers.1*": OTHER},
)  # fmt: skip


def built(name: str) -> tuple[Any, sigswap.SigmoidConfig, dict[str, Tensor]]:
    """A softmax model, what is to be converted, and an input."""
    tokens = {"input_ids": IDS, "attention_mask": PADDED}
    if name == "bert":
        config = transformers.BertConfig(**SMALL, num_attention_heads=2, num_labels=3, pad_token_id=0)
        return transformers.BertForSequenceClassification(config), sigswap.SigmoidConfig(query_bias=True), tokens
    if name == "llama":
        config = transformers.LlamaConfig(
            **SMALL, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0
        )
        return transformers.LlamaForCausalLM(config), EVERYTHING, tokens
    if name == "mistral":  # a window that has moved on
        config = transformers.MistralConfig(
            **SMALL, num_attention_heads=2, num_key_value_heads=1, sliding_window=3, initializer_range=0.3
        )
        return (
            transformers.MistralForCausalLM(config),
            sigswap.SigmoidConfig(first_token=True, bias=2.5, learn_bias=False),
            tokens,
        )
    if name == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0))
        return model, sigswap.SigmoidConfig(row_cap=1.0), {**tokens, "decoder_input_ids": IDS[:, :4]}
    model = transformers.ViTModel(transformers.ViTConfig(**VIT, patch_size=4))
    return model, sigswap.SigmoidConfig(), {"pixel_values": torch.randn(2, 3, 8, 8)}


MODELS = ("bert", "llama", "mistral", "t5", "vit")
WRITES = ("llama", "mistral", "t5")


def converted(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, config, inputs = built(name)
    left = ["*.1.attention"] if name == "vit" else None  # which stays softmax in both
    sigswap.convert(model.eval(), config, exclude=left)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".sigswap." in key:
                parameter.add_(torch.randn_like(parameter) / 2)
    return model, inputs


def result_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What both sides compute: the first output, gradients of what is sigswap's, and tokens."""
    output = model(**inputs)[0]
    model.zero_grad()
    output.square().sum().backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters() if ".sigswap." in key}
    found = {"output": output.detach(), "grads": grads}
    if getattr(model, "can_generate", bool)():
        prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found["tokens"] = model.generate(**prompt, **options)
    return found


WITHOUT = """
from __future__ import annotations
import json, sys
sys.modules["sigswap"] = None
import torch, transformers
from transformers import AutoConfig, AutoModel
from pathlib import Path

# RESULT_OF

def told(call):
    try:
        return "loaded " + type(call()).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"

root = Path(sys.argv[1])
answers = {}
for name, auto in json.loads((root / "autos.json").read_text()).items():
    auto = getattr(transformers, auto)
    model = auto.from_pretrained(root / name, trust_remote_code=True).eval()
    torch.save(result_of(model, torch.load(root / name / "inputs.pt")), root / name / "without.pt")
    answers[name] = type(model).__module__
bert, plain = (root / name for name in ("bert", "plain"))
config = AutoConfig.from_pretrained(bert)
model = AutoModel.from_pretrained(bert, trust_remote_code=True)
answers["base"] = type(model).__name__
model.save_pretrained(root / "again")
head = transformers.AutoModelForMaskedLM.from_pretrained(bert, trust_remote_code=True, use_cache=False)
answers["another head"] = [type(head).__name__, head.config.use_cache]
inputs = torch.load(bert / "inputs.pt")
again = AutoModel.from_pretrained(root / "again", trust_remote_code=True)
same = type(model).from_pretrained(root / "again", config=None)
made = AutoModel.from_config(config, trust_remote_code=True)
made.load_state_dict(model.state_dict())
moved = model.eval()(**inputs)[0]
answers["saved again"] = [bool(torch.equal(each.eval()(**inputs)[0], moved)) for each in (again, same, made)]
hub = AutoModel.from_pretrained("somebody/bert", trust_remote_code=True).eval()
hub.save_pretrained(root / "from the hub")
answers["hub"] = [type(hub).__module__, bool(torch.equal(hub(**inputs)[0], moved))]
model.set_attn_implementation("eager")
answers["eager"] = told(lambda: model(**inputs))
causal = transformers.AutoModelForCausalLM
answers["lacks"] = told(lambda: causal.from_pretrained(root / "lacks", trust_remote_code=True))
for where in (bert, plain):
    answers[f"{where.name} by auto class"] = told(lambda: AutoModel.from_pretrained(where))
    answers[f"{where.name} by class"] = told(lambda: transformers.BertModel.from_pretrained(where))
    answers[f"{where.name} as sdpa"] = told(lambda: AutoModel.from_pretrained(where, attn_implementation="sdpa"))
    answers[f"{where.name} by config"] = told(lambda: AutoModel.from_config(AutoConfig.from_pretrained(where)))
    answers[f"{where.name} by no auto class of the file"] = told(
        lambda: transformers.AutoModelForCTC.from_pretrained(where, trust_remote_code=True)
    )
(root / "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models, and what a process without sigswap makes of them."""
    root, autos = tmp_path_factory.mktemp("remote"), {}
    for name in MODELS:
        model, inputs = converted(name)
        sigswap.save(model, root / name, remote_code=True)
        torch.save(result_of(model, inputs), root / name / "with.pt")
        torch.save(inputs, root / name / "inputs.pt")
        autos[name] = remote_code.auto_class(model)
        if name == "bert":
            sigswap.save(model, root / "plain")
        if name == "llama":
            sigswap.save(model, root / "lacks", remote_code=True)
            state = {key: value for key, value in model.state_dict().items() if not key.endswith("0.bias")}
            save_file(state, root / "lacks" / "model.safetensors", {"format": "pt"})
    in_cache = root / "hub" / "models--somebody--bert"  # as the hub's library keeps what it has downloaded
    shutil.copytree(root / "bert", in_cache / "snapshots" / COMMIT, ignore=shutil.ignore_patterns("*.pt"))
    (in_cache / "refs").mkdir()
    (in_cache / "refs" / "main").write_text(COMMIT)
    (root / "autos.json").write_text(json.dumps(autos))
    program = WITHOUT.replace("# RESULT_OF", inspect.getsource(result_of))
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(root / "modules"),
            "HF_HUB_CACHE": str(root / "hub"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "warning",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "said.txt").write_text(done.stderr)
    return root


@pytest.fixture(scope="module")
def answers(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "answers.json").read_text())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_same_without_sigswap(name: str, root: Path, answers: dict[str, Any]) -> None:
    """saved with `remote_code=True`, loaded by `trust_remote_code=True` without sigswap; gradients, `generate`"""
    assert answers[name].startswith("transformers_modules.")
    ours, theirs = (torch.load(root / name / f"{how}.pt") for how in ("with", "without"))
    torch.testing.assert_close(theirs["output"], ours["output"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs["grads"], ours["grads"], rtol=1e-4, atol=1e-5)
    assert ("tokens" in ours) == (name in WRITES)
    if name in WRITES:
        assert torch.equal(theirs["tokens"], ours["tokens"])


def test_it_says_that_sigswap_is_not_there(root: Path) -> None:
    assert "sigswap is not installed" in (root / "said.txt").read_text()


def test_other_ways_without_sigswap(answers: dict[str, Any]) -> None:
    """the same: another head, `from_config`, saved and loaded again"""
    assert answers["base"] == "BertModel"
    assert answers["another head"] == ["BertForMaskedLM", False]
    assert answers["saved again"] == [True, True, True]


def test_from_the_hub(root: Path, answers: dict[str, Any]) -> None:
    """a repository of the hub with such files, loaded without sigswap, saved there, loaded with sigswap"""
    module, equal = answers["hub"]
    assert module.startswith("transformers_modules.somebody.bert") and equal
    assert sigswap.is_converted(sigswap.load(root / "from the hub"))


def test_what_is_saved_without_sigswap_is_sigmoid_attention_with_it(root: Path) -> None:
    """a model loaded without sigswap, saved there, loaded with sigswap"""
    model = sigswap.load(root / "again")
    assert sigswap.is_converted(model)
    inputs = torch.load(root / "bert" / "inputs.pt")
    expected = sigswap.load(root / "bert").bert(**inputs)
    torch.testing.assert_close(model(**inputs)[0], expected[0])
    before, after = (json.loads((root / name / "config.json").read_text()) for name in ("bert", "again"))
    assert {**before, "quantization_config": 0} == {
        **after,
        "architectures": before["architectures"],
        "quantization_config": 0,
    }


def test_it_never_attends_by_softmax(answers: dict[str, Any]) -> None:
    """`set_attn_implementation("eager")` without sigswap: error, names sigswap"""
    assert answers["eager"].startswith("RuntimeError: ") and "pip install sigswap" in answers["eager"]


def test_weights_that_lack_what_is_sigswaps(answers: dict[str, Any]) -> None:
    assert answers["lacks"].startswith("OSError: ") and "self_attn.sigswap.0.bias" in answers["lacks"]


@pytest.mark.parametrize("how", ["by auto class", "by class", "as sdpa", "by config", "by no auto class of the file"])
@pytest.mark.parametrize("name", ["bert", "plain"])
def test_without_trust_it_is_an_error_that_names_sigswap(name: str, how: str, answers: dict[str, Any]) -> None:
    """a converted directory, loaded without sigswap and without `trust_remote_code`: error, names sigswap"""
    answer = answers[f"{name} {how}"]
    assert not answer.startswith("loaded"), answer
    if how == "by no auto class of the file":  # transformers knows no such BERT
        return
    assert "sigswap" in answer, answer
    if how != "as sdpa":
        assert "pip install sigswap" in answer
    if name == "bert":
        assert "trust_remote_code" in answer


def test_with_sigswap_the_same_call_converts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """saved with `remote_code=True`, loaded by `trust_remote_code=True` with sigswap"""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(root / "modules"))
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "llama", trust_remote_code=True)
    assert type(model) is transformers.LlamaForCausalLM and sigswap.is_converted(model)
    with torch.no_grad():
        output = model(**torch.load(root / "llama" / "inputs.pt"))[0]
    torch.testing.assert_close(output, torch.load(root / "llama" / "with.pt")["output"])
    config = transformers.AutoConfig.from_pretrained(root / "bert")
    made = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert sigswap.is_converted(made)


def test_load_neither_reads_nor_runs_the_file(root: Path, tmp_path: Path) -> None:
    model, _ = converted("bert")
    sigswap.save(model, tmp_path, remote_code=True)
    (tmp_path / remote_code.FILE).write_text("raise SystemExit('it ran')")
    for allow_code in (False, True):
        assert sigswap.is_converted(sigswap.load(tmp_path, allow_code=allow_code))


def test_the_file_is_not_carried_on(tmp_path: Path) -> None:
    model, _ = converted("bert")
    sigswap.save(model, tmp_path / "a", remote_code=True)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    sigswap.save(loaded, tmp_path / "a")
    assert not (tmp_path / "a" / remote_code.FILE).exists()
    sigswap.revert(loaded).save_pretrained(tmp_path / "c")
    for name in "abc":
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text()), name


def test_the_card_has_both_ways(root: Path) -> None:
    assert "AutoModelForCausalLM.from_pretrained" in (root / "llama" / "README.md").read_text()
    assert "trust_remote_code" not in (root / "plain" / "README.md").read_text()


def test_what_it_cannot_hold_is_an_error_that_writes_nothing(tmp_path: Path) -> None:
    """`save(remote_code=True)` of a model that computes its scores itself: error, nothing is written"""
    config = transformers.BertConfig(**SMALL, num_attention_heads=2)
    eager = sigswap.convert(transformers.BertModel._from_config(config, attn_implementation="eager"))
    with pytest.raises(CheckpointError, match=r"remote_code: encoder.layer.0.* 'eager'.*needs sigswap"):
        sigswap.save(eager, tmp_path / "x", remote_code=True)
    xlnet = transformers.XLNetConfig(vocab_size=31, d_model=16, n_layer=1, n_head=2, d_inner=16)
    by_hand = sigswap.convert(transformers.XLNetModel(xlnet))
    with pytest.raises(CheckpointError, match="remote_code: "):
        sigswap.save(by_hand, tmp_path / "x", remote_code=True)
    own = sigswap.convert(type("Own", (transformers.BertModel,), {})(config))
    with pytest.raises(CheckpointError, match="remote_code: no auto class of transformers makes a Own"):
        sigswap.save(own, tmp_path / "x", remote_code=True)
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 3, 8)
    with pytest.raises(ArgumentError, match="remote_code is for transformers models only"):
        sigswap.save(sigswap.convert(layer, example_inputs=(x, x, x)), tmp_path / "x", remote_code=True)
    assert not (tmp_path / "x").exists()


class Skips(torch.nn.Module):
    """A module that was seen to attend nothing; ``how`` it attends now."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.config = how, types.SimpleNamespace(_attn_implementation="sdpa" if how != "flash" else how)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sdpa":
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return (x @ x.mT).softmax(-1) @ x if self.how == "softmax" else x


@pytest.mark.parametrize(("how", "fails"), [("sdpa", False), ("nothing", False), ("softmax", True), ("flash", True)])
def test_a_module_that_may_attend_nothing_does_not_attend_by_softmax(how: str, fails: bool) -> None:
    site = {"heads": 2, "key_heads": 2, "head_dim": 4}
    plan = {"path": "", "channel_axis": -1, "may_skip": True, "sites": [site], "channels": 4}
    module: Any = Skips(how)
    module.add_module("sigswap", modeling_sigswap.Owner(plan, {}))
    module.__class__ = modeling_sigswap.attending(Skips)
    x = torch.randn(1, 2, 3, 4)
    if fails:
        with pytest.raises(RuntimeError, match="pip install sigswap"):
            module(x)
    else:
        expected = x if how == "nothing" else torch.sigmoid(x @ x.mT / 2 - math.log(3)) @ x
        torch.testing.assert_close(module(x), expected)


def test_a_multihead_attention_of_torch_is_told_by_its_name(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(**{**VIT, "num_hidden_layers": 1}, patch_size=4)
    model = sigswap.convert(transformers.SiglipVisionModel(config).eval())
    with pytest.raises(CheckpointError, match=r"remote_code: .*head\.attention attends by another function"):
        sigswap.save(model, tmp_path / "x", remote_code=True)
    assert not (tmp_path / "x").exists()
