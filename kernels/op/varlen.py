"""The registered op for packed sequences of different lengths.

``sigmoid_attention_varlen``, the same with the rows' sums [total_q, H, 1], ``sigmoid_attention_varlen_sums``, and the
gradients, ``sigmoid_attention_varlen_backward`` (``torch.ops.sigswap`` holds them).
:mod:`sigswap.kernels.op.registration` says what runs them. This module imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sigswap.kernels import settings
from sigswap.kernels.host.layout import by_rows, heads_first
from sigswap.kernels.host.lengths import checked_ends
from sigswap.kernels.host.problem import Gradients, Options, Packed, Problem
from sigswap.kernels.host.results import empty_gradients, empty_varlen_output
from sigswap.kernels.op import checks, vmap
from sigswap.kernels.op.registration import AttentionOp, is_plain, options_of


def sigmoid_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    is_causal: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    row_cap: float = 0.0,
) -> Tensor:
    """Sigmoid attention within each of several sequences that lie one behind the other; each is
    :func:`sigswap.kernels.op.dense.sigmoid_attention` of its own rows and keys, with its own lengths.

    Under autocast query, key and value are cast to its dtype, as those of softmax attention are.

    Args:
        query: [total_q, H, D], any strides, as all inputs.
        key: [total_k, Hk, D]; query head h uses key head h // (H / Hk).
        value: [total_k, Hk, Dv].
        bias: Row bias, floating point, [1|total_q, 1|H]; has a gradient.
        cu_seqlens_q: int32 [batch + 1], contiguous: sequence b has the rows cu_seqlens_q[b] ...
            cu_seqlens_q[b + 1] - 1. From 0 to total_q; a sequence may have no rows.
        cu_seqlens_k: int32 [batch + 1], likewise of keys, from 0 to total_k.
        seed: int64, one element; dropout draws from it. Needed if dropout_p > 0, else ignored. A sequence
            draws what it would draw in a batch padded to max_seqlen_q, or to total_q, if that is less
            (:mod:`sigswap.kernels.host.draws`).
        max_seqlen_q: At least the rows of the longest sequence.
        max_seqlen_k: At least the keys of the longest sequence.
        scale: This and all that follow: as those of ``sigmoid_attention``.

    Returns:
        [total_q, H, Dv] of query's dtype, contiguous. Rows that see no key are 0.

    Raises:
        ArgumentError: A shape, dtype, device or value is not as above. Where Triton kernels run, the values in
            cu_seqlens_q and cu_seqlens_k are checked only if :data:`sigswap.kernels.settings.check_lengths` is set, for
            that waits for the GPU. Else they are brought into range: sequence b has the rows from
            min(max(cu_seqlens_q[b], 0), total_q) up to min(cu_seqlens_q[b + 1], total_q), none if that is less, and
            max_seqlen_q of them at most; likewise its keys. Rows that no sequence has are uninitialised in the output,
            and they and such keys in the gradients; so is the gradient of a bias that such rows share. Results of
            sequences that overlap are undefined.
    """
    if is_plain(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, seed):
        options = options_of(
            scale,
            const_bias,
            visible_bias,
            is_causal,
            bottom_right,
            window_left,
            window_right,
            softcap,
            dropout_p,
            row_cap,
        )
        if options is not None:
            inputs = query, key, value, bias, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen_q, max_seqlen_k
            return _varlen.run(inputs, options)
    out: Tensor = torch.ops.sigswap.sigmoid_attention_varlen.default(
        query,
        key,
        value,
        bias,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        const_bias=const_bias,
        visible_bias=visible_bias,
        is_causal=is_causal,
        bottom_right=bottom_right,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        dropout_p=dropout_p,
        row_cap=row_cap,
    )
    return out


def _forward(
    run: Callable[[Problem], Tensor], inputs: tuple[Any, ...], options: Options, row_sums: Tensor | None
) -> Tensor:
    if settings.check_lengths:
        _check_lengths(inputs)
    out = empty_varlen_output(inputs[0], inputs[2])
    problem = _problem(inputs, options)
    problem.out = heads_first(out)
    problem.row_sums = None if row_sums is None else heads_first(row_sums)
    run(problem)
    return out


def _backward(run: Callable[[Problem], Gradients], inputs: tuple[Any, ...], options: Options) -> Gradients:
    grad_out, *own, output_mask, row_delta = inputs
    grads = empty_gradients(own[:4], output_mask)
    problem = _problem(own, options)
    problem.grad_out, problem.output_mask = heads_first(grad_out), (*output_mask, False)
    problem.row_delta = None if row_delta is None else heads_first(row_delta)
    grad_bias = None if grads[3] is None else by_rows(grads[3])
    problem.grads = *(None if grad is None else heads_first(grad) for grad in grads[:3]), grad_bias, None
    run(problem)
    return grads


def _problem(inputs: Sequence[Any], options: Options) -> Problem:
    query, key, value, bias, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen_q, max_seqlen_k = inputs
    # None is longer than all together, whatever was said: launches would have programs without end.
    longest = min(max_seqlen_q, query.shape[0]), min(max_seqlen_k, key.shape[0])
    packed = Packed(cu_seqlens_q, cu_seqlens_k, *longest)
    views = heads_first(query), heads_first(key), heads_first(value), None if bias is None else by_rows(bias)
    return Problem(*views, None, seed, options, packed)


def _check_lengths(inputs: Sequence[Any]) -> None:
    query, key, _, _, cu_seqlens_q, cu_seqlens_k, _, max_seqlen_q, max_seqlen_k = inputs
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # there is nothing in the tensors yet
    checked_ends("q", cu_seqlens_q, max_seqlen_q, query.shape[0])
    checked_ends("k", cu_seqlens_k, max_seqlen_k, key.shape[0])


_varlen = AttentionOp(
    "sigmoid_attention_varlen",
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k",
    tensors=7,
    differentiable=4,
    check=checks.check_varlen,
    forward=_forward,
    backward=_backward,
    empty=lambda query, key, value, *others: empty_varlen_output(query, value),
)
vmap.register_looping(_varlen)
