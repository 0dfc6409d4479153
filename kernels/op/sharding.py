"""Sharding rules: how the attention ops run on DTensors (torch.distributed.tensor), each rank on its shard.

Batch and heads can be sharded, for nothing in attention crosses them: query, key and value alike, row bias and mask
with them where they have that axis. Query heads that share key heads can be sharded if each rank gets whole groups.

Where neither a causal mask nor a window depends on positions, rows can be sharded, with keys and values whole; and keys
with rows whole, where nothing is worked out of all keys of a row (their number, or their sum below a row cap): then
each rank has a part of the output, and parts add. (Context parallelism does more: :mod:`sigswap.sequence`.)

All else is brought together first, by DTensor. Gradients of what is whole on each rank are partial sums.

The rules are registered when an op first meets DTensors: importing torch.distributed.tensor takes most of a second.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from sigswap.kernels.host.problem import Options

_DTENSORS = "torch.distributed.tensor"
_waiting: list[Any] = []


def shard_batch_and_heads(attention: Any) -> None:
    """Gives the ops of an :class:`sigswap.kernels.op.registration.AttentionOp` for [B, H, N, D] these rules."""
    _waiting.append(attention)


def meet_dtensors() -> None:
    """Registers the rules, if there can be DTensors."""
    if not _waiting or _DTENSORS not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for attention in _waiting:
        register_sharding(attention.op)(functools.partial(_forward, 1))
        register_sharding(attention.sums_op)(functools.partial(_forward, 2))
        register_sharding(attention.backward_op)(_backward)
        for op in (attention.op, attention.sums_op, attention.backward_op):
            _look_at_numbers(op, 1 + attention.tensors)
    _waiting.clear()


def _look_at_numbers(op: Any, first: int) -> None:
    """Has DTensor keep what it has worked out for an op by its options, too, and by its arguments from the number
    ``first`` on (which gradients a backward is to compute): by itself it does so by tensors, and some integers."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    known: Any = DTensor._op_dispatcher.sharding_propagator
    known.op_to_schema_info[op] = RuntimeSchemaInfo(first, list(Options._fields), needs_pytree=True)


def _forward(results: int, *inputs: Any, **options: Any) -> list[tuple[list[Any], list[Any]]]:
    """``inputs``: query, key, value, and if given row bias, mask and seed, of which each is None or has a shape."""
    sums = results > 1  # whose rows are partial sums, too
    return [([out] * results, placements) for out, placements in _shardings(inputs, Options(**options), sums)]


def _backward(
    grad_out: Any, query: Any, key: Any, value: Any, bias: Any, attn_mask: Any, seed: Any, output_mask: Sequence[bool],
    row_delta: Any = None, **options: Any,
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    from torch.distributed.tensor import Partial, Replicate

    shardings = []
    for out, placements in _shardings((query, key, value, bias, attn_mask, seed), Options(**options), False):
        gradients = [
            Replicate() if not need else Partial() if out != Replicate() and placement == Replicate() else placement
            for need, placement in zip(output_mask, placements, strict=False)
        ]
        given = Replicate() if out == Partial() else out
        delta = [] if row_delta is None else [given]
        shardings.append((gradients, [given, *placements, *[None] * len(output_mask), *delta]))
    return shardings


def _shardings(inputs: Sequence[Any], options: Options, sums: bool) -> list[tuple[Any, list[Any]]]:
    """(placement of the output, placements of ``inputs``) over one axis of a mesh. ``sums``: of rows' sums, too."""
    from torch.distributed.tensor import Replicate, Shard

    query, key = inputs[:2]
    found: list[tuple[Any, list[Any]]] = [(Replicate(), [None if x is None else Replicate() for x in inputs])]
    for axis in (0, 1):
        grouped = axis == 1 and key.shape[1] != query.shape[1]
        if grouped and any(key.shape[1] % size for size in query.mesh.shape):
            continue
        placements: list[Any] = [Shard(axis)] * 3
        for index, tensor in enumerate(inputs[3:]):
            if tensor is None:
                placements.append(None)
            elif index == 2 or tensor.shape[axis] == 1:  # the seed, or what is the same for all
                placements.append(Replicate())
            elif tensor.shape[axis] == query.shape[axis]:
                placements.append(Shard(axis))
            else:  # a mask that is repeated along the batch
                break
        else:
            found.append((Shard(axis), placements))
    return [*found, *_along_sequence(inputs, options, sums)]


def _along_sequence(inputs: Sequence[Any], options: Options, sums: bool) -> list[tuple[Any, list[Any]]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if options.is_causal or options.window_left >= 0 or options.window_right >= 0 or options.dropout_p > 0.0:
        return []
    filled: list[Any] = [*inputs, *[None] * (6 - len(inputs))]
    query, key, _, bias, mask, seed = filled

    def placed(tensor: Any, axis: int, whole: int) -> Any:
        """Of the row bias or the mask, with the axis that has ``whole`` elements where it is not the same for all."""
        return None if tensor is None else Shard(axis) if 1 < tensor.shape[axis] == whole else Replicate()

    none = [None if seed is None else Replicate()]
    rows, keys = query.shape[2], key.shape[2]
    by_row = [Shard(2), Replicate(), Replicate(), placed(bias, 2, rows), placed(mask, 2, rows), *none]
    found: list[tuple[Any, list[Any]]] = [(Shard(2), by_row[: len(inputs)])]
    if not options.visible_bias and options.row_cap == 0.0 and not sums:
        whole = None if bias is None else Replicate()
        by_key = [Replicate(), Shard(2), Shard(2), whole, placed(mask, 3, keys), *none]
        found.append((Partial(), by_key[: len(inputs)]))
    return found
