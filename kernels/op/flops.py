"""What the ops cost, for ``torch.utils.flop_counter``: the formulas of fused softmax attention.

As there, masks do not count (neither causal ones nor windows), nor does what is done per score. That module is not
imported here, for it takes tenths of a second.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _dense(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Query [B, H, M, D], key [B, Hk, N, D], value [B, Hk, N, Dv]: two products of B H M N."""
    batch, heads, rows, dim = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (dim + value.shape[-1])


def _packed(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, keys: Tensor, longest: tuple[int, int]) -> int:
    """The same of sequences of as many rows and keys; where these are not known (fake tensors), all are the longest."""
    known = type(rows) is Tensor and not rows.is_meta
    # In 64 bits: a sequence of 46,341 rows and keys has more pairs than an int32 holds.
    own = rows.long() * keys if known else None
    pairs = rows.shape[0] * longest[0] * longest[1] if own is None else int(own.sum())
    return 2 * query.shape[1] * pairs * (query.shape[-1] + value.shape[-1])


def _forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return _dense(query, key, value)


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *a: Any, out_val: Any = None, **k: Any) -> int:
    """The scores again, then dP and dV, dQ and dK: five products of two."""
    batch, heads, rows, dim = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (3 * dim + 2 * value.shape[-1])


def _forward_packed(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, rows: Tensor, keys: Tensor, seed: Any, most_rows: int,
    most_keys: int, *, out_val: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return _packed(query, key, value, rows.diff(), keys.diff(), (most_rows, most_keys))


def _backward_packed(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, rows: Tensor, keys: Tensor, seed: Any,
    most_rows: int, most_keys: int, *args: Any, out_val: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    once = _packed(query, key, value, rows.diff(), keys.diff(), (most_rows, most_keys))
    dims = query.shape[-1] + value.shape[-1]
    return once // dims * (3 * query.shape[-1] + 2 * value.shape[-1])


def _forward_paged(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, table: Any, keys: Tensor, rows: Tensor, most_rows: int,
    most_keys: int, *, out_val: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return _packed(query, key, value, rows.diff(), keys, (most_rows, most_keys))


def register(flop_counter: ModuleType) -> None:
    """Enters the formulas into the table of ``torch.utils.flop_counter``, once."""
    ops = torch.ops.sigswap
    for packets, formula in (
        ((ops.sigmoid_attention, ops.sigmoid_attention_sums), _forward),
        ((ops.sigmoid_attention_blocks, ops.sigmoid_attention_blocks_sums), _forward),
        ((ops.sigmoid_attention_backward, ops.sigmoid_attention_blocks_backward), _backward),
        ((ops.sigmoid_attention_varlen, ops.sigmoid_attention_varlen_sums), _forward_packed),
        ((ops.sigmoid_attention_paged,), _forward_paged),
        ((ops.sigmoid_attention_varlen_backward,), _backward_packed),
    ):
        new = [packet for packet in packets if packet not in flop_counter.flop_registry]
        if new:
            flop_counter.register_flop_formula(new, get_raw=True)(formula)
