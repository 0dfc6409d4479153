"""FlexAttention with sigmoid: score_mod and mask_mod are functions, so scores and masks can be had from them.

Where a call has no score_mod, its mask goes to the op as a boolean one. With a score_mod the scores are held in memory,
as PyTorch's own eager implementation holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigswap.functional.attention import FirstToken, attend, probabilities

Modification = Callable[..., Tensor]


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Modification,
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (),
    *,
    bias: Tensor | None = None,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    row_cap: float | None = None,
    first_token: FirstToken | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``torch.ops.higher_order.flex_attention``, with sigmoid; ``bias`` broadcasts to [B, H, M, 1].

    The logsumexp and the maximum of the scores, its other two results, are NaN: a sigmoid has none.
    """
    visible = visible_keys(query, key, block_mask[-1], mask_mod_other_buffers)
    nothing = query.new_full(query.shape[:-1], torch.nan, dtype=torch.float32)
    if is_identity(score_mod):
        out = attend(
            query,
            key,
            value,
            bias=bias,
            visible_bias=visible_bias,
            const_bias=const_bias,
            attn_mask=visible,
            scale=scale,
            enable_gqa=True,
            row_cap=row_cap,
            first_token=first_token,
        )
        return out, nothing, nothing
    scores, value = modified_scores(query, key, value, score_mod, visible, scale, score_mod_other_buffers)
    probs = probabilities(
        scores,
        bias=bias,
        visible_bias=visible_bias,
        const_bias=const_bias,
        row_cap=row_cap,
        first_token=first_token,
    )
    return probs.to(query.dtype) @ value, nothing, nothing


def is_identity(score_mod: Modification) -> bool:
    """Whether a call has no score_mod: torch puts a function of its own there."""
    return getattr(score_mod, "__name__", "") == "_identity" and score_mod.__module__.startswith("torch.nn.attention")


def modified_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Modification,
    visible: Tensor | None,
    scale: float,
    buffers: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The scores [B, H, M, N] after ``score_mod``, -inf where not visible, in float32 at least; and the value that they
    weight, [B, H, N, Dv]."""
    groups = query.shape[1] // key.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    modified = modified_score(score_mod, buffers, query.to(wide) @ key.to(wide).mT * scale)
    return modified if visible is None else modified.masked_fill(~visible, -torch.inf), value


def modified_score(score_mod: Modification, buffers: tuple[Any, ...], scores: Tensor, start: int = 0) -> Tensor:
    """``score_mod`` of each of the scores [B, H, m, N], whose first row is the query number ``start``."""
    return _for_each(score_mod, scores, buffers, scored=True, start=start).to(scores.dtype)


def visible_keys(query: Tensor, key: Tensor, mask_mod: Modification, buffers: tuple[Any, ...] = ()) -> Tensor | None:
    """[B, H, M, N], True where a query sees a key; None: everywhere, for the call has no mask_mod."""
    if getattr(mask_mod, "__name__", "") == "noop_mask" and mask_mod.__module__.startswith("torch.nn.attention"):
        return None
    shape = (*query.shape[:3], key.shape[2])
    mask: Tensor = _for_each(mask_mod, query.new_empty(shape), buffers, scored=False)
    return mask


def _for_each(
    function: Modification, scores: Tensor, buffers: tuple[Any, ...], *, scored: bool, start: int = 0
) -> Tensor:
    """``function`` of (each score,) batch, head, query and key, as torch calls it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    first, rest = ((0,) if scored else ()), (None,) * len(buffers)
    for index in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=(*first, *index, *rest))
    places = [torch.arange(size, device=scores.device) for size in scores.shape]
    places[2] = places[2] + start
    with TransformGetItemToIndex():
        given = [scores] if scored else []
        found: Tensor = function(*given, *places, *buffers)
    return found
