"""What is saved of a model beside its weights so that the one that its factory builds equals it: arguments as JSON,
buffers that only a run has made, and functions among its attributes."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_TUPLE = "sigswap_tuple"  # the key of the JSON object that stands for a tuple


@dataclasses.dataclass(frozen=True)
class Difference:
    """What is to be set on the model that a factory builds: ``attributes``, by module path and name, and buffers."""

    attributes: Mapping[str, Mapping[str, Any]]
    buffers: tuple[str, ...]


def to_json(value: Any) -> Any:
    """``value`` in types of JSON's, its tuples marked as such. Raises TypeError or ValueError if it has others."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if type(value) is tuple:
        return {_TUPLE: [to_json(item) for item in value]}
    if type(value) is list:
        return [to_json(item) for item in value]
    if type(value) is dict and all(isinstance(key, str) for key in value) and value.keys() != {_TUPLE}:
        return {key: to_json(item) for key, item in value.items()}
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def from_json(value: Any) -> Any:
    """What :func:`to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_TUPLE}:
            return tuple(from_json(item) for item in value[_TUPLE])
        return {key: from_json(item) for key, item in value.items()}
    return value


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are in no state_dict, such as tables that a forward makes when it first needs them."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in saved}


def add_buffer(model: nn.Module, name: str, shape: list[int], dtype: str) -> Tensor:
    """A buffer of that form in place of what ``model`` has under that name, for the values in a file."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    owner._buffers.pop(attribute, None)
    vars(owner).pop(attribute, None)
    owner.register_buffer(attribute, torch.empty(shape, dtype=getattr(torch, dtype)), persistent=False)
    return owner.get_buffer(attribute)


def is_same_function(first: Any, second: Any) -> bool:
    """Whether two functions do the same: code, defaults and what they close over, as far as that can be compared."""
    if first is second:
        return True
    if not (isinstance(first, types.FunctionType) and isinstance(second, types.FunctionType)):
        return False
    if first.__code__ != second.__code__ or first.__globals__ is not second.__globals__:
        return False
    try:
        cells = [tuple(cell.cell_contents for cell in function.__closure__ or ()) for function in (first, second)]
    except ValueError:  # one is empty
        return False
    return all(
        _is_same(a, b)
        for a, b in zip(
            (first.__defaults__, first.__kwdefaults__, *cells[0]),
            (second.__defaults__, second.__kwdefaults__, *cells[1]),
            strict=True,
        )
    )


def _is_same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_is_same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
    if first is None or isinstance(first, bool | int | float | str | torch.dtype):
        return bool(first == second)
    return is_same_function(first, second)
