"""Lookups, and sequences of other lengths, in the batches of a distillation or a calibration of a decoder.

A distillation gets them in place of some of the user's sequences (:class:`Mixer`), so that a step costs what it did; a
calibration, to which a user gives few, beside them (:class:`Beside`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sigswap.conversion.recording import Inputs
from sigswap.errors import ArgumentError, Hint
from sigswap.training.language import TextInputs, context_length, read_language, vocabulary
from sigswap.training.lookups import SHORTEST, Lookups

LONG = 4
"""Sequences of the greatest length that a calibration makes of the user's, at most."""
SHORT_LOOKUP = 512
"""Tokens of the lookups that a calibration is seen on beside longer ones."""


class Place(NamedTuple):
    """Where a batch is in the one that all ranks' batches are together: so many sequences are ``before`` it, of
    ``total``. ``shortest``: the length of the shortest ones."""

    before: int
    total: int
    shortest: int


class Mixer:
    """Puts ``lookups`` into batches, and gives them other lengths. What step s gets depends on s and on the sizes of
    the batches before it alone.

    Without ``lookups`` there are none; ``reason`` says why. ``inputs``: how a decoder is called; None: it is none.
    ``lengths``: of the sequences, one for each step, at random; none: they stay as they are.
    """

    def __init__(
        self,
        lookups: Lookups | None,
        inputs: TextInputs | None,
        tokens: Tensor | None,
        reason: str = "",
        lengths: Sequence[int] = (),
    ) -> None:
        self.lookups, self.inputs, self.tokens, self.reason, self.lengths = lookups, inputs, tokens, reason, lengths
        self.sequences = self.mixed = 0

    def __call__(self, call: Inputs, step: int, place: Place | None = None) -> Inputs:
        """``call`` with lookups for so many of its rows that their share of all sequences so far is as asked for.

        They are as long as the batch, without padding; labels are the ids. Sequences below 8 tokens get none.
        ``place``: of a batch that is a part of a larger one, which gets what it would get as one; None: it is none.
        """
        if self.lookups is None or self.inputs is None or self.tokens is None:
            return call
        ids = self.inputs.ids(call)
        before, total, shortest = (0, *ids.shape) if place is None else place
        self.sequences += total
        owed = int(self.lookups.share * self.sequences) - self.mixed
        count = min(owed, total) if shortest >= SHORTEST else 0
        if count <= 0:
            return call
        self.mixed += count
        made = self.lookups.sequences(count, ids.shape[-1], self.tokens, step)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.lookups.seed + step))
        rows = order[:count] - before
        own = (rows >= 0) & (rows < len(ids))
        if not bool(own.any()):
            return call
        made, rows = made[own], rows[own].to(ids.device)
        ids = ids.clone()
        ids[rows] = made.to(ids)
        args, kwargs = call
        new: dict[str, Any] = dict(kwargs)
        counted = torch.arange(ids.shape[-1])
        for name, value in (("attention_mask", 1), ("position_ids", counted), ("token_type_ids", 0), ("labels", made)):
            beside = new.get(name)
            if isinstance(beside, Tensor) and len(beside) == len(ids):
                new[name] = beside.clone()
                new[name][rows.to(beside.device)] = torch.as_tensor(value).to(beside)
        if self.inputs.keyword is None:
            return (ids, *args[1:]), new
        return args, {**new, self.inputs.keyword: ids}

    def size(self, call: Inputs) -> tuple[int, int]:
        """The sequences of a batch and their length, where it may get lookups; else zeros."""
        if self.lookups is None or self.inputs is None:
            return 0, 0
        rows, length = self.inputs.ids(call).shape
        return rows, length

    def cut(self, call: Inputs, step: int) -> Inputs:
        """The tokens of ``call``, one row behind the other, in sequences of one of the lengths, if some were given."""
        if not self.lengths or self.inputs is None:
            return call
        inputs = self.inputs
        chosen = int(torch.randint(len(self.lengths), (1,), generator=torch.Generator().manual_seed(step)))
        tokens = _tokens(inputs, call)
        if not len(tokens):
            return call
        args, kwargs = inputs.call(_cut(tokens, self.lengths[chosen]))
        others = {name: value for name, value in call[1].items() if not isinstance(value, Tensor)}
        return args, {**others, **kwargs}

    def __str__(self) -> str:
        """What was mixed in, as a report says it."""
        if self.lookups is None:
            return f"no lookups mixed in ({self.reason})"
        kinds = " and ".join(self.lookups.kinds)
        return f"lookups ({kinds} of random tokens): {self.mixed} of {self.sequences} sequences"


def mixer_for(
    given: float | bool | Lookups, tokens: Any, model: nn.Module, call: Inputs, lengths: Sequence[int] | None = None
) -> Mixer:
    """The mixer that distill's arguments ``lookups`` and ``lengths`` ask for, by a ``call`` of ``model``, which is in
    eval mode.

    True mixes them in where the model is a decoder and its vocabulary is large enough. Raises ArgumentError if a share
    is asked for in numbers, or are lengths, and that cannot be.
    """
    lookups = Lookups.of(given)
    inputs = read_language(model, call)
    lengths = _checked("lengths", lengths, model, inputs) if lengths is not None else ()
    if isinstance(inputs, str):
        if lookups.share and given is not True:
            raise _for_language_models("lookups", inputs, "False")
        return Mixer(None, None, None, inputs)
    if not lookups.share:
        return Mixer(None, inputs, None, _OFF, lengths)
    try:
        return Mixer(lookups, inputs, vocabulary(model, tokens), lengths=lengths)
    except ArgumentError as error:
        if given is not True or tokens is not None:
            raise
        return Mixer(None, inputs, None, error.message.rstrip("."), lengths)


class Beside:
    """The ``calls`` of a calibration, and beside them what a language model is to be seen on, too.

    After each call come so many lookups, in sequences as long as its own, that they are the share of all sequences that
    ``mixer`` asks for, rounded up. Of more than 512 tokens there are as many again in rows of 512: a few long sequences
    have few periods, and a bias that is fitted to these alone looks back worse (docs/experiments.md). With
    ``max_length`` there are at last up to four sequences of that length, which the user's tokens make in their order,
    without padding (one that is shorter, if they are fewer), and lookups of it. Each pass gives the same. Calls are
    without labels, and ask for one token's logits, where the model can do that: a long sequence's would be the largest
    tensor by far.
    """

    def __init__(self, calls: Iterable[Inputs], mixer: Mixer, max_length: int | None, *, one_logit: bool) -> None:
        self.calls, self.mixer, self.max_length, self.one_logit = calls, mixer, max_length, one_logit
        self.given = self.made = 0  # in the last pass: calls of the user's, and lookups of their length
        self.short = 0  # lookups of 512 tokens beside longer ones
        self.long: list[int] = []  # the lengths of the long sequences
        self.passed: int | None = None  # calls in a whole pass

    def __iter__(self) -> Iterator[Inputs]:
        passed = 0
        for call in self._each():
            passed += 1
            yield call
        self.passed = passed

    def __length_hint__(self) -> int:
        """How many calls there are; about how many before the first pass."""
        if self.passed is not None:
            return self.passed
        given = operator.length_hint(self.calls, -1)
        if given < 0:
            return NotImplemented  # type: ignore[no-any-return]
        return given if self.mixer.lookups is None else 2 * given

    def _each(self) -> Iterator[Inputs]:
        self.given = self.made = self.short = 0
        self.long = []
        inputs, sequences = self.mixer.inputs, 0
        held: list[Tensor] = []
        for call in self.calls:
            self.given += 1
            yield call if inputs is None else self._lean(call)
            if inputs is None:
                continue
            rows, length = inputs.ids(call).shape
            sequences += rows
            yield from self._lookups(self._owed(sequences) - self.made, length)
            if self.max_length is not None and sum(map(len, held)) < LONG * self.max_length:
                held.append(_tokens(inputs, call).cpu())
        if inputs is None or self.max_length is None or not any(map(len, held)):
            return
        for row in _cut(torch.cat(held), self.max_length)[:LONG]:
            self.long.append(len(row))
            yield self._lean(inputs.call(row.unsqueeze(0)))
        yield from self._lookups(self._owed(len(self.long)), self.long[0])

    def notes(self) -> list[str]:
        """What the last pass gave beside the user's batches."""
        found = []
        if self.long:
            found.append(f"Also seen: {len(self.long)} sequences of {self.long[0]:,} tokens, made of those given.")
        if self.made and self.mixer.lookups is not None:
            kinds = " and ".join(self.mixer.lookups.kinds)
            short = f", and {self.short} of {SHORT_LOOKUP} tokens" if self.short else ""
            found.append(f"Also seen: {self.made} lookups ({kinds} of random tokens){short}.")
        return found

    def _owed(self, sequences: int) -> int:
        """How many lookups there are beside so many ``sequences``."""
        share = 0.0 if self.mixer.lookups is None else self.mixer.lookups.share
        return math.ceil(sequences * share / (1 - share))

    def _lookups(self, count: int, length: int) -> Iterator[Inputs]:
        mixer = self.mixer
        if count <= 0 or mixer.lookups is None or mixer.inputs is None or mixer.tokens is None or length < SHORTEST:
            return
        ids = mixer.lookups.sequences(count, length, mixer.tokens, self.made)
        yield self._lean(mixer.inputs.call(ids))
        self.made += count
        if length > SHORT_LOOKUP:
            rows = count * (length // SHORT_LOOKUP)
            ids = mixer.lookups.sequences(rows, SHORT_LOOKUP, mixer.tokens, -self.made)  # other ones than the long
            yield self._lean(mixer.inputs.call(ids))
            self.short += rows

    def _lean(self, call: Inputs) -> Inputs:
        args, kwargs = call
        kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
        return args, {**kwargs, "logits_to_keep": 1} if self.one_logit else kwargs


def check_max_length(model: nn.Module, max_length: int | None, mixer: Mixer) -> None:
    """Raises ArgumentError for a length of a calibration's sequences that is not allowed."""
    if max_length is not None:
        reason = mixer.reason if mixer.inputs is None else mixer.inputs
        _checked("max_length", [max_length], model, reason)


_OFF = "they are switched off"


def _checked(name: str, lengths: Sequence[int], model: nn.Module, inputs: TextInputs | str) -> tuple[int, ...]:
    """``lengths`` of sequences, the argument ``name``. Raises ArgumentError."""
    allowed = isinstance(lengths, Sequence) and not isinstance(lengths, str) and len(lengths) > 0
    for length in lengths if allowed else ():
        allowed = allowed and isinstance(length, int) and not isinstance(length, bool) and length >= 2
    if not allowed:
        what, shown = ("numbers", lengths) if name == "lengths" else ("a number", lengths[0])
        raise ArgumentError(f"{{argument}} must be {what} of tokens, 2 or more, not {shown!r}.", argument=name)
    if isinstance(inputs, str):
        raise _for_language_models(name, inputs, "None")
    context = context_length(model)
    if context is not None and max(lengths) > context:
        raise ArgumentError(
            f"{{argument}}: {max(lengths)} tokens are more than {type(model).__name__} has positions for, {context}.",
            argument=name,
        )
    return tuple(lengths)


def _for_language_models(name: str, reason: str, without: str) -> ArgumentError:
    return ArgumentError(
        f"{{argument}} can be given for language models only: {reason}.",
        argument=name,
        hint=Hint(f"Pass {{{name}}}.", {name: without}),
    )


def _tokens(inputs: TextInputs, call: Inputs) -> Tensor:
    """The token ids of a call, one row behind the other, without padding."""
    ids, mask = inputs.ids(call), call[1].get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return ids[mask.to(ids.device).bool()]
    return ids.flatten()


def _cut(ids: Tensor, length: int) -> Tensor:
    """Token ids [T] as rows [T // length, length]; as one row, if they are fewer."""
    length = min(length, len(ids))
    rows = len(ids) // length if length else 0
    return ids[: rows * length].view(rows, length)
