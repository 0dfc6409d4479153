"""Heads of 257 to 576, such as latent attention's, against float64: on a GPU, or in Triton's interpreter.

The bound is the error of the straightforward PyTorch computation in the same dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from h100 import pretended
from in_interpreter import run_interpreted
from torch import Tensor
from wide_heads import assert_forward_no_worse, assert_no_worse, straightforward

from sigswap.functional.attention import sigmoid_attention

pytest.importorskip("triton")

from sigswap.kernels import dispatch
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.host.recording import recorded_by
from sigswap.kernels.triton import decode_wide

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")

SHARED = (576, 512), (576, 500), (512, 512), (400, 264), (320, 256), (257, 200)
"""Widths of key and of value, which is a view of it."""
APART = (576, 512), (576, 128), (512, 512), (320, 40), (288, 96), (264, 24), (128, 512), (40, 300)
"""Widths of key, and of a value with memory of its own."""


def random_problem(index: int) -> Problem:
    """The problem number index: sizes, strides and features are drawn from it; every other one has a shared value."""
    draw = random.Random(index)
    torch.manual_seed(index)
    dtype = draw.choice((torch.bfloat16, torch.float16)) if CUDA else torch.float16
    batch, kv_heads, group = draw.choice((1, 2)), draw.choice((1, 1, 2)), draw.choice((1, 3, 16, 20, 70))
    q_len = draw.choice((1, 1, 2, 5) if group < 16 or CUDA else (1, 2))
    kv_len = draw.choice((1, 70, 600, 1000, 4097) if CUDA else (1, 33, 70, 130))
    shared = index % 2 == 0
    dim, value_dim = draw.choice(SHARED if shared else APART)
    heads = kv_heads * group

    def rows(count: int, length: int, width: int) -> Tensor:
        layout = draw.choice(("plain", "transposed", "sliced", "expanded"))
        if layout == "transposed":
            tensor = torch.randn(batch, length, count, width, device=DEVICE).transpose(1, 2)
        elif layout == "sliced":
            tensor = torch.randn(batch, count, length, width + 8, device=DEVICE)[..., :width]
        elif layout == "expanded":
            tensor = torch.randn(1, count, length, width, device=DEVICE).expand(batch, -1, -1, -1)
        else:
            tensor = torch.randn(batch, count, length, width, device=DEVICE)
        return tensor.to(dtype)

    query, key = rows(heads, q_len, dim), rows(kv_heads, kv_len, dim)
    value = key[..., :value_dim] if shared else rows(kv_heads, kv_len, value_dim)
    bias = attn_mask = None
    if draw.random() < 0.4:
        shape = [draw.choice((1, size)) for size in (batch, heads, q_len)]
        bias = (torch.randn(*shape, 1, device=DEVICE) - 1).to(dtype)
    if draw.random() < 0.5:
        rows_of_mask = draw.choice(((batch, 1, 1), (1, 1, q_len), (batch, heads, q_len)))
        attn_mask = torch.rand(*rows_of_mask, kv_len, device=DEVICE) > 0.3
        attn_mask[-1, -1, -1] = False
        if draw.random() < 0.6:
            masked = draw.choice((-torch.inf, torch.finfo(dtype).min, -1e4))
            attn_mask = torch.where(attn_mask, torch.randn(attn_mask.shape, device=DEVICE), masked).to(dtype)
    options = Options(
        scale=dim**-0.5,
        const_bias=draw.choice((0.0, 0.0, -1.5, -6.0)),
        visible_bias=draw.random() < 0.8,
        is_causal=draw.random() < 0.4,
        bottom_right=draw.random() < 0.7,
        window_left=draw.choice((-1, -1, -1, 0, 40)),
        window_right=draw.choice((-1, -1, -1, 0, 30)),
        softcap=draw.choice((0.0, 0.0, 0.0, 2.0)),
        row_cap=draw.choice((0.0, 0.0, 0.5)),
    )
    return Problem(query, key, value, bias, attn_mask, None, options)


def assert_random_problem(index: int) -> None:
    problem = random_problem(index)
    assert decode_wide.supports(problem)
    assert decode_wide.shares_memory(problem) == (index % 2 == 0)
    for splits in (1, 2 + index % 2):
        assert_forward_no_worse(functools.partial(decode_wide.forward, splits=splits), problem)


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="a GPU runs the kernel itself")
@pytest.mark.parametrize("shard", range(4))
def test_in_the_interpreter(shard: int) -> None:
    run_interpreted(__file__, shard)


def shards(count: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("index", range(count), ids=lambda index: f"{index}-shard{index % 4}")


@in_interpreter
@shards(24)
def test_interpreted(index: int) -> None:
    assert_random_problem(index)


@in_interpreter
@pytest.mark.parametrize("dim", [576, 264])
def test_interpreted_values_of_a_view_are_those_of_a_copy_shard0(dim: int) -> None:
    key, query = torch.randn(2, 1, 70, dim).half(), torch.randn(2, 16, 1, dim).half()
    value = key[..., : 512 if dim == 576 else 256]
    problem = Problem(query, key, value, None, None, None, Options(dim**-0.5))
    copied = dataclasses.replace(problem, value=value.clone())
    assert decode_wide.shares_memory(problem) and not decode_wide.shares_memory(copied)
    assert torch.equal(decode_wide.forward(problem), decode_wide.forward(copied))


def test_which_values_share_memory_with_keys() -> None:
    key, query = torch.randn(2, 1, 70, 576).half(), torch.randn(2, 16, 1, 576).half()

    def shares(value: Tensor) -> bool:
        return decode_wide.shares_memory(Problem(query, key, value, None, None, None, Options(0.1)))

    assert shares(key[..., :512]) and shares(key[..., :500]) and shares(key[:, :, :, :512].expand(2, 1, 70, 512))
    assert not shares(key[..., 64:])  # other channels
    assert not shares(key[..., :256])  # of which a tile of keys is twice as wide
    assert not shares(key[..., :512].clone())
    assert not shares(key[:1, ..., :512].expand(2, -1, -1, -1))  # each sequence has the first one's
    with recorded_by(lambda *launch: None, descriptors=False):
        assert not shares(key[..., :512])  # nobody knows addresses


@pytest.fixture
def on_a_gpu() -> Iterator[None]:
    """As far as the choice of a kernel goes."""
    with pretended():
        yield


@pytest.mark.parametrize(
    ("widths", "more", "expected"),
    [
        ((576, 512), {}, "triton.decode_wide"),
        ((257, 17), {}, "triton.decode_wide"),
        ((192, 320), {}, "triton.decode_wide"),
        ((576, 512), {"row_cap": 0.5, "softcap": 2.0, "window_left": 9}, "triton.decode_wide"),
        ((576, 512), {"shared": True}, "hopper.decode_wide"),
        ((576, 512), {"shared": True, "heads": 32}, "triton.decode_wide"),
        ((528, 512), {"shared": True, "row_cap": 0.5, "is_causal": True}, "hopper.decode_wide"),
        ((576, 512), {"shared": True, "softcap": 2.0}, "triton.decode_wide"),
        ((576, 256), {"shared": True}, "triton.decode_wide"),
        ((515, 512), {"shared": True}, "triton.decode_wide"),
        ((577, 512), {}, "reference"),
        ((576, 513), {}, "reference"),
        ((256, 256), {}, "triton.decode"),
        ((576, 512), {"dropout_p": 0.1}, "reference"),
        ((576, 512), {"dtype": torch.float32}, "reference"),
    ],
)
@pytest.mark.usefixtures("on_a_gpu")
def test_which_kernel_takes_wide_heads(widths: tuple[int, int], more: dict[str, Any], expected: str) -> None:
    given = {"heads": 33, "dtype": torch.bfloat16, "shared": False} | more
    heads, dtype, shared = (given.pop(name) for name in ("heads", "dtype", "shared"))
    query, key = (torch.empty(1, *sizes, widths[0], dtype=dtype) for sizes in ((heads, 1), (1, 600)))
    value = key[..., : widths[1]] if shared else torch.empty(1, 1, 600, widths[1], dtype=dtype)
    problem = Problem(query, key, value, None, None, None, Options(0.1, **given))
    assert dispatch.chosen(dispatch.FORWARD, problem).__name__ == f"sigswap.kernels.{expected}"


@in_interpreter
@pytest.mark.usefixtures("on_a_gpu")
def test_interpreted_narrow_values_are_dispatched_shard1() -> None:
    query, key, value = torch.randn(1, 3, 2, 300).half(), torch.randn(1, 1, 50, 300).half(), torch.randn(1, 1, 50, 5)
    problem = Problem(query, key, value.half(), None, None, None, Options(300**-0.5))
    assert_no_worse(dispatch.forward(problem), problem)


@in_interpreter
def test_interpreted_nothing_to_see_shard2() -> None:
    query, key = torch.randn(1, 3, 2, 576).half(), torch.randn(1, 1, 0, 576).half()
    row_sums = torch.full((1, 3, 2, 1), torch.nan)
    problem = Problem(query, key, key[..., :512], None, None, None, Options(0.1), row_sums=row_sums)
    assert (decode_wide.forward(problem) == 0).all() and (row_sums == 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("index", range(80))
def test_random(index: int) -> None:
    assert_random_problem(index)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize(("batch", "keys"), [(3, 2049), (1, 16384)])
def test_latent_attention(batch: int, keys: int, heads: int, rows: int, shared: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, heads, rows, 576, device="cuda", dtype=dtype)
    key = torch.randn(batch, 1, keys, 576, device="cuda", dtype=dtype)
    value = key[..., :512] if shared else torch.randn(batch, 1, keys, 512, device="cuda", dtype=dtype)
    problem = Problem(query, key, value, None, None, None, Options(576**-0.5, is_causal=True, bottom_right=True))
    assert_no_worse(decode_wide.forward(problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [16, 128])
def test_in_a_cuda_graph(heads: int, softcap: float | None) -> None:
    """Whichever kernel is chosen."""
    torch.manual_seed(0)
    query = torch.randn(2, heads, 1, 576, device="cuda").bfloat16()
    key = torch.randn(2, 1, 4000, 576, device="cuda").bfloat16()

    def attend() -> Tensor:
        return sigmoid_attention(query, key, key[..., :512], enable_gqa=True, softcap=softcap)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for tensor in (query, key):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    assert torch.equal(out, attend())
    options = Options(576**-0.5, softcap=softcap or 0.0)
    assert_no_worse(out, Problem(query, key, key[..., :512], None, None, None, options))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("keys", [4000, 40000])
def test_compiled(keys: int, softcap: float | None) -> None:
    """Where tensors have no addresses while the code is made."""
    torch.manual_seed(0)
    query = torch.randn(2, 16, 1, 576, device="cuda").bfloat16()
    key = torch.randn(2, 1, keys, 576, device="cuda").bfloat16()

    def attend(query: Tensor, key: Tensor) -> Tensor:
        return sigmoid_attention(query, key, key[..., :512], enable_gqa=True, softcap=softcap)

    options = Options(576**-0.5, softcap=softcap or 0.0)
    problem = Problem(query, key, key[..., :512], None, None, None, options)
    for backend in ("inductor", "sigswap"):
        assert_no_worse(torch.compile(attend, backend=backend, fullgraph=True)(query, key), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
def test_gradients_come_from_plain_pytorch() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 16, 3, 576, device="cuda").bfloat16().requires_grad_()
    key = torch.randn(1, 1, 500, 576, device="cuda").bfloat16().requires_grad_()
    out = sigmoid_attention(query, key, key[..., :512], enable_gqa=True)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key), grad_out)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (query, key)]
    problem = Problem(*leaves, leaves[1][..., :512], None, None, None, Options(576**-0.5))
    exact, _ = straightforward(problem, torch.float64)
    for grad, truth in zip(grads, torch.autograd.grad(exact, leaves, grad_out.double()), strict=True):
        assert (grad.double() - truth).norm() <= 1e-2 * truth.norm()
