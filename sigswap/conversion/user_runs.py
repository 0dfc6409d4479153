"""What a model is run on by its user, noted to be looked at: for parts that no example inputs reach by themselves.

Nothing is looked at while it runs: the arguments of each outermost call of a module are kept, and ``convert`` runs
these calls again, in its own way.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from sigswap.conversion import keeping
from sigswap.conversion.copies import placed
from sigswap.conversion.record import check_unconverted
from sigswap.conversion.recording import Example
from sigswap.conversion.wrappers import unwrapped
from sigswap.errors import ExampleInputsError, Hint
from sigswap.transaction import Transaction, entries

_noted: weakref.WeakKeyDictionary[nn.Module, list[Example]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def watch(model: nn.Module) -> Iterator[list[Example]]:
    """Notes what the user runs of ``model`` inside the ``with``, for a :func:`convert` without example inputs.

    For a model that has more than one way in (``model.encode_image(x)``, ``model.generate(...)``, a loop that calls its
    parts), or whose inputs are made by much code. Each call of a module that no other module of the model makes is
    noted: its path and a copy of its arguments, one of each form (which arguments there are, their dtypes and numbers
    of dimensions, and which dimensions are 1). The model runs as it would otherwise.

    >>> with sigswap.watch(model):
    ...     model.generate(**batch)
    >>> sigswap.convert(model)

    Yields:
        The list of what was noted, which ``example_inputs`` of convert and inspect takes, also for an equal model.

    Raises:
        ArgumentError: ``model`` is not a module.
        AlreadyConvertedError: it is converted already.
        ExampleInputsError: none of its modules was called.
    """
    check_unconverted(model, "to convert it with what you run")
    model = unwrapped(model)
    noted: dict[Any, Example] = {}
    calls: list[Example] = []
    with _hooked(model, noted):
        yield calls
    calls.extend(noted.values())
    if not calls:
        raise ExampleInputsError(
            f"no module of {type(model).__name__} was called inside sigswap.watch.",
            hint=Hint("Run the model there, by calling it or a part of it."),
        )
    _noted[model] = calls


def noted_calls(model: nn.Module) -> list[Example]:
    """What :func:`watch` has noted of ``model`` last."""
    return _noted.get(model, [])


def forget_calls(undo: Transaction, model: nn.Module) -> None:
    undo.on_failure("what was watched", entries(_noted, model))
    _noted.pop(model, None)


@contextlib.contextmanager
def _hooked(model: nn.Module, noted: dict[Any, Example]) -> Iterator[None]:
    depth = 0
    with Transaction() as undo, undo:
        keeping.thread_state(undo.on_failure)
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue

            def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                nonlocal depth
                depth += 1
                if depth == 1:
                    form = _form(path, args, kwargs)
                    if form not in noted:
                        # A cache that the call is given is filled by it: what is kept is how it was before.
                        noted[form] = Example(placed((args, kwargs), lambda x: x.detach().clone())[0], path)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                nonlocal depth
                depth -= 1

            keeping.pre_hook(undo.afterwards, module, enter, prepend=True, with_kwargs=True)
            keeping.hook(undo.afterwards, module, leave, always_call=True)
        yield


def _form(path: str, args: Any, kwargs: Any) -> Any:
    """Equal for calls that take one path through the code, as far as their arguments show."""
    leaves, structure = tree_flatten((args, kwargs))
    kinds = tuple(
        (leaf.dtype, tuple(size == 1 for size in leaf.shape))
        if isinstance(leaf, Tensor)
        else leaf
        if isinstance(leaf, bool | str | None)
        else type(leaf)
        for leaf in leaves
    )
    return path, str(structure), kinds
