"""Sigmoid attention in plain PyTorch: defines the result, on any device, in memory linear in the sequence length.

For query row i of one head, over the keys j that it sees (:func:`forward` has the arguments)::

    s_ij = scale * q_i . k_j;  s_ij = softcap * tanh(s_ij / softcap), if softcap;  s_ij += mask_ij, if additive
    b_i  = const_bias - ln(max(n_i, 1)) if visible_bias + bias_i        n_i: the number of keys that row i sees
    p_ij = sigmoid(s_ij + b_i), exactly 0 where not visible; then dropout
    o_i  = sum_j p_ij v_j, divided by max(row_cap, sum_j p_ij with p before dropout), if there is a row cap

Packed sequences are computed one after the other; those whose keys and values lie in pages from copies of these.

The backward recomputes p, and needs neither o nor a row statistic (with dP = dO V^T, undone dropout in it)::

    dS = p (1 - p) dP;  dbias = sum_j dS;  dmask = dS;  dX = dS (1 - tanh^2), if softcap
    dQ = scale dX K;  dK = scale dX^T Q;  dV = p^T dO

Below a row cap dO and dP are others: :func:`undivided` has them.

Scores are never held for more than one tile: some heads, some query rows, and the keys they can see.
Half precision is computed in float32 throughout, float64 in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sigswap.kernels import MASKED_SCORE
from sigswap.kernels.host.blocks import dense_mask
from sigswap.kernels.host.draws import COLUMN, FIRST, LAST, RANGE, SECOND, SHIFT
from sigswap.kernels.host.lengths import checked_ends, checked_keys
from sigswap.kernels.host.problem import Gradients, Options, Pages, Problem
from sigswap.kernels.host.results import empty_gradients, empty_output

MAX_TILE_SCORES = 1 << 20
"""Scores per tile, at most (a single query row may hold more). 4 MiB in float32: about a core's cache."""


MAX_BAND_ROWS = 256
"""Query rows per tile, at most, under a causal mask or a window."""


_WORD = 0xFFFFFFFF


class _Heads(NamedTuple):
    """A group of (batch, key/value head) pairs that is computed at once, with rows_per_tile query rows."""

    batch: slice
    kv_head: slice
    head: slice
    rows_per_tile: int


class _Tile(NamedTuple):
    """A block of scores: [batch, head, row, key]."""

    batch: slice
    head: slice
    row: slice
    key: slice


class _Dropout(NamedTuple):
    """Row i of (b, h) is number ((first_batch + b) H + h) M + i, where sizes are H, M."""

    seed: Tensor
    first_batch: int
    sizes: tuple[int, int]


class _Targets(NamedTuple):
    """Where the gradients go; None: not needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    row_sums: Tensor | None
    """[B, H, M, 1]: sum_j dS, in the compute dtype."""
    mask_sums: Tensor | None
    """Of the mask's shape: dS summed over what has the same mask, in the compute dtype; added to."""


def supports(problem: Problem) -> bool:
    return True


def forward(problem: Problem) -> Tensor:
    problem = _with_dense_mask(problem)
    out = empty_output(problem.query, problem.value) if problem.out is None else problem.out
    if problem.pages is not None:
        for rows, own in _paged_sequences(problem, problem.pages):
            _forward_into(out[:, :, rows], own, None)
        return out
    if problem.packed is None:
        _forward_into(out, problem, _dropout(problem, 0))
        return out
    for number, (rows, keys) in enumerate(_sequences(problem)):
        _forward_into(out[:, :, rows], _one_sequence(problem, rows, keys), _dropout(problem, number))
    return out


def backward(problem: Problem) -> Gradients:
    """None: not needed."""
    problem = _with_dense_mask(problem)
    query = problem.query
    grads = empty_gradients(problem.inputs, problem.output_mask) if problem.grads is None else problem.grads
    grad_query, grad_key, grad_value, grad_bias, grad_mask = grads
    dtype = _compute_dtype(query)
    row_sums = None if grad_bias is None else query.new_zeros((*query.shape[:3], 1), dtype=dtype)
    mask_sums = None if grad_mask is None else query.new_zeros(grad_mask.shape, dtype=dtype)
    targets = _Targets(grad_query, grad_key, grad_value, row_sums, mask_sums)
    if problem.packed is None:
        _backward_into(targets, problem, _dropout(problem, 0))
    else:
        for number, (rows, keys) in enumerate(_sequences(problem)):
            own = _Targets(
                _part(grad_query, rows), _part(grad_key, keys), _part(grad_value, keys), _part(row_sums, rows), None
            )
            _backward_into(own, _one_sequence(problem, rows, keys), _dropout(problem, number))
    if grad_bias is not None and row_sums is not None:
        grad_bias.copy_(row_sums.sum_to_size(grad_bias.shape))
    if grad_mask is not None and mask_sums is not None:
        grad_mask.copy_(mask_sums)
    return grads


def undivided(grad_out: Tensor, out: Tensor, row_sums: Tensor, row_cap: float) -> tuple[Tensor, Tensor]:
    """The backward through the division of a row cap, o = A / max(row_cap, sum_j p): dA, of grad_out's shape and
    dtype, and what is to be subtracted from dP = dA V^T, of row_sums' shape and dtype::

        r_i = max(cap, sum_j p_ij);  dA_i = dO_i / r_i;  delta_i = dA_i . o_i where the sum is above the cap, else 0

    Args:
        grad_out: dO, [..., Dv].
        out: o, of its shape and dtype.
        row_sums: The sums of p, [..., 1], in the compute dtype.
        row_cap: Positive.
    """
    grad = (grad_out / row_sums.clamp(min=row_cap)).to(grad_out.dtype)
    # Of the rounded dA: dP - delta is dA . (v_j - o), in which roundings of dA then cancel as its parts do.
    delta = (grad.to(row_sums.dtype) * out).sum(-1, keepdim=True)
    return grad, delta.masked_fill(row_sums <= row_cap, 0.0)


def seen_by(mask: Tensor) -> Tensor:
    """Which scores an attention mask, bool or additive, does not hide; NaN hides none.

    In float32: -5000 is no bfloat16.
    """
    return mask if mask.dtype == torch.bool else ~(mask.float() <= MASKED_SCORE)


def kept(seed: Tensor, row: Tensor, column: Tensor, dropout_p: float) -> Tensor:
    """Which scores dropout keeps, as :mod:`sigswap.kernels.host.draws` says.

    Args:
        seed: int64, one element.
        row: int64, the number R of each row. column: int64. They broadcast to each other, and are not negative.
        dropout_p: Compared in float32.

    Returns:
        bool, of the shape of both.
    """
    first, second = philox(seed.reshape(()), row)
    x = (((column * COLUMN) & _WORD) ^ first) * FIRST & _WORD
    x = (x ^ (x >> SHIFT) ^ second) * SECOND & _WORD
    (share,) = struct.unpack("f", struct.pack("f", dropout_p))  # not by a tensor, which torch.export would trace
    return x >= int(min(share * RANGE, LAST))


def philox(seed: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The first two words, in int64, that Philox4x32-10 (Salmon et al., SC 2011) makes of each number, int64, as
    Triton's ``tl.randint4x(seed, number)``."""
    c0, c1 = number & _WORD, (number >> 32) & _WORD
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=number.device)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # 32 x 32 bits overflow int64, but wrap modulo 2^64, so that both halves of the product are right.
        a = c0 * 0xD2511F53
        b = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((b >> 32) & _WORD) ^ c1 ^ k0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return c0, c1


def _forward_into(out: Tensor, problem: Problem, dropout: _Dropout | None) -> None:
    """Writes the output, [B, H, M, Dv] in any strides, to out."""
    query, key, value, options = problem.query, problem.key, problem.value, problem.options
    row_sums = problem.row_sums
    if out.numel() == 0 or key.shape[2] == 0:
        out.zero_()
        if row_sums is not None:
            row_sums.zero_()
        return
    for heads in _head_groups(problem):
        k = _compute_copy(_cut(key, heads.batch, heads.kv_head))
        v = _compute_copy(_cut(value, heads.batch, heads.kv_head))
        for tile in _tiles(heads, query.shape[2], key.shape[2], options):
            q = _rows(query, tile, k) * options.scale
            p, _ = _probabilities(q, _keys(k, tile), problem, tile)
            sums = p.sum(-1, keepdim=True) if options.row_cap > 0.0 or row_sums is not None else None
            if dropout is not None:
                p = p * _dropout_factor(dropout, tile, options.dropout_p, p)
            o = torch.bmm(p.view(k.shape[0], q.shape[1], p.shape[-1]), _keys(v, tile))
            o = o.view(*p.shape[:3], -1)
            if sums is not None:
                if options.row_cap > 0.0:
                    o /= sums.clamp(min=options.row_cap)
                if row_sums is not None:
                    _cut(row_sums, *tile[:3]).copy_(sums)
            _cut(out, *tile[:3]).copy_(o)


def _backward_into(targets: _Targets, problem: Problem, dropout: _Dropout | None) -> None:
    """Writes the gradients to targets."""
    query, key, value, grad_out, options = problem.query, problem.key, problem.value, problem.grad_out, problem.options
    assert grad_out is not None, "this is no backward"
    if grad_out.numel() == 0 or key.shape[2] == 0:
        for target in targets:
            if target is not None:
                target.zero_()
        return
    needs_scores = any(target is not None for target in targets._replace(value=None))
    for heads in _head_groups(problem):
        k = _compute_copy(_cut(key, heads.batch, heads.kv_head))
        v = _compute_copy(_cut(value, heads.batch, heads.kv_head))
        grad_k = torch.zeros_like(k) if targets.key is not None else None
        grad_v = torch.zeros_like(v) if targets.value is not None else None
        for tile in _tiles(heads, query.shape[2], key.shape[2], options):
            q = _rows(query, tile, k) * options.scale
            grad_o = _rows(grad_out, tile, k)
            p, tanh = _probabilities(q, _keys(k, tile), problem, tile)
            factor = None if dropout is None else _dropout_factor(dropout, tile, options.dropout_p, p)
            if grad_v is not None:
                dropped = p if factor is None else p * factor
                _keys(grad_v, tile).baddbmm_(dropped.view(k.shape[0], q.shape[1], p.shape[-1]).mT, grad_o)
            if not needs_scores:
                continue
            grad_s = torch.bmm(grad_o, _keys(v, tile).mT).view(p.shape)
            if factor is not None:
                grad_s *= factor
            if problem.row_delta is not None:
                grad_s -= _cut(problem.row_delta, *tile[:3])
            grad_s *= p * (1 - p)
            if targets.row_sums is not None:
                _cut(targets.row_sums, *tile[:3]).copy_(grad_s.sum(-1, keepdim=True))
            if targets.mask_sums is not None:
                part = _cut_mask(targets.mask_sums, tile)
                part += _by_mask(grad_s, part).sum_to_size(part.shape)
            if tanh is not None:
                grad_s *= 1 - tanh * tanh
            grad_s = grad_s.view(k.shape[0], q.shape[1], p.shape[-1])
            if targets.query is not None:
                grad_q = torch.bmm(grad_s, _keys(k, tile)).mul_(options.scale)
                _cut(targets.query, *tile[:3]).copy_(grad_q.view(*p.shape[:3], -1))
            if grad_k is not None:
                _keys(grad_k, tile).baddbmm_(grad_s.mT, q)
        if grad_k is not None and targets.key is not None:
            part = _cut(targets.key, heads.batch, heads.kv_head)
            part.copy_(grad_k.view(part.shape))
        if grad_v is not None and targets.value is not None:
            part = _cut(targets.value, heads.batch, heads.kv_head)
            part.copy_(grad_v.view(part.shape))


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _compute_copy(tensor: Tensor) -> Tensor:
    """[b, h, n, d] as [b * h, n, d] in the compute dtype; a view where possible."""
    return tensor.to(_compute_dtype(tensor)).flatten(0, 1)


def _rows(tensor: Tensor, tile: _Tile, k: Tensor) -> Tensor:
    """The tile's rows of a [B, H, M, d] tensor, with the query heads of one key head below one another."""
    part = _cut(tensor, *tile[:3])
    # Not -1: head_dim may be 0.
    return part.to(k.dtype).reshape(k.shape[0], math.prod(part.shape[:3]) // k.shape[0], tensor.shape[3])


def _keys(tensor: Tensor, tile: _Tile) -> Tensor:
    """The tile's keys of a [b * h, N, d] tensor."""
    return tensor[:, tile.key] if tile.key.stop - tile.key.start != tensor.shape[1] else tensor


def _cut(tensor: Tensor, *ranges: slice) -> Tensor:
    """The ranges of the first dimensions of a tensor. A dimension of size 1 is the same for all."""
    for dim, where in enumerate(ranges):
        size = tensor.shape[dim]
        if size != 1 and where.stop - where.start != size:
            tensor = tensor.narrow(dim, where.start, where.stop - where.start)
    return tensor


def _cut_mask(mask: Tensor, tile: _Tile) -> Tensor:
    """The tile's part of a tensor of the mask's shape, for :func:`_by_mask`."""
    period = mask.shape[0]
    first, size = tile.batch.start % period, tile.batch.stop - tile.batch.start
    return _cut(mask, slice(first, first + min(size, period)), *tile[1:])


def _by_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [b, h, m, n] of a tile in a shape, [b, ...] or [repeats, b / repeats, ...], that the tile's part of the
    mask broadcasts to. A view."""
    period, batch = mask.shape[0], scores.shape[0]
    # Not view(-1, ...): a tile outside of the band has no keys.
    return scores if period in (1, batch) else scores.view(batch // period, period, *scores.shape[1:])


def _head_groups(problem: Problem) -> Iterator[_Heads]:
    """Cuts the problem into groups of heads whose tiles hold about MAX_TILE_SCORES scores.

    Their ranges of the batch are some of the mask's batch, or all of it, once or several times.
    """
    batch, n_heads, q_len, _ = problem.query.shape
    kv_heads, kv_len = problem.key.shape[1], problem.key.shape[2]
    group = n_heads // kv_heads
    _, left, right = problem.options.band(q_len, kv_len)
    # Under a band, low tiles skip more keys.
    rows = q_len if left is None and right is None else min(q_len, MAX_BAND_ROWS)
    rows = min(rows, max(1, MAX_TILE_SCORES // (group * kv_len)))
    kv_heads_at_once = min(kv_heads, max(1, MAX_TILE_SCORES // (group * rows * kv_len)))
    batches = min(batch, max(1, MAX_TILE_SCORES // (n_heads * rows * kv_len)))
    period = 1 if problem.attn_mask is None else problem.attn_mask.shape[0]
    whole = max(period, batches // period * period)
    ranges = [
        slice(b, min(b + batches, first + whole, batch))
        for first in range(0, batch, whole)
        for b in range(first, min(first + whole, batch), batches)
    ]
    for at_once, h in itertools.product(ranges, range(0, kv_heads, kv_heads_at_once)):
        stop = min(h + kv_heads_at_once, kv_heads)
        yield _Heads(at_once, slice(h, stop), slice(h * group, stop * group), rows)


def _tiles(heads: _Heads, q_len: int, kv_len: int, options: Options) -> Iterator[_Tile]:
    """The tiles of one group of heads. Keys that none of a tile's rows sees are not in it."""
    shift, left, right = options.band(q_len, kv_len)
    for start in range(0, q_len, heads.rows_per_tile):
        stop = min(start + heads.rows_per_tile, q_len)
        first = 0 if left is None else min(max(start + shift - left, 0), kv_len)
        last = kv_len if right is None else min(max(stop + shift + right, 0), kv_len)
        yield _Tile(heads.batch, heads.head, slice(start, stop), slice(first, max(first, last)))


def _probabilities(q: Tensor, k: Tensor, problem: Problem, tile: _Tile) -> tuple[Tensor, Tensor | None]:
    """p before dropout [b, h, m, n] of one tile, and the soft cap's tanh (None without one)."""
    bias, attn_mask, options = problem.bias, problem.attn_mask, problem.options
    shape = [where.stop - where.start for where in tile]
    scores = torch.bmm(q, k.mT).view(shape)
    tanh = None
    if options.softcap > 0.0:
        tanh = scores.div_(options.softcap).tanh_()
        scores = tanh * options.softcap

    hidden = visible = mask = None  # the scores that are masked; how many are not, per row (None: all)
    if attn_mask is not None:
        mask = _cut_mask(attn_mask, tile)
        if mask.dtype == torch.bool:
            hidden = ~mask
        else:
            by_mask = _by_mask(scores, mask)
            by_mask += mask
            # In float32: -5000 is no bfloat16.
            hidden = mask.float() <= MASKED_SCORE
    q_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    shift, left, right = options.band(q_len, kv_len)
    if left is not None or right is not None:
        row = torch.arange(tile.row.start + shift, tile.row.stop + shift, device=q.device)[:, None]
        col = torch.arange(tile.key.start, tile.key.stop, device=q.device)
        first = torch.zeros_like(row) if left is None else (row - left).clamp_(min=0)
        last = torch.full_like(row, kv_len - 1) if right is None else (row + right).clamp_(max=kv_len - 1)
        visible = last - first + 1
        outside = col > last
        if left is not None:
            outside |= col < first
        hidden = outside if hidden is None else hidden | outside

    row_bias: float | Tensor = options.const_bias
    if options.visible_bias:
        if mask is not None and hidden is not None:
            # A mask that is broadcast over the keys has one column for all of them.
            columns = shape[3] if hidden.shape[-1] == 1 else 1
            visible = (~hidden).sum(-1, keepdim=True) * columns
            if 1 < len(visible) < shape[0]:
                visible = visible.repeat(shape[0] // len(visible), 1, 1, 1)
        if visible is None:
            row_bias -= math.log(kv_len)
        else:
            row_bias = row_bias - visible.clamp_(min=1).to(scores.dtype).log_()
    if bias is not None:
        row_bias = row_bias + _cut(bias, *tile[:3]).to(scores.dtype)
    scores += row_bias
    p = scores.sigmoid_()
    if hidden is not None:
        by_mask = p if mask is None else _by_mask(p, mask)
        by_mask.masked_fill_(hidden.expand_as(by_mask), 0.0)  # several times faster than to broadcast inside it
    return p, tanh


def _with_dense_mask(problem: Problem) -> Problem:
    """The problem with a mask by blocks as a bool tensor."""
    if problem.blocks is None:
        return problem
    mask = dense_mask(problem.blocks, problem.query.shape[2], problem.key.shape[2])
    return dataclasses.replace(problem, attn_mask=mask, blocks=None)


def _dropout(problem: Problem, first_batch: int) -> _Dropout | None:
    if problem.options.dropout_p == 0.0:
        return None
    assert problem.seed is not None  # checked by the op
    # Packed sequences draw as if they were padded to the longest.
    q_len = problem.query.shape[2] if problem.packed is None else problem.packed.longest_q
    return _Dropout(problem.seed, first_batch, (problem.query.shape[1], q_len))


def _dropout_factor(dropout: _Dropout, tile: _Tile, dropout_p: float, p: Tensor) -> Tensor:
    """0 where dropped, 1 / (1 - dropout_p) elsewhere; of p's shape and dtype."""
    first = tile.batch.start + dropout.first_batch
    row = torch.arange(first, first + p.shape[0], device=p.device)
    for size, where in zip(dropout.sizes, (tile.head, tile.row), strict=True):
        row = (row * size).unsqueeze(-1) + torch.arange(where.start, where.stop, device=p.device)
    column = torch.arange(tile.key.start, tile.key.stop, device=p.device)
    keep = kept(dropout.seed, row.unsqueeze(-1), column, dropout_p)
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return keep.to(p.dtype) * scale


def _sequences(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """The rows and the keys of each packed sequence. The one place that reads the lengths, and so checks them."""
    assert problem.packed is not None
    cu_q, cu_k, longest_q, longest_k = problem.packed
    rows = itertools.pairwise(checked_ends("q", cu_q, longest_q, problem.query.shape[2]))
    keys = itertools.pairwise(checked_ends("k", cu_k, longest_k, problem.key.shape[2]))
    return ((slice(*of_rows), slice(*of_keys)) for of_rows, of_keys in zip(rows, keys, strict=True))


def _paged_sequences(problem: Problem, pages: Pages) -> Iterator[tuple[slice, Problem]]:
    """The rows of each packed sequence, and it alone: views of its rows, and copies of its keys and values."""
    caches, page_size = (problem.key, problem.value), problem.key.shape[2]
    ends = checked_ends("q", pages.cu_q, pages.longest_q, problem.query.shape[2])
    lengths = checked_keys(pages.lengths, pages.table, pages.longest_k, len(problem.key), page_size)
    for number, ((start, stop), length) in enumerate(zip(itertools.pairwise(ends), lengths, strict=True)):
        rows, own = slice(start, stop), pages.table[number, : -(-length // page_size)]
        key, value = (cache[own].transpose(0, 1).flatten(1, 2)[None, :, :length] for cache in caches)
        bias = problem.bias if problem.bias is None or problem.bias.shape[2] == 1 else problem.bias[:, :, rows]
        yield rows, Problem(problem.query[:, :, rows], key, value, bias, None, None, problem.options)


def _one_sequence(problem: Problem, rows: slice, keys: slice) -> Problem:
    """One of packed sequences, of views."""
    return Problem(
        problem.query[:, :, rows],
        problem.key[:, :, keys],
        problem.value[:, :, keys],
        problem.bias if problem.bias is None or problem.bias.shape[2] == 1 else problem.bias[:, :, rows],
        None,
        problem.seed,
        problem.options,
        grad_out=_part(problem.grad_out, rows),
        row_sums=_part(problem.row_sums, rows),
        row_delta=_part(problem.row_delta, rows),
    )


def _part(packed: Tensor | None, where: slice) -> Tensor | None:
    """One sequence of a packed [1, H, total, d] tensor, a view."""
    return None if packed is None else packed[:, :, where]
