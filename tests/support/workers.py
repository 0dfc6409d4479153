"""Long runs by hand in several processes."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_SECONDS_TO_END = 5.0
"""What a process has sent before it ended is still read for so long."""


class Ended(NamedTuple):
    """A process that ended before its work did."""

    worker: int
    exit_code: int | None


def in_workers(number: int, work: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
    """What ``work(index, number, *arguments)`` yields in each of ``number`` new processes (1: in this one), as it
    comes; of one that ends before, an :class:`Ended`. ``work`` is a function of a module, and what is passed can be
    pickled."""
    if number == 1:
        yield from work(0, 1, *arguments)
        return
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    running = {
        index: context.Process(target=_run, args=(results, index, number, work, arguments), daemon=True)
        for index in range(number)
    }
    ended_at: dict[int, float] = {}
    try:
        for process in running.values():
            process.start()
        while running:
            try:
                index, is_end, value = results.get(timeout=1)
                if is_end:
                    running.pop(index).join()
                else:
                    yield value
            except queue.Empty:
                for index, process in list(running.items()):
                    if (
                        not process.is_alive()
                        and time.monotonic() - ended_at.setdefault(index, time.monotonic()) > _SECONDS_TO_END
                    ):
                        del running[index]
                        yield Ended(index, process.exitcode)
    finally:
        for process in running.values():
            process.kill()


def _run(results: Any, index: int, number: int, work: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    for value in work(index, number, *arguments):
        results.put((index, False, value))
    results.put((index, True, None))
