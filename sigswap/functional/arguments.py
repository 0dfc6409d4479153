"""The arguments of attention as functions, as the ops take them. What is none raises ArgumentError."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from sigswap.errors import ArgumentError

Window = int | tuple[int | None, int | None]
_LONGEST = 2**63 - 1


def bias_terms(bias: Tensor | float | None) -> tuple[bool, float, Tensor | None]:
    """The op's visible_bias, const_bias and bias."""
    if bias is None:
        return True, 0.0, None
    if isinstance(bias, Tensor):
        return False, 0.0, bias
    if isinstance(bias, float):
        return False, bias, None
    # An int is a number of keys in SigmoidConfig; taken for a bias here, it would go wrong without a word.
    raise ArgumentError(f"bias must be None, a float or a tensor, not {bias!r}; -math.log(n) for n keys.")


def op_scale(query: Tensor, scale: float | None) -> float:
    """None: one over the root of head_dim."""
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ArgumentError("scale must be a number: as a tensor it would get no gradient. Multiply query by it.")
    if scale is not None:
        return scale
    return query.shape[-1] ** -0.5 if query.shape[-1] > 0 else 1.0


def op_softcap(softcap: float | None) -> float:
    """As the op takes it: 0 is none."""
    if softcap is None:
        return 0.0
    if not softcap > 0.0:
        raise ArgumentError(f"softcap must be None or positive, not {softcap}.")
    return softcap


def op_row_cap(row_cap: float | None) -> float:
    """As the op takes it: 0 is none."""
    if row_cap is None:
        return 0.0
    is_number = isinstance(row_cap, int | float | torch.SymFloat) and not isinstance(row_cap, bool)
    if not is_number or not 0.0 < row_cap < math.inf:
        raise ArgumentError(f"row_cap must be None, or positive and finite, not {row_cap!r}.")
    return row_cap


def op_window(window: Window | None) -> tuple[int, int]:
    """(left, right) as the op takes it: -1 is no limit."""
    if window is None:
        return -1, -1
    sides = (window, window) if isinstance(window, int) else window
    if not isinstance(sides, tuple) or len(sides) != 2:
        raise ArgumentError(f"window must be None, an int, or a tuple (left, right), not {window!r}.")
    try:
        left, right = (-1 if side is None else _side(side) for side in sides)
    except TypeError as error:
        raise ArgumentError(f"window must hold integers, or None for no limit, not {window!r}.") from error
    if left < -1 or right < -1:
        raise ArgumentError(f"window must hold numbers >= 0, or None or -1 for no limit, not {window!r}.")
    return left, right


def op_length(name: str, length: int) -> int:
    """Whatever is an integer: lengths often are NumPy's, or a tensor's."""
    if isinstance(length, int | torch.SymInt):
        return length
    if torch.compiler.is_compiling():  # all else is a tensor there; without fullgraph the call is left out, and eager
        raise ArgumentError(f"{name} must be a Python int inside torch.compile: turn it into one before, with int().")
    try:
        return operator.index(length)
    except TypeError as error:
        raise ArgumentError(f"{name} must be an integer, not {length!r}.") from error


def _side(side: Any) -> int:
    """Whatever is an integer, of 64 bits at most, as the op has it: a side as long as that hides nothing."""
    if isinstance(side, torch.SymInt):
        return side  # type: ignore[return-value]  # an int to the op
    whole = operator.index(side)
    return whole if torch.compiler.is_compiling() else min(whole, _LONGEST)
