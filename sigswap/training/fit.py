"""The parameters of one site from its sums: a ridge regression, Gauss-Newton steps, and least squares per channel.

With a row cap C the bias is put ln(C) / 2 lower: what the regression misses by up to that much in either direction then
neither saturates a sigmoid nor lets the row's sum fall below the cap, and the row is all but softmax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sigswap.conversion.state import OwnerState, SiteState
from sigswap.distributed.shards import put, whole
from sigswap.errors import CalibrationError, Hint
from sigswap.training.calibration_report import HeadRecord, LengthRecord
from sigswap.training.sums import ChannelSums, SiteSums, parameters_of

RIDGE = 1e-3
"""Of the regression, relative to the mean square of a feature."""
MAX_STEP = 1.0
"""The most that one Gauss-Newton step changes the bias of a row by, in the root mean square."""
PRIOR_ROWS = 1000
"""What the regression's w_h counts as in the Gauss-Newton steps: as this many rows, beside those of the batches."""
HELD = 1e12
"""The same, where w_h is to stay."""
FIRST_STEPS = 12
"""Of Levenberg and Marquardt, in the regression of rows whose first key is known."""
UPWARD = 4.0
"""What a squared error of a row's bias counts there if the bias is too high and no row cap bounds what comes of it."""
LEAST_SHARE = 0.02
"""What a row counts at least in the start of that regression, however much of it is the first key's."""


class SiteFit:
    """One site's calibration: the regression, the refits, and for each head the best of all that was measured.

    The parameters from before the calibration are a candidate, too: no head gets worse than it was.
    """

    def __init__(self, site: SiteState, *, without_data: bool, row_cap: float | None = None) -> None:
        """``row_cap``: to be tried; None: the site's stays as it is."""
        self.site, self.row_cap, self.row_cap_before = site, row_cap, site.row_cap
        # The queries of made inputs are not those of real ones: c_h learns from their outputs, w_h fits them too well.
        self.prior_rows = HELD if without_data else PRIOR_ROWS
        self.rows: Tensor | None = None  # [H]; None: not reached
        self.first: Tensor | None = None  # the relative error before, [H]
        self.error: Tensor | None = None  # the relative error of the best, [H]
        self.least: Tensor | None = None  # the same, with what w_h's distance from the regression's costs
        self.prior: Tensor | None = None  # of that distance, by feature, [H, F]
        self.unexpressed: Tensor | None = None
        self.longest = 0  # visible keys
        self.lengths: Tensor | None = None  # of the best, see SiteSums
        self.before_lengths: Tensor | None = None
        self.initial: _Bias | None = None
        self.start: _Bias | None = None  # of the regression
        self.present: _Bias | None = None
        self.best: _Bias | None = None  # that of the least error

    def before(self, sums: SiteSums | None, path: str) -> None:
        """Solves the regression from the first pass, which also measured the error before it."""
        if sums is None or not isinstance(sums.rows, Tensor):
            return
        site = self.site
        self.rows, self.longest = sums.rows.cpu(), sums.longest
        self.first = self.error = self.least = _relative_error(sums)
        before = _Bias.of(site)
        self.before_lengths = _cpu(sums.lengths)
        solution = self._regression(sums)
        if solution is None:
            return
        if not solution.isfinite().all():
            raise CalibrationError(
                f"{path}: the attention scores on the batches are not finite.",
                hint=Hint("Check the batches for NaN, and the model's dtype for overflow."),
            )
        self.initial = self.best = before
        if self.row_cap is not None and self.first is not None:
            site.row_cap = self.row_cap
            self.least = torch.full_like(self.first, torch.inf)  # what was measured was without that cap
        self.start = self.present = before.with_flat(solution)
        self.present.put(site)

    def _regression(self, sums: SiteSums) -> Tensor | None:
        """[H, F], as :func:`sigswap.training.sums.parameters_of` has them."""
        site = self.site
        cap = self.row_cap if self.row_cap is not None and self.first is not None else site.row_cap
        lower = 0.5 * math.log(cap) if cap is not None and cap < 1.0 else 0.0
        if sums.sample is not None:
            # On the device that the rows are on: on a CPU's many cores it took most of a GPU's calibration.
            solution = _regression_beside_first(*sums.sample.get(), site, UPWARD if cap is None else 1.0).cpu()
            return torch.cat([solution, torch.full_like(solution[:, :1], lower)], -1)
        if not isinstance(sums.gram, Tensor):
            return None
        solution = _ridge(sums.gram.cpu(), sums.moment.cpu(), site.bias is not None)
        if site.bias is not None:
            solution[:, -1] += lower
        return solution

    def revert_cap(self) -> None:
        """Back to the parameters and the row cap from before, where the new cap did not pay."""
        if self.initial is not None:
            self.initial.put(self.site)
        self.site.row_cap, self.error, self.lengths = self.row_cap_before, self.first, self.before_lengths

    def after(self, sums: SiteSums | None, *, step: bool, path: str) -> None:
        """Takes in the error under the present parameters; then a step downhill, or all the best ones."""
        error = None if sums is None else _relative_error(sums)
        if sums is None or error is None or self.rows is None:
            return
        if not error.isfinite().all():
            raise CalibrationError(f"{path}: its attention's outputs on the batches are not finite.")
        self.unexpressed = sums.unexpressed.cpu() / self.rows.clamp(min=1)
        known = self.error
        if self.present is None or self.start is None or self.best is None or known is None or self.least is None:
            self.error, self.lengths = error, _cpu(sums.lengths)
            return
        cost = error
        if self.prior is not None:
            away = self.present.flat() - self.start.flat()
            cost = error + (self.prior * away.square()).sum(-1) / sums.energy.cpu().clamp(min=1e-300)
        better = cost < self.least
        self.least = torch.where(better, cost, self.least)
        self.error = torch.where(better, error, known)
        new = _cpu(sums.lengths)
        old = self.before_lengths if self.lengths is None else self.lengths
        self.lengths = torch.where(better.unsqueeze(-1), new, old) if new is not None and old is not None else new
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
            # The rest of the regression's may move: c_h and d_h, but w_h and a_h extrapolate.
            free = {"bias", "offset"}
            at = torch.cat([torch.full((size,), name in free) for name, size in self.present.sizes()])
            self.prior[:, at] = 0.0
        pull = self.prior * (self.start.flat() - self.present.flat())
        size = torch.where(diagonal > 0, diagonal.sqrt(), 1.0)  # a head without a row, or a feature of zeros, stays
        scaled = (curvature + torch.diag_embed(self.prior)) / (size.unsqueeze(-1) * size.unsqueeze(-2))
        scaled = scaled + 1e-9 * torch.eye(scaled.shape[-1], dtype=scaled.dtype)
        step: Tensor = torch.linalg.solve(scaled, (slope + pull) / size) / size
        # A row's bias changes by step . x: the mean square of that, over the rows as they count.
        change = ((step.unsqueeze(-2) @ curvature).squeeze(-2) * step).sum(-1) / weight.clamp(min=1e-300)
        return step * (MAX_STEP / change.clamp(min=MAX_STEP**2).sqrt()).unsqueeze(-1)

    def length_records(self, path: str, index: int) -> list[LengthRecord]:
        """By class of the number of visible keys, of all heads together."""
        if self.lengths is None:
            return []
        records = []
        for order, (error, energy, total, rows) in enumerate(self.lengths.sum(1).T.tolist()):
            if rows > 0:
                relative, row_sum = error / max(energy, 1e-300), total / rows
                most = min(2 ** (order + 1) - 1, self.longest)
                records.append(LengthRecord(path, index, 2**order, most, int(rows), relative, row_sum))
        return records

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
    """The parameters of a site's bias by name, in the order of :func:`sigswap.training.sums.parameters_of`, each [H, n]
    in float64."""

    values: Mapping[str, Tensor]

    @classmethod
    def of(cls, site: SiteState) -> _Bias:
        names = {parameter: name for name, parameter in site.named_parameters(recurse=False)}
        return cls(
            {names[p]: whole(p).to("cpu", torch.float64, copy=True).view(p.shape[0], -1) for p in parameters_of(site)}
        )

    def sizes(self) -> list[tuple[str, int]]:
        return [(name, value.shape[1]) for name, value in self.values.items()]

    def flat(self) -> Tensor:
        """[H, F]."""
        return torch.cat(list(self.values.values()), -1)

    def with_flat(self, flat: Tensor) -> _Bias:
        parts = torch.split(flat, [size for _, size in self.sizes()], -1)
        return _Bias(dict(zip(self.values, parts, strict=True)))

    def moved(self, step: Tensor) -> _Bias:
        """``step`` [H, F] further."""
        return self.with_flat(self.flat() + step)

    def put(self, site: SiteState) -> None:
        for name, value in self.values.items():
            parameter = getattr(site, name)
            set_value(parameter, value.view(parameter.shape))

    def where(self, heads: Tensor, other: _Bias) -> _Bias:
        """This, and ``other`` in the ``heads`` [H] that are True."""
        return self.with_flat(torch.where(heads.unsqueeze(-1), other.flat(), self.flat()))


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


def _regression_beside_first(x: Tensor, first: Tensor, total: Tensor, site: SiteState, upward: float) -> Tensor:
    """[H, F]: w_h, c_h and a_h such that logaddexp(first, -(x . parameters)) is near the rows' logsumexp ``total``.

    ``x`` [H, R, F], ``first`` and ``total`` [H, R]. ``upward``: the weight of squared errors of rows whose bias is too
    high. Steps of Levenberg and Marquardt, each head on its own, from a regression of the rest on x.
    """
    heads, rows, features = x.shape
    x = -x
    free = torch.zeros(features, dtype=torch.bool, device=x.device)
    if site.query_weight is not None:
        free[site.query_weight.shape[1] :] = True
    else:
        free[:] = True
    rest = total + torch.log(-torch.expm1((first - total).clamp(max=-1e-12)))  # the row without its first key
    target = torch.where(total - first > 0.5, rest, total)
    known = total > first  # rows with more than the first key
    weight = torch.sigmoid(rest - first).clamp(min=LEAST_SHARE) * known
    size = x.square().mean(1)  # of the features, [H, F]
    ridge = RIDGE * size * ~free + 1e-9 * size.amax(-1, keepdim=True).clamp(min=1e-12)

    def solved(gram: Tensor, moment: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.solve(gram, moment)
        return solution

    weighted = x * weight.unsqueeze(-1)
    start = solved(x.mT @ weighted / max(1, rows) + torch.diag_embed(ridge), _times(weighted, target) / max(1, rows))

    def state(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        others = (x @ parameters.unsqueeze(-1)).squeeze(-1)
        missing = (torch.logaddexp(first, others) - total) * known
        counts = torch.where(missing < 0, upward, 1.0)
        cost = (counts * missing.square()).sum(-1) / max(1, rows) + (ridge * parameters.square()).sum(-1)
        return torch.sigmoid(others - first), missing, counts, cost

    present, damping = start, torch.full((heads, 1), 1e-2, dtype=x.dtype, device=x.device)
    share, missing, counts, cost = state(present)
    for _ in range(FIRST_STEPS):
        slope = x * share.unsqueeze(-1)
        gram = slope.mT @ (slope * counts.unsqueeze(-1)) / max(1, rows) + torch.diag_embed(ridge + damping * size)
        downhill = _times(slope, counts * missing) / max(1, rows) + ridge * present
        tried = present - solved(gram, downhill)
        better = state(tried)[-1] < cost
        present = torch.where(better.unsqueeze(-1), tried, present)
        damping = torch.where(better.unsqueeze(-1), damping / 5, damping * 10)
        share, missing, counts, cost = state(present)
    return present


def _times(x: Tensor, y: Tensor) -> Tensor:
    """[H, F] of [H, R, F] and [H, R]."""
    return (x.mT @ y.unsqueeze(-1)).squeeze(-1)


def _cpu(x: Tensor | float) -> Tensor | None:
    return x.cpu() if isinstance(x, Tensor) else None


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
        put(parameter, value)
