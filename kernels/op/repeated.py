"""Calls of the dense op that were made before, which need no checks again.

Whether arguments are valid, and what the op makes of them, depends on how tensors lie in memory and on plain numbers.
On the host that takes longer than a launch, so it is kept, by all that it depends on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sigswap.kernels import settings
from sigswap.kernels.host.layout import is_aligned
from sigswap.kernels.host.problem import MAX_PLANS, Options, Problem
from sigswap.kernels.op.registration import Known, is_plain

_HALF = (torch.bfloat16, torch.float16)


def key_of(query: Any, key: Any, value: Any, *numbers: Any) -> tuple[Any, ...] | None:
    """What all else follows from; None: it is none of the usual calls. Those are of half precision (what becomes of
    float32 depends on PyTorch's settings), and :func:`is_plain`.

    numbers: the other arguments, of which equal ones mean the same: so 1 must not stand for True.
    """
    if query is None or key is None or value is None:  # which is_plain() takes for tensors that are not given
        return None
    if not is_plain(query, key, value) or query.dtype not in _HALF:
        return None
    return (
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        is_aligned(query),
        is_aligned(key),
        is_aligned(value),
        settings.sigmoid_form,
        numbers,
    )


def known(key: tuple[Any, ...]) -> Known | None:
    return _known.get(key)


def remember(key: tuple[Any, ...], query: Tensor, key_tensor: Tensor, value: Tensor, options: Options) -> None:
    """Of a call that went well, whose tensors the op took as they are."""
    if len(_known) >= MAX_PLANS:
        _known.clear()
    problem = Problem(query, key_tensor, value, None, None, None, options)
    _known[key] = Known(options, problem.signature)


_known: dict[tuple[Any, ...], Known] = {}
