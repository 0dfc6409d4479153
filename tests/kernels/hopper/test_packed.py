"""Plans of packed sequences for Hopper GPUs, and what goes by them, in Triton's interpreter; and which problems the
kernels take. test_varlen.py runs them."""

from __future__ import annotations

import os
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from h100 import pretended
from in_interpreter import run_interpreted
from torch import Tensor

try:
    from hopper_compiles import assert_backward_products_in_flight, assert_forward_products_in_flight
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from sigswap.kernels import dispatch
from sigswap.kernels.hopper import backward as hopper_bwd
from sigswap.kernels.hopper import forward as hopper_fwd
from sigswap.kernels.hopper import forward_items, grad_query, packed
from sigswap.kernels.host.forms import AUTO, FAST, TAIL
from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.problem import Options, Packed, Problem
from sigswap.kernels.triton import sums

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = packed.TILE


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


class Sizes:
    """Random lengths of sequences, and what a plan of them is made with."""

    def __init__(self, index: int) -> None:
        draw = random.Random(index)
        sequences = draw.choice((1, 3, 33, 40))
        self.q_lens = [draw.choice((0, 1, 64, 100, 700, 2000)) for _ in range(sequences)]
        self.k_lens = self.q_lens if draw.random() < 0.6 else [draw.choice((0, 1, 64, 100, 700)) for _ in self.q_lens]
        self.size = draw.choice((64, 128, 256))
        self.by_keys = draw.random() < 0.5
        self.most = sum(self.k_lens if self.by_keys else self.q_lens) // self.size + sequences
        self.most_tiles = sum(self.q_lens) // TILE + sequences


def plan_of(sizes: Sizes, cu_q: Tensor, cu_k: Tensor) -> tuple[Tensor, Tensor]:
    """The plan and the tiles of dQ, behind each of which are 8 numbers that are -7."""
    sequences = len(cu_q) - 1
    longest_q, longest_k = max(sizes.q_lens), max(sizes.k_lens)
    chunks = max(1, cdiv(cdiv(longest_k if sizes.by_keys else longest_q, sizes.size), 128))
    plan = torch.full((8 * (sizes.most + 2),), -7, dtype=torch.int32)
    tiles = torch.full((8 * (sizes.most_tiles + 1),), -7, dtype=torch.int32)
    packed.plan_kernel[(sequences * chunks,)](
        plan,
        tiles if sizes.by_keys else None,
        cu_q,
        cu_k,
        longest_q,
        longest_k,
        sum(sizes.q_lens),
        sum(sizes.k_lens),
        sequences,
        chunks,
        sizes.most,
        sizes.most_tiles,
        BY_KEYS=sizes.by_keys,
        SIZE=sizes.size,
        TILE=TILE,
    )
    return plan.view(-1, 8), tiles.view(-1, 8)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("index", range(12))
def test_interpreted_plans_shard1(index: int) -> None:
    """Sequences come in the order of what their items take, each with all its items; tiles as they are."""
    sizes = Sizes(index)
    cu_q, cu_k = ends(sizes.q_lens), ends(sizes.k_lens)
    plan, tiles = plan_of(sizes, cu_q, cu_k)
    first_tile = 0
    sequences, expected_tiles = [], []
    for number, (q_len, kv_len) in enumerate(zip(sizes.q_lens, sizes.k_lens, strict=True)):
        begin = int(cu_q[number])
        items = cdiv(kv_len if sizes.by_keys else q_len, sizes.size)
        entry = [begin, q_len, int(cu_k[number]), kv_len, items, min(first_tile, sizes.most_tiles - 1)]
        sequences.append((-(q_len if sizes.by_keys else kv_len), number, entry))
        expected_tiles += [[begin + at, min(TILE, q_len - at), at, q_len, kv_len] for at in range(0, q_len, TILE)]
        first_tile += cdiv(q_len, TILE)
    expected: list[list[int]] = []
    for _, _, (*entry, items, tile) in sorted(sequences):
        expected += [[*entry, len(expected), items, tile]] * items
    assert plan[0, :2].tolist() == [len(expected), len(expected_tiles)]
    assert plan[1 : 1 + len(expected), :7].tolist() == expected
    assert (plan[1 + len(expected) :] == -7).all()
    if sizes.by_keys:
        assert tiles[: len(expected_tiles), :5].tolist() == expected_tiles
        assert (tiles[len(expected_tiles) :] == -7).all()


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("index", range(12))
def test_interpreted_plans_of_wrong_ends_stay_within_the_tensors_shard1(index: int) -> None:
    sizes = Sizes(index)
    draw = random.Random(index)
    totals = sum(sizes.q_lens), sum(sizes.k_lens)
    wrong = [0, -1, -(2**31), 2**31 - 1, totals[0], totals[1], totals[0] // 2, totals[0] + 1]
    count = len(sizes.q_lens) + 1
    cu_q, cu_k = (torch.tensor([draw.choice(wrong) for _ in range(count)], dtype=torch.int32) for _ in range(2))
    plan, tiles = plan_of(sizes, cu_q, cu_k)
    items, all_tiles = plan[0, :2].tolist()
    assert 0 <= items <= sizes.most and 0 <= all_tiles <= sizes.most_tiles
    assert (plan[-1] == -7).all() and (tiles[-1] == -7).all()
    assert (plan[1 + items :] == -7).all()
    for at, (q_begin, q_len, k_begin, kv_len, first, number, tile) in enumerate(plan[1 : 1 + items, :7].tolist()):
        assert first <= at < first + number  # those that no sequence writes would be -7
        assert q_begin >= 0 and q_len >= 0 and q_begin + q_len <= totals[0]
        assert k_begin >= 0 and kv_len >= 0 and k_begin + kv_len <= totals[1]
        assert first >= 0 and first + number <= sizes.most
        assert tile >= 0 and (not sizes.by_keys or q_len == 0 or tile + cdiv(q_len, TILE) <= sizes.most_tiles)
    if sizes.by_keys:
        assert (tiles[all_tiles:] == -7).all()
        for row, rows, *_ in tiles[:all_tiles].tolist():
            assert row >= 0 and 0 <= rows <= TILE and row + rows <= totals[0]


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_interpreted_plan_of_wrong_ends_with_2_to_the_31_tiles_shard1() -> None:
    """Every other one of 601 sequences has all 2^29 rows and keys. The first program counts them, and has all items."""
    total, most = 1 << 29, 10
    cu = torch.tensor([0, total] * 301, dtype=torch.int32)
    plan, tiles = (torch.full((most + 2, 8), -7, dtype=torch.int32) for _ in range(2))
    packed.plan_kernel[(1,)](
        plan, tiles, cu, cu, total, total, total, total, 601, 1, most, most, BY_KEYS=True, SIZE=128, TILE=TILE
    )
    assert plan[0, :2].tolist() == [most, most]
    assert plan[1 : 1 + most, :7].tolist() == [[0, 0, 0, total, 0, most, 0]] * most
    assert tiles[:most, :5].tolist() == [[64 * at, 0, 64 * at, 0, total] for at in range(most)]
    assert (plan[-1] == -7).all() and (tiles[most:] == -7).all()


def finished(sums: Tensor, dq: Tensor, tiles: int, **packed_by: Any) -> None:
    """Puts tiles of dQ of one head of 64 columns, in the order that the kernels add them up in, where they belong."""
    grad_query.finish_columns_kernel[(tiles,)](
        sums, dq, None, packed_by.get("plan"), packed_by.get("all_tiles"), 0, 0, dq.stride(0), 1, len(dq), tiles, 1.0,
        0, 0, 0, HEAD_DIM=64, DIM=64, FIRST=64, COLUMNS=64, UNIT=1, WIDE=False,
    )  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_interpreted_rows_of_dq_2_to_the_31_elements_from_the_first_shard1() -> None:
    torch.manual_seed(0)
    sums = torch.randn(9, 64 * 64)
    near = torch.zeros(9 * 64, 64)
    memory = torch.empty(9 * 64 << 22, dtype=torch.bfloat16)  # of which few pages are used
    far = memory.as_strided(near.shape, (1 << 22, 1))
    finished(sums, near, 9)
    finished(sums, far, 9)
    torch.testing.assert_close(far.float(), near, rtol=2**-7, atol=0)  # the interpreter cuts off


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_interpreted_products_2_to_the_31_elements_from_the_first_shard1() -> None:
    """dS times the keys, of rows that are as far apart as int32 holds for those of a block. A line of dS holds tiles of
    the first block of rows and the last, one of the second and the last but one; the middle one is alone."""
    torch.manual_seed(0)
    stored, keys = torch.randn(3, 2, 64, 128), torch.randn(1, 1, 64, 64)
    ds = torch.cat([stored[0, 0], stored[1, 0], stored[2, 0], stored[1, 1], stored[0, 1]], 1)
    dq = torch.empty(576 << 22, dtype=torch.bfloat16).as_strided((576, 64), (1 << 22, 1))
    grad_query.product_kernel[(5,)](
        TensorDescriptor.from_tensor(stored.view(-1, 128), [64, 128]),
        TensorDescriptor.from_tensor(keys, [1, 1, 64, 64]), None, dq,
        None, 0, 0, dq.stride(0), 0, 0, 0, 1, 1, 576, 64, 0, 0, 0.5, 0, 1, 3, 2,
        HEAD_DIM=64, DIM=64, HAS_LEFT=False, HAS_RIGHT=False, BOTTOM_RIGHT=False, ROW_SUMS=False, UNIT=1, WIDE=False,
    )  # fmt: skip
    torch.testing.assert_close(dq.float(), 0.5 * ds[:, :576].mT @ keys[0, 0], rtol=2**-7, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
def test_interpreted_rows_of_dq_of_packed_sequences_shard1() -> None:
    """Each tile goes to its own sequence, and no further than that; those that no sequence has nowhere."""
    torch.manual_seed(0)
    sizes = Sizes(0)
    sizes.q_lens = sizes.k_lens = [70, 0, 64, 1, 130]
    sizes.by_keys, sizes.size, sizes.most, sizes.most_tiles = True, 128, 265 // 128 + 5, 265 // 64 + 5
    plan, all_tiles = plan_of(sizes, ends(sizes.q_lens), ends(sizes.k_lens))
    sums = torch.randn(sizes.most_tiles, 64 * 64)
    found, alone = torch.full((265, 64), 7.0), torch.zeros(sizes.most_tiles * 64, 64)
    finished(sums, alone, sizes.most_tiles)
    finished(sums, found, sizes.most_tiles, plan=plan, all_tiles=all_tiles)
    expected = [alone[64 * tile :][:rows] for tile, rows in ((0, 70), (2, 64), (3, 1), (4, 130))]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"bottom_right": True, "window_left": 40}])
@pytest.mark.parametrize("given", [None, 1, 3])
def test_interpreted_numbers_of_tiles_shard1(options: dict[str, Any], given: int | None) -> None:
    """Row biases, -1.5 - ln(visible keys) and one that is given for all heads or for each, and zeros behind them."""
    torch.manual_seed(0)
    sizes = Sizes(0)
    sizes.q_lens, sizes.k_lens = [70, 0, 64, 1, 130], [100, 3, 64, 50, 90]
    sizes.by_keys, sizes.size, sizes.most, sizes.most_tiles = True, 128, 307 // 128 + 5, 265 // 64 + 5
    plan, all_tiles = plan_of(sizes, ends(sizes.q_lens), ends(sizes.k_lens))
    bias = None if given is None else torch.randn(given, 265)
    band = Options(1.0, -1.5, **options)
    shape = given or 1, sizes.most_tiles, 64
    out, floor = torch.full(shape, 7.0), torch.full(shape[:2], 7.0)
    left, right = band.window_left, 0 if band.is_causal else -1
    packed.numbers_kernel[(shape[0] * shape[1],)](
        out, floor, bias, plan, all_tiles, sizes.most_tiles, left, right, -1.5, 265 if (given or 1) > 1 else 0, 1,
        BIASES=True, VISIBLE=True, HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, BOTTOM_RIGHT=band.bottom_right, TILE=TILE,
    )  # fmt: skip
    expected = torch.zeros(shape)
    lowest = torch.full(shape[:2], float("inf"))
    tile = first = 0
    for q_len, kv_len in zip(sizes.q_lens, sizes.k_lens, strict=True):
        row, column = torch.arange(q_len)[:, None], torch.arange(kv_len)
        at = row + (kv_len - q_len if band.bottom_right else 0)
        visible = torch.ones(q_len, kv_len, dtype=torch.bool)
        visible &= (column <= at) if band.is_causal else True
        visible &= (column >= at - left) if left >= 0 else True
        own = (-1.5 - visible.sum(1).clamp(min=1).double().log()).float().expand(shape[0], -1)
        own = own if bias is None else own + bias[:, first : first + q_len]
        for start in range(0, q_len, 64):
            part = own[:, start : start + 64]
            expected[:, tile, : part.shape[1]] = part
            lowest[:, tile] = part.amin(1)
            tile += 1
        first += q_len
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(floor, lowest)


def test_plans_in_the_interpreter() -> None:
    run_interpreted(__file__, 1)


def problem(dim: int = 128, value_dim: int | None = None, *, sequences: int = 4, **more: Any) -> Problem:
    """Of 4,096 rows in all; for no_memory()."""
    total, dtype = 4096, more.get("dtype", torch.bfloat16)
    query, key = (torch.empty(1, heads, total, dim, dtype=dtype, device="meta") for heads in (8, 4))
    value, grad_out = (torch.empty(1, heads, total, value_dim or dim, dtype=dtype, device="meta") for heads in (4, 8))
    cu = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    options = Options(dim**-0.5, **more.get("options", {}))
    of_sequences = Packed(cu, cu, total // 2, total // 2)
    needed = (True, True, True, False, False)
    return Problem(query, key, value, None, None, None, options, of_sequences, grad_out=grad_out, output_mask=needed)


@pytest.mark.parametrize(
    ("given", "forward", "backward"),
    [
        (problem(), "hopper.forward", "hopper.backward"),
        (problem(sequences=16), "hopper.forward", "hopper.backward"),
        (problem(sequences=17), "triton.forward", "triton.backward"),
        (problem(sequences=0), "triton.forward", "triton.backward"),
        (problem(64), "hopper.forward", "hopper.backward"),
        (problem(64, options={"is_causal": True}), "triton.forward", "hopper.backward"),
        (problem(96, options={"is_causal": True}), "hopper.forward", "hopper.backward"),
        (problem(256), "hopper.forward", "triton.backward"),
        (problem(192, 128), "hopper.forward", "triton.backward"),
        (problem(32), "triton.forward", "triton.backward"),
        (problem(dtype=torch.float32), "triton.forward", "triton.backward"),
        (problem(options={"dropout_p": 0.1}), "triton.forward", "triton.backward"),
        (problem(options={"is_causal": True, "window_left": 100}), "triton.forward", "triton.backward"),
        (problem(options={"is_causal": True, "window_left": 600}), "hopper.forward", "hopper.backward"),
        *(
            (problem(dim, options={"window_left": 300, "window_right": 200}), forward, "triton.backward")
            for dim, forward in ((64, "triton.forward"), (96, "hopper.forward"), (256, "hopper.forward"))
        ),
    ],
)
def test_which_kernels_run_on_a_hopper_gpu(given: Problem, forward: str, backward: str, no_memory: None) -> None:
    with pretended():
        for names, name in ((dispatch.FORWARD, forward), (dispatch.BACKWARD, backward)):
            assert dispatch.chosen(names, given) is dispatch._module(name)


def test_plans_are_made_for_the_longest_sequences(no_memory: None) -> None:
    """Launches and memory are for as many items as there can be."""
    with pretended():
        forward = hopper_fwd._plan(problem().signature, None, None)
        assert forward.items is not None and forward.items.most == 4096 // 128 + 4
        given = problem()
        grads = tuple(None if each is None else hopper_fwd.layout_of(each) for each in given.inputs)
        backward = hopper_bwd._plan(given.signature, hopper_fwd.layout_of(given.query), grads, None)
    assert backward.packed is not None and backward.packed.items.most == 4096 // 128 + 4
    assert backward.sums.shape == (8 * (4096 // 64 + 4) + 1, 64 * 128)
    assert backward.launch._grid == (132, 1, 1)  # programs, which take that many items


def test_parts_of_the_gradient_of_a_bias_that_no_item_writes_are_zeros(
    no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is memory for as many items as there can be, and programs end where there are no more."""
    given = problem()
    query, key, value = (torch.zeros_like(each, device="cpu") for each in (given.query, given.key, given.value))
    bias, cu = torch.zeros(1, 8, 1, 1), torch.tensor([0, 1024, 2048, 3072, 4096], dtype=torch.int32)
    problem_of_bias = Problem(
        query, key, value, bias, None, None, given.options, Packed(cu, cu, 1024, 1024), grad_out=torch.zeros_like(query)
    )
    problem_of_bias.output_mask = (True, True, True, True, False)
    launched: list[tuple[Any, tuple[Any, ...]]] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch, *tensors: launched.append((launch._kernel, tensors)))
    monkeypatch.setattr(sums, "new_tensor", lambda layout, device: torch.full(layout.shape, float("nan")))
    with pretended():
        hopper_bwd.backward(problem_of_bias)
    (parts,) = (tensors[7] for kernel, tensors in launched if kernel is hopper_bwd._kernel)
    assert parts.shape == (1, 8, (4096 // 128 + 4) * 256, 1)
    assert not parts.any()


@pytest.mark.parametrize(("by_keys", "grid"), [(False, 4), (True, 4)])
def test_longest_lengths_above_all_rows_add_no_programs(by_keys: bool, grid: int, no_memory: None) -> None:
    given = problem()
    assert given.packed is not None
    given.packed = given.packed._replace(longest_q=1 << 40, longest_k=1 << 40)
    with pretended():
        plan = packed.plan_for(given.signature, 128, by_keys=by_keys)
    assert plan.launch._grid == (grid, 1, 1)
    longest = dict(zip(packed.plan_kernel.arg_names[4:], plan.launch._rest, strict=True))
    assert longest["longest_q"] == longest["longest_k"] == 4096


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, pytest.param(96, marks=pytest.mark.slow), 128])
@pytest.mark.parametrize(
    ("band", "form", "grouped", "bias", "capped"),
    [
        ("none", FAST, False, None, False),
        ("causal", AUTO, True, "heads", False),
        ("window", AUTO, False, "rows", False),
        ("causal", TAIL, True, "rows", True),
    ],
)
def test_the_backward_compiles_with_its_products_in_flight(
    dim: int, band: str, form: int, grouped: bool, bias: str | None, capped: bool, tmp_path: Path
) -> None:
    given = {"capped": capped, "packed": True}
    assert_backward_products_in_flight(dim, "bf16", band, form, grouped, bias, tmp_path, **given)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(1, 1), (2, 2), (3, 2), (4, 4)])
@pytest.mark.parametrize(
    ("band", "form", "bias", "capped"),
    [("none", FAST, None, False), ("causal", AUTO, "heads", False), ("window", TAIL, "rows", True)],
)
def test_the_forward_compiles_with_its_products_in_flight(
    tile: tuple[int, int], band: str, form: int, bias: str | None, capped: bool, tmp_path: Path
) -> None:
    dims = 64 * tile[0], 64 * tile[1]
    given = {"capped": capped, "sums": capped, "packed": True}
    tiles = forward_items.TILES[tile]
    assert_forward_products_in_flight(dims, tiles, "bf16", band, form, bias, 320, tmp_path, **given)
