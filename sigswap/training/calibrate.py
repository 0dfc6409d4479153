"""Calibration: the parameters of a conversion from data, so that a pretrained model still works after the swap.

Softmax is sigmoid with the bias ``-log(sum over k != j of exp(s_ik))``, which for attention that is spread out is minus
the row's logsumexp. So c_h and w_h come from a ridge regression of minus the logsumexp on the query, and are then
refitted by Gauss-Newton steps on what counts, the squared error of the attention's outputs. Every pass runs the model
as softmax and only adds to sums (:mod:`sigswap.training.sums`), so memory does not grow with the number of batches.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor, nn

from sigswap.config import check_row_cap
from sigswap.conversion.copies import device_of
from sigswap.conversion.example_inputs import accepts
from sigswap.conversion.install import keep_terms, open_terms
from sigswap.conversion.keeping import quiet, thread_state, values_of
from sigswap.conversion.record import RECORD, conversion_of, note_calibration, owners_of, set_row_cap
from sigswap.conversion.recording import Inputs
from sigswap.conversion.softmax import run_as_softmax, softmax
from sigswap.conversion.state import OwnerState, SiteState
from sigswap.conversion.wrappers import check_undistributed, check_unreduced, runnable, spread_parameter, unwrapped
from sigswap.distributed.adding import spread_added
from sigswap.distributed.heads import DividedHeads, divided_heads
from sigswap.distributed.ranks import CALIBRATION, Ranks
from sigswap.distributed.shards import reshard
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.training.batches import as_calls, call_model, check_values, gone, main_output, progress_bar
from sigswap.training.calibration_report import CalibrationReport, SiteExclusion, SiteRanking
from sigswap.training.fit import SiteFit, fit_channels, fit_norms
from sigswap.training.language import check_length
from sigswap.training.lookups import Lookups
from sigswap.training.mixing import Beside, check_max_length, mixer_for
from sigswap.training.observe import Observer, Phase, needs_recording, observed
from sigswap.training.own_batches import check_seed, own_batches
from sigswap.training.ranks import add_up, check_batches, check_holders, conversions_of
from sigswap.transaction import Transaction, entries

ROW_CAP = 1e-2
"""Of a calibrated decoder: docs/experiments.md has what it is chosen by."""


def calibrate(
    model: nn.Module,
    batches: Any = None,
    *,
    refine: int = 3,
    row_cap: Literal["auto"] | float | None = "auto",
    lookups: bool | float | Lookups = True,
    tokens: Any = None,
    max_length: int | None = None,
    seed: int = 0,
    group: Any = None,
    progress: bool = True,
) -> CalibrationReport:
    """Fits the sigmoid parameters of a converted ``model`` so that it computes what it computed as softmax.

    Per site, whichever its config has: QK-norm's weights, by least squares to the query and key before the norm; c_h
    [heads] and w_h [heads, head_dim], by ridge regression of ``-(logsumexp of the row) - b0`` on the query, in float64;
    with ``first_token`` a_h, too, by regression of the logarithm of what the row sums to beside its first key; all
    again and d_h, by ``refine`` Gauss-Newton steps on the squared error of the attention's output (the fewer the rows,
    the less w_h and a_h move; without data not at all); LayerScale and hybrid-norm, by least squares on the owner's
    output per channel. No head's error gets larger than it was, but for that of a module which gets a row cap or other
    terms as a whole. Rows of padding do not count where they can be told (self-attention whose mask hides a position
    from itself). The base parameters are not changed. Scores are held for one tile at a time, where the model itself
    holds none.

    A decoder is seen on lookups, too (:class:`sigswap.Lookups`), beside the batches: random tokens of its vocabulary
    that repeat, a quarter of all sequences, as long as the user's (of more than 512 tokens as many again in sequences
    of 512). Text does not need looking back, and a bias that is fitted to text alone does not allow it. Where its
    config leaves ``query_bias`` or ``first_token`` open (:class:`sigswap.SigmoidConfig`), a decoder gets w_h, a_h and
    d_h now, and row caps with them. Encoders, encoder-decoders and vision models get none of this.

    Where several processes train one model, each calls this with batches of its own. What they have gathered is added
    up after each pass, so that all get the parameters that one process gets from all the batches, to rounding (beside
    the first key a regression sees at most 2,048 rows of a head, and with more it is other ones). The model may be
    spread, by ``fully_shard`` or tensor parallelism; ranks that hold parts of one copy pass the same batches.

    Args:
        model: converted. It runs in eval mode, without gradients, on the devices that it is on; compiled code is not
            used. ``query_bias=True`` in its config lets it be fitted much better. (A decoder gets that by itself.)
        batches: what the model is called on: a list (or any iterable, a DataLoader say) of tensors, tuples of
            positional arguments or dicts of keyword arguments, or one such batch. A few dozen samples do. It is gone
            through ``refine + 2`` times; an iterator is therefore read into a list. ``None``: inputs made from
            what the model knows of itself (:func:`sigswap.training.own_batches.own_batches`), which is worse than
            real data.
        refine: how many Gauss-Newton steps; each costs a pass over the batches.
        row_cap: a number: each module is fitted with that row cap (:func:`sigswap.set_row_cap`), and keeps it if its
            outputs are nearer to softmax's than they were before. The lower it is the nearer is the model to softmax;
            training may lift it. ``"auto"``: 0.01 for modules with ``first_token`` and without a row cap, and no other.
            ``None``: row caps stay as they are.
        lookups: their share, or a :class:`sigswap.Lookups` with the kinds, too. ``True``: a quarter, if the model is a
            decoder; a share is an error if it is not. ``False`` or 0: none.
        tokens: what lookups are made of: the model's tokenizer, or token ids; as for :func:`sigswap.distill`.
        max_length: of language models: their tokens are also put together to at most four sequences of this length, so
            that the bias is fitted for all positions up to it. The report has the error by position.
        seed: of the inputs that are made without ``batches``.
        group: the torch.distributed process group whose ranks calibrate their copies of the model together, with all
            ranks that hold parts of one of these. ``None``: all ranks, where torch.distributed is initialised.
        progress: shows a progress bar on standard error, if that is a terminal.

    Returns:
        What was measured, per head. It can be printed, plotted and turned into plain data.

    Raises:
        NotConvertedError: the model is not converted.
        ArgumentError: an argument is not as above, the conversion has no parameters to calibrate, or a sequence is
            longer than the model's positions.
        CalibrationError: the model fails on a batch, or gives scores or outputs that are not finite; or ranks of tensor
            parallelism have other batches than one another.
        ConversionError: the model is inside DistributedDataParallel, or its parameters per head are whole beside heads
            that are divided.

    Whatever is raised, the model is as it was.
    """
    check_undistributed(model, "be calibrated", in_parts=True)
    reshard(model)
    part, model = unwrapped(model), runnable(model)
    states, heads = _calibratable(part), divided_heads(part)
    check_values(part)
    if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
        raise ArgumentError(f"{{argument}} must be a number of steps, 0 or more, not {refine!r}.", argument="refine")
    Lookups.of(lookups)
    check_seed(seed)
    ranks = Ranks(CALIBRATION, group)
    given = {"refine": refine, "row_cap": row_cap, "lookups": lookups, "max_length": max_length, "seed": seed}
    check_holders(ranks, heads)
    ranks.check_same(**conversions_of(states), **given)
    notes: list[str] = []
    calls: Iterable[Inputs]
    with ranks.all_or_none():
        if batches is None:
            calls, source = own_batches(part, seed=seed)
            notes.append(f"Without data: calibrated on {source}. Batches of real inputs are better.")
        else:
            calls = as_calls(batches)
        first = _first(calls)
    check_batches(ranks, heads, first, device_of(model))
    scaled = [state for state in states.values() if state.layer_scale is not None or state.norm is not None]
    with Transaction() as undo, undo:
        unchanged_if_it_fails(undo, part)
        quiet(undo, model)
        bar = progress_bar(undo, progress and ranks.rank == 0)
        with ranks.all_or_none():
            seen = _beside(model, calls, first, lookups, tokens, max_length)
        reshard(model)
        if seen.mixer.inputs is not None and (opened := open_terms(undo.on_failure, part)):
            check_unreduced(part, "get the terms that its config leaves open")
            spread_added(undo.on_failure, part)
            notes.append(
                f"The model is a decoder: {len(opened)} of {len(states)} modules have the terms now that their config "
                f"left open ({_terms_of(states[path] for path in opened)})."
            )
        caps = _caps_to_try(states, row_cap)
        fits = {
            site: SiteFit(site, without_data=batches is None, row_cap=caps.get(path))
            for path, state in states.items()
            for site in state.sites()
        }
        normed = any(site.query_norm is not None for site in fits)
        total = 2 + refine + (1 if normed else 0) + (1 if scaled else 0)
        passes = _Passes(model, states, seen, ranks, heads)
        task = bar.add_task("Calibrating", total=None)

        def run(phase: Phase) -> Observer:
            observer = Observer(phase, passes.among)
            with ranks.all_or_none() if not passes.by_parts else nullcontext():
                for count in passes.run(observer):
                    bar.update(task, advance=1, total=None if count is None else count * total)
            reshard(model)
            add_up(ranks, observer, list(states.values()), heads)
            return observer

        if normed:
            for site, sums in run("norms").sites.items():
                fit_norms(site, sums, _path_of(states, site))
        observer = run("logsumexp")
        for site, fit in fits.items():
            fit.before(observer.sites.get(site), _path_of(states, site))
        for _ in range(refine):
            _each(fits, states, run("outputs"), step=True)
        _each(fits, states, run("outputs"), step=False)
        kept = {path: cap for path, cap in caps.items() if _cap_pays([fits[site] for site in states[path].sites()])}
        for path in caps.keys() - kept:
            for site in states[path].sites():
                fits[site].revert_cap()
        if scaled:
            fit_channels(scaled, run("channels").owners)
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
        notes += seen.notes()
        if kept:
            set_row_cap(part, kept)
            notes.append(f"{len(kept)} of {len(states)} modules have the row cap {next(iter(kept.values())):.4g} now.")
        sites = [(path, *item) for path, state in states.items() for item in enumerate(state.sites())]
        records = [record for path, index, site in sites for record in fits[site].records(path, index)]
        lengths = [record for path, index, site in sites for record in fits[site].length_records(path, index)]
        result = CalibrationReport(records, seen.given, notes, lengths)
        note_calibration(part, " ".join([result.summary(), *notes]), max(fit.longest for fit in fits.values()))
    return result


def rank_sites(model: nn.Module, batches: Any, *, progress: bool = True) -> SiteRanking:
    """How much nearer the model's output would be to the softmax model's if single modules had stayed softmax.

    Each converted module in turn runs as softmax, and the relative squared error of the model's output (its first
    tensor of two dimensions or more; positions that ``attention_mask`` hides do not count) is measured; then again
    for the best one, the best two, and so on, together. That costs twice as many runs over ``batches`` as there are
    converted modules: pass one or two batches. Arguments and errors are those of :func:`calibrate`.
    """
    model = runnable(model)
    states = owners_of(model)
    check_values(model)
    calls = list(as_calls(batches))
    with Transaction() as undo, undo:
        thread_state(undo.on_failure)
        quiet(undo, model)
        bar = progress_bar(undo, progress)
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


class _Passes:
    """Runs a model over its batches under an observer."""

    def __init__(
        self,
        model: nn.Module,
        states: Mapping[str, OwnerState],
        calls: Iterable[Inputs],
        ranks: Ranks,
        heads: DividedHeads,
    ) -> None:
        self.model, self.states, self.calls, self.ranks, self.heads = model, states, calls, ranks, heads
        self.by_parts = ranks.size > 1 and spread_parameter(model) is not None
        self.device = device_of(model)
        self.among = {site: heads.among(state) for state in states.values() for site in state.sites()}

    def run(self, observer: Observer) -> Iterator[int | None]:
        """One pass; yields the number of batches, as far as it is known, after each."""
        states = list(self.states.values())
        twice = needs_recording(states, observer.phase)
        count = operator.length_hint(self.calls, -1)
        index = -1
        last: Inputs = ((), {})
        for index, call in enumerate(self._in_step() if self.by_parts else self.calls):
            # Of the one in place of another nothing is looked at.
            again = observer if call is not None else Observer(observer.phase, self.among)
            last = last if call is None else call
            check_length(self.model, last, index)
            again.recorded.clear()
            with observed(states, again):
                for again.recording in (True, False) if twice else (False,):
                    call_model(self.model, last, index)
            yield count if count >= 0 else None
        if index < 0:
            raise gone()

    def _in_step(self) -> Iterator[Inputs | None]:
        """The calls, and None as long as other ranks have more: each of them is needed to bring parameters together."""
        calls = iter(self.calls)
        while True:
            call: Inputs | None = None
            problem: Exception | None = None
            try:
                call = next(calls, None)
            except Exception as error:
                problem = error
            if any(failed for (failed,) in self.ranks.numbers(int(problem is not None), device=self.device)):
                self.ranks.agree(problem)
            if not any(check_batches(self.ranks, self.heads, call, self.device)):
                return
            yield call


def _first(calls: Iterable[Inputs]) -> Inputs:
    first = next(iter(calls), None)
    if first is None:
        raise ArgumentError(
            "{argument} is empty.",
            argument="batches",
            hint=Hint("Pass at least one batch, or {batches} to calibrate without data.", {"batches": "None"}),
        )
    return first


def _beside(
    model: nn.Module,
    calls: Iterable[Inputs],
    first: Inputs,
    lookups: bool | float | Lookups,
    tokens: Any,
    max_length: int | None,
) -> Beside:
    """``calls``, of which one is ``first``, with what a decoder is to be seen on beside them."""
    check_length(model, first, 0)
    with softmax(model):
        mixer = mixer_for(lookups, tokens, model, first)
    check_max_length(model, max_length, mixer)
    return Beside(calls, mixer, max_length, one_logit=accepts(model, "logits_to_keep"))


def _each(
    fits: Mapping[SiteState, SiteFit], states: Mapping[str, OwnerState], observer: Observer, *, step: bool
) -> None:
    for site, fit in fits.items():
        fit.after(observer.sites.get(site), step=step, path=_path_of(states, site))


def _calibratable(model: nn.Module) -> dict[str, OwnerState]:
    conversion_of(model)
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


def _terms_of(states: Iterable[OwnerState]) -> str:
    """Those for the query and for the first key that some of the modules have, as the config calls them."""
    sites = [site for state in states for site in state.sites()]
    has = {
        "query_bias": any(site.query_weight is not None for site in sites),
        "first_token": any(site.length_share is not None for site in sites),
    }
    return ", ".join(name for name, there in has.items() if there)


def _caps_to_try(states: Mapping[str, OwnerState], row_cap: Literal["auto"] | float | None) -> dict[str, float]:
    """By path."""
    if row_cap is None:
        return {}
    if row_cap == "auto":
        return {
            path: ROW_CAP
            for path, state in states.items()
            if all(site.length_share is not None and site.row_cap is None for site in state.sites())
        }
    check_row_cap(row_cap)
    return dict.fromkeys(states, float(row_cap))


def _cap_pays(fits: Sequence[SiteFit]) -> bool:
    """Whether the heads of one module are nearer to softmax with the row cap than they were before."""
    pairs = [(fit.first, fit.error) for fit in fits if fit.first is not None and fit.error is not None]
    after = sum(float(error.sum()) for _, error in pairs)
    return bool(pairs) and after < sum(float(first.sum()) for first, _ in pairs)


def _path_of(states: Mapping[str, OwnerState], site: SiteState) -> str:
    return next(path or "the model" for path, state in states.items() if site in state.sites())


def unchanged_if_it_fails(undo: Transaction, model: nn.Module) -> None:
    """Notes all that a calibration changes for good of a converted ``model``."""
    states = owners_of(model)
    thread_state(undo.on_failure)
    undo.on_failure("the record of the conversion", entries(vars(model), RECORD))
    for state in states.values():
        keep_terms(undo.on_failure, state)
        for site in state.sites():
            undo.on_failure("the row cap", entries(vars(site), "row_cap", "fitted_length"))
    parameters = [parameter for state in states.values() for parameter in state.parameters()]
    undo.on_failure("sigswap's parameters", values_of(parameters))


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
