"""What torch.func.vmap makes of an attention op.

``(info, in_dims, *inputs, **options) -> (result, out_dims)`` is the form of a rule: in_dims[i] is the dimension of
inputs[i] that is mapped over, or None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.kernels.op.registration import AttentionOp, library

Rule = Callable[..., tuple[Any, Any]]


def register_folding(op: AttentionOp) -> None:
    """For tensors [batch, heads, ...]: one call, in which the mapped dimension is part of the batch.

    Dropout draws by the position in the batch, which then would differ from that of the op alone: it loops.
    """
    loop_backward = looping(op.backward_op)

    def forward(
        target: torch._ops.OpOverload, info: Any, in_dims: tuple[int | None, ...], *inputs: Any, **options: Any
    ) -> tuple[Any, Any]:
        if options.get("dropout_p", 0.0) > 0.0:
            return looping(target)(info, in_dims, *inputs, **options)
        size, batch = info.batch_size, _batch(inputs[0], in_dims[0])
        tensors: list[Tensor | None] = [_fold(t, dim, size) for t, dim in zip(inputs[:3], in_dims, strict=False)]
        for fold, tensor, dim in zip((_fold_broadcast, _fold_mask), inputs[3:5], in_dims[3:], strict=False):
            tensors.append(fold(tensor, dim, size, batch))
        results: Any = target(*tensors, **options)
        if isinstance(results, tuple):
            return tuple(each.unflatten(0, (size, batch)) for each in results), (0,) * len(results)
        return results.unflatten(0, (size, batch)), 0

    def backward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any, **options: Any) -> tuple[Any, Any]:
        if options.get("dropout_p", 0.0) > 0.0:
            return loop_backward(info, in_dims, *inputs, **options)
        needs, row_delta = inputs[7], inputs[8] if len(inputs) > 8 else None
        size, batch = info.batch_size, _batch(inputs[1], in_dims[1])
        tensors: list[Tensor | None] = [_fold(t, dim, size) for t, dim in zip(inputs[:4], in_dims, strict=False)]
        folds = _fold_broadcast, _fold_mask
        for fold, tensor, dim, needed in zip(folds, inputs[4:6], in_dims[4:], needs[3:], strict=False):
            tensors.append(fold(tensor, dim, size, batch, shared=not needed))
        row_delta = None if row_delta is None else _fold(row_delta, in_dims[8], size)
        grads = op.backward_op(*tensors, None, needs, row_delta, **options)
        results, out_dims = [], []
        for grad, tensor, dim, needed in zip(grads, inputs[1:6], in_dims[1:6], needs, strict=True):
            if needed and tensor is not None:
                own = _batch(tensor, dim)
                grad = grad.unflatten(0, (size, batch))
                if own != batch:
                    grad = grad.unflatten(1, (batch // own, own)).sum(1)
            results.append(grad)
            out_dims.append(0 if needed and tensor is not None else None)
        return tuple(results), tuple(out_dims)

    for target in (op.op, op.sums_op):
        torch.library.register_vmap(target.name(), functools.partial(forward, target), lib=library)
    torch.library.register_vmap(op.backward_op.name(), backward, lib=library)


def register_looping(op: AttentionOp) -> None:
    """One call per element of the mapped dimension."""
    for each in (op.op, op.sums_op, op.backward_op):
        torch.library.register_vmap(each.name(), looping(each), lib=library)


def looping(op: torch._ops.OpOverload) -> Rule:
    """One call per element of the mapped dimension."""

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any, **options: Any) -> tuple[Any, Any]:
        def element(index: int) -> list[Any]:
            pairs = zip(inputs, in_dims, strict=True)
            return [each.select(dim, index) if isinstance(dim, int) else each for each, dim in pairs]

        if info.batch_size == 0:
            raise ArgumentError(
                "vmap of packed sequences, or under a mask by blocks, over a dimension of size 0 is not supported."
            )
        results = [op(*element(index), **options) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(grads) for grads in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _batch(tensor: Tensor, dim: int | None) -> int:
    """The size of a tensor's own first dimension."""
    return tensor.shape[1 if dim == 0 else 0]


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[batch, ...] of each as [size * batch, ...]."""
    mapped = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return mapped.expand(size, *mapped.shape[1:]).flatten(0, 1)


def _fold_broadcast(
    tensor: Tensor | None, dim: int | None, size: int, batch: int, shared: bool = True
) -> Tensor | None:
    """[batch | 1, ...] of each as [size * batch, ...]; as [1, ...], if it is the same for all and may be shared."""
    if tensor is None or (shared and dim is None and tensor.shape[0] == 1):
        return tensor
    own = _batch(tensor, dim)
    mapped = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return mapped.expand(size, batch if own == 1 else own, *mapped.shape[2:]).flatten(0, 1)


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int, shared: bool = True) -> Tensor | None:
    """As _fold_broadcast, for a mask [b, ...] of each, where b divides batch."""
    if mask is not None:
        own = _batch(mask, dim)
        if own > 1 and batch % own == 0:
            if shared and dim is None:
                return mask  # element s * batch + i has mask (s * batch + i) % b, which is i % b
            mapped = mask.unsqueeze(0) if dim is None else mask.movedim(dim, 0)
            repeated = mapped.unsqueeze(1).expand(size, batch // own, *mapped.shape[1:])
            return repeated.flatten(0, 2)
    return _fold_broadcast(mask, dim, size, batch, shared)
