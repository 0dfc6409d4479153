"""The ring of sums of dQ on Hopper GPUs: its size, that nobody waits for ever, and, on a GPU, that it may go round."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

try:
    from hopper_compiles import problem_on_no_gpu
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.kernels.hopper import backward as hopper_bwd
from sigswap.kernels.hopper.backward_ring import Ring, ring_for
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.host.problem import Options, Packed, Problem, Signature

CUDA = torch.cuda.is_available()
ON_HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9


def signature_of(length: int, dim: int, **options: Any) -> Signature:
    query = torch.empty(1, dtype=torch.bfloat16).expand(4, 16, length, dim)
    return Problem(query, query, query, None, None, None, Options(scale=1.0, **options)).signature


@pytest.mark.parametrize(
    ("length", "columns", "options", "has_one"),
    [
        (4096, 64, {}, True),
        (8192, 64, {}, False),
        (6000, 64, {"is_causal": True}, True),
        (4096, 96, {"is_causal": True}, True),
        (1024, 128, {}, True),
        (4096, 128, {"is_causal": True}, False),
        (4096, 64, {"is_causal": True, "window_left": 512}, False),
        (4096, 64, {"softcap": 50.0}, False),
    ],
)
def test_which_problems_have_one(length: int, columns: int, options: dict[str, Any], has_one: bool) -> None:
    ring = ring_for(signature_of(length, columns, **options), columns, 64, 1, length // 128, 132)
    assert (ring is not None) == has_one


def test_packed_sequences_have_none() -> None:
    query = torch.empty(1, dtype=torch.bfloat16).expand(1, 16, 4096, 64)
    ends = torch.tensor([0, 4096], dtype=torch.int32)
    packed = Packed(ends, ends, 4096, 4096)
    signature = Problem(query, query, query, None, None, None, Options(scale=1.0), packed=packed).signature
    assert ring_for(signature, 64, 16, 264, 32, 132) is None


@pytest.mark.parametrize(
    ("units", "at_once", "blocks", "programs", "in_turn", "turns", "all_turns"),
    [
        (128, 9, 32, 132, 9, 2, 15),
        (128, 1, 32, 132, 5, 3, 26),
        (512, 33, 8, 132, 33, 2, 16),
        (512, 1, 8, 132, 17, 3, 31),
        (32, 1, 128, 132, 2, 3, 16),
        (2, 1, 32, 64, 2, 1, 1),
        (1, 1, 8, 8, 1, 1, 1),
    ],
)
def test_its_size(
    units: int, at_once: int, blocks: int, programs: int, in_turn: int, turns: int, all_turns: int
) -> None:
    ring = ring_for(signature_of(1024, 64), 64, units, at_once, blocks, programs)
    assert ring == Ring(in_turn, turns, 2 + 2 * all_turns)


@pytest.mark.parametrize("index", range(60))
def test_nobody_waits_for_ever(index: int) -> None:
    """As many programs as there is place for, each with one that works on items and two that finish tiles, in any
    order: all items and tiles come to an end, and a turn's items add to no tile that an earlier turn still has."""
    draw = random.Random(index)
    units, blocks, tiles = draw.randint(1, 60), draw.randint(1, 20), draw.randint(1, 8)
    programs = draw.choice((1, 2, 5, 132))
    ring = ring_for(signature_of(1024, 64), 64, units, draw.randint(1, 4), blocks, programs)
    assert ring is not None
    turn_of_item, turn_of_tile = ([u // ring.in_turn for u in range(units) for _ in range(n)] for n in (blocks, tiles))
    all_turns = turn_of_tile[-1] + 1
    items_ended, tiles_free = [0] * all_turns, [0] * all_turns
    items, finished = iter(turn_of_item), iter(turn_of_tile)
    # What each has taken, and, of those that finish, the tiles that they have finished and not counted.
    workers: list[int | None] = [next(items, None) for _ in range(draw.randint(1, programs))]
    finishers = [[next(finished, None), None, 0] for _ in range(2 * len(workers))]
    while any(turn is not None for turn in workers) or any(turn is not None for turn, *_ in finishers):
        for finisher in finishers:  # each counts before it waits for another turn, or ends
            turn, ended, number = finisher
            if number and turn != ended:
                tiles_free[ended] += number
                finisher[2] = 0
        able = [i for i, turn in enumerate(workers) if turn is not None and (
            turn < ring.turns or tiles_free[turn - ring.turns] == ring.in_turn * tiles
        )]  # fmt: skip
        ready = [f for f in finishers if f[0] is not None and items_ended[f[0]] == turn_of_item.count(f[0])]
        assert able or ready, "all wait"
        if able and (not ready or draw.random() < 0.5):
            i = draw.choice(able)
            turn = workers[i]
            assert turn is not None
            assert all(tiles_free[earlier] == ring.in_turn * tiles for earlier in range(turn - ring.turns + 1))
            items_ended[turn] += 1
            workers[i] = next(items, None)
        else:
            finisher = draw.choice(ready)
            finisher[:] = next(finished, None), finisher[0], finisher[2] + 1
    assert items_ended == [turn_of_item.count(turn) for turn in range(all_turns)]


@pytest.mark.usefixtures("no_memory")
def test_sums_are_those_of_the_ring() -> None:
    problem = problem_on_no_gpu(2048, 64)
    assert problem.grad_out is not None
    grads = tuple(None if given is None else layout_of(given) for given in problem.inputs)
    plan = hopper_bwd._plan(problem.signature, layout_of(problem.grad_out), grads, None)
    assert plan.finish is None
    # Eight key heads of 16 blocks, one turn, with two heads of 32 tiles each; behind them 4 counters.
    assert plan.sums.shape == (8 * 2 * 32 + 1, 64 * 64)


def gradients_of(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    """In float64, head by head, of one query head per key head, with the bias -log N of N keys."""
    length, scale = key.shape[2], query.shape[3] ** -0.5
    grads = [torch.empty_like(each, dtype=torch.float64) for each in (query, key, value)]
    hidden = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device).triu(1)
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            q, k, v, do = (each[batch, head].double() for each in (query, key, value, grad_out))
            p = torch.sigmoid(scale * (q @ k.T) - torch.log(torch.tensor(float(length), dtype=torch.float64)))
            if is_causal:
                p = p.masked_fill(hidden, 0.0)
            ds = p * (1 - p) * (do @ v.T)
            for grad, own in zip(grads, (scale * (ds @ k), scale * (ds.T @ q), p.T @ do), strict=True):
                grad[batch, head] = own
    return tuple(grads)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 104, 128])
def test_it_goes_round(head_dim: int, is_causal: bool) -> None:
    """Of 200 heads; their last tile of rows is a part of one."""
    draw = torch.Generator("cuda").manual_seed(head_dim)
    shape = (4, 1000, 50, head_dim)
    query, key, value, grad_out = (
        torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    options = Options(
        head_dim**-0.5, is_causal=is_causal, const_bias=-float(torch.log(torch.tensor(1000.0))), visible_bias=False
    )
    needed = (True, True, True, False, False)
    expected = gradients_of(query, key, value, grad_out, is_causal)
    for _ in range(3):
        problem = Problem(query, key, value, None, None, None, options, grad_out=grad_out, output_mask=needed)
        grads = tuple(None if given is None else layout_of(given) for given in problem.inputs)
        plan = hopper_bwd._plan(problem.signature, layout_of(grad_out), grads, None)
        assert plan.finish is None
        assert plan.sums.shape[0] < 200 * 16
        for found, own in zip(hopper_bwd.backward(problem), expected, strict=False):
            assert found is not None
            error = (found.double() - own).norm(dim=(2, 3)) / own.norm(dim=(2, 3))
            assert error.max() < 0.01, f"of one head: {error.max():.1e}"


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
def test_items_of_few_rows() -> None:
    """Each is two tiles of rows, so that a program is at the next items while it still counts one."""
    draw = torch.Generator("cuda").manual_seed(0)
    query, key, value, grad_out = (
        torch.randn((8, length, 64, 64), generator=draw, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for length in (128, 1024, 1024, 128)
    )
    options = Options(64**-0.5)
    needed = (True, True, True, False, False)
    expected = gradients_of(query, key, value, grad_out, is_causal=False)
    for _ in range(20):
        problem = Problem(query, key, value, None, None, None, options, grad_out=grad_out, output_mask=needed)
        grads = tuple(None if given is None else layout_of(given) for given in problem.inputs)
        assert hopper_bwd._plan(problem.signature, layout_of(grad_out), grads, None).finish is None
        for found, own in zip(hopper_bwd.backward(problem), expected, strict=False):
            assert found is not None
            error = (found.double() - own).norm(dim=(2, 3)) / own.norm(dim=(2, 3))
            assert error.max() < 0.01, f"of one head: {error.max():.1e}"
