"""Which positions of a sequence a rank has, and which blocks of scores its rows share with another rank's keys.

Balanced, the sequence is cut into 2n chunks for n ranks, and rank r has the chunks r and 2n - 1 - r, one behind the
other: under a causal mask all ranks then have the same number of scores. PyTorch's ``context_parallel`` and others
lay a sequence out in the same way. Else rank r has the r-th of n parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Chunk(NamedTuple):
    """The positions ``start`` ... ``stop`` - 1 of the sequence, at ``at`` and behind it among those of a rank."""

    start: int
    stop: int
    at: int

    def cut(self, start: int, stop: int) -> Chunk:
        """What it has of an interval; empty where stop <= start."""
        first = max(self.start, start)
        return Chunk(first, min(self.stop, stop), self.at + first - self.start)


class Layout(NamedTuple):
    """``length``: of each rank's part."""

    length: int
    ranks: int
    balanced: bool

    @property
    def total(self) -> int:
        return self.length * self.ranks

    def chunks(self, rank: int) -> tuple[Chunk, ...]:
        if not self.balanced:
            return (Chunk(rank * self.length, (rank + 1) * self.length, 0),)
        half = self.length // 2
        tail = 2 * self.ranks - 1 - rank
        return Chunk(rank * half, (rank + 1) * half, 0), Chunk(tail * half, (tail + 1) * half, half)


class Band(NamedTuple):
    """Position i sees the positions i - left ... i + right; None: no limit on that side."""

    left: int | None
    right: int | None


class Segment(NamedTuple):
    """The positions ``start`` ... ``stop`` - 1 see one another, and none else: a document, or what is no padding."""

    start: int
    stop: int


Segments = tuple[tuple[Segment, ...], ...]
"""By row of the batch; one entry: of all rows of the batch."""


class Call(NamedTuple):
    """A block of scores: the rows ``rows`` of the row ``batch`` of the batch (None: all) and the keys ``keys``, as
    slices of a rank's part.

    Its row i sees its keys i - left ... i + right; -1: no limit on that side.
    """

    batch: int | None
    rows: slice
    keys: slice
    left: int
    right: int

    @property
    def is_full(self) -> bool:
        return self.left < 0 and self.right < 0


def calls_of(rows: Sequence[Chunk], keys: Sequence[Chunk], band: Band, segments: Segments) -> list[Call]:
    """The blocks that hold all visible scores of ``rows`` and ``keys``, each once, in as few calls as they allow."""
    found: list[Call] = []
    for number, of_row in enumerate(segments):
        batch = None if len(segments) == 1 else number
        for segment in of_row:
            found += _calls_of_segment(batch, _inside(rows, segment), _inside(keys, segment), band)
    return found


def range_of(calls: Sequence[Call]) -> slice:
    """The keys that the calls need; empty if there is no call."""
    if not calls:
        return slice(0, 0)
    return slice(min(call.keys.start for call in calls), max(call.keys.stop for call in calls))


def _inside(chunks: Sequence[Chunk], segment: Segment) -> list[Chunk]:
    return [cut for chunk in chunks if _length(cut := chunk.cut(*segment)) > 0]


def _calls_of_segment(batch: int | None, rows: list[Chunk], keys: list[Chunk], band: Band) -> list[Call]:
    if rows and rows == keys and band.left is None and band.right == 0:
        # A rank's own chunks rise, and lie one behind the other: the mask is that of the positions in its part.
        own = slice(rows[0].at, rows[-1].at + _length(rows[-1]))
        return [Call(batch, own, own, -1, 0)]
    pairs = [call for row in rows for key in keys if (call := _call(batch, row, key, band)) is not None]
    return _joined(_joined(pairs, keys=True), keys=False)


def _call(batch: int | None, row: Chunk, key: Chunk, band: Band) -> Call | None:
    if band.right is not None:
        row = row.cut(key.start - band.right, row.stop)
    if band.left is not None:
        row = row.cut(row.start, key.stop + band.left)
    if _length(row) <= 0:
        return None
    if band.left is not None:
        key = key.cut(row.start - band.left, key.stop)
    if band.right is not None:
        key = key.cut(key.start, row.stop + band.right)
    if _length(key) <= 0:
        return None
    shift = key.start - row.start
    left = right = -1
    if band.left is not None and key.start < row.stop - 1 - band.left:  # its last row does not see its first key
        left = band.left + shift
    if band.right is not None and key.stop - 1 > row.start + band.right:
        right = band.right - shift
    return Call(batch, _slice(row), _slice(key), left, right)


def _joined(calls: list[Call], *, keys: bool) -> list[Call]:
    """Full blocks of the same rows (keys) whose keys (rows) lie one behind the other are one."""
    done: list[Call] = []
    for call in calls:
        for at, other in enumerate(done):
            same = other.rows == call.rows if keys else other.keys == call.keys
            before, behind = (other.keys, call.keys) if keys else (other.rows, call.rows)
            if same and before.stop == behind.start and call.is_full and other.is_full:
                both = slice(before.start, behind.stop)
                done[at] = other._replace(keys=both) if keys else other._replace(rows=both)
                break
        else:
            done.append(call)
    return done


def _length(chunk: Chunk) -> int:
    return chunk.stop - chunk.start


def _slice(chunk: Chunk) -> slice:
    return slice(chunk.at, chunk.at + _length(chunk))
