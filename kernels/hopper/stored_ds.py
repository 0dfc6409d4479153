"""Where dS of wide heads lies in memory between the kernel that computes it and the one that multiplies it by the keys.

dS of a head is cut in tiles of 64 keys and 128 rows. Of these only such are stored in which some row may see some key:
under a causal mask the first rows see few keys, the last ones many. So two blocks of rows, the first and the last, the
second and the last but one, and so on, share a line of tiles: one from its beginning, the other from its end. A causal
mask then takes half the memory, and a window what it sees.

dS of all heads would take much memory, so both kernels are launched by turns, for some heads at a time.
"""

from __future__ import annotations

import functools
import heapq
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from triton.experimental import gluon

from sigswap.kernels.host.layout import cdiv
from sigswap.kernels.host.problem import MAX_PLANS, Signature
from sigswap.kernels.host.tiles import limits_of

KEYS, BLOCK = 64, 128
"""The keys and rows of a tile."""

LEAST_BYTES, MOST_BYTES = 128 << 20, 544 << 20
"""What dS may take: always; and where less would leave multiprocessors idle, or one key head takes more. Of 16,384
queries and as many keys of one head it takes 512 MiB, of 23,000 under a causal mask 507; to add dQ up instead takes 1.2
to 1.3 times as long."""

_KEYS, _BLOCK = tl.constexpr(KEYS), tl.constexpr(BLOCK)


class Lines(NamedTuple):
    """How a head's tiles lie."""

    lines: int
    tiles: int
    """Of a line."""

    @property
    def numbers(self) -> int:
        return self.lines * self.tiles * KEYS * BLOCK


def lines_for(signature: Signature) -> Lines:
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    start = np.arange(0, signature.q_len, BLOCK, dtype=np.int64)
    first = np.zeros_like(start) if left is None else np.maximum(start + shift - left, 0)
    end = np.full_like(start, signature.kv_len)
    if right is not None:
        end = np.minimum(end, np.minimum(start + BLOCK, signature.q_len) + shift + right)
    tiles = np.maximum(-(-end // KEYS) - first // KEYS, 0)
    count = (len(start) + 1) // 2
    both = tiles[:count] + tiles[::-1][:count]
    if len(start) % 2:
        both[-1] = tiles[count - 1]  # the middle one has a line of its own
    return Lines(count, max(int(both.max()), 1))


@functools.lru_cache(MAX_PLANS)
def units_at_once(signature: Signature) -> int:
    """Of how many pairs of sequence and key head dS goes through memory at a time; 0: of none, dQ is added up.

    As few as take :data:`LEAST_BYTES`, or more, if these would not keep all multiprocessors busy until the end."""
    group = signature.heads // signature.kv_heads
    own = group * lines_for(signature).numbers * signature.element_size
    if own > MOST_BYTES:
        return 0
    units = signature.batch * signature.kv_heads
    launches = range(cdiv(units, MOST_BYTES // own), cdiv(units, max(1, LEAST_BYTES // own)) + 1)
    sizes = sorted({cdiv(units, count) for count in launches})
    if len(sizes) == 1:
        return sizes[0]
    tiles = _tiles_of_programs(signature)
    processors = limits_of(signature.device).multiprocessors
    took = {size: _time(tiles, size, units, processors) for size in sizes}
    return next(size for size in sizes if took[size] <= 1.05 * min(took.values()))


def _tiles_of_programs(signature: Signature) -> list[int]:
    """Of a key head's programs, of which each has a block of keys, those of rows that see some of them."""
    shift, left, right = signature.options.band(signature.q_len, signature.kv_len)
    start = np.arange(0, signature.kv_len, KEYS, dtype=np.int64)
    first = np.zeros_like(start) if right is None else np.clip(start - shift - right, 0, signature.q_len - 1)
    end = np.full_like(start, signature.q_len)
    if left is not None:
        end = np.minimum(end, np.minimum(start + KEYS, signature.kv_len) - shift + left)
    tiles: list[int] = np.maximum(-(-(end - first // BLOCK * BLOCK) // BLOCK), 1).tolist()
    return tiles


def _time(tiles: list[int], at_once: int, units: int, processors: int) -> float:
    """How long all launches take together, in tiles of rows: a program starts when another one ends, longest first."""
    rest = units % at_once
    time = units // at_once * _end(tiles, at_once, processors)
    return time + (_end(tiles, rest, processors) if rest else 0.0)


def _end(tiles: list[int], units: int, processors: int) -> float:
    if units * len(tiles) > 16 * processors:  # that many end at about the same time
        return units * sum(tiles) / processors + max(tiles) / 2
    ends = [0] * processors
    for count in sorted(tiles, reverse=True):
        for _ in range(units):
            heapq.heapreplace(ends, ends[0] + count)
    return float(max(ends))


# Device functions.


def _place_of_tile(head, block, blocks, key_block, lines, line_tiles):
    """The first row in memory of a tile of the head-th head, of which there are as many rows as keys.

    block: of rows, of blocks in all. key_block: counted from the first that a row of the block may see.
    """
    behind = block // lines
    line = block + behind * (blocks - 1 - 2 * block)
    at = key_block + behind * (line_tiles - 1 - 2 * key_block)
    return ((head * lines + line) * line_tiles + at) * _KEYS


place_in_gluon: Any = gluon.jit(_place_of_tile)
place_in_triton: Any = triton.jit(_place_of_tile)
