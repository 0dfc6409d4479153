"""Random problems of the op against float64: outputs and gradients are within the oracle's bound, and masks hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sigswap
from sigswap.functional.attention import FirstToken, attend, probabilities
from tests.fuzz.op_oracle import KEEP_IS_SEEN, Dense, Off, Rounding, results

ROUNDINGS = {
    "cpu": {
        torch.float64: Rounding(2 * 2.0**-53, floor=1e-300),
        torch.float32: Rounding(2.0**-24),
        torch.bfloat16: Rounding(2.0**-24),
        torch.float16: Rounding(2.0**-24),
    },
    "cuda": {
        torch.float32: Rounding(2.0**-22, probability=2.0**-9, floor=1e-6),
        torch.bfloat16: Rounding(2.0**-22, product=2.0**-8, probability=2.0**-9, floor=1e-6),
        torch.float16: Rounding(2.0**-22, product=2.0**-11, product_floor=2.0**-24, probability=2.0**-9, floor=1e-6),
    },
}
"""By device and dtype. In plain PyTorch half precision is computed in float32. Triton's kernels round probabilities and
dS to half precision before they are multiplied, and have an approximate sigmoid."""


class Limits(NamedTuple):
    """What is drawn: sizes, and dtypes."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[int, ...] = (0, 1, 1, 2, 3, 7, 16, 17, 33)
    keys: tuple[int, ...] = (0, 1, 2, 5, 16, 19, 33, 65)
    dims: tuple[int, ...] = (0, 1, 3, 8, 8, 16, 17, 33)


CPU = Limits("cpu", (torch.float64, torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16))
CUDA = Limits(
    "cuda",
    (torch.bfloat16, torch.float16),
    rows=(0, 1, 1, 2, 17, 64, 130, 257),
    keys=(0, 1, 2, 17, 64, 130, 257, 600),
    dims=(8, 16, 17, 24, 33, 40, 64, 80, 128),
)


def attempt(seed: int, limits: Limits = CPU) -> tuple[str, str | None, float]:
    """The problem with this number. Its kind, what is wrong (None: nothing), and the largest error as a share of its
    bound."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = rng.choice(("dense", "dense", "dense", "converted", "converted", "packed", "packed", "scores"))
    try:
        worst = {"dense": _dense, "converted": _converted, "packed": _packed, "scores": _scores}[kind](rng, limits)
    except AssertionError as error:
        return kind, str(error), math.inf
    except torch.AcceleratorError:
        raise  # of this process no other problem is right any more
    except Exception as error:
        return kind, f"raises {type(error).__name__}: {str(error)[:300]}", math.inf
    return kind, None, worst


# Drawing.


def _drawn(rng: random.Random, limits: Limits, *, packed: bool = False) -> Dense:
    """A problem with all that the kinds share."""
    dtype = rng.choice(limits.dtypes)
    kv_heads, group = rng.choice((0, 1, 1, 1, 2)), rng.choice((1, 1, 2, 3))
    batch, heads = 1 if packed else rng.choice((0, 1, 1, 2, 3, 4)), kv_heads * group
    rows, keys = rng.choice(limits.rows), rng.choice(limits.keys)
    if packed and min(batch, heads) == 0:
        batch, kv_heads, heads = 1, 1, group
    dim = rng.choice(limits.dims)
    value_dim = dim if rng.random() < 0.6 else rng.choice(limits.dims)
    peak = rng.choice((1.0, 1.0, 1.0, 3.0, 30.0, 1e3, 1e4))
    loud = rng.choice((1.0, 1.0, 1.0, 1e2)) if dtype != torch.float16 else 1.0

    def tensor(count: int, length: int, width: int, amplitude: float) -> Tensor:
        layout = rng.choice(("plain", "plain", "transposed", "sliced", "expanded", "reversed"))
        shape = (batch, count, length, width)
        if layout == "transposed":
            made = torch.randn(batch, length, count, width).transpose(1, 2)
        elif layout == "sliced":
            made = torch.randn(batch, count, length, width + 3)[..., 3:]
        elif layout == "expanded":
            made = torch.randn(1, count, length, width).expand(shape)
        elif layout == "reversed":
            made = torch.randn(batch, count, width, length).transpose(2, 3)
        else:
            made = torch.randn(shape)
        most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / 2
        made = (made * amplitude).clamp(-most, most)
        return made.to(limits.device, dtype)

    problem = Dense(
        tensor(heads, rows, dim, peak),
        tensor(kv_heads, keys, dim, rng.choice((1.0, peak))),
        tensor(kv_heads, keys, value_dim, loud),
        tensor(heads, rows, value_dim, rng.choice((1.0, loud))),
        scale=rng.choice((max(1, dim) ** -0.5, max(1, dim) ** -0.5, 0.3, -0.5, 0.0)),
    )
    problem.softcap = rng.choice((0.0, 0.0, 0.0, 0.0, 1.5, 30.0, 1e5))
    problem.row_cap = rng.choice((0.0, 0.0, 0.05, 0.5, 1.0, 3.0))
    problem.dropout_p = rng.choice((0.0, 0.0, 0.0, 0.0, 0.1, 0.5, 1.0))
    sides = (None, None, None, 0, 2, 9, 10**9)
    problem.window = (rng.choice(sides), rng.choice(sides)) if rng.random() < 0.3 else (None, None)
    problem.causal = rng.random() < 0.3
    return problem


def _a_mask(rng: random.Random, problem: Dense) -> Tensor:
    (batch, heads, rows, _), keys = problem.query.shape, problem.key.shape[2]
    shape = [rng.choice((1, size)) for size in (batch, heads, rows, keys)]
    device = problem.query.device
    share = rng.choice((0.0, 0.2, 0.2, 0.7, 1.0))
    hidden = torch.rand(shape) < share
    if rng.random() < 0.2:  # blocks
        size = rng.choice((2, 4, 8))
        hidden = hidden[..., ::size, ::size].repeat_interleave(size, 2).repeat_interleave(size, 3)
        hidden = hidden[..., : shape[2], : shape[3]]
    if rng.random() < 0.5:
        return hidden.logical_not().to(device)
    dtype = rng.choice((problem.query.dtype, torch.float32, torch.float32))
    low = rng.choice((-math.inf, torch.finfo(dtype).min, -1e4))
    mask = torch.randn(shape) * rng.choice((0.0, 1.0, 30.0))
    return mask.to(dtype).masked_fill(hidden, low).to(device)


def _rows_tensor(rng: random.Random, problem: Dense, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """That broadcasts to [B, H, M, 1]."""
    shape = [rng.choice((1, size)) for size in problem.query.shape[:3]]
    return (torch.randn(*shape, 1) * rng.choice((1.0, 5.0))).to(problem.query.device, rng.choice(dtypes))


# The kinds.


def _dense(rng: random.Random, limits: Limits) -> float:
    """``sigswap.sigmoid_attention``."""
    problem = _drawn(rng, limits)
    bias: Any = rng.choice((None, None, -2.0, 0.0, "tensor", "tensor"))
    if bias == "tensor":
        bias = problem.bias = _rows_tensor(rng, problem, (problem.query.dtype, torch.float32))
        problem.visible_bias = False
    elif bias is not None:
        problem.const_bias, problem.visible_bias = bias, False
    if not problem.causal and rng.random() < 0.6:
        problem.mask = _a_mask(rng, problem)
        if problem.mask.shape[0] != problem.query.shape[0]:
            problem.mask = problem.mask[:1] if problem.mask.shape[0] else problem.mask

    def call(problem: Dense) -> Tensor:
        return sigswap.sigmoid_attention(
            problem.query, problem.key, problem.value,
            bias=problem.bias if isinstance(bias, Tensor) else bias, attn_mask=problem.mask, is_causal=problem.causal,
            scale=problem.scale, dropout_p=problem.dropout_p, softcap=problem.softcap or None, window=problem.window,
            enable_gqa=True, row_cap=problem.row_cap or None,
        )  # fmt: skip

    return _compared(problem, call, limits)


def _converted(rng: random.Random, limits: Limits) -> float:
    """What a converted model calls: more terms in the bias, the first token, and bands that end at the last key."""
    problem = _drawn(rng, limits)
    problem.bottom_right = rng.random() < 0.5
    problem.visible_bias, problem.const_bias = rng.choice(((True, 0.0), (True, -1.0), (False, -3.0)))
    dtypes = (torch.float32, problem.query.dtype)
    if rng.random() < 0.5:
        problem.bias = _rows_tensor(rng, problem, dtypes)
    if rng.random() < 0.5:
        problem.share = _rows_tensor(rng, problem, dtypes)
        problem.rest = _rows_tensor(rng, problem, dtypes) if rng.random() < 0.5 else None
    if not problem.causal and rng.random() < 0.6:
        problem.mask = _a_mask(rng, problem)

    def call(problem: Dense) -> Tensor:
        first = None if problem.share is None else FirstToken(problem.share, problem.rest)
        return attend(
            problem.query, problem.key, problem.value,
            bias=problem.bias, visible_bias=problem.visible_bias, const_bias=problem.const_bias, attn_mask=problem.mask,
            is_causal=problem.causal, bottom_right=problem.bottom_right, scale=problem.scale,
            dropout_p=problem.dropout_p, softcap=problem.softcap or None, window=problem.window, enable_gqa=True,
            row_cap=problem.row_cap or None, first_token=first,
        )  # fmt: skip

    return _compared(problem, call, limits)


def _packed(rng: random.Random, limits: Limits) -> float:
    """``sigswap.sigmoid_attention_varlen``, sequence by sequence; some are empty."""
    count = rng.choice((1, 1, 2, 3, 5))
    drawn = _drawn(rng, limits, packed=True)
    drawn.bottom_right = rng.random() < 0.5
    bias: Any = rng.choice((None, -2.0, "tensor"))
    ends = [
        sorted(rng.randint(0, total) for _ in range(count - 1)) for total in (drawn.query.shape[2], drawn.key.shape[2])
    ]
    cu_q, cu_k = (
        [0, *each, total] for each, total in zip(ends, (drawn.query.shape[2], drawn.key.shape[2]), strict=True)
    )
    longest_q, longest_k = (max(b - a for a, b in itertools.pairwise(cu)) for cu in (cu_q, cu_k))
    spare = rng.choice((0, 0, 3, 10**9))
    if bias == "tensor":
        shape = rng.choice(((1, 1, 1, 1), (1, 1, drawn.query.shape[2], 1), (1, *drawn.query.shape[1:3], 1)))
        drawn.bias, drawn.visible_bias = torch.randn(shape, device=limits.device), False
    elif bias is not None:
        drawn.const_bias, drawn.visible_bias = bias, False
    lengths = [torch.tensor(cu, dtype=torch.int32, device=limits.device) for cu in (cu_q, cu_k)]

    def call(problem: Dense) -> Tensor:
        out = sigswap.sigmoid_attention_varlen(
            *(x[0].transpose(0, 1) for x in (problem.query, problem.key, problem.value)),
            *lengths, longest_q + spare, longest_k + spare,
            bias=problem.bias[0, :, :, 0].T if problem.bias is not None else bias, is_causal=problem.causal,
            bottom_right=problem.bottom_right, scale=problem.scale, dropout_p=problem.dropout_p,
            softcap=problem.softcap or None, window=problem.window, enable_gqa=True, row_cap=problem.row_cap or None,
        )  # fmt: skip
        return out.transpose(0, 1).unsqueeze(0)

    parts = [
        (slice(a, b), slice(c, d))
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
    ]
    return _compared(drawn, call, limits, parts)


def _scores(rng: random.Random, limits: Limits) -> float:
    """What a softmax over a model's own scores becomes."""
    drawn = _drawn(rng, limits)
    shape = (*drawn.query.shape[:3], drawn.key.shape[2])
    dtype = drawn.query.dtype
    scores = (torch.randn(shape) * rng.choice((1.0, 10.0, 1e3))).to(limits.device, dtype)
    low = rng.choice((-math.inf, torch.finfo(dtype).min, -1e4))
    scores = scores.clamp(min=-4000).masked_fill(
        torch.rand(shape, device=limits.device) < rng.choice((0.0, 0.3, 1.0)), low
    )
    bias = _rows_tensor(rng, drawn, (dtype, torch.float32)) if rng.random() < 0.5 else None
    visible, const = rng.choice(((True, 0.0), (False, -1.0)))
    leaves = {"scores": scores.requires_grad_(), **({} if bias is None else {"bias": bias.requires_grad_()})}
    p = probabilities(scores, bias=bias, visible_bias=visible, const_bias=const, row_cap=drawn.row_cap or None)
    grad = torch.randn(shape).to(p)
    got = dict(zip(leaves, torch.autograd.grad(p, list(leaves.values()), grad), strict=True))
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    seen = exact["scores"] > -5000.0
    row = const - (seen.sum(-1, keepdim=True).clamp(min=1).double().log() if visible else 0.0)
    x = torch.where(seen, exact["scores"], 0.0) + row + (exact["bias"] if bias is not None else 0.0)
    wanted = torch.where(seen, torch.sigmoid(x), 0.0)
    if drawn.row_cap:
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=drawn.row_cap)
    gradients = torch.autograd.grad(wanted, list(exact.values()), grad.double())
    # Relative: of a sigmoid x, times the size of what is summed.
    u = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = 1 + x.detach().abs().clamp(max=100).amax(-1, keepdim=True) if shape[-1] else x.detach().new_zeros(1)
    near = (wanted.detach().abs() if not drawn.row_cap else torch.ones_like(wanted)) * size
    worst = _share("the probabilities", p, Off(wanted.detach(), u * 16 * near).stored(dtype))
    for (name, each), exactly in zip(got.items(), gradients, strict=True):
        most = grad.double().abs().amax(-1, keepdim=True) if shape[-1] else grad.double().new_zeros(1)
        bound = u * 64 * size * most * max(1, shape[-1]) / min(1.0, drawn.row_cap or 1.0)
        off = (
            Off(exactly, bound.expand(shape))
            if name == "scores"
            else Off(exactly, bound.expand(shape).sum_to_size(each.shape))
        )
        worst = max(worst, _share(f"the gradient of {name}", each, off.stored(each.dtype)))
    return worst


# Comparing.


def _compared(
    problem: Dense, call: Callable[[Dense], Tensor], limits: Limits, parts: list[tuple[slice, slice]] | None = None
) -> float:
    """The largest error as a share of its bound. ``parts``: rows and keys of packed sequences."""
    if problem.dropout_p:
        problem.kept = _kept(problem, call, parts)
    names = [
        name
        for name in ("query", "key", "value", "bias", "mask", "share", "rest")
        if (x := getattr(problem, name)) is not None and x.is_floating_point()
    ]
    inputs = [getattr(problem, name).detach().requires_grad_() for name in names]
    _restart()
    out = call(dataclasses.replace(problem, **dict(zip(names, inputs, strict=True))))
    gradients = torch.autograd.grad(out, inputs, problem.grad_out, allow_unused=True)
    rounding = ROUNDINGS[limits.device][problem.query.dtype]
    wanted = results(problem, rounding) if parts is None else _of_parts(problem, parts, rounding)
    worst = _share("the output", out, wanted["output"])
    for name, got, leaf in zip(names, gradients, inputs, strict=True):
        off = wanted.get(name, Off(torch.zeros_like(leaf, dtype=torch.float64), torch.zeros(())))
        worst = max(worst, _share(f"the gradient of {name}", torch.zeros_like(leaf) if got is None else got, off))
    seen = problem.visible() if parts is None else None
    if seen is not None and out.numel():
        assert not out[~seen.any(-1)].any(), "a row that sees no key is not 0"
    return worst


def _of_parts(problem: Dense, parts: list[tuple[slice, slice]], rounding: Rounding) -> dict[str, Off]:
    wanted: dict[str, Off] = {}

    def put(name: str, whole: Tensor, where: slice, off: Off) -> None:
        known = wanted.setdefault(name, Off(*(torch.zeros_like(whole, dtype=torch.float64) for _ in range(2))))
        for target, each in zip(known, off, strict=True):
            target[:, :, where] += each

    for rows, keys in parts:
        bias = problem.bias
        if bias is not None and bias.shape[2] > 1:
            bias = bias[:, :, rows]
        one = dataclasses.replace(
            problem, query=problem.query[:, :, rows], key=problem.key[:, :, keys], value=problem.value[:, :, keys],
            grad_out=problem.grad_out[:, :, rows], bias=bias,
            kept=None if problem.kept is None else problem.kept[:, :, rows, keys],
        )  # fmt: skip
        own = results(one, rounding)
        put("output", problem.grad_out, rows, own["output"])
        put("query", problem.query, rows, own["query"])
        put("key", problem.key, keys, own["key"])
        put("value", problem.value, keys, own["value"])
        if problem.bias is not None:
            whole = slice(None) if problem.bias.shape[2] == 1 else rows
            put("bias", problem.bias, whole, own["bias"])
    return wanted


def _kept(problem: Dense, call: Callable[[Dense], Tensor], parts: list[tuple[slice, slice]] | None) -> Tensor:
    """What dropout keeps, [B, H, M, N]: where the same draw gives anything to the unit vector of a key. In number, what
    it should."""
    batch, kv_heads, keys, _ = problem.value.shape
    floor = ROUNDINGS[problem.query.device.type][problem.query.dtype].floor
    width = max(keys, 8)  # narrower ones are not to be trusted on a GPU (docs/limits.md)
    unit = torch.eye(keys, width, dtype=problem.value.dtype, device=problem.value.device)
    unit = unit.expand(batch, kv_heads, keys, width)
    _restart()
    with torch.no_grad():
        kept = call(dataclasses.replace(problem, value=unit))[..., :keys] != 0
        sure = dataclasses.replace(problem, value=unit, dropout_p=0.0, row_cap=0.0)
        visible = call(sure)[..., :keys] > 10 * max(KEEP_IS_SEEN[problem.query.dtype], floor)
    number, share = int(visible.sum()), 1 - problem.dropout_p
    difference = abs(int((kept & visible).sum()) - share * number)
    assert difference <= 6 * math.sqrt(number * share * (1 - share)) + 3, (
        f"dropout of {problem.dropout_p} keeps {int((kept & visible).sum())} of {number}"
    )
    return kept


def _restart() -> None:
    """The same random numbers for each call."""
    torch.manual_seed(12345)


def _share(what: str, got: Tensor, wanted: Off) -> float:
    """The largest error as a share of twice its bound, which is what the oracle's own rounding may add."""
    value, error = wanted
    assert got.shape == value.shape, f"{what} has the shape {list(got.shape)}, not {list(value.shape)}"
    if got.numel() == 0:
        return 0.0
    most = torch.finfo(got.dtype).max
    over = value.abs() + error >= most  # may have become infinite
    off = (got.double() - value).abs()
    bad = ~over & ~(off <= 2 * error)
    if bad.any():
        at = tuple(int(x) for x in bad.nonzero()[0])
        raise AssertionError(
            f"{what} ({str(got.dtype)[6:]}) at {list(at)} is {got[at].item():.8g}, not {value[at].item():.8g} "
            f"+- {2 * error.expand_as(value)[at].item():.3g}; {int(bad.sum())} of {got.numel()} are off"
        )
    shares = torch.where(over, 0.0, off / (2 * error).clamp(min=1e-300))
    return float(shares.detach().max())
