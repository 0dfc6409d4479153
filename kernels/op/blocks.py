"""The registered op under a mask by blocks (:class:`sigswap.kernels.host.blocks.Blocks`).

``sigmoid_attention_blocks``, the same with the rows' sums [B, H, M, 1], ``sigmoid_attention_blocks_sums``, and the
gradients, ``sigmoid_attention_blocks_backward`` (``torch.ops.sigswap`` holds them).
:mod:`sigswap.kernels.op.registration` says what runs them. This module imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.kernels.host.blocks import BLOCK, HEADER, WORDS, Blocks
from sigswap.kernels.host.problem import Gradients, Options, Problem
from sigswap.kernels.host.results import empty_output
from sigswap.kernels.op import checks, vmap
from sigswap.kernels.op.registration import AttentionOp, is_plain, options_of


def sigmoid_attention_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    blocks: Blocks,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    softcap: float = 0.0,
    row_cap: float = 0.0,
) -> Tensor:
    """:func:`sigswap.kernels.op.dense.sigmoid_attention` under a mask by blocks.

    Under autocast query, key and value are cast to its dtype, as those of softmax attention are.

    Args:
        query: [B, H, M, D], any strides, as key and value.
        key: [B, Hk, N, D]; query head h uses key head h // (H / Hk).
        value: [B, Hk, N, Dv].
        bias: Row bias, floating point, [B|1, H|1, M|1, 1]; has a gradient.
        blocks: Of a mask [B|1, H|1, M, N].
        scale: This and all that follow: as those of ``sigmoid_attention``.

    Returns:
        [B, H, M, Dv] of query's dtype, stored as [B, M, H, Dv]. Rows that see no key are 0.

    Raises:
        ArgumentError: A shape, dtype, device or value is not as above. The numbers in blocks are not checked.
    """
    if is_plain(query, key, value, bias, *blocks):
        options = options_of(scale, const_bias, visible_bias, False, False, -1, -1, softcap, 0.0, row_cap)
        if options is not None:
            return _blocks.run((query, key, value, bias, *blocks), options)
    out: Tensor = torch.ops.sigswap.sigmoid_attention_blocks.default(
        query,
        key,
        value,
        bias,
        *blocks,
        scale=scale,
        const_bias=const_bias,
        visible_bias=visible_bias,
        softcap=softcap,
        row_cap=row_cap,
    )
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *others: Any) -> None:
    *tensors, options = others
    checks.check_attention(query, key, value, bias, None, None, options)
    if options.is_causal or options.window_left >= 0 or options.window_right >= 0:
        raise ArgumentError("A mask by blocks goes with no is_causal and no window: it says itself what is visible.")
    if options.dropout_p > 0.0:
        raise ArgumentError("A mask by blocks goes with no dropout_p.")
    blocks = Blocks(*tensors)
    batch, heads, q_len, _ = query.shape
    row_blocks, key_blocks = -(-q_len // BLOCK), -(-key.shape[2] // BLOCK)
    own = {"visible": (q_len,), "rows": (row_blocks, HEADER + 2 * key_blocks)}
    own["keys"] = (key_blocks, HEADER + 2 * row_blocks)
    for name, tensor in blocks._asdict().items():
        if tensor.dtype != torch.int32 or tensor.device != query.device or not tensor.is_contiguous():
            raise ArgumentError(
                f"{name} of a mask by blocks must be int32, contiguous and on query's device {query.device}, "
                f"not {tensor.dtype} on {tensor.device}."
            )
        shape = tuple(tensor.shape)
        if name in own:
            fits = len(shape) == 2 + len(own[name]) and shape[2:] == own[name]
            fits = fits and shape[0] in (1, batch) and shape[1] in (1, heads)
            wanted: tuple[Any, ...] = (f"1|{batch}", f"1|{heads}", *own[name])
        else:
            fits, wanted = len(shape) == 3 and shape[1:] == (BLOCK, WORDS), ("mixed blocks", BLOCK, WORDS)
        if not fits:
            raise ArgumentError(f"{name} of a mask by blocks must be {list(wanted)}, not {list(shape)}.")


def _forward(
    run: Callable[[Problem], Tensor], inputs: tuple[Any, ...], options: Options, row_sums: Tensor | None
) -> Tensor:
    problem = _problem(inputs, options)
    problem.row_sums = row_sums
    return run(problem)


def _backward(run: Callable[[Problem], Gradients], inputs: tuple[Any, ...], options: Options) -> Gradients:
    grad_out, *own, output_mask, row_delta = inputs
    problem = _problem(own, options)
    problem.grad_out, problem.output_mask, problem.row_delta = grad_out, (*output_mask, False), row_delta
    return run(problem)[:4]


def _problem(inputs: Sequence[Any], options: Options) -> Problem:
    query, key, value, bias, *blocks = inputs
    return Problem(query, key, value, bias, None, None, options, blocks=Blocks(*blocks))


_blocks = AttentionOp(
    "sigmoid_attention_blocks",
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor visible, Tensor rows, Tensor keys, Tensor row_bits, "
    "Tensor key_bits",
    tensors=9,
    differentiable=4,
    check=_check,
    forward=_forward,
    backward=_backward,
    empty=lambda query, key, value, *others: empty_output(query, value),
)
vmap.register_looping(_blocks)
