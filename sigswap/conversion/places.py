"""Where in the code a call is made: the address by which a plan tells the calls of one owner apart.

A *place* is the chain of expressions that leads from the owner's forward to the call, as text, outermost first::

    BertSelfAttention.forward: attention_interface(...) > eager_attention_forward: torch.matmul(query, key...)

Nothing that is put on the model later is in that chain, so nothing shifts it: an adapter in a child makes its calls at
places of its own. The text stays what it is when a file grows, moves, or is read by another version of Python. What
stands between the frames is left out: torch's own, and functions that hand all their arguments on (decorators,
accelerate's hooks), which come and go.

In eager the chain is read from the frames of Python; while Dynamo traces, from its record of the frames it has inlined.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import itertools
import linecache
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Any)

SWAPPED_FORWARD = "sigswap_forward"  # the name of the code that runs an owner's forward under the mode
UNSEEN_FILES = (nn.modules.module.__file__, torch.overrides.__file__)
"""torch's own, between a module's forward and the next one's. Whole paths: a user's file may be called module.py."""

_HERE = os.path.dirname(__file__)
_UNSEEN_FOLDERS = tuple(
    os.path.join(folder, "")
    for folder in (
        os.path.dirname(torch.__file__),
        *(os.path.join(os.path.dirname(_HERE), room) for room in ("conversion", "functional", "training")),
    )
)
_MODE_FILE = os.path.join(_HERE, "mode.py")
_RESUMED = re.compile(r"torch_dynamo_resume_in_(.+)_at_\d+$")
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")  # are functions until Python 3.12
_PASSES_ON = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


class Spot:
    """A frame as it was: its code, and where in it: first line, last line, first column, last column; None: unknown."""

    def __init__(self, code: CodeType, positions: tuple[int | None, int | None, int | None, int | None]) -> None:
        self.code = code
        self.line = positions[0]
        self.positions = positions

    @classmethod
    def of(cls, frame: FrameType) -> Spot:
        key = id(frame.f_code), frame.f_lasti
        if key not in _SPOTS:
            positions = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
            _SPOTS[key] = cls(frame.f_code, positions)
        return _SPOTS[key]

    @functools.cached_property
    def text(self) -> str:
        """The source of the expression, on one line; its position, where the source is not at hand."""
        line, end_line, column, end_column = self.positions
        if line is None or end_line is None or column is None or end_column is None:
            return f"line {line}"
        lines = [text.encode() for text in linecache.getlines(self.code.co_filename)[line - 1 : end_line]]
        if len(lines) < end_line - line + 1:
            return f"line {line}:{column}"
        lines[-1] = lines[-1][:end_column]
        lines[0] = lines[0][column:]
        return " ".join(b"".join(lines).decode(errors="replace").split())


_SPOTS: dict[tuple[int, int], Spot] = {}
"""Those met so far, by code and instruction. They hold the code, so that its id does not become another's."""


class Place(NamedTuple):
    """The address of a call. ``own``: it is made by the owner itself, not inside the call of a module in it.

    ``suffix``: the end of the name that is the same whenever this code runs; None: all of it. (Dynamo may compile a
    frame inside the owner's forward for itself, and use that wherever the owner gets there from.)
    """

    name: str
    own: bool
    suffix: str | None = None


def name_of(spots: Iterable[Spot]) -> str:
    """The name of the place that frames lead to; ``spots`` are those below the owner's forward, innermost first."""
    return " > ".join(reversed(list(_expressions(spots))))


ANYWHERE = "?"  # is the name of no place


def left_to_python(function: Function) -> Function:
    """Has Dynamo run ``function`` as it is where it would compile it for itself, as it does below a graph break.

    What torch._dynamo.eval_frame.skip_code does, without the import of Dynamo, which takes a second.
    """
    actions = eval_frame._FrameAction
    strategy = eval_frame._FrameExecStrategy(actions.SKIP, actions.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function


@left_to_python
def place_of_call() -> Place:
    """In eager: the place of the call that the innermost mode now gets."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not (
        frame.f_code.co_name == "__torch_function__" and frame.f_code.co_filename == _MODE_FILE
    ):
        frame = frame.f_back
    first = frame = None if frame is None else frame.f_back
    key: list[int] = []
    deeper = 0  # modes that have passed the call on: those of owners inside this one
    while frame is not None:
        code = frame.f_code
        name = code.co_name
        if name == "__torch_function__" and code.co_filename == _MODE_FILE:
            deeper += 1
        elif SWAPPED_FORWARD in name:
            if not deeper:
                break
            deeper -= name == SWAPPED_FORWARD
        key.append(id(code))
        key.append(frame.f_lasti)
        frame = frame.f_back
    known = _KNOWN.get(tuple(key))
    if known is None:
        meet: Callable[..., Place] = _meet
        if "torch._dynamo" in sys.modules:
            meet = torch.compiler.disable(_meet)  # type: ignore[no-untyped-call]
        known = meet(first, tuple(key))
    return known


def _meet(first: FrameType | None, key: tuple[int, ...]) -> Place:
    """The place of a call that is met for the first time; ``key`` is that of :data:`_KNOWN`."""
    spots = [Spot.of(frame) for frame in itertools.islice(_outwards(first), len(key) // 2)]
    _KNOWN[key] = Place(name_of(spots), not any(_is_module_call(spot.code) for spot in spots))
    return _KNOWN[key]


_KNOWN: dict[tuple[int, ...], Place] = {}
"""The places met so far, by the frames that lead there."""
# Among the code in them is Dynamo's, which is not to outlive it: it complains.
atexit.register(_SPOTS.clear)


def traced_name() -> str:
    """While Dynamo traces: the ``name`` of the :class:`Place` of the call that the mode gets; ANYWHERE if it is a part
    of the mode that is compiled for itself, below a graph break.
    """
    return _traced().name


def traced_is_own() -> bool:
    """The same, ``own``."""
    return _traced().own


def traced_suffix() -> str | None:
    """The same, ``suffix``."""
    return _traced().suffix


# Called by Dynamo while it traces, for a constant. What torch.compiler.assume_constant_result does, without the import
# of Dynamo, which takes a second.
for _function in (traced_name, traced_is_own, traced_suffix):
    vars(_function)["_dynamo_marked_constant"] = True


def _traced() -> Place:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tx: Any = InstructionTranslator.current_tx().output.current_tx
    mode = next((at for at in _callers(tx) if _is_mode(at.f_code)), None)
    tx = getattr(mode, "parent", None)
    if tx is None:
        return Place(ANYWHERE, False)
    spots: list[Spot] = []
    modules = len(tx.nn_module_stack)
    deeper = 0
    for at in _callers(tx):
        code = at.f_code
        if _is_mode(code):
            deeper += 1
        elif SWAPPED_FORWARD in code.co_name:
            if not deeper:
                return Place(name_of(spots), modules == len(at.nn_module_stack))
            deeper -= code.co_name == SWAPPED_FORWARD
        positions = at.current_instruction.positions
        spots.append(Spot(code, tuple(positions or (at.lineno, None, None, None))))
    # What is compiled lies inside the owner's forward: the frames around it are Python's, below Dynamo's own.
    suffix = name_of(spots)
    around: list[FrameType] = []
    for frame in _outwards(sys._getframe()):
        if frame.f_code.co_filename.endswith(os.path.join("torch", "_dynamo", "convert_frame.py")):
            around.clear()
        elif SWAPPED_FORWARD in frame.f_code.co_name:
            break
        else:
            around.append(frame)
    own = modules == 0 and not any(_is_module_call(frame.f_code) for frame in around)
    return Place(name_of([*spots, *map(Spot.of, around)]), own, suffix)


def _callers(tx: Any) -> Iterator[Any]:
    """A frame that Dynamo traces, and those that it is inlined in."""
    while tx is not None:
        yield tx
        tx = getattr(tx, "parent", None)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_mode(code: CodeType) -> bool:
    return code.co_name == "__torch_function__" and code.co_filename == _MODE_FILE


def _is_module_call(code: CodeType) -> bool:
    return code.co_name == "_call_impl" and code.co_filename == nn.modules.module.__file__


def _expressions(spots: Iterable[Spot]) -> Iterator[str]:
    """Of the frames that count, innermost first, the function and the expression that it is at."""
    innermost, skipping = True, False
    for spot in spots:
        code = spot.code
        if code.co_filename.startswith(_UNSEEN_FOLDERS):
            continue
        outer, _, name = code.co_qualname.rpartition(".")
        resumed = _RESUMED.match(name)
        inner = resumed is not None or name in _COMPREHENSIONS  # the next frame is the same function's
        if skipping:
            skipping = inner
            continue
        skipping = inner
        if not innermost and code.co_flags & _PASSES_ON == _PASSES_ON and outer.endswith("<locals>"):
            continue
        innermost = False
        if resumed is not None:
            name = resumed[1]
        elif inner:
            outer, _, name = outer.removesuffix(".<locals>").rpartition(".")
        yield f"{outer}.{name}: {spot.text}".removeprefix(".")
