"""The Gluon kernels for Hopper GPUs compile, as they must to be fast; here, without a GPU. test_flash.py runs them."""

from __future__ import annotations

import heapq
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from h100 import pretended

try:
    from hopper_compiles import (
        assert_backward_products_in_flight,
        assert_compiles,
        assert_forward_products_in_flight,
        assert_products_in_flight,
        features,
        problem_on_no_gpu,
    )
    from triton.compiler import ASTSource
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.kernels import dispatch, settings
from sigswap.kernels.hopper import backward as hopper_bwd
from sigswap.kernels.hopper import backward_common, forward_items, grad_query, stored_ds
from sigswap.kernels.hopper import backward_wide as hopper_bwd_wide
from sigswap.kernels.hopper import forward as hopper_fwd
from sigswap.kernels.host.forms import ACCURATE, AUTO, CUBIC_TAIL, FAST, NO_TANH, SHORT_TANH, TAIL
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.triton import backward as flash_bwd
from sigswap.kernels.triton import forward as flash_fwd


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, pytest.param(96, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize(
    ("dtype", "band", "form", "grouped", "bias"),
    [
        ("bf16", "none", FAST, False, None),
        ("bf16", "causal", TAIL, False, None),
        ("bf16", "causal", AUTO, True, "heads"),
        ("fp16", "window", ACCURATE, False, "heads"),
        ("fp16", "causal", CUBIC_TAIL, False, None),
        ("bf16", "none", FAST, False, "rows"),
        ("bf16", "causal", AUTO, True, "rows"),
        ("bf16", "window", AUTO, False, "given rows"),  # without gradient
        ("fp16", "window", ACCURATE, False, "rows"),
        ("fp16", "none", CUBIC_TAIL, True, "rows"),
    ],
)
def test_the_backward_compiles_with_its_products_in_flight(
    dim: int, dtype: str, band: str, form: int, grouped: bool, bias: str | None, tmp_path: Path
) -> None:
    assert_backward_products_in_flight(dim, dtype, band, form, grouped, bias, tmp_path)


CAPPED = [
    ("bf16", "none", TAIL, False, None),
    ("bf16", "causal", TAIL, True, "heads"),
    ("bf16", "causal", TAIL, True, "rows"),
    ("bf16", "causal", AUTO, False, "given rows"),
    ("fp16", "window", CUBIC_TAIL, False, "heads"),
]
"""dtype, band, form, grouped and bias of kernels with a row cap."""


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, pytest.param(96, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize(("dtype", "band", "form", "grouped", "bias"), CAPPED)
def test_the_backward_with_a_row_cap_compiles_with_its_products_in_flight(
    dim: int, dtype: str, band: str, form: int, grouped: bool, bias: str | None, tmp_path: Path
) -> None:
    assert_backward_products_in_flight(dim, dtype, band, form, grouped, bias, tmp_path, capped=True)


SOFTCAPPED = [
    ("bf16", "none", FAST, False, None),
    ("bf16", "causal", FAST, True, None),
    ("bf16", "causal", TAIL, False, None),
    ("bf16", "window", AUTO, True, "heads"),
    ("bf16", "causal", AUTO, False, "given rows"),
    ("fp16", "causal", CUBIC_TAIL, False, "heads"),
    ("fp16", "none", ACCURATE, True, "given rows"),
    ("bf16", "causal", AUTO, True, "rows"),
]
"""dtype, band, form, grouped and bias of kernels with a soft cap."""


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(("dtype", "band", "form", "grouped", "bias"), SOFTCAPPED)
def test_the_backward_with_a_soft_cap_compiles_with_its_products_in_flight(
    dim: int, dtype: str, band: str, form: int, grouped: bool, bias: str | None, tmp_path: Path
) -> None:
    assert_backward_products_in_flight(dim, dtype, band, form, grouped, bias, tmp_path, softcapped=True)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "value_dim"), [(256, 256), (192, 128)])
@pytest.mark.parametrize(
    ("dtype", "band", "form", "grouped", "bias", "stored", "capped"),
    [
        ("bf16", "none", FAST, False, None, True, False),
        ("bf16", "causal", TAIL, False, None, True, False),
        ("bf16", "causal", AUTO, True, "heads", True, False),
        ("fp16", "window", ACCURATE, False, "heads", True, False),
        ("bf16", "causal", AUTO, True, "rows", True, False),
        ("fp16", "none", CUBIC_TAIL, True, "rows", True, False),
        ("bf16", "none", FAST, False, None, False, False),
        ("bf16", "causal", AUTO, True, "heads", False, False),
        ("bf16", "causal", AUTO, True, "rows", False, False),
        *((*each, True, True) for each in CAPPED if each[4] != "given rows"),
        ("bf16", "causal", TAIL, True, "rows", False, True),
    ],
)
def test_the_backward_of_wide_heads_compiles_with_its_products_in_flight(
    dim: int,
    value_dim: int,
    dtype: str,
    band: str,
    form: int,
    grouped: bool,
    bias: str | None,
    stored: bool,
    capped: bool,
    tmp_path: Path,
) -> None:
    assert_wide_products_in_flight(dim, value_dim, dtype, band, form, grouped, bias, stored, capped, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "value_dim"), [(256, 256), (192, 128)])
@pytest.mark.parametrize(
    ("dtype", "band", "form", "grouped", "bias", "stored"),
    [*((*each, True) for each in SOFTCAPPED if each[4] != "rows"), ("bf16", "causal", TAIL, True, None, False)],
)
def test_the_backward_of_wide_heads_with_a_soft_cap_compiles_with_its_products_in_flight(
    dim: int,
    value_dim: int,
    dtype: str,
    band: str,
    form: int,
    grouped: bool,
    bias: str | None,
    stored: bool,
    tmp_path: Path,
) -> None:
    given = dim, value_dim, dtype, band, form, grouped, bias, stored, False, tmp_path
    assert_wide_products_in_flight(*given, softcapped=True)


def assert_wide_products_in_flight(
    dim: int,
    value_dim: int,
    dtype: str,
    band: str,
    form: int,
    grouped: bool,
    bias: str | None,
    stored: bool,
    capped: bool,
    folder: Path,
    *,
    softcapped: bool = False,
) -> None:
    """stored: whether dS goes through memory, or dQ is added up."""
    by_row = bias in ("rows", "given rows")
    constants = features(dtype, band, form, bottom_right=grouped) | {
        "BANDED": band != "none",
        "BIAS_ROWS": by_row,
        "SUMS": bias == "heads",
        "ROW_SUMS": bias == "rows" and not stored,
        "GROUPED": grouped,
        "DELTA": capped,
        "SOFTCAP": SHORT_TANH if softcapped else NO_TANH,
        "STAGES": 2 if dim == 256 else 3,
    }
    constants |= {"VISIBLE": False} if by_row else {}
    absent: dict[str, Any] = {} if bias else {"bias": None}
    absent |= {} if bias == "heads" else {"parts": None}
    absent |= {} if by_row and form == AUTO else {"floor": None}
    absent |= {"sums": None} if stored else {"ds": None}
    absent |= {} if capped else {"delta": None}
    tiles: dict[str, int | tuple[int, int]] = {"ds": (64, 64)} if stored else {}
    for name in ("q", "k", "v", "do", "dk", "dv"):
        wide, rest = hopper_bwd_wide._columns(dim if name in ("q", "k", "dk") else value_dim)
        tiles[name] = 64, wide
        if rest:
            tiles[f"{name}_rest"] = 64, rest
        else:
            absent[f"{name}_rest"] = None
    spilled = 0 if stored or dim < 256 else 96
    assert_products_in_flight(
        hopper_bwd_wide._kernel, tiles, 0, dtype, spilled, folder, described_bias=by_row, **constants, **absent
    )


@pytest.mark.parametrize("dim", [192, 256])
@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("row_sums", [False, True])
def test_the_product_of_ds_and_keys_is_in_flight(dim: int, banded: bool, row_sums: bool, tmp_path: Path) -> None:
    kernel = grad_query.product_kernel
    constants: dict[str, Any] = {"HEAD_DIM": dim, "DIM": dim, "HAS_LEFT": banded, "HAS_RIGHT": banded}
    constants |= {"BOTTOM_RIGHT": False, "ROW_SUMS": row_sums, "UNIT": 8, "WIDE": False}
    constants |= {} if row_sums else {"db": None}
    wide, rest = hopper_bwd_wide._columns(dim)
    types = {"ds": "tensordesc<bf16[64,128]>", "k": f"tensordesc<bf16[1,1,64,{wide}]>", "dq": "*bf16", "scale": "fp32"}
    types["db"] = "*fp32"
    if rest:
        types["k_rest"] = f"tensordesc<bf16[1,1,64,{rest}]>"
    else:
        constants["k_rest"] = None
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(at,): constants[name] for at, name in enumerate(names) if name in constants},
        attrs={(names.index("dq"),): [["tt.divisibility", 16]]},
    )
    assert_compiles(source, grad_query.PRODUCT_OPTIONS, 0, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "band", "form", "bias"),
    [
        ("bf16", "none", FAST, None),
        ("bf16", "causal", TAIL, "heads"),
        ("bf16", "causal", AUTO, "rows"),
        ("fp16", "window", ACCURATE, None),
        ("fp16", "causal", CUBIC_TAIL, "heads"),
    ],
)
@pytest.mark.parametrize(
    ("dim", "tile"),
    [
        pytest.param(64, forward_items.TILES[1, 1], id="64"),
        pytest.param(96, forward_items.TILES[2, 2], id="96", marks=pytest.mark.slow),
        pytest.param(128, forward_items.TILES[2, 2], id="128"),
        pytest.param(128, forward_items.LONG, id="128-long", marks=pytest.mark.slow),
    ],
)
def test_the_forward_compiles_with_its_products_in_flight(
    dim: int, tile: forward_items.Tile, dtype: str, band: str, form: int, bias: str | None, tmp_path: Path
) -> None:
    # Triton 3.6 spills up to 12 bytes, 3.8 more of the fewer registers that more warpgroups have.
    spilled = {2: 16, 3: 32, 4: 288}[tile.warpgroups]
    assert_forward_products_in_flight((dim, dim), tile, dtype, band, form, bias, spilled, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pieces", "dtype", "band", "form", "bias"),
    [
        *((pieces, "bf16", "causal", AUTO, "rows") for pieces in forward_items.TILES if max(pieces) > 2),
        *((pieces, "bf16", "none", FAST, None) for pieces in ((3, 2), (4, 4))),
        *((pieces, "fp16", "window", CUBIC_TAIL, "heads") for pieces in ((3, 2), (4, 4))),
    ],
)
def test_the_forward_of_wide_heads_compiles_with_its_products_in_flight(
    pieces: tuple[int, int], dtype: str, band: str, form: int, bias: str | None, tmp_path: Path
) -> None:
    """But for a few numbers that are needed once per item, all stays in registers."""
    dims, tile = (64 * pieces[0], 64 * pieces[1]), forward_items.TILES[pieces]
    assert_forward_products_in_flight(dims, tile, dtype, band, form, bias, 40 if bias else 0, tmp_path)


of_each_tile = pytest.mark.parametrize(
    ("dims", "tile"),
    [
        pytest.param((64, 64), forward_items.TILES[1, 1], id="64"),
        pytest.param((96, 96), forward_items.TILES[2, 2], id="96"),
        pytest.param((128, 128), forward_items.TILES[2, 2], id="128"),
        pytest.param((128, 128), forward_items.LONG, id="128-long"),
        pytest.param((192, 128), forward_items.TILES[3, 2], id="192-128"),
        pytest.param((256, 256), forward_items.TILES[4, 4], id="256"),
    ],
)


@pytest.mark.slow
@of_each_tile
@pytest.mark.parametrize(("dtype", "band", "form", "grouped", "bias"), CAPPED)
def test_the_forward_with_a_row_cap_compiles_with_its_products_in_flight(
    dims: tuple[int, int],
    tile: forward_items.Tile,
    dtype: str,
    band: str,
    form: int,
    grouped: bool,
    bias: str | None,
    tmp_path: Path,
) -> None:
    bias = "rows" if bias == "given rows" else bias
    spilled = {2: 16, 3: 32, 4: 352}[tile.warpgroups] if max(dims) <= 128 else 40
    given = {"capped": True, "sums": grouped}
    assert_forward_products_in_flight(dims, tile, dtype, band, form, bias, spilled, tmp_path, **given)


@pytest.mark.slow
@of_each_tile
@pytest.mark.parametrize(("dtype", "band", "form", "grouped", "bias"), SOFTCAPPED)
def test_the_forward_with_a_soft_cap_compiles_with_its_products_in_flight(
    dims: tuple[int, int],
    tile: forward_items.Tile,
    dtype: str,
    band: str,
    form: int,
    grouped: bool,
    bias: str | None,
    tmp_path: Path,
) -> None:
    bias = "rows" if bias == "given rows" else bias
    spilled = {2: 16, 3: 32, 4: 288}[tile.warpgroups] if max(dims) <= 128 else 104
    assert_forward_products_in_flight(dims, tile, dtype, band, form, bias, spilled, tmp_path, softcapped=True)


@pytest.mark.parametrize("index", range(40))
def test_what_is_known_of_a_band_without_building_it(index: int) -> None:
    """How many keys all rows see together, whether each program of a backward has a key that some row sees, each item
    of the forward a row that sees some, and how many blocks of keys that takes: by counting."""
    draw = random.Random(index)
    q_len, kv_len = draw.choice((1, 60, 128, 300, 700)), draw.choice((1, 60, 128, 129, 300, 700))
    options = Options(
        scale=1.0,
        is_causal=draw.random() < 0.5,
        bottom_right=draw.random() < 0.5,
        window_left=draw.choice((-1, 0, 50, 200)),
        window_right=draw.choice((-1, 0, 50)),
    )
    query, key = torch.empty(1, 1, q_len, 64), torch.empty(1, 1, kv_len, 64)
    signature = Problem(query, key, key, None, None, None, options).signature
    shift, left, right = options.band(q_len, kv_len)
    row, column = torch.arange(q_len)[:, None] + shift, torch.arange(kv_len)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left is not None:
        visible &= column >= row - left
    if right is not None:
        visible &= column <= row + right
    assert backward_common.visible_keys(signature) == int(visible.sum())
    for keys in (stored_ds.KEYS, hopper_bwd.KEYS):
        seen = [bool(block.any()) for block in visible.split(keys, 1)]
        assert backward_common.sees_every_block(signature, keys) == all(seen)
    for tile in {*forward_items.TILES.values(), forward_items.LONG}:
        items = visible.split(tile.rows, 0)
        assert forward_items.sees_in_every_item(signature, tile.rows) == all(bool(item.any()) for item in items)
        seen_by_item = [item.any(0).nonzero().flatten() // tile.keys for item in items]
        counts = [int(blocks[-1] - blocks[0]) + 1 if len(blocks) else 1 for blocks in seen_by_item]
        assert forward_items.key_blocks(signature, tile).tolist() == counts


@pytest.mark.parametrize(
    ("batch", "heads", "length"),
    [(4, 8, 4096), (4, 16, 4096), (16, 8, 1024), (8, 16, 2048), (1, 8, 16384), (1, 40, 3000), (8, 12, 1500)],
)
def test_programs_end_at_the_same_time_under_a_causal_mask(batch: int, heads: int, length: int) -> None:
    query = torch.empty(1, dtype=torch.bfloat16).expand(batch, heads, length, 256)
    signature = Problem(query, query, query, None, None, None, Options(scale=1.0, is_causal=True)).signature
    tile = forward_items.TILES[4, 4]
    order = forward_items.order_for(signature, tile, 132)
    times = forward_items.key_blocks(signature, tile) + 1
    mean = int(times.sum()) * batch * heads / 132
    assert forward_items.longest(order, times, batch * heads, 132) <= 1.03 * mean
    if length >= 4096:
        assert order.at_once * length <= 132 * tile.rows  # and read the keys of few heads


@pytest.mark.parametrize(
    ("batch", "heads", "length"),
    [(4, 16, 4096), (1, 16, 16384), (4, 21, 4096), (16, 16, 1024), (9, 13, 2000), (1, 1, 8192), (5, 1, 3000)],
)
def test_programs_of_the_backward_end_at_the_same_time_under_a_causal_mask(batch: int, heads: int, length: int) -> None:
    """Each multiprocessor takes the next program when it has ended one, which takes longer the more rows see its
    keys."""
    query = torch.empty(1, dtype=torch.bfloat16).expand(batch, heads, length, 128)
    signature = Problem(query, query, query, None, None, None, Options(scale=1.0, is_causal=True)).signature
    units, blocks = batch * heads, -(-length // hopper_bwd.KEYS)
    at_once = backward_common.heads_at_once(signature, blocks, units)
    groups = [min(at_once, units - first) for first in range(0, units, at_once)]
    ends = [0] * 132
    times = [2 * (blocks - block) + 3 for among in groups for block in range(blocks) for _ in range(among)]
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    assert max(ends) <= max(1.04 * sum(times) / 132, times[0])


@pytest.mark.parametrize(
    ("dim", "options", "persistent"),
    [
        (64, {}, True),
        (64, {"is_causal": True}, True),
        (128, {"is_causal": True}, True),
        (128, {}, False),
        (96, {}, False),
    ],
)
def test_how_many_programs_the_backward_has(
    dim: int, options: dict[str, Any], persistent: bool, no_memory: None
) -> None:
    query = torch.empty(1, dtype=torch.bfloat16).expand(2, 20, 4096, dim)
    signature = Problem(query, query, query, None, None, None, Options(scale=1.0, **options)).signature
    assert hopper_bwd.programs_for(signature, 40 * 32) == (132 if persistent else 40 * 32)
    assert hopper_bwd.programs_for(signature, 100) == 100


@pytest.mark.parametrize(
    ("dims", "length", "options", "tile"),
    [
        ((64, 64), 4096, {}, forward_items.TILES[1, 1]),
        ((40, 64), 1024, {"is_causal": True}, forward_items.TILES[1, 1]),
        ((96, 96), 16384, {"is_causal": True}, forward_items.TILES[2, 2]),
        ((96, 128), 4096, {}, forward_items.TILES[2, 2]),
        ((128, 128), 1024, {"is_causal": True}, forward_items.TILES[2, 2]),
        ((128, 128), 16384, {}, forward_items.TILES[2, 2]),
        ((128, 128), 16384, {"is_causal": True, "window_left": 4000}, forward_items.TILES[2, 2]),
        ((128, 128), 4096, {}, forward_items.LONG),
        ((128, 128), 4096, {"is_causal": True}, forward_items.TILES[2, 2]),
        ((104, 128), 16384, {"is_causal": True}, forward_items.LONG),
        ((192, 128), 16384, {"is_causal": True}, forward_items.TILES[3, 2]),
    ],
)
def test_which_tiles_the_forward_has(
    dims: tuple[int, int], length: int, options: dict[str, Any], tile: forward_items.Tile, no_memory: None
) -> None:
    problem = problem_on_no_gpu(length, *dims, options=options)
    assert hopper_fwd.supports(problem)
    assert forward_items.tile_for(problem.signature) == tile


@pytest.mark.parametrize(
    ("dim", "value_dim", "columns", "launched"),
    [(40, 64, 64, 1), (64, 64, 64, 1), (72, 96, 96, 3), (96, 104, 128, 1), (128, 128, 128, 1)],
)
def test_how_many_columns_the_backward_multiplies(
    dim: int, value_dim: int, columns: int, launched: int, no_memory: None
) -> None:
    """And how many programs put a tile of dQ in order, where there is no ring."""
    problem = problem_on_no_gpu(6144, dim, value_dim)
    assert hopper_bwd.supports(problem)
    assert hopper_bwd.columns_of(problem.signature) == columns
    assert problem.grad_out is not None
    grads = tuple(None if given is None else layout_of(given) for given in problem.inputs)
    plan = hopper_bwd._plan(problem.signature, layout_of(problem.grad_out), grads, None)
    assert plan.sums.shape == (2 * 8 * 96 + 1, 64 * columns)  # and the counter of items
    assert plan.finish is not None
    assert plan.finish._grid == (2 * 8 * 96 * launched, 1, 1)


def test_which_narrow_heads_the_forward_supports(no_memory: None) -> None:
    def supports(length: int = 2048, dim: int = 64, value_dim: int = 64, **options: Any) -> bool:
        return hopper_fwd.supports(problem_on_no_gpu(length, dim, value_dim, options=options))

    assert supports() and supports(1024) and supports(dim=40, value_dim=56) and supports(is_causal=True)
    assert supports(is_causal=True, window_left=512) and not supports(is_causal=True, window_left=500)
    assert not supports(1000) and not supports(dim=32) and not supports(value_dim=72) and not supports(dim=60)


def test_which_wide_heads_the_backward_supports(no_memory: None) -> None:
    def supports(*sizes: int, **more: Any) -> bool:
        return hopper_bwd_wide.supports(problem_on_no_gpu(*sizes, **more))

    assert supports() and supports(dim=192, value_dim=128) and supports(dim=136) and supports(length=1024)
    assert supports(dim=128, value_dim=256) and supports(dtype=torch.float16)
    assert supports(options={"is_causal": True}) and supports(options={"window_left": 300, "window_right": 0})
    assert supports(bias=torch.empty(1, 8, 4096, 1)) and supports(bias=torch.empty(1, 8, 1, 1))
    assert not supports(dim=128) and not supports(dim=100, value_dim=100) and not supports(dim=196)
    assert not supports(dim=192, value_dim=64) and not supports(dtype=torch.float32) and not supports(dim=264)
    assert not supports(length=255) and not supports(options={"is_causal": True, "window_left": 200})
    assert not supports(options={"dropout_p": 0.1}) and supports(options={"softcap": 1.0})
    assert not supports(mask=torch.ones(2, 1, 1, 4096, dtype=torch.bool))
    assert not supports(needed=(True, True, False, False, False))


def test_determinism_of_wide_heads_is_a_matter_of_memory(no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """dQ that is added up in no fixed order differs between runs; dS of one key head is let through memory up to a
    limit."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert hopper_bwd_wide.supports(problem_on_no_gpu(8192))
    assert not hopper_bwd_wide.supports(problem_on_no_gpu(16384))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert hopper_bwd_wide.supports(problem_on_no_gpu(16384))


@pytest.mark.parametrize(
    ("dim", "value_dim", "forward", "backward"),
    [
        (64, 64, "hopper.forward", "hopper.backward"),
        (128, 128, "hopper.forward", "hopper.backward"),
        (192, 128, "hopper.forward", "hopper.backward_wide"),
        (128, 192, "hopper.forward", "hopper.backward_wide"),
        (192, 192, "hopper.forward", "hopper.backward_wide"),
        (256, 256, "hopper.forward", "hopper.backward_wide"),
        (256, 64, "triton.forward", "triton.backward"),
        (96, 128, "hopper.forward", "hopper.backward"),
        (40, 64, "hopper.forward", "hopper.backward"),
        (32, 32, "triton.forward", "triton.backward"),
        (264, 264, "triton.decode_wide", "reference"),
    ],
)
def test_which_kernels_run_on_a_hopper_gpu(
    dim: int, value_dim: int, forward: str, backward: str, no_memory: None
) -> None:
    problem = problem_on_no_gpu(2048, dim, value_dim)
    with pretended():
        for names, name in ((dispatch.FORWARD, forward), (dispatch.BACKWARD, backward)):
            assert dispatch.chosen(names, problem) is dispatch._module(name)


@pytest.mark.parametrize(
    ("options", "taken"),
    [({}, True), ({"is_causal": True}, True), ({"is_causal": True, "window_left": 600}, False)],
)
def test_which_row_caps_hopper_gpus_kernels_take(options: dict[str, Any], taken: bool, no_memory: None) -> None:
    for dim, backward in ((64, hopper_bwd), (128, hopper_bwd), (192, hopper_bwd_wide), (256, hopper_bwd_wide)):
        problem = problem_on_no_gpu(2048, dim, options=options)
        assert hopper_fwd.supports(problem)
        capped = problem_on_no_gpu(2048, dim, options=options | {"row_cap": 0.01})
        capped.row_sums = capped.row_delta = torch.empty(2, 8, 2048, 1, device="meta")
        assert hopper_fwd.supports(capped) == taken
        assert not backward.supports(capped) or taken
    assert backward.supports(capped) == taken


@pytest.mark.parametrize(
    ("dim", "bias", "needed", "forward", "backward"),
    [
        (64, None, False, hopper_fwd, hopper_bwd),
        (96, (1, 8, 1, 1), True, hopper_fwd, hopper_bwd),
        (128, (1, 8, 2048, 1), False, hopper_fwd, hopper_bwd),
        (128, (1, 8, 2048, 1), True, hopper_fwd, hopper_bwd),
        (192, None, False, hopper_fwd, hopper_bwd_wide),
        (256, (1, 8, 2048, 1), False, hopper_fwd, hopper_bwd_wide),
        (256, (1, 8, 1, 1), True, hopper_fwd, hopper_bwd_wide),
        (256, (1, 8, 2048, 1), True, hopper_fwd, flash_bwd),
    ],
)
def test_which_kernels_take_soft_caps_on_a_hopper_gpu(
    dim: int, bias: tuple[int, ...] | None, needed: bool, forward: Any, backward: Any, no_memory: None
) -> None:
    """needed: the gradient of bias, for which dS of wide heads is not summed by rows without the soft cap's slope."""

    def chosen(**options: Any) -> tuple[Any, Any]:
        mask = True, True, True, needed, False
        given = None if bias is None else torch.empty(bias, device="meta")
        problem = problem_on_no_gpu(2048, dim, options=options, bias=given, needed=mask)
        if "row_cap" in options:
            problem.row_sums = problem.row_delta = torch.empty(2, 8, 2048, 1, device="meta")
        return dispatch.chosen(dispatch.FORWARD, problem), dispatch.chosen(dispatch.BACKWARD, problem)

    with pretended():
        assert chosen(softcap=50.0) == chosen(softcap=50.0, is_causal=True) == (forward, backward)
        assert chosen(softcap=50.0, row_cap=0.01) == chosen(softcap=50.0, dropout_p=0.1) == (flash_fwd, flash_bwd)


def test_an_exact_soft_cap_is_left_to_triton(no_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "sigmoid_form", "accurate")
    for dim, backward in ((128, hopper_bwd), (256, hopper_bwd_wide)):
        for options, taken in (({}, True), ({"softcap": 50.0}, False)):
            problem = problem_on_no_gpu(2048, dim, options=options)
            assert hopper_fwd.supports(problem) == backward.supports(problem) == taken


def test_another_gluon_leaves_the_other_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    caches = dispatch._usable, dispatch._obstacle, dispatch._say_once
    for cache in caches:
        cache.cache_clear()
    try:
        assert [name for name, _ in dispatch._usable(dispatch.BACKWARD, 0)] == list(dispatch.BACKWARD)
        for name in ("forward", "backward", "backward_wide", "decode_wide"):
            monkeypatch.setitem(sys.modules, f"sigswap.kernels.hopper.{name}", None)
            monkeypatch.delattr(f"sigswap.kernels.hopper.{name}")
        dispatch._usable.cache_clear()
        for names in (dispatch.FORWARD, dispatch.BACKWARD):
            others = [name for name in names if not name.startswith("hopper.")]
            assert [name for name, _ in dispatch._usable(names, 0)] == others
    finally:
        for cache in caches:
            cache.cache_clear()
    assert "this Triton's Gluon differs" in caplog.text
