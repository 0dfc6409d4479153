"""Models that accelerate has dispatched before they are converted: its hooks run each module's forward."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import sigmoid_oracle
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from zoo import BY_NAME, Inputs, call, hf, randomise

import sigswap
from sigswap import errors
from sigswap.conversion.record import conversion_of

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")
LAST_LAYER_ON_DISK = {
    **dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"], "cpu"),
    "model.layers.1": "disk",
}
QUERY_BIAS = sigswap.SigmoidConfig(query_bias=True, layer_scale=0.5)


def language_model() -> Any:
    return randomise(hf("LlamaForCausalLM"), gain=0.7).eval()


def texts() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 61, (3, 4, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


def run(model: Any, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tree_leaves(call(model, inputs)) if isinstance(t, Tensor) and t.is_floating_point()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def dispatched(model: nn.Module) -> nn.Module:
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def two_hooks(model: nn.Module) -> nn.Module:
    """On every module a hook appended to another's."""
    dispatched(model)
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True), append=True)
    return model


def offloaded(model: nn.Module) -> nn.Module:
    """All weights are on meta between the calls of their modules."""
    return accelerate.cpu_offload(model, execution_device="cpu")


def state_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By module, all that is set on the instance: its class, its own attributes, its children."""
    found = {}
    for path, module in model.named_modules():
        own = dict(vars(module)) | {"class": type(module), "children": list(module._modules)}
        found[path] = {name: value for name, value in own.items() if not isinstance(value, dict | set)}
    return found


every_hook = pytest.mark.parametrize("place", [dispatched, two_hooks, offloaded])


# One of each way to own attention.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, dispatched) for name in ("vit", "levit", "albert", "torch_encoder", "fairseq_moe")]
    + [(name, place) for name in ("t5", "two_sites") for place in (dispatched, two_hooks, offloaded)],
)
def test_conversion_inside_the_hooks(name: str, place: Callable[[nn.Module], nn.Module]) -> None:
    entry, inputs = BY_NAME[name], BY_NAME[name].make_inputs()
    bare = sigswap.convert(entry.build(), example_inputs=inputs)
    model = place(entry.build())
    before, original = state_of(model), run(model, inputs)
    assert sigswap.inspect(model, example_inputs=inputs) == sigswap.inspect(entry.build(), example_inputs=inputs)
    assert state_of(model) == before

    assert sigswap.convert(model, example_inputs=inputs) is model
    assert conversion_of(model) == conversion_of(bare)
    assert_equal(run(model, inputs), run(bare, inputs))
    with torch.no_grad(), sigmoid_oracle(entry.owners, entry.is_attention):
        expected = run(entry.build(), inputs)
    assert_equal(run(model, inputs), expected, 1e-4)
    owners = [module for module in model.modules() if hasattr(module, "sigswap")]
    assert owners and not any(p.is_meta for owner in owners for p in owner.sigswap.parameters())
    with sigswap.softmax(model), sigswap.softmax(bare):
        assert_equal(run(model, inputs), run(bare, inputs))

    assert sigswap.revert(model) is model
    assert state_of(model) == before
    assert_equal(run(model, inputs), original)


@pytest.mark.slow
@every_hook
def test_hooks_run_around_the_new_forward(place: Callable[[nn.Module], nn.Module]) -> None:
    class Counting(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            assert hasattr(module, "sigswap")
            self.calls += 1
            return args, kwargs

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("hooks hold weights, so the copy that is looked at must not copy them")

    model = place(language_model())
    hooks.add_hook_to_module(model.model.layers[0].self_attn, counting := Counting(), append=True)
    sigswap.convert(model)
    assert counting.calls == 0
    run(model, texts()[0])
    assert counting.calls == 1


@pytest.mark.slow
@every_hook
def test_calibration_and_distillation(place: Callable[[nn.Module], nn.Module]) -> None:
    bare = sigswap.convert(language_model(), QUERY_BIAS)
    model = sigswap.convert(place(language_model()), QUERY_BIAS, calibrate_with=texts())
    sigswap.calibrate(bare, texts(), progress=False)
    uncalibrated = sigswap.convert(language_model(), QUERY_BIAS)
    assert (run(bare, texts()[0])[0] - run(uncalibrated, texts()[0])[0]).abs().max() > 0.01
    assert_equal(run(model, texts()[0]), run(bare, texts()[0]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    calibrated = run(bare, texts()[0])
    for one in (model, bare):
        sigswap.distill(one, None, texts(), steps=2, layerwise_steps=2, train="sigmoid", lr=1e-2, progress=False)
    assert (run(bare, texts()[0])[0] - calibrated[0]).abs().max() > 1e-3
    assert_equal(run(model, texts()[0]), run(bare, texts()[0]))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_offloaded_weights_are_not_trained() -> None:
    model = sigswap.convert(offloaded(language_model()))
    with pytest.raises(errors.ArgumentError, match="train='sigmoid'"):
        sigswap.distill(model, language_model(), texts(), steps=1, progress=False)


def test_copies_and_removed_hooks() -> None:
    bare, plain = sigswap.convert(language_model()), language_model()
    model = sigswap.convert(dispatched(language_model()))
    twin = copy.deepcopy(model)
    for owner in (module for module in twin.modules() if hasattr(module, "sigswap")):
        nn.init.constant_(owner.sigswap.site(0).bias, 1.0)
    inputs = texts()[0]
    assert_equal(run(model, inputs), run(bare, inputs))
    assert (run(twin, inputs)[0] - run(model, inputs)[0]).abs().max() > 0.01
    hooks.remove_hook_from_submodules(model)
    assert_equal(run(model, inputs), run(bare, inputs))
    for one in (model, twin):
        sigswap.revert(one)
        assert_equal(run(one, inputs), run(plain, inputs))
        sigswap.convert(one)
        assert_equal(run(one, inputs), run(bare, inputs))


def test_from_pretrained_with_a_device_map(tmp_path: Path) -> None:
    """Convert, calibrate, save and load, with layers on disk."""
    plain = language_model()
    plain.save_pretrained(tmp_path / "plain")
    model = type(plain).from_pretrained(
        tmp_path / "plain",
        device_map=LAST_LAYER_ON_DISK,
        offload_folder=tmp_path / "plain parts",
    )
    assert any(p.is_meta for p in model.parameters()) and hasattr(model, "_hf_hook")
    for one in (model, plain):
        sigswap.convert(one, QUERY_BIAS)
        sigswap.calibrate(one, texts(), progress=False)
    inputs = texts()[0]
    assert_equal(run(model, inputs), run(plain, inputs))
    prompt = inputs["input_ids"][:1, :5]
    assert torch.equal(*(m.generate(prompt, do_sample=False, max_new_tokens=5) for m in (model, plain)))
    before = state_of(model)
    sigswap.save(model, tmp_path / "saved")
    assert state_of(model) == before
    assert_equal(run(sigswap.load(tmp_path / "saved"), inputs), run(plain, inputs))


def test_from_pretrained_of_a_converted_model_with_a_device_map(tmp_path: Path) -> None:
    """Sigswap's own parameters are not offloaded: their module is not called, so no hook would bring them."""
    bare = sigswap.convert(language_model(), QUERY_BIAS)
    sigswap.save(bare, tmp_path / "saved")
    model = type(bare).from_pretrained(
        tmp_path / "saved", device_map=LAST_LAYER_ON_DISK, offload_folder=tmp_path / "parts"
    )
    assert any(p.is_meta for p in model.parameters())
    inputs = texts()[0]
    assert_equal(run(model, inputs), run(bare, inputs))
    for one in (model, bare):
        sigswap.calibrate(one, texts(), progress=False)
    assert_equal(run(model, inputs), run(bare, inputs))
    sigswap.save(model, tmp_path / "again")
    assert_equal(run(sigswap.load(tmp_path / "again"), inputs), run(bare, inputs))
    sigswap.revert(model)
    assert_equal(run(model, inputs), run(language_model(), inputs))


def test_calibration_of_parameters_that_are_offloaded() -> None:
    model, bare = (
        offloaded(sigswap.convert(language_model(), QUERY_BIAS)),
        sigswap.convert(language_model(), QUERY_BIAS),
    )
    before = run(model, texts()[0])
    for each in (model, bare):
        sigswap.calibrate(each, texts(), progress=False)
    assert_equal(run(model, texts()[0]), run(bare, texts()[0]))
    assert (run(model, texts()[0])[0] - before[0]).abs().max() > 0.01


def test_save_of_offloaded_weights_that_only_the_hooks_know(tmp_path: Path) -> None:
    model = sigswap.convert(offloaded(language_model()))
    with pytest.raises(errors.CheckpointError, match="remove_hook_from_submodules"):
        sigswap.save(model, tmp_path)
    inputs = texts()[0]
    expected = run(model, inputs)
    hooks.remove_hook_from_submodules(model)
    sigswap.save(model, tmp_path)
    assert_equal(run(sigswap.load(tmp_path), inputs), expected)


def test_save_of_a_dispatched_model_that_a_factory_builds(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = sigswap.convert(dispatched(randomise(timm.create_model("vit_tiny_patch16_224", **small)).eval()))
    x = torch.randn(2, 3, 32, 32)
    before = state_of(model)
    sigswap.save(model, tmp_path, factory="timm:vit_tiny_patch16_224", factory_kwargs=small)
    assert state_of(model) == before
    assert_equal(run(sigswap.load(tmp_path), (x,)), run(model, (x,)))


def test_failures_leave_the_hooks_alone() -> None:
    model = dispatched(language_model())
    model.model.layers[1].self_attn.sigswap = 1
    before, original = state_of(model), run(model, texts()[0])
    with pytest.raises(errors.ConversionError, match="attribute named sigswap"):
        sigswap.convert(model)
    assert state_of(model) == before
    del model.model.layers[1].self_attn.sigswap
    before = state_of(model)
    with pytest.raises(errors.CalibrationError):
        sigswap.convert(model, calibrate_with=[{"input_ids": torch.full((2, 4), 10**6)}])
    assert state_of(model) == before

    class Stubborn(type(model.model.layers[1].self_attn)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__" and value is not Stubborn:
                raise TypeError("no other class")
            super().__setattr__(name, value)

    last = model.model.layers[1].self_attn
    hook = last._hf_hook
    hooks.remove_hook_from_module(last)
    del last.forward
    last.__class__ = Stubborn
    hooks.add_hook_to_module(last, hook)
    before = state_of(model)
    with pytest.raises(errors.ConversionError, match="no other class"):
        sigswap.convert(model)
    assert state_of(model) == before
    assert_equal(run(model, texts()[0]), original)


def test_other_replaced_forwards_are_refused() -> None:
    def replacement(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    for hooked_first in (True, False):
        model = dispatched(language_model()) if hooked_first else language_model()
        attention = model.model.layers[1].self_attn
        attention.forward = types.MethodType(replacement, attention)
        if not hooked_first:
            dispatched(model)
        before = state_of(model)
        with pytest.raises(errors.ConversionError, match=r"layers\.1\.self_attn: its forward is replaced"):
            sigswap.convert(model)
        assert state_of(model) == before
    model = sigswap.convert(dispatched(language_model()))
    attention = model.model.layers[1].self_attn
    attention.forward = types.MethodType(replacement, attention)
    with pytest.raises(errors.ConversionError, match=r"layers\.1\.self_attn: its forward was replaced"):
        sigswap.revert(model)


def test_weights_offloaded_for_whole_blocks_are_refused() -> None:
    model = accelerate.cpu_offload(
        language_model(), execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"]
    )
    before = state_of(model)
    with pytest.raises(errors.ConversionError, match="Convert the model before it is dispatched"):
        sigswap.convert(model)
    assert state_of(model) == before


# Two devices that need not be there: fake tensors.


class Core(nn.Module):
    """Owns the attention, and no parameter."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT / 2, -1) @ v


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.core, self.out = nn.Linear(8, 24), Core(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


class Blocks(nn.Sequential):
    def __init__(self, *devices: str) -> None:
        super().__init__()
        for index, device in enumerate(devices):
            with torch.device(device):
                self.add_module(str(index), Block())


class Moving(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x).to("cuda:1"))


def test_two_devices() -> None:
    x = torch.zeros(2, 5, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Blocks("cuda:0", "cuda:1")
        for index, block in enumerate(model):
            hooks.add_hook_to_module(block, hooks.AlignDevicesHook(index))
        assert model(x).device == torch.device("cuda:1")
        before = state_of(model)
        sigswap.convert(model, example_inputs=x)
        bare = sigswap.convert(Blocks("cpu", "cpu"), example_inputs=x)
        assert conversion_of(model) == conversion_of(bare)
        found = {name: str(p.device) for name, p in model.named_parameters() if ".sigswap." in name}
        assert found == {"0.core.sigswap.0.bias": "cuda:0", "1.core.sigswap.0.bias": "cuda:1"}
        assert model(x).device == torch.device("cuda:1")
        sigswap.revert(model)
        assert state_of(model) == before


def test_a_forward_that_spreads_the_model_itself() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, model = torch.zeros(2, 5, 8), Moving("cuda:0", "cuda:1")
        sigswap.convert(model, example_inputs=x)  # not by a copy on one device
        bare = sigswap.convert(Blocks("cpu", "cpu"), example_inputs=x)
        assert conversion_of(model).owners == conversion_of(bare).owners


def test_a_forward_that_needs_values() -> None:
    class Switching(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if bool((x > 0).all()) else x + 1)

    x = torch.rand(2, 5, 8)
    bare = Switching("cpu", "cpu")
    spread = [dispatched(copy.deepcopy(bare)), offloaded(copy.deepcopy(bare))]
    for one in (*spread, bare):
        before = state_of(one)
        sigswap.convert(one, example_inputs=x)
        sigswap.revert(one)
        assert state_of(one) == before
        sigswap.convert(one, example_inputs=x)
    for one in spread:
        assert conversion_of(one) == conversion_of(bare)
        assert_equal(run(one, (x,)), run(bare, (x,)))


@pytest.mark.slow
@pytest.mark.parametrize("features", [{}, {"query_bias": True, "qk_norm": "rms", "layer_scale": 0.5}])
@pytest.mark.parametrize("disk", [False, True])
def test_offloaded_after_the_conversion(disk: bool, features: dict[str, Any], tmp_path: Path) -> None:
    """What was put into the model is used by functions, not by a forward that a hook could stand before."""
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model = sigswap.convert(transformers.LlamaForCausalLM(config).eval(), sigswap.SigmoidConfig(**features))
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        if disk:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        else:
            accelerate.cpu_offload(model, execution_device="cpu")
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected)
    sigswap.calibrate(model, [{"input_ids": ids}], lookups=False, refine=0, progress=False)
    with torch.no_grad():
        calibrated = model(ids).logits
        assert not torch.equal(calibrated, expected)
        accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(model(ids).logits, calibrated)
