"""What converted modules run as, for a while and in one context: as softmax, or under an observer.

A context is a thread's or an asyncio task's (:mod:`contextvars`): what one switches is nothing to the others, and uses
may be nested and overlap. Nothing of it is in a module, so nothing is in what is copied or saved meanwhile.

Dynamo guards compiled code on what the context variables hold. They hold None unless something is switched, and of a
whole model one name, so that its modules can share compiled code.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from sigswap.transaction import Note

Names = tuple[str, ...]

SWITCHED: ContextVar[Names | None] = ContextVar("sigswap_as_softmax", default=None)
"""The names of what runs as softmax, sorted; None: nothing does."""
OBSERVED: ContextVar[Mapping[Any, Any] | None] = ContextVar("sigswap_observed", default=None)
"""By :class:`sigswap.conversion.state.OwnerState`, the observer that runs its owner; None: there are none."""
_SWITCHES: ContextVar[Mapping[object, frozenset[str]]] = ContextVar("sigswap_switches", default={})  # noqa: B039
"""The names that each open use has switched; this mapping is never written to."""

CONTEXTS_ARE_GUARDED = torch.torch_version.TorchVersion(torch.__version__) >= (2, 14)
"""Whether Dynamo traces a context variable, and guards on it. In older versions compiled code follows a switch in any
context of the process."""

_numbers = itertools.count()


class Anywhere:
    """``names``: what is switched in any context, as SWITCHED has it in one."""

    names: Names | None = None


anywhere = Anywhere()
_everywhere: dict[object, frozenset[str]] = {}


class Group:
    """The ``size`` modules of one conversion, which are mostly switched together. A copy has a name of its own."""

    def __init__(self, size: int) -> None:
        self.name = f"group {next(_numbers)}"
        self.size = size

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return Group(self.size)

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (self.size,)


class Switch:
    """One module's. A copy has a name of its own."""

    def __init__(self, group: Group | None = None) -> None:
        self.name = f"module {next(_numbers)}"
        self.group = Group(1) if group is None else group

    def is_in(self, names: Names) -> bool:
        return self.group.name in names or self.name in names

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        return Switch(copy.deepcopy(self.group, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Switch, (self.group,)


@contextmanager
def run_as_softmax(states: Iterable[nn.Module]) -> Iterator[None]:
    """While it is open, and in this context, the modules with these states run as softmax."""
    names, use = _names_of(states), object()
    try:
        try:
            _switch(use, names)
            yield
        finally:
            _switch(use, None)
    finally:  # again, for an interruption may have come before that line
        _switch(use, None)


@contextmanager
def run_under(observers: Mapping[Any, Any]) -> Iterator[None]:
    """While it is open, and in this context, ``observers[state].run(owner, forward, args, kwargs)`` runs each owner.

    Not in compiled code.
    """
    before = OBSERVED.get()
    try:
        try:
            OBSERVED.set({**(before or {}), **observers})
            yield
        finally:
            OBSERVED.set(before)
    finally:
        OBSERVED.set(before)


def context_state(note: Note) -> None:
    """Notes what is switched and observed now, for an interruption between two lines of the functions above."""
    for variable in (SWITCHED, _SWITCHES, OBSERVED):
        note("what runs as softmax", functools.partial(variable.set, variable.get()))  # type: ignore[attr-defined]


def _names_of(states: Iterable[nn.Module]) -> frozenset[str]:
    """Those of the switches of ``states``, and of those inside where a library has put a wrapper around one (peft)."""
    by_group: dict[Group, list[str]] = {}
    for state in states:
        for module in state.modules():
            if (switch := vars(module).get("switch")) is not None:
                by_group.setdefault(switch.group, []).append(switch.name)
    return frozenset(
        name
        for group, names in by_group.items()
        for name in ([group.name] if len(names) == group.size else names)
    )  # fmt: skip


def _switch(use: object, names: frozenset[str] | None) -> None:
    """Switches ``names`` to softmax for a use; None: no longer."""
    others = {key: value for key, value in _SWITCHES.get().items() if key is not use}
    switches = others if names is None else {**others, use: names}
    _SWITCHES.set(switches)
    SWITCHED.set(_union(switches.values()))
    if names is None:
        _everywhere.pop(use, None)
    else:
        _everywhere[use] = names
    while anywhere.names != (now := _union(list(_everywhere.values()))):  # another thread may have written meanwhile
        anywhere.names = now


def _union(names: Iterable[frozenset[str]]) -> Names | None:
    return tuple(sorted(set().union(*names))) or None
