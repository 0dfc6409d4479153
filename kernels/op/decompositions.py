"""The ops in ATen's ops, for what knows no others: exporters, compiled packages, other backends.

:func:`decompositions` is what ``ExportedProgram.run_decompositions``, ``make_fx`` and AOTAutograd take. Nothing uses it
unasked: the scores are held in memory, all at once. What the keys add to them (mask and -ln n) is one tensor, so that a
program costs what one with softmax attention does: product, sum, sigmoid, product.

Sizes may be symbolic. Half precision is computed in float32, as :mod:`sigswap.kernels.reference` does. Unlike there, a
score that is NaN or infinite under a mask that hides it gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sigswap.kernels.host.blocks import BLOCK, HEADER, Blocks, all_blocks_of
from sigswap.kernels.host.layout import by_rows, heads_first
from sigswap.kernels.host.problem import Options
from sigswap.kernels.op.dense import composed_probs
from sigswap.kernels.op.first_token import composed_bias
from sigswap.kernels.reference import kept as is_kept
from sigswap.kernels.reference import seen_by

Decompositions = dict[torch._ops.OperatorBase, Callable[..., Any]]


class _Call(NamedTuple):
    """A call of an op, [B, H, M, D] and so on, key and value with query's heads; tensors in the compute dtype."""

    query: Tensor
    """Times the scale."""
    key: Tensor
    value: Tensor
    probs: Tensor
    """Before dropout."""
    kept: Tensor | None
    """What dropout multiplies them by."""
    slope: Tensor | None
    """The soft cap's derivative."""


def decompositions() -> Decompositions:
    """By op of sigswap's, forward and backward, a function of the same arguments that calls ATen's ops only.

    For what knows no other ops::

        program = torch.export.export(model, inputs).run_decompositions(sigswap.decompositions())
        torch.onnx.export(program, dynamo=True).save("model.onnx")

    A new table at each call, which may be merged with others. The scores are held in memory.
    """
    ops = torch.ops.sigswap
    found: Decompositions = {
        ops.sigmoid_probs.default: composed_probs,
        ops.first_token_bias.default: composed_bias,
        ops.mask_blocks.default: all_blocks_of,
    }
    calls: dict[str, Callable[..., _Call]] = {
        "sigmoid_attention": _dense,
        "sigmoid_attention_blocks": _under_blocks,
        "sigmoid_attention_varlen": _packed,
    }
    for name, call in calls.items():
        packed = name.endswith("varlen")
        found[getattr(ops, name).default] = _forward(call, packed, sums=False)
        found[getattr(ops, f"{name}_sums").default] = _forward(call, packed, sums=True)
        found[getattr(ops, f"{name}_backward").default] = _backward(call, packed)
    found[ops.sigmoid_attention_paged.default] = _forward(_paged, True, sums=False)
    return found


def _forward(call: Callable[..., _Call], packed: bool, *, sums: bool) -> Callable[..., Any]:
    def forward(*inputs: Any, **keywords: Any) -> Any:
        query, options = inputs[0], Options(**keywords)
        found = call(options, *inputs)
        totals = found.probs.sum(-1, keepdim=True) if sums or options.row_cap > 0.0 else None
        out = torch.matmul(_dropped(found), found.value)
        if options.row_cap > 0.0 and totals is not None:
            out = out / totals.clamp(min=options.row_cap)
        out = out.to(query.dtype)
        if packed:
            out, totals = _packed_again(out), None if totals is None else _packed_again(totals)
        else:  # as the op stores it: a program may view it with the heads merged
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        return (out, totals) if sums else out

    return forward


def _backward(call: Callable[..., _Call], packed: bool) -> Callable[..., Any]:
    def backward(grad_out: Tensor, *inputs: Any, **keywords: Any) -> tuple[Tensor, ...]:
        options = Options(**keywords)
        # The dispatcher leaves out a row_delta that is None.
        given, row_delta = (inputs[:-1], inputs[-1]) if isinstance(inputs[-2], list | tuple) else (inputs, None)
        *own, output_mask = given
        found = call(options, *own)
        grad = heads_first(grad_out) if packed else grad_out
        delta = heads_first(row_delta) if packed and row_delta is not None else row_delta
        grads = _gradients(found, grad.to(found.probs.dtype), delta, options.scale)
        results = []
        for index, needed in enumerate(output_mask):
            tensor = own[index]
            if not needed or tensor is None:
                results.append(own[0].new_empty(0))
                continue
            shape = (tensor if not packed else by_rows(tensor) if index == 3 else heads_first(tensor)).shape
            grad = _summed(grads[index](), shape)
            if packed:
                grad = grad[0, :, :, 0].t() if index == 3 else grad[0].transpose(0, 1)
            results.append(grad.to(tensor.dtype).contiguous())
        return tuple(results)

    return backward


def _gradients(found: _Call, grad: Tensor, delta: Tensor | None, scale: float) -> list[Callable[[], Tensor]]:
    """Of query, key, value, bias and mask, with query's heads and all rows and keys."""
    grad_probs = torch.matmul(grad, found.value.mT)
    if found.kept is not None:
        grad_probs = grad_probs * found.kept
    if delta is not None:
        grad_probs = grad_probs - delta
    grad_scores = grad_probs * (found.probs * (1 - found.probs))
    grad_product = grad_scores if found.slope is None else grad_scores * found.slope
    return [
        lambda: torch.matmul(grad_product, found.key) * scale,
        lambda: torch.matmul(grad_product.mT, found.query),
        lambda: torch.matmul(_dropped(found).mT, grad),
        lambda: grad_scores.sum(-1, keepdim=True),
        lambda: grad_scores,
    ]


def _dense(
    options: Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
) -> _Call:
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    seen = added = None
    if attn_mask is not None:
        if attn_mask.shape[0] != 1 and attn_mask.shape[0] != batch:
            attn_mask = attn_mask.repeat(batch // attn_mask.shape[0], 1, 1, 1)
        seen = seen_by(attn_mask)
        added = None if attn_mask.dtype == torch.bool else attn_mask
    row, column = _count(rows, query)[:, None], _count(keys, query)
    seen = _in_band(seen, row + (keys - rows if options.bottom_right else 0), column, options)
    draws = None
    if options.dropout_p > 0.0:
        first = (_count(batch, query)[:, None] * query.shape[1] + _count(query.shape[1], query))[..., None, None]
        draws = first * rows + row, column
    return _call(options, query, key, value, bias, seen, added, _kept(seed, draws, options, query))


def _under_blocks(
    options: Options, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *blocks: Tensor
) -> _Call:
    seen = _seen_in(Blocks(*blocks), query.shape[2], key.shape[2])
    return _call(options, query, key, value, bias, seen, None, None)


def _seen_in(blocks: Blocks, rows: int, keys: int) -> Tensor:
    """:func:`sigswap.kernels.host.blocks.dense_mask`, of which no size depends on what is in the lists."""
    lists = blocks.rows
    count = (lists.shape[3] - HEADER) // 2
    order, place = lists[..., HEADER : HEADER + count].long(), lists[..., HEADER + count :].long()
    number = _count(count, lists).expand_as(order)
    at = torch.zeros_like(order).scatter(-1, order, number)  # where in its list each block of keys is
    fulls, listed = lists[..., :1], lists[..., :1] + lists[..., 1:2]
    full, mixed = at < fulls, (at >= fulls) & (at < listed)
    bits = blocks.row_bits[place.gather(-1, at)].unsqueeze(-1)  # of the other blocks they are any
    powers = torch.pow(2, _count(32, bits))  # int64: 2^31 is no int32
    tiles = ((bits & powers) != 0).flatten(-2) & mixed[..., None, None] | full[..., None, None]
    seen = tiles.transpose(3, 4).reshape(*lists.shape[:3], -1, count * BLOCK).flatten(2, 3)
    return seen[:, :, :rows, :keys]


def _packed(
    options: Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> _Call:
    """As one sequence of all, in which a row sees keys of its own sequence only."""
    sequence, row = _places(cu_seqlens_q, query)
    sequence_k, column = _places(cu_seqlens_k, key)
    sequence, row = sequence[:, None], row[:, None]
    shift: Tensor | int = (cu_seqlens_k.diff() - cu_seqlens_q.diff())[sequence] if options.bottom_right else 0
    seen = _in_band((sequence == sequence_k)[None, None], row + shift, column, options)
    draws = None
    if options.dropout_p > 0.0:
        first = sequence * query.shape[1] + _count(query.shape[1], query)[:, None, None]
        longest = cast(int, torch.sym_min(max_seqlen_q, query.shape[0]))
        draws = (first * longest + row)[None], column
    kept = _kept(seed, draws, options, query)
    query, key, value = (heads_first(tensor) for tensor in (query, key, value))
    return _call(options, query, key, value, None if bias is None else by_rows(bias), seen, None, kept)


def _paged(
    options: Options,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    bias: Tensor | None,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> _Call:
    """As one sequence of all that the block table has room for, in which a row sees keys of its own sequence only."""
    options = options._replace(bottom_right=True)
    places = block_table.shape[1] * key_cache.shape[1]
    sequence_k, column = (_count(size, query) for size in (block_table.shape[0], places))
    is_key = (column < cache_seqlens[:, None]).flatten()
    if key_cache.shape[0] == 0:  # one page, of no keys
        is_key = torch.zeros_like(is_key)
        key_cache, value_cache = (cache.new_zeros((1, *cache.shape[1:])) for cache in (key_cache, value_cache))
    # What is behind a sequence's last page is any number.
    pages = block_table.flatten().clamp(0, key_cache.shape[0] - 1)
    # Where there is no key the cache may hold NaN, which times 0 would be NaN.
    key, value = (
        torch.where(is_key[:, None, None], cache[pages].flatten(0, 1), 0.0) for cache in (key_cache, value_cache)
    )
    sequence, row = _places(cu_seqlens_q, query)
    sequence, row = sequence[:, None], row[:, None]
    own = is_key & (sequence == sequence_k[:, None].expand(-1, places).flatten())
    shift = (cache_seqlens - cu_seqlens_q.diff())[sequence]
    column = column.expand(block_table.shape[0], places).flatten()
    query, key, value = (heads_first(tensor) for tensor in (query, key, value))
    seen = _in_band(own[None, None], row + shift, column, options)
    return _call(options, query, key, value, None if bias is None else by_rows(bias), seen, None, None)


def _call(
    options: Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    added: Tensor | None,
    kept: Tensor | None,
) -> _Call:
    """``seen``: the visible keys, ``added``: an additive mask; both broadcast to [B, H, M, N]."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (_with_heads(tensor, query.shape[1]).to(dtype) for tensor in (key, value))
    query, keys = query.to(dtype) * options.scale, key.shape[2]
    scores, slope = torch.matmul(query, key.mT), None
    if options.softcap > 0.0:
        tanh = torch.tanh(scores / options.softcap)
        scores, slope = tanh * options.softcap, 1 - tanh * tanh
    own = torch.full((), options.const_bias, dtype=dtype, device=query.device)
    if options.visible_bias:
        if seen is None:
            own = own - torch.full_like(own, keys).clamp(min=1).log()
        else:
            counts = seen.sum(-1, keepdim=True)
            counts = counts if seen.shape[-1] == keys else counts * keys
            own = own - counts.clamp(min=1).to(dtype).log()
    if bias is not None and bias.shape[2] == 1:  # of few numbers, and so is what the keys add, in most models
        own = own + bias.to(dtype)
    elif bias is not None:
        scores = scores + bias.to(dtype)
    if added is not None:
        own = own + added.to(dtype)
    if seen is not None:
        own = torch.where(seen, own, -torch.inf)
    return _Call(query, key, value, torch.sigmoid(scores + own), kept, slope)


def _in_band(seen: Tensor | None, row: Tensor, column: Tensor, options: Options) -> Tensor | None:
    """``seen`` within the causal mask and the window of rows at the place ``row`` [M, 1] of keys at ``column`` [N]."""
    right = 0 if options.is_causal else options.window_right
    for inside in (
        None if right < 0 else column - right <= row,
        None if options.window_left < 0 else column >= row - options.window_left,
    ):
        if inside is not None:
            seen = inside[None, None] if seen is None else seen & inside
    return seen


def _kept(seed: Tensor | None, draws: tuple[Tensor, Tensor] | None, options: Options, query: Tensor) -> Tensor | None:
    if draws is None or seed is None:
        return None
    scale = 1.0 / (1.0 - options.dropout_p) if options.dropout_p < 1.0 else 0.0
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return is_kept(seed, *draws, options.dropout_p).to(dtype) * scale


def _dropped(found: _Call) -> Tensor:
    return found.probs if found.kept is None else found.probs * found.kept


def _places(cu_seqlens: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Of each packed position: which sequence it is in, and where in it."""
    index = _count(packed.shape[0], packed)
    sequence = (index[:, None] >= cu_seqlens[1:]).sum(-1)
    return sequence, index - cu_seqlens[sequence]


def _count(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, Hk, N, d] as [B, H, N, d]."""
    batch, own, length, dim = tensor.shape
    if own == heads:
        return tensor
    return tensor.unsqueeze(2).expand(batch, own, heads // own, length, dim).reshape(batch, heads, length, dim)


def _summed(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """Of [B, H, M, N] over what shared a tensor of this shape: dimensions of size 1, query heads, repeats of a mask."""
    for dim in (0, 1):
        size, whole = shape[dim], grad.shape[dim]
        if size != 1 and size != whole:
            parts = (size, whole // size) if dim == 1 else (whole // size, size)
            grad = grad.reshape(*grad.shape[:dim], *parts, *grad.shape[dim + 1 :]).sum(2 if dim == 1 else 0)
    return grad.sum_to_size(shape)


def _packed_again(tensor: Tensor) -> Tensor:
    """[1, H, total, D] as [total, H, D]."""
    return tensor[0].transpose(0, 1).contiguous()
