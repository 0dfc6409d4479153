"""Sums over the rows of attention calls: all that calibration solves from, whatever the number of batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sigswap.conversion.state import OwnerState, SiteState
from sigswap.distributed.shards import part, whole

SAMPLED_ROWS = 2048
"""Rows of each head that are kept where the bias knows the first key: its regression is not linear."""
LENGTHS = 24
"""Classes of the number of visible keys: 1, 2 to 3, 4 to 7, and so on."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of one site. ``query`` [H, R, D] after QK-norm, or None; ``counted`` [H, R], whether the row counts;
    ``visible`` [H, R], how many keys it sees; ``first`` [H, R], the score of the first of them."""

    query: Tensor | None
    counted: Tensor
    visible: Tensor
    first: Tensor

    def base(self, site: SiteState) -> Tensor:
        """b0 of each row, [H, R] in float64."""
        log = self.visible.double().clamp(min=1).log() if site.visible_bias else torch.zeros_like(self.first).double()
        return site.const_bias - log

    def features(self, site: SiteState) -> Tensor | None:
        """What c_h + w_h . q_i, and the share a_h of b0, are linear in, [H, R, F] in float64; None: nothing."""
        features = [self.query.double()] if site.query_weight is not None and self.query is not None else []
        if site.bias is not None:
            features.append(torch.ones_like(self.counted, dtype=torch.float64).unsqueeze(-1))
        if site.length_share is not None:
            features.append(self.base(site).unsqueeze(-1))
        return torch.cat(features, -1) if features else None

    def slopes(self, site: SiteState) -> Tensor | None:
        """The row bias's derivative by each parameter under the present ones, [H, R, F] in float64; 0 in rows that do
        not count. None: the site has none. The order is that of :func:`parameters_of`."""
        x = self.features(site)
        if x is not None and site.length_share is not None:
            flat = torch.cat([part(p).double().view(len(part(p)), -1) for p in parameters_of(site)], -1)
            others = -(x @ flat[:, :-1].unsqueeze(-1)).squeeze(-1)
            share = torch.sigmoid(others - self.first.double()).unsqueeze(-1)
            x = torch.cat([x * share, torch.ones_like(share)], -1)
        return None if x is None else x.masked_fill(~self.counted.unsqueeze(-1), 0.0)


def parameters_of(site: SiteState) -> list[torch.nn.Parameter]:
    """w_h, c_h, a_h and d_h, whichever the site has, in this order."""
    parameters = (site.query_weight, site.bias, site.length_share, site.offset)
    return [parameter for parameter in parameters if parameter is not None]


@dataclasses.dataclass
class SiteSums:
    """Sums over the rows of one site, in float64 on the site's device, by head (of this rank, until those of all are
    added up by :mod:`sigswap.training.ranks`). F: the parameters of its row bias, as :func:`parameters_of` has them.

    ``gram`` [H, F, F], ``moment`` [H, F]: the normal equations of minus the logsumexp (less b0) on w_h's and c_h's
    features. ``sample``: where the first key's score is known, which makes them not linear, rows instead: features
    [H, R, F - 1], that score and the logsumexp [H, R].
    ``curvature`` [H, F, F], ``slope`` [H, F]: of half the squared output error (by Gauss and Newton), ``slope``
    downhill; ``weight`` [H]: the curvature along the bias of all rows. ``error`` and ``energy`` [H]: squared error of
    the sigmoid's outputs, and squared outputs of the softmax. ``rows`` [H].
    ``lengths`` [4, H, LENGTHS]: error, energy, row sums and rows by the number of visible keys (its logarithm, base 2).
    ``unexpressed`` [H]: probability mass that sigmoid(score - logsumexp) lacks, summed over the rows.
    ``query_fit``, ``key_fit``: (x . n, n . n) per channel of x and its QK-normed n, each [heads, head_dim].
    """

    site: SiteState
    gram: Any = 0.0
    moment: Any = 0.0
    sample: Sample | None = None
    slope: Any = 0.0
    curvature: Any = 0.0
    weight: Any = 0.0
    error: Any = 0.0
    energy: Any = 0.0
    rows: Any = 0.0
    longest: int = 0
    lengths: Any = 0.0
    unexpressed: Any = 0.0
    query_fit: Any = 0.0
    key_fit: Any = 0.0

    def add_norms(self, query: Tensor, key: Tensor) -> None:
        """``query`` and ``key`` [heads, rows, head_dim], before QK-norm."""
        if self.site.query_norm is None or self.site.key_norm is None:
            return
        self.query_fit = self.query_fit + _fit(query, self.site.query_norm.kind)
        self.key_fit = self.key_fit + _fit(key, self.site.key_norm.kind)

    def add_rows(self, rows: Rows, logsumexp: Tensor) -> None:
        """``logsumexp`` [H, R] of the visible scores."""
        self.rows = self.rows + rows.counted.double().sum(-1)
        self.longest = max(self.longest, int(rows.visible.max())) if rows.visible.numel() else self.longest
        x = rows.features(self.site)
        if x is None:
            return
        if self.site.length_share is not None:
            self.sample = Sample() if self.sample is None else self.sample
            self.sample.add(x, rows.first, logsumexp, rows.counted)
            return
        target = (-logsumexp.double() - rows.base(self.site)).masked_fill(~rows.counted, 0.0)
        x = x.masked_fill(~rows.counted.unsqueeze(-1), 0.0)
        self.gram = self.gram + x.mT @ x
        self.moment = self.moment + (x.mT @ target.unsqueeze(-1)).squeeze(-1)

    def add_outputs(
        self,
        rows: Rows,
        products: Callable[[Tensor, Tensor], Tensor],
        softmax: Tensor,
        sigmoid: Tensor,
        derivative: Tensor,
        row_sums: Tensor,
    ) -> None:
        """Outputs under softmax and sigmoid, and the latter's derivative by the row's bias, any shape.

        ``products``: the products of two such tensors, summed by row, [H, R]. ``row_sums`` [H, R]: of the sigmoids.
        """

        def by_row(x: Tensor, y: Tensor) -> Tensor:
            return products(x, y).double().masked_fill(~rows.counted, 0.0)

        missing = softmax - sigmoid
        error, energy = by_row(missing, missing), by_row(softmax, softmax)
        self.error, self.energy = self.error + error.sum(-1), self.energy + energy.sum(-1)
        counted = rows.counted.double()
        index = rows.visible.clamp(min=1).double().log2().long().clamp(max=LENGTHS - 1)
        each = torch.stack([error, energy, row_sums.double().masked_fill(~rows.counted, 0.0), counted])
        found = torch.zeros(*each.shape[:2], LENGTHS, dtype=torch.float64, device=each.device)
        self.lengths = self.lengths + found.scatter_add_(-1, index.expand_as(each), each)
        x = rows.slopes(self.site)
        if x is not None:
            self.slope = self.slope + (x.mT @ by_row(missing, derivative).unsqueeze(-1)).squeeze(-1)
            weight = by_row(derivative, derivative)
            self.curvature = self.curvature + x.mT @ (x * weight.unsqueeze(-1))
            self.weight = self.weight + weight.sum(-1)

    def add_mass(self, probabilities: Tensor, counted: Tensor) -> None:
        """Softmax ``probabilities`` [H, R, N]: sigmoid at minus the logsumexp gives p / (1 + p) for each p."""
        p = probabilities.masked_fill(~counted.unsqueeze(-1), 0.0)
        self.unexpressed = self.unexpressed + (p * p / (1 + p)).sum((-2, -1)).double()


class Sample:
    """Every n-th row of those that count, where n doubles when there are too many: the same in each run."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []  # [H, R, F + 2] in float32
        self.stride, self.seen = 1, 0

    def add(self, features: Tensor, first: Tensor, logsumexp: Tensor, counted: Tensor) -> None:
        """[H, R, F] and three times [H, R]. Rows that some head does not count are left out."""
        columns = torch.stack([first, logsumexp], -1).double()
        rows = torch.cat([features, columns], -1)[:, counted.all(0)].float()
        kept = rows[:, -self.seen % self.stride :: self.stride]
        self.seen += rows.shape[1]
        self.parts.append(kept.contiguous())
        self._thin_out()

    def _thin_out(self) -> None:
        while sum(part.shape[1] for part in self.parts) > SAMPLED_ROWS:
            self.parts = [self.rows()[:, ::2].contiguous()]
            self.stride *= 2

    @classmethod
    def of(cls, parts: list[Tensor]) -> Sample:
        """One of the rows of several, each [H, R, F + 2]."""
        sample = cls()
        sample.parts = parts
        sample._thin_out()
        return sample

    def rows(self) -> Tensor:
        """[H, R, F + 2]."""
        return torch.cat(self.parts, 1)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows().shape)

    def get(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features [H, R, F], the first key's score and the logsumexp [H, R], in float64."""
        rows = self.rows().double()
        return rows[..., :-2], rows[..., -2], rows[..., -1]


@dataclasses.dataclass
class ChannelSums:
    """Sums over one owner's output y before LayerScale, and the softmax's output t, per channel: six of [C]."""

    sums: Any = 0.0  # [6, C]: 1, y, t, y y, y t, t t

    def add(self, state: OwnerState, output: Any, original: Any) -> None:
        """``output`` of the owner as sigmoid, without LayerScale and hybrid-norm, beside its ``original`` one."""
        y, t = (whole(first_tensor(x)).movedim(state.plan.channel_axis, -1).double() for x in (output, original))
        if state.norm is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=state.norm.eps)
        y, t = y.flatten(0, -2), t.flatten(0, -2)
        self.sums = self.sums + torch.stack([torch.ones_like(y), y, t, y * y, y * t, t * t]).sum(1)


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
