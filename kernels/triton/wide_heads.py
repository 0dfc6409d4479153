"""Heads too wide for one tile, up to those of latent attention: the two parts that they are held in, the tiles of rows
and keys that fit then, and which values lie in memory with their keys."""

from __future__ import annotations

from sigswap.kernels.host.layout import next_power_of_2, width
from sigswap.kernels.host.problem import Problem, Signature
from sigswap.kernels.host.recording import recording
from sigswap.kernels.host.tiles import Tile, limits_of

MIN_REST = 64
"""The width of a tile's second part, at least: narrower ones are what Triton 3.6 multiplies wrongly where rows are not
whole units of 16 bytes (:attr:`Signature.has_narrow_value`)."""

TILES = (
    Tile(64, 32, 8, 3),
    Tile(64, 32, 8, 2),
    Tile(32, 64, 8, 3),
    Tile(32, 32, 8, 3),
    Tile(32, 32, 8, 2),
    Tile(16, 32, 4, 3),
    Tile(16, 32, 4, 2),
    Tile(16, 16, 4, 2),
)
"""The first that has no more rows than there are, and fits into shared memory. 64 rows of 512 columns of outputs are
half of all registers; of 16 rows two programs run on a multiprocessor at once."""


def shares_memory(problem: Problem) -> bool:
    """Whether value is a view of key's first channels, and as wide as a tile's first part.

    In code that is being compiled tensors have no addresses: there values are loaded for themselves.
    """
    if recording.by is not None or not problem.value_is_of_key:
        return False
    key, value = problem.signature.key, problem.signature.value
    return width(value.shape[3]) == main_and_rest(key.shape[3])[0]


def main_and_rest(dim: int) -> tuple[int, int]:
    """The widths of the two parts of a tile of query or key; the second may be 0."""
    main = max(16, next_power_of_2(dim + 1) // 2)
    rest = 0 if dim <= main else max(MIN_REST, width(dim - main))
    return (main, rest) if rest < main else (2 * main, 0)


def tile_for(signature: Signature, rows: int, *, shared: bool) -> Tile | None:
    """For so many rows at most. None: there is not enough shared memory.

    shared: whether the first part of a tile of keys is one of values.
    """
    limits = limits_of(signature.device)
    most = 64 if limits.capability < 100 else 32  # tensor memory would not hold 64 rows of outputs and of scores
    rows = min(most, max(16, next_power_of_2(rows)))
    fitting = (each for each in TILES if each.rows <= rows and _bytes(signature, each, shared) <= limits.shared)
    return next(fitting, None)


def programs_at_once(signature: Signature, tile: Tile, *, shared: bool) -> int:
    """How many programs the GPU runs at the same time."""
    limits = limits_of(signature.device)
    each = 1 if tile.warps == 8 else min(2, limits.shared // _bytes(signature, tile, shared))
    return each * limits.multiprocessors


def _bytes(signature: Signature, tile: Tile, shared: bool) -> int:
    """Of shared memory that a program takes, about."""
    query = sum(main_and_rest(signature.query.shape[3])) * signature.element_size
    key = query if shared else query + width(signature.value.shape[3]) * signature.element_size
    # Products of 64 rows are asynchronous on Hopper, and read keys until the next ones; the others need one tile less.
    asynchronous = tile.rows == 64 and limits_of(signature.device).capability == 90
    tiles = tile.stages if asynchronous else tile.stages - 1
    return tile.rows * (query + tile.keys * signature.element_size) + tile.keys * key * tiles + 1024
