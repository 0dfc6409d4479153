"""What a conversion did to a model: the converted one beside its softmax original, on the same inputs.

The loss of a language model does not show whether it can still look back, so it is also asked to copy, to recall the
value of a key among many, and to recall over distances (:mod:`sigswap.training.lookups`). Both models run one batch at
a time; what is kept are sums, and of encoders one vector per sample.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.conversion.keeping import quiet, thread_state
from sigswap.conversion.record import owners_of, part_to_pass
from sigswap.conversion.recording import Inputs
from sigswap.conversion.wrappers import runnable
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.training import lookups
from sigswap.training.batches import as_calls, call_model, check_values, main_output, outputs_of, progress_bar
from sigswap.training.comparison_report import (
    Comparison,
    DistanceMeasure,
    Kind,
    LayerMeasure,
    Measure,
    PositionMeasure,
)
from sigswap.training.language import (
    TextInputs,
    check_length,
    check_same_outputs,
    context_length,
    logits_at,
    read_language,
    vocabulary,
    vocabulary_size,
)
from sigswap.training.observe import observed
from sigswap.training.own_batches import check_seed, own_batches
from sigswap.training.row_sums import RowSumObserver, RowSums
from sigswap.training.teaching import Original
from sigswap.transaction import Transaction

NEIGHBOURS = 5
CHUNK = 1024
"""Positions of one sequence whose logits are turned into float32 at once."""
MOST_ASKED = 16 * 8192
"""Tokens of all sequences of one kind of lookup together, of which there are two at least: of 8,192 tokens 16."""
FIRST_SPAN = 16
"""The loss by position is given for the first 16 positions, then up to 32, 64, ..."""


def compare_models(
    model: nn.Module,
    original: nn.Module | None,
    batches: Any,
    *,
    tokens: Any,
    max_length: int | None,
    sequences: int,
    seed: int,
    progress: bool,
) -> Comparison:
    """See :func:`sigswap.compare`, which also opens an original that is saved."""
    model, original = runnable(model), None if original is None else runnable(original, "original")
    states = owners_of(model)
    check_values(model)
    if original is not None:
        check_values(original, "original")
    check_seed(seed)
    for name, value in (("max_length", max_length), ("sequences", sequences)):
        if value is None and name == "max_length":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{{argument}} must be a number, 1 or more, not {value!r}.", argument=name)
    source = model if original is None else original
    modules = dict(source.named_modules())
    missing = [path for path in states if path not in modules]
    if missing:
        raise ArgumentError(
            f"{{argument}} has no module {missing[0]!r}: it must be the model before the conversion.",
            argument="original",
            hint=part_to_pass(model),
        )
    before = Original(source, with_adapters=original is not None)
    notes = []
    if original is None:
        off = "The original is this model with the swap switched off"
        notes.append(
            f"{off}, and so are peft's adapters and what was trained beside them (modules_to_save); all other weights "
            "are the same."
            if before.layers
            else f"{off}, with the weights that it has now."
        )
    calls: Iterable[Inputs]
    if batches is None:
        calls, made = own_batches(model, seed=seed)
        notes.append(f"Without data: compared on {made}. Batches of real inputs say more.")
    else:
        calls = as_calls(batches)
    pair = _Pair(model, before, list(states))
    iterator = iter(enumerate(calls))
    with Transaction() as undo, undo:
        thread_state(undo.on_failure)
        quiet(undo, model, source)
        pair.before.keep(undo)
        bar = progress_bar(undo, progress)
        first = next(iterator, None)
        if first is None:
            raise ArgumentError("{argument} is empty.", argument="batches", hint=Hint("Pass at least one batch."))
        check_length(model, first[1], 0)
        with pair.before.running():
            language = read_language(source, first[1])
        task = bar.add_task("Comparing", total=None)
        sums: Any = None
        most = longest = 0  # tokens of a batch, and of a sequence
        for index, call in itertools.chain([first], iterator):
            check_length(model, call, index)
            both = pair.run(call, index)
            if sums is None:
                sums = _sums_for(language, model, both.output)
            sums.add(call, *both.tensors())
            if isinstance(language, TextInputs):
                ids = language.ids(call)
                most, longest = max(most, ids.numel()), max(longest, ids.shape[-1])
            bar.advance(task)
        kind: Kind = sums.kind
        result = Comparison(kind, index + 1, sums.measures(), [], sums.by_position(), pair.layers(), notes)
        if isinstance(language, TextInputs):
            length = context_length(source) or longest
            asking = _Asking(language, tokens, length if max_length is None else min(length, max_length), most)
            result = asking.added_to(result, pair, sequences, seed, bar)
    return result


@dataclasses.dataclass
class _Both:
    """The outputs of both models on a batch, ``output`` whole and the others' first tensors."""

    output: Any
    converted: Tensor
    original: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.converted, self.original


class _Pair:
    """The converted ``model`` and its ``original``, run side by side; what the modules ``paths`` do is summed up."""

    def __init__(self, model: nn.Module, before: Original, paths: Sequence[str]) -> None:
        self.model, self.before, self.original, self.paths = model, before, before.source, paths
        self.states = owners_of(model)
        self.observer = RowSumObserver()
        self.errors: dict[str, float] = {}
        self.energies: dict[str, float] = {}

    def run(self, call: Inputs, index: int) -> _Both:
        """Both on one batch. Raises CalibrationError if one fails, or they give outputs of different shapes."""
        with self.before.running(), outputs_of(self.original, self.paths) as theirs:
            truth = call_model(self.original, call, index)
        observer: Any = self.observer
        with observed(list(self.states.values()), observer), outputs_of(self.model, self.paths) as ours:
            output = call_model(self.model, call, index)
        y, t = main_output(output), main_output(truth)
        if y is None or t is None:
            raise CalibrationError(
                f"{type(self.model).__name__} returns no floating point tensor of two dimensions or more."
            )
        check_same_outputs(self.model, y, self.original, t, "original")
        mask = call[1].get("attention_mask")
        for (path, a), (_, b) in zip(ours, theirs, strict=True):
            b = b.to(a.device).double()
            if isinstance(mask, Tensor) and mask.shape == a.shape[:2]:
                a, b = (x[mask.to(a.device).bool()] for x in (a, b))
            self.errors[path] = self.errors.get(path, 0.0) + float((a.double() - b).square().sum())
            self.energies[path] = self.energies.get(path, 0.0) + float(b.square().sum())
        return _Both(output, y, t.to(y.device))

    def layers(self) -> list[LayerMeasure]:
        found = []
        for path, state in self.states.items():
            error = self.errors[path] / max(self.energies[path], 1e-300) if path in self.errors else None
            sums = self.observer.owners.get(state, RowSums())
            largest = sums.largest if sums.rows else None
            caps = [site.row_cap for site in state.sites() if site.row_cap is not None]
            found.append(LayerMeasure(path, error, sums.mean, largest, min(caps, default=None)))
        return found


def _sums_for(language: TextInputs | str, model: Any, output: Any) -> Any:
    if isinstance(language, TextInputs):
        return _LanguageSums(language)
    tensor = main_output(output)
    classes = getattr(model, "num_classes", None)
    if getattr(output, "logits", None) is None and not (classes and tensor.shape[-1] == classes):  # type: ignore[union-attr]
        return _VectorSums()
    width = vocabulary_size(model)
    if tensor is not None and tensor.dim() == 3 and width is not None and tensor.shape[-1] >= width:
        pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        return _ClassSums("encoder-decoder" if pair else "token predictor", "token")
    return _ClassSums("classifier", "class")


class _LanguageSums:
    kind: Kind = "language model"

    def __init__(self, inputs: TextInputs) -> None:
        self.inputs = inputs
        # By the number of tokens before: tokens, their loss under the original and under the converted model.
        self.counts = torch.zeros(0, dtype=torch.float64)
        self.losses = torch.zeros(2, 0, dtype=torch.float64)
        self.divergence = self.agreed = 0.0

    def add(self, call: Inputs, y: Tensor, t: Tensor) -> None:
        ids = self.inputs.ids(call).to(y.device)
        visible = _visible(call, ids)
        for row in range(len(ids)):
            before = visible[row].cumsum(0)[:-1]
            asked = (visible[row, :-1] & visible[row, 1:]).nonzero().flatten()
            for part in torch.split(asked, CHUNK) if len(asked) else ():  # of nothing, split makes an empty part
                self._add(y[row, part], t[row, part], ids[row, part + 1].long(), before[part].cpu())

    def _add(self, y: Tensor, t: Tensor, following: Tensor, before: Tensor) -> None:
        new, old = (x.float().log_softmax(-1) for x in (y, t))
        self.divergence += float((old.exp() * (old - new)).sum(-1).double().sum())
        self.agreed += float((new.argmax(-1) == old.argmax(-1)).sum())
        longest = int(before.max()) + 1
        if longest > len(self.counts):
            self.counts = F.pad(self.counts, (0, longest - len(self.counts)))
            self.losses = F.pad(self.losses, (0, longest - self.losses.shape[1]))
        self.counts.index_add_(0, before, torch.ones(len(before), dtype=torch.float64))
        for index, x in enumerate((old, new)):
            loss = -x.gather(-1, following.unsqueeze(-1)).squeeze(-1).double().cpu()
            self.losses[index].index_add_(0, before, loss)

    def measures(self) -> list[Measure]:
        count = float(self.counts.sum())
        if not count:
            raise ArgumentError("{argument} hold no token with another one before it.", argument="batches")
        return [
            Measure("loss", "nats", *(float(x) / count for x in self.losses.sum(1))),
            Measure("KL divergence from the original", "nats", 0.0, self.divergence / count),
            Measure("most likely token agrees", "share", 1.0, self.agreed / count),
        ]

    def by_position(self) -> list[PositionMeasure]:
        spans, start, end = [], 0, FIRST_SPAN
        while start < len(self.counts):
            tokens = float(self.counts[start:end].sum())
            if tokens:
                losses = (float(x) / tokens for x in self.losses[:, start:end].sum(1))
                spans.append(PositionMeasure(start, end, int(tokens), *losses))
            start, end = end, 2 * end
        return spans


class _ClassSums:
    """Of logits, over what is called ``chosen``: a class or a token."""

    def __init__(self, kind: Kind, chosen: str) -> None:
        self.kind, self.chosen = kind, chosen
        self.count = self.labelled = 0
        self.agreed = self.divergence = 0.0
        self.right = [0, 0]

    def add(self, call: Inputs, y: Tensor, t: Tensor) -> None:
        labels = call[1].get("labels")
        chosen = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device)
        mask = call[1].get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == y.shape[:-1]:
            chosen = mask.to(y.device).bool()
        if isinstance(labels, Tensor) and labels.shape == y.shape[:-1] and not labels.is_floating_point():
            labels = labels.to(y.device)
            known = labels >= 0
            self.labelled += int(known.sum())
            for index, x in enumerate((t, y)):
                self.right[index] += int((x.argmax(-1) == labels)[known].sum())
        for a, b in zip(torch.split(y[chosen], CHUNK), torch.split(t[chosen], CHUNK), strict=True):
            new, old = (x.float().log_softmax(-1) for x in (a, b))
            self.divergence += float((old.exp() * (old - new)).sum(-1).double().sum())
            self.agreed += float((new.argmax(-1) == old.argmax(-1)).sum())
            self.count += len(a)

    def measures(self) -> list[Measure]:
        count = max(self.count, 1)
        found = [
            Measure(f"most likely {self.chosen} agrees", "share", 1.0, self.agreed / count),
            Measure("KL divergence from the original", "nats", 0.0, self.divergence / count),
        ]
        if self.labelled:
            found.insert(0, Measure("accuracy", "share", *(right / self.labelled for right in self.right)))
        return found

    def by_position(self) -> list[PositionMeasure]:
        return []


class _VectorSums:
    kind: Kind = "encoder"

    def __init__(self) -> None:
        self.vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.error = self.energy = 0.0

    def add(self, call: Inputs, y: Tensor, t: Tensor) -> None:
        visible = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
        mask = call[1].get("attention_mask")
        if y.dim() == 3 and isinstance(mask, Tensor) and mask.shape == y.shape[:2]:
            visible = mask.to(y.device).bool()
        a, b = y.double(), t.double()
        if y.dim() == 3:
            a, b = a * visible.unsqueeze(-1), b * visible.unsqueeze(-1)
        self.error += float((a - b).square().sum())
        self.energy += float(b.square().sum())
        for kept, x in zip(self.vectors, (b, a), strict=True):
            if y.dim() == 3:  # tokens: the mean of those that are no padding
                x = x.sum(1) / visible.sum(1, keepdim=True).clamp(min=1)
            elif y.dim() > 3:  # maps [B, C, H, W]
                x = x.flatten(2).mean(-1)
            kept.append(F.normalize(x, dim=-1).float().cpu())

    def measures(self) -> list[Measure]:
        truth, ours = (torch.cat(vectors) for vectors in self.vectors)
        found = [Measure("cosine similarity", "", 1.0, float((truth * ours).sum(-1).mean()))]
        if len(truth) > 2 * NEIGHBOURS:
            kept = torch.cat([
                (_nearest(ours, part).unsqueeze(-1) == _nearest(truth, part).unsqueeze(-2)).any(-1).double()
                for part in torch.split(torch.arange(len(truth)), CHUNK)
            ])  # fmt: skip
            found.append(Measure(f"nearest {NEIGHBOURS} neighbours kept", "share", 1.0, float(kept.mean())))
        error = self.error / max(self.energy, 1e-300)
        return [*found, Measure("squared error of the output, relative", "", 0.0, error)]

    def by_position(self) -> list[PositionMeasure]:
        return []


def _nearest(vectors: Tensor, rows: Tensor) -> Tensor:
    """[R, 5]: for each of the ``rows`` [R] of normalised vectors the five others nearest to it."""
    similar = vectors[rows] @ vectors.T
    similar[torch.arange(len(rows)), rows] = -2.0
    return similar.topk(NEIGHBOURS).indices


@dataclasses.dataclass(frozen=True)
class _Asking:
    """What language models can look up, asked in contexts of ``length`` tokens; ``most`` tokens are run at once, or one
    sequence. ``tokens``: see :func:`sigswap.training.language.vocabulary`."""

    language: TextInputs
    tokens: Any
    length: int
    most: int

    def added_to(self, result: Comparison, pair: _Pair, sequences: int, seed: int, bar: Any) -> Comparison:
        probes = self._probes(pair.original, sequences, seed)
        if isinstance(probes, str):
            return dataclasses.replace(result, notes=[*result.notes, f"No lookups were asked: {probes}"])
        task = bar.add_task("Looking up", total=2 * len(probes))
        measures, by_distance = list(result.measures), []
        for probe in probes:
            with pair.before.running():
                original = self._answered(pair.original, probe)
            bar.advance(task)
            converted = self._answered(pair.model, probe)
            bar.advance(task)
            if probe.distance is None:
                measures.append(Measure(probe.name, "share", original, converted))
            else:
                by_distance.append(DistanceMeasure(probe.distance, original, converted))
        asked = ", ".join(f"{probe.name} {probe.ids.shape[0] * len(probe.asked):,}" for probe in probes)
        note = f"Tokens asked in sequences of up to {self.length:,}: {asked}."
        return dataclasses.replace(result, measures=measures, by_distance=by_distance, notes=[*result.notes, note])

    def _probes(self, original: nn.Module, sequences: int, seed: int) -> list[lookups.Probe] | str:
        """The probes, which depend on the arguments alone; in words, why there are none."""
        if self.length < 2 * lookups.SHORTEST:
            return f"{self.length} tokens are too few."
        try:
            ids = vocabulary(original, self.tokens)
        except ArgumentError as error:
            if self.tokens is not None:
                raise
            return error.message

        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(seed)

        kinds = (lookups.copying, lookups.associative_recall)
        probes = [make(sequences, self.length, ids, generator()) for make in kinds]
        for distance in lookups.distances(self.length):
            count = min(sequences, max(2, MOST_ASKED // distance))
            probes.append(lookups.recall_at(distance, count, self.length, ids, generator()))
        return probes

    def _answered(self, model: nn.Module, probe: lookups.Probe) -> float:
        """The share of the asked tokens that are the most likely ones."""
        right = 0
        for ids in torch.split(probe.ids, max(1, self.most // probe.ids.shape[1])):
            guess = logits_at(model, self.language, ids, probe.asked - 1).argmax(-1).cpu()
            right += int((guess == ids[:, probe.asked]).sum())
        return right / (len(probe.ids) * len(probe.asked))


def _visible(call: Inputs, ids: Tensor) -> Tensor:
    """[B, T] bool: the positions that are no padding."""
    kwargs: Mapping[str, Any] = call[1]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.to(ids.device).bool()
    return torch.ones_like(ids, dtype=torch.bool)
