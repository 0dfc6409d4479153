"""Interruptions at every line of the code that runs, as a debugger would make them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


class Interrupted:
    """Runs a call, and raises ``error`` before its ``at``-th line (counted from 1) in ``files``: once, for Python ends
    a trace that raises.

    ``lines``: how many there were. ``place``: the file and line of the interruption; None if there was none.
    """

    def __init__(self, files: Sequence[str], at: int, error: Callable[[], BaseException]) -> None:
        self.files, self.at, self.error = tuple(files), at, error
        self.lines = 0
        self.place: tuple[str, int] | None = None

    def __call__(self, function: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._calls)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _calls(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.endswith(self.files) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.place = (Path(frame.f_code.co_filename).name, frame.f_lineno)
                raise self.error()
        return self._line


def lines_of(function: Callable[[], Any], files: Sequence[str]) -> int:
    """How many lines of ``files`` a call runs."""
    run = Interrupted(files, 0, KeyboardInterrupt)
    run(function)
    return run.lines
