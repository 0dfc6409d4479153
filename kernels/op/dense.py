"""The registered ops for tensors [batch, heads, length, head_dim].

Four ops, all of them pure functions (``torch.ops.sigswap`` holds them):

- ``sigmoid_attention``: query, key and value to the output, without the scores in memory.
- ``sigmoid_attention_sums``: the same, and the sum of each row's probabilities before dropout and row cap
  [B, H, M, 1], in float32 (float64 of a float64 query), which has no derivative.
- ``sigmoid_attention_backward``: the gradients. It has no derivative of its own; asking for one is an error.
- ``sigmoid_probs``: for models that compute their own scores: scores to probabilities. A composite op: one
  node in a graph of Dynamo's, and decomposed below autograd, so that inductor fuses it.

:mod:`sigswap.kernels.op.registration` says what runs the first two. This module imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.kernels import MASKED_SCORE
from sigswap.kernels.host.problem import Gradients, Options, Problem, problem_of
from sigswap.kernels.host.results import empty_output
from sigswap.kernels.op import checks, sharding, vmap
from sigswap.kernels.op.first_token import bias_of_first
from sigswap.kernels.op.registration import AUTOCAST_DEVICES, AttentionOp, is_plain, library, options_of


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
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
    """Sigmoid attention; :mod:`sigswap.kernels.reference` has the formulas.

    Under autocast query, key and value are cast to its dtype, as those of softmax attention are.

    Args:
        query: [B, H, M, D], any strides, as all inputs.
        key: [B, Hk, N, D]; query head h uses key head h // (H / Hk).
        value: [B, Hk, N, Dv].
        bias: Row bias, floating point, [B|1, H|1, M|1, 1]; has a gradient.
        attn_mask: [b, H|1, M|1, N|1], where b divides B: batch element i has mask i % b, as if repeated B / b times.
            Bool: True is visible. Floating point: added to the scores, and values at or below ``MASKED_SCORE``
            are masked; has a gradient.
        seed: int64, one element; dropout draws from it. Needed if dropout_p > 0, else ignored.
        scale: Multiplies the scores.
        const_bias: Added to the bias of every row.
        visible_bias: Adds -ln(visible keys) to the bias of each row.
        is_causal: Row i sees key j only if j <= i, or if ``bottom_right`` j <= i + N - M.
        bottom_right: Aligns the causal mask and the window so that the last row is at the last key.
        window_left: Row i sees key j only if j >= i - window_left (i + N - M if bottom_right); -1: no limit.
        window_right: Row i sees key j only if j <= i + window_right, likewise; -1: no limit.
        softcap: If positive, scores become softcap * tanh(scores / softcap), before masks and bias.
        dropout_p: The probability that an attention probability is dropped, in [0, 1].
        row_cap: If positive, each row is divided by the larger of this and the sum of its probabilities before dropout.

    Returns:
        [B, H, M, Dv] of query's dtype, stored as [B, M, H, Dv]. Rows that see no key are 0.

    Raises:
        ArgumentError: A shape, dtype, device or value is not as above.
    """
    if is_plain(query, key, value, bias, attn_mask, seed):
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
            return _attention.run((query, key, value, bias, attn_mask, seed), options)
    out: Tensor = torch.ops.sigswap.sigmoid_attention.default(
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
        row_cap=row_cap,
    )
    return out


def sigmoid_probs(
    scores: Tensor,
    bias: Tensor | None = None,
    dim: int = -1,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    row_cap: float = 0.0,
    share: Tensor | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """Attention probabilities from scores that a model computed and masked: the counterpart of softmax.

    ``p = sigmoid(score + const_bias - [ln n] + bias)``, exactly 0 where a score is masked (at or below
    ``MASKED_SCORE``); n is the number of scores along ``dim`` that are not, at least 1. NaN stays NaN.
    With ``share``, ``const_bias - [ln n]`` becomes what :mod:`sigswap.kernels.op.first_token` makes of it.
    Half precision is computed in float32. Under autocast on CUDA the result is float32, as softmax's is.

    Args:
        scores: Floating point, any shape.
        bias: Broadcasts to scores, with size 1 in ``dim``; has a gradient.
        dim: The dimension of the keys.
        visible_bias: Adds -ln n.
        const_bias: Added to every score.
        row_cap: If positive, p is divided by the larger of this and its sum along ``dim``.
        share, rest: As ``bias``; rest only together with share.

    Returns:
        Of scores' shape and dtype.
    """
    probs: Tensor = torch.ops.sigswap.sigmoid_probs.default(
        scores, bias, dim, visible_bias, const_bias, row_cap, share, rest
    )
    return probs


def _forward(
    run: Callable[[Problem], Tensor], inputs: tuple[Any, ...], options: Options, row_sums: Tensor | None
) -> Tensor:
    return run(problem_of(inputs, options, row_sums=row_sums))


def _backward(run: Callable[[Problem], Gradients], inputs: tuple[Any, ...], options: Options) -> Gradients:
    return run(problem_of(inputs, options, backward=True))


_attention = AttentionOp(
    "sigmoid_attention",
    "Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? attn_mask=None, Tensor? seed=None",
    tensors=6,
    differentiable=5,
    check=checks.check_attention,
    forward=_forward,
    backward=_backward,
    empty=lambda query, key, value, *others: empty_output(query, value),
)
vmap.register_folding(_attention)
sharding.shard_batch_and_heads(_attention)


def composed_probs(
    scores: Tensor,
    bias: Tensor | None = None,
    dim: int = -1,
    visible_bias: bool = True,
    const_bias: float = 0.0,
    row_cap: float = 0.0,
    share: Tensor | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    if not scores.dtype.is_floating_point:
        raise ArgumentError(f"scores must be floating point, not {scores.dtype}.")
    if not -scores.dim() <= dim < scores.dim():
        raise ArgumentError(f"dim must be a dimension of scores {list(scores.shape)}, not {dim}.")
    for name, term in (("bias", bias), ("share", share), ("rest", rest)):
        if term is not None:
            _check_score_bias(name, term, scores, dim)
    if rest is not None and share is None:
        raise ArgumentError("rest needs share.")
    checks.check_row_cap(row_cap)
    with torch._C.DisableTorchFunction():
        exact = scores if scores.dtype == torch.float64 else scores.float()
        masked = exact <= MASKED_SCORE  # in float32: -5000 is no bfloat16
        # Autograd saves the bool mask for this line and p for the sigmoid; nothing else of scores' size.
        exact = exact.masked_fill(masked, -torch.inf)
        row_bias: float | Tensor = const_bias
        if share is not None:
            row_bias = _first_bias(exact, masked, dim, share, rest, visible_bias, const_bias)
        elif visible_bias:
            visible = masked.logical_not().sum(dim, keepdim=True)
            row_bias = row_bias - visible.clamp(min=1).to(exact.dtype).log()
        if bias is not None:
            row_bias = row_bias + bias.to(exact.dtype)
        p = (exact + row_bias).sigmoid()
        if row_cap > 0.0:
            p = p / p.sum(dim, keepdim=True).clamp(min=row_cap)
        return p.to(scores.dtype)


def _first_bias(
    exact: Tensor,
    masked: Tensor,
    dim: int,
    share: Tensor,
    rest: Tensor | None,
    visible_bias: bool,
    const_bias: float,
) -> Tensor:
    visible = masked.logical_not()
    if exact.shape[dim] == 0:
        return exact.new_zeros(())
    first = visible.to(torch.uint8).argmax(dim, keepdim=True)
    # A row that sees nothing has -inf there; its gradient must not become NaN.
    score = exact.gather(dim, first).masked_fill(masked.gather(dim, first), 0.0)
    return bias_of_first(score, visible.sum(dim, keepdim=True), share, rest, const_bias, visible_bias)


def _check_score_bias(name: str, bias: Tensor, scores: Tensor, dim: int) -> None:
    if not bias.dtype.is_floating_point:
        raise ArgumentError(f"{name} must be floating point, not {bias.dtype}.")
    if bias.device != scores.device and bias.dim() > 0:
        raise ArgumentError(f"{name} must be on the device of scores {scores.device}, not {bias.device}.")
    full = list(scores.shape)
    full[dim] = 1
    sizes = bias.shape
    fits = len(sizes) <= len(full) and all(
        size == 1 or size == whole for size, whole in zip(reversed(sizes), reversed(full), strict=False)
    )
    if not fits:
        raise ArgumentError(f"{name} {list(bias.shape)} must broadcast to {full}: scores, with size 1 in dim {dim}.")


def _register_autocast(device: str) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def probs(scores: Tensor, *others: Any) -> Any:
        # CPU's autocast leaves softmax alone, too.
        if device != "CPU" and scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.sigswap.sigmoid_probs.default(scores, *others)

    library.impl("sigmoid_probs", probs, f"Autocast{device}")


library.define(
    "sigmoid_probs(Tensor scores, Tensor? bias=None, int dim=-1, bool visible_bias=True, float const_bias=0.0, "
    "float row_cap=0.0, Tensor? share=None, Tensor? rest=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("sigmoid_probs", composed_probs, "CompositeImplicitAutograd")
for _device in AUTOCAST_DEVICES:
    _register_autocast(_device)
