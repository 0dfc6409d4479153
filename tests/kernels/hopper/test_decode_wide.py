"""Latent attention on Hopper GPUs: the Gluon kernel compiles as it must to be fast, and on a GPU is compared with
float64."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
import torch
from h100 import pretended
from wide_heads import assert_forward_no_worse, assert_no_worse

try:
    from hopper_compiles import assert_compiles, assert_products_in_flight, features, source_of
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.functional.attention import sigmoid_attention
from sigswap.kernels import dispatch
from sigswap.kernels.hopper import decode_wide, decode_wide_warps
from sigswap.kernels.host.forms import ACCURATE, AUTO, CUBIC_TAIL, FAST, TAIL
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.triton import decode_wide as triton_wide

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "band", "form", "bias", "capped"),
    [
        ("bf16", "none", TAIL, None, False),
        ("bf16", "none", FAST, None, True),
        ("bf16", "window", AUTO, "rows", True),
        ("fp16", "causal", CUBIC_TAIL, "heads", False),
        ("fp16", "none", ACCURATE, None, True),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_it_compiles_with_its_products_in_flight(
    dtype: str, band: str, form: int, bias: str | None, capped: bool, paged: bool, tmp_path: Path
) -> None:
    constants = features(dtype, band, form, bottom_right=True) | {
        "HEAD_DIM": 576,
        "UNIT": 8,
        "CAP": capped,
        "ALONE": bias is None,
        "PAGE": 128 if paged else 0,
        "ALIKE": not capped,
    }
    constants |= {} if paged else dict.fromkeys(("table", "lengths", "cu_q"))
    constants |= (
        {"BIAS_ROWS": bias == "rows"} | ({} if bias else {"bias": None}) | ({} if capped else {"sum_out": None})
    )
    pointers = {"q": f"*{dtype}", "out": "*fp32"} | dict.fromkeys(("table", "lengths", "cu_q") if paged else (), "*i32")
    rows: dict[str, int | tuple[int, int]] = {"k": (64, 256), "k_rest": (64, 64)}
    # What is spilled are places in shared memory: by the second warpgroup, and with Triton 3.8 by both where programs
    # look for their sequence.
    spilled = 1000 if paged and capped else 320
    assert_products_in_flight(
        decode_wide_warps.attend_kernel, rows, 0, dtype, spilled, tmp_path, pointers=pointers, **constants
    )


@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.usefixtures("no_memory")
def test_tritons_kernel_spills_no_registers_of_few_heads(heads: int, tmp_path: Path) -> None:
    query = torch.empty(2, heads, 1, 576, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 1, 8192, 576, dtype=torch.bfloat16, device="meta")
    problem = Problem(query, key, key[..., :512], None, None, None, Options(576**-0.5))
    assert triton_wide.shares_memory(problem)
    launch = triton_wide._plan(problem.signature, True, False, None).launch
    assert_compiles(source_of(launch), launch._options, 0, tmp_path)


def test_a_value_of_every_other_channel_is_no_view_of_key() -> None:
    """Not even if it begins where key does, and has its strides but for the last one."""
    query, cache = torch.zeros(1, 64, 1, 576).bfloat16(), torch.zeros(1, 1, 256, 1152).bfloat16()
    for value, chosen in ((cache[..., :512], decode_wide), (cache[..., :1024:2], triton_wide)):
        problem = Problem(query, cache[..., :576], value, None, None, None, Options(576**-0.5))
        with pretended():
            assert dispatch.chosen(dispatch.FORWARD, problem) is chosen


def random_problem(index: int) -> Problem:
    """The problem number index: sizes, strides and features are drawn from it."""
    draw = random.Random(index)
    torch.manual_seed(index)
    dtype = draw.choice((torch.bfloat16, torch.float16))
    batch, kv_heads, group = draw.choice((1, 2)), draw.choice((1, 1, 2)), draw.choice((1, 3, 16, 64, 70, 128))
    q_len, kv_len = draw.choice((1, 1, 2, 5, 70)), draw.choice((1, 64, 70, 600, 1000, 4097))
    heads, dim = kv_heads * group, draw.choice((576, 576, 520))
    query = torch.randn(batch, q_len, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, kv_len, dim + draw.choice((0, 8)), device="cuda").to(dtype)[..., :dim]
    bias = None
    if draw.random() < 0.6:
        shape = [draw.choice((1, size)) for size in (batch, heads, q_len)]
        bias = (torch.randn(*shape, 1, device="cuda") - draw.choice((1, 9))).to(dtype)
    options = Options(
        scale=dim**-0.5,
        const_bias=draw.choice((0.0, 0.0, -1.5, -6.0, -12.0)),
        visible_bias=draw.random() < 0.8,
        is_causal=draw.random() < 0.4,
        bottom_right=draw.random() < 0.7,
        window_left=draw.choice((-1, -1, -1, 0, 40, 300)),
        window_right=draw.choice((-1, -1, -1, 0, 30)),
        row_cap=draw.choice((0.0, 0.0, 0.03, 0.5)),
    )
    return Problem(query, key, key[..., :512], bias, None, None, options)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("index", range(120))
def test_random(index: int) -> None:
    problem = random_problem(index)
    rows = problem.query.shape[1] // problem.key.shape[1] * problem.query.shape[2]
    assert decode_wide.supports(problem) == (rows > decode_wide.FEW_ROWS)
    for splits in (1, 2, 3, None):
        assert_forward_no_worse(functools.partial(decode_wide.forward, splits=splits), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize(("batch", "keys"), [(3, 2049), (1, 16384), (40, 4096)])
def test_latent_attention(batch: int, keys: int, heads: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, heads, rows, 576, device="cuda", dtype=dtype)
    key = torch.randn(batch, 1, keys, 576, device="cuda", dtype=dtype)
    problem = Problem(query, key, key[..., :512], None, None, None, Options(576**-0.5))
    chosen = decode_wide if heads * rows > decode_wide.FEW_ROWS else triton_wide
    assert dispatch.chosen(dispatch.FORWARD, problem) is chosen
    out = sigmoid_attention(query, key, key[..., :512], enable_gqa=True)
    assert torch.equal(out, chosen.forward(problem))
    assert_no_worse(out, problem)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("heads", [16, 128])
def test_many_new_tokens(heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, heads, 300, 576, device="cuda").bfloat16()
    key = torch.randn(1, 1, 700, 576, device="cuda").bfloat16()
    options = Options(576**-0.5, is_causal=True, bottom_right=True)
    problem = Problem(query, key, key[..., :512], None, None, None, options)
    assert dispatch.chosen(dispatch.FORWARD, problem) is decode_wide
    assert_no_worse(dispatch.forward(problem), problem)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_a_copied_value_goes_to_another_kernel() -> None:
    """The choice that is kept for one is not taken for another that differs in where value lies alone."""
    query = torch.randn(1, 64, 1, 576, device="cuda").bfloat16()
    key, other = torch.randn(2, 1, 1, 700, 576, device="cuda").bfloat16()
    for memory, kernel in ((key, decode_wide), (other, triton_wide), (key, decode_wide)):
        problem = Problem(query, key, memory[..., :512], None, None, None, Options(576**-0.5))
        assert dispatch.chosen(dispatch.FORWARD, problem) is kernel
        assert_no_worse(dispatch.forward(problem), problem)
