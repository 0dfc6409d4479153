"""What stays on in a thread after an interruption is put back by a transaction."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch, checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from sigswap.conversion import thread_modes
from sigswap.conversion.keeping import thread_state
from sigswap.conversion.watch import _Ops
from sigswap.transaction import Transaction


def _state() -> Any:
    c: Any = torch._C
    return (
        thread_modes._function_modes(),
        [c._get_dispatch_stack_at(index) for index in range(c._len_torch_dispatch_stack())],
        torch._ops._len_torch_dispatch_stack_pre_dispatch(),
        c._only_lift_cpu_tensors(),
        [vars(_python_dispatch)[name] for name in thread_modes._FLAGS],
        c._autograd._top_saved_tensors_default_hooks(True),
    )


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Plain(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make",
    [_Functions, _Plain, FakeTensorMode, lambda: _Ops(None)],
    ids=["function", "dispatch", "fake", "before autograd"],
)
@pytest.mark.parametrize("around", [False, True])
def test_a_mode_that_stays_on_goes(make: Callable[[], Any], around: bool) -> None:
    with _Plain() if around else _Functions():
        before = _state()
        with pytest.raises(KeyboardInterrupt) as raised, Transaction() as undo, undo:
            thread_state(undo.on_failure)
            make().__enter__()
            raise KeyboardInterrupt
        assert _state() == before
        assert not hasattr(raised.value, "__notes__")
        assert (torch.ones(2) + 1).tolist() == [2.0, 2.0]
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0


def test_modes_that_are_missing_come_again() -> None:
    with FakeTensorMode() as fake, _Plain():
        before = _state()
        with pytest.raises(RuntimeError), Transaction() as undo, undo:
            thread_state(undo.on_failure)
            torch._C._pop_torch_dispatch_stack(None)  # type: ignore[call-arg]
            torch._C._unset_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
            raise RuntimeError
        assert _state() == before and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is fake


def _pack(x: Tensor) -> Tensor:
    return x


def test_hooks_that_stay_go() -> None:
    with saved_tensors_hooks(_pack, _pack):
        before = _state()
        with pytest.raises(RuntimeError), Transaction() as undo, undo:
            thread_state(undo.on_failure)
            saved_tensors_hooks(lambda x: x, lambda x: x).__enter__()
            saved_tensors_hooks(lambda x: x, lambda x: x).__enter__()
            raise RuntimeError
        assert _state() == before


def _as_in_2_11(inner: Callable[[], None]) -> Callable[[], None]:
    """A checkpoint around ``inner`` as torch 2.11 makes it: a generator, left as it is when what it calls fails."""

    def generator() -> Iterator[None]:
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            yield

    names = {"made": generator, "inner": inner}
    code = "def checkpoint():\n    gen = made()\n    next(gen)\n    inner()\n"
    exec(compile(code, checkpoint.__file__, "exec"), names)
    made: Any = names["checkpoint"]
    return made


def test_the_hooks_of_a_checkpoint_go_once() -> None:
    """Not again when its generator is collected, within another's use of hooks."""

    def fails() -> None:
        raise ValueError

    call, before = _as_in_2_11(_as_in_2_11(fails)), _state()
    with pytest.raises(RuntimeError) as raised, Transaction() as undo, undo:
        thread_state(undo.on_failure)
        try:
            call()
        except ValueError as error:
            raise RuntimeError from error
    assert _state() == before
    with saved_tensors_hooks(_pack, _pack):
        inside = _state()
        del raised
        gc.collect()
        assert _state() == inside
