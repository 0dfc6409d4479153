"""What an attention is handed, whoever runs it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Of one attention, of this rank's part, as the op takes them. ``share``, ``rest``: of a first token's bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    attn_mask: Tensor | None
    share: Tensor | None = None
    rest: Tensor | None = None
