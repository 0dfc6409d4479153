"""What builds the unconverted model when it is loaded, and whether that is this model, but for its values."""

from __future__ import annotations

import functools
import math
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from sigswap.conversion import accelerate_hooks
from sigswap.conversion.install import apply_conversion, installed
from sigswap.conversion.keeping import device_mode
from sigswap.conversion.record import Conversion, conversion_of
from sigswap.conversion.state import OwnerState
from sigswap.distributed.shards import original_name
from sigswap.errors import ArgumentError, CheckpointError, Hint, SigswapError
from sigswap.saving import sources
from sigswap.saving.rebuilt import Difference, add_buffer, is_same_function, to_json, unsaved_buffers
from sigswap.saving.weights import Stored, check_keys
from sigswap.transaction import Transaction

# Attributes that do not change what a model computes, and those that torch keeps for itself.
_NOT_COMPARED = ("training", "grad_checkpointing", *accelerate_hooks.MOVES)


def find_factory(
    model: nn.Module, factory: str | None, kwargs: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any], Difference]:
    """The factory, its arguments, and what to set on what it builds, so that it equals ``model``."""
    if factory is not None:
        if not sources.is_factory(factory):
            raise ArgumentError(
                f"{{argument}}={factory!r} must be 'module:function' or 'timm:NAME'.", argument="factory"
            )
        if not isinstance(kwargs, Mapping | None):
            raise ArgumentError(f"{{argument}} must be a mapping, not {kwargs!r}.", argument="factory_kwargs")
        kwargs = dict(kwargs or {})
        try:
            to_json(kwargs)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{{argument}}={kwargs!r} must be of types that JSON has, or tuples: {error}.",
                argument="factory_kwargs",
            ) from None
        return factory, kwargs, _compare(model, factory, kwargs)
    if kwargs is not None:
        raise ArgumentError("{argument} needs a factory.", argument="factory_kwargs")
    cfg: Any = getattr(model, "pretrained_cfg", None)
    architecture = cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None)
    if architecture is None:
        raise CheckpointError(
            f"sigswap.save does not know how to build a {type(model).__name__} again: it is neither a transformers "
            "nor a timm model.",
            argument="factory",
            hint=Hint(
                "Pass {factory}, a function that returns the unconverted model and that can be imported where the "
                "model will be loaded, with {factory_kwargs} if it takes arguments.",
                {"factory": "'module:function'", "factory_kwargs": "{...}"},
            ),
        )
    tag = cfg.get("tag") if isinstance(cfg, dict) else cfg.tag
    name = f"timm:{architecture}.{tag}" if tag else f"timm:{architecture}"
    problem: CheckpointError | None = None
    for candidate in _timm_kwargs(model):
        try:
            return name, candidate, _compare(model, name, candidate)
        except CheckpointError as error:
            problem = problem or error
    raise CheckpointError(
        f"The arguments that this timm model was built with could not be found out. With those that "
        f"could be: {problem}",
        argument="factory_kwargs",
        hint=Hint(
            "Pass {factory}, and the other arguments of timm.create_model as {factory_kwargs}.",
            {"factory": repr(name), "factory_kwargs": "{...}"},
        ),
    )


def _timm_kwargs(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments of timm.create_model that may have been given, the likeliest first."""
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    if isinstance(getattr(model, "in_chans", None), int):
        kwargs["in_chans"] = model.in_chans
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    if rates:
        kwargs["drop_path_rate"] = _shortest(max(rates))  # timm's rule gives the last block the whole rate
    yield kwargs
    sized = dict(kwargs)
    for owner in (getattr(model, "patch_embed", None), model):
        size = getattr(owner, "img_size", None)
        if size is not None:
            sized["img_size"] = list(size) if isinstance(size, tuple) else size
            yield sized
            break
    pool = getattr(model, "global_pool", None)
    pool = getattr(getattr(getattr(model, "head", None), "global_pool", None), "pool_type", pool)
    if isinstance(pool, str):
        yield {**kwargs, "global_pool": pool}
        yield {**sized, "global_pool": pool}


def _shortest(rate: float) -> float:
    """0.1 for 0.10000000149011612, which a float32 tensor of rates makes of it, and will again."""
    single = numpy.float32(rate)
    return float(str(single)) if float(single) == rate else rate


def _compare(model: nn.Module, factory: str, kwargs: dict[str, Any]) -> Difference:
    """Checks that the factory builds ``model``, but for values; returns what differs and can be set.

    What a module computes is set by its class, tensors, submodules and attributes. Attributes that are plain
    numbers or strings (a dropout rate, an eps, timm's fused_attn) are set again after loading, and so are buffers
    that no state_dict has, such as a table that the last run has left; any other difference is an error.
    """
    built = _build_without_data(lambda: sources.build(factory, kwargs), factory)
    with installed(built, conversion_of(model)):  # for it may be one that others have, too
        return _difference(model, built, factory, kwargs)


def _difference(model: nn.Module, built: nn.Module, factory: str, kwargs: dict[str, Any]) -> Difference:
    other_model = f"{factory!r}{f' with factory_kwargs={kwargs}' if kwargs else ''} builds another model than this one"
    ours, theirs = _tensors(model), _tensors(built)
    free, free_there = unsaved_buffers(model), unsaved_buffers(built)
    made = tuple(name for name in free if ours[name] != theirs.get(name) and (name not in theirs or name in free_there))
    for name in [*ours, *theirs]:
        if name not in made and ours.get(name) != theirs.get(name):
            raise CheckpointError(
                f"{other_model}: {name} is {_shape(ours.get(name))} in the model and "
                f"{_shape(theirs.get(name))} in what the factory builds."
            )
    modules, built_modules = dict(model.named_modules()), dict(built.named_modules())
    for path in [*modules, *built_modules]:
        kind, built_kind = (
            original_name(found[path]) if path in found else "not there" for found in (modules, built_modules)
        )
        if kind != built_kind:
            raise CheckpointError(
                f"{other_model}: module {path!r} is {kind} in the model and {built_kind} in what the factory builds."
            )
    differing: dict[str, dict[str, Any]] = {}
    for path, module in modules.items():
        if is_added(path):
            continue  # built from the conversion alone
        for name, value in vars(module).items():
            if name.startswith("_") or name in _NOT_COMPARED:
                continue
            other = vars(built_modules[path]).get(name)
            plain = (
                value is None
                or isinstance(value, bool | int | str)
                or (isinstance(value, float) and math.isfinite(value))
            )
            if plain and other != value:
                differing.setdefault(path, {})[name] = value
            elif isinstance(value, types.FunctionType) and not is_same_function(value, other):
                raise CheckpointError(
                    f"{other_model}: {path}.{name} is another function in the model than in what the factory builds."
                )
            elif isinstance(value, tuple | list | torch.dtype) and _is_plain(value) and other != value:
                raise CheckpointError(
                    f"{other_model}: {path}.{name} is {value} in the model and {other} in what the factory builds."
                )
    return Difference(differing, made)


def is_added(path: str) -> bool:
    """Whether a module is sigswap's, of a converted one."""
    return "sigswap" in path.split(".")


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def _build_without_data(factory: Callable[[], nn.Module], name: str) -> nn.Module:
    """What ``factory`` builds, on the meta device; on the CPU, if it needs values to be built."""
    with unmoved_random_state():
        try:
            return _on_meta(factory)
        except SigswapError:
            raise
        except Exception:
            try:
                return factory()
            except Exception as error:
                raise CheckpointError(
                    f"{{argument}}={name!r} failed: {type(error).__name__}: {error}", argument="factory"
                ) from error


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` gives on the meta device. If it fails, that is left, wherever the failure came from."""
    with Transaction() as undo, undo:
        device_mode(undo.on_failure)
        with torch.device("meta"):
            return build()


# Loading


@contextmanager
def unmoved_random_state() -> Iterator[None]:
    """Within it random numbers are drawn without that those after it change: torch's, Python's and numpy's."""
    states: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        states.append((numpy.set_state, numpy.get_state()))
    with Transaction() as undo, undo:
        for put_back, state in states:
            undo.afterwards("the random state", functools.partial(put_back, state))
        yield


def check_buffers(made: Mapping[str, Mapping[str, Any]], header: Mapping[str, Stored], path: Path) -> None:
    """Raises CheckpointError if the file does not hold the buffers ``made``, in their shapes and dtypes."""
    for name, form in made.items():
        stored, dtype = header.get(name), getattr(torch, form["dtype"], None)
        if stored is None:
            check_keys(path, [name], (), ())
        elif stored.shape != tuple(form["shape"]) or stored.dtype != dtype:
            raise CheckpointError(f"made_buffers[{name!r}] is {form}, and {path} has {stored.dtype} {stored.shape}.")


def built_on_meta(factory: str, kwargs: Mapping[str, Any]) -> nn.Module | None:
    """What ``factory`` builds, without data; None if it needs values to be built, or returns what was built before."""
    try:
        made = _on_meta(functools.partial(sources.build, factory, kwargs))
    except SigswapError:
        raise
    except Exception:
        return None
    return made if any(parameter.is_meta for parameter in made.parameters()) else None


def finish(
    model: nn.Module,
    attributes: Mapping[str, Mapping[str, Any]],
    conversion: Conversion,
    made: Mapping[str, Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Sets ``attributes``, by module path, converts ``model``, and gives it the buffers ``made``, whose values a file
    has. Returns the tensors that the file is to have. Raises CheckpointError or ConversionError.
    """
    for path, values in attributes.items():
        if is_added(path):
            continue  # written by an earlier version, and of no use
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise CheckpointError(f"attributes: the model has no module {path!r}.") from error
        for name, value in values.items():
            before, inherited = vars(module).get(name), getattr(type(module), name, None)
            registered = any(name in each for each in (module._parameters, module._buffers, module._modules))
            is_code = callable(inherited) or isinstance(inherited, property)
            if name.startswith("_") or name in _NOT_COMPARED or registered or is_code:
                raise CheckpointError(f"attributes[{path!r}]: {name!r} cannot be set to {value!r}.")
            if before is not None and value is not None and isinstance(before, str) != isinstance(value, str):
                raise CheckpointError(
                    f"attributes[{path!r}][{name!r}] must be of the kind of {before!r}, not {value!r}."
                )
            setattr(module, name, value)
    apply_conversion(model, conversion)
    buffers = {name: add_buffer(model, name, **form) for name, form in made.items()}
    return {**model.state_dict(keep_vars=True), **buffers}


def check_plan_sizes(
    conversion: Conversion, header: Mapping[str, Stored], aliases: Mapping[str, str], path: Path
) -> None:
    """Raises CheckpointError if the file lacks parameters of the ``conversion``, or has them in other shapes."""
    for plan in conversion.owners:
        state = OwnerState(plan, conversion.config.for_path(plan.path), torch.float32, torch.device("meta"))
        for name, tensor in state.state_dict().items():
            full = f"{plan.path}.sigswap.{name}".removeprefix(".")
            stored = header.get(aliases.get(full, full))
            if stored is None:
                check_keys(path, [full], (), ())
            elif stored.shape != tuple(tensor.shape):
                check_keys(path, (), (), [(full, stored.shape, tuple(tensor.shape))])
