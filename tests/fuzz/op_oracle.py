"""Sigmoid attention in float64 with the whole score matrix, and how far a rounded computation of it may be off.

The bound is an interval: each step's error is carried on, from its inputs' errors and its own rounding, so that it
holds for scores of any size. With ``u`` the unit roundoff of the arithmetic, a sum of n products is off by at most
``(n + 4) u`` times the sum of their absolute values, and a probability by what its score's error does to it, which
where a score of 1e6 is off by 1 may be all of it. Nothing here is sigswap's.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

MASKED = -5000.0


class Rounding(NamedTuple):
    """``compute``: unit roundoff of sums and of functions. ``product``: of probabilities and of dS before they are
    multiplied, and ``product_floor`` likewise, absolute. ``probability``, relative, and ``floor``, absolute: of the
    sigmoid."""

    compute: float
    product: float = 0.0
    product_floor: float = 0.0
    probability: float = 0.0
    floor: float = 1e-37


class Off(NamedTuple):
    """A value, and by how much what is computed may differ from it."""

    value: Tensor
    error: Tensor

    def stored(self, dtype: torch.dtype) -> Off:
        """In ``dtype``, rounded once."""
        info = torch.finfo(dtype)
        return Off(self.value, self.error + info.eps / 2 * (self.value.abs() + self.error) + info.smallest_normal)

    def summed_to(self, shape: torch.Size, u: float) -> Off:
        """Over what is broadcast from ``shape``; a first size that divides the whole one is repeated."""
        terms = max(1, self.value.numel() // max(1, shape.numel()))
        value, error, size = self.value, self.error + u * (terms + 4) * self.value.abs(), self.value.abs()
        if value.shape[0] != shape[0] != 1:
            value, error, size = (x.reshape(-1, shape[0], *x.shape[1:]).sum(0) for x in (value, error, size))
        return Off(value.sum_to_size(shape), error.sum_to_size(shape))


@dataclasses.dataclass
class Dense:
    """One problem, [B, H, M, D]; tensors in any dtype, of which the values count."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    scale: float
    bias: Tensor | None = None
    const_bias: float = 0.0
    visible_bias: bool = True
    mask: Tensor | None = None
    causal: bool = False
    bottom_right: bool = False
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    row_cap: float = 0.0
    share: Tensor | None = None
    rest: Tensor | None = None
    kept: Tensor | None = None
    """Of dropout, [B, H, M, N]; None: there is none."""
    dropout_p: float = 0.0

    def visible(self) -> Tensor:
        """bool [B, H, M, N]."""
        (batch, heads, rows, _), keys = self.query.shape, self.key.shape[2]
        at = torch.arange(rows, device=self.query.device)[:, None] + (keys - rows if self.bottom_right else 0)
        distance = torch.arange(keys, device=self.query.device)[None, :] - at
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.causal:
            seen &= distance <= 0
        left, right = self.window
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        seen = seen.expand(batch, heads, rows, keys)
        if self.mask is not None:
            own = self.mask if self.mask.dtype == torch.bool else self.mask.double() > MASKED
            seen = seen & repeated(own, batch)
        return seen


def repeated(x: Tensor, batch: int) -> Tensor:
    """[b, ...] for a batch of which b is a divisor."""
    return x if x.shape[0] in (1, batch) else x.repeat(batch // x.shape[0], *[1] * (x.dim() - 1))


def results(problem: Dense, rounding: Rounding) -> dict[str, Off]:
    """The output, and the gradients of query, key, value, and of what there is of bias, mask, share and rest."""
    u = rounding.compute
    query, key, value, grad_out = (x.double() for x in (problem.query, problem.key, problem.value, problem.grad_out))
    batch, heads, rows, dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group = heads // max(1, kv_heads)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    visible = problem.visible()
    out_dtype = problem.query.dtype

    # The scores.
    score = problem.scale * query @ key.mT
    score_error = u * (dim + 4) * abs(problem.scale) * (query.abs() @ key.abs().mT)
    tanh = tanh_error = torch.zeros(())
    cap = problem.softcap
    if cap:
        tanh = torch.tanh(score / cap)
        off = [torch.tanh((score + sign * score_error) / cap) - tanh for sign in (1, -1)]
        tanh_error = torch.maximum(*(x.abs() for x in off)) + 8 * u
        score, score_error = cap * tanh, cap * tanh_error + 4 * u * cap * tanh.abs()
    if problem.mask is not None and problem.mask.dtype != torch.bool:
        added = repeated(problem.mask.double(), batch).clamp(min=MASKED).expand_as(score)
        score = score + added
        score_error = score_error + 2 * u * (added.abs() + score.abs())

    # The row bias.
    count = visible.sum(-1, keepdim=True).clamp(min=1).double()
    row_bias = torch.full_like(count, problem.const_bias)
    bias_error = 4 * u * torch.full_like(count, abs(problem.const_bias))
    if problem.visible_bias:
        row_bias, bias_error = row_bias - count.log(), bias_error + 4 * u * count.log()
    first = slope = slope_error = None
    if problem.share is not None and keys > 0:
        share = problem.share.double()
        rest = torch.zeros_like(share) if problem.rest is None else problem.rest.double()
        first = visible.to(torch.uint8).argmax(-1, keepdim=True)
        first_score, first_error = score.gather(-1, first), score_error.gather(-1, first)
        others = share * -row_bias - rest
        others_error = share.abs() * bias_error + 4 * u * ((share * row_bias).abs() + rest.abs())
        slope = torch.sigmoid(first_score - others)
        slope_error = (first_error + others_error + 4 * u * (first_score.abs() + others.abs())).clamp(max=4) / 4 + 8 * u
        unshared = -row_bias  # of which share takes its part
        row_bias = -torch.logaddexp(first_score, others.expand_as(first_score))
        bias_error = torch.maximum(first_error, others_error) + 8 * u * (first_score.abs() + others.abs() + 1)
    if problem.bias is not None:
        bias = problem.bias.double()
        row_bias, bias_error = row_bias + bias, bias_error + 4 * u * (bias.abs() + row_bias.abs())

    # Probabilities.
    x = score + row_bias
    x_error = score_error + bias_error + 4 * u * (score.abs() + row_bias.abs())
    p = torch.where(visible, torch.sigmoid(x), 0.0)
    off = [(torch.sigmoid(x + sign * x_error) - torch.sigmoid(x)).abs() for sign in (1, -1)]
    p_error = torch.maximum(*off)
    p_error = p_error + (8 * u + rounding.probability) * (p + p_error) + rounding.floor
    p_error = torch.where(visible, p_error, 0.0)
    p_most = p + p_error

    # The output.
    total = p.sum(-1, keepdim=True)
    total_error = p_error.sum(-1, keepdim=True) + u * (keys + 4) * p_most.sum(-1, keepdim=True)
    factor = torch.ones_like(p)
    factor_error = torch.zeros_like(p)
    if problem.kept is not None:
        high = 1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0
        unknown = (p < max(KEEP_IS_SEEN[out_dtype], 2 * rounding.floor)) & ~problem.kept
        factor, factor_error = problem.kept.double() * high, unknown.double() * high + 4 * u * high
    weights = p * factor
    weight_error = (
        p_error * factor + p_most * factor_error + (rounding.product * p_most + rounding.product_floor) * factor
    )
    summed = weights @ value
    summed_error = weight_error @ value.abs() + u * (keys + 4) * ((weights + weight_error) @ value.abs())
    divisor = least = torch.ones_like(total)
    if problem.row_cap:
        divisor = total.clamp(min=problem.row_cap)
        least = (total - total_error).clamp(min=problem.row_cap)
    out = summed / divisor
    out_error = summed_error / least + summed.abs() * (1 / least - 1 / divisor) + 4 * u * out.abs()
    result = {"output": Off(out, out_error).stored(out_dtype)}

    # Through the row cap's division.
    grad, grad_error = grad_out / divisor, torch.zeros_like(grad_out)
    delta, delta_error = torch.zeros_like(total), torch.zeros_like(total)
    if problem.row_cap:
        most = total + total_error
        grad_error = grad_out.abs() * (1 / least - 1 / most.clamp(min=problem.row_cap)) + 4 * u * grad.abs()
        grad_error = Off(grad, grad_error).stored(out_dtype).error
        full = (grad * out).sum(-1, keepdim=True)
        full_error = (grad_error * out.abs() + (grad.abs() + grad_error) * result["output"].error).sum(-1, keepdim=True)
        full_error = full_error + u * (value_dim + 4) * (grad.abs() * out.abs()).sum(-1, keepdim=True)
        delta = torch.where(total > problem.row_cap, full, 0.0)
        near = (total - problem.row_cap).abs() <= total_error
        delta_error = torch.where(most > problem.row_cap, full_error, 0.0) + torch.where(near, full.abs(), 0.0)

    # dP, dS.
    product = grad @ value.mT
    product_error = (grad_error + u * (value_dim + 4) * grad.abs()) @ value.abs().mT
    d_p = product * factor - delta
    d_p_error = product_error * factor + product.abs() * factor_error + delta_error
    d_p_error = d_p_error + 4 * u * ((product * factor).abs() + delta.abs())
    both = p * (1 - p)
    both_error = p_error * ((1 - 2 * p).abs() + 2 * p_error) + 4 * u * p_most
    d_s = both * d_p
    d_s_error = both_error * d_p.abs() + (both + both_error) * d_p_error + 4 * u * d_s.abs()
    row = Off(d_s, d_s_error).summed_to(torch.Size((*d_s.shape[:3], 1)), u)
    if problem.bias is not None:
        result["bias"] = Off(d_s, d_s_error).summed_to(problem.bias.shape, u).stored(problem.bias.dtype)
    ways = [(d_s, d_s_error + rounding.product * d_s.abs() + rounding.product_floor)]  # to the scores
    if slope is not None and first is not None and problem.share is not None:
        d_first = -row.value * slope
        d_first_error = row.error * (slope + slope_error) + row.value.abs() * slope_error + 4 * u * d_first.abs()
        sees = visible.any(-1, keepdim=True)
        pair = (torch.zeros_like(d_s).scatter(-1, first, x * sees) for x in (d_first, d_first_error))
        ways.append((next(pair), next(pair)))
        for name, tensor, by in (("share", problem.share, unshared), ("rest", problem.rest, -torch.ones_like(count))):
            if tensor is not None:
                each = -row.value * (1 - slope) * by
                error = row.error * (1 - slope + slope_error) + row.value.abs() * slope_error
                error = error * by.abs() + 8 * u * each.abs() + bias_error * row.value.abs()
                result[name] = Off(each, error).summed_to(tensor.shape, u).stored(tensor.dtype)
    if problem.mask is not None and problem.mask.dtype != torch.bool:
        parts = [Off(*way).summed_to(problem.mask.shape, u) for way in ways]
        result["mask"] = _added(parts, problem.mask.dtype)

    # Through the soft cap, and the products.
    if cap:
        inner = 1 - tanh * tanh
        inner_error = 2 * tanh.abs() * tanh_error + tanh_error**2 + 4 * u
        ways = [(x * inner, error * (inner + inner_error) + x.abs() * inner_error) for x, error in ways]
    scale, of_query, of_key = problem.scale, [], []
    for x, error in ways:
        terms = (error + u * (keys + 6) * x.abs()) @ key.abs()
        of_query.append(Off(scale * x @ key, abs(scale) * terms))
        terms = (error + u * (rows * group + 6) * x.abs()).mT @ query.abs()
        of_key.append(_grouped(Off(scale * x.mT @ query, abs(scale) * terms), kv_heads))
    result["query"], result["key"] = _added(of_query, out_dtype), _added(of_key, out_dtype)
    terms = (weight_error + u * (rows * group + 6) * weights).mT @ grad.abs() + weights.mT @ grad_error
    result["value"] = _grouped(Off(weights.mT @ grad, terms), kv_heads).stored(out_dtype)
    return result


def _added(parts: list[Off], dtype: torch.dtype) -> Off:
    """What autograd gives to an input that is used in several ways."""
    stored = [part.stored(dtype) for part in parts]
    whole = Off(sum(part.value for part in stored), sum(part.error for part in stored))
    return whole if len(parts) == 1 else whole.stored(dtype)


KEEP_IS_SEEN = {torch.float64: 1e-300, torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-6}
"""Where a probability is at least this, its product with 1 is not rounded to 0."""


def _grouped(off: Off, kv_heads: int) -> Off:
    if off.value.shape[1] == kv_heads:
        return off
    return Off(*(x.unflatten(1, (kv_heads, -1)).sum(2) for x in off))
