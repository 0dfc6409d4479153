"""Calls that a forward makes in another thread, where no mode follows it: they are seen, to be refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.overrides import TorchFunctionMode

from sigswap.transaction import Transaction

Note = Callable[[Any], None]


@contextlib.contextmanager
def seen_in_threads(note_here: Callable[[], Note]) -> Iterator[None]:
    """While it is open, torch functions that are called in threads which this one hands work to are noted.

    ``note_here``: called where work is handed on; gives what is called with each function there. Threads of others are
    left alone, and so are those of a pool that is no ``ThreadPoolExecutor`` and was there before.
    """
    ours = threading.local()
    ours.here = True
    start, submit = threading.Thread.start, ThreadPoolExecutor.submit

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        note = note_here()

        def run(*args: Any, **kwargs: Any) -> Any:
            before, ours.here = getattr(ours, "here", False), True
            try:
                with _Noting(note):
                    return function(*args, **kwargs)
            finally:
                ours.here = before

        return run

    def noted_start(thread: threading.Thread) -> None:
        if getattr(ours, "here", False):
            thread.run = noted(thread.run)  # type: ignore[method-assign]
        start(thread)

    def noted_submit(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return submit(pool, noted(function) if getattr(ours, "here", False) else function, *args, **kwargs)

    def put_back() -> None:
        threading.Thread.start = start  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]

    with Transaction() as undo, undo:
        undo.afterwards("the methods of threads", put_back)
        threading.Thread.start = noted_start  # type: ignore[method-assign, assignment]
        ThreadPoolExecutor.submit = noted_submit  # type: ignore[method-assign, assignment]
        yield


class _Noting(TorchFunctionMode):
    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(func)
        return func(*args, **(kwargs or {}))
