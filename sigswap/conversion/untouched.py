"""Leaves the process as it was when a model has run: what its code keeps outside of its tensors is put back.

A forward may fill caches (in globals, closures, class attributes, functools caches), count, append to lists by hooks,
and draw random numbers. What can be reached from the model and from its packages' code is noted before a run and put
back after it. Fake tensors that are found elsewhere afterwards are taken out of the dict or list they are in; else it
is an error.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import operator
import random
import sys
import types
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sigswap.errors import ConversionError
from sigswap.transaction import Transaction

_MOST_OBJECTS = 50_000  # looked at, those nearest to the model first
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_OTHERS = (list, set, collections.deque)
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_NOT_THE_MODELS = {"torch", "sigswap", "builtins", "numpy", *sys.stdlib_module_names} - {"__main__"}


class Untouched:
    """What is to be as it was after each run of ``model`` (or of a copy): see :meth:`keep`."""

    def __init__(self, model: nn.Module) -> None:
        classes = {cls for module in model.modules() for cls in type(module).__mro__}
        self._packages = {cls.__module__.partition(".")[0] for cls in classes} - _NOT_THE_MODELS
        self._put_back: list[Callable[[], None]] = []
        self._note(model, classes)

    @contextlib.contextmanager
    def keep(self) -> Iterator[None]:
        """Afterwards, what was noted is as it was when this was made, and random numbers go on as before."""
        with Transaction() as undo, undo:
            undo.afterwards("what the model's code keeps", self.put_back)
            undo.afterwards("the random state", random_state())
            yield

    def put_back(self) -> None:
        for put_back in self._put_back:
            put_back()

    def _note(self, model: nn.Module, classes: set[type]) -> None:
        pending: collections.deque[Any] = collections.deque([model])
        pending.extend(cls for cls in classes if self._is_the_models(cls.__module__))
        pending.extend(sys.modules.get(name) for name in {cls.__module__ for cls in classes})
        seen: dict[int, Any] = {}
        most = _MOST_OBJECTS + 20 * sum(1 for _ in model.modules())
        while pending and len(seen) < most:
            thing = pending.popleft()
            if id(thing) not in seen:
                seen[id(thing)] = thing
                pending.extend(self._noted(thing))

    def _noted(self, thing: Any) -> list[Any]:
        """What ``thing`` leads to; how to put it back is noted."""
        kind = type(thing)
        if kind in _DICTS:
            self._put_back.append(functools.partial(_put_back_dict, thing, tuple(thing), tuple(thing.values())))
            return list(thing.values())
        if kind in _OTHERS:
            before = list(thing)
            self._put_back.append(functools.partial(_put_back_items, thing, before))
            return before
        if kind is tuple:
            return list(thing)
        if kind is types.FunctionType:
            cells = thing.__closure__ or ()
            for cell in cells:
                with contextlib.suppress(ValueError):  # an empty one
                    self._put_back.append(functools.partial(setattr, cell, "cell_contents", cell.cell_contents))
            contents = [cell.cell_contents for cell in cells if cell != types.CellType()]
            home = sys.modules.get(thing.__module__ or "")
            return [thing.__dict__, thing.__defaults__, thing.__kwdefaults__, *contents, home]
        if kind is types.MethodType:
            return [thing.__self__, thing.__func__]
        if isinstance(thing, staticmethod | classmethod):
            return [thing.__func__]
        if isinstance(thing, property):
            return [thing.fget]
        if kind is functools.partial:
            return [thing.func, *thing.args, thing.keywords]
        if isinstance(thing, types.ModuleType | type):
            name = thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__
            if not self._is_the_models(name):
                return []
            self._put_back.append(functools.partial(_put_back_names, thing, dict(vars(thing))))
            return list(vars(thing).values())
        own = getattr(thing, "__dict__", None) if self._is_the_models(kind.__module__) or _is_module(thing) else None
        return [own] if type(own) is dict else []

    def _is_the_models(self, module: Any) -> bool:
        return isinstance(module, str) and module.partition(".")[0] in self._packages


def random_state() -> Callable[[], None]:
    """What makes Python's, numpy's and torch's random numbers go on from here."""
    numpy: Any = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cpu = torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def put_back() -> None:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)

    return put_back


def _is_module(thing: Any) -> bool:
    return issubclass(type(thing), nn.Module)


def _same(before: Collection[Any], now: Collection[Any]) -> bool:
    return len(before) == len(now) and all(map(operator.is_, before, now))


def _put_back_dict(thing: Any, keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
    if not (_same(keys, thing) and _same(values, thing.values())):
        thing.clear()
        thing.update(zip(keys, values, strict=True))


def _put_back_items(thing: Any, before: list[Any]) -> None:
    if not _same(before, thing):
        thing.clear()
        (thing.update if isinstance(thing, set) else thing.extend)(before)


def _put_back_names(thing: Any, before: dict[str, Any]) -> None:
    """The globals of a module or the attributes of a class, but for code: what was imported stays so."""
    now = dict(vars(thing))
    for name, value in now.items():
        if before.get(name, now) is not value and not isinstance(value, _CODE) and not name.startswith("__"):
            if name in before:
                setattr(thing, name, before[name])
            else:
                delattr(thing, name)
    for name in before.keys() - now.keys():
        setattr(thing, name, before[name])


# Fake tensors that stayed behind.


@contextlib.contextmanager
def collect_later() -> Iterator[None]:
    """Without garbage collection inside: all that is made there is young afterwards, and is collected without a look at
    the whole process, which takes a third of a second where transformers is imported."""
    with Transaction() as undo, undo:
        if gc.isenabled():
            undo.afterwards("the garbage collector", gc.enable)
            gc.disable()
        yield


def forget(tensors: Callable[[], list[Tensor]]) -> None:
    """Takes the fake tensors that a run has made out of whatever still holds them.

    ``tensors``: gives those that are still there. Raises ConversionError for one that cannot be taken out.
    """
    if not tensors():
        return
    gc.collect(0)  # enough for what was made while nothing collected (collect_later)
    if tensors():
        gc.collect()  # what an error's frames have kept for a while is no longer young; cheaper than to look for it
    if not tensors():
        return
    with unfrozen():
        for _ in range(2):
            _clear_functools_caches({id(tensor) for tensor in tensors()})
            for tensor in tensors():
                _take_out(tensor)
            if not tensors():
                return
            gc.collect()
        holder = _holder(tensors())
    if holder is not None:
        raise ConversionError(
            "a fake tensor that the model's forward made while it was looked at is still held "
            f"by {holder}, and the model may come upon it. Restart the process before it is used further."
        )


@contextlib.contextmanager
def unfrozen() -> Iterator[None]:
    """Lets be found what ``gc.freeze()`` has hidden from who looks through the collector's objects, as servers do.

    It is hidden again afterwards, and with it what has come since, for which objects it was cannot be told.
    """
    with Transaction() as undo, undo:
        if gc.get_freeze_count():
            undo.afterwards("what gc.freeze() hides", gc.freeze)
            gc.unfreeze()
        yield


def _clear_functools_caches(held: set[int]) -> None:
    for cache in gc.get_objects():
        if type(cache) is functools._lru_cache_wrapper:
            reached: list[object] = [cache]
            for _ in range(4):  # the cache's links, their tuples, what these hold
                inside = [inner for outer in reached for inner in gc.get_referents(outer)]
                # Of a cached method the key is its module: here the copy that was run.
                modules = [inner for inner in inside if _is_module(inner)]
                tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
                reached = [inner for inner in inside if not callable(inner)]
                if any(id(value) in held for value in (*reached, *tensors)):
                    cache.cache_clear()
                    break
                reached = [
                    v for v in reached if isinstance(v, tuple | list | dict) or type(v).__name__ == "_lru_list_elem"
                ]


def _take_out(tensor: Tensor) -> None:
    """Takes ``tensor``, or a tuple or list with it, out of each dict or list; an attribute's old value is not known."""
    reached: list[Any] = [tensor]
    for _ in range(4):
        ids = {id(thing) for thing in reached}
        holders = [h for h in gc.get_referrers(*reached) if h is not reached and not isinstance(h, types.FrameType)]
        for holder in holders:
            if type(holder) in _DICTS and not _is_namespace(holder):
                for key in [key for key, value in holder.items() if id(value) in ids]:
                    del holder[key]
            elif type(holder) is list:
                holder[:] = [item for item in holder if id(item) not in ids]
        reached = [holder for holder in holders if type(holder) is tuple]
        if not reached:
            return


def _is_namespace(names: dict[Any, Any]) -> bool:
    """Whether ``names`` are the attributes of an object, or the globals of a module."""
    return any(getattr(holder, "__dict__", None) is names for holder in gc.get_referrers(names))


def _holder(tensors: list[Tensor]) -> str | None:
    """What leads from a module's or a class's names to one of ``tensors``; None: nothing does.

    Frames do not count: a log record keeps those of the error by which a run has ended.
    """
    level: list[Any] = list(tensors)
    seen = {id(level), *map(id, level)}
    while level:
        above: list[Any] = []
        for holder in gc.get_referrers(*level):
            if id(holder) in seen or holder is above or isinstance(holder, _FRAMES):
                continue
            if isinstance(holder, types.ModuleType | type):
                return ", ".join(sorted({type(thing).__name__ for thing in level} - {"dict"})) or type(holder).__name__
            seen.add(id(holder))
            above.append(holder)
        seen.add(id(above))
        level = above
    return None


_FRAMES = (types.FrameType, types.TracebackType, types.GeneratorType)
