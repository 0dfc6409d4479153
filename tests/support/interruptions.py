"""Exceptions that come at a given line of the code that runs, as Ctrl-C would, or a debugger's user."""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
OWN = tuple(f"{ROOT / folder}/" for folder in ("sigswap", "passes", "kernels"))
"""Where the project's code is. The standard library's is not interrupted: what a test does not see is left to it."""


class Line(NamedTuple):
    """The ``turn``-th time, from 0, that a line runs."""

    file: str
    number: int
    turn: int


class _Trace:
    """Sees each line of the project's code; ``at`` one of them it raises ``error``."""

    def __init__(self, at: Line | None = None, error: BaseException | None = None) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        self.at, self.error, self.raised = at, error, False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self.line if frame.f_code.co_filename.startswith(OWN) else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.raised:
            key = frame.f_code.co_filename, frame.f_lineno
            turn = self.counts[key]
            self.counts[key] += 1
            if self.at == (*key, turn) and self.error is not None:
                self.raised = True
                raise self.error
        return self.line

    def run(self, call: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            return call()
        finally:
            sys.settrace(before)


def lines_of(call: Callable[[], Any], turns: int = 1) -> list[Line]:
    """The lines that ``call`` runs, in no order: of each the first ``turns`` times and the last one."""
    trace = _Trace()
    trace.run(call)
    return [
        Line(file, number, turn)
        for (file, number), count in trace.counts.items()
        if number not in _inlined(file)
        for turn in sorted({*range(min(turns, count)), count - 1})
    ]


@functools.cache
def _inlined(file: str) -> frozenset[int]:
    """The lines of comprehensions that Python 3.12 and later run inside of their function: an exception that a trace
    raises there passes by the ``with`` and ``finally`` around them, which no other exception does."""
    if sys.version_info < (3, 12):
        return frozenset()
    nodes = ast.walk(ast.parse(Path(file).read_text()))
    found = [node for node in nodes if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp)]
    return frozenset(line for node in found for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def interrupted(call: Callable[[], Any], at: Line, error: BaseException) -> tuple[bool, BaseException | None]:
    """Runs ``call``, into which ``error`` comes at the line; whether that ran, and what the call raised."""
    trace = _Trace(at, error)
    try:
        trace.run(call)
    except BaseException as raised:
        raised.__traceback__ = None
        return trace.raised, raised
    return trace.raised, None
