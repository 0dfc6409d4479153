"""What a process sends to others: counted, or left out to see how long the rest takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _python_dispatch

from sigswap.sequence.exchange import Pending, SequenceGroup

_Mode: Any = _python_dispatch.TorchDispatchMode


class Traffic(_Mode):  # type: ignore[misc]
    """Counts the bytes that this process hands to other ones while it is active, in ``sent``.

    A collective counts as its ring algorithm sends: an all-gather n - 1 times the part, a reduce-scatter likewise, an
    all-reduce both. ``silent``: functional collectives (those of DTensor and of PyTorch's own ring attention) and
    :class:`SequenceGroup` are not run; what they would have brought is whatever lies in memory.
    """

    def __init__(self, silent: bool = False) -> None:
        super().__init__()
        self.sent = 0
        self._silent = silent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(getattr(each, "__name__", "") == "DTensor" for each in types):
            return NotImplemented  # it makes the calls that are counted
        kwargs = kwargs or {}
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if namespace in ("c10d", "_c10d_functional"):
            found = _SENT.get(name)
            if found is not None:
                self.sent += found(args, _group(args).size())
            if self._silent and namespace == "_c10d_functional" and name in _SILENT:
                return _SILENT[name](*args)
        return func(*args, **kwargs)


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing is sent inside, where it is sent by functional collectives or by :class:`SequenceGroup`."""
    silent = {
        "exchange": lambda *arguments, **keywords: Pending((), ()),
        "all_to_all": lambda *arguments: None,
        "sum": lambda *arguments: None,
    }
    kept = {name: getattr(SequenceGroup, name) for name in silent}
    try:
        for name, nothing in silent.items():
            setattr(SequenceGroup, name, nothing)
        with Traffic(silent=True):
            yield
    finally:
        for name, method in kept.items():
            setattr(SequenceGroup, name, method)


def _group(args: Any) -> Any:
    """The process group among the arguments, which hold it, or its name as the last text."""
    for each in reversed(args):
        if isinstance(each, dist.ProcessGroup):
            return each
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()):
            return dist.ProcessGroup.unbox(each)
        if isinstance(each, str):
            by_name: Any = dist.distributed_c10d
            return by_name._resolve_process_group(each)
    return dist.group.WORLD


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_bytes, tensors)) if isinstance(tensors, list | tuple) else 0


def _to_others(args: Any, size: int) -> int:
    """Of an all-to-all with the splits ``args[2]``: of the parts for other ranks."""
    sent, splits = _bytes(args[0]), args[2]
    if not splits:
        return sent * (size - 1) // size
    mine = splits[_group(args).rank()]
    return int(sent * (sum(splits) - mine) // max(1, sum(splits)))


_SENT: dict[str, Callable[[Any, int], int]] = {
    "send": lambda args, size: _bytes(args[0]),
    "broadcast_": lambda args, size: _bytes(args[0]),
    "allreduce_": lambda args, size: 2 * _bytes(args[0]) * (size - 1) // size,
    "allgather_": lambda args, size: _bytes(args[1]) * (size - 1),
    "_allgather_base_": lambda args, size: _bytes(args[1]) * (size - 1),
    "allgather_into_tensor_coalesced_": lambda args, size: _bytes(args[1]) * (size - 1),
    "reduce_scatter_": lambda args, size: _bytes(args[0]) * (size - 1),
    "_reduce_scatter_base_": lambda args, size: _bytes(args[0]) * (size - 1),
    "reduce_scatter_tensor_coalesced_": lambda args, size: _bytes(args[0]) * (size - 1),
    "alltoall_base_": lambda args, size: _bytes(args[1]) * (size - 1) // size,
    "all_reduce": lambda args, size: 2 * _bytes(args[0]) * (size - 1) // size,
    "all_gather_into_tensor": lambda args, size: _bytes(args[0]) * (size - 1),
    "reduce_scatter_tensor": lambda args, size: _bytes(args[0]) * (size - 1) // size,
    "all_to_all_single": _to_others,
}
"""By name, what a call sends, from its arguments and the number of ranks."""

_SILENT: dict[str, Callable[..., Any]] = {
    "wait_tensor": lambda tensor: tensor,
    "all_reduce": lambda tensor, *others: tensor.clone(),
    "all_gather_into_tensor": lambda tensor, size, *others: tensor.new_empty(
        (size * tensor.shape[0], *tensor.shape[1:])
    ),
    "reduce_scatter_tensor": lambda tensor, how, size, *others: tensor.new_empty(
        (tensor.shape[0] // size, *tensor.shape[1:])
    ),
    "all_to_all_single": lambda tensor, splits, *others: tensor.new_empty((sum(splits), *tensor.shape[1:])),
}
