"""Models that many tests of a file begin with, converted once: that takes most of the time of a test that trains."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def made_once(make: Callable[P, T]) -> Callable[P, T]:
    """What ``make`` returns, made at the first call with arguments that look the same. Each call gets its own copy.

    Random numbers start from the seed 0 for ``make`` and after each call, so that they are the same whichever tests
    have run before.
    """
    kept: dict[str, T] = {}

    @functools.wraps(make)
    def copied(*args: P.args, **kwargs: P.kwargs) -> T:
        key = repr((args, sorted(kwargs.items())))
        if key not in kept:
            torch.manual_seed(0)
            kept[key] = make(*args, **kwargs)
        torch.manual_seed(0)
        return copy.deepcopy(kept[key])

    return copied
