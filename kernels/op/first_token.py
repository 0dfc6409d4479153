"""The row bias that takes the score of the first visible key as it is: ``sigswap::first_token_bias``.

Pretrained decoders give their first token much of the attention, by a score that no linear function of the query
follows. With it taken out, what the bias has to be guessed for is the rest of the row::

    b_i = -logaddexp(s_if, a (ln n_i - const_bias) - rest_i)

f is the first key that row i sees, s_if its score with scale, soft cap and additive mask, and n_i the number of keys
that the row sees (with ``visible_bias``; else ln n_i is left out).

Which key is first depends on nothing but what the row sees. So a row gets the same bias in a prefill, in a step of
decoding with a cache, in a packed sequence and beside padding on either side. In a window that has moved on, the first
visible key is the oldest one that is left: the row's sum is then taken apart at another key, which is as exact.

Memory is that of the query, and where a mask [.., M, N] is given that of the mask; scores are not held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.kernels import MASKED_SCORE
from sigswap.kernels.op.registration import library
from sigswap.kernels.reference import seen_by


def first_token_bias(
    query: Tensor,
    key: Tensor,
    share: Tensor,
    rest: Tensor | None = None,
    attn_mask: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    is_causal: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    """The row bias of the module's docstring, as ``sigswap::sigmoid_attention`` takes it.

    Args:
        query, key, attn_mask: As the attention op takes them.
        share: a, floating point; broadcasts to [B, H, M, 1].
        rest: Broadcasts to [B, H, M, 1]; None: 0.
        padding: bool [B|1, 1, 1, N]: keys that are to be seen, beside attn_mask; None: all.
        scale, const_bias, visible_bias, is_causal, bottom_right, window_left, window_right, softcap: As the attention
            op takes them.

    Returns:
        [B, H, M, 1], in float32, or float64 for a query in float64. It has gradients with respect to query, key, share,
        rest and an additive mask. In a row that sees no key it is finite, and means nothing.
    """
    bias: Tensor = torch.ops.sigswap.first_token_bias.default(
        query,
        key,
        share,
        rest,
        attn_mask,
        padding,
        scale=scale,
        const_bias=const_bias,
        visible_bias=visible_bias,
        is_causal=is_causal,
        bottom_right=bottom_right,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
    )
    return bias


def bias_of_first(
    first: Tensor, count: Tensor | float, share: Tensor, rest: Tensor | None, const_bias: float, visible_bias: bool
) -> Tensor:
    """The row bias from the first visible key's score ``first`` [.., 1], of the same shape, in its dtype.

    ``count``: of the visible keys; broadcasts to it.
    """
    total: Tensor | float = -const_bias
    if visible_bias:
        count = torch.as_tensor(count, dtype=first.dtype, device=first.device)
        total = total + count.clamp(min=1).log()
    others = share.to(first.dtype) * total
    if rest is not None:
        others = others - rest.to(first.dtype)
    return -torch.logaddexp(first, others.expand_as(first))


def composed_bias(
    query: Tensor,
    key: Tensor,
    share: Tensor,
    rest: Tensor | None = None,
    attn_mask: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    is_causal: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
) -> Tensor:
    if not share.dtype.is_floating_point:
        raise ArgumentError(f"share must be floating point, not {share.dtype}.")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    if keys == 0 or heads == 0:
        return torch.zeros(batch, heads, rows, 1, dtype=wide, device=query.device)
    with torch._C.DisableTorchFunction():
        first, count = _first_visible(
            query, keys, attn_mask, padding, is_causal, bottom_right, window_left, window_right
        )
        if first is None:
            score = _products(query, key[:, :, :1], wide)
        else:
            first = _for_batch(first, batch)
            # Wide: many rows have the same first key, whose gradient is the sum of theirs, which can nearly cancel.
            score = _products(query, _picked(key.to(wide), first, heads), wide)
        score = score * scale
        if softcap > 0.0:
            score = softcap * torch.tanh(score / softcap)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            score = score + _mask_at(attn_mask, first, batch, rows, keys, wide)
        count = _for_batch(count, batch) if isinstance(count, Tensor) else count
        return bias_of_first(score, count, share, rest, const_bias, visible_bias)


def _first_visible(
    query: Tensor,
    keys: int,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
) -> tuple[Tensor | None, Tensor | float]:
    """The number of the first visible key of each row, [b, H|1, M|1, 1] (None: 0 in all), and how many it sees."""
    rows, device = query.shape[2], query.device
    right = 0 if is_causal else window_right
    low = high = None
    if window_left >= 0 or right >= 0:
        diagonal = torch.arange(rows, device=device).view(1, 1, rows, 1) + (keys - rows if bottom_right else 0)
        low = (diagonal - window_left).clamp(min=0) if window_left >= 0 else torch.zeros_like(diagonal)
        high = (diagonal + right).clamp(max=keys - 1) if right >= 0 else torch.full_like(diagonal, keys - 1)
    if attn_mask is None and padding is None:
        if low is None or high is None:
            return None, float(keys)
        return (None if window_left < 0 else low.clamp(max=keys - 1)), (high - low + 1).clamp(min=0)
    seen = None
    if attn_mask is not None:
        seen = seen_by(attn_mask)
    if padding is not None:
        seen = padding if seen is None else seen & padding
    assert seen is not None
    seen = seen.expand(*seen.shape[:-1], keys)
    if seen.shape[2] == 1 and low is not None and high is not None:
        # All rows see the same keys but for the band: running counts, instead of a mask [M, N].
        index = torch.arange(keys, device=device).expand_as(seen)
        following = torch.where(seen, index, keys).flip(-1).cummin(-1).values.flip(-1)
        before = torch.nn.functional.pad(seen.long().cumsum(-1), (1, 0))
        shape = (*seen.shape[:2], rows)
        start, end = (x.clamp(0, keys).squeeze(-1).expand(shape) for x in (low, high + 1))
        flat, total = following.squeeze(2), before.squeeze(2)
        count = total.gather(-1, end) - total.gather(-1, start)
        first = flat.gather(-1, start.clamp(max=keys - 1)).clamp(max=keys - 1)
        return first.unsqueeze(-1), count.clamp(min=0).unsqueeze(-1)
    if low is not None and high is not None:
        column = torch.arange(keys, device=device)
        seen = seen & (column >= low) & (column <= high)
    return seen.to(torch.uint8).argmax(-1, keepdim=True), seen.sum(-1, keepdim=True)


def _for_batch(x: Tensor, batch: int) -> Tensor:
    """``x`` [b, ...] where b divides the batch, as the attention op repeats its masks."""
    return x if x.shape[0] in (1, batch) else x.repeat(batch // x.shape[0], 1, 1, 1)


def _picked(key: Tensor, first: Tensor, heads: int) -> Tensor:
    """[B, Hk|H, M|1, D]: of each row its first key; first [B|1, H|1, M|1, 1]."""
    if first.shape[1] not in (1, key.shape[1]):
        key = key.repeat_interleave(heads // key.shape[1], 1)
    return key.gather(2, first.expand(*key.shape[:2], first.shape[2], key.shape[3]))


def _products(query: Tensor, key: Tensor, wide: torch.dtype) -> Tensor:
    """q_i . k_i, [B, H, M, 1], for key [B, Hk, M|1, D]."""
    batch, heads, rows, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], rows, dim)
    product: Tensor = (grouped.to(wide) * key.unsqueeze(2).to(wide)).sum(-1, keepdim=True)
    return product.reshape(batch, heads, rows, 1)


def _mask_at(mask: Tensor, first: Tensor | None, batch: int, rows: int, keys: int, wide: torch.dtype) -> Tensor:
    """What an additive mask adds to the first visible key's score, [B|1, H|1, M|1, 1]; 0 where it hides that key."""
    mask = _for_batch(mask, batch)
    if mask.shape[3] == 1 or first is None:
        picked = mask[..., :1]
    else:
        leading = [f if m == 1 else m for m, f in zip(mask.shape[:3], first.shape[:3], strict=True)]
        picked = mask.expand(*leading, keys).gather(-1, first.expand(*leading, 1))
    picked = picked.to(wide)
    return picked.masked_fill(picked.float() <= MASKED_SCORE, 0.0)


library.define(
    "first_token_bias(Tensor query, Tensor key, Tensor share, Tensor? rest=None, Tensor? attn_mask=None, "
    "Tensor? padding=None, *, float scale, float const_bias=0.0, bool visible_bias=True, bool is_causal=False, "
    "bool bottom_right=False, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("first_token_bias", composed_bias, "CompositeImplicitAutograd")
