"""Statistics of a converted model's attention, gathered while it runs as softmax: what calibration solves from.

While an :class:`Observer` is on, every converted module runs its forward under a mode that computes softmax and sigmoid
side by side at each attention call, adds to that site's sums, and hands the softmax's result on. So all layers see the
original model's inputs, and each sum's size is that of the site's parameters, whatever the number of batches.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from sigswap.conversion.mode import SwapMode, factors_of, scores_of
from sigswap.conversion.state import OwnerState, SiteState
from sigswap.conversion.switches import run_under
from sigswap.errors import CalibrationError, Hint
from sigswap.functional import flex
from sigswap.functional.stand_ins import logarithm, of_keys
from sigswap.functional.torch_functions import FAMILIES, SWAPS
from sigswap.kernels.reference import seen_by
from sigswap.training.rows import Layout, PendingSoftmax, Tile, first_of, heads_first, rows_of, weights_of
from sigswap.training.sums import ChannelSums, Rows, SiteSums

MAX_TILE_SCORES, MAX_TILE_SCORES_ON_GPUS = 1 << 22, 1 << 25
"""Scores that are held at once where the model itself holds none, 16 MiB in float32 (one query row may need more), and
128 MiB where a tile's some sixty kernels would otherwise be too short to keep a GPU busy."""

Phase = Literal["norms", "logsumexp", "outputs", "channels"]


class Observer:
    """What is gathered in one pass over the batches, by site and by owner. ``phase`` says what.

    "norms": the fit of QK-norm's weights; "logsumexp": the normal equations; "outputs": slope, curvature and error
    under the present parameters; "channels": :class:`ChannelSums`.
    """

    def __init__(self, phase: Phase, among: Mapping[SiteState, int] | None = None) -> None:
        """``among``: how many ranks the heads of a site are divided among, where these are several."""
        self.phase = phase
        self.among = {} if among is None else among
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
        with mode, mode.uncompiled():
            output = forward(owner, *args, **kwargs)
        mode.check_whole()
        state.check_totals(mode.counts)
        state.check_turns(mode.turns)
        return output

    def _channels(
        self, owner: nn.Module, state: OwnerState, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.recording:
            output = forward(owner, *args, **kwargs)
            self.recorded.setdefault(state, deque()).append(output)
            return output
        mode = SwapMode(state)
        with mode, mode.uncompiled():
            output = forward(owner, *args, **kwargs)
        original: Any = self.recorded[state].popleft()
        if state.layer_scale is not None or state.norm is not None:
            self.owners.setdefault(state, ChannelSums()).add(state, output, original)
        return original

    def heads(self, site: SiteState) -> int:
        """Of the query, on this rank."""
        return site.plan.heads // self.among.get(site, 1)

    def key_heads(self, site: SiteState) -> int:
        return site.plan.key_heads // self.among.get(site, 1)

    def sums(self, site: SiteState) -> SiteSums:
        return self.sites.setdefault(site, SiteSums(site))


@contextmanager
def observed(states: Sequence[OwnerState], observer: Observer) -> Iterator[Observer]:
    """While it is open, the owners of ``states`` run under ``observer``."""
    with run_under(dict.fromkeys(states, observer)):
        yield observer


def needs_recording(states: Sequence[OwnerState], phase: Phase) -> bool:
    """Whether each batch has to run as plain softmax first, since its outputs cannot be had beside the sigmoid's."""
    if phase == "channels":
        return True
    return phase in ("logsumexp", "outputs") and any(
        site.query_norm is not None and site.plan.product is not None for state in states for site in state.sites()
    )


class _ObservingMode(SwapMode):
    """Runs the planned calls as softmax, and tells the observer about them."""

    def __init__(self, state: OwnerState, observer: Observer) -> None:
        super().__init__(state)
        self.observer = observer
        self.query: Tensor | None = None  # the query of the product just made, head_dim last
        self.pending: PendingSoftmax | None = None  # a softmax whose product with the value has not come yet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pending = self.pending
        output = super().__torch_function__(func, types, args, kwargs)
        if pending is not None and pending is self.pending and _is_product_of_two(func, args):
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
        plan = site.product
        factors, _ = factors_of(func, args, kwargs)
        query, key = factors[plan.query_arg], factors[plan.key_arg]
        observer = self.observer
        if observer.phase == "norms":
            q, k = query / plan.query.scale, key / plan.key.scale
            observer.sums(site).add_norms(
                heads_first(q.movedim(plan.query.dim_axis, -1), plan.query, observer.heads(site)),
                heads_first(k.movedim(plan.key.dim_axis, -1), plan.key, observer.key_heads(site)),
            )
        if observer.phase == "norms" or observer.recording:
            self.product_of = site
            product: Tensor = func(*args, **kwargs)
            return product
        if site.query_weight is not None:
            normed, _, _ = site.transformed_factors(query, key, plan)
            self.query = plan.ordered(normed.movedim(plan.query.dim_axis, -1) / plan.query.scale)
        return super()._product(site, func, args, kwargs)

    def _softmax(self, site: SiteState, args: Any, kwargs: Any) -> Tensor:
        scores, dim = scores_of(args, kwargs)
        self._refuse_mapped(scores)
        bias = site.row_bias(scores, dim, self.query_bias)
        query, self.query, self.query_bias, self.product_of = self.query, None, None, None
        probabilities = F.softmax(*args, **kwargs)
        observer = self.observer
        if observer.phase == "norms":
            return probabilities
        kept = of_keys(probabilities, dim, site.plan.extra)
        pending = PendingSoftmax(site, kept, scores, dim, bias, observer.heads(site))
        self.pending = pending
        if self.by_logarithm:
            pending.probabilities = logarithm(kept).exp()  # as the model gets them
        if observer.recording:
            return probabilities
        if query is not None:
            rows = [*scores.shape[:dim], *scores.shape[dim + 1 :]]
            pending.query = pending.by_head(query.reshape(*rows, query.shape[-1]).movedim(-1, dim))
        if observer.phase == "logsumexp":
            observer.sums(site).add_rows(pending.rows(), pending.logsumexp())
        return probabilities

    def _output(
        self,
        pending: PendingSoftmax,
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
            observer.sums(pending.site).add_mass(pending.by_head(pending.softmax()), pending.counted_rows())
            return output
        if key in observer.recorded:
            attended, output = observer.recorded[key].popleft()
        else:
            observer.sums(pending.site).add_mass(pending.by_head(pending.softmax()), pending.counted_rows())

        def with_value(p: Tensor, value: Tensor) -> Tensor:
            factor = pending.as_factor(p.to(value.dtype), factors[index])
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

        weights, value = pending.weights(), factors[1 - index]
        by_p, by_derivative = with_value(weights.p, value).float(), with_value(weights.derivative, value).float()
        sums = pending.by_head(weights.sums).squeeze(-1)
        observer.sums(pending.site).add_outputs(pending.rows(), products, attended.float(), by_p, by_derivative, sums)
        return output

    def _refuse_mapped(self, scores: Tensor) -> None:
        if is_batchedtensor(scores):
            raise CalibrationError(
                f"{self.state.plan.path or 'the model'} runs its attention inside torch.vmap, where it cannot be "
                "observed, so it cannot be calibrated.",
                hint=Hint("Exclude it from the conversion, or write its attention over all axes at once."),
            )

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
        self._refuse_mapped(query)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        self._attention(site, query, key, value, attn_mask, is_causal, scale)
        return output

    def _flex(
        self,
        site: SiteState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any,
        block_mask: Any,
        scale: float,
        kernel_options: Any,
        score_buffers: tuple[Any, ...] = (),
        mask_buffers: tuple[Any, ...] = (),
    ) -> Any:
        arguments = score_mod, block_mask, scale, kernel_options, score_buffers, mask_buffers
        output = torch.ops.higher_order.flex_attention(query, key, value, *arguments)
        visible = flex.visible_keys(query, key, block_mask[-1], mask_buffers)
        modify = (
            None if flex.is_identity(score_mod) else functools.partial(flex.modified_score, score_mod, score_buffers)
        )
        self._attention(site, query, key, value, visible, False, scale, modify)
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
        modify: Callable[[Tensor, int], Tensor] | None = None,
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
        layout = Layout(site, query, observer.heads(site))
        if is_causal and layout.packed:  # the order is that of the rows as they lie, with the heads among them
            visible = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
            is_causal, attn_mask = False, visible
        q, k, v, normed_q, normed_k = layout.canonical(query, key, value, normed_query, normed_key)
        if observer.phase == "norms":
            observer.sums(site).add_norms(rows_of(q), rows_of(k[:, :: k.shape[1] // observer.key_heads(site)]))
            return
        k, v, normed_k = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v, normed_k))
        mask = None
        if attn_mask is not None:
            mask = layout.query_side(attn_mask.expand(*query.shape[:-1], key.shape[-2]))
        batch, heads, length, _ = q.shape
        own = None if mask is None or mask.shape[2] != mask.shape[3] else seen_by(mask.diagonal(dim1=2, dim2=3))
        most = MAX_TILE_SCORES if q.device.type == "cpu" else MAX_TILE_SCORES_ON_GPUS
        step = max(1, most // max(1, batch * heads * k.shape[2]))
        with torch.autocast(query.device.type, enabled=False):
            for start in range(0, length, step):
                rows = slice(start, min(start + step, length))
                keys = slice(rows.stop if is_causal else None)  # no row of the tile sees those behind
                cut_mask, cut_own = (None if x is None else x[:, :, rows] for x in (mask, own))
                if cut_mask is not None:
                    cut_mask = cut_mask[..., keys]
                queries = q[:, :, rows], normed_q[:, :, rows]
                others = k[:, :, keys], normed_k[:, :, keys], v[:, :, keys]
                self._tile(site, Tile(*queries, cut_mask, cut_own, *others, start, is_causal, scale, modify))

    def _tile(self, site: SiteState, tile: Tile) -> None:
        observer = self.observer
        plain, visible = tile.scores(tile.query, tile.key)
        normed = plain if site.query_norm is None else tile.scores(tile.normed_query, tile.normed_key)[0]
        counted = tile.counted(visible)
        rows = Rows(
            rows_of(tile.normed_query),
            rows_of(counted),
            rows_of(visible.sum(-1)),
            rows_of(first_of(normed, visible, -1).squeeze(-1)),
        )
        masked = normed.masked_fill(~visible, -math.inf)
        if observer.phase == "logsumexp":
            observer.sums(site).add_rows(rows, rows_of(masked.logsumexp(-1)))
        softmax = plain.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
        weights = weights_of(site, normed, visible, -1, site.bias_of_heads(tile.normed_query.to(normed.dtype)))
        value = tile.value.to(normed.dtype)
        results = softmax @ value, weights.p @ value, weights.derivative @ value
        sums = rows_of(weights.sums.squeeze(-1))
        observer.sums(site).add_outputs(rows, lambda x, y: rows_of((x * y).double().sum(-1)), *results, sums)
        observer.sums(site).add_mass(rows_of(softmax), rows_of(counted))


def _is_product_of_two(func: Any, args: Any) -> bool:
    """Whether a call is a product of two tensors; what a product of more gives is not observed."""
    if FAMILIES.get(func) != "product":
        return False
    operands = args[1] if func is torch.einsum and len(args) == 2 else args[1:]
    return func is not torch.einsum or len(operands) == 2
