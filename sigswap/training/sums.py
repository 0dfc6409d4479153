"""Sums over the rows of attention calls: all that calibration solves from, whatever the number of batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sigswap.conversion.state import OwnerState, SiteState


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

    site: SiteState
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

    def add_norms(self, query: Tensor, key: Tensor) -> None:
        """``query`` and ``key`` [heads, rows, head_dim], before QK-norm."""
        if self.site.query_norm is None or self.site.key_norm is None:
            return
        self.query_fit = self.query_fit + _fit(query, self.site.query_norm.kind)
        self.key_fit = self.key_fit + _fit(key, self.site.key_norm.kind)

    def add_rows(self, query: Tensor | None, scores: Tensor, visible: Tensor, counted: Tensor) -> None:
        """``query`` [H, R, D] after QK-norm (or None), scores and ``visible`` [H, R, N], ``counted`` [H, R]."""
        n = visible.sum(-1)
        logsumexp = scores.masked_fill(~visible, -math.inf).logsumexp(-1)
        target = -logsumexp - self.site.const_bias + (n.clamp(min=1).log() if self.site.visible_bias else 0.0)
        target = target.double().masked_fill(~counted, 0.0)
        self.rows = self.rows + counted.double().sum(-1)
        x = _features(self.site, query, counted)
        if x is not None:
            self.gram = self.gram + x.mT @ x
            self.moment = self.moment + (x.mT @ target.unsqueeze(-1)).squeeze(-1)

    def add_outputs(
        self,
        query: Tensor | None,
        counted: Tensor,
        products: Callable[[Tensor, Tensor], Tensor],
        softmax: Tensor,
        sigmoid: Tensor,
        derivative: Tensor,
    ) -> None:
        """Outputs under softmax and sigmoid, and the latter's derivative by the row's bias, any shape.

        ``products``: the products of two such tensors, summed by row, [H, R]. query, ``counted``: as for add_rows.
        """

        def by_row(x: Tensor, y: Tensor) -> Tensor:
            return products(x, y).double().masked_fill(~counted, 0.0)

        missing = softmax - sigmoid
        self.error = self.error + by_row(missing, missing).sum(-1)
        self.energy = self.energy + by_row(softmax, softmax).sum(-1)
        x = _features(self.site, query, counted)
        if x is not None:
            self.slope = self.slope + (x.mT @ by_row(missing, derivative).unsqueeze(-1)).squeeze(-1)
            weight = by_row(derivative, derivative)
            self.curvature = self.curvature + x.mT @ (x * weight.unsqueeze(-1))
            self.weight = self.weight + weight.sum(-1)

    def add_mass(self, probabilities: Tensor, counted: Tensor) -> None:
        """Softmax ``probabilities`` [H, R, N]: sigmoid at minus the logsumexp gives p / (1 + p) for each p."""
        p = probabilities.masked_fill(~counted.unsqueeze(-1), 0.0)
        self.unexpressed = self.unexpressed + (p * p / (1 + p)).sum((-2, -1)).double()


@dataclasses.dataclass
class ChannelSums:
    """Sums over one owner's output y before LayerScale, and the softmax's output t, per channel: six of [C]."""

    sums: Any = 0.0  # [6, C]: 1, y, t, y y, y t, t t

    def add(self, state: OwnerState, output: Any, original: Any) -> None:
        """``output`` of the owner as sigmoid, without LayerScale and hybrid-norm, beside its ``original`` one."""
        y, t = (first_tensor(x).movedim(state.plan.channel_axis, -1).double() for x in (output, original))
        if state.norm is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=state.norm.eps)
        y, t = y.flatten(0, -2), t.flatten(0, -2)
        self.sums = self.sums + torch.stack([torch.ones_like(y), y, t, y * y, y * t, t * t]).sum(1)


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
    first: Tensor = output
    return first


def _fit(x: Tensor, kind: str) -> Tensor:
    x = x.double()
    norm = F.rms_norm if kind == "rms" else F.layer_norm
    normed = norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)
    return torch.stack([(x * normed).sum(-2), (normed * normed).sum(-2)])
