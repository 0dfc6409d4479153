"""What the suite distributed measures."""

from __future__ import annotations

import dataclasses
from typing import Literal

Parallel = Literal["data", "tensor", "context"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """``length``: tokens of a sequence; in data parallelism each rank has one of its own. ``layers`` 0: attention
    alone, causal."""

    parallel: Parallel
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 0
    intermediate: int = 0
    vocabulary: int = 0

    @property
    def label(self) -> str:
        heads = f"H={self.heads}" if self.heads == self.kv_heads else f"H={self.heads}/{self.kv_heads}"
        shape = f"{self.length} tokens {heads} D={self.head_dim}"
        return f"Llama x{self.layers} {shape}" if self.layers else f"attention {shape}"

    def tokens(self, ranks: int) -> int:
        """Of a step, of all ranks together."""
        return self.length * (ranks if self.parallel == "data" else 1)


def cells(quick: bool) -> list[Cell]:
    """``quick``: small enough for a CPU."""
    if quick:
        llama = {"heads": 4, "kv_heads": 2, "head_dim": 16, "layers": 2, "intermediate": 128, "vocabulary": 128}
        return [Cell("data", 64, **llama), Cell("tensor", 64, **llama), Cell("context", 64, 4, 4, 16)]
    llama = {"heads": 32, "kv_heads": 8, "head_dim": 64, "layers": 16, "intermediate": 8192, "vocabulary": 32000}
    return [
        Cell("data", 8192, **llama),
        Cell("tensor", 8192, **llama),
        Cell("context", 32768, 16, 16, 128),
        Cell("context", 32768, 32, 8, 128),
        Cell("context", 131072, 16, 16, 128),
    ]
