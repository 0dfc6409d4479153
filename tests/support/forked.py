"""Work in a copy of this process, which a fault in the work leaves as it is."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Died(NamedTuple):
    """The copy ended before its work did."""

    exit_code: int


def forked(work: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """What ``work()`` yields in a fork of this process, as it comes, and a :class:`Died` if that one does not end of
    itself. What is yielded can be pickled. If no more is asked for, the fork ends when it yields next."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                for value in work():
                    pickle.dump(value, pipe)
                    pipe.flush()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # nothing of what this process is to do at its end is the copy's to do
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        try:
            while True:
                try:
                    value = pickle.load(pipe)
                except (EOFError, pickle.UnpicklingError):
                    break
                yield value
        finally:
            pipe.close()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        yield Died(status)
