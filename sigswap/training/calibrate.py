"""Calibration: the parameters of a conversion from data, so that a pretrained model still works after the swap.

Softmax is sigmoid with the bias ``-log(sum over k != j of exp(s_ik))``, which for attention that is spread out is minus
the row's logsumexp. So c_h and w_h come from a ridge regression of minus the logsumexp on the query, and are then
refitted by Gauss-Newton steps on what counts, the squared error of the attention's outputs. Every pass runs the model
as softmax and only adds to sums (:mod:`sigswap.training.observe`), so memory does not grow with the number of batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sigswap.conversion.example_inputs import as_call
from sigswap.conversion.record import note_calibration, owners_of
from sigswap.conversion.recording import Inputs, device_of
from sigswap.conversion.softmax import run_as_softmax, softmax
from sigswap.conversion.state import OwnerState, SiteState
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.training.calibration_report import CalibrationReport, HeadRecord, SiteExclusion, SiteRanking
from sigswap.training.observe import Observer, Phase, SiteSums, needs_recording, observed
from sigswap.training.own_batches import own_batches

RIDGE = 1e-3
"""Of the regression, relative to the mean square of a feature."""
MAX_STEP = 1.0
"""The most that one Gauss-Newton step changes the bias of a row by, in the root mean square."""
PRIOR_ROWS = 1000
"""What the regression's w_h counts as in the Gauss-Newton steps: as this many rows, beside those of the batches."""
HELD = 1e12
"""The same, where w_h is to stay."""


def calibrate(
    model: nn.Module,
    batches: Any = None,
    *,
    refine: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """Fits the sigmoid parameters of a converted ``model`` so that it computes what it computed as softmax.

    Per site, whichever its config has: QK-norm's weights, by least squares to the query and key before the norm; c_h
    [heads] and w_h [heads, head_dim], by ridge regression of ``-(logsumexp of the row) - b0`` on the query, in float64;
    both again, by ``refine`` Gauss-Newton steps on the squared error of the attention's output (the fewer the rows, the
    less w_h moves; without data not at all); LayerScale and hybrid-norm, by least squares on the owner's output per
    channel. No head's error gets larger than it was. Rows of
    padding do not count where they can be told (self-attention whose mask hides a position from itself). The base
    parameters are not changed.

    Args:
        model: converted. It runs in eval mode, without gradients, on the devices that it is on; compiled code is not
            used. ``query_bias=True`` in its config lets it be fitted much better.
        batches: what the model is called on: a list (or any iterable, a DataLoader say) of tensors, tuples of
            positional arguments or dicts of keyword arguments, or one such batch. A few dozen samples do. It is gone
            through ``refine + 2`` times; an iterator is therefore read into a list. ``None``: inputs made from
            what the model knows of itself (:func:`sigswap.training.own_batches.own_batches`), which is worse than
            real data.
        refine: how many Gauss-Newton steps; each costs a pass over the batches.
        seed: of the inputs that are made without ``batches``.
        progress: shows a progress bar on standard error, if that is a terminal.

    Returns:
        What was measured, per head. It can be printed, plotted and turned into plain data.

    Raises:
        NotConvertedError: the model is not converted.
        ArgumentError: ``batches`` is empty or of a wrong type, or the conversion has no parameters to calibrate.
        CalibrationError: the model fails on a batch, or gives scores or outputs that are not finite.

    Whatever is raised, the model is as it was.
    """
    states = _calibratable(model)
    if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
        raise ArgumentError(f"{{argument}} must be a number of steps, 0 or more, not {refine!r}.", argument="refine")
    notes: list[str] = []
    if batches is None:
        calls, source = own_batches(model, seed=seed)
        notes.append(f"Without data: calibrated on {source}. Batches of real inputs are better.")
    else:
        calls = as_calls(batches)
    fits = {site: _Fit(site, without_data=batches is None) for state in states.values() for site in state.sites()}
    scaled = [state for state in states.values() if state.layer_scale is not None or state.norm is not None]
    normed = any(site.query_norm is not None for site in fits)
    total = 2 + refine + (1 if normed else 0) + (1 if scaled else 0)
    passes = _Passes(model, states, calls)
    with _unchanged_if_it_fails(states), _quiet(model), progress_bar(progress) as bar:
        task = bar.add_task("Calibrating", total=None)

        def run(phase: Phase) -> Observer:
            observer = Observer(phase)
            for count in passes.run(observer):
                bar.update(task, advance=1, total=None if count is None else count * total)
            return observer

        if normed:
            for site, sums in run("norms").sites.items():
                _fit_norms(site, sums, _path_of(states, site))
        observer = run("logsumexp")
        for site, fit in fits.items():
            fit.before(observer.sites.get(site), _path_of(states, site))
        for _ in range(refine):
            _each(fits, states, run("outputs"), step=True)
        _each(fits, states, run("outputs"), step=False)
        if scaled:
            _fit_channels(scaled, run("channels"))
        missing = [path for path, state in states.items() if all(fits[site].rows is None for site in state.sites())]
        if len(missing) == len(states):
            raise CalibrationError(
                "the batches reach none of the converted modules.", argument="batches", hint=Hint("Pass some that do.")
            )
        if missing:
            notes.append(f"Not reached by the batches, and as they were: {', '.join(missing)}.")
        unseen = [_path_of(states, site) for site, fit in fits.items() if fit.rows is not None and fit.error is None]
        if unseen:
            notes.append(
                "From the logsumexp alone, for the product of probabilities and value was not recognised: "
                f"{', '.join(dict.fromkeys(unseen))}."
            )
    heads = [
        record
        for path, state in states.items()
        for index, site in enumerate(state.sites())
        for record in fits[site].records(path, index)
    ]
    result = CalibrationReport(heads, passes.seen, notes)
    note_calibration(model, " ".join([result.summary(), *notes]))
    return result


def rank_sites(model: nn.Module, batches: Any, *, progress: bool = True) -> SiteRanking:
    """How much nearer the model's output would be to the softmax model's if single modules had stayed softmax.

    Each converted module in turn runs as softmax, and the relative squared error of the model's output (its first
    tensor of two dimensions or more; positions that ``attention_mask`` hides do not count) is measured; then again
    for the best one, the best two, and so on, together. That costs twice as many runs over ``batches`` as there are
    converted modules: pass one or two batches. Arguments and errors are those of :func:`calibrate`.
    """
    states = owners_of(model)
    calls = list(as_calls(batches))
    with _quiet(model), progress_bar(progress) as bar:
        task = bar.add_task("Ranking sites", total=2 * len(states) + 1)
        with softmax(model):
            truth = [_output(model, call, index) for index, call in enumerate(calls)]

        def error(excluded: Iterable[str]) -> float:
            with run_as_softmax([states[path] for path in excluded]):
                pairs = [(t, _output(model, call, i)) for i, (call, t) in enumerate(zip(calls, truth, strict=True))]
            bar.advance(task)
            missing = sum(float((out - t).square().sum()) for t, out in pairs)
            return missing / max(sum(float(t.square().sum()) for t, _ in pairs), 1e-300)

        none = error(())
        alone = {path: error((path,)) for path in states}
        order = sorted(states, key=lambda path: alone[path])
        rows = [
            SiteExclusion(path, alone[path], error(order[: index + 1]) if index else alone[path])
            for index, path in enumerate(order)
        ]
    return SiteRanking(none, rows)


# Batches


def as_calls(batches: Any) -> Iterable[Inputs]:
    """``batches`` as calls (args, kwargs) that can be gone through again and again. Raises ArgumentError."""
    if isinstance(batches, Tensor | Mapping | tuple):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise ArgumentError(
            f"{{argument}} must be a list or another iterable of inputs, not a {type(batches).__name__}.",
            argument="batches",
        )
    if isinstance(batches, Iterator):
        batches = list(batches)
    return _Calls(batches)


@dataclasses.dataclass(frozen=True)
class _Calls:
    batches: Iterable[Any]

    def __iter__(self) -> Iterator[Inputs]:
        return (as_call(batch, "batches") for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def call_model(model: nn.Module, call: Inputs, index: int) -> Any:
    """The model's output for a batch, moved to its device. Raises CalibrationError if it fails."""
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device_of(model)), call)
    try:
        return model(*args, **kwargs)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"{type(model).__name__} failed on batch {index} ({type(error).__name__}: {error}).",
            argument="batches",
            hint=Hint(
                "Each batch must be a tensor, a tuple of positional arguments or a dict of keyword arguments that its "
                "forward takes."
            ),
        ) from error


class _Passes:
    """Runs a model over its batches under an observer."""

    def __init__(self, model: nn.Module, states: Mapping[str, OwnerState], calls: Iterable[Inputs]) -> None:
        self.model, self.states, self.calls, self.seen = model, states, calls, 0

    def run(self, observer: Observer) -> Iterator[int | None]:
        """One pass; yields the number of batches, as far as it is known, after each."""
        states = list(self.states.values())
        twice = needs_recording(states, observer.phase)
        count = len(self.calls) if hasattr(self.calls, "__len__") else None  # type: ignore[arg-type]
        self.seen = 0
        with observed(states, observer):
            for index, call in enumerate(self.calls):
                observer.recorded.clear()
                for observer.recording in (True, False) if twice else (False,):
                    call_model(self.model, call, index)
                self.seen += 1
                yield count
        if not self.seen:
            raise ArgumentError(
                "{argument} is empty.",
                argument="batches",
                hint=Hint("Pass at least one batch, or {batches} to calibrate without data.", {"batches": "None"}),
            )


# The fits


class _Fit:
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
        curvature, slope, weight = sums.curvature.cpu(), sums.slope.cpu(), sums.weight.cpu()
        diagonal = torch.diagonal(curvature, dim1=-2, dim2=-1)
        if self.prior is None:
            self.prior = self.prior_rows / self.rows.clamp(min=1).unsqueeze(-1) * diagonal
            if self.present.c is not None:
                self.prior[:, -1] = 0.0
        pull = self.prior * (self.start.flat() - self.present.flat())
        size = torch.where(diagonal > 0, diagonal.sqrt(), 1.0)  # a head without a row, or a feature of zeros, stays
        scaled = (curvature + torch.diag_embed(self.prior)) / (size.unsqueeze(-1) * size.unsqueeze(-2))
        scaled = scaled + 1e-9 * torch.eye(scaled.shape[-1], dtype=scaled.dtype)
        step = torch.linalg.solve(scaled, (slope + pull) / size) / size
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
                _set(parameter, value)

    def where(self, heads: Tensor, other: _Bias) -> _Bias:
        """This, and ``other`` in the ``heads`` [H] that are True."""
        c = None if self.c is None or other.c is None else torch.where(heads, other.c, self.c)
        w = None if self.w is None or other.w is None else torch.where(heads.unsqueeze(-1), other.w, self.w)
        return _Bias(c, w)


def _each(fits: Mapping[SiteState, _Fit], states: Mapping[str, OwnerState], observer: Observer, *, step: bool) -> None:
    for site, fit in fits.items():
        fit.after(observer.sites.get(site), step=step, path=_path_of(states, site))


def _relative_error(sums: SiteSums) -> Tensor | None:
    """[H], or None if the outputs were not seen."""
    if not isinstance(sums.error, Tensor):
        return None
    return sums.error.cpu() / sums.energy.cpu().clamp(min=1e-300)


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
    return torch.linalg.solve(scaled + torch.diag_embed(ridge + empty), moment / size) / size


def _fit_norms(site: SiteState, sums: SiteSums, path: str) -> None:
    """weight = argmin sum (x - weight * n)^2 per channel, for the query's norm and the key's."""
    for norm, fit in ((site.query_norm, sums.query_fit), (site.key_norm, sums.key_fit)):
        if norm is not None and isinstance(fit, Tensor):
            if not fit.isfinite().all():
                raise CalibrationError(
                    f"{path}: its query or key on the batches is not finite.", hint=Hint("Check the batches for NaN.")
                )
            _set(norm.weight, fit[0] / fit[1].clamp(min=1e-300))


def _fit_channels(states: Sequence[OwnerState], observer: Observer) -> None:
    """Per channel: norm.weight and norm.bias by linear regression, or LayerScale by least squares."""
    for state in states:
        if state not in observer.owners:
            continue
        n, y, t, yy, yt, _ = observer.owners[state].sums
        if not (yy.isfinite().all() and yt.isfinite().all()):
            raise CalibrationError(f"{state.plan.path or 'the model'}: its outputs on the batches are not finite.")
        if state.norm is not None:
            slope = (yt - y * t / n) / (yy - y * y / n).clamp(min=1e-300)
            _set(state.norm.weight, slope)
            _set(state.norm.bias, (t - slope * y) / n)
            if state.layer_scale is not None:
                _set(state.layer_scale, torch.ones_like(y))
        elif state.layer_scale is not None:
            _set(state.layer_scale, torch.where(yy > 0, yt / yy.clamp(min=1e-300), 1.0))


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


# The model while it is calibrated


def _calibratable(model: nn.Module) -> dict[str, OwnerState]:
    states = owners_of(model)
    if not any(True for state in states.values() for _ in state.parameters()):
        raise ArgumentError(
            "the conversion has no parameters to calibrate.",
            hint=Hint("Convert with {learn_bias}, or {query_bias}.", {"learn_bias": "True", "query_bias": "True"}),
        )
    for path, state in states.items():
        if any(parameter.is_meta for parameter in state.parameters()):
            raise CalibrationError(
                f"{path or 'the model'} is on the meta device.",
                hint=Hint(
                    "Calibrate after its weights are loaded. (Where accelerate offloads them, convert the model "
                    "afterwards.)"
                ),
            )
    return states


def _path_of(states: Mapping[str, OwnerState], site: SiteState) -> str:
    return next(path or "the model" for path, state in states.items() if site in state.sites())


@contextmanager
def _unchanged_if_it_fails(states: Mapping[str, OwnerState]) -> Iterator[None]:
    before = {p: p.detach().clone() for state in states.values() for p in state.parameters()}
    try:
        yield
    except BaseException:
        for parameter, value in before.items():
            _set(parameter, value)
        raise


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no compiled code; back to what it was at the end."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, value in training.items():
            module.training = value


def progress_bar(show: bool) -> Progress:
    """On standard error, gone at the end."""
    return Progress(console=Console(stderr=True), transient=True, disable=not show)


def _output(model: nn.Module, call: Inputs, index: int) -> Tensor:
    """The first tensor of two dimensions or more in the output, in float64, without what attention_mask hides."""
    output = call_model(model, call, index)
    leaf = main_output(output)
    if leaf is None:
        raise CalibrationError(f"{type(model).__name__} returns no floating point tensor of two dimensions or more.")
    mask = call[1].get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == leaf.shape[:2]:
        leaf = leaf[mask.to(leaf.device).bool()]
    leaf = leaf.double()
    if not bool(leaf.isfinite().all()):
        raise CalibrationError(f"{type(model).__name__}'s output on batch {index} is not finite.", argument="batches")
    return leaf


def main_output(output: Any) -> Tensor | None:
    """The first floating point tensor of two dimensions or more: hidden states or logits, not a loss."""
    if isinstance(output, Tensor):
        return output if output.dim() > 1 and output.is_floating_point() else None
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for item in items if (found := main_output(item)) is not None), None)
