"""Whose logsumexp calibration sees: heads and padding wherever a module puts them, against an fp64 oracle per head."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap

HEADS, HEAD_DIM = 4, 8
DIM = HEADS * HEAD_DIM
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """``attend``: q, k, v [batch, length, DIM] and visible [batch, length] to [batch, length, DIM]."""

    def __init__(self, attend: Attend, key_heads: int) -> None:
        super().__init__()
        self.qkv, self.attend, self.key_heads = nn.Linear(DIM, 3 * DIM), attend, key_heads
        nn.init.normal_(self.qkv.weight, std=0.4)
        nn.init.normal_(self.qkv.bias, std=0.4)
        self.double()

    def heads(self, x: Tensor) -> list[Tensor]:
        """q, k, v [batch, HEADS, length, HEAD_DIM], each key head as often as its query heads are many."""
        q, k, v = (t.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return [q, *(t[:, : self.key_heads].repeat_interleave(HEADS // self.key_heads, 1) for t in (k, v))]

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, -1), visible)


class Model(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.attention(x, visible)


def explicit(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~visible, -math.inf).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def outer(x: Tensor) -> Tensor:
    """[batch, length, heads * head_dim] as [heads * batch, length, head_dim]."""
    return x.view(*x.shape[:2], -1, HEAD_DIM).permute(2, 0, 1, 3).reshape(-1, x.shape[1], HEAD_DIM)


def back(x: Tensor, batch: int) -> Tensor:
    """What undoes :func:`outer`."""
    return x.view(HEADS, batch, -1, HEAD_DIM).permute(1, 2, 0, 3).reshape(batch, -1, DIM)


def tiled(visible: Tensor) -> Tensor:
    """[batch, length] for scores [heads * batch, rows, length]."""
    return visible.repeat(HEADS, 1).unsqueeze(1)


def one_head(*tensors: Tensor) -> list[Tensor]:
    return [x[..., :HEAD_DIM] for x in tensors]


def joined(join: Callable[[Tensor], Tensor], one: Attend) -> Attend:
    """Heads and batch joined by ``join``, heads outermost."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return back(one(join(q), join(k), join(v), tiled(visible)), len(q))

    return attend


def scores_split(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The product on [heads * batch], the softmax on [heads, batch]."""
    scores = torch.bmm(outer(q), outer(k).mT).view(HEADS, len(q), q.shape[1], -1) * HEAD_DIM**-0.5
    p = scores.masked_fill(~visible[None, :, None], -math.inf).softmax(-1)
    return back(torch.bmm(p.flatten(0, 1), outer(v)), len(q))


def scores_joined(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The product on [batch, heads], the softmax on [heads * batch]: w_h could not follow the queries there."""
    q, k = (x.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for x in (q, k))
    scores = (q @ k.mT * HEAD_DIM**-0.5).transpose(0, 1).flatten(0, 1)
    return back(torch.bmm(scores.masked_fill(~tiled(visible), -math.inf).softmax(-1), outer(v)), len(q))


def as_rows(heads_outer: bool, one: Attend) -> Attend:
    """Multi-query attention, its query heads as further rows: outermost, or inner, [batch, rows, HEAD_DIM]."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        rows = q.view(*q.shape[:2], HEADS, HEAD_DIM)
        rows = (rows.transpose(1, 2) if heads_outer else rows).reshape(len(q), -1, HEAD_DIM)
        mask = visible.unsqueeze(1).expand(-1, rows.shape[1], -1)
        out = one(rows, *one_head(k, v), mask)
        if heads_outer:
            out = out.view(len(q), HEADS, -1, HEAD_DIM).transpose(1, 2)
        return out.reshape(len(q), -1, DIM)

    return attend


def rows_split(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Multi-query as in GPT-BigCode: the product on [batch, rows * heads], the softmax on [batch, rows, heads]."""
    k, v = one_head(k, v)
    scores = (q.reshape(len(q), -1, HEAD_DIM) @ k.mT).view(len(q), -1, HEADS, k.shape[1]) * HEAD_DIM**-0.5
    p = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
    return (p.flatten(1, 2) @ v).view(q.shape)


def one_key_head(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Multi-query attention without an axis for the key's head."""
    q, (k, v) = q.view(*q.shape[:2], HEADS, HEAD_DIM).transpose(1, 2), one_head(k, v)
    scores = torch.einsum("bhmd,bnd->bhmn", q, k) * HEAD_DIM**-0.5
    p = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
    return torch.einsum("bhmn,bnd->bmhd", p, v).flatten(2)


def keys_first(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for x in (q, k, v))
    p = (k @ q.mT * HEAD_DIM**-0.5).masked_fill(~visible[:, None, :, None], -math.inf).softmax(2)
    return torch.einsum("bhnm,bhnd->bmhd", p, v).flatten(2)


def spelled(layout: str) -> Attend:
    """By einsum, with the scores as ``layout`` says."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (x.view(*x.shape[:2], HEADS, HEAD_DIM) for x in (q, k, v))
        scores = torch.einsum(f"bmhd,bnhd->{layout}", q, k) * HEAD_DIM**-0.5
        hidden = ~torch.einsum(f"bn,mh->{layout}", visible.float(), torch.ones(q.shape[1], HEADS)).bool()
        p = scores.masked_fill(hidden, -math.inf).softmax(layout.index("n"))
        return torch.einsum(f"{layout},bnhd->bmhd", p, v).flatten(2)

    return attend


LAYOUTS: dict[str, tuple[Attend, int]] = {  # and the heads of the keys
    "(h b) m n": (joined(outer, explicit), HEADS),
    "(h b) m n, chunks and cat": (joined(lambda x: torch.cat(x.chunk(HEADS, -1)), explicit), HEADS),
    "(h b) m n, split and stack": (
        joined(lambda x: torch.stack(x.split(HEAD_DIM, -1)).flatten(0, 1), explicit),
        HEADS,
    ),
    "(h b) m n, sdpa": (joined(outer, sdpa), HEADS),
    "(h b) m n to h b m n": (scores_split, HEADS),
    "b h m n to (h b) m n": (scores_joined, HEADS),
    "b (h m) n": (as_rows(True, explicit), 1),
    "b (h m) n, sdpa": (as_rows(True, sdpa), 1),
    "b (m h) n": (as_rows(False, explicit), 1),
    "b (m h) n, sdpa": (as_rows(False, sdpa), 1),
    "b (m h) n to b m h n": (rows_split, 1),
    "b h m n, one key head": (one_key_head, 1),
    "b h n m": (keys_first, HEADS),
    **{" ".join(layout): (spelled(layout), HEADS) for layout in ("bmnh", "bnmh", "mnbh", "nmbh")},
}
BIAS_ONLY = {"b h m n to (h b) m n", "m n b h", "n m b h"}  # those whose rows do not lie as the queries do


def batches() -> list[tuple[Tensor, Tensor]]:
    """x and visible [batch, length], of several sizes, none of which is that of the example; with right padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch, length in ((3, 6), (5, 7), (4, 4)):
        x = torch.randn(batch, length, DIM, generator=generator, dtype=torch.float64)
        lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
        found.append((x, torch.arange(length) < lengths))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("example", [1, 2])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_calibration_against_an_oracle(name: str, example: int) -> None:
    """c_h and w_h are the ridge regression on each head's own logsumexp, and act on that head's scores."""
    torch.manual_seed(0)
    attend, key_heads = LAYOUTS[name]
    attention, data = Attention(attend, key_heads), batches()
    query_bias = name not in BIAS_ONLY
    features, targets = [], []
    for x, visible in data:
        q, k, _ = attention.heads(x)
        scores = (q @ k.mT / math.sqrt(HEAD_DIM)).masked_fill(~visible[:, None, None], -math.inf)
        target = visible.sum(-1).log()[:, None, None] - scores.logsumexp(-1)
        features.append(torch.cat([q, torch.ones_like(q[..., :1])], -1).transpose(0, 1)[:, visible])
        targets.append(target.transpose(0, 1)[:, visible])
    x, y = torch.cat(features, 1)[..., 0 if query_bias else HEAD_DIM :], torch.cat(targets, 1)
    # Ridge regression as least squares with a further row, sqrt(lambda) * |x_d|, for each feature but the last.
    extra = torch.diag_embed((1e-3 * x.square().sum(1)).sqrt())[:, :-1]
    goal = torch.cat([y, torch.zeros(HEADS, extra.shape[1]).double()], 1)[..., None]
    expected = torch.linalg.lstsq(torch.cat([x, extra], 1), goal).solution.squeeze(-1)

    model = Model(attention)
    small = torch.randn(example, 5, DIM, dtype=torch.float64), torch.ones(example, 5, dtype=torch.bool)
    sigswap.convert(model, sigswap.SigmoidConfig(query_bias=query_bias), example_inputs=small)
    report = sigswap.calibrate(model, data, refine=0, progress=False)
    site = model.get_submodule("attention.sigswap.0")
    torch.testing.assert_close(site.bias, expected[:, -1], rtol=1e-6, atol=1e-6)
    if query_bias:
        torch.testing.assert_close(site.query_weight, expected[:, :-1], rtol=1e-6, atol=1e-6)

    missing, energy = torch.zeros(2, HEADS, dtype=torch.float64)
    for x, visible in data:
        q, k, v = attention.heads(x)
        bias = expected[:, -1:, None]
        if query_bias:
            bias = bias + (q * expected[:, None, :-1]).sum(-1, keepdim=True)
        keys = visible[:, None, None]
        scores = q @ k.mT / math.sqrt(HEAD_DIM)
        output = (torch.sigmoid(scores - keys.sum(-1, keepdim=True).log() + bias) * keys) @ v
        torch.testing.assert_close(model(x, visible), output.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)
        truth = scores.masked_fill(~keys, -math.inf).softmax(-1) @ v
        missing += (output - truth).transpose(0, 1)[:, visible].square().sum((1, 2))
        energy += truth.transpose(0, 1)[:, visible].square().sum((1, 2))
    torch.testing.assert_close(
        torch.tensor([head.after for head in report.heads], dtype=torch.float64), missing / energy, rtol=1e-5, atol=0
    )


def test_the_product_with_the_value_may_be_one_of_three_tensors() -> None:
    class Projected(Model):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.attention.heads(x)
            weights = (q @ k.mT * HEAD_DIM**-0.5).softmax(-1)
            out = self.attention.qkv.weight[:DIM].view(HEADS, HEAD_DIM, DIM)
            return torch.einsum("bhij,bhjd,hde->bie", weights, v, out)

    torch.manual_seed(0)
    x = torch.randn(4, 6, DIM, dtype=torch.float64)
    model = Projected(Attention(explicit, HEADS))
    with torch.no_grad():
        before = model(x)
        sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True), example_inputs=x)
        error = (model(x) - before).square().sum()
        sigswap.calibrate(model, [x], progress=False)
        assert (model(x) - before).square().sum() < 0.5 * error


@pytest.mark.parametrize("attend", [explicit, sdpa])
def test_attention_within_vmap_says_that_it_cannot_be_seen(attend: Attend) -> None:
    class Mapped(Model):
        def forward(self, x: Tensor) -> Tensor:
            visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
            q, k, v = self.attention.heads(x)
            return torch.vmap(attend, (0, 0, 0, None))(q, k, v, visible).transpose(1, 2).flatten(2)

    x = torch.randn(4, 6, DIM, dtype=torch.float64)
    model = sigswap.convert(Mapped(Attention(explicit, HEADS)), example_inputs=x)
    with pytest.raises(sigswap.errors.CalibrationError, match=r"inside torch\.vmap"):
        sigswap.calibrate(model, [x], progress=False)
