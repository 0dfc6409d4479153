"""torch.compile(backend="sigswap"): swaps unconverted models at compile time, leaves converted ones as they are."""

from __future__ import annotations

import copy
import logging
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from sigswap.compiling.backend import sigswap_backend

B, H, M, D = 2, 4, 6, 8


class Attention(nn.Module):
    """Causal self-attention that computes its own scores, with a router's softmax before it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.router = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D), nn.Linear(H * D, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.softmax(self.router(x), dim=-1)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * D**-0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)) * gate[..., :1]


def oracle(module: Attention, x: Tensor, bias: Tensor | float | None = None) -> Tensor:
    """The same with sigmoid, in float64, written out."""
    double = copy.deepcopy(module).double()
    x = x.double()
    gate = torch.softmax(double.router(x), dim=-1)
    q, k, v = double.qkv(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if bias is None:
        bias = -visible.sum(-1, keepdim=True).double().log()
    weights = torch.sigmoid(q @ k.mT * D**-0.5 + bias) * visible
    return double.out((weights @ v).transpose(1, 2).flatten(2)) * gate[..., :1]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def module() -> Attention:
    torch.manual_seed(0)
    return Attention()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, M, H * D)


def compiled(model: nn.Module, inner: Any = "aot_eager", **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    fullgraph = options.pop("fullgraph", True)
    return torch.compile(
        model, backend="sigswap", options={"inner": inner, **options}, dynamic=dynamic, fullgraph=fullgraph
    )


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_swaps_an_unconverted_model(module: Attention, x: Tensor, inner: str) -> None:
    before = type(module), list(module.state_dict())
    close(compiled(module, inner)(x), oracle(module, x))
    assert (type(module), list(module.state_dict())) == before


def test_trains(module: Attention, x: Tensor) -> None:
    x.requires_grad_()
    grads = torch.autograd.grad(compiled(module)(x).square().sum(), [x, *module.parameters()])
    double = copy.deepcopy(module).double()
    x64 = x.detach().double().requires_grad_()
    # oracle() copies its module, so the gradients are taken from the copy of this call.
    copies: list[nn.Module] = []
    original = copy.deepcopy

    def remembered(value: Any) -> Any:
        copies.append(original(value))
        return copies[-1]

    copy.deepcopy = remembered  # type: ignore[assignment]
    try:
        output = oracle(double, x64)  # type: ignore[arg-type]
    finally:
        copy.deepcopy = original  # type: ignore[assignment]
    expected = torch.autograd.grad(output.square().sum(), [x64, *copies[0].parameters()])
    for actual, exact in zip(grads, expected, strict=True):
        close(actual, exact)


def test_bias_options(module: Attention, x: Tensor) -> None:
    close(compiled(module, bias=64)(x), oracle(module, x, -math.log(64)))
    torch._dynamo.reset()
    close(compiled(module, bias=-2.5)(x), oracle(module, x, -2.5))


def test_dynamic_shapes_do_not_recompile(module: Attention) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = compiled(module, counting, dynamic=True)
    for length in (5, 6, 9, 12):
        x = torch.randn(B, length, H * D)
        close(model(x), oracle(module, x))
    assert len(graphs) == 1


def test_graph_breaks(x: Tensor) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    torch.manual_seed(0)
    model = Broken()
    expected = oracle(model.second, oracle(model.first, x).float())
    close(compiled(model, fullgraph=False)(x), expected)


def test_activation_checkpointing(module: Attention, x: Tensor) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    x.requires_grad_()
    expected = torch.autograd.grad(compiled(module)(x).square().sum(), x)[0]
    torch._dynamo.reset()
    output = compiled(Checkpointed())(x)
    close(output, oracle(module, x.detach()))
    close(torch.autograd.grad(output.square().sum(), x)[0], expected)


def test_a_converted_model_stays_converted(module: Attention, x: Tensor) -> None:
    sigswap.convert(module, example_inputs=x)
    with torch.no_grad():
        module.sigswap.get_submodule("0").bias.fill_(0.7)  # what a second swap would lose
    close(compiled(module)(x), module(x))
    bias = -torch.arange(1, M + 1).double().log().view(M, 1) + 0.7
    close(module(x), oracle(sigswap.revert(module), x, bias))  # type: ignore[arg-type]


def test_every_argument_of_sdpa() -> None:
    q, k, v = torch.randn(B, H, M, D), torch.randn(B, 2, M, D), torch.randn(B, 2, M, D)
    mask = torch.rand(B, 1, M, M) > 0.3
    function = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.0, False, scale=0.2, enable_gqa=True)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.2
    weights = torch.sigmoid(scores - mask.sum(-1, keepdim=True).clamp(min=1).log()) * mask
    close(compiled(function)(q, k, v, mask), weights @ v.double().repeat_interleave(2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_torch_nn_layers(grad: bool, padded: bool) -> None:
    """Without grad torch.nn runs fused ops, which hold a softmax that no graph shows."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(H * D, H, 64, batch_first=True).eval()
    x = torch.randn(B, M, H * D)
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[1, 4:] = True
    inputs = {"src": x, "src_key_padding_mask": padding if padded else None}

    double = copy.deepcopy(layer).double()
    attn = double.self_attn
    q, k, v = F.linear(x.double(), attn.in_proj_weight, attn.in_proj_bias).view(B, M, 3, H, D).permute(2, 0, 3, 1, 4)
    visible = ~padding.view(B, 1, 1, M) if padded else torch.ones(1, 1, 1, M, dtype=torch.bool)
    weights = torch.sigmoid(q @ k.mT * D**-0.5 - visible.sum(-1, keepdim=True).log()) * visible
    y = double.norm1(x.double() + attn.out_proj((weights @ v).transpose(1, 2).flatten(2)))
    expected = double.norm2(y + double.linear2(F.relu(double.linear1(y))))

    with torch.set_grad_enabled(grad):
        close(compiled(layer)(**inputs), expected)


SPELLINGS = {
    "softmin": lambda s: F.softmin(-s, -1),
    "exp2": lambda s: (e := (s / math.log(2)).exp2()) / e.sum(-1, keepdim=True),
    "in place": lambda s: (e := (s + 0.0).expm1_().add_(1)).div_(e.sum(-1, keepdim=True)),
    "power": lambda s: (e := math.e**s) / e.sum(-1, keepdim=True),
    "to a given tensor": lambda s: (e := torch.exp(s, out=torch.empty_like(s))) / e.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_softmax_by_another_name_is_no_graph_without_one(name: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SPELLINGS[name](q @ k.mT) @ v

    with pytest.raises(Exception, match=r"softmax.* cannot be swapped"):
        compiled(attention, "eager")(*(torch.randn(B, H, M, D) for _ in range(3)))


def test_within_vmap() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).softmax(-1) @ v

    args = [torch.randn(B, H, M, D) for _ in range(3)]
    masks = torch.zeros(B, M, M)
    masks[0].masked_fill_(torch.ones(M, M).triu(1).bool(), -math.inf)  # another for each of the batch
    mapped = lambda *args: torch.vmap(torch.vmap(attention, (0, 0, 0, None), 1))(*args)
    got = compiled(mapped)(*args, masks)
    weights = torch.sigmoid(
        (args[0].double() @ args[1].double().mT) - (masks == 0).sum(-1).double().log()[:, None, :, None]
    )
    weights = weights * (masks == 0)[:, None]
    close(got, (weights @ args[2].double()).transpose(1, 2))


def test_keys_that_are_written_into_a_cache() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (torch.zeros(B, H, M + 2, D) for _ in range(2))
        keys[:, :, :M], values[:, :, :M] = k, v
        hidden = torch.arange(M + 2) > torch.arange(M)[:, None]
        return (q @ keys.mT).masked_fill(hidden, -math.inf).softmax(-1) @ values

    q, k, v = (torch.randn(B, H, M, D) for _ in range(3))
    visible = torch.ones(M, M, dtype=torch.bool).tril()
    weights = torch.sigmoid(q.double() @ k.double().mT - visible.sum(-1, keepdim=True).log()) * visible
    close(compiled(attention)(q, k, v), weights @ v.double())


def test_a_graph_break_within_a_softmax_by_hand() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        torch._dynamo.graph_break()
        return (e / e.sum(-1, keepdim=True)) @ v

    with pytest.raises(Exception, match="the graph breaks within"):
        compiled(attention, "eager", fullgraph=False)(*(torch.randn(B, H, M, D) for _ in range(3)))


def test_graph_breaks_on_both_sides_of_a_softmax() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        torch._dynamo.graph_break()
        weights = scores.softmax(-1)
        torch._dynamo.graph_break()
        return weights @ v

    with pytest.raises(Exception, match="cannot be told"):
        compiled(attention, "eager", fullgraph=False)(*(torch.randn(B, H, M, D) for _ in range(3)))


@pytest.mark.parametrize("where", ["before the product", "after the product", "after the softmax", "after the value"])
def test_a_graph_break(where: str) -> None:
    """Within an attention it is in doubt, and beside it of no account; a similarity alone is no attention."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def may_break(here: str) -> None:
            if where == here:
                torch._dynamo.graph_break()

        may_break("before the product")
        scores = q @ k.mT
        may_break("after the product")
        weights = scores.softmax(-1)
        may_break("after the softmax")
        out = weights @ v
        may_break("after the value")
        return out * 2

    args = [torch.randn(B, H, M, D) for _ in range(3)]
    compiled = torch.compile(attention, backend="sigswap", options={"inner": "eager"})
    if where in ("after the product", "after the softmax"):
        with pytest.raises(Exception, match="the graph breaks"):
            compiled(*args)
    else:
        weights = torch.sigmoid(args[0] @ args[1].mT - math.log(M))
        assert torch.allclose(compiled(*args), weights @ args[2] * 2, atol=1e-5)


def test_a_similarity_alone_is_no_attention() -> None:
    def similarity(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).softmax(-1)

    args = [torch.randn(3, 4), torch.randn(5, 4)]
    compiled = torch.compile(similarity, backend="sigswap", options={"inner": "eager"})
    assert torch.allclose(compiled(*args), similarity(*args))


def test_left_alone_is_logged_and_strict_raises(caplog: pytest.LogCaptureFixture) -> None:
    def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores - scores.mean(-1, keepdim=True)).softmax(-1) @ v

    args = [torch.randn(B, H, M, D) for _ in range(3)]
    with pytest.raises(Exception, match="shifted by a reduction") as info:
        compiled(shifted)(*args)
    assert "UnswappableSiteError" in str(info.value) or isinstance(info.value, sigswap.errors.UnswappableSiteError)
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, logger="sigswap"):
        close(compiled(shifted, strict=False)(*args), shifted(*args))
    assert any("shifted by a reduction" in r.message and r.levelno == logging.WARNING for r in caplog.records)


def test_unknown_options_raise(module: Attention, x: Tensor) -> None:
    with pytest.raises(Exception, match="'iner'"):
        torch.compile(module, backend="sigswap", options={"iner": "eager"})(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="another backend"):
        torch.compile(module, backend="sigswap", options={"inner": "sigswap"})(x)


def test_mode_and_options_reach_inductor(module: Attention, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def compile_fx(graph: torch.fx.GraphModule, inputs: Any, config_patches: Any = None) -> Any:
        seen.update(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch.compile(module, backend="sigswap", options={"inner_options": {"max_fusion_size": 3}})(x)
    launches = seen.pop("post_grad_custom_post_pass")
    assert isinstance(launches, sigswap.InductorLaunches)
    assert seen == {"max_fusion_size": 3}
    assert callable(sigswap_backend)
    torch._dynamo.reset()
    torch.compile(
        module, backend="sigswap", options={"inner_options": {"max_fusion_size": 3, "post_grad_custom_post_pass": None}}
    )(x)
    assert seen == {"max_fusion_size": 3, "post_grad_custom_post_pass": None}


def test_found_without_importing_sigswap() -> None:
    code = (
        "import sys, torch, torch.nn.functional as F\n"
        "assert 'sigswap' in torch._dynamo.list_backends()\n"
        "assert 'sigswap' not in sys.modules\n"
        "attend = lambda q: F.scaled_dot_product_attention(q, q, q)\n"
        "f = torch.compile(attend, backend='sigswap', options={'inner': 'eager'})\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        "expected = torch.sigmoid(q @ q.mT * 8**-0.5 - torch.tensor(4.0).log()) @ q\n"
        "torch.testing.assert_close(f(q), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
