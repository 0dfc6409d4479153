"""One attention call by heads and rows, whatever its layout: its scores, what is visible, and which rows count."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sigswap.conversion.state import AxisPlan, RowBias, SiteState
from sigswap.functional.attention import probabilities
from sigswap.functional.stand_ins import of_keys
from sigswap.kernels import MASKED_SCORE
from sigswap.kernels.reference import seen_by
from sigswap.training.sums import Rows

# torch leaves these untyped.
_broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes
_unflatten: Callable[[Tensor, int, tuple[int, int]], Tensor] = Tensor.unflatten


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some query rows of one call: query [B, H, m, D], key and value [B, H, N, ...], mask [B, H, m, N].

    ``own`` [B, H, m]: whether row i sees key i (None: there is no mask, or the lengths differ). ``start``: the
    first row.
    """

    query: Tensor
    normed_query: Tensor
    mask: Tensor | None
    own: Tensor | None
    key: Tensor
    normed_key: Tensor
    value: Tensor
    start: int
    is_causal: bool
    scale: float
    modify: Callable[[Tensor, int], Tensor] | None = None  # of the scaled scores and the first row, as flex's score_mod

    def scores(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and whether they are visible, [B, H, m, N], in float32 at least."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = query.to(wide) @ key.to(wide).mT * self.scale
        if self.modify is not None:
            scores = self.modify(scores, self.start)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if self.is_causal:
            visible = visible.tril(self.start)
        if self.mask is not None:
            visible = visible & seen_by(self.mask)
            if self.mask.dtype != torch.bool:
                scores = scores + self.mask.to(wide)
        return scores, visible

    def counted(self, visible: Tensor) -> Tensor:
        """[B, H, m]: the rows that are no padding. A padded position is a key that no row sees, nor its own one."""
        sees = visible.any(-1)
        return sees if self.own is None else sees & self.own


class Layout:
    """Brings what scaled_dot_product_attention got to [batch, heads, length, head_dim]. ``heads``: of this rank."""

    def __init__(self, site: SiteState, query: Tensor, heads: int) -> None:
        head_axis = site.plan.sdpa_head_axis
        self.heads, self.axis, self.merged, self.outer = (
            heads,
            head_axis.axis,
            head_axis.merged,
            head_axis.outer,
        )
        self.packed = self.merged and self.axis == -2  # the query's heads are among its rows; the key has one for all
        self.others = query.shape[self.axis] // self.heads if self.merged and self.axis is not None else 0

    def canonical(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first and fourth are queries, the others keys and values."""
        moved = [self._heads_third(x, query=index in (0, 3)) for index, x in enumerate(tensors)]
        leading = _broadcast_shapes(*(x.shape[:-3] for x in moved))
        flat = [x.expand(*leading, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in moved]
        return tuple(self._unpacked(x) if index in (0, 3) else x for index, x in enumerate(flat))

    def query_side(self, mask: Tensor) -> Tensor:
        moved = self._heads_third(mask, query=True)
        return self._unpacked(moved.reshape(-1, *moved.shape[-3:]))

    def _heads_third(self, x: Tensor, *, query: bool) -> Tensor:
        if self.axis is None or (self.packed and not query) or (x.dim() < 3 and not self.packed):
            return x.unsqueeze(-3)
        if not self.merged:
            return x.movedim(self.axis, -3)
        return _heads_out(x, self.axis, x.shape[self.axis] // self.others, self.outer).movedim(0, -3)

    def _unpacked(self, x: Tensor) -> Tensor:
        """Grouped query heads that are held as further rows of fewer heads, as heads."""
        if x.shape[1] == self.heads:
            return x
        return _unflatten(x, 2, (self.heads // x.shape[1], -1)).flatten(1, 2)


class PendingSoftmax:
    """The softmax of a model that computes its own scores, until the product with the value shows its output.

    ``heads``: of this rank.
    """

    def __init__(self, site: SiteState, probs: Tensor, scores: Tensor, dim: int, bias: RowBias, heads: int) -> None:
        self.site, self.probabilities, self.dim, self.bias, self.heads = site, probs, dim, bias, heads
        self.whole = scores if scores.dtype == torch.float64 else scores.float()
        self.wide = of_keys(self.whole, dim, site.plan.extra)
        self.visible = ~(self.wide <= MASKED_SCORE)  # NaN is not masked, but an error
        axis = site.plan.head_axis.axis
        self.head_axis = None if axis is None else axis % scores.dim()
        self.counted = self.visible.any(dim, keepdim=True) & self._own()
        self.query: Tensor | None = None  # [heads, rows, head_dim], where w_h needs it
        self.order: tuple[int, ...] | None = None  # of their axes in the product with the value, if that is another

    def _own(self) -> Tensor:
        """Whether each row sees its own position (see Tile.counted), in the shape of ``counted``; or True."""
        plan, x, keys = self.site.plan, self.visible, self.dim
        rows = plan.row_axis
        if rows is None and keys == x.dim() - 1 and x.dim() > 1:
            rows = -2
        if rows is None:
            return torch.ones((), dtype=torch.bool, device=x.device)
        rows %= x.dim()
        if rows == self.head_axis:
            if not plan.head_axis.merged:
                return torch.ones((), dtype=torch.bool, device=x.device)
            x = _unflatten(x, rows, (self.heads, -1) if plan.head_axis.outer else (-1, self.heads))
            keys, rows = keys + (keys > rows), rows + plan.head_axis.outer
        if rows == keys or x.shape[rows] != x.shape[keys]:
            return torch.ones((), dtype=torch.bool, device=x.device)
        own: Tensor = x.diagonal(dim1=rows, dim2=keys).movedim(-1, rows - (keys < rows))
        return own.reshape(*self.visible.shape[: self.dim], 1, *self.visible.shape[self.dim + 1 :])

    def is_in(self, factor: Tensor) -> bool:
        """Whether ``factor`` holds the probabilities, in whatever shape and dtype, or with axes in another order."""
        p = self.probabilities
        if factor is p:
            return True
        if factor.numel() != p.numel():
            return False
        cast = p.to(factor.dtype)
        if torch.equal(factor.reshape(p.shape), cast):
            return True
        for order in itertools.permutations(range(p.dim())):
            moved = cast.permute(order)
            if moved.shape == factor.shape and torch.equal(moved, factor):
                self.order = order
                return True
        return False

    def as_factor(self, x: Tensor, factor: Tensor) -> Tensor:
        """``x``, of the scores' shape, in the shape in which ``factor`` holds the probabilities."""
        return (x if self.order is None else x.permute(self.order)).reshape(factor.shape)

    def softmax(self) -> Tensor:
        return self.probabilities.to(self.wide.dtype).nan_to_num(0.0)

    def weights(self) -> Weights:
        return weights_of(self.site, self.wide, self.visible, self.dim, self.bias)

    def rows(self) -> Rows:
        count = self.visible.sum(self.dim, keepdim=True)
        first = first_of(self.wide, self.visible, self.dim)
        return Rows(self.query, self.counted_rows(), self.by_head(count).squeeze(-1), self.by_head(first).squeeze(-1))

    def logsumexp(self) -> Tensor:
        """[heads, rows], of the whole row, with attention sinks."""
        masked = self.whole.masked_fill(self.whole <= MASKED_SCORE, -torch.inf)
        return self.by_head(masked.logsumexp(self.dim, keepdim=True)).squeeze(-1)

    def by_head(self, x: Tensor) -> Tensor:
        """``x``, of the scores' layout but for its size along the keys, as [heads, rows, that size]."""
        heads, axis = self.heads, self.head_axis
        x = x.movedim(self.dim, -1)
        if axis is None or heads == 1:
            return x.reshape(1, -1, x.shape[-1])
        axis = axis if axis < self.dim else axis - 1
        layout = self.site.plan.head_axis
        x = _heads_out(x, axis, heads, layout.outer) if layout.merged else x.movedim(axis, 0)
        return x.reshape(heads, -1, x.shape[-1])

    def counted_rows(self) -> Tensor:
        return self.by_head(self.counted).squeeze(-1)

    def at_first_key(self, values: Tensor) -> Tensor:
        """Of the scores' shape: at each row's first key one of ``values`` [rows], in the scores' order, else 0."""
        placed = torch.zeros(self.wide.shape, dtype=values.dtype, device=values.device)
        placed.narrow(self.dim, 0, 1).copy_(values.view(self.counted.shape))
        return placed


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the values are multiplied by under the present parameters, in the scores' shape: ``p`` after the row cap,
    and its ``derivative`` by the row's bias. ``sums``: of each row's sigmoids, with size 1 along the keys."""

    p: Tensor
    derivative: Tensor
    sums: Tensor


def weights_of(site: SiteState, scores: Tensor, visible: Tensor, dim: int, bias: RowBias) -> Weights:
    """The definition of sigmoid attention, and its derivative."""
    masked = scores.masked_fill(~visible, -torch.inf)
    p = probabilities(masked, dim, **bias, visible_bias=site.visible_bias, const_bias=site.const_bias)
    sums, slope = p.sum(dim, keepdim=True), p * (1 - p)
    if site.row_cap is None:
        return Weights(p, slope, sums)
    divisor = sums.clamp(min=site.row_cap)
    capped = p / divisor
    moving = slope.sum(dim, keepdim=True) * (sums > site.row_cap)
    return Weights(capped, (slope - capped * moving) / divisor, sums)


def first_of(scores: Tensor, visible: Tensor, dim: int) -> Tensor:
    """The score of the first visible key along ``dim``, with size 1 there; 0 in rows without any."""
    first = visible.to(torch.uint8).argmax(dim, keepdim=True)
    return scores.gather(dim, first).masked_fill(~visible.gather(dim, first), 0.0)


def rows_of(x: Tensor) -> Tensor:
    """[B, H, M, ...] as [H, B * M, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


def heads_first(x: Tensor, axes: AxisPlan, heads: int) -> Tensor:
    """A factor with head_dim last as [heads, rows, head_dim]; repeated key heads are taken once each."""
    layout = axes.head_axis
    if layout.axis is None or heads == 1:
        return x.reshape(1, -1, x.shape[-1])
    # The axis counts from the end of the factor as it was, in which head_dim was at dim_axis.
    axis = layout.axis if layout.axis < axes.dim_axis else layout.axis - 1
    if not layout.merged and x.shape[axis] != heads:
        x = _unflatten(x, axis, (heads, -1)).select(axis, 0)
    x = _heads_out(x, axis, heads, layout.outer) if layout.merged else x.movedim(axis, 0)
    return x.reshape(heads, -1, x.shape[-1])


def _heads_out(x: Tensor, axis: int, heads: int, outer: bool) -> Tensor:
    """``x``, whose ``axis`` holds heads and something else, as [heads, ...]."""
    axis %= x.dim()
    x = _unflatten(x, axis, (heads, -1) if outer else (-1, heads))
    return x.movedim(axis if outer else axis + 1, 0)
