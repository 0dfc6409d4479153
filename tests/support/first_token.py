"""An oracle for the bias that knows the first visible key: row by row, in float64, sharing no code with sigswap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASKED = -5000.0


def first_token_oracle(
    scores: Tensor,
    visible: Tensor,
    share: Tensor,
    rest: Tensor | None = None,
    offset: Tensor | None = None,
    constant: float | None = None,
) -> Tensor:
    """Probabilities [..., H, M, N] of ``scores`` of that shape, where ``visible`` [..., H, M, N].

    ``share``, ``offset``: [H]; ``rest``: broadcasts to [..., H, M]. ``constant``: a bias instead of -ln(visible keys).
    """
    scores, visible = scores.double(), visible.expand(scores.shape)
    *leading, heads, rows, _ = scores.shape
    rest = torch.zeros(()) if rest is None else rest
    rest = rest.double().expand(*leading, heads, rows).reshape(-1, heads, rows)
    flat, seen = scores.reshape(-1, heads, rows, scores.shape[-1]), visible.reshape(-1, heads, rows, scores.shape[-1])
    out = []
    for b in range(flat.shape[0]):
        for h in range(heads):
            for i in range(rows):
                keys = seen[b, h, i].nonzero().flatten()
                if len(keys) == 0:
                    out.append(torch.zeros_like(flat[b, h, i]))
                    continue
                bias = -math.log(len(keys)) if constant is None else constant
                others = -(share[h].double() * bias + rest[b, h, i])
                first = flat[b, h, i, keys[0]]
                row = -torch.log(torch.exp(first) + torch.exp(others))
                if offset is not None:
                    row = row + offset[h].double()
                p = 1 / (1 + torch.exp(-(flat[b, h, i] + row)))
                out.append(torch.where(seen[b, h, i], p, 0.0))
    return torch.stack(out).view(scores.shape)
