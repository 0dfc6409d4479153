"""Where dS of wide heads lies in memory: each tile in a place of its own, where the product finds it; and of how many
heads it goes through memory at a time. test_flash.py runs the kernels on a GPU."""

from __future__ import annotations

import heapq
import os
import random

import pytest
import torch
from in_interpreter import run_interpreted

try:
    import sigswap.kernels.hopper.stored_ds  # noqa: F401
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from sigswap.kernels.hopper import grad_query, stored_ds
from sigswap.kernels.hopper.stored_ds import BLOCK, KEYS
from sigswap.kernels.host.problem import Options, Problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Band:
    """A random one, in which there may be keys that no row sees."""

    def __init__(self, index: int, most: int = 1500) -> None:
        draw = random.Random(index)
        self.q_len, self.kv_len = draw.randint(1, most), draw.randint(1, most)
        self.options = Options(
            0.5,
            is_causal=draw.random() < 0.5,
            bottom_right=draw.random() < 0.5,
            window_left=draw.choice((-1, -1, 0, 50, 200, 600)),
            window_right=draw.choice((-1, 0, 50, 300)),
        )
        row, column = torch.arange(self.q_len)[:, None], torch.arange(self.kv_len)
        self.shift, self.left, self.right = self.options.band(self.q_len, self.kv_len)
        self.visible = torch.ones(self.q_len, self.kv_len, dtype=torch.bool)
        if self.left is not None:
            self.visible &= column >= row + self.shift - self.left
        if self.right is not None:
            self.visible &= column <= row + self.shift + self.right

    def problem(self, heads: int = 1) -> Problem:
        query, key = (torch.empty(1, heads, n, 256, device="meta") for n in (self.q_len, self.kv_len))
        return Problem(query, key, key, None, None, None, self.options)

    def tiles(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Of those that have visible keys, by blocks of keys and rows, the line and the place in it."""
        lines = stored_ds.lines_for(self.problem().signature)
        blocks = -(-self.q_len // BLOCK)
        found = {}
        for block, rows in enumerate(self.visible.split(BLOCK)):
            seen = [number for number, keys in enumerate(rows.split(KEYS, 1)) if bool(keys.any())]
            start = 0 if self.left is None else max(block * BLOCK + self.shift - self.left, 0) // KEYS
            line, from_end = (block, False) if block < lines.lines else (blocks - 1 - block, True)
            for number in seen:
                at = number - start
                found[number, block] = line, lines.tiles - 1 - at if from_end else at
        return found


@pytest.mark.parametrize("index", range(60))
def test_each_tile_has_a_place_of_its_own(index: int) -> None:
    band = Band(index)
    lines = stored_ds.lines_for(band.problem().signature)
    places = list(band.tiles().values())
    assert len(set(places)) == len(places)
    assert all(0 <= line < lines.lines and 0 <= at < lines.tiles for line, at in places)


@pytest.mark.parametrize(("causal", "window", "part"), [(False, -1, 1.0), (True, -1, 0.516), (True, 255, 0.15)])
def test_what_no_row_sees_takes_no_memory(causal: bool, window: int, part: float) -> None:
    length = 4096
    query = torch.empty(1, 1, length, 256, device="meta")
    options = Options(1.0, is_causal=causal, window_left=window)
    lines = stored_ds.lines_for(Problem(query, query, query, None, None, None, options).signature)
    assert lines.numbers <= part * length * length


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("index", range(24))
def test_interpreted_product_of_stored_ds_shard1(index: int) -> None:
    """dQ, and sums of rows, of dS that lies in memory as the kernel puts it there; all else in memory is NaN."""
    torch.manual_seed(index)
    band = Band(index, most=700)
    heads, dim = 2, 64
    lines = stored_ds.lines_for(band.problem(heads).signature)
    ds = torch.randn(heads, band.kv_len, band.q_len) * band.visible.mT
    keys = torch.randn(1, heads, band.kv_len, dim)
    whole = torch.zeros(heads, -(-band.kv_len // KEYS) * KEYS, -(-band.q_len // BLOCK) * BLOCK)
    whole[:, : band.kv_len, : band.q_len] = ds
    memory = torch.full((heads, lines.lines, lines.tiles, KEYS, BLOCK), torch.nan)
    for (number, block), (line, at) in band.tiles().items():
        keys_of_tile = whole[:, number * KEYS : (number + 1) * KEYS]
        memory[:, line, at] = keys_of_tile[:, :, block * BLOCK : (block + 1) * BLOCK]
    dq, db = torch.full((heads, band.q_len, dim), 7.0), torch.full((heads, band.q_len), 7.0)
    left, right = band.left, band.right
    grad_query.product_kernel[(heads * -(-band.q_len // BLOCK),)](
        TensorDescriptor.from_tensor(memory.view(-1, BLOCK), [KEYS, BLOCK]),
        TensorDescriptor.from_tensor(keys, [1, 1, KEYS, dim]), None, dq, db, 0, band.q_len * dim, dim,
        0, band.q_len, 1, heads, 1, band.q_len, band.kv_len, left or 0, right or 0, 0.5, 0, heads,
        lines.lines, lines.tiles, HEAD_DIM=dim, DIM=dim, HAS_LEFT=left is not None, HAS_RIGHT=right is not None,
        BOTTOM_RIGHT=band.shift != 0, ROW_SUMS=True, UNIT=1, WIDE=False,
    )  # fmt: skip
    torch.testing.assert_close(dq, 0.5 * ds.mT @ keys[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(db, ds.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="runs those")
def test_products_in_the_interpreter() -> None:
    run_interpreted(__file__, 1)


def busy(tiles: list[int], units: int, at_once: int) -> float:
    """The part of 132 multiprocessors' time in which they compute, if launches of so many units follow one another and
    programs start longest first."""
    time = 0
    for first in range(0, units, at_once):
        ends = [0] * 132
        for count in sorted(tiles * min(at_once, units - first), reverse=True):
            heapq.heapreplace(ends, ends[0] + count)
        time += max(ends)
    return units * sum(tiles) / (132 * time)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "length"),
    [(4, 8, 1, 4096), (4, 2, 4, 4096), (16, 8, 1, 1024), (1, 8, 1, 16384), (1, 8, 2, 8192), (2, 5, 3, 3000)],
)
def test_launches_keep_a_gpu_busy(
    causal: bool, batch: int, kv_heads: int, group: int, length: int, no_memory: None
) -> None:
    query = torch.empty(batch, kv_heads * group, length, 256, dtype=torch.bfloat16, device="meta")
    key = torch.empty(batch, kv_heads, length, 256, dtype=torch.bfloat16, device="meta")
    signature = Problem(query, key, key, None, None, None, Options(1.0, is_causal=causal)).signature
    at_once = stored_ds.units_at_once(signature)
    own = group * stored_ds.lines_for(signature).numbers * 2
    assert at_once >= 1 and at_once * own <= stored_ds.MOST_BYTES
    blocks = -(-length // KEYS)
    tiles = [-(-(length - block * KEYS) // BLOCK) if causal else -(-length // BLOCK) for block in range(blocks)]
    units = batch * kv_heads
    best = max(busy(tiles, units, each) for each in range(1, units + 1) if each * own <= stored_ds.MOST_BYTES)
    assert busy(tiles, units, at_once) >= best / 1.08


@pytest.mark.parametrize("index", range(40))
def test_as_many_heads_as_ds_may_take(index: int, no_memory: None) -> None:
    draw = random.Random(index)
    batch, kv_heads, group = draw.choice((1, 3, 16)), draw.choice((1, 4, 5)), draw.choice((1, 2, 8))
    q_len, kv_len = draw.choice((300, 1024, 5000, 16384)), draw.choice((300, 1024, 5000, 16384))
    query = torch.empty(batch, kv_heads * group, q_len, 256, dtype=torch.bfloat16, device="meta")
    key = torch.empty(batch, kv_heads, kv_len, 256, dtype=torch.bfloat16, device="meta")
    signature = Problem(query, key, key, None, None, None, Options(1.0)).signature
    own = group * stored_ds.lines_for(signature).numbers * 2
    at_once, units = stored_ds.units_at_once(signature), batch * kv_heads
    if own > stored_ds.MOST_BYTES:
        assert at_once == 0
    else:
        assert 1 <= at_once <= units and at_once * own <= stored_ds.MOST_BYTES
        # All are launched at once where they take little, and so many are in one launch otherwise.
        assert at_once == units or at_once >= units / -(-units // max(1, stored_ds.LEAST_BYTES // own)) - 1
