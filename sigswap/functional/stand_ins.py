"""Stand-ins for the torch functions that hold a softmax: the same arguments, and the row bias by keyword."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sigswap.functional.attention import FirstToken, attend, probabilities


def softmax_dim(scores: Tensor, dim: int | None) -> int:
    """The axis that ``F.softmax`` takes: ``dim``, or where that is None the one that it chooses."""
    return dim if dim is not None else 0 if scores.dim() in (0, 1, 3) else 1


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
    extra: tuple[int, int] = (0, 0),
) -> Tensor:
    """As ``F.softmax``, ``torch.softmax`` and ``Tensor.softmax`` (third argument: dtype), with sigmoid.

    ``bias``: broadcasts to ``input`` with size 1 at ``dim``. ``extra``: how many logits stand before and behind those
    of the keys. They are no keys: they are not counted, and 0 in the result.
    """
    if isinstance(_stacklevel, torch.dtype):
        dtype = _stacklevel
    dim = softmax_dim(input, dim)
    result = probabilities(
        of_keys(input, dim, extra),
        dim,
        bias=bias,
        visible_bias=visible_bias,
        const_bias=const_bias,
        row_cap=row_cap,
        dtype=dtype,
        first_token=first_token,
    )
    if any(extra):
        result = F.pad(result.movedim(dim, -1), extra).movedim(-1, dim)
    return written_to(out, result)


def log_softmax(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    """As ``F.log_softmax``, ``torch.log_softmax`` and ``Tensor.log_softmax``; keywords as of :func:`softmax`."""
    return written_to(out, logarithm(softmax(*args, **kwargs)))


def written_to(out: Tensor | None, result: Tensor) -> Tensor:
    """``result``, in ``out`` if that is a tensor, as torch's functions write to theirs."""
    if out is None:
        return result
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def logarithm(probs: Tensor) -> Tensor:
    """Of probabilities; -inf where one is 0, without a gradient there."""
    tiny = torch.finfo(probs.dtype).tiny
    return torch.where(probs > 0, probs.clamp(min=tiny).log(), -torch.inf)


def ones(scores: Tensor) -> Tensor:
    """What ``exp(scores)`` becomes in a softmax by hand: only what it is multiplied by afterwards is to be known."""
    return torch.ones_like(scores)


def divided(weights: Tensor, total: Tensor, *, scores: Tensor, dim: int, **terms: Any) -> Tensor:
    """What ``exp(scores) * w / total`` becomes; ``weights``: :func:`ones` of the scores, times w.

    The keywords are those of :func:`softmax`, whose probabilities are these.
    """
    return softmax(weighted(scores, weights), dim, **terms).to(torch.promote_types(weights.dtype, total.dtype))


def weighted(scores: Tensor, weights: Tensor) -> Tensor:
    """The scores whose softmax is that of ``scores`` with each exp times a weight; where that is 0 they are masked."""
    return scores + torch.where(weights > 0, weights, 1.0).log().masked_fill(weights <= 0, -torch.inf)


def unshifted(reduced: Any) -> Any:
    """In place of a row shift that is subtracted from scores, such as a maximum (perhaps with indices): zeros."""
    if isinstance(reduced, Tensor):
        return torch.zeros_like(reduced)
    return type(reduced)((torch.zeros_like(reduced[0]), reduced[1]))


def of_keys(scores: Tensor, dim: int, extra: tuple[int, int]) -> Tensor:
    """``scores`` without ``extra`` logits before and behind those of the keys along ``dim``."""
    if not any(extra):
        return scores
    return scores.narrow(dim, extra[0], scores.shape[dim] - sum(extra))


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
    shard: int = 0,
) -> Tensor:
    """As ``F.scaled_dot_product_attention``, with sigmoid; ``bias`` broadcasts to [B, H, M, 1]. ``shard``: as
    :func:`sigswap.functional.attention.attend` has it."""
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
        shard=shard,
    )
