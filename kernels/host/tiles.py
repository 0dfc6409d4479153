"""Tile configurations, and the limits of a device that they must fit."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A tile configuration."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0
    """Per thread, at most, if positive: so that more programs fit on a multiprocessor."""

    def launch_options(self) -> dict[str, int]:
        # The sigmoid takes elements by twos, so every thread must have two of a tile.
        options = {"num_warps": min(self.warps, self.rows * self.keys // 64), "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


class Limits(NamedTuple):
    """Of a device."""

    capability: int
    """Compute capability times 10."""
    shared: int
    """Shared memory per program, in bytes."""
    multiprocessors: int


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """Of a CUDA device; on a CPU (the interpreter) those of an H100."""
    if device.type != "cuda":
        return Limits(90, 232448, 132)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    return Limits(properties.major * 10 + properties.minor, shared, properties.multi_processor_count)


def fit(tile: Tile, row_bytes: int, key_bytes: int, shared: int) -> Tile:
    """The tile, made smaller until rows and ``stages`` times keys fit into shared memory."""

    def needed() -> int:
        return tile.rows * row_bytes + tile.keys * key_bytes * max(1, tile.stages) + 4096

    while needed() > shared:
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.keys > 32:
            tile = tile._replace(keys=tile.keys // 2)
        elif tile.stages > 1:
            tile = tile._replace(stages=1)
        elif tile.rows > 16:
            tile = tile._replace(rows=tile.rows // 2)
        elif tile.keys > 16:
            tile = tile._replace(keys=tile.keys // 2)
        else:
            break
    return tile
