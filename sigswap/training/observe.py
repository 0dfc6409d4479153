"""Statistics of a converted model's attention, gathered while it runs as softmax: what calibration solves from.

While an :class:`Observer` is on, every converted module runs its forward under a mode that computes softmax and sigmoid
side by side at each attention call, adds to that site's sums, and hands the softmax's result on. So all layers see the
original model's inputs, and each sum's size is that of the site's parameters, whatever the number of batches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.conversion.mode import SwapMode, factors_of
from sigswap.conversion.state import AxisPlan, OwnerState, SiteState
from sigswap.functional.torch_functions import FAMILIES, SWAPS
from sigswap.kernels import MASKED_SCORE

MAX_TILE_SCORES = 1 << 22
"""Scores that are held at once where the model itself holds none, 16 MiB in float32 (one query row may need more)."""

Phase = Literal["norms", "logsumexp", "outputs", "channels"]


@dataclasses.dataclass
class SiteSums:
    """Sums over the rows of one site, in float64 on the site's device, by head. F features: w_h's, then c_h's.

    ``gram`` [H, F, F], ``moment`` [H, F]: the normal equations of minus the logsumexp (less b0) on the features.
    ``curvature`` [H, F, F], ``slope`` [H, F]: of half the squared output error (by Gauss and Newton), ``slope``
    downhill; ``weight`` [H]: the curvature along the bias of all rows. ``error`` and ``energy`` [H]: squared error of
    the sigmoid's outputs, and squared outputs of the softmax. ``rows`` [H].
    ``unexpressed`` [H]: probability mass that sigmoid(score - logsumexp) lacks, summed over the rows.
    ``query_fit``, ``key_fit``: (x . n, n . n) per channel of x and its QK-normed n, each [heads, head_dim].
    """

    gram: Any = 0.0
    moment: Any = 0.0
    slope: Any = 0.0
    curvature: Any = 0.0
    weight: Any = 0.0
    error: Any = 0.0
    energy: Any = 0.0
    rows: Any = 0.0
    unexpressed: Any = 0.0
    query_fit: Any = 0.0
    key_fit: Any = 0.0


@dataclasses.dataclass
class ChannelSums:
    """Sums over one owner's output y before LayerScale, and the softmax's output t, per channel: six of [C]."""

    sums: Any = 0.0  # [6, C]: 1, y, t, y y, y t, t t


class Observer:
    """What is gathered in one pass over the batches, by site and by owner. ``phase`` says what.

    "norms": the fit of QK-norm's weights; "logsumexp": the normal equations; "outputs": slope, curvature and error
    under the present parameters; "channels": :class:`ChannelSums`.
    """

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.sites: dict[SiteState, SiteSums] = {}
        self.owners: dict[OwnerState, ChannelSums] = {}
        self.recording = False  # the first of two runs of a batch, as softmax alone
        self.recorded: dict[Any, deque[Any]] = {}

    def run(self, owner: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The owner's forward as softmax, observed."""
        state: OwnerState = owner.sigswap  # type: ignore[assignment]
        if self.phase == "channels":
            return self._channels(owner, state, forward, args, kwargs)
        mode = _ObservingMode(state, self)
        with mode:
            output = forward(owner, *args, **kwargs)
        state.check_totals(mode.counts)
        return output

    def _channels(
        self, owner: nn.Module, state: OwnerState, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.recording:
            output = forward(owner, *args, **kwargs)
            self.recorded.setdefault(state, deque()).append(output)
            return output
        with SwapMode(state):
            output = forward(owner, *args, **kwargs)
        original: Any = self.recorded[state].popleft()
        if state.layer_scale is not None or state.norm is not None:
            y, t = (first_tensor(x).movedim(state.plan.channel_axis, -1).double() for x in (output, original))
            if state.norm is not None:
                y = F.layer_norm(y, y.shape[-1:], eps=state.norm.eps)
            y, t = y.flatten(0, -2), t.flatten(0, -2)
            sums = torch.stack([torch.ones_like(y), y, t, y * y, y * t, t * t]).sum(1)
            mine = self.owners.setdefault(state, ChannelSums())
            mine.sums = mine.sums + sums
        return original

    def sums(self, site: SiteState) -> SiteSums:
        return self.sites.setdefault(site, SiteSums())

    # One call of a site, in canonical form: rows of all heads.

    def norms(self, site: SiteState, query: Tensor, key: Tensor) -> None:
        """``query`` and ``key`` [heads, rows, head_dim], before QK-norm."""
        if site.query_norm is None or site.key_norm is None:
            return
        sums = self.sums(site)
        sums.query_fit = sums.query_fit + _fit(query, site.query_norm.kind)
        sums.key_fit = sums.key_fit + _fit(key, site.key_norm.kind)

    def rows(self, site: SiteState, query: Tensor | None, scores: Tensor, visible: Tensor, counted: Tensor) -> None:
        """``query`` [H, R, D] after QK-norm (or None), scores and ``visible`` [H, R, N], ``counted`` [H, R]."""
        sums = self.sums(site)
        n = visible.sum(-1)
        logsumexp = scores.masked_fill(~visible, -math.inf).logsumexp(-1)
        target = -logsumexp - site.const_bias + (n.clamp(min=1).log() if site.visible_bias else 0.0)
        target = target.double().masked_fill(~counted, 0.0)
        sums.rows = sums.rows + counted.double().sum(-1)
        x = _features(site, query, counted)
        if x is not None:
            sums.gram = sums.gram + x.mT @ x
            sums.moment = sums.moment + (x.mT @ target.unsqueeze(-1)).squeeze(-1)

    def outputs(
        self,
        site: SiteState,
        query: Tensor | None,
        counted: Tensor,
        products: Callable[[Tensor, Tensor], Tensor],
        softmax: Tensor,
        sigmoid: Tensor,
        derivative: Tensor,
    ) -> None:
        """Outputs under softmax and sigmoid, and the latter's derivative by the row's bias, any shape.

        ``products``: the products of two such tensors, summed by row, [H, R]. query and ``counted`` as for rows().
        """
        sums = self.sums(site)

        def by_row(x: Tensor, y: Tensor) -> Tensor:
            return products(x, y).double().masked_fill(~counted, 0.0)

        missing = softmax - sigmoid
        sums.error = sums.error + by_row(missing, missing).sum(-1)
        sums.energy = sums.energy + by_row(softmax, softmax).sum(-1)
        x = _features(site, query, counted)
        if x is not None:
            sums.slope = sums.slope + (x.mT @ by_row(missing, derivative).unsqueeze(-1)).squeeze(-1)
            weight = by_row(derivative, derivative)
            sums.curvature = sums.curvature + x.mT @ (x * weight.unsqueeze(-1))
            sums.weight = sums.weight + weight.sum(-1)

    def mass(self, site: SiteState, probabilities: Tensor, counted: Tensor) -> None:
        """Softmax ``probabilities`` [H, R, N]: sigmoid at minus the logsumexp gives p / (1 + p) for each p."""
        p = probabilities.masked_fill(~counted.unsqueeze(-1), 0.0)
        sums = self.sums(site)
        sums.unexpressed = sums.unexpressed + (p * p / (1 + p)).sum((-2, -1)).double()


def _features(site: SiteState, query: Tensor | None, counted: Tensor) -> Tensor | None:
    """What the bias of a row is linear in, [H, R, F] in float64, 0 in rows that are not ``counted``; None: nothing."""
    features = [query.double()] if site.query_weight is not None and query is not None else []
    if site.bias is not None:
        features.append(torch.ones_like(counted, dtype=torch.float64).unsqueeze(-1))
    return torch.cat(features, -1).masked_fill(~counted.unsqueeze(-1), 0.0) if features else None


def first_tensor(output: Any) -> Tensor:
    """An owner's output, or the first item of it."""
    while isinstance(output, tuple | list):
        output = output[0]
    return output


@contextmanager
def observed(states: Sequence[OwnerState], observer: Observer) -> Iterator[Observer]:
    """While it is open, the owners of ``states`` run under ``observer``."""
    for state in states:
        state.observer = observer
    try:
        yield observer
    finally:
        for state in states:
            del state.observer


def needs_recording(states: Sequence[OwnerState], phase: Phase) -> bool:
    """Whether each batch has to run as plain softmax first, since its outputs cannot be had beside the sigmoid's."""
    if phase == "channels":
        return True
    return phase in ("logsumexp", "outputs") and any(
        site.query_norm is not None and site.plan.product is not None for state in states for site in state.sites()
    )


def _fit(x: Tensor, kind: str) -> Tensor:
    x = x.double()
    norm = F.rms_norm if kind == "rms" else F.layer_norm
    normed = norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)
    return torch.stack([(x * normed).sum(-2), (normed * normed).sum(-2)])


class _ObservingMode(SwapMode):
    """Runs the planned calls as softmax, and tells the observer about them."""

    def __init__(self, state: OwnerState, observer: Observer) -> None:
        super().__init__(state)
        self.observer = observer
        self.query: Tensor | None = None  # the query of the product just made, head_dim last
        self.pending: _Pending | None = None  # a softmax whose product with the value has not come yet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pending = self.pending
        output = super().__torch_function__(func, types, args, kwargs)
        if pending is not None and pending is self.pending and FAMILIES.get(func) == "product":
            # Again without a tensor to write to, and without what baddbmm adds, which is no part of the attention.
            factors, product = factors_of(func, args, {k: v for k, v in kwargs.items() if k != "out"})
            product = torch.bmm if func.__name__.startswith("baddbmm") else product
            for index, factor in enumerate(factors):
                if pending.is_in(factor):
                    self.pending = None
                    attended = product(*factors) if product is torch.bmm else output
                    return self._output(pending, index, factors, product, attended, output)
        return output

    # A model that computes its own scores: product, softmax, product.

    def _product(self, site: SiteState, func: Any, args: Any, kwargs: Any) -> Tensor:
        plan = site.plan.product
        factors, _ = factors_of(func, args, kwargs)
        query, key = factors[plan.query_arg], factors[plan.key_arg]
        observer = self.observer
        if observer.phase == "norms":
            q, k = query / plan.query.scale, key / plan.key.scale
            observer.norms(
                site,
                _heads_first(q.movedim(plan.query.dim_axis, -1), plan.query, site.plan.heads),
                _heads_first(k.movedim(plan.key.dim_axis, -1), plan.key, site.plan.key_heads),
            )
        if observer.phase == "norms" or observer.recording:
            self.product_of = site
            return func(*args, **kwargs)
        if site.query_weight is not None:
            normed, _, _ = site.transformed_factors(query, key, plan)
            self.query = normed.movedim(plan.query.dim_axis, -1) / plan.query.scale
        return super()._product(site, func, args, kwargs)

    def _softmax(self, site: SiteState, args: Any, kwargs: Any) -> Tensor:
        scores = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim is None:
            dim = 0 if scores.dim() in (0, 1, 3) else 1
        dim %= scores.dim()
        bias = site.row_bias(scores, dim, self.query_bias)
        query, self.query, self.query_bias, self.product_of = self.query, None, None, None
        probabilities = F.softmax(*args, **kwargs)
        observer = self.observer
        if observer.phase == "norms":
            return probabilities
        pending = _Pending(site, probabilities, scores, dim, bias)
        self.pending = pending
        if observer.recording:
            return probabilities
        if query is not None:
            rows = [*scores.shape[:dim], *scores.shape[dim + 1 :]]
            pending.query = pending.by_head(query.reshape(*rows, query.shape[-1]).movedim(-1, dim))
        if observer.phase == "logsumexp":
            visible = pending.by_head(pending.visible)
            observer.rows(site, pending.query, pending.by_head(pending.wide), visible, pending.counted_rows())
        return probabilities

    def _output(
        self,
        pending: _Pending,
        index: int,
        factors: Any,
        product: Callable[[Tensor, Tensor], Tensor],
        attended: Tensor,
        output: Tensor,
    ) -> Tensor:
        """factors[index]: the probabilities; attended: ``product`` of the factors; output: what the model gets."""
        observer, key = self.observer, (pending.site, "output")
        if observer.recording:
            observer.recorded.setdefault(key, deque()).append((attended, output))
            observer.mass(pending.site, pending.by_head(pending.softmax()), pending.counted_rows())
            return output
        if key in observer.recorded:
            attended, output = observer.recorded[key].popleft()
        else:
            observer.mass(pending.site, pending.by_head(pending.softmax()), pending.counted_rows())

        def with_value(p: Tensor, value: Tensor) -> Tensor:
            factor = p.to(value.dtype).reshape(factors[index].shape)
            return product(*((factor, value) if index == 0 else (value, factor)))

        # The row of each element of the output, whatever its layout: the product of the row's number at the first key
        # and a value of ones; in float64, which is exact, and which autocast leaves alone.
        ones = torch.ones_like(factors[1 - index], dtype=torch.float64)
        rows = torch.arange(pending.counted.numel(), dtype=torch.float64, device=ones.device)
        if not (with_value(pending.at_first_key(torch.ones_like(rows)), ones) == 1).all():
            return output  # a sum over several rows, such as one over the heads: it shows no head's output
        row = with_value(pending.at_first_key(rows), ones).round().long().flatten()

        def products(x: Tensor, y: Tensor) -> Tensor:
            sums = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
            sums.index_add_(0, row, (x * y).flatten().double())
            return pending.by_head(sums.view(pending.counted.shape)).squeeze(-1)

        p, value = pending.sigmoid(), factors[1 - index]
        results = attended.float(), with_value(p, value).float(), with_value(p * (1 - p), value).float()
        observer.outputs(pending.site, pending.query, pending.counted_rows(), products, *results)
        return output

    # torch's own attention.

    def _sdpa(
        self,
        site: SiteState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        self._attention(site, query, key, value, attn_mask, is_causal, scale)
        return output

    def _whole(self, site: SiteState, func: Any, args: Any, kwargs: Any) -> Any:
        return SWAPS[func].stand_in(functools.partial(self._heads, site), *args, **kwargs)

    def _heads(
        self,
        site: SiteState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        is_causal: bool,
        dropout_p: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
        self._attention(site, query, key, value, attn_mask, is_causal, None)
        weights = None
        if need_weights:
            scores = query @ key.mT * query.shape[-1] ** -0.5
            if attn_mask is not None:
                masked = attn_mask.dtype == torch.bool
                scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
            weights = scores.softmax(-1)
        return output, weights

    def _attention(
        self,
        site: SiteState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        observer = self.observer
        if observer.recording:
            return  # softmax is at hand in the second run as well
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if type(attn_mask).__name__ == "CausalBias":
            is_causal = attn_mask.variant.name == "UPPER_LEFT"
            attn_mask = None if is_causal else torch.ones(
                query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
            ).tril(key.shape[-2] - query.shape[-2])  # fmt: skip

        normed_query, normed_key = query, key
        if observer.phase != "norms":
            normed_query, normed_key = site.normalized(query, key)
        layout = _Layout(site, query)
        if is_causal and layout.packed:  # the order is that of the rows as they lie, with the heads among them
            visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            is_causal, attn_mask = False, visible
        q, k, v, normed_q, normed_k = layout.canonical(query, key, value, normed_query, normed_key)
        if observer.phase == "norms":
            observer.norms(site, _rows(q), _rows(k[:, :: k.shape[1] // site.plan.key_heads]))
            return
        k, v, normed_k = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v, normed_k))
        mask = None
        if attn_mask is not None:
            mask = layout.query_side(attn_mask.expand(*query.shape[:-1], key.shape[-2]))
        batch, heads, length, _ = q.shape
        own = None if mask is None or mask.shape[2] != mask.shape[3] else _seen(mask.diagonal(dim1=2, dim2=3))
        step = max(1, MAX_TILE_SCORES // max(1, batch * heads * k.shape[2]))
        with torch.autocast(query.device.type, enabled=False):
            for start in range(0, length, step):
                rows = slice(start, min(start + step, length))
                cut = [None if x is None else x[:, :, rows] for x in (q, normed_q, mask, own)]
                self._tile(site, _Tile(*cut, k, normed_k, v, start, is_causal, scale))  # type: ignore[arg-type]

    def _tile(self, site: SiteState, tile: _Tile) -> None:
        observer = self.observer
        plain, visible = tile.scores(tile.query, tile.key)
        normed = plain if site.query_norm is None else tile.scores(tile.normed_query, tile.normed_key)[0]
        counted = tile.counted(visible)
        if observer.phase == "logsumexp":
            observer.rows(site, _rows(tile.normed_query), _rows(normed), _rows(visible), _rows(counted))
        softmax = plain.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
        bias = torch.zeros((), device=normed.device)
        if site.bias is not None:
            bias = bias + site.bias.to(normed.dtype).view(1, -1, 1, 1)
        if site.query_weight is not None:
            weight = site.query_weight.to(normed.dtype)[None, :, None]
            bias = bias + (tile.normed_query.to(normed.dtype) * weight).sum(-1, keepdim=True)
        sigmoid = _sigmoid(site, normed, visible, -1, bias)
        value = tile.value.to(normed.dtype)
        results = softmax @ value, sigmoid @ value, (sigmoid * (1 - sigmoid)) @ value
        observer.outputs(
            site, _rows(tile.normed_query), _rows(counted), lambda x, y: _rows((x * y).double().sum(-1)), *results
        )
        observer.mass(site, _rows(softmax), _rows(counted))


@dataclasses.dataclass(frozen=True)
class _Tile:
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

    def scores(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and whether they are visible, [B, H, m, N], in float32 at least."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = query.to(wide) @ key.to(wide).mT * self.scale
        visible = torch.ones_like(scores, dtype=torch.bool)
        if self.is_causal:
            visible = visible.tril(self.start)
        if self.mask is not None:
            visible = visible & _seen(self.mask)
            if self.mask.dtype != torch.bool:
                scores = scores + self.mask.to(wide)
        return scores, visible

    def counted(self, visible: Tensor) -> Tensor:
        """[B, H, m]: the rows that are no padding. A padded position is a key that no row sees, nor its own one."""
        sees = visible.any(-1)
        return sees if self.own is None else sees & self.own


class _Layout:
    """Brings what scaled_dot_product_attention got to [batch, heads, length, head_dim]."""

    def __init__(self, site: SiteState, query: Tensor) -> None:
        head_axis = site.plan.sdpa_head_axis
        self.heads, self.axis, self.merged, self.outer = (
            site.plan.heads,
            head_axis.axis,
            head_axis.merged,
            head_axis.outer,
        )
        self.packed = self.merged and self.axis == -2  # the query's heads are among its rows; the key has one for all
        self.others = query.shape[self.axis] // self.heads if self.merged and self.axis is not None else 0

    def canonical(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first and fourth are queries, the others keys and values."""
        moved = [self._heads_third(x, query=index in (0, 3)) for index, x in enumerate(tensors)]
        leading = torch.broadcast_shapes(*(x.shape[:-3] for x in moved))
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
        return x.unflatten(2, (self.heads // x.shape[1], -1)).flatten(1, 2)


class _Pending:
    """The softmax of a model that computes its own scores, until the product with the value shows its output."""

    def __init__(self, site: SiteState, probabilities: Tensor, scores: Tensor, dim: int, bias: Tensor | None) -> None:
        self.site, self.probabilities, self.dim, self.bias = site, probabilities, dim, bias
        self.wide = scores if scores.dtype == torch.float64 else scores.float()
        self.visible = ~(scores <= MASKED_SCORE)  # NaN is not masked, but an error
        axis = site.plan.head_axis.axis
        self.head_axis = None if axis is None else axis % scores.dim()
        self.counted = self.visible.any(dim, keepdim=True) & self._own()
        self.query: Tensor | None = None  # [heads, rows, head_dim], where w_h needs it

    def _own(self) -> Tensor:
        """Whether each row sees its own position (see _Tile.counted), in the shape of ``counted``; or True."""
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
            x = x.unflatten(rows, (plan.heads, -1) if plan.head_axis.outer else (-1, plan.heads))
            keys, rows = keys + (keys > rows), rows + plan.head_axis.outer
        if rows == keys or x.shape[rows] != x.shape[keys]:
            return torch.ones((), dtype=torch.bool, device=x.device)
        own = x.diagonal(dim1=rows, dim2=keys).movedim(-1, rows - (keys < rows))
        return own.reshape(*self.visible.shape[: self.dim], 1, *self.visible.shape[self.dim + 1 :])

    def is_in(self, factor: Tensor) -> bool:
        """Whether ``factor`` holds the probabilities, in whatever shape and dtype."""
        p = self.probabilities
        return factor.numel() == p.numel() and (factor is p or torch.equal(factor.reshape(p.shape), p.to(factor.dtype)))

    def softmax(self) -> Tensor:
        return self.probabilities.to(self.wide.dtype).nan_to_num(0.0)

    def sigmoid(self) -> Tensor:
        return _sigmoid(self.site, self.wide, self.visible, self.dim, self.bias)

    def by_head(self, x: Tensor) -> Tensor:
        """``x``, of the scores' layout but for its size along the keys, as [heads, rows, that size]."""
        heads, axis = self.site.plan.heads, self.head_axis
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


def _seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else ~(mask <= MASKED_SCORE)


def _sigmoid(site: SiteState, scores: Tensor, visible: Tensor, dim: int, bias: Tensor | None) -> Tensor:
    """The probabilities of DESIGN's definition, in scores' dtype."""
    x = scores.masked_fill(~visible, 0.0) + site.const_bias
    if site.visible_bias:
        x = x - visible.sum(dim, keepdim=True).clamp(min=1).log()
    if bias is not None:
        x = x + bias
    return x.sigmoid().masked_fill(~visible, 0.0)


def _rows(x: Tensor) -> Tensor:
    """[B, H, M, ...] as [H, B * M, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


def _heads_first(x: Tensor, axes: AxisPlan, heads: int) -> Tensor:
    """A factor with head_dim last as [heads, rows, head_dim]; repeated key heads are taken once each."""
    layout = axes.head_axis
    if layout.axis is None or heads == 1:
        return x.reshape(1, -1, x.shape[-1])
    # The axis counts from the end of the factor as it was, in which head_dim was at dim_axis.
    axis = layout.axis if layout.axis < axes.dim_axis else layout.axis - 1
    if not layout.merged and x.shape[axis] != heads:
        x = x.unflatten(axis, (heads, -1)).select(axis, 0)
    x = _heads_out(x, axis, heads, layout.outer) if layout.merged else x.movedim(axis, 0)
    return x.reshape(heads, -1, x.shape[-1])


def _heads_out(x: Tensor, axis: int, heads: int, outer: bool) -> Tensor:
    """``x``, whose ``axis`` holds heads and something else, as [heads, ...]."""
    axis %= x.dim()
    x = x.unflatten(axis, (heads, -1) if outer else (-1, heads))
    return x.movedim(axis if outer else axis + 1, 0)
