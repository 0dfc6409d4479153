"""Sigmoid attention as functions: what ``F.scaled_dot_product_attention`` and ``softmax`` are to softmax attention.

:func:`sigmoid_attention` and :func:`sigmoid_attention_varlen` are public. Converted models call :func:`attend` and
:func:`probabilities`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.functional import dropout
from sigswap.functional.arguments import (
    Window,
    bias_terms,
    op_length,
    op_row_cap,
    op_scale,
    op_softcap,
    op_window,
)
from sigswap.functional.block_mask import BlockMask
from sigswap.functional.checks import check_block_mask, check_block_sizes, check_dense, check_switches, check_types
from sigswap.kernels.host.problem import Options
from sigswap.kernels.op import dense, mask_blocks, repeated, varlen
from sigswap.kernels.op.blocks import sigmoid_attention_blocks
from sigswap.kernels.op.first_token import first_token_bias
from sigswap.sequence.active import active, refuse_parts
from sigswap.sequence.inputs import Inputs
from sigswap.sequence.torch_context import on_parts


class FirstToken(NamedTuple):
    """What makes a row bias of the first visible key's score: ``-logaddexp(score, share * -b0 - rest)``, where b0 is
    the bias that the row has otherwise. Both broadcast to [..., H, M, 1]; ``rest`` None: 0."""

    share: Tensor
    rest: Tensor | None


_broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | float | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    row_cap: float | None = None,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """``sigmoid(scale * query @ key^T + bias) @ value``, with the shapes and defaults of
    ``F.scaled_dot_product_attention`` (arXiv 2409.04431, equation 3 and section 4).

    The scores are not held in memory; it is linear in M and N, forward and backward. A row that sees no key
    is 0, and so are its gradients. A key that a row does not see may be NaN or infinite; a value may not.
    There is no second derivative. Under autocast query, key and value are
    cast as those of ``F.scaled_dot_product_attention`` are.

    Args:
        query: [..., H, M, D], of a floating point dtype.
        key: [..., H, N, D], of query's dtype. Leading dimensions broadcast.
        value: [..., H, N, Dv], of query's dtype.
        bias: ``None``: -ln(n) in each row, where n is the number of keys that the row sees. A ``float``: that
            number in every row. A tensor: it broadcasts to [..., H, M, 1], and has a gradient. An int
            is an error: in :class:`sigswap.SigmoidConfig` it is a number of keys n, whose bias is ``-math.log(n)``.
        attn_mask: Broadcasts to [..., H, M, N]. Bool: True is visible. Floating point: added to the scores;
            at or below -5000 is masked; has a gradient. ``torch.nn.attention.bias.CausalBias`` works, too.
        is_causal: Row i sees the keys 0 ... i. Not together with attn_mask.
        scale: ``None``: 1 / sqrt(D).
        dropout_p: The probability that an attention probability is dropped; always applied, as in PyTorch.
        softcap: Scores become softcap * tanh(scores / softcap), before mask and bias.
        window: ``(left, right)``: row i sees the keys i - left ... i + right; ``None`` or -1: no limit on that
            side. One int w is ``(w, w)``. (A ``sliding_window=w`` of transformers is ``w - 1``, causal.)
        enable_gqa: Lets key and value have fewer heads: H must be a multiple of theirs.
        row_cap: ``None``: the paper's sigmoid, whose rows may sum to anything up to n. A positive number C: each row
            of the output is divided by ``max(C, sum_j p_ij)``, where p are the row's probabilities before dropout
            (which then acts on them as without a cap). So with C = 1 an output is never more than an average of
            values, as softmax's is, and a row that sums to less than C keeps all but the factor 1 / C. Has gradients;
            the output is saved for them.
        block_mask: A :class:`sigswap.BlockMask` [B|1, H|1, M, N], on query's device, in the place of attn_mask,
            is_causal and window: what it hides costs nothing. With dropout_p it is used as a bool tensor of that
            shape. Not of DTensors, and not under context parallelism.

    Returns:
        [..., H, M, Dv], of query's dtype (autocast's dtype under autocast).

    Raises:
        ArgumentError: An argument is not as above. The message names it.
    """
    again = None
    if (
        attn_mask is None
        and block_mask is None
        and window is None
        and softcap is None
        and row_cap is None
        and (bias is None or type(bias) is float)
        and (scale is None or type(scale) is float)
        and (is_causal is True or is_causal is False)
        and (enable_gqa is True or enable_gqa is False)
        and type(dropout_p) is float
        and dropout_p == 0.0
        and active.attention is None
    ):
        # Checking the arguments of a call like an earlier one would take longer than launching the kernel.
        again = repeated.key_of(query, key, value, bias, is_causal, scale, enable_gqa)
        known = None if again is None else repeated.known(again, query, key, value)
        if known is not None:
            return repeated.run(known, query, key, value)
    check_types({"query": query, "key": key, "value": value}, scale, dropout_p, softcap, row_cap)
    check_switches(is_causal=is_causal, enable_gqa=enable_gqa)
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise ArgumentError(f"attn_mask must be None or a tensor, not a {type(attn_mask).__name__}.")
    check_dense(bias=bias, attn_mask=attn_mask)
    if block_mask is not None:
        check_block_mask(block_mask, query, attn_mask, is_causal, op_window(window) != (-1, -1))
    visible_bias, const_bias, row_bias = bias_terms(bias)
    options: dict[str, Any] = {
        "bias": row_bias,
        "visible_bias": visible_bias,
        "const_bias": const_bias,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "softcap": softcap,
        "window": window,
        "enable_gqa": enable_gqa,
        "row_cap": row_cap,
        "block_mask": block_mask,
    }
    among_ranks = on_parts(query, attend, query, key, value, **options)
    out = attend(query, key, value, **options) if among_ranks is None else among_ranks
    if again is not None and _fit_the_op(query.shape, key.shape, value.shape, enable_gqa):
        in_all = Options(op_scale(query, scale), const_bias, visible_bias, is_causal)
        repeated.remember(again, query, key, value, in_all)
    return out


def sigmoid_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: Tensor | float | None = None,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    row_cap: float | None = None,
) -> Tensor:
    """:func:`sigmoid_attention` for sequences of different lengths, packed one behind the other without padding.

    Sequence b is ``query[cu_seqlens_q[b] : cu_seqlens_q[b + 1]]`` with the keys and values
    ``cu_seqlens_k[b] : cu_seqlens_k[b + 1]``, and attends to itself alone: each result is that of
    :func:`sigmoid_attention` on that sequence, and so is each gradient. The tensors, their order and their names are
    those of ``flash_attn_varlen_func``.

    Args:
        query: [total_q, H, D], of a floating point dtype.
        key: [total_k, H, D], of query's dtype.
        value: [total_k, H, Dv], of query's dtype.
        cu_seqlens_q: int32 [batch + 1], on query's device: where the sequences begin in query, and total_q at the
            end. A sequence may be empty.
        cu_seqlens_k: int32 [batch + 1], likewise for key and value, with total_k at the end.
        max_seqlen_q: The length of the longest sequence in query, or more. A number, for a tensor on a GPU has to be
            waited for.
        max_seqlen_k: The length of the longest sequence in key and value, or more.
        bias: ``None``: -ln(n) in each row, where n is the number of keys that the row sees. A ``float``: that
            number in every row. A tensor: it broadcasts to [total_q, H], so that [H] is a number per head; it has a
            gradient. An int is an error: in :class:`sigswap.SigmoidConfig` it is a number of keys n, whose bias is
            ``-math.log(n)``.
        is_causal: Row i of a sequence sees its keys 0 ... i, or with ``bottom_right`` 0 ... i + N - M, for M rows
            and N keys.
        bottom_right: Aligns the causal mask and the window of each sequence so that its last row is at its last key,
            as decoding with a cache needs (and as ``flash_attn_varlen_func`` does).
        scale, dropout_p, softcap, window, enable_gqa, row_cap: As those of :func:`sigmoid_attention`. With dropout, a
            sequence draws what it would draw in a batch padded to max_seqlen_q, or to total_q, if that is less.

    Returns:
        [total_q, H, Dv], of query's dtype (autocast's dtype under autocast). A row that sees no key is 0.

    Raises:
        ArgumentError: An argument is not as above. The message names it. On a GPU the values in cu_seqlens_q and
            cu_seqlens_k are not checked, for that would wait for the GPU; ``sigswap.kernels.settings.check_lengths =
            True``, or the environment variable SIGSWAP_CHECK_LENGTHS=1, has them checked.

    Wrong values that are not checked reach no memory but the tensors': each sequence is cut at their ends, and after
    max_seqlen rows or keys. In output and gradients what no sequence has then is not written to: there is what the
    memory held before. What sequences have that overlap is undefined.
    """
    refuse_parts("sigmoid_attention_varlen")
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    check_types({"query": query, "key": key, "value": value, **lengths}, scale, dropout_p, softcap, row_cap)
    check_switches(is_causal=is_causal, bottom_right=bottom_right, enable_gqa=enable_gqa)
    check_dense(bias=bias)
    visible_bias, const_bias, row_bias = bias_terms(bias)
    if row_bias is not None and row_bias.dim() < 2:
        row_bias = row_bias.reshape(1, -1)  # [], [1] or [H]; the op's is [1 | total_q, 1 | H]
    if query.dim() == key.dim() == 3 and query.shape[1] != key.shape[1] and not enable_gqa:
        raise ArgumentError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}; enable_gqa=True lets key and value have fewer."
        )
    window_left, window_right = op_window(window)
    return varlen.sigmoid_attention_varlen(
        query,
        key,
        value,
        row_bias,
        cu_seqlens_q,
        cu_seqlens_k,
        _dropout_seed(query, dropout_p),
        op_length("max_seqlen_q", max_seqlen_q),
        op_length("max_seqlen_k", max_seqlen_k),
        scale=op_scale(query, scale),
        const_bias=const_bias,
        visible_bias=visible_bias,
        is_causal=is_causal,
        bottom_right=bottom_right,
        window_left=window_left,
        window_right=window_right,
        softcap=op_softcap(softcap),
        dropout_p=dropout_p,
        row_cap=op_row_cap(row_cap),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    row_cap: float | None = None,
    first_token: FirstToken | None = None,
    block_mask: BlockMask | None = None,
    seed: Tensor | None = None,
    shard: int = 0,
) -> Tensor:
    """:func:`sigmoid_attention` with the row bias ``const_bias - [ln n, if visible_bias] + [bias]``.

    With ``first_token`` the first two terms become what it says. ``bottom_right`` aligns the causal mask
    and the window so that the last query is at the last key, as decoding with a cache needs. ``seed``: of dropout,
    int64 [1]; None: a new one, from the random state, for the heads of the rank with the number ``shard``.
    """
    if type(attn_mask).__name__ == "CausalBias":  # of torch.nn.attention.bias, whose import takes seconds
        bottom_right = _is_lower_right(attn_mask)
        attn_mask, is_causal = None, True
    if attn_mask is not None and is_causal:
        raise ArgumentError("attn_mask must not be given together with is_causal=True.")
    if dropout_p > 0.0 and hasattr(query, "device_mesh"):
        return dropout.dropped(
            attend,
            query,
            key,
            value,
            bias,
            attn_mask,
            first_token,
            visible_bias=visible_bias,
            const_bias=const_bias,
            is_causal=is_causal,
            bottom_right=bottom_right,
            scale=scale,
            dropout_p=dropout_p,
            softcap=softcap,
            window=window,
            enable_gqa=enable_gqa,
            row_cap=row_cap,
        )
    leading: tuple[int, ...] = query.shape[:-2]
    if not _fit_the_op(query.shape, key.shape, value.shape, enable_gqa):
        leading = _leading_shape(query, key, value, enable_gqa)
        query, key, value = (_four_dims(tensor, leading, enable_gqa) for tensor in (query, key, value))
    if block_mask is not None:
        refuse_parts("block_mask")
        check_block_sizes(block_mask, query, key)
        if dropout_p > 0.0 or first_token is not None:  # which the kernels of blocks do not take
            attn_mask, block_mask = block_mask.dense(), None
    window_left, window_right = op_window(window)
    scale, softcap = op_scale(query, scale), op_softcap(softcap)
    seed = _dropout_seed(query, dropout_p, shard) if seed is None else seed
    if bias is not None:
        bias = _four_dims_broadcast("bias", bias, leading)
    if attn_mask is not None:
        attn_mask = _four_dims_broadcast("attn_mask", attn_mask, leading)
    share = rest = None
    if first_token is not None:
        share, rest = (None if x is None else _four_dims_broadcast("first_token", x, leading) for x in first_token)
    if active.attention is not None:
        inputs = Inputs(query, key, value, bias, attn_mask, share, rest)
        options = Options(
            scale=scale,
            const_bias=const_bias,
            visible_bias=visible_bias,
            is_causal=is_causal,
            bottom_right=bottom_right,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
            dropout_p=dropout_p,
            row_cap=op_row_cap(row_cap),
        )
        out: Tensor = active.attention(inputs, options)
        return out if len(leading) == 2 else out.reshape(*leading, *out.shape[2:])
    if share is not None:
        first_bias = first_token_bias(
            query,
            key,
            share,
            rest,
            attn_mask,
            scale=scale,
            const_bias=const_bias,
            visible_bias=visible_bias,
            is_causal=is_causal,
            bottom_right=bottom_right,
            window_left=window_left,
            window_right=window_right,
            softcap=softcap,
        )
        bias = first_bias if bias is None else first_bias + bias
        visible_bias, const_bias = False, 0.0
    blocks = None
    if block_mask is not None:
        blocks = block_mask.blocks
    elif (
        attn_mask is not None
        and dropout_p == 0.0
        and window_left == window_right == -1
        and mask_blocks.pays(query, key, value, attn_mask)
    ):
        blocks = mask_blocks.blocks_of_mask(attn_mask)
    if blocks is not None:
        out = sigmoid_attention_blocks(
            query,
            key,
            value,
            bias,
            blocks,
            scale=scale,
            const_bias=const_bias,
            visible_bias=visible_bias,
            softcap=softcap,
            row_cap=op_row_cap(row_cap),
        )
        return out if len(leading) == 2 else out.reshape(*leading, *out.shape[2:])
    out = dense.sigmoid_attention(
        query,
        key,
        value,
        bias,
        attn_mask,
        seed,
        scale=scale,
        const_bias=const_bias,
        visible_bias=visible_bias,
        is_causal=is_causal,
        bottom_right=bottom_right,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        dropout_p=dropout_p,
        row_cap=op_row_cap(row_cap),
    )
    return out if len(leading) == 2 else out.reshape(*leading, *out.shape[2:])


def probabilities(
    scores: Tensor,
    dim: int = -1,
    *,
    bias: Tensor | None = None,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    row_cap: float | None = None,
    dtype: torch.dtype | None = None,
    first_token: FirstToken | None = None,
) -> Tensor:
    """What ``softmax(scores, dim, dtype=dtype)`` becomes: ``sigmoid(scores + const_bias - [ln n] + [bias])``.

    Args:
        scores: Floating point. At or below -5000 is masked: exactly 0 in the result.
        dim: The dimension of the keys.
        bias: Broadcasts to scores, with size 1 in ``dim``; has a gradient.
        visible_bias: Subtracts ln n; n is the number of scores along ``dim`` that are not masked.
        const_bias: Added to every score.
        row_cap: A positive number: the result is divided by the larger of it and its sum along ``dim``.
        dtype: scores are cast to it first.
        first_token: Takes the place of the two before; broadcasts as ``bias``.

    Returns:
        Of scores' shape, in ``dtype``, or scores' (float32 under autocast on CUDA, as softmax's is).

    Raises:
        ArgumentError: An argument is not as above. The message names it.
    """
    if dtype is not None:
        scores = scores.to(dtype)
    refuse_parts("attention that computes its scores itself")
    share, rest = (None, None) if first_token is None else first_token
    return dense.sigmoid_probs(scores, bias, dim, visible_bias, const_bias, op_row_cap(row_cap), share, rest)


def _is_lower_right(causal_bias: Any) -> bool:
    return bool(causal_bias.variant.name == "LOWER_RIGHT")


def _dropout_seed(query: Tensor, dropout_p: float, shard: int = 0) -> Tensor | None:
    if dropout_p > 0.0:
        seed = torch.randint(0, 2**61, (1,), dtype=torch.int64, device=query.device)
        return seed + dropout.shift(shard) if shard else seed
    return None


def _fit_the_op(query: torch.Size, key: torch.Size, value: torch.Size, enable_gqa: bool) -> bool:
    """Whether the op takes the shapes as they are. The usual case: the rest takes as long as the op."""
    if not len(query) == len(key) == len(value) == 4:
        return False
    return query[0] == key[0] == value[0] and key[1] == value[1] and (enable_gqa or query[1] == key[1])


def _leading_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The output's dimensions before [M, Dv]: the batch dimensions of all three, broadcast, and query's heads."""
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise ArgumentError(
            "query, key and value must be [..., length, head_dim], "
            f"not {list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        )
    if query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return tuple(query.shape[:-2])
    heads = [tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in (query, key, value)]
    if enable_gqa:
        if heads[1] != heads[2]:
            raise ArgumentError(f"value has {heads[2]} heads; with enable_gqa it must have key's {heads[1]}.")
        if heads[1] == 0 or heads[0] % heads[1] != 0:
            raise ArgumentError(
                f"query has {heads[0]} heads, which is not a multiple of the {heads[1]} heads of key and value."
            )
        head_shape: tuple[int, ...] = (heads[0],)
    else:
        different = {size for size in heads if size != 1}
        if len(different) > 1:
            raise ArgumentError(
                f"query, key and value have {heads} heads; enable_gqa=True lets key and value have fewer than query."
            )
        head_shape = (different.pop() if different else 1,)  # 0, too, is what 1 broadcasts to
    if query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        return (*query.shape[:-3], *head_shape)  # torch.broadcast_shapes would take longer than all the rest
    try:
        batch = _broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError as error:
        raise ArgumentError(
            "query, key and value must broadcast in the dimensions before the heads, "
            f"unlike {list(query.shape)}, {list(key.shape)} and {list(value.shape)}."
        ) from error
    return (*batch, *head_shape)


def _four_dims(tensor: Tensor, leading: tuple[int, ...], enable_gqa: bool) -> Tensor:
    """query, key or value as [batch, heads, length, head_dim]. Only dimensions that don't merge are copied."""
    heads = tensor.shape[-3:-2] if enable_gqa and tensor.dim() > 2 else leading[-1:]
    shape = (*leading[:-1], *heads, *tensor.shape[-2:])
    if tensor.shape != shape:
        tensor = tensor.expand(shape)
    for _ in range(4 - tensor.dim()):
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4) if tensor.dim() > 4 else tensor


def _four_dims_broadcast(name: str, tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """bias or attn_mask as four dimensions, of which those that have size 1 stay so."""
    dims = len(leading) + 2
    if tensor.dim() > dims:
        raise ArgumentError(f"{name} {list(tensor.shape)} has more than query's {dims} dimensions.")
    while tensor.dim() < max(4, dims):
        tensor = tensor.unsqueeze(0)
    if tensor.dim() == 4:
        # The op would repeat a mask of fewer batches, which is not what broadcasting does.
        if tensor.shape[0] != 1 and tensor.shape[0] != leading[0]:
            raise ArgumentError(
                f"{name} {list(tensor.shape)} must broadcast to query's batch dimensions {list(leading[:-1])}."
            )
        return tensor
    if any(size != 1 for size in tensor.shape[:-3]):
        try:
            tensor = tensor.expand(*leading[:-1], *tensor.shape[-3:])
        except RuntimeError as error:
            raise ArgumentError(
                f"{name} {list(tensor.shape)} must broadcast to query's batch dimensions {list(leading[:-1])}."
            ) from error
    return tensor.flatten(0, -4)
