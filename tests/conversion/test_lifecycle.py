"""A converted model is still an ordinary PyTorch model, and a failed conversion leaves the model as it was."""

from __future__ import annotations

import copy
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import count_attention_softmax, sigmoid_oracle
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from zoo import BY_NAME, ZOO, Entry, Inputs, call, hf, randomise, tokens

import sigswap
from sigswap.errors import (
    AlreadyConvertedError,
    ArgumentError,
    ConversionError,
    ExampleInputsError,
    NoAttentionError,
    NotConvertedError,
    UnswappableSiteError,
)

# One of each way to own attention: SDPA and explicit softmax, nn.MultiheadAttention with its fast path, shared modules,
# hand-written code.
SOME = ("vit", "levit", "bert", "albert", "t5", "torch_encoder", "fairseq_moe", "two_sites")
some_models = pytest.mark.parametrize("name", SOME)


def convert(name: str, variant: str | None = None) -> tuple[nn.Module, Inputs]:
    entry = BY_NAME[name]
    inputs = entry.make_inputs(variant)
    return sigswap.convert(entry.build(variant), example_inputs=inputs), inputs


def run(model: Any, inputs: Inputs) -> list[Tensor]:
    return [t for t in tree_leaves(call(model, inputs)) if isinstance(t, Tensor) and t.is_floating_point()]


def gradients(model: Any, inputs: Inputs, module: nn.Module | None = None) -> dict[str, Tensor]:
    module = model if module is None else module
    module.zero_grad()
    sum((out * out).mean() for out in run(model, inputs)).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def assert_equal_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * largest, name


class Snapshot:
    """All of a model that a failed or reverted conversion must leave, or put back."""

    def __init__(self, model: nn.Module) -> None:
        self.classes = {name: type(m) for name, m in model.named_modules(remove_duplicate=False)}
        self.attributes = {name: list(vars(m)) for name, m in model.named_modules(remove_duplicate=False)}
        self.training = {name: m.training for name, m in model.named_modules()}
        self.hooks = {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        }
        self.identity = {name: id(p) for name, p in model.named_parameters()}
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.state = {name: t.clone() for name, t in model.state_dict().items()}

    def assert_same(self, model: nn.Module) -> None:
        now = Snapshot(model)
        for what in ("classes", "attributes", "training", "hooks", "identity", "requires_grad"):
            assert getattr(now, what) == getattr(self, what), what
        assert list(now.state) == list(self.state)
        for name, tensor in self.state.items():
            assert torch.equal(now.state[name], tensor), name


# ------------------------------------------------------------------------------- what the model still is


@pytest.mark.slow
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_classes_and_names_stay(entry: Entry) -> None:
    model = entry.build()
    classes = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    keys = list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    sigswap.convert(model, example_inputs=entry.make_inputs())
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, cls in classes.items():
        assert isinstance(modules[name], cls)
        assert type(modules[name]).__name__ == cls.__name__
        assert type(modules[name]).__module__ == cls.__module__
    after = list(model.state_dict())
    assert [key for key in after if key in keys] == keys
    new = [key for key in after if key not in keys]
    assert new, "the default config adds a learnable bias"
    assert all(".sigswap." in f".{key}" for key in new), new
    now = {name: id(p) for name, p in model.named_parameters()}
    assert {name: now[name] for name in parameters} == parameters
    trainable = [p for name, p in model.named_parameters() if ".sigswap." in f".{name}"]
    assert trainable and all(p.requires_grad and (p == 0).all() for p in trainable)


@pytest.mark.slow
@some_models
def test_new_parameters_get_a_gradient(name: str) -> None:
    model, inputs = convert(name)
    found = {n: g for n, g in gradients(model, inputs).items() if ".sigswap." in f".{n}"}
    assert len(found) == BY_NAME[name].sites
    for parameter, gradient in found.items():
        assert gradient.abs().max() > 0, parameter


def test_converted_in_inference_mode() -> None:
    entry = BY_NAME["bert"]
    model, inputs = entry.build(), entry.make_inputs()
    config = sigswap.SigmoidConfig(query_bias=True, first_token=True, qk_norm="rms", layer_scale=1.0)
    with torch.inference_mode():
        sigswap.convert(model, config, example_inputs=inputs)
    found = {n: g for n, g in gradients(model, inputs).items() if ".sigswap." in n}
    assert {name.rpartition(".sigswap.")[2] for name in found} >= {"0.bias", "0.query_weight", "layer_scale"}


def test_a_real_model_gets_real_parameters_inside_of_a_fake_mode() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(1, 5, 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True), example_inputs=(x, x, x))
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    model(x, x, x)[0].square().sum().backward()
    gradient = model.get_parameter("sigswap.0.query_weight").grad
    assert gradient is not None and gradient.abs().max() > 0


@pytest.mark.slow
@some_models
def test_the_example_run_leaves_no_trace(name: str) -> None:
    """Buffers, random state, training mode, caches (LeViT keeps one) and gradients are as before."""
    entry = BY_NAME[name]
    model, inputs = entry.build().train(), entry.make_inputs()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    random = torch.get_rng_state()
    sigswap.convert(model, example_inputs=inputs)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    for n, b in buffers.items():
        assert torch.equal(dict(model.named_buffers())[n], b), n
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        for value in vars(module).values():
            for tensor in tree_leaves(value) if isinstance(value, dict | list | tuple) else [value]:
                assert "Fake" not in type(tensor).__name__


@pytest.mark.slow
@some_models
def test_deepcopy(name: str) -> None:
    model, inputs = convert(name)
    twin = copy.deepcopy(model)
    assert_equal(run(twin, inputs), run(model, inputs))
    assert count_attention_softmax(lambda: call(twin, inputs)) == BY_NAME[name].others
    shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert not shared
    before = run(model, inputs)
    with torch.no_grad():
        for parameter_name, parameter in twin.named_parameters():
            if ".sigswap." in f".{parameter_name}":
                parameter.fill_(3.0)
    assert_equal(run(model, inputs), before)  # the copy's bias is its own ...
    assert any(not torch.equal(a, b) for a, b in zip(run(twin, inputs), before, strict=True))  # ... and used
    sigswap.revert(twin)
    assert_equal(run(model, inputs), before)


@pytest.mark.slow
@some_models
def test_pickle(name: str) -> None:
    model, inputs = convert(name)
    twin = pickle.loads(pickle.dumps(model))
    assert_equal(run(twin, inputs), run(model, inputs))
    assert count_attention_softmax(lambda: call(twin, inputs)) == BY_NAME[name].others
    assert list(twin.state_dict()) == list(model.state_dict())
    sigswap.revert(twin)
    assert_equal(run(twin, inputs), run(BY_NAME[name].build(), inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "torch_encoder"])
def test_torch_save_and_load_in_another_process(name: str, tmp_path: Path) -> None:
    """The file names what it needs: the other process imports torch only."""
    model, inputs = convert(name)
    with torch.no_grad():
        expected = run(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    torch.save((inputs, expected), tmp_path / "data.pt")
    assert_equal(run(torch.load(tmp_path / "model.pt", weights_only=False), inputs), expected, 1e-6)
    script = f"""
import torch
torch.set_num_threads(1)
model = torch.load(r"{tmp_path}/model.pt", weights_only=False)
inputs, expected = torch.load(r"{tmp_path}/data.pt")
with torch.no_grad():
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
assert (out - expected[0]).abs().max() <= 1e-6 * expected[0].abs().max()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=300)


def test_state_dict_loads_into_another_converted_model() -> None:
    entry = BY_NAME["bert"]
    model, inputs = convert("bert")
    other = randomise(entry.build(), seed=7)
    sigswap.convert(other, example_inputs=inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_state_dict(model.state_dict())
    assert_equal(run(other, inputs), run(model, inputs))
    # A checkpoint of the original loads but for the parameters that are new.
    missing, unexpected = other.load_state_dict(entry.build().state_dict(), strict=False)
    assert not unexpected and all(".sigswap." in f".{key}" for key in missing)


def test_moves_between_dtypes() -> None:
    model, inputs = convert("vit")
    expected = run(model, inputs)
    model.double()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert_equal(run(model, (inputs[0].double(),)), [t.double() for t in expected], 1e-5)
    model.bfloat16()
    out = run(model, (inputs[0].bfloat16(),))
    assert out[0].dtype == torch.bfloat16
    assert_equal([t.float() for t in out], expected, 0.1)


# ------------------------------------------------------------------------------------------ ways to run it


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertModel", "LlamaModel", "GPT2Model", "T5Model"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(name: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = sigswap.convert(randomise(hf(name, "sdpa")).train())
    inputs: dict[str, Any] = {"input_ids": tokens(2, 7)}
    if name == "T5Model":
        inputs["decoder_input_ids"] = tokens(2, 5)
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_input_embeddings().weight.requires_grad_(True)
    assert_equal_gradients(gradients(model, inputs), plain, 1e-6)
    assert count_attention_softmax(lambda: gradients(model, inputs)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "torch_encoder", "fairseq_moe", "two_sites"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name: str, reentrant: bool) -> None:
    """The whole model under checkpoint: its forward runs a second time in the backward."""
    model, inputs = convert(name)
    names = list(inputs) if isinstance(inputs, dict) else None
    values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    values[0].requires_grad_()  # else the reentrant form gives no gradients at all

    def checkpointed(*args: Any) -> Any:
        def forward(*args: Any) -> Any:
            return model(*args) if names is None else model(**dict(zip(names, args, strict=True)))

        return checkpoint(forward, *args, use_reentrant=reentrant)

    plain = gradients(model, inputs)
    assert_equal_gradients(gradients(checkpointed, tuple(values), model), plain, 1e-6)
    assert count_attention_softmax(lambda: gradients(checkpointed, tuple(values), model)) == 2 * BY_NAME[name].others


def test_timm_grad_checkpointing() -> None:
    model, inputs = convert("vit")
    model.train()
    plain = gradients(model, inputs)
    model.set_grad_checkpointing(True)
    assert_equal_gradients(gradients(model, inputs), plain, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert", "torch_encoder", "relative_bias"])
def test_autocast(name: str) -> None:
    entry = BY_NAME[name]
    for variant in entry.variants:
        model, inputs = convert(name, variant)
        original = entry.build(variant)
        with torch.autocast("cpu", torch.bfloat16):
            ours = run(model, inputs)
            with sigmoid_oracle(entry.owners, entry.is_attention):
                theirs = run(original, inputs)
            assert count_attention_softmax(lambda model=model, inputs=inputs: call(model, inputs)) == 0
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        full = run(model, inputs)
        for a, b, c in zip(ours, theirs, full, strict=True):
            # As near to the float32 result as the oracle under the same autocast is.
            noise = float((b.float() - c).abs().max())
            assert float((a.float() - c).abs().max()) <= 2 * noise + 0.01 * float(c.abs().max())
        with torch.autocast("cpu", torch.bfloat16):
            for gradient in gradients(model, inputs).values():
                assert gradient.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("name", ["vit", "bert", "two_sites", "mha"])
def test_export(name: str, strict: bool) -> None:
    for variant in BY_NAME[name].variants[:2]:
        model, inputs = convert(name, variant)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        with torch.no_grad():
            program = torch.export.export(model, args, kwargs, strict=strict)
            exported = program.module()
            assert_equal(run(exported, inputs), run(model, inputs), 1e-6)
            assert count_attention_softmax(lambda e=exported, i=inputs: call(e, i)) == BY_NAME[name].others


def test_export_with_a_dynamic_length() -> None:
    model, _ = convert("bert")
    text = tokens(2, 10)
    mask = torch.ones_like(text)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model,
        (),
        {"input_ids": text, "attention_mask": mask},
        dynamic_shapes={"input_ids": {1: length}, "attention_mask": {1: length}},
        strict=False,
    )
    other = {"input_ids": tokens(2, 17), "attention_mask": torch.ones(2, 17, dtype=torch.long)}
    other["attention_mask"][0, 12:] = 0
    assert_equal(run(program.module(), other), run(model, other), 1e-5)


def test_compiled_with_dynamic_shapes() -> None:
    model = sigswap.convert(randomise(hf("BertModel", "sdpa", num_hidden_layers=1)).eval())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 17):
        inputs = {"input_ids": tokens(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
        inputs["attention_mask"][0, 3:] = 0
        assert_equal(run(compiled, inputs), run(model, inputs), 1e-5)


def test_compiled_layer_inside_an_eager_model() -> None:
    model, inputs = convert("vit")
    expected = gradients(model, inputs)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    assert_equal_gradients(gradients(model, inputs), expected, 1e-5)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    model, inputs = convert("vit")
    plain = gradients(model, inputs)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        found = gradients(parallel, inputs, model)
        assert_equal_gradients(found, plain, 1e-6)
        assert count_attention_softmax(lambda: call(parallel, inputs)) == 0
    finally:
        dist.destroy_process_group()


def test_functional_call_and_vmap_over_batch() -> None:
    """torch.func treats the model as a pure function of its parameters."""
    model, inputs = convert("vit")
    state = {name: p.detach() for name, p in model.named_parameters()}
    expected = run(model, inputs)[0]
    out = torch.func.functional_call(model, state, inputs)
    assert_equal([out], [expected])
    shifted = {name: p + 1.0 if ".sigswap." in f".{name}" else p for name, p in state.items()}
    assert not torch.equal(torch.func.functional_call(model, shifted, inputs), expected)


def test_hooks_still_fire() -> None:
    entry = BY_NAME["vit"]
    model, inputs = entry.build(), entry.make_inputs()
    fired: list[str] = []

    def add_hooks(when: str) -> None:
        attention = model.blocks[0].attn
        attention.register_forward_pre_hook(lambda *args: fired.append(f"{when} pre"))
        attention.register_forward_hook(lambda *args: fired.append(f"{when} forward"))
        attention.register_full_backward_hook(lambda *args: fired.append(f"{when} backward"))
        attention.qkv.register_forward_hook(lambda *args: fired.append(f"{when} child"))

    add_hooks("before")
    sigswap.convert(model, example_inputs=inputs)
    fired.clear()  # the example run may fire them, or not
    add_hooks("after")
    gradients(model, inputs)
    kinds = ("pre", "child", "forward", "backward")
    assert sorted(fired) == sorted(f"{when} {kind}" for when in ("before", "after") for kind in kinds)
    assert fired[-2:] in (["before backward", "after backward"], ["after backward", "before backward"])
    sigswap.revert(model)
    fired.clear()
    run(model, inputs)
    assert len(fired) == 6


def test_hook_of_transformers_output_attentions() -> None:
    """The probabilities that a model gives out are the sigmoid's."""
    model = sigswap.convert(randomise(hf("BertModel", "eager")).eval())
    out = model(input_ids=tokens(2, 7), output_attentions=True)
    assert len(out.attentions) == 2
    sums = torch.cat([a.sum(-1).flatten() for a in out.attentions])
    assert (sums - 1).abs().max() > 0.05


def test_switching_the_implementation_after_conversion() -> None:
    """fused_attn or _attn_implementation toggled on a converted model: never a silent softmax."""
    for name in ("vit", "swin"):
        model, inputs = convert(name, "fused")
        expected = run(model, inputs)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        assert_equal(run(model, inputs), expected, 1e-5)
        assert count_attention_softmax(lambda model=model, inputs=inputs: call(model, inputs)) == 0
    model, inputs = convert("bert", "sdpa")
    expected = run(model, inputs)
    model.set_attn_implementation("eager")
    assert_equal(run(model, inputs), expected, 1e-5)
    assert count_attention_softmax(lambda: call(model, inputs)) == 0


def test_need_weights_toggled_after_conversion() -> None:
    torch.manual_seed(0)
    model = randomise(nn.MultiheadAttention(16, 2, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    sigswap.convert(model, example_inputs={"query": x, "key": x, "value": x, "need_weights": False})
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            fused, _ = model(x, x, x, need_weights=False)
            explicit, weights = model(x, x, x, need_weights=True)
        assert (fused - explicit).abs().max() <= 1e-5 * fused.abs().max()
        assert (weights.sum(-1) - 1).abs().max() > 0.05
    assert count_attention_softmax(lambda: model(x, x, x, need_weights=True)) == 0


# -------------------------------------------------------------------------------------------------- revert


@pytest.mark.slow
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_revert(entry: Entry) -> None:
    model, inputs = entry.build(), entry.make_inputs()
    with torch.no_grad():
        expected = run(entry.build(), inputs)
    before = Snapshot(model)
    sigswap.convert(model, example_inputs=inputs)
    with torch.no_grad():
        swapped = run(model, inputs)
        assert any(not torch.equal(a, b) for a, b in zip(swapped, expected, strict=True))
        assert sigswap.revert(model) in (None, model)
        before_run = Snapshot(model)
        assert_equal(run(model, inputs), expected)
    before.assert_same(model)
    before_run.assert_same(model)
    with pytest.raises(NotConvertedError):
        sigswap.revert(model)


@pytest.mark.slow
@some_models
def test_converted_again_after_a_revert(name: str) -> None:
    model, inputs = convert(name)
    with torch.no_grad():
        swapped = run(model, inputs)
    sigswap.convert(sigswap.revert(model), example_inputs=inputs)
    with torch.no_grad():
        assert_equal(run(model, inputs), swapped, 1e-6)


def test_revert_keeps_what_was_trained() -> None:
    model, inputs = convert("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients(model, inputs)
    optimizer.step()
    trained = {n: p.clone() for n, p in model.named_parameters() if ".sigswap." not in f".{n}"}
    sigswap.revert(model)
    assert {n for n, _ in model.named_parameters()} == set(trained)
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())


# -------------------------------------------------------------------------------------------------- errors


class _Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        raise RuntimeError("the model's own failure")


class _RowConstant(nn.Module):
    """Subtracts the row's mean before softmax: no change there, but sigmoid is not shift-invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) / 4.0
        scores = scores - scores.mean(-1, keepdim=True)
        return scores.softmax(-1) @ v


class _Thresholded(nn.Module):
    """An op behind the softmax that cannot be followed to the value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return nn.functional.threshold((q @ k.transpose(-1, -2)).softmax(-1), 0.1, 0.0) @ v


class _Beside(nn.Module):
    """An attention that can't be swapped beside one that can."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.good = nn.MultiheadAttention(16, 2, batch_first=True)
        self.bad = other

    def forward(self, x: Tensor) -> Tensor:
        return self.bad(self.good(x, x, x)[0])


UNSWAPPABLE = pytest.mark.parametrize("bad", [_RowConstant, _Thresholded])


def test_converted_twice() -> None:
    model, inputs = convert("vit")
    before = Snapshot(model)
    with pytest.raises(AlreadyConvertedError):
        sigswap.convert(model, example_inputs=inputs)
    before.assert_same(model)
    # Nor as a part of something else.
    with pytest.raises(AlreadyConvertedError):
        sigswap.convert(nn.Sequential(model), example_inputs=inputs)


def test_compiled_model() -> None:
    entry = BY_NAME["vit"]
    model, inputs = entry.build(), entry.make_inputs()
    compiled = torch.compile(model, backend="eager")
    before = Snapshot(model)
    with pytest.raises(ConversionError, match="compile"):
        sigswap.convert(compiled, example_inputs=inputs)
    before.assert_same(model)
    model.compile(backend="eager")
    with pytest.raises(ConversionError, match="compile"):
        sigswap.convert(model, example_inputs=inputs)


def test_no_attention() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1))
    before = Snapshot(model)
    with pytest.raises(NoAttentionError):
        sigswap.convert(model, example_inputs=(torch.randn(2, 8),))
    before.assert_same(model)


def test_no_example_inputs() -> None:
    model = BY_NAME["relative_bias"].build()
    before = Snapshot(model)
    with pytest.raises(ExampleInputsError, match="example_inputs"):
        sigswap.convert(model)
    before.assert_same(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs", [(torch.randn(2, 3, 5, 5),), {"nonsense": 1}, (), ("text",)], ids=["shape", "name", "none", "type"]
)
def test_wrong_example_inputs(inputs: Inputs) -> None:
    model = BY_NAME["vit"].build()
    before = Snapshot(model)
    with pytest.raises(ExampleInputsError):
        sigswap.convert(model, example_inputs=inputs)
    before.assert_same(model)


def test_failing_forward() -> None:
    model = _Failing()
    before = Snapshot(model)
    with pytest.raises(ExampleInputsError, match="the model's own failure"):
        sigswap.convert(model, example_inputs=torch.randn(2, 5, 16))
    before.assert_same(model)


@UNSWAPPABLE
def test_unswappable_is_an_error(bad: type[nn.Module]) -> None:
    model = _Beside(bad()).eval()
    x = torch.randn(2, 5, 16)
    before = Snapshot(model)
    with pytest.raises(UnswappableSiteError, match="bad"):
        sigswap.convert(model, example_inputs=(x,))
    before.assert_same(model)


@UNSWAPPABLE
def test_unswappable_without_strict(bad: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = randomise(_Beside(bad())).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        with sigmoid_oracle(("MultiheadAttention",)):
            expected = model(x)
        sigswap.convert(model, example_inputs=(x,), strict=False)
        assert_equal([model(x)], [expected], 1e-5)
    sites = {site.path: site for site in sigswap.report(model).sites}
    assert sites["good"].status == "swapped"
    assert sites["bad"].status != "swapped" and sites["bad"].reason


def test_nothing_but_unswappable() -> None:
    model = _RowConstant()
    before = Snapshot(model)
    with pytest.raises(ConversionError):
        sigswap.convert(model, example_inputs=(torch.randn(2, 5, 16),), strict=False)
    before.assert_same(model)


def test_report_of_a_plain_model() -> None:
    with pytest.raises(NotConvertedError):
        sigswap.report(BY_NAME["vit"].build())


# --------------------------------------------------------------------------------------- which, and from what


def swapped_paths(model: nn.Module) -> list[str]:
    return [site.path for site in sigswap.report(model).sites if site.status == "swapped"]


def test_include_and_exclude() -> None:
    entry = BY_NAME["t5"]
    inputs = entry.make_inputs()
    everything = swapped_paths(sigswap.convert(entry.build(), example_inputs=inputs))
    encoder = [path for path in everything if path.startswith("encoder.")]
    assert len(everything) == 6 and len(encoder) == 2

    model = sigswap.convert(entry.build(), example_inputs=inputs, include=["encoder.*"])
    assert swapped_paths(model) == encoder
    assert count_attention_softmax(lambda: call(model, inputs)) == 4
    left = [site for site in sigswap.report(model).sites if site.status != "swapped"]
    assert len(left) == 4 and all(site.reason for site in left)

    model = sigswap.convert(entry.build(), example_inputs=inputs, exclude=["encoder.*"])
    assert swapped_paths(model) == [path for path in everything if path not in encoder]
    assert count_attention_softmax(lambda: call(model, inputs)) == 2

    model = sigswap.convert(entry.build(), example_inputs=inputs, include=["decoder.*"], exclude=["*EncDecAttention"])
    assert len(swapped_paths(model)) == 2

    model = entry.build()
    before = Snapshot(model)
    with pytest.raises(NoAttentionError):
        sigswap.convert(model, example_inputs=inputs, exclude=["*"])
    before.assert_same(model)
    with pytest.raises(ArgumentError, match=r"nothing\.\*"):  # a typing error, most likely
        sigswap.convert(model, example_inputs=inputs, include=["nothing.*"])
    before.assert_same(model)


def test_excluded_sites_may_be_unswappable() -> None:
    model = _Beside(_RowConstant()).eval()
    sigswap.convert(model, example_inputs=(torch.randn(2, 5, 16),), exclude=["bad"])
    assert swapped_paths(model) == ["good"]


def test_forms_of_example_inputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32)
    forms: list[Any] = [x, (x,), {"x": x}, [(x,), {"x": x[:1]}], [x, x[:, :4]]]
    for form in forms:
        model = sigswap.convert(BY_NAME["relative_bias"].build(), example_inputs=form)
        assert len(swapped_paths(model)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertModel", "LlamaForCausalLM", "GPT2Model", "T5Model", "WhisperModel", "CLIPModel"])
def test_transformers_need_no_example_inputs(name: str) -> None:
    entry = {"BertModel": "bert", "LlamaForCausalLM": "llama", "GPT2Model": "gpt2", "T5Model": "t5"}
    entry |= {"WhisperModel": "whisper", "CLIPModel": "clip"}
    model = sigswap.convert(hf(name))
    assert len(swapped_paths(model)) == BY_NAME[entry[name]].sites


def test_timm_needs_no_example_inputs() -> None:
    import timm

    model = timm.create_model("test_vit", pretrained=False).eval()
    assert len(swapped_paths(sigswap.convert(model))) == len(model.blocks)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_other_attention_implementations(implementation: str) -> None:
    """Kernels that hold their own softmax are set to sdpa before the conversion."""
    torch.manual_seed(0)
    model = randomise(hf("BertModel", "sdpa")).eval()
    inputs = BY_NAME["bert"].make_inputs()
    expected = run(convert("bert", "sdpa")[0], inputs)
    # Past the setter, which asks for the package of the kernels.
    model.config._attn_implementation_internal = implementation
    assert model.config._attn_implementation == implementation
    sigswap.convert(model, example_inputs=inputs)
    assert model.config._attn_implementation == "sdpa"
    assert_equal(run(model, inputs), expected, 1e-6)
    assert count_attention_softmax(lambda: call(model, inputs)) == 0
    sigswap.revert(model)
    assert model.config._attn_implementation == implementation


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_converted_in_one_mode_and_run_in_the_other(train: bool) -> None:
    for name in ("vit", "torch_encoder", "levit", "bert"):
        entry = BY_NAME[name]
        model, inputs = entry.build().train(train), entry.make_inputs()
        sigswap.convert(model, example_inputs=inputs)
        model.train(not train)
        assert count_attention_softmax(lambda model=model, i=inputs: call(model, i)) == 0
        with torch.no_grad():
            assert count_attention_softmax(lambda model=model, i=inputs: call(model, i)) == 0


def test_seven_billion_parameters_on_the_meta_device() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are Llama 7B's
    assert sum(p.numel() for p in model.parameters()) > 6.5e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    sigswap.convert(model)
    assert time.perf_counter() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    assert len(swapped_paths(model)) == 32
    assert all(p.device.type == "meta" for p in model.parameters())


def test_a_part_of_a_model() -> None:
    """A submodule can be converted by itself, and runs inside the model that holds it."""
    entry = BY_NAME["vit"]
    model, (image,) = entry.build(), entry.make_inputs()
    sigswap.convert(model.blocks[0], example_inputs=torch.randn(2, 17, 32))
    assert count_attention_softmax(lambda: model(image)) == 1
    sigswap.revert(model.blocks[0])
    assert_equal([model(image)], [entry.build()(image)])


def test_one_module_in_two_models_is_shared() -> None:
    """Weight sharing within a model: one set of new parameters, whatever name it is reached by."""
    model, _ = convert("albert")
    new = [name for name, _ in model.named_parameters() if ".sigswap." in f".{name}"]
    assert len(new) == 1
    layer = BY_NAME["vit"].build().blocks[0]
    twice = sigswap.convert(nn.Sequential(layer, layer), example_inputs=torch.randn(2, 17, 32))
    assert count_attention_softmax(lambda: twice(torch.randn(2, 17, 32))) == 0
    assert sum(".sigswap." in f".{name}" for name, _ in twice.named_parameters()) == 1
