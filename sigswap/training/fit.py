"""The parameters of one site from its sums: a ridge regression, Gauss-Newton steps, and least squares per channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sigswap.conversion.state import OwnerState, SiteState
from sigswap.errors import CalibrationError, Hint
from sigswap.training.calibration_report import HeadRecord
from sigswap.training.sums import ChannelSums, SiteSums

RIDGE = 1e-3
"""Of the regression, relative to the mean square of a feature."""
MAX_STEP = 1.0
"""The most that one Gauss-Newton step changes the bias of a row by, in the root mean square."""
PRIOR_ROWS = 1000
"""What the regression's w_h counts as in the Gauss-Newton steps: as this many rows, beside those of the batches."""
HELD = 1e12
"""The same, where w_h is to stay."""


class SiteFit:
    """One site's calibration: the regression, the refits, and for each head the best of all that was measured.

    The parameters from before the calibration are a candidate, too: no head gets worse than it was.
    """

    def __init__(self, site: SiteState, *, without_data: bool) -> None:
        self.site = site
        # The queries of made inputs are not those of real ones: c_h learns from their outputs, w_h fits them too well.
        self.prior_rows = HELD if without_data else PRIOR_ROWS
        self.rows: Tensor | None = None  # [H]; None: not reached
        self.first: Tensor | None = None  # the relative error before, [H]
        self.error: Tensor | None = None  # the relative error of the best, [H]
        self.least: Tensor | None = None  # the same, with what w_h's distance from the regression's costs
        self.prior: Tensor | None = None  # of that distance, by feature, [H, F]
        self.unexpressed: Tensor | None = None
        self.start: _Bias | None = None  # of the regression
        self.present: _Bias | None = None
        self.best: _Bias | None = None  # that of the least error

    def before(self, sums: SiteSums | None, path: str) -> None:
        """Solves the regression from the first pass, which also measured the error before it."""
        if sums is None or not isinstance(sums.rows, Tensor):
            return
        site = self.site
        self.rows = sums.rows.cpu()
        self.first = self.error = self.least = _relative_error(sums)
        if not isinstance(sums.gram, Tensor):
            return
        solution = _ridge(sums.gram.cpu(), sums.moment.cpu(), site.bias is not None)
        if not solution.isfinite().all():
            raise CalibrationError(
                f"{path}: the attention scores on the batches are not finite.",
                hint=Hint("Check the batches for NaN, and the model's dtype for overflow."),
            )
        self.best = _Bias.of(site)
        self.present = _Bias(
            solution[:, -1] if site.bias is not None else None,
            solution[:, : site.query_weight.shape[1]] if site.query_weight is not None else None,
        )
        self.start = self.present
        self.present.put(site)

    def after(self, sums: SiteSums | None, *, step: bool, path: str) -> None:
        """Takes in the error under the present parameters; then a step downhill, or all the best ones."""
        error = None if sums is None else _relative_error(sums)
        if sums is None or error is None or self.rows is None:
            return
        if not error.isfinite().all():
            raise CalibrationError(f"{path}: its attention's outputs on the batches are not finite.")
        self.unexpressed = sums.unexpressed.cpu() / self.rows.clamp(min=1)
        if self.present is None or self.start is None or self.best is None or self.error is None or self.least is None:
            self.error = error
            return
        cost = error
        if self.prior is not None:
            away = self.present.flat() - self.start.flat()
            cost = error + (self.prior * away.square()).sum(-1) / sums.energy.cpu().clamp(min=1e-300)
        better = cost < self.least
        self.least = torch.where(better, cost, self.least)
        self.error = torch.where(better, error, self.error)
        self.best = self.best.where(better, self.present)
        if not step:
            self.best.put(self.site)
        else:
            self.present = self.present.moved(self._step(sums))
            self.present.put(self.site)

    def _step(self, sums: SiteSums) -> Tensor:
        """[H, F]: downhill by Gauss and Newton."""
        assert self.present is not None and self.start is not None and self.rows is not None
        totals: list[Tensor] = [sums.curvature.cpu(), sums.slope.cpu(), sums.weight.cpu()]
        curvature, slope, weight = totals
        diagonal = torch.diagonal(curvature, dim1=-2, dim2=-1)
        if self.prior is None:
            self.prior = self.prior_rows / self.rows.clamp(min=1).unsqueeze(-1) * diagonal
            if self.present.c is not None:
                self.prior[:, -1] = 0.0
        pull = self.prior * (self.start.flat() - self.present.flat())
        size = torch.where(diagonal > 0, diagonal.sqrt(), 1.0)  # a head without a row, or a feature of zeros, stays
        scaled = (curvature + torch.diag_embed(self.prior)) / (size.unsqueeze(-1) * size.unsqueeze(-2))
        scaled = scaled + 1e-9 * torch.eye(scaled.shape[-1], dtype=scaled.dtype)
        step: Tensor = torch.linalg.solve(scaled, (slope + pull) / size) / size
        # A row's bias changes by step . x: the mean square of that, over the rows as they count.
        change = ((step.unsqueeze(-2) @ curvature).squeeze(-2) * step).sum(-1) / weight.clamp(min=1e-300)
        return step * (MAX_STEP / change.clamp(min=MAX_STEP**2).sqrt()).unsqueeze(-1)

    def records(self, path: str, index: int) -> list[HeadRecord]:
        def at(values: Tensor | None, head: int) -> float | None:
            return None if values is None else float(values[head])

        if self.rows is None:
            return []
        return [
            HeadRecord(path, index, head, at(self.unexpressed, head), at(self.first, head), at(self.error, head))
            for head in range(self.site.plan.heads)
        ]


@dataclasses.dataclass(frozen=True)
class _Bias:
    """c_h [H] and w_h [H, D] in float64, whichever the site has."""

    c: Tensor | None
    w: Tensor | None

    @classmethod
    def of(cls, site: SiteState) -> _Bias:
        return cls(
            *(
                None if p is None else p.detach().to("cpu", torch.float64, copy=True)
                for p in (site.bias, site.query_weight)
            )
        )

    def flat(self) -> Tensor:
        """[H, F]: w_h, then c_h."""
        parts = [] if self.w is None else [self.w]
        return torch.cat([*parts, *([] if self.c is None else [self.c.unsqueeze(-1)])], -1)

    def moved(self, step: Tensor) -> _Bias:
        """``step`` [H, F] further."""
        w = None if self.w is None else self.w + step[:, : self.w.shape[1]]
        return _Bias(None if self.c is None else self.c + step[:, -1], w)

    def put(self, site: SiteState) -> None:
        for parameter, value in ((site.bias, self.c), (site.query_weight, self.w)):
            if parameter is not None and value is not None:
                set_value(parameter, value)

    def where(self, heads: Tensor, other: _Bias) -> _Bias:
        """This, and ``other`` in the ``heads`` [H] that are True."""
        c = None if self.c is None or other.c is None else torch.where(heads, other.c, self.c)
        w = None if self.w is None or other.w is None else torch.where(heads.unsqueeze(-1), other.w, self.w)
        return _Bias(c, w)


def _relative_error(sums: SiteSums) -> Tensor | None:
    """[H], or None if the outputs were not seen."""
    if not isinstance(sums.error, Tensor):
        return None
    error: Tensor = sums.error.cpu() / sums.energy.cpu().clamp(min=1e-300)
    return error


def _ridge(gram: Tensor, moment: Tensor, intercept: bool) -> Tensor:
    """Solves the normal equations [H, F, F] and [H, F] with a ridge on all features but the last, the intercept.

    The features are scaled to a mean square of one first, so that the ridge does not depend on their units.
    """
    size = torch.diagonal(gram, dim1=-2, dim2=-1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    scaled = gram / (size.unsqueeze(-1) * size.unsqueeze(-2))
    ridge = torch.full_like(size, RIDGE)
    if intercept:
        ridge[:, -1] = 0.0
    # A head without a single row (or feature) would make the system singular: it gets 0.
    empty = (torch.diagonal(scaled, dim1=-2, dim2=-1) == 0).to(ridge.dtype)
    solution: Tensor = torch.linalg.solve(scaled + torch.diag_embed(ridge + empty), moment / size)
    return solution / size


def fit_norms(site: SiteState, sums: SiteSums, path: str) -> None:
    """weight = argmin sum (x - weight * n)^2 per channel, for the query's norm and the key's."""
    for norm, fit in ((site.query_norm, sums.query_fit), (site.key_norm, sums.key_fit)):
        if norm is not None and isinstance(fit, Tensor):
            if not fit.isfinite().all():
                raise CalibrationError(
                    f"{path}: its query or key on the batches is not finite.", hint=Hint("Check the batches for NaN.")
                )
            set_value(norm.weight, fit[0] / fit[1].clamp(min=1e-300))


def fit_channels(states: Sequence[OwnerState], sums: Mapping[OwnerState, ChannelSums]) -> None:
    """Per channel: norm.weight and norm.bias by linear regression, or LayerScale by least squares."""
    for state in states:
        if state not in sums:
            continue
        n, y, t, yy, yt, _ = sums[state].sums
        if not (yy.isfinite().all() and yt.isfinite().all()):
            raise CalibrationError(f"{state.plan.path or 'the model'}: its outputs on the batches are not finite.")
        if state.norm is not None:
            slope = (yt - y * t / n) / (yy - y * y / n).clamp(min=1e-300)
            set_value(state.norm.weight, slope)
            set_value(state.norm.bias, (t - slope * y) / n)
            if state.layer_scale is not None:
                set_value(state.layer_scale, torch.ones_like(y))
        elif state.layer_scale is not None:
            set_value(state.layer_scale, torch.where(yy > 0, yt / yy.clamp(min=1e-300), 1.0))


def set_value(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
