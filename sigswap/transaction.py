"""Changes that a call makes to a model, a file or the process, and that are undone together.

The undo of a change is noted *before* the change is made, so that whatever comes between two lines, Ctrl-C among it,
finds it noted:

>>> with Transaction() as undo, undo:
...     undo.afterwards("training mode", put_back_modes)
...     undo.on_failure("the parameters", put_back_parameters)
...     ...  # the changes

The transaction is entered twice because leaving it takes lines of its own: an interruption of the first leaving is
made good by the second.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any, NamedTuple

from sigswap.errors import UndoError

Note = Callable[[str, Callable[[], object]], None]
"""``undo.afterwards`` or ``undo.on_failure`` of a transaction, for who changes something and does not know how long."""


class _Step(NamedTuple):
    what: str
    put_back: Callable[[], object]
    always: bool


class Transaction:
    """Steps that put back what is changed inside it: the last one first, and each of them even if another one fails.

    A step has to be right whether its change was made, was made in part or was not made, and when it runs twice. One
    that raises runs once more. What then cannot be put back is named: in a note of the exception that is on its way,
    or, if there is none, by an UndoError. An interruption of the steps waits until all of them have run.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._lost: list[str] = []

    def afterwards(self, what: str, put_back: Callable[[], object]) -> None:
        """``put_back`` runs in any case when the transaction is left. ``what`` it puts back, in words."""
        self._steps.append(_Step(what, put_back, True))

    def on_failure(self, what: str, put_back: Callable[[], object]) -> None:
        """``put_back`` runs only if the transaction is left by an exception."""
        self._steps.append(_Step(what, put_back, False))

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:  # from this line on the changes are made for good
            self._steps = [step for step in self._steps if step.always]
        interruption: BaseException | None = None
        while self._steps:
            step = self._steps[-1]
            for last in (False, True):
                try:
                    step.put_back()
                    break
                except BaseException as problem:
                    if not isinstance(problem, Exception):
                        interruption = problem
                    if last:
                        self._lost.append(f"{step.what} ({type(problem).__name__}: {problem})")
            self._steps.pop()
        lost, self._lost = self._lost, []
        if lost and error is None and interruption is None:
            raise UndoError(f"what was changed meanwhile could not be put back: {'; '.join(lost)}.")
        if lost:
            (interruption or error).add_note(f"sigswap could not put back {'; '.join(lost)}.")  # type: ignore[union-attr]
        if interruption is not None:
            raise interruption


def entries(mapping: MutableMapping[Any, Any], *names: Any) -> Callable[[], None]:
    """What makes these entries of ``mapping`` what they are now; one that is not there goes."""
    before = {name: mapping[name] for name in names if name in mapping}

    def put_back() -> None:
        for name in names:
            if name in before:
                mapping[name] = before[name]
            else:
                mapping.pop(name, None)

    return put_back


def whole(mapping: MutableMapping[Any, Any]) -> Callable[[], None]:
    """What makes all of ``mapping`` what it is now, in the same order."""
    before = list(mapping.items())

    def put_back() -> None:
        if [(name, id(value)) for name, value in mapping.items()] != [(name, id(value)) for name, value in before]:
            mapping.clear()
            mapping.update(before)

    return put_back
