"""The ops inside PyTorch's machinery, on the CPU and on a CUDA GPU: compiling, exporting, CUDA graphs, checkpoints,
autocast, determinism, offsets beyond 32 bits, and errors. Values are judged by the definition in float64."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sigswap
from sigswap.errors import ArgumentError
from sigswap.functional.attention import attend
from sigswap.kernels.op import dense

CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")]
gpu = [pytest.param("cuda", marks=GPU)]
both = pytest.mark.parametrize("device", ["cpu", *gpu])


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in GPU:
        test = mark(test)
    return test


def oracle(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *, causal: bool
) -> Tensor:
    """In float64, with all scores; causal: aligned at the bottom right."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
    if causal:
        visible = visible.tril(key.shape[2] - query.shape[2])
    row_bias = -visible.sum(-1, keepdim=True).clamp(min=1).double().log()
    for term in (bias, mask):
        scores = scores if term is None else scores + term.double()
    return torch.where(visible, torch.sigmoid(scores + row_bias), 0.0) @ value


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """With all of the features that the oracle has (attend refuses a mask together with is_causal)."""
    options = {"scale": query.shape[-1] ** -0.5, "is_causal": True, "bottom_right": True} | options
    return dense.sigmoid_attention(query, key, value, bias, mask, None, **options)


def problem(device: str, q_len: int, kv_len: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 64) -> list[Tensor]:
    """query, key, value and a per-head bias: in bfloat16 on a GPU, where that is the type to be fast in."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = ((2, heads, q_len, dim), (2, kv_heads, kv_len, dim), (2, kv_heads, kv_len, dim), (1, heads, 1, 1))
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def assert_close(results: Any, expected: Any) -> None:
    """Within the rounding of the results' dtype, of a sum over many terms."""
    results, expected = ([each] if isinstance(each, Tensor) else list(each) for each in (results, expected))
    for result, truth in zip(results, expected, strict=True):
        assert result.shape == truth.shape
        error = (result.double() - truth.double()).norm() / truth.double().norm()
        assert error < (1e-2 if result.dtype in (torch.bfloat16, torch.float16) else 1e-5)


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.float().square().sum(), inputs)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@both
@pytest.mark.parametrize("public", [False, True])
def test_compiles_once_for_all_lengths(device: str, public: bool) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        if public:
            return attend(query, key, value, bias=bias, is_causal=True, bottom_right=True, enable_gqa=True)
        return attention(query, key, value, bias)

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for q_len, kv_len in ((33, 65), (130, 257), (1000, 515)):
        inputs = problem(device, q_len, kv_len)
        out, expected = compiled(*inputs), oracle(*inputs, causal=True)
        assert_close(out, expected)
        assert_close(gradients(out, inputs), torch.autograd.grad(expected.square().sum(), inputs))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@both
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_per_window(device: str, compiled: bool) -> None:
    """As in Swin: images are cut into windows of 7 x 7, of which each has its mask, the same in all images."""
    images, windows, length = 3, 4, 49
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = [torch.randn(images * windows, 4, length, 32, device=device).to(dtype) for _ in range(3)]
    inputs.append(torch.randn(windows, 1, length, length, device=device).to(dtype))
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return attention(query, key, value, None, mask, is_causal=False)

    out = (torch.compile(function, fullgraph=True) if compiled else function)(*inputs)
    expected = oracle(*inputs[:3], None, inputs[3].repeat(images, 1, 1, 1), causal=False)
    assert_close(out, expected)
    assert_close(gradients(out, inputs), torch.autograd.grad(expected.square().sum(), inputs))
    visible = torch.rand(windows, 1, length, length, device=device) > 0.3
    hidden = torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)
    with torch.no_grad():
        assert_close(function(*inputs[:3], visible), function(*inputs[:3], hidden.repeat(images, 1, 1, 1)))


@on_gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(dropout_p: float) -> None:
    inputs = problem("cuda", 17, 33)
    mask = torch.randn(1, 1, 17, 33, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    seed = torch.tensor([7], device="cuda")
    options = {"scale": 0.3, "is_causal": True, "bottom_right": True, "dropout_p": dropout_p}
    namespace = torch.ops.sigswap
    torch.library.opcheck(namespace.sigmoid_attention.default, (*inputs, mask, seed), options)
    query, key = (tensor.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for tensor in inputs[:2])
    ends = [torch.tensor([0, *rest], dtype=torch.int32, device="cuda") for rest in ((17, 17, 34), (5, 30, 66))]
    packed = (query, key, key, inputs[3].detach().view(1, -1).requires_grad_(), *ends, seed, 17, 36)
    torch.library.opcheck(namespace.sigmoid_attention_varlen.default, packed, options)
    inputs, mask, query, key = [tensor.detach() for tensor in inputs], mask.detach(), query.detach(), key.detach()
    grad_out = torch.randn_like(inputs[0])
    backward = namespace.sigmoid_attention_backward.default
    torch.library.opcheck(backward, (grad_out, *inputs, mask, seed, [True] * 5), options)
    backward = namespace.sigmoid_attention_varlen_backward.default
    packed = (query, key, key, inputs[3].view(1, -1), *packed[4:], [True] * 4)
    torch.library.opcheck(backward, (torch.randn_like(query), *packed), options)


@on_gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_cuda_graphs_of_torch_compile(dropout_p: float) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend(query, key, value, bias=bias, is_causal=True, enable_gqa=True, dropout_p=dropout_p)

    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    zeros = []
    for _ in range(5):  # warm-up, recording, and replays, on other inputs
        inputs = problem("cuda", 256, 256)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(*inputs)
        grads = gradients(out, inputs)
        assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
        if dropout_p == 0.0:
            expected = oracle(*inputs, causal=True)
            assert_close(out, expected)
            assert_close(grads, torch.autograd.grad(expected.square().sum(), inputs))
        zeros.append((out[:, :, 0] == 0).all(-1))  # the first row has one key, which is dropped or not
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert any(not torch.equal(zeros[-1], other) for other in zeros[:-1]) == (dropout_p > 0.0)


@on_gpu
@pytest.mark.parametrize("kind", ["training", "mask", "dropout", "decoding", "varlen"])
def test_cuda_graph_capture_and_no_synchronization(kind: str) -> None:
    inputs = problem("cuda", 1 if kind == "decoding" else 192, 3000 if kind == "decoding" else 192)
    mask = torch.randn(1, 1, 192, 192, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 100, 384], dtype=torch.int32, device="cuda")

    def run() -> tuple[Tensor, ...]:
        if kind == "varlen":
            packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in inputs[:3]]
            out = sigswap.sigmoid_attention_varlen(
                *packed, ends, ends, 284, 284, bias=inputs[3].flatten(), is_causal=True, enable_gqa=True
            )
        elif kind == "dropout":
            out = attend(*inputs[:3], bias=inputs[3], dropout_p=0.2, enable_gqa=True)
        else:
            out = attention(*inputs, mask=mask if kind == "mask" else None)
        return (out,) if kind == "decoding" else (out, *gradients(out, inputs))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = [result.clone() for result in run()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    graph.replay()
    torch.cuda.synchronize()
    if kind != "dropout":  # which draws anew
        assert all(torch.equal(result, other) for result, other in zip(results, expected, strict=True))


@both
@pytest.mark.parametrize("strict", [False, True])
def test_export(device: str, strict: bool) -> None:
    class Both(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int) -> Tensor:
            out = attend(query, key, value, is_causal=True, bottom_right=True, enable_gqa=True)
            packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, query, query)]
            return out.sum() + sigswap.sigmoid_attention_varlen(*packed, ends, ends, longest, longest).sum()

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({2: length}, {2: length}, {2: length}, {0: torch.export.Dim("sequences", min=3)}, None)

    def inputs(length: int, *ends: int) -> tuple[Any, ...]:
        tensors = [tensor.detach() for tensor in problem(device, length, length)[:3]]
        return (*tensors, torch.tensor(ends, dtype=torch.int32, device=device), 2 * length)

    program = torch.export.export(Both(), (*inputs(16, 0, 5, 20, 32)[:4], 48), dynamic_shapes=shapes, strict=strict)
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.sigswap.sigmoid_attention.default in targets
    assert torch.ops.sigswap.sigmoid_attention_varlen.default in targets
    longer = inputs(24, 0, 20, 26, 30, 48)
    torch.testing.assert_close(program.module()(*longer), Both()(*longer))


@both
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_recomputes_the_same_dropout(device: str, compiled: bool) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend(query, key, value, bias=bias, dropout_p=0.5, enable_gqa=True)

    def checkpointed(*inputs: Tensor) -> Tensor:
        return checkpoint(function, *inputs, use_reentrant=False)

    inputs = problem(device, 65, 40)
    if not compiled:
        torch.manual_seed(1)
        expected = function(*inputs)
        torch.manual_seed(1)
        out = checkpointed(*inputs)
        assert torch.equal(out, expected)
        grads = gradients(out, inputs), gradients(expected, inputs)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*grads, strict=True))
    # Compiled code may draw other numbers than eager code. But the output is linear in value, so with
    # L = |out|^2 it holds that <dL/dvalue, value> = 2 |out|^2, if forward and backward drop the same.
    if compiled:
        checkpointed = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    out = checkpointed(*inputs)
    value, grad = inputs[2].detach().double(), gradients(out, inputs)[2].double()
    expected = 2 * out.detach().double().square().sum()
    assert abs((grad * value).sum() - expected) < 1e-2 * expected  # a half of it, if they dropped independently


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device: str, dtype: torch.dtype) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in problem(device, 33, 70)]
    mask = torch.randn(1, 1, 33, 70, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        out = attention(*inputs, mask)
    assert out.dtype == dtype
    expected = oracle(*inputs, mask, causal=True)
    assert_close(out, expected)
    grads = gradients(out, [*inputs, mask])
    assert all(grad.dtype == torch.float32 for grad in grads)
    for grad, truth in zip(grads, torch.autograd.grad(expected.square().sum(), [*inputs, mask]), strict=True):
        assert (grad - truth).norm() / truth.norm() < 2e-2


@both
def test_dropout_has_one_mask_everywhere(device: str) -> None:
    """With the identity for the values the output is p, and with it for the output's gradient, theirs is p^T."""
    length, seed = 64, torch.tensor([2**40 + 7], device=device)
    query, key = (torch.randn(2, 3, length, 32, device=device) for _ in range(2))
    eye = torch.eye(length, device=device).expand(2, 3, -1, -1)

    def function(value: Tensor) -> Tensor:
        return dense.sigmoid_attention(query, key, value, None, None, seed, scale=0.2, dropout_p=0.4)

    value = eye.clone().requires_grad_()
    out = function(value)
    (grad,) = torch.autograd.grad(out, value, eye)
    kept = out != 0
    assert 0.55 < kept.float().mean() < 0.65
    assert torch.equal(grad.mT != 0, kept)
    compiled = torch.compile(function, fullgraph=True)(value)
    assert torch.equal(compiled != 0, kept)
    assert torch.equal(torch.autograd.grad(compiled, value, eye)[0].mT != 0, kept)
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device)
    packed = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, eye)]
    varlen = torch.ops.sigswap.sigmoid_attention_varlen(
        *packed, None, ends, ends, seed, length, length, scale=0.2, dropout_p=0.4
    )
    assert torch.equal(varlen.unflatten(0, (2, length)).transpose(1, 2) != 0, kept)


@both
def test_two_runs_are_equal_to_the_bit(device: str, deterministic: None) -> None:
    q_len, kv_len = (1000, 1500) if device == "cuda" else (100, 150)
    mask_shape = (1, 4, q_len, kv_len)
    inputs = problem(device, q_len, kv_len)
    mask = torch.randn(mask_shape, device=device).to(inputs[0].dtype).requires_grad_()
    ends = torch.tensor([0, q_len // 3, 2 * q_len], dtype=torch.int32, device=device)
    packed = [t.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for t in (inputs[0], inputs[0], inputs[0])]

    def run() -> list[Tensor]:
        results = []
        for leaves in (inputs, [*inputs, mask]):
            out = attention(*leaves)
            results += [out, *gradients(out, leaves)]
        head_bias = torch.zeros(4, device=device, requires_grad=True)
        out = sigswap.sigmoid_attention_varlen(*packed, ends, ends, 2 * q_len, 2 * q_len, bias=head_bias)
        results += [out, *gradients(out, [*packed, head_bias])]
        with torch.no_grad():
            results.append(attention(*(t if t.shape[2] != q_len else t[:, :, :1] for t in inputs)))  # decoding
        return results

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# Offsets beyond 32 bits.


def strided(shape: tuple[int, ...], strides: tuple[int, ...], buffer: Tensor) -> Tensor:
    """A view of a huge buffer, filled with normal numbers."""
    return buffer.as_strided(shape, strides).normal_()


@on_gpu
@pytest.mark.parametrize("far", ["batch", "head", "query rows", "key rows"])
@pytest.mark.parametrize("decoding", [False, True])
def test_strides_beyond_32_bits(far: str, decoding: bool) -> None:
    q_len, kv_len, dim = (1 if decoding else 300), 700, 64
    if far == "key rows":
        kv_len = 33_000
    if far == "query rows":
        q_len = 33_000
        if decoding:
            pytest.skip("decoding has few rows")
    # Distances of 2^31 elements and more, 4 GiB.
    distance = 2**31 + 64
    buffer = torch.empty(distance + 2**26, dtype=torch.bfloat16, device="cuda")
    near = torch.empty(2**26, dtype=torch.bfloat16, device="cuda")

    def make(length: int, rows_are_far: bool, buffer: Tensor) -> Tensor:
        row = 65_536 if rows_are_far else dim
        strides = {"batch": (distance, length * dim), "head": (length * dim, distance)}.get(far, (dim, 2 * dim))
        return strided((2, 2, length, dim), (*strides, row, 1), buffer)

    if far.endswith("rows"):
        query = make(q_len, True, buffer) if far == "query rows" else torch.randn_like(near[: 4 * q_len * dim])
        query = query.view(2, 2, q_len, dim) if far == "key rows" else query
        key = make(kv_len, True, buffer) if far == "key rows" else near[: 4 * kv_len * dim].view(2, 2, kv_len, dim)
        key = key if far == "key rows" else key.normal_()
        value = key
    else:
        query = make(q_len, False, buffer)
        key = value = make(kv_len, False, buffer[2**24 :])
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = attention(*inputs)
    last = [tensor.detach().clone()[1:, 1:].requires_grad_() for tensor in inputs]
    expected = oracle(*last, causal=True)
    assert_close(out[1:, 1:], expected)
    if not decoding:
        grads = torch.autograd.grad(out[1:, 1:].float().square().sum(), inputs)
        assert_close([grad[1:, 1:] for grad in grads], torch.autograd.grad(expected.square().sum(), last))


@on_gpu
def test_more_than_two_to_the_31_elements() -> None:
    rows = 2**25 + 100  # of 64 numbers: 4 GiB each for query, output, and the gradients of the two
    query = torch.randn(1, 1, rows, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    key = torch.randn(1, 1, 40, 64, device="cuda", dtype=torch.bfloat16)
    out = attention(query, key, key, is_causal=False)
    end = query.detach()[:, :, -200:].requires_grad_()
    expected = oracle(end, key, key, causal=False)
    assert_close(out[:, :, -200:], expected)
    (grad,) = torch.autograd.grad(out, query, torch.ones_like(out))
    assert_close(grad[:, :, -200:], torch.autograd.grad(expected.sum(), end)[0])


@on_gpu
@pytest.mark.parametrize("q_len", [1, 16])
def test_more_heads_than_a_grid_dimension_holds(q_len: int) -> None:
    shape = (8750, 8)  # 70,000, and a grid's second and third dimensions hold 65,535
    inputs = [
        torch.randn(*shape, length, 16, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for length in (q_len, 24, 24)
    ]
    out = attention(*inputs)
    expected = oracle(*inputs, causal=True)
    assert_close(out, expected)
    assert_close(gradients(out, inputs), torch.autograd.grad(expected.square().sum(), inputs))


# Errors, and what the kernels do not take.


@on_gpu
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float64, 32), (torch.float16, 320)])
def test_what_the_kernels_do_not_take_runs_in_pytorch_and_is_logged(
    dtype: torch.dtype, dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    from sigswap.kernels import dispatch
    from sigswap.kernels.host import problem

    dispatch._say_once.cache_clear()  # it logs each reason once,
    problem._signature.cache_clear()  # when it chooses
    inputs = [torch.randn(1, 2, 40, dim, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    with caplog.at_level(logging.WARNING, "sigswap"):
        out = attention(*inputs)
    assert "plain PyTorch" in caplog.text
    expected = oracle(*inputs, causal=True)
    assert_close(out, expected)
    assert_close(gradients(out, inputs), torch.autograd.grad(expected.square().sum(), inputs))


@on_gpu
@pytest.mark.parametrize("name", ["key", "value", "bias", "attn_mask", "seed"])
def test_a_tensor_on_another_device_is_named(name: str) -> None:
    arguments = {
        "query": torch.zeros(1, 2, 3, 16, device="cuda"),
        "key": torch.zeros(1, 2, 4, 16, device="cuda"),
        "value": torch.zeros(1, 2, 4, 16, device="cuda"),
        "bias": torch.zeros(1, 2, 1, 1, device="cuda"),
        "attn_mask": torch.zeros(1, 1, 3, 4, device="cuda"),
        "seed": torch.zeros(1, dtype=torch.int64, device="cuda"),
    }
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ArgumentError, match=f"{name} must be on query's device cuda:0, not cpu"):
        dense.sigmoid_attention(**arguments, scale=1.0, dropout_p=0.5)


@on_gpu
def test_a_query_on_the_cpu_among_tensors_on_a_gpu_is_an_error() -> None:
    query, key = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16, device="cuda")
    with pytest.raises(ArgumentError, match="key must be on query's device cpu, not cuda:0"):
        attention(query, key, key)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    packed = key[0].transpose(0, 1)
    with pytest.raises(ArgumentError, match="cu_seqlens_q must be on query's device cuda:0, not cpu"):
        sigswap.sigmoid_attention_varlen(packed, packed, packed, ends, ends, 3, 3)


@on_gpu
def test_integers_are_an_error() -> None:
    query = torch.zeros(1, 2, 3, 16, dtype=torch.int32, device="cuda")
    with pytest.raises(ArgumentError, match="query must be floating point"):
        attention(query, query, query)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    inputs = [tensor.detach().to("cuda:1").requires_grad_() for tensor in problem("cuda", 130, 200)]
    assert torch.cuda.current_device() == 0
    out = attention(*inputs)
    expected = oracle(*inputs, causal=True)
    assert_close(out, expected)
    assert_close(gradients(out, inputs), torch.autograd.grad(expected.square().sum(), inputs))
