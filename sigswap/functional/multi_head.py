"""``F.multi_head_attention_forward`` and torch.nn's fused inference ops, with sigmoid attention inside.

A TorchFunctionMode gets these functions whole and is off inside them, so their softmax needs a body of its own.
Each function here takes the arguments of the torch function that it stands for, after ``attention``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from sigswap.functional.attention import FirstToken
from sigswap.functional.stand_ins import scaled_dot_product_attention, softmax


class AttentionArguments(TypedDict):
    """``attn_mask`` broadcasts to [B, H, M, N], boolean (True: visible) or additive."""

    attn_mask: Tensor | None
    is_causal: bool
    dropout_p: float
    need_weights: bool


class Attention(Protocol):
    """Attention of query [B, H, M, D], key and value [B, H, N, D] at one site.

    Returns the output [B, H, M, D], and the probabilities after dropout [B, H, M, N] if ``need_weights``, else None.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, **arguments: Unpack[AttentionArguments]
    ) -> tuple[Tensor, Tensor | None]: ...


def sigmoid_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    need_weights: bool,
    bias: Tensor | None = None,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    row_cap: float | None = None,
    first_token: FirstToken | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The :class:`Attention` with row bias ``const_bias - [ln n_i] + bias`` and a row cap; ``bias`` broadcasts to
    [B, H, M, 1]. With ``first_token`` the first two terms become what it says."""
    if not need_weights:
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            bias=bias,
            visible_bias=visible_bias,
            const_bias=const_bias,
            row_cap=row_cap,
            first_token=first_token,
        )
        return output, None
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = softmax(
        scores,
        -1,
        bias=bias,
        visible_bias=visible_bias,
        const_bias=const_bias,
        row_cap=row_cap,
        first_token=first_token,
    )
    if dropout_p > 0.0:
        weights = F.dropout(weights, p=dropout_p)
    return weights @ value, weights


def multi_head_attention_forward(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As ``F.multi_head_attention_forward``: query [M, B, E] (or [M, E]); returns [M, B, E] and weights or None."""
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal is a hint about attn_mask; pass the mask as well.")
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, embed_dim = query.shape
    head_dim = embed_dim // num_heads
    q, k, v = _projected(
        query,
        key,
        value,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight,
        in_proj_bias,
    )
    extra_keys = 0
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.repeat(1, batch, 1)]), torch.cat([v, bias_v.repeat(1, batch, 1)])
        extra_keys += 1

    def heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], batch, num_heads, head_dim).permute(1, 2, 0, 3)

    q = heads(q)
    k = heads(k) if static_k is None else static_k.view(batch, num_heads, -1, head_dim)
    v = heads(v) if static_v is None else static_v.view(batch, num_heads, -1, head_dim)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        extra_keys += 1

    causal = is_causal and key_padding_mask is None and not need_weights
    mask = None if causal else _mask(attn_mask, key_padding_mask, (batch, num_heads), extra_keys, query.dtype)
    output, weights = attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        dropout_p=dropout_p if training else 0.0,
        need_weights=need_weights,
    )
    output = F.linear(output.permute(2, 0, 1, 3).reshape(length, batch, embed_dim), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if unbatched:
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    return output, weights


def native_multi_head_attention(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``torch._native_multi_head_attention`` (batch first), which nn.MultiheadAttention runs in inference."""
    output, weights = multi_head_attention_forward(
        attention,
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        embed_dim,
        num_head,
        qkv_weight,
        qkv_bias,
        None,
        None,
        False,
        0.0,
        proj_weight,
        proj_bias,
        training=False,
        key_padding_mask=mask if mask_type == 1 else None,
        # Type 0 is a mask [M, N], type 2 one that holds the padding as well [B, H, M, N].
        attn_mask=None if mask is None or mask_type == 1 else mask.flatten(0, 1) if mask.dim() == 4 else mask,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
    )
    return output.transpose(0, 1), weights


def transformer_encoder_layer_fwd(
    attention: Attention,
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """As ``torch._transformer_encoder_layer_fwd``, which nn.TransformerEncoderLayer runs in inference."""

    def attended(x: Tensor) -> Tensor:
        return native_multi_head_attention(
            attention, x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias,
            mask, need_weights=False, mask_type=mask_type,
        )[0]  # fmt: skip

    def fed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    norm_1: Callable[[Tensor], Tensor] = lambda x: F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)
    norm_2: Callable[[Tensor], Tensor] = lambda x: F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)
    if norm_first:
        src = src + attended(norm_1(src))
        return src + fed_forward(norm_2(src))
    src = norm_1(src + attended(src))
    return norm_2(src + fed_forward(src))


def _projected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | tuple[Tensor | None, ...] | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(weight, Tensor) and query is key and key is value:
        # Not by chunk, of which ExecuTorch 1.5 makes an op that fixes a symbolic length.
        all_three = F.linear(query, weight, bias)
        size = all_three.shape[-1] // 3
        q, k, v = (all_three.narrow(-1, start, size) for start in (0, size, 2 * size))
        return q, k, v
    assert weight is not None, "no weight was given for query, key and value"
    weights = weight.chunk(3) if isinstance(weight, Tensor) else weight
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (_linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None, "use_separate_proj_weight needs a weight for each of query, key and value"
    return F.linear(x, weight, bias)


def _mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch_heads: tuple[int, int],
    extra_keys: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks of multi_head_attention_forward (True: hidden) as one of attend's (True: visible)."""
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.view(*batch_heads, *attn_mask.shape[1:])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(batch_heads[0], 1, 1, -1)
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if extra_keys:
        masks = [F.pad(mask, (0, extra_keys)) for mask in masks]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    masks = [
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
        if mask.dtype == torch.bool
        else mask.to(dtype)
        for mask in masks
    ]
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]
