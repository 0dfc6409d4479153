"""Whether tensors are as others were: of the same types, dtypes, devices, shapes, strides and keys of the dispatcher,
and equal in whether they require gradients.

Looking at these one by one, from Python, takes as long as launching a kernel. PyTorch has a check in C, of what Dynamo
compiles, that takes a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigswap.kernels.op.registration import is_plain

Alike = Callable[..., bool]
"""``alike(*tensors)``; what is no tensor is not."""


def like(*tensors: Tensor) -> Alike:
    """A check for others like these, which it does not keep. These are :func:`is_plain`, and so are those like them, if
    nothing ``listens()`` and no tensor that it is given is None."""
    guards = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    if guards is None:
        return _like(*tensors)
    # It refuses tensors of which two are the same one. So these are given once, and have to be the same one again.
    firsts = [next(place for place, other in enumerate(tensors) if other is tensor) for tensor in tensors]
    places = sorted(set(firsts))
    different = [tensors[place] for place in places]
    sizes, strides = ([list(of(tensor)) for tensor in different] for of in (Tensor.size, Tensor.stride))
    alike: Alike = guards(*different, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if len(places) == len(tensors):
        return alike
    same = [(place, first) for place, first in enumerate(firsts) if place != first]
    return lambda *others: (
        all(others[place] is others[first] for place, first in same) and alike(*[others[place] for place in places])
    )


def _like(*tensors: Tensor) -> Alike:
    """The same without PyTorch's."""
    known = [_kind(tensor) for tensor in tensors]
    return lambda *others: is_plain(*others) and [_kind(other) for other in others] == known


def _kind(tensor: Any) -> tuple[Any, ...]:
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad


def are_aligned(*tensors: Tensor) -> bool:
    """Whether all start at multiples of 16 bytes, which is not a part of being alike."""
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    return addresses % 16 == 0
