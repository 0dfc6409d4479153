"""Stand-ins for the torch functions that hold a softmax: the same arguments, and the row bias by keyword."""

from __future__ import annotations

import torch
from torch import Tensor

from sigswap.functional.attention import FirstToken, attend, probabilities


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int | torch.dtype | None = 3,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    row_cap: float | None = None,
    first_token: FirstToken | None = None,
) -> Tensor:
    """As ``F.softmax``, ``torch.softmax`` and ``Tensor.softmax`` (third argument: dtype), with sigmoid.

    ``bias``: broadcasts to ``input`` with size 1 at ``dim``.
    """
    if isinstance(_stacklevel, torch.dtype):
        dtype = _stacklevel
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1  # as F.softmax chooses it
    result = probabilities(
        input,
        dim,
        bias=bias,
        visible_bias=visible_bias,
        const_bias=const_bias,
        row_cap=row_cap,
        dtype=dtype,
        first_token=first_token,
    )
    return result if out is None else out.copy_(result)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    bias: Tensor | None = None,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    row_cap: float | None = None,
    first_token: FirstToken | None = None,
) -> Tensor:
    """As ``F.scaled_dot_product_attention``, with sigmoid; ``bias`` broadcasts to [B, H, M, 1]."""
    if enable_gqa and key.shape[-3] != value.shape[-3]:  # torch groups keys and values each by itself
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    return attend(
        query,
        key,
        value,
        bias=bias,
        visible_bias=visible_bias,
        const_bias=const_bias,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        softcap=None,
        window=None,
        enable_gqa=enable_gqa,
        row_cap=row_cap,
        first_token=first_token,
    )
