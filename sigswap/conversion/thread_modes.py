"""torch's modes of this thread and the hooks that autograd saves tensors through, and how to put them back.

A mode's ``__exit__`` is Python, so that an interruption can come before its first line, and then the mode stays on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch._C._dynamo.guards import set_is_in_mode_without_ignore_compile_internals
from torch._ops import mode_stack_state_for_pre_dispatch, unset_mode_pre_dispatch
from torch.utils import _python_dispatch, checkpoint

from sigswap.transaction import Note, entries

_c: Any = torch._C  # whose stubs do not have all
_KEYS = tuple(_c._TorchDispatchModeKey.__members__.values())
"""Of the modes of which there is one each, beneath the others: fake tensors, tracing, functionalization."""
_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)
"""What torch notes beside its dispatch modes."""


def function_modes(note: Note) -> None:
    """Puts torch's function modes back: those that stayed on go, and those that are missing come again."""
    before = _function_modes()

    def put_back() -> None:
        # torch.device takes all of them off and puts them on again, so that in between some are not there.
        if list(map(id, _function_modes())) != list(map(id, before)):
            while _c._len_torch_function_stack() > 0:
                _c._pop_torch_function_stack()
            for mode in before:
                _c._push_on_torch_function_stack(mode)

    note("torch's function modes", put_back)


def dispatch_modes(note: Note) -> None:
    """Puts torch's dispatch modes back, with what torch notes beside them."""
    single = {key: _c._get_dispatch_mode(key) for key in _KEYS}
    before = _dispatch_modes()
    early = mode_stack_state_for_pre_dispatch()._schema_check_mode  # type: ignore[no-untyped-call]
    only_on_the_cpu = _c._only_lift_cpu_tensors()
    flags = entries(vars(_python_dispatch), *_FLAGS)
    any_counts = vars(_python_dispatch)[_FLAGS[-1]]

    def put_back() -> None:
        if list(map(id, _dispatch_modes())) != list(map(id, before)):
            while _dispatch_modes():
                _c._pop_torch_dispatch_stack(None)
            for mode in before:
                _c._push_on_torch_dispatch_stack(mode)
        for key, mode in single.items():
            if _c._get_dispatch_mode(key) is not mode:
                _c._unset_dispatch_mode(key)
                if mode is not None:
                    _c._set_dispatch_mode(mode)
        if early is None and mode_stack_state_for_pre_dispatch()._schema_check_mode is not None:  # type: ignore[no-untyped-call]
            unset_mode_pre_dispatch(None, schema_check=True)  # type: ignore[no-untyped-call]
        _c._set_only_lift_cpu_tensors(only_on_the_cpu)
        flags()
        set_is_in_mode_without_ignore_compile_internals(any_counts)

    note("torch's dispatch modes", put_back)


def saved_tensors_hooks(note: Note) -> None:
    """Puts the hooks that autograd saves tensors through back to those of now.

    ``torch.utils.checkpoint`` (seen in torch 2.11) sets them in a generator, which it leaves where it is when what it
    calls fails: the hooks go when the generator is collected, which may be never or within another's use of hooks. So
    the generators in the frames of the error that is on its way are closed first.
    """
    before = _hooks()

    def put_back() -> None:
        if _hooks() == before:
            return
        for generator in _open_checkpoints(sys.exc_info()[1], set()):
            generator.close()
        while _hooks() not in (before, None):
            _c._autograd._pop_saved_tensors_default_hooks()
        if _hooks() != before:
            _c._autograd._push_saved_tensors_default_hooks(*before)

    note("the hooks for saved tensors", put_back)


def _open_checkpoints(error: BaseException | None, seen: set[int]) -> Iterator[Any]:
    """The generators of the checkpoints that ``error``, and what led to it, came through: the innermost first."""
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield from _open_checkpoints(error.__cause__, seen)
    yield from _open_checkpoints(error.__context__, seen)
    for frame in reversed(list(_frames(error.__traceback__))):
        if frame.f_code.co_filename == checkpoint.__file__ and (found := frame.f_locals.get("gen")) is not None:
            yield found


def _frames(traceback: TracebackType | None) -> Iterator[Any]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _hooks() -> Any:
    return _c._autograd._top_saved_tensors_default_hooks(True)


def _function_modes() -> list[Any]:
    return [_c._get_function_stack_at(index) for index in range(_c._len_torch_function_stack())]


def _dispatch_modes() -> list[Any]:
    """Those that lie on one another: they come after those of which there is one each."""
    whole = [_c._get_dispatch_stack_at(index) for index in range(_c._len_torch_dispatch_stack())]
    return whole[sum(_c._get_dispatch_mode(key) is not None for key in _KEYS) :]
