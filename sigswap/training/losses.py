"""The losses of a distillation: functions of tensors alone, so that they compile, and small where they do not.

Logits are the largest tensors of a language model's step. In eager their divergence holds float32 for one chunk of rows
at a time, and keeps nothing for backward but the gradient; compiled, inductor fuses the same formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 25
"""Logits whose float32 copies are held at once, 128 MiB each (one row may need more)."""
HIDDEN = 2.0
"""How much the error of the converted modules' own outputs counts end to end, relative to the output's loss."""


class Quotients(NamedTuple):
    """What a loss is made of: numbers ``above`` [K], each divided by that ``below`` [K], in float32.

    All are sums over a batch, so those of a batch that is divided among ranks are the sums of theirs. ``below`` has no
    gradient.
    """

    above: Tensor
    below: Tensor

    def values(self, totals: Quotients | None = None) -> Tensor:
        """[K]; with the ``totals`` over all ranks, what this one adds to the values of them together."""
        below = self.below if totals is None else totals.below
        return self.above / below.clamp(min=1e-12)


def relative_error(y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of ``y``, and the square of ``t``, of one shape: scalars in float32."""
    t = t.float()
    return F.mse_loss(y.float(), t, reduction="sum"), t.square().sum()


def quotients(
    y: Tensor, t: Tensor, ours: Sequence[Tensor], theirs: Sequence[Tensor], counted: Tensor | None, is_logits: bool
) -> Quotients:
    """What the loss end to end is made of: first the relative errors of the converted modules' outputs, then that of
    the model's output.

    ``y`` and ``t`` [B, ..., C] are the model's output and the teacher's; ``ours`` and ``theirs``, each as long as the
    other, the outputs of their converted modules. ``counted`` [B, N], for outputs [B, N, ..., C]: the positions that
    count; None: all. ``is_logits``: the Kullback-Leibler divergence, averaged over the positions; otherwise the
    relative error, and that of the mean over the positions.
    """
    # The modules, and the teacher, may be on several devices.
    found = [relative_error(a, b.to(a.device)) for a, b in zip(ours, theirs, strict=True)]
    if is_logits:
        weight = None
        if counted is not None:
            weight = counted.view(*counted.shape, *[1] * (y.dim() - 3)).expand(y.shape[:-1]).flatten()
        found.append(divergence(y.flatten(0, -2), t.flatten(0, -2), weight))
    else:
        found.append(relative_error(*(_shown(x, counted) for x in (y, t))))
        if y.dim() > 2:  # what is common to the errors of all tokens is what pooling keeps
            found.append(relative_error(*(_mean(x, counted) for x in (y, t))))
    above, below = (torch.stack([x.to(y.device) for x in each]) for each in zip(*found, strict=True))
    return Quotients(above, below.detach())


def end_to_end_loss(mine: Quotients, modules: int, totals: Quotients | None = None) -> tuple[Tensor, Tensor]:
    """What is differentiated, and the loss of the model's output alone, which has no gradient; both are scalars.

    ``modules``: how many of the quotients are of converted modules' outputs. ``totals``: those of all ranks; the first
    result is then this rank's part of the whole.
    """
    each = mine.values(totals)
    now = each.detach() if totals is None else totals.values()
    loss, hidden = now[modules:].sum(), now[:modules].mean()
    # Scaled to the loss, which may be a divergence or an error, so that neither drowns the other as they shrink.
    share = HIDDEN * loss / hidden.clamp(min=1e-12)
    return each[modules:].sum() + share * each[:modules].mean(), loss


def divergence(y: Tensor, t: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """KL(t || y) of logits [R, V], the sum over the rows that are ``counted`` [R] (None: all), and their number:
    scalars in float32.

    ``t`` gets no gradient.
    """
    # Made on the device: a number from the host would be waited for.
    count = torch.full((), len(y), dtype=torch.float32, device=y.device) if counted is None else counted.sum().float()
    if not torch.compiler.is_compiling():
        total: Tensor = _Divergence.apply(y, t.detach(), counted)
        return total, count
    if counted is not None:  # what does not count may be NaN
        y, t = (x.masked_fill(~counted.unsqueeze(-1), 0.0) for x in (y, t))
    each, _, _ = _divergences(y, t.detach())
    return each.sum(), count


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
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer[0].to(gradient.dtype)), None, None  # once: the graph is freed behind it


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
