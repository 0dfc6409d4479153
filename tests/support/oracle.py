"""An oracle for sigmoid attention that shares no code with sigswap.

Within :func:`sigmoid_oracle` the *original* model computes what a converted one must compute: every
attention softmax is ``sigmoid(score - ln visible)``, exactly 0 where masked, and all else is left. It
patches the Python names through which eager models reach softmax; which softmaxes are attention is told by
hand (the classes whose methods call them), not found. It works in any float dtype, on any device.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Real models write "masked" as -inf, finfo.min, -1e30, -65500 or -1e4; a real score never gets that low.
MASKED = -5000.0

# Every ATen operator that runs a softmax over attention scores.
SOFTMAX_OPS = frozenset(
    {
        "_softmax",
        "softmax",
        "_safe_softmax",
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_attention_math_for_mps",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_native_multi_head_attention",
        "_triton_scaled_dot_attention",
        "_transformer_encoder_layer_fwd",
        "_masked_softmax",
        "_nested_tensor_softmax_with_shape",
    }
)


def sigmoid_of_scores(
    scores: Tensor,
    dim: int = -1,
    visible: Tensor | None = None,
    heads: Tensor | None = None,
    first_token: bool = False,
) -> Tensor:
    """``sigmoid(score - ln n)`` with ``n`` the visible keys along ``dim``; exactly 0 where masked.

    ``heads``: a number per head that is added to the score, for scores [B, H, M, N] or [B*H, M, N].
    ``first_token``: ``sigmoid(score - ln(exp(score of the row's first visible key) + n))``; with a number h per head
    ``h - ln(exp(that score) + n^h exp(-h))``.
    """
    seen = scores > MASKED if visible is None else visible.expand_as(scores)
    n = seen.sum(dim, keepdim=True).clamp(min=1).to(scores.dtype)
    # Masked scores are replaced before the sigmoid: the gradient of -inf - ln n must not become NaN.
    scores = scores.masked_fill(~seen, 0.0)
    numbers = torch.zeros((), dtype=scores.dtype)
    if heads is not None:
        batch = 1 if scores.dim() == 4 else scores.shape[0] // len(heads)
        numbers = heads.to(scores.dtype).repeat(batch).view(-1, 1, 1)
    if first_token:
        is_first = seen & (seen.cumsum(dim) == 1)
        first = (scores * is_first).sum(dim, keepdim=True)
        share = 1.0 if heads is None else numbers
        largest = torch.maximum(first, share * n.log() - numbers).detach()
        total = (first - largest).exp() + (share * n.log() - numbers - largest).exp()
        scores = scores + numbers - (total.log() + largest)
    else:
        scores = scores + numbers - n.log()
    p = torch.sigmoid(scores)
    return p * seen.to(p.dtype)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    heads: Tensor | None = None,
    first_token: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with the sigmoid for the softmax, in explicit arithmetic."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if is_causal:
        visible = visible.tril()  # aligned at the top left, as SDPA's
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            visible = visible & (attn_mask > MASKED)
            # Keeps the mask's own gradient (T5's relative bias) and drops what -inf would do to it.
            scores = scores + attn_mask.masked_fill(attn_mask <= MASKED, 0.0)
    p = sigmoid_of_scores(scores, -1, visible, heads, first_token)
    if dropout_p > 0.0:
        p = F.dropout(p, dropout_p)
    return torch.matmul(p, value)


class Oracle:
    """What the oracle did: how many softmaxes it swapped, and how many it left."""

    def __init__(self) -> None:
        self.swapped = 0
        self.left = 0


@contextlib.contextmanager
def sigmoid_oracle(
    owners: tuple[str, ...],
    is_attention: Callable[[nn.Module, Tensor], bool] | None = None,
    head_bias: Callable[[int], Tensor] | None = None,
    first_token: bool = False,
) -> Iterator[Oracle]:
    """Runs attention as sigmoid attention inside the ``with``.

    Args:
        owners: names of the module classes whose own code calls the attention softmax (names, so that
            the zoo need not import every attention class).
        is_attention: of the softmaxes such a class calls, which are attention (``None``: all of them);
            given the module and the scores.
        head_bias: what to add to the scores of each head, given the number of heads.
        first_token: as :func:`sigmoid_of_scores` has it.
    """
    log = Oracle()
    tensor_softmax, fused = Tensor.softmax, F.scaled_dot_product_attention

    def owner() -> nn.Module | None:
        frame = sys._getframe(2)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and any(c.__name__ in owners for c in type(module).__mro__):
                return module
            frame = frame.f_back
        return None

    def swap(module: nn.Module | None, scores: Tensor, dim: int | None, dtype: torch.dtype | None) -> Tensor:
        scores = scores if dtype is None else scores.to(dtype)
        if module is None or not (is_attention is None or is_attention(module, scores)):
            log.left += 1
            return tensor_softmax(scores, -1 if dim is None else dim)
        log.swapped += 1
        return sigmoid_of_scores(scores, -1 if dim is None else dim, None, bias_of(module, scores), first_token)

    def bias_of(module: nn.Module, scores: Tensor) -> Tensor | None:
        if head_bias is None:
            return None
        # Only merged heads hide their number, which the modules of that layout then know.
        return head_bias(scores.shape[1] if scores.dim() == 4 else _heads_of(module))

    def function(
        input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        return swap(owner(), input, dim, dtype)

    def method(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return swap(owner(), input, dim, dtype)

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        module = owner()
        if module is None:
            log.left += 1
            return fused(*args, **kwargs)
        log.swapped += 1
        return sdpa(*args, **kwargs, heads=bias_of(module, args[0]), first_token=first_token)

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            # F's namespace is also the globals of F.multi_head_attention_forward.
            stack.enter_context(mock.patch.object(F, "softmax", function))
            stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
            for namespace in (torch, torch.special):
                stack.enter_context(mock.patch.object(namespace, "softmax", method))
            stack.enter_context(mock.patch.object(torch, "_safe_softmax", method))
            stack.enter_context(mock.patch.object(Tensor, "softmax", method))
            yield log
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _heads_of(module: nn.Module) -> int:
    return module.num_heads if isinstance(module, nn.MultiheadAttention) else module.heads


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "aten" and name in SOFTMAX_OPS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_attention_softmax(fn: Callable[[], Any]) -> int:
    """How many ATen operators that run a softmax ``fn()`` calls (a router's or a classifier's too)."""
    with _Counter() as counter:
        fn()
    return sum(counter.counts.values())
