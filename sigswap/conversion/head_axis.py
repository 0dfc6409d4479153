"""Where the heads of a tensor are, and how values per head are laid along them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from sigswap.errors import Hint, UnknownCallError
from sigswap.passes.site import HeadLayout

Unmerged = Literal["exact", "group", "pack"]
"""What an axis of heads alone may hold: the heads ("exact"); each key head repeated for the query heads that share it
("group"); or, of a query of one token, the key heads with the query heads of each as rows of the next axis ("pack": so
transformers decodes with grouped-query attention)."""


def of_this_rank(values: Tensor, like: Tensor) -> Tensor:
    """What of ``values`` per head stands for the heads of ``like``: of a DTensor beside a plain tensor, its shard."""
    if hasattr(values, "to_local") and not hasattr(like, "to_local"):
        shard: Tensor = values.to_local()
        return shard
    return values


@dataclasses.dataclass(frozen=True)
class HeadAxis:
    """The axis of the heads, counted from the end; None: one head, which has no axis.

    ``merged``: the axis holds the batch or the rows as well, heads inner (batch*heads) or, if ``outer``, outermost
    (heads*batch).
    """

    axis: int | None
    merged: bool = False
    outer: bool = False

    @classmethod
    def of(cls, layout: HeadLayout, rank: int) -> HeadAxis:
        """That of a tensor with ``rank`` axes, which ``layout`` counts from 0."""
        return cls(None if layout.axis is None else layout.axis - rank, layout.merged, layout.outer)

    def spread(
        self, values: Tensor, like: Tensor, *, dim_axis: int | None = None, unmerged: Unmerged = "exact"
    ) -> Tensor:
        """``values`` [heads], or [heads, head_dim] where ``dim_axis`` is head_dim's, shaped to broadcast over ``like``.

        Values that are sharded over the ranks of tensor parallelism are taken for the heads of this rank.

        Raises UnknownCallError if ``like`` has another number of heads, in a form that ``unmerged`` does not allow, or
        another head_dim.
        """
        values = of_this_rank(values, like)
        heads = values.shape[0]
        axis = self.axis
        if like.dim() < -min(axis or 0, dim_axis or 0):
            raise UnknownCallError(
                f"an attention whose heads were on axis {axis} has the shape {list(like.shape)} now."
            )
        if dim_axis is not None and like.shape[dim_axis] != values.shape[-1]:
            raise UnknownCallError(
                f"an attention that had a head_dim of {values.shape[-1]} on axis {dim_axis} when it was converted has "
                f"the shape {list(like.shape)} now."
            )
        if heads == 1:
            axis = None
            values = values[0]
        shape = [1] * like.dim()
        if dim_axis is not None:
            shape[dim_axis] = values.shape[-1]
        if axis is None:
            return values.reshape(shape)
        size = like.shape[axis]
        shape[axis] = size
        if self.merged and size % heads == 0:
            others = size // heads
            tiles = [others, *[1] * (values.dim() - 1)]
            values = values.repeat_interleave(others, dim=0) if self.outer else values.repeat(tiles)
        elif not self.merged and size == heads:
            pass
        elif not self.merged and unmerged == "group" and size % heads == 0:
            values = values.repeat_interleave(size // heads, dim=0)
        elif self._is_packed(like, heads, unmerged):
            rows = like.shape[axis + 1]
            shape[axis + 1] = rows
            values = values.repeat_interleave(rows * size // heads, dim=0)
        else:
            raise self.other_heads(heads, size)
        if dim_axis is not None and dim_axis % like.dim() < axis % like.dim():
            values = values.transpose(0, 1)
        return values.reshape(shape)

    @staticmethod
    def other_heads(heads: int, now: int) -> UnknownCallError:
        """The error for a call with ``now`` heads of ``heads``."""
        return UnknownCallError(
            f"an attention that had {heads} heads when it was converted has {now} now.",
            hint=Hint(
                "Convert the model after its heads were pruned; if they are spread over devices by tensor parallelism, "
                "call sigswap.shard_heads(model) after it."
            ),
        )

    def _is_packed(self, like: Tensor, heads: int, unmerged: Unmerged) -> bool:
        if self.merged or self.axis is None or unmerged != "pack":
            return False
        size, rows = like.shape[self.axis], like.shape[self.axis + 1]
        return size * rows == heads

    # In saved models, and in pickles of version 0.1, the three stand among the fields of the plan that has them.

    def to_fields(self, prefix: str = "") -> dict[str, Any]:
        """As fields of a plan; ``prefix`` tells two of one plan apart."""
        return {f"{prefix}head_axis": self.axis, f"{prefix}merged": self.merged, f"{prefix}outer": self.outer}

    @staticmethod
    def from_fields(fields: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
        """``fields`` with one HeadAxis for the three of each prefix."""
        data = dict(fields)
        for prefix in prefixes:
            names = (f"{prefix}head_axis", f"{prefix}merged", f"{prefix}outer")
            data[names[0]] = HeadAxis(*(data.pop(name) for name in names))
        return data


ONE_HEAD = HeadAxis(None)
SDPA_HEADS = HeadAxis(-3)
"""Of a query [..., heads, rows, head_dim]."""
