"""convert: what the config does to a site, how calls are addressed, and every way to fail without a trace."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from sigswap import SigmoidConfig, errors
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, conversion_of

B, H, HK, M, N, D = 2, 4, 2, 5, 7, 8


class Attention(nn.Module):
    """Cross-attention in one of several spellings, with query and key heads of its own."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.kv, self.out = nn.Linear(H * D, H * D), nn.Linear(H * D, 2 * HK * D), nn.Linear(H * D, H * D)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).view(B, M, H, D).transpose(1, 2)
        k, v = self.kv(y).view(B, N, 2, HK, D).permute(2, 0, 3, 1, 4)
        if self.spelling == "sdpa":
            o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = k.repeat_interleave(H // HK, 1), v.repeat_interleave(H // HK, 1)
            if self.spelling == "matmul":
                o = torch.softmax(q @ k.mT * D**-0.5, -1) @ v
            elif self.spelling == "scaled_query":
                o = torch.softmax((q * D**-0.5) @ k.mT, -1) @ v
            elif self.spelling == "einsum":
                o = torch.einsum("bhmn,bhnd->bhmd", F.softmax(torch.einsum("bhmd,bhnd->bhmn", q, k) / D**0.5, -1), v)
            elif self.spelling == "einsum_by_rows":  # the axes of the query are not in the order of the scores'
                q, k, v = (z.transpose(1, 2) for z in (q, k, v))
                p = F.softmax(torch.einsum("bmhd,bnhd->bhmn", q, k) / D**0.5, -1)
                o = torch.einsum("bhmn,bnhd->bhmd", p, v)
            elif self.spelling == "keys_first":
                o = torch.softmax(k @ q.mT * D**-0.5, -2).mT @ v
            else:  # bmm on [batch*heads, length, head_dim]
                q, k, v = (z.reshape(B * H, -1, D) for z in (q, k, v))
                o = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * D**-0.5, -1), v).view(B, H, M, D)
        return self.out(o.transpose(1, 2).flatten(2))


SPELLINGS = ["sdpa", "matmul", "scaled_query", "einsum", "einsum_by_rows", "keys_first", "bmm"]


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def layer(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def oracle(
    module: Attention,
    x: Tensor,
    y: Tensor,
    *,
    b0: float = -math.log(N),
    c: Tensor | None = None,
    w: Tensor | None = None,
    norm: Any = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
) -> Tensor:
    """The definition (docs/design.md) in float64: s = scale q.k, b = b0 + c_h + w_h.q, p = sigmoid(s + b), o = p v."""
    module, x, y = copy.deepcopy(module).double(), x.double(), y.double()
    q = module.q(x).view(B, M, H, D).transpose(1, 2)
    k, v = module.kv(y).view(B, N, 2, HK, D).permute(2, 0, 3, 1, 4)
    k, v = k.repeat_interleave(H // HK, 1), v.repeat_interleave(H // HK, 1)
    if norm is not None:
        q, k = norm(q) * q_weight.double()[:, None], norm(k) * k_weight.double()[:, None]
    bias = torch.full((H, 1, 1), b0, dtype=torch.float64)
    if c is not None:
        bias = bias + c.double().view(H, 1, 1)
    if w is not None:
        bias = bias + (q * w.double()[:, None]).sum(-1, keepdim=True)
    weights = torch.sigmoid(q @ k.mT * D**-0.5 + bias)
    return module.out((weights @ v).transpose(1, 2).flatten(2))


def made(spelling: str) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(0)
    return Attention(spelling), torch.randn(B, M, H * D), torch.randn(B, N, H * D)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


def randomized(module: nn.Module) -> dict[str, Tensor]:
    """Gives the new parameters values that matter, and returns them by name."""
    new = {name: p for name, p in module.named_parameters() if "sigswap" in name}
    with torch.no_grad():
        for p in new.values():
            p.copy_(torch.randn_like(p) * 0.5 + (1.0 if "norm" in str(p.shape) else 0.2))
    return {name.removeprefix("sigswap."): p for name, p in new.items()}


@pytest.mark.parametrize("spelling", SPELLINGS)
class TestConfig:
    @pytest.mark.slow
    def test_learned_bias(self, spelling: str) -> None:
        module, x, y = made(spelling)
        original = copy.deepcopy(module)
        sigswap.convert(module, example_inputs=(x, y))
        assert module.sigswap.get_submodule("0").bias.tolist() == [0.0] * H
        close(module(x, y), oracle(original, x, y))
        new = randomized(module)
        assert set(new) == {"0.bias"}
        close(module(x, y), oracle(original, x, y, c=new["0.bias"]))
        (grad,) = torch.autograd.grad(module(x, y).square().sum(), new["0.bias"])
        c = new["0.bias"].detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(oracle(original, x, y, c=c).square().sum(), c)
        close(grad, expected)

    @pytest.mark.slow
    def test_constant_biases(self, spelling: str) -> None:
        module, x, y = made(spelling)
        original = copy.deepcopy(module)
        sigswap.convert(module, SigmoidConfig(bias=100, learn_bias=False), example_inputs=(x, y))
        assert not [name for name in module.state_dict() if "sigswap" in name]
        close(module(x, y), oracle(original, x, y, b0=-math.log(100)))
        sigswap.revert(module)
        sigswap.convert(module, SigmoidConfig(bias=-1.5), example_inputs=(x, y))
        close(module(x, y), oracle(original, x, y, b0=-1.5))

    @pytest.mark.slow
    def test_query_bias(self, spelling: str) -> None:
        module, x, y = made(spelling)
        original = copy.deepcopy(module)
        sigswap.convert(module, SigmoidConfig(query_bias=True), example_inputs=(x, y))
        close(module(x, y), oracle(original, x, y))  # w starts at 0
        new = randomized(module)
        assert new["0.query_weight"].shape == (H, D)
        expected = oracle(original, x, y, c=new["0.bias"], w=new["0.query_weight"])
        close(module(x, y), expected)
        close(torch.compile(module, backend="aot_eager", fullgraph=True)(x, y), expected)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["rms", "layer"])
    def test_qk_norm(self, spelling: str, kind: str) -> None:
        module, x, y = made(spelling)
        original = copy.deepcopy(module)
        sigswap.convert(module, SigmoidConfig(qk_norm=kind, query_bias=True), example_inputs=(x, y))  # type: ignore[arg-type]
        new = randomized(module)
        key_weight = new["0.key_norm.weight"]
        if spelling == "bmm":  # batch and heads are one axis there, after the repetition
            assert key_weight.shape == (H, D)
        else:  # one norm per key head, however the heads are repeated for the queries
            assert key_weight.shape == (HK, D)
            key_weight = key_weight.repeat_interleave(H // HK, 0)
        expected = oracle(
            original,
            x,
            y,
            c=new["0.bias"],
            w=new["0.query_weight"],
            norm={"rms": rms, "layer": layer}[kind],
            q_weight=new["0.query_norm.weight"],
            k_weight=key_weight,
        )
        close(module(x, y), expected)

    def test_output_options(self, spelling: str) -> None:
        module, x, y = made(spelling)
        original = copy.deepcopy(module)
        sigswap.convert(module, SigmoidConfig(layer_scale=1e-4, hybrid_norm=True), example_inputs=(x, y))
        expected = F.layer_norm(oracle(original, x, y), (H * D,)) * 1e-4
        close(module(x, y), expected)
        assert module.sigswap.layer_scale.shape == (H * D,)


def test_presets() -> None:
    assert SigmoidConfig() == SigmoidConfig(bias="visible", learn_bias=True, qk_norm=None, layer_scale=None)
    paper = SigmoidConfig.from_scratch(512)
    assert (paper.bias, paper.learn_bias, paper.layer_scale) == (512, False, 1e-4) and paper.qk_norm
    assert SigmoidConfig.from_scratch(512, qk_norm=None).qk_norm is None


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": 0},
        {"bias": True},
        {"bias": "none"},
        {"bias": math.inf},
        {"qk_norm": "l2"},
        {"layer_scale": math.nan},
        {"learn_bias": 1},
        {"overrides": {"*": {"biass": 1}}},
        {"overrides": {"*": {"bias": 0}}},
        {"overrides": ["*"]},
    ],
)
def test_bad_configs(fields: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError):
        SigmoidConfig(**fields)


def test_a_float_bias_that_may_be_a_number_of_keys_is_told() -> None:
    inputs = torch.zeros(B, M, H * D), torch.zeros(B, N, H * D)
    for config in (
        SigmoidConfig(bias=128.0),
        SigmoidConfig(overrides={"*": {"learn_bias": False}, "": {"bias": 17.0}}),
    ):
        with pytest.warns(UserWarning, match=r"bias=1\d+\.0 is a float.*bias=1\d+\."):
            sigswap.convert(Attention("sdpa"), config, example_inputs=inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (SigmoidConfig(bias=128), SigmoidConfig(bias=16.0)):
            sigswap.convert(Attention("sdpa"), config, example_inputs=inputs)
        model = Attention("sdpa")
        with pytest.raises(UserWarning):
            sigswap.convert(model, SigmoidConfig(bias=128.0), example_inputs=inputs)
        assert type(model) is Attention and not sigswap.is_converted(model)


@pytest.mark.parametrize(
    "function",
    [
        sigswap.convert,
        sigswap.inspect,
        sigswap.revert,
        sigswap.report,
        sigswap.is_converted,
        sigswap.calibrate,
        sigswap.rank_sites,
        sigswap.compare,
        sigswap.param_groups,
        sigswap.set_row_cap,
        sigswap.shard_heads,
        sigswap.compile_attention,
    ],
)
def test_what_is_no_module_is_told(function: Any) -> None:
    second = {"calibrate": ([],), "rank_sites": ([],), "param_groups": (1e-3,), "set_row_cap": (1.0,)}
    for model in ("model", None, [nn.Linear(1, 1)]):
        with pytest.raises(errors.ArgumentError, match=r"model must be a torch\.nn\.Module, not a "):
            function(model, *second.get(function.__name__, ()))


def test_softmax_of_no_module_is_told() -> None:
    with pytest.raises(errors.ArgumentError, match=r"model must be a torch\.nn\.Module"), sigswap.softmax(5):  # type: ignore[arg-type]
        pass


def test_config_is_plain_data() -> None:
    config = SigmoidConfig(bias=-2.0, qk_norm="rms", overrides={"a.*": {"bias": 64}})
    assert SigmoidConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.for_path("a.b").bias == 64 and config.for_path("b").bias == -2.0


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention("sdpa"), Attention("matmul")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.first(x, y) + self.second(x, y)


def test_overrides_include_exclude() -> None:
    torch.manual_seed(0)
    model, x, y = Two(), torch.randn(B, M, H * D), torch.randn(B, N, H * D)
    first, second = copy.deepcopy(model.first), copy.deepcopy(model.second)
    softmax = second(x, y)
    sigswap.convert(model, SigmoidConfig(overrides={"second": {"bias": 9}}), example_inputs=(x, y))
    close(model(x, y), oracle(first, x, y) + oracle(second, x, y, b0=-math.log(9)))
    sigswap.revert(model)
    for arguments in ({"include": ["first"]}, {"exclude": ["sec*"]}):
        sigswap.convert(model, example_inputs=(x, y), **arguments)
        close(model(x, y), oracle(first, x, y) + softmax.double())
        by_path = {site.path: (site.status, site.reason) for site in sigswap.report(model).sites}
        assert by_path == {"first": ("swapped", ""), "second": ("left", "excluded")}
        sigswap.revert(model)
    with pytest.raises(errors.ArgumentError, match=r"'third'.*first.*second"):
        sigswap.convert(model, example_inputs=(x, y), include=["third"])
    with pytest.raises(errors.ArgumentError, match="list"):
        sigswap.convert(model, example_inputs=(x, y), include="first")
    for none in (5, [5], iter(["first"]), torch.zeros(2)):  # an iterator would be at its end after the first module
        with pytest.raises(errors.ArgumentError, match="exclude must be a list of patterns, not"):
            sigswap.convert(model, example_inputs=(x, y), exclude=none)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="strict must be True or False, not 'no'"):
        sigswap.convert(model, example_inputs=(x, y), strict="no")  # type: ignore[arg-type]
    with pytest.raises(errors.ConversionError, match="third"):
        sigswap.convert(model, SigmoidConfig(overrides={"third": {"bias": 9}}), example_inputs=(x, y))
    with pytest.raises(errors.NoAttentionError, match="exclude"):
        sigswap.convert(model, example_inputs=(x, y), exclude=["*"])
    assert not sigswap.is_converted(model)


def test_conversion_is_plain_data() -> None:
    torch.manual_seed(0)
    model, x, y = Two(), torch.randn(B, M, H * D), torch.randn(B, N, H * D)
    other = copy.deepcopy(model)
    sigswap.convert(model, SigmoidConfig(qk_norm="rms", layer_scale=0.5), example_inputs=(x, y))
    stored = json.loads(json.dumps(conversion_of(model).to_dict()))
    assert Conversion.from_dict(stored) == conversion_of(model)
    apply_conversion(other, Conversion.from_dict(stored))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, y), model(x, y))
    with pytest.raises(errors.ConversionError, match="'first'"):
        apply_conversion(nn.Linear(2, 2), Conversion.from_dict(stored))


class Chunked(nn.Module):
    """One attention in a loop: how often it runs depends on the input's length."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.cat([torch.softmax(part @ k.mT, -1) @ v for part in q.split(4, dim=1)], dim=1)


def test_a_loop_is_one_site() -> None:
    torch.manual_seed(0)
    model, x = Chunked(), torch.randn(2, 8, 8)
    sigswap.convert(model, example_inputs=x)
    assert [site.status for site in sigswap.report(model).sites] == ["swapped"]
    longer = torch.randn(2, 19, 8)  # more turns than were seen
    q, k, v = model.qkv(longer).double().chunk(3, -1)
    close(model(longer), torch.sigmoid(q @ k.mT - math.log(19)) @ v)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Around an owner it works; inside its forward it would recompute the attention as softmax, and is refused."""
    torch.manual_seed(0)
    model, x = Chunked(), torch.randn(2, 8, 8, requires_grad=True)
    sigswap.convert(model, example_inputs=x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    output.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)

    class Inside(Chunked):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return super().forward(x)
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=reentrant)

    inside = sigswap.convert(Inside(), example_inputs=x)
    with pytest.raises(errors.UnknownCallError, match="whole module"):
        inside(x)


class Branching(nn.Module):
    """Two ways to attend, and a router's softmax that comes first in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, routed: bool = False, plain: bool = False) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if plain:
            return v
        if routed:
            x = x * torch.softmax(self.qkv(x), -1)[..., :1]
        out = torch.softmax(q @ k.mT, -1) @ v
        return out + torch.softmax(k @ q.mT, -1) @ v if routed else out


def test_unknown_calls_raise() -> None:
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(2, 8, 8)
    sigswap.convert(model, example_inputs=x)
    model(x)
    with pytest.raises(errors.UnknownCallError, match=r"more softmax calls.*example_inputs"):
        model(x, routed=True)
    with pytest.raises(errors.UnknownCallError, match="without any"):
        model(x, plain=True)
    with pytest.raises(Exception, match="more softmax calls"):
        torch.compile(model, backend="eager", fullgraph=True)(x, routed=True)


def test_several_example_inputs() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Chunked(), Chunked()
            self.spare = nn.Linear(2, 2)  # holds no attention: not worth a note

        def forward(self, x: Tensor, which: bool = True) -> Tensor:
            return self.a(x) if which else self.b(x)

    model, x = Either(), torch.randn(2, 4, 8)
    sigswap.convert(model, example_inputs=x)
    assert any("not looked at: b (Chunked)." in note for note in sigswap.report(model).notes)
    sigswap.revert(model)
    sigswap.convert(model, example_inputs=[x, {"x": x, "which": False}])
    assert [site.path for site in sigswap.report(model).sites] == ["a", "b"] and not sigswap.report(model).notes


def failing(model: nn.Module, error: type[Exception], match: str, **arguments: Any) -> None:
    """convert raises, and leaves no trace."""
    before = {path: (type(m), sorted(vars(m)), sorted(m._modules)) for path, m in model.named_modules()}
    with pytest.raises(error, match=match):
        sigswap.convert(model, **arguments)
    after = {path: (type(m), sorted(vars(m)), sorted(m._modules)) for path, m in model.named_modules()}
    assert before == after


def test_failures_leave_the_model_alone() -> None:
    x = torch.randn(B, M, H * D)
    y = torch.randn(B, N, H * D)
    failing(nn.Linear(4, 4), errors.NoAttentionError, "Linear", example_inputs=torch.randn(2, 4))
    failing(nn.Linear(4, 4), errors.ExampleInputsError, "example_inputs")
    failing(Two(), errors.ExampleInputsError, "forward", example_inputs=(x,))
    failing(Two(), errors.ExampleInputsError, "list of", example_inputs=3)
    failing(Two(), errors.ExampleInputsError, "empty", example_inputs=[])

    named = Two()
    named.second.sigswap = 1  # type: ignore[assignment]
    failing(named, errors.ConversionError, "attribute named sigswap", example_inputs=(x, y))

    replaced = Two()
    replaced.first.forward = replaced.first.forward  # type: ignore[method-assign]
    failing(replaced, errors.ConversionError, "first: its forward is replaced", example_inputs=(x, y))

    compiled = Two()
    compiled.first.compile(backend="eager")
    failing(compiled, errors.ConversionError, "first is compiled", example_inputs=(x, y))
    with pytest.raises(errors.ConversionError, match="compile it afterwards"):
        sigswap.convert(torch.compile(Two(), backend="eager"), example_inputs=(x, y))

    lazy = nn.Sequential(nn.LazyLinear(H * D), nn.TransformerEncoderLayer(H * D, H, batch_first=True))
    failing(lazy, errors.ConversionError, r"0\.weight has no shape yet. Run the model once", example_inputs=x)
    with pytest.raises(errors.ConversionError, match="no shape yet"):
        sigswap.inspect(lazy, example_inputs=x)
    assert lazy(x).shape == x.shape
    assert sigswap.is_converted(sigswap.convert(lazy, example_inputs=x))

    with pytest.raises(errors.ArgumentError, match="model"):
        sigswap.convert("model")  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="config"):
        sigswap.convert(Two(), {"bias": 3}, example_inputs=(x, y))  # type: ignore[arg-type]


def test_scores_of_several_products_refuse_a_norm() -> None:
    class Disentangled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.positions = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax(q @ k.mT + q @ self.positions(x).mT, -1) @ v

    failing(
        Disentangled(),
        errors.ConfigError,
        "sum of several",
        config=SigmoidConfig(qk_norm="rms"),
        example_inputs=torch.randn(2, 4, 8),
    )
    sigswap.convert(Disentangled(), example_inputs=torch.randn(2, 4, 8))


def test_values_of_the_inputs() -> None:
    """A forward that needs them is run on real tensors, and the report says so."""

    class Trimmed(Chunked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, : int(x.abs().sum() > 0) * 4])

    model = Trimmed()
    sigswap.convert(model, example_inputs=torch.randn(2, 8, 8))
    assert any("on the model's own" in note for note in sigswap.report(model).notes)
    assert torch.equal(sigswap.revert(model)(torch.zeros(2, 8, 8)), torch.zeros(2, 0, 8))


def test_side_effects_stay_in_the_copy() -> None:
    class Caching(Chunked):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x.mT).mT
            self.seen.append(x)
            return super().forward(x)

    model = Caching()
    before = copy.deepcopy(model.state_dict())
    sigswap.convert(model, example_inputs=torch.randn(2, 8, 8))
    assert not model.seen and model.training
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in before)


class TestAddresses:
    """An address must not silently point at another call."""

    class Routed(nn.Module):
        """A loop over chunks, and then a router."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.router = nn.Linear(8, 24), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            out = torch.cat([torch.softmax(part @ k.mT, -1) @ v for part in q.split(4, dim=1)], dim=1)
            return out * torch.softmax(self.router(x), -1)[..., :1]

    def test_fewer_turns_of_a_loop(self) -> None:
        torch.manual_seed(0)
        model = sigswap.convert(self.Routed(), example_inputs=torch.randn(2, 8, 8))
        for length in (8, 4, 19):
            x = torch.randn(2, length, 8)
            q, k, v = model.qkv(x).double().chunk(3, -1)
            gate = torch.softmax(model.router(x).double(), -1)[..., :1]
            close(model(x), torch.sigmoid(q @ k.mT - math.log(length)) @ v * gate)

    def test_a_softmax_of_training_after_a_loop(self) -> None:
        class Auxiliary(Chunked):
            def forward(self, x: Tensor) -> Tensor:
                out = super().forward(x)
                return out + torch.softmax(self.qkv(x), -1)[..., :1] if self.training else out

        model = sigswap.convert(Auxiliary().eval(), example_inputs=torch.randn(2, 8, 8))
        model(torch.randn(2, 12, 8))
        with pytest.raises(errors.UnknownCallError, match="another path"):
            model.train()(torch.randn(2, 8, 8))

    def test_inputs_that_take_different_paths(self) -> None:
        class Either(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qkv = nn.Linear(8, 24)

            def forward(self, x: Tensor, pool: bool = False) -> Tensor:
                q, k, v = self.qkv(x).chunk(3, -1)
                if pool:
                    return (torch.softmax(v, 1) * v).sum(1)
                return torch.softmax(q @ k.mT, -1) @ v

        torch.manual_seed(0)
        model, x = Either(), torch.randn(2, 8, 8)
        pooled = model(x, pool=True)
        sigswap.convert(model, example_inputs=[{"x": x}, {"x": x, "pool": True}])
        q, k, v = model.qkv(x).double().chunk(3, -1)
        close(model(x), torch.sigmoid(q @ k.mT - math.log(8)) @ v)
        assert torch.equal(model(x, pool=True), pooled)

    def test_an_owner_that_may_skip(self) -> None:
        class Skipping(Chunked):
            def forward(self, x: Tensor) -> Tensor:
                return x if x.shape[1] == 1 else super().forward(x)

        x = torch.randn(2, 8, 8)
        model = sigswap.convert(Skipping(), example_inputs=[x, x[:, :1]])
        assert torch.equal(model(x[:, :1]), x[:, :1])
        model(x)

    def test_inside_an_autograd_function(self) -> None:
        class Softmax(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, scores: Tensor) -> Tensor:
                return torch.softmax(scores, -1)

        class Custom(Chunked):
            def forward(self, x: Tensor) -> Tensor:
                q, k, v = self.qkv(x).chunk(3, -1)
                return Softmax.apply(q @ k.mT) @ v

        failing(Custom(), errors.UnswappableSiteError, "autograd.Function", example_inputs=torch.randn(2, 8, 8))


@functools.lru_cache
def cached_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("frozen", [False, True])
def test_caches_hold_no_fake_tensors(frozen: bool, thawed: None) -> None:
    cached_mask.cache_clear()
    if frozen:
        gc.freeze()  # as servers do before they fork: it hides the cache from who looks through all objects

    class Masked(Chunked):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax((q @ k.mT).masked_fill(~cached_mask(x.shape[1]), -math.inf), -1) @ v

    model, x = Masked(), torch.randn(2, 8, 8)
    sigswap.inspect(model, example_inputs=x)
    assert type(cached_mask(8)) is Tensor and type(model(x)) is Tensor
    assert bool(gc.get_freeze_count()) is frozen


def test_a_run_on_real_tensors_changes_nothing() -> None:
    class Clamping(Chunked):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x > 100).any()):
                return x
            self.qkv.weight.data.clamp_(max=0.0)
            return super().forward(x.add_(1.0))

    model, x = Clamping(), torch.randn(2, 8, 8)
    weight, before = model.qkv.weight.detach().clone(), x.clone()
    sigswap.inspect(model, example_inputs=x)
    assert torch.equal(model.qkv.weight, weight) and torch.equal(x, before)


def test_revert_refuses_a_class_that_was_changed() -> None:
    model, x = Chunked(), torch.randn(2, 8, 8)
    sigswap.convert(model, example_inputs=x)
    torch.nn.utils.parametrize.register_parametrization(model.qkv, "weight", nn.Identity())
    sigswap.revert(model)  # of a child: no matter
    sigswap.convert(model, example_inputs=x)
    model.extra = nn.Parameter(torch.zeros(3))
    torch.nn.utils.parametrize.register_parametrization(model, "extra", nn.Identity())
    assert sigswap.is_converted(model)
    with pytest.raises(errors.ConversionError, match="its class was changed"):
        sigswap.revert(model)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bhmn", "hbmn", "windows"])
@pytest.mark.parametrize("sdpa", [False, True])
def test_heads_are_where_the_channels_were_split(layout: str, sdpa: bool) -> None:
    """c_h belongs to its head in every layout, not to a batch row or a window."""

    class Laid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            if layout == "windows":  # [B, H, W, n, D]
                q, k, v = self.qkv(x).reshape(batch, 3, 2, 3, 4, 4).permute(3, 0, 4, 1, 2, 5)
            else:
                order = (2, 0, 3, 1, 4) if layout == "bhmn" else (2, 3, 0, 1, 4)
                q, k, v = self.qkv(x).reshape(batch, 6, 3, 4, 4).permute(order)
            if sdpa:
                return F.scaled_dot_product_attention(q, k, v)
            return torch.softmax(q @ k.mT / 2, -1) @ v

    torch.manual_seed(0)
    model, x = Laid(), torch.randn(5, 6, 16)
    original = copy.deepcopy(model).double()
    sigswap.convert(model, example_inputs=x)
    assert sigswap.report(model).sites[0].heads == 4
    c = torch.randn(4)
    with torch.no_grad():
        model.sigswap.get_submodule("0").bias.copy_(c)
    if layout == "windows":
        q, k, v = original.qkv(x.double()).reshape(5, 3, 2, 3, 4, 4).permute(3, 0, 4, 1, 2, 5)
    else:
        order = (2, 0, 3, 1, 4) if layout == "bhmn" else (2, 3, 0, 1, 4)
        q, k, v = original.qkv(x.double()).reshape(5, 6, 3, 4, 4).permute(order)
    heads = {"bhmn": (1, 4, 1, 1), "hbmn": (4, 1, 1, 1), "windows": (1, 4, 1, 1, 1)}[layout]
    bias = c.double().view(heads) - math.log(q.shape[-2])
    close(model(x), torch.sigmoid(q @ k.mT / 2 + bias) @ v)


def test_registries_of_subclasses_stay() -> None:
    registry: dict[str, type] = {}

    class Registered(Chunked):
        def __init_subclass__(cls, *, kind: str, **kwargs: Any) -> None:
            registry[cls.__name__] = cls

    class Attend(Registered, kind="plain"):
        pass

    model, x = Attend(), torch.randn(2, 8, 8)
    sigswap.convert(model, example_inputs=x)
    assert registry == {"Attend": Attend} and type(model) is not Attend and isinstance(model, Attend)
    model(x)
    assert type(sigswap.revert(model)) is Attend


def test_norms_of_an_owner_around_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.inner = nn.Linear(8, 24), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x, x, x)[0]
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax(q @ k.mT, -1) @ v

    torch.manual_seed(0)
    x = torch.randn(2, 8, 8)
    model = sigswap.convert(Outer(), SigmoidConfig(query_bias=True), example_inputs=x)
    with torch.no_grad():
        for parameter in model.sigswap.parameters():
            parameter.normal_()
    q, k, v = model.qkv(model.inner(x, x, x)[0]).double().chunk(3, -1)
    site = model.sigswap.get_submodule("0")
    bias = site.bias.double() + (q * site.query_weight[0].double()).sum(-1, keepdim=True) - math.log(8)
    close(model(x), torch.sigmoid(q @ k.mT + bias) @ v)


@pytest.mark.parametrize("name", ["module.py", "overrides.py"])
def test_a_users_file_may_be_called_as_one_of_torchs(name: str, tmp_path: Path) -> None:
    """Each attention has a place of its own, by the line that calls it: torch's files are left out of it, by path."""
    source = (
        "import torch.nn as nn, torch.nn.functional as F\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.p = nn.Linear(16, 48)\n"
        "    def forward(self, x):\n"
        "        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.p(x).chunk(3, -1))\n"
        "        a = F.scaled_dot_product_attention(q, k, v)\n"
        "        b = F.scaled_dot_product_attention(k, q, v)\n"
        "        return (a + b).transpose(1, 2).flatten(2)\n"
    )
    (tmp_path / name).write_text(source)
    spec = importlib.util.spec_from_file_location("users", tmp_path / name)
    assert spec is not None and spec.loader is not None
    users = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(users)
    model = sigswap.convert(users.Two().eval(), example_inputs=torch.randn(1, 5, 16))
    assert [key for key in model.state_dict() if "sigswap" in key] == ["sigswap.0.bias", "sigswap.1.bias"]
