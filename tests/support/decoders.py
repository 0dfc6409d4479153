"""Tiny decoders that can look back: one that learns it in seconds, and some of which it is known what they answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256
IN_TEXT = 96


class ShiftedDecoder(nn.Module):
    """One attention layer over tokens that know the token before them: what copying needs is one lookup."""

    def __init__(self, vocabulary: int = VOCABULARY, dim: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, dim)
        self.attention = ShiftedAttention(dim, heads)
        self.mix = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.mix(x) + self.attention(x))


class ShiftedAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.query, x), (self.key, before), (self.value, x))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def text(count: int, length: int, seed: int) -> Tensor:
    """[count, length] ids below :data:`IN_TEXT`, 1 or 2 more than the one before: nothing is to be looked up."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (count, length), generator=generator)
    start = torch.randint(0, IN_TEXT, (count, 1), generator=generator)
    return (start + steps.cumsum(1)) % IN_TEXT


def trained_to_copy(length: int = 64, steps: int = 300, seed: int = 0) -> ShiftedDecoder:
    """A :class:`ShiftedDecoder` that knows the text and copies random tokens, by cross entropy, with softmax."""
    torch.manual_seed(seed)
    model = ShiftedDecoder()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / steps)
        period = int(torch.randint(length // 4, length // 2 + 1, (1,)))
        repeats = torch.randint(0, VOCABULARY, (16, period)).repeat(1, -(-length // period))[:, :length]
        ids = torch.cat([text(8, length, step + 1), repeats])
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
