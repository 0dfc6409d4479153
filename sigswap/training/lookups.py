"""Sequences of random tokens that can be predicted only by looking back: what distillation mixes in, what compare asks.

Text does not need lookups, so a model that learns from text alone loses them, and its loss does not show it. These
sequences need no data: they are made of the model's own vocabulary (:mod:`sigswap.training.language`). Those that are
*mixed* into training (:data:`MIXED_KINDS`) and those that are *asked* of a model (:class:`Probe`) are kept apart: a
probe of recall has pairs of a key and a value, in an order that is never that of a repeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sigswap.errors import ArgumentError

SHARE = 0.25
"""The share of the sequences of a language model's distillation that lookups take, by default."""
SHORTEST = 8
"""Tokens that a sequence of lookups has at least."""
PERIOD = 32
"""The shortest period of a repeat, where the sequence has room for two of them."""
EDITED = 0.05
"""Of a repeat with edits, the share of tokens that are replaced; as many are left out, and as many put in."""
PART = 4
"""Tokens of a key, and of a value. SmolLM2-135M with softmax finds 35% of 32 such pairs, and 5% with one token each."""
ASKED_PAIRS, NEAR_PAIRS = 32, 4
"""The pairs of a probe of associative recall, and of recall at a distance."""
ASKED_LENGTH = 400
"""The tokens of a probe of copying: 200, and the same again."""


@dataclasses.dataclass(frozen=True)
class Lookups:
    """What :func:`sigswap.distill` mixes into the batches of a language model.

    Attributes:
        share: of the sequences, between 0 and 1: in place of so many of the user's.
        kinds: the kinds in equal parts, of "repeats" (random tokens with a period of 32 to half the sequence),
            "edits" (the same, where in each repeat 5% of the tokens are replaced, 5% left out and 5% put in) and
            "lists" (keys, each with its value; then the pairs again, in another order each time). "lists" are near to
            what :func:`sigswap.compare` asks as associative recall: its figure says less when they are mixed in.
        seed: of the sequences.
    """

    share: float = SHARE
    kinds: Sequence[str] = ("repeats", "edits")
    seed: int = 0

    def __post_init__(self) -> None:
        share = self.share
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share < 1:
            raise ArgumentError(f"{{argument}} must be a share from 0 to below 1, not {share!r}.", argument="lookups")
        unknown = [kind for kind in self.kinds if kind not in MIXED_KINDS]
        if isinstance(self.kinds, str) or unknown or not self.kinds:
            raise ArgumentError(
                f"{{argument}}: the kinds must be some of {list(MIXED_KINDS)}, not {self.kinds!r}.", argument="lookups"
            )

        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ArgumentError(
                f"{{argument}}: the seed must be a whole number, not {self.seed!r}.", argument="lookups"
            )

    @classmethod
    def of(cls, given: float | bool | Lookups) -> Lookups:
        """``given`` as distill takes it: a share, False for none, True for the default. Raises ArgumentError."""
        if isinstance(given, Lookups):
            return given
        return cls() if given is True else cls(share=0.0 if given is False else given)

    def sequences(self, count: int, length: int, vocabulary: Tensor, step: int) -> Tensor:
        """[count, length] int64 token ids, the same for the same ``step``; the kinds take turns."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        first = int(torch.randint(len(self.kinds), (1,), generator=generator))
        rows = [
            MIXED_KINDS[self.kinds[(first + row) % len(self.kinds)]](length, vocabulary, generator)
            for row in range(count)
        ]
        return torch.stack(rows)


@dataclasses.dataclass(frozen=True)
class Probe:
    """A question about lookups: ``ids`` [B, T] int64, whose tokens at the ``asked`` positions [A] (in all rows the
    same) follow from those before them, and from nothing else. ``distance``: how far back, in tokens, on average."""

    name: str
    ids: Tensor
    asked: Tensor
    distance: int | None = None


def copying(count: int, length: int, vocabulary: Tensor, generator: torch.Generator) -> Probe:
    """Random tokens, repeated once; asked is the second half, without its first token, which nothing announces."""
    half = min(length, ASKED_LENGTH) // 2
    ids = _random(vocabulary, (count, half), generator).repeat(1, 2)
    return Probe("copying", ids, torch.arange(half + 1, 2 * half))


def associative_recall(count: int, length: int, vocabulary: Tensor, generator: torch.Generator) -> Probe:
    """Many pairs of a key and a value, of four tokens each, then the same pairs in another order; asked are the values'
    tokens there."""
    pairs = min(ASKED_PAIRS, length // (4 * PART), _most_pairs(vocabulary))
    name = f"associative recall, {pairs} pairs"
    return _recall(name, count, pairs, 0, vocabulary, generator)


def recall_at(distance: int, count: int, length: int, vocabulary: Tensor, generator: torch.Generator) -> Probe:
    """Pairs of a key and a value, other tokens, then the same pairs in another order, ``distance`` tokens later."""
    pairs = min(near_pairs(length), _most_pairs(vocabulary))
    between = distance - 2 * PART * pairs
    return _recall(f"recall at {distance} tokens", count, pairs, between, vocabulary, generator, distance)


def near_pairs(length: int) -> int:
    """How many pairs a probe of recall at a distance has, in a context of ``length`` tokens."""
    return max(1, min(NEAR_PAIRS, length // (8 * PART)))


def _most_pairs(vocabulary: Tensor) -> int:
    """Half of the vocabulary is for keys and values, the other half for the tokens between."""
    return max(1, len(vocabulary) // (4 * PART))


def distances(length: int) -> list[int]:
    """The distances at which recall is asked in a context of ``length`` tokens: powers of 4, and the largest."""
    near = 2 * PART * near_pairs(length)
    largest = length - near
    found = [4**power for power in range(2, 16) if near <= 4**power and 4**power * 1.5 < largest]
    return [*found, largest] if largest >= near else []


def _recall(
    name: str,
    count: int,
    pairs: int,
    between: int,
    vocabulary: Tensor,
    generator: torch.Generator,
    distance: int | None = None,
) -> Probe:
    """No token of a key or a value is in another pair, or between: what is asked has one answer."""
    rows = []
    size = 2 * PART * pairs
    for _ in range(count):
        shuffled = vocabulary[torch.randperm(len(vocabulary), generator=generator)]
        first, others = shuffled[:size].view(pairs, 2 * PART), shuffled[size:]
        second = first[torch.randperm(pairs, generator=generator)]
        rows.append(torch.cat([first.flatten(), _random(others, (between,), generator), second.flatten()]))
    values = torch.arange(size).view(pairs, 2, PART)[:, 1].flatten()
    return Probe(name, torch.stack(rows), size + between + values, distance)


def _repeats(length: int, vocabulary: Tensor, generator: torch.Generator) -> Tensor:
    segment = _segment(length, vocabulary, generator)
    return segment.repeat(-(-length // len(segment)))[:length]


def _edits(length: int, vocabulary: Tensor, generator: torch.Generator) -> Tensor:
    segment = _segment(length, vocabulary, generator)
    parts = [segment]
    while sum(len(part) for part in parts) < length:
        parts.append(_edited(segment, vocabulary, generator))
    return torch.cat(parts)[:length]


def _edited(segment: Tensor, vocabulary: Tensor, generator: torch.Generator) -> Tensor:
    """Never empty."""
    fate = torch.rand(len(segment), generator=generator)
    random = _random(vocabulary, (2 * len(segment),), generator).view(2, -1)
    replaced = torch.where(fate < EDITED, random[0], segment)
    times = torch.ones_like(segment)
    times[fate > 1 - EDITED] = 0
    times[(fate > 0.5) & (fate < 0.5 + EDITED)] = 2
    times[0] = times[0].clamp(min=1)
    # Where each token of the result comes from. Tensor.repeat_interleave wakes all threads for a few numbers, which
    # took longer than a step of a small model.
    ends = times.cumsum(0)
    source = torch.searchsorted(ends, torch.arange(int(ends[-1])), right=True)
    edited = replaced[source]
    second = torch.arange(len(source)) - (ends - times)[source] == 1
    edited[second] = random[1][source][second]
    return edited


def _lists(length: int, vocabulary: Tensor, generator: torch.Generator) -> Tensor:
    most = min(length // 4, len(vocabulary) // 2)
    pairs = _between(min(PERIOD // 2, most), most, generator)
    shuffled = vocabulary[torch.randperm(len(vocabulary), generator=generator)]
    table = torch.stack([shuffled[:pairs], _random(shuffled[pairs:], (pairs,), generator)], 1)
    orders = [torch.randperm(pairs, generator=generator) for _ in range(-(-length // (2 * pairs)))]
    return table[torch.cat(orders)].flatten()[:length]


MIXED_KINDS: dict[str, Callable[[int, Tensor, torch.Generator], Tensor]] = {
    "repeats": _repeats,
    "edits": _edits,
    "lists": _lists,
}
"""By name, what makes one sequence [length] from the vocabulary [V]."""


def _segment(length: int, vocabulary: Tensor, generator: torch.Generator) -> Tensor:
    """Random tokens that fill a sequence of ``length`` at least twice."""
    return _random(vocabulary, (_between(min(PERIOD, length // 2), length // 2, generator),), generator)


def _random(vocabulary: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return vocabulary[torch.randint(len(vocabulary), shape, generator=generator)]


def _between(least: int, most: int, generator: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (1,), generator=generator))
