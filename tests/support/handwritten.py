"""Attention as people write it by hand: modules whose ``normalise`` is softmax, or, for an oracle, something else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, HEAD_DIM = 32, 4, 8
Normalise = Callable[[Tensor, int], Tensor]


def softmax(scores: Tensor, dim: int) -> Tensor:
    return torch.softmax(scores, dim)


def sigmoid(scores: Tensor, dim: int) -> Tensor:
    """What softmax is to become (docs/design.md), independent of the code under test."""
    visible = (scores > -5000).sum(dim, keepdim=True).clamp(min=1)
    return torch.where(scores > -5000, torch.sigmoid(scores - visible.to(scores.dtype).log()), 0.0)


def capped(row_cap: float) -> Normalise:
    """sigmoid(), with rows that are divided by their sum where it is above the cap, else by the cap."""

    def normalise(scores: Tensor, dim: int) -> Tensor:
        p = sigmoid(scores, dim)
        return p / p.sum(dim, keepdim=True).clamp(min=row_cap)

    return normalise


class Handwritten(nn.Module):
    """[batch, length, DIM] to the same; ``normalise``: of scores, along a dimension."""

    sites = 1
    dynamic = True  # whether it takes every length

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.normalise: Normalise = softmax

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return tuple(t.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for t in (q, k, v))  # type: ignore

    def merged(self, x: Tensor) -> Tensor:
        return self.out(x.transpose(1, 2).contiguous().view(x.shape[0], -1, DIM))


class NanoGPT(Handwritten):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(torch.tril(torch.ones(n, n)).view(1, 1, n, n) == 0, float("-inf"))
        return self.merged(F.dropout(self.normalise(scores, -1), 0.1, self.training) @ v)


class CosineWindows(Handwritten):
    """As Swin v2: cosine attention with a learned, clamped temperature, a relative bias, and masks per window."""

    dynamic = False

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        self.bias = nn.Parameter(torch.randn(HEADS, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x.reshape(-1, 6, DIM))  # two windows of 6 in each 12
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        scores = scores + self.bias.unsqueeze(0)
        region = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
        mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)
        scores = scores.view(-1, 2, HEADS, 6, 6) + mask[None, :, None]
        weights = self.normalise(scores.view(-1, HEADS, 6, 6), -1)
        return self.merged(weights @ v).view(x.shape)


class Grouped(Handwritten):
    """Grouped heads, keys repeated by expand and reshape, in einsum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (t[:, :2, None].expand(-1, 2, 2, -1, -1).reshape(q.shape) for t in (k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / HEAD_DIM**0.5
        return self.merged(torch.einsum("bhij,bhjd->bhid", self.normalise(scores, -1), v))


class MultiQuery(Handwritten):
    """One head of keys for all, without an axis for it, and ALiBi."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        position = torch.arange(n)
        alibi = -slopes[:, None, None] * (position[None, :, None] - position[None, None, :]).abs()
        scores = torch.einsum("bhid,bjd->bhij", q * HEAD_DIM**-0.5, k[:, 0]) + alibi
        hidden = position[None, :] > position[:, None]
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return self.merged(torch.einsum("bhij,bjd->bhid", self.normalise(scores, -1), v[:, 0]))


class MergedBatches(Handwritten):
    """Batch and heads merged, baddbmm, as in diffusers and fairseq."""

    def forward(self, x: Tensor) -> Tensor:
        batch, n, _ = x.shape
        q, k, v = (t.reshape(batch * HEADS, n, HEAD_DIM) for t in self.heads(x))
        empty = torch.empty(batch * HEADS, n, n, dtype=q.dtype)
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=HEAD_DIM**-0.5)
        weights = self.normalise(scores.float() if q.dtype != torch.float64 else scores, -1).to(v.dtype)
        out = torch.bmm(weights, v).view(batch, HEADS, n, HEAD_DIM)
        return self.out(out.permute(0, 2, 1, 3).reshape(batch, n, DIM))


class LocalWithSoftcap(Handwritten):
    """A causal window, and Gemma's soft cap."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = 5.0 * torch.tanh(torch.matmul(q, k.mT) / HEAD_DIM**0.5 / 5.0)
        i = torch.arange(x.shape[1])
        visible = (i[:, None] >= i) & (i[:, None] - i < 4)
        return self.merged(self.normalise(torch.where(visible, scores, -1e9), -1) @ v)


class Latents(Handwritten):
    """As Perceiver: learned queries, the same for all, attend to padded inputs, and the inputs to those."""

    sites = 2

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(5, DIM))
        self.query = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        latents = self.query(self.latents).view(5, HEADS, HEAD_DIM).transpose(0, 1)
        padding = torch.arange(x.shape[1])[None] >= torch.tensor([x.shape[1], 4])[:, None]  # True: padding
        scores = (latents @ k.mT / HEAD_DIM**0.5).masked_fill(padding[:, None, None, :], float("-inf"))
        summary = self.normalise(scores, -1) @ v
        return self.merged(self.normalise(q @ summary.mT * 0.3, -1) @ summary)


class KeysFirst(Handwritten):
    """Scores [keys, queries], normalised over their rows, as in axial attention on [batch, channels, length]."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).transpose(1, 2).reshape(x.shape[0], HEADS, 3 * HEAD_DIM, -1).chunk(3, dim=2)
        scores = torch.einsum("bhcj,bhci->bhji", k, q) * HEAD_DIM**-0.5
        out = torch.einsum("bhcj,bhji->bhci", v, self.normalise(scores, 2))
        return self.out(out.reshape(x.shape[0], DIM, -1).transpose(1, 2))


class GroupedInFive(Handwritten):
    """Grouped heads as an axis of their own, in einsum; the mask is added, from triu."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        q, k, v = q.view(-1, 2, 2, n, HEAD_DIM), k[:, :2], v[:, :2]
        mask = torch.triu(torch.full((n, n), float("-inf"), dtype=q.dtype), diagonal=1)
        scores = torch.einsum("bkgid,bkjd->bkgij", q, k) * HEAD_DIM**-0.5 + mask
        out = torch.einsum("bkgij,bkjd->bkgid", self.normalise(scores, -1), v)
        return self.merged(out.reshape(-1, HEADS, n, HEAD_DIM))


class InPlace(Handwritten):
    """Scores edited in place, with a padding mask as BERT's: (1 - mask) * -10000."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        padding = (torch.arange(x.shape[1])[None] < torch.tensor([x.shape[1], 3])[:, None]).to(q.dtype)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores /= math.sqrt(HEAD_DIM)
        scores += (1.0 - padding[:, None, None, :]) * -10000.0
        return self.merged(torch.matmul(self.normalise(scores, -1), v))


class TwoStreams(Handwritten):
    """Two attentions that share their keys, of which one's output is the other's query."""

    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        first = self.normalise(q @ k.mT * 0.4, -1) @ v
        second = self.normalise(first @ k.mT * 0.4, -1) @ v
        return self.merged(second)


MODELS: tuple[type[Handwritten], ...] = (
    NanoGPT,
    CosineWindows,
    Grouped,
    MultiQuery,
    MergedBatches,
    LocalWithSoftcap,
    Latents,
    KeysFirst,
    GroupedInFive,
    InPlace,
    TwoStreams,
)
