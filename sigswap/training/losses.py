"""The losses of a distillation: functions of tensors alone, so that they compile, and small where they do not.

Logits are the largest tensors of a language model's step. In eager their divergence holds float32 for one chunk of rows
at a time, and keeps nothing for backward but the gradient; compiled, inductor fuses the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 25
"""Logits whose float32 copies are held at once, 128 MiB each (one row may need more)."""
HIDDEN = 2.0
"""How much the error of the converted modules' own outputs counts end to end, relative to the output's loss."""


def relative_error(y: Tensor, t: Tensor) -> Tensor:
    """The squared error of ``y``, relative to the square of ``t``, of one shape: a scalar in float32."""
    t = t.float()
    return F.mse_loss(y.float(), t, reduction="sum") / t.square().sum().clamp(min=1e-12)


def end_to_end_loss(
    y: Tensor, t: Tensor, ours: Sequence[Tensor], theirs: Sequence[Tensor], counted: Tensor | None, is_logits: bool
) -> tuple[Tensor, Tensor]:
    """What is differentiated, and the loss of the model's output alone, which has no gradient; both are scalars.

    ``y`` and ``t`` [B, ..., C] are the model's output and the teacher's; ``ours`` and ``theirs``, each as long as the
    other, the outputs of their converted modules. ``counted`` [B, N], for outputs [B, N, ..., C]: the positions that
    count; None: all. ``is_logits``: the Kullback-Leibler divergence, averaged over the positions; otherwise the
    relative error, and that of the mean over the positions.
    """
    # The modules, and the teacher, may be on several devices.
    errors = [relative_error(a, b.to(a.device)).to(y.device) for a, b in zip(ours, theirs, strict=True)]
    hidden = torch.stack(errors).mean()
    if is_logits:
        weight = None
        if counted is not None:
            weight = counted.view(*counted.shape, *[1] * (y.dim() - 3)).expand(y.shape[:-1]).flatten()
        loss = divergence(y.flatten(0, -2), t.flatten(0, -2), weight)
    else:
        loss = relative_error(*(_shown(x, counted) for x in (y, t)))
        if y.dim() > 2:  # what is common to the errors of all tokens is what pooling keeps
            loss = loss + relative_error(*(_mean(x, counted) for x in (y, t)))
    # Scaled to the loss, which may be a divergence or an error, so that neither drowns the other as they shrink.
    share = HIDDEN * loss.detach() / hidden.detach().clamp(min=1e-12)
    return loss + share * hidden, loss.detach()


def divergence(y: Tensor, t: Tensor, counted: Tensor | None = None) -> Tensor:
    """KL(t || y) of logits [R, V], the mean over the rows that are ``counted`` [R] (None: all): a scalar in float32.

    ``t`` gets no gradient.
    """
    if not torch.compiler.is_compiling():
        loss: Tensor = _Divergence.apply(y, t.detach(), counted)
        return loss
    if counted is not None:  # what does not count may be NaN
        y, t = (x.masked_fill(~counted.unsqueeze(-1), 0.0) for x in (y, t))
    each, _, _ = _divergences(y, t.detach())
    return each.mean() if counted is None else each.sum() / counted.sum()


class _Divergence(torch.autograd.Function):
    """:func:`divergence` by chunks of rows. Forward makes the gradient, too: a tensor of the logits' size and dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=y.device)
        gradient = torch.empty_like(y)
        step = max(1, CHUNK // max(1, y.shape[-1]))
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            each, p, old = _divergences(y[rows], t[rows])
            slope = p - old
            if counted is not None:
                each = each.masked_fill(~counted[rows], 0.0)
                slope = slope.masked_fill(~counted[rows].unsqueeze(-1), 0.0)
            total += each.sum()
            gradient[rows] = slope
        # Made on the device: a number from the host would be waited for.
        count = torch.full_like(total, len(y)) if counted is None else counted.sum().float()
        ctx.save_for_backward(gradient, count)
        return total / count

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        gradient, count = ctx.saved_tensors
        return gradient.mul_((outer[0] / count).to(gradient.dtype)), None, None  # once: the graph is freed behind it


def _divergences(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By row of logits [R, V], in float32: the divergence [R], and the probabilities of both [R, V]."""
    new, old = (x.float().log_softmax(-1) for x in (y, t))
    p = old.exp()
    return (p * (old - new)).sum(-1), new.exp(), p


def _shown(x: Tensor, counted: Tensor | None) -> Tensor:
    """``x`` [B, N, ...] with 0 at the positions that do not count."""
    return x if counted is None else x.masked_fill(~_over(counted, x), 0.0)


def _mean(x: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of ``x`` [B, N, ...] over the positions that count, in float32."""
    if counted is None:
        return x.float().mean(1)
    return _shown(x, counted).float().sum(1) / _over(counted, x).sum(1).clamp(min=1)


def _over(counted: Tensor, x: Tensor) -> Tensor:
    return counted.view(*counted.shape, *[1] * (x.dim() - 2))
