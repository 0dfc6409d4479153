"""Visible launches: what inductor gets instead of a call of the op. Results are judged on a GPU, by float64; the graph
itself on any machine, for an H100 that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from h100 import pretended
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import sigswap
from sigswap.compiling.launches import make_launches_visible
from sigswap.kernels import dispatch, reference
from sigswap.kernels.op import dense

triton = pytest.importorskip("triton")

LAUNCH = "triton_kernel_wrapper_functional"
NEW = torch.ops.aten.empty_strided.default, torch.ops.aten.full.default
OPS = (
    torch.ops.sigswap.sigmoid_attention.default,
    torch.ops.sigswap.sigmoid_attention_backward.default,
    torch.ops.sigswap.sigmoid_attention_sums.default,
)


CUDA = torch.cuda.is_available()


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on the CPU count as an H100's, for which Triton's front end compiles."""
    from sigswap.kernels.triton import forward as flash_fwd

    if not isinstance(flash_fwd._forward_kernel, triton.JITFunction):
        pytest.skip("Triton's interpreter compiles nothing")
    monkeypatch.setattr("sigswap.compiling.launches._on_gpu", lambda value: True)
    with pretended():
        yield


class Case:
    """An attention problem, and its result in float64."""

    def __init__(
        self,
        q_len: int = 70,
        kv_len: int = 70,
        batch: int = 2,
        heads: int = 4,
        kv_heads: int = 4,
        dim: int = 32,
        mask: tuple[int, ...] | None = None,
        bias: tuple[int, ...] | None = (1, 4, 1, 1),
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> None:
        self.options = {"scale": dim**-0.5} | options
        self.dtype, self.mask, self.bias = dtype, mask, bias
        self.shapes = (batch, q_len, heads, dim), (batch, kv_len, kv_heads, dim), (batch, kv_len, kv_heads, dim)

    def inputs(self, device: str) -> list[Tensor | None]:
        """query, key, value, bias and mask; the first three as models have them, with heads inside."""
        tensors = [torch.randn(shape, device=device).to(self.dtype).transpose(1, 2) for shape in self.shapes]
        for shape in (self.bias, self.mask):
            tensors.append(None if shape is None else torch.randn(shape, device=device).to(self.dtype))
        return [None if tensor is None else tensor.requires_grad_() for tensor in tensors]

    def run(self, *inputs: Tensor | None) -> Tensor:
        return dense.sigmoid_attention(*inputs, None, **self.options)

    def oracle(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        query, key, value = query.double(), key.double(), value.double()
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT * self.options["scale"]
        cap = self.options.get("softcap", 0.0)
        scores = cap * torch.tanh(scores / cap) if cap else scores
        if mask is not None:
            scores = scores + mask.double().repeat(scores.shape[0] // mask.shape[0], 1, 1, 1)
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        if self.options.get("is_causal"):
            visible = visible.tril(scores.shape[3] - scores.shape[2] if self.options.get("bottom_right") else 0)
        scores = scores - visible.sum(-1, keepdim=True).clamp(min=1).double().log()
        scores = scores if bias is None else scores + bias.double()
        p = torch.where(visible, torch.sigmoid(scores), 0.0)
        row_cap = self.options.get("row_cap")
        return p @ value / (p.sum(-1, keepdim=True).clamp(min=row_cap) if row_cap else 1.0)


CASES = {
    "plain": Case(),
    "no bias": Case(bias=None),
    "causal": Case(is_causal=True),
    "descriptors": Case(q_len=256, kv_len=256, dim=64),
    "limited registers": Case(q_len=50, kv_len=50, dim=64, bias=None),
    "position bias": Case(mask=(1, 4, 70, 70)),
    "position bias, causal": Case(mask=(1, 4, 70, 70), is_causal=True),
    "position bias, row bias": Case(mask=(1, 4, 70, 70), bias=(1, 4, 70, 1)),
    "padding": Case(mask=(2, 1, 1, 70), kv_heads=2),
    "windows": Case(q_len=49, kv_len=49, batch=8, mask=(4, 4, 49, 49)),
    "decode": Case(q_len=1, kv_len=1100, kv_heads=2, is_causal=True, bottom_right=True),
    "row bias": Case(bias=(2, 4, 70, 1), softcap=5.0),
    "float32": Case(dtype=torch.float32, dim=40),
    "odd": Case(q_len=17, kv_len=193, dim=72),
    "capped": Case(row_cap=0.5),
    "capped, causal": Case(row_cap=1.0, is_causal=True, bias=(2, 4, 70, 1), kv_heads=2),
    "capped, decode": Case(row_cap=0.5, q_len=1, kv_len=1100, kv_heads=2, is_causal=True, bottom_right=True),
    "capped, windows": Case(row_cap=0.5, q_len=49, kv_len=49, batch=8, mask=(4, 4, 49, 49)),
}


def traced(case: Case, *, dynamic: bool = False) -> torch.fx.GraphModule:
    """Of the op, and of its backward."""

    def function(grad_out: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        needed = [each is not None for each in inputs]
        row_cap = case.options.get("row_cap")
        if not row_cap:
            out = case.run(*inputs)
            return out, *OPS[1](grad_out, *inputs, None, needed, **case.options)
        out, sums = OPS[2](*inputs, None, **case.options)
        grad, delta = reference.undivided(grad_out, out, sums, row_cap)
        return out, sums, *OPS[1](grad, *inputs, None, needed, delta, **case.options)

    with torch.no_grad() if dynamic else FakeTensorMode():
        inputs = [None if each is None else each.detach() for each in case.inputs("cpu")]
        grad_out = torch.empty_like(inputs[0])
    return make_fx(function, tracing_mode="symbolic" if dynamic else "real")(grad_out, *inputs)


def targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_graph(name: str, h100: None) -> None:
    graph = traced(CASES[name])
    expected = [node.meta["val"] for node in graph.graph.output_node().args[0]]
    assert make_launches_visible(graph.graph) == 2
    graph.graph.lint()
    assert not any(node.target in OPS for node in graph.graph.nodes)
    results = [node.meta["val"] for node in graph.graph.output_node().args[0]]
    assert [(r.shape, r.stride(), r.dtype) for r in results] == [(e.shape, e.stride(), e.dtype) for e in expected]
    for node in graph.graph.nodes:
        if str(node.target) == LAUNCH:
            # Only what is new is written: no input, and nothing twice. What is added to has zeros.
            for written in node.kwargs["tensors_to_clone"]:
                assert node.kwargs["kwargs"][written].target in NEW


@pytest.mark.parametrize("bias", [(1, 4, 1, 1), (1, 4, 70, 1)])
def test_what_is_added_to_has_zeros(bias: tuple[int, ...], h100: None) -> None:
    """Sums of dQ, of the mask's gradient, and of the bias's: they keep no backward from becoming launches."""
    graph = traced(Case(mask=(1, 4, 70, 70), bias=bias))
    assert make_launches_visible(graph.graph) == 2
    full = torch.ops.aten.full.default
    launches = [node for node in graph.graph.nodes if str(node.target) == LAUNCH]
    zeros = {
        name: node.kwargs["kwargs"][name].args[1]
        for node in launches
        for name in node.kwargs["tensors_to_clone"]
        if node.kwargs["kwargs"][name].target is full
    }
    assert zeros == {"sum_out": 0, "mask_sums": 0, "dq_sums": 0}


def test_layers_that_share_a_mask_count_its_keys_once(h100: None) -> None:
    case = CASES["position bias"]

    def layers(*inputs: Tensor | None) -> Tensor:
        return case.run(case.run(*inputs), *inputs[1:])

    with FakeTensorMode():
        inputs = [None if each is None else each.detach() for each in case.inputs("cpu")]
    graph = make_fx(layers)(*inputs)
    assert make_launches_visible(graph.graph) == 2
    assert targets(graph).count(LAUNCH) == 3


def test_equal_calls_give_two_tensors(h100: None) -> None:
    case = CASES["position bias"]
    with FakeTensorMode():
        inputs = [None if each is None else each.detach() for each in case.inputs("cpu")]
    graph = make_fx(lambda *given: (case.run(*given), case.run(*given)))(*inputs)
    assert make_launches_visible(graph.graph) == 2
    first, second = graph.graph.output_node().args[0]
    assert first is not second


def test_launches_keep_the_streams_of_their_calls(h100: None) -> None:
    graph = traced(CASES["position bias"])
    for stream, node in enumerate(node for node in graph.graph.nodes if node.target in OPS):
        node.meta["custom"] = {"stream": stream}
    assert make_launches_visible(graph.graph) == 2
    streams = [node.meta["custom"]["stream"] for node in graph.graph.nodes if str(node.target) == LAUNCH]
    assert streams == [0] * 2 + [1] * (len(streams) - 2)  # the keys are counted on each
    assert len(streams) > 4


def test_operands_that_cannot_be_told_apart(h100: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "sigswap")
    graph = traced(CASES["plain"])
    grad_out, query = [node for node in graph.graph.nodes if node.op == "placeholder"][:2]
    grad_out.meta["val"] = query.meta["val"]
    assert make_launches_visible(graph.graph) == 1
    assert "share a fake tensor" in caplog.text


def test_the_op_stays_where_tracing_fails(
    h100: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("another version")

    graph = traced(CASES["plain"])
    before = targets(graph)
    monkeypatch.setattr(dispatch, "forward", fail)
    monkeypatch.setattr(dispatch, "backward", fail)
    assert make_launches_visible(graph.graph) == 0
    assert targets(graph) == before
    assert "another version" in caplog.text


def test_what_stays(h100: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "sigswap")
    dynamic = traced(CASES["plain"], dynamic=True)
    before = targets(dynamic)
    assert make_launches_visible(dynamic.graph) == 0
    assert targets(dynamic) == before
    assert "its lengths vary" in caplog.text
    empty = traced(Case(kv_len=0))
    assert make_launches_visible(empty.graph) == 0
    assert "it has an empty tensor" in caplog.text
    many = traced(Case(batch=16, q_len=1024, kv_len=1024, dim=32))
    before = targets(many)
    assert make_launches_visible(many.graph) == 0
    assert targets(many) == before
    assert "it loads by tensor descriptors" in caplog.text
    long = traced(Case(batch=8, q_len=4096, kv_len=4096, dim=64))
    assert make_launches_visible(long.graph) == 0
    assert "it is written in Gluon" in caplog.text


@pytest.mark.parametrize(("keys", "softcap", "stays"), [(4096, 0.0, False), (65536, 0.0, True), (65536, 2.0, False)])
def test_latent_attention_stays_where_its_own_kernel_is_worth_a_call(
    keys: int, softcap: float, stays: bool, h100: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is written in Gluon, and has no soft cap; the other one is Triton's."""
    caplog.set_level("DEBUG", "sigswap")
    with FakeTensorMode():
        query, key = (torch.empty(1, *shape, 576, dtype=torch.bfloat16) for shape in ((16, 1), (1, keys)))

    def function(query: Tensor, key: Tensor) -> Tensor:
        return dense.sigmoid_attention(query, key, key[..., :512], scale=576**-0.5, softcap=softcap)

    graph = make_fx(function)(query, key)
    assert make_launches_visible(graph.graph) == (0 if stays else 1)
    assert ("it is written in Gluon" in caplog.text) == stays
    launches = [node for node in graph.graph.nodes if str(node.target) == LAUNCH]
    assert len(launches) == (0 if stays else 2)  # parts of the keys, and their sum


def test_off_the_gpu_the_op_stays() -> None:
    graph = traced(CASES["plain"])
    assert make_launches_visible(graph.graph) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    """Compiled, an op before and an op after it: equal to the definition, and no call of the op is left."""
    case = CASES[name]
    inputs = case.inputs("cuda")
    given = [each for each in inputs if each is not None]

    def function(query: Tensor, *others: Tensor | None) -> Tensor:
        return 2 * case.run(2 * query, *others)

    compiled = torch.compile(
        function, fullgraph=True, dynamic=False, options={"post_grad_custom_post_pass": sigswap.InductorLaunches()}
    )

    def step() -> tuple[Tensor, ...]:
        out = compiled(*inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), given)

    results, code = run_and_get_code(step)
    assert len(code) == 2
    assert not any("torch.ops.sigswap" in each for each in code)  # comments name what the launches come from
    expected = 2 * case.oracle(2 * inputs[0], *inputs[1:])
    truth = expected, *torch.autograd.grad(expected.square().sum(), given)
    for result, right in zip(results, truth, strict=True):
        error = (result.double() - right).norm() / right.norm()
        assert error < (1e-5 if case.dtype == torch.float32 else 2e-2), (name, error)
