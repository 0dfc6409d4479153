"""Launches that a recorder gets instead of the GPU: how a compiler learns what an op launches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Recorder(NamedTuple):
    """What gets a thread's launches instead of the GPU; their tensors may be fake."""

    record: Callable[[Any, tuple[int, int, int], tuple[Any, ...], dict[str, int]], None]
    """``record(kernel, grid, arguments, options)``"""
    descriptors: bool
    """Whether the launches may be given tensor descriptors."""


class _Recording(threading.local):
    by: Recorder | None = None


recording = _Recording()


@contextmanager
def recorded_by(
    record: Callable[[Any, tuple[int, int, int], tuple[Any, ...], dict[str, int]], None], *, descriptors: bool
) -> Iterator[None]:
    """This thread's launches go to ``record``."""
    try:
        recording.by = Recorder(record, descriptors)
        yield
    finally:
        recording.by = None
