"""Random attention modules, made of the pieces that people use, converted and compared with float64.

A :class:`Model` is told by a specification, plain data that is drawn from a number, so that it can be built again and
saved. Its oracle computes each attention in one canonical form, whatever its spelling, and shares no code with sigswap.
"""

from __future__ import annotations

import copy
import math
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap

DIM = 24
Spec = dict[str, Any]

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "at": lambda q, k: q @ k.mT,
    "einsum": lambda q, k: torch.einsum("bhmd,bhnd->bhmn", q, k),
    "keys first": lambda q, k: (k @ q.mT).mT,
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(*q.shape[:3], k.shape[2]),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda s: F.softmax(s, dim=-1),
    "torch": lambda s: torch.softmax(s, -1),
    "method": lambda s: s.softmax(-1),
    "module": nn.Softmax(dim=-1),
    "dtype": lambda s: F.softmax(s, dim=-1, dtype=torch.float64).to(s.dtype),
    "exp": lambda s: (e := torch.exp(s - s.amax(-1, keepdim=True))) / e.sum(-1, keepdim=True),
    "log": lambda s: s.log_softmax(-1).exp(),
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda p, v: p @ v,
    "einsum": lambda p, v: torch.einsum("bhmn,bhnd->bhmd", p, v),
    "bmm": lambda p, v: torch.bmm(p.flatten(0, 1), v.flatten(0, 1)).view(*p.shape[:3], v.shape[3]),
    "transposed": lambda p, v: (v.mT @ p.mT).mT,
}
MASKS = ("none", "none", "causal", "causal", "padding", "both", "float padding")
FILLS = ("-inf", "finfo", "-1e9", "added", "where")


def drawn(seed: int) -> Spec:
    """What model number ``seed`` is."""
    rng = random.Random(seed)
    blocks = []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice(("fused", "by hand", "by hand", "by hand", "torch"))
        heads = rng.choice((1, 2, 3, 4))
        blocks.append(
            {
                "kind": kind,
                "heads": heads,
                "kv_heads": rng.choice([n for n in (1, 2, 3, 4) if heads % n == 0]) if kind != "torch" else heads,
                "head_dim": rng.choice((3, 4, 8)),
                "projection": rng.choice(("one", "three", "no bias")),
                "grouping": rng.choice(("repeat_interleave", "expand", "enable_gqa" if kind == "fused" else "expand")),
                "qk_norm": rng.random() < 0.15,
                "rotary": rng.random() < 0.2,
                "cross": rng.random() < 0.2,
                "scale": rng.choice(("query", "scores", "divided", "none")),
                "softcap": rng.choice((0.0, 0.0, 0.0, 4.0)) if kind == "by hand" else 0.0,
                "position": rng.choice(("none", "none", "learned", "alibi")) if kind == "by hand" else "none",
                "mask": rng.choice(MASKS),
                "fill": rng.choice(FILLS),
                "product": rng.choice(sorted(PRODUCTS)),
                "softmax": rng.choice(sorted(SOFTMAXES)),
                "sum": rng.choice(sorted(SUMS)),
                "dropout": rng.choice((0.0, 0.1)),
                "after": rng.choice(("none", "none", "none", "head mask", "nan_to_num")),
                "output": rng.choice(("transpose", "permute", "none")),
                "router": rng.random() < 0.3,
            }
        )
    return {"blocks": blocks, "batch_first": rng.random() < 0.8, "length": rng.choice((5, 6, 9)), "seed": seed}


def _rotated(x: Tensor) -> Tensor:
    """Half of the channels of a head, by position."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 0.7 ** torch.arange(half, dtype=x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), rest], -1)


class Attention(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        heads, kv_heads, dim = spec["heads"], spec["kv_heads"], spec["head_dim"]
        bias = spec["projection"] != "no bias"
        self.one = spec["projection"] == "one" and not spec["cross"]
        if self.one:
            self.qkv = nn.Linear(DIM, (heads + 2 * kv_heads) * dim)
        else:
            self.q = nn.Linear(DIM, heads * dim, bias=bias)
            self.k, self.v = (nn.Linear(DIM, kv_heads * dim, bias=bias) for _ in range(2))
        self.out = nn.Linear(heads * dim, DIM)
        self.drop = nn.Dropout(spec["dropout"])
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2)]) if spec["qk_norm"] else None
        if spec["position"] == "learned":
            self.positions = nn.Parameter(torch.randn(heads, 64, 64))
        self.exact: dict[str, Any] | None = None
        """The oracle's terms; None: this is no oracle."""

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        """x [B, M, DIM], context [B, N, DIM], seen: bool [B, N]."""
        spec = self.spec
        query, key, value = self.projected(x, context if spec["cross"] else x)
        if self.exact is not None:
            mixed = self.canonical(query, key, value, seen)
        elif spec["kind"] == "fused":
            mixed = self.fused(query, key, value, seen)
        else:
            mixed = self.by_hand(query, key, value, seen)
        if spec["output"] == "permute":
            return self.out(mixed.permute(0, 2, 1, 3).reshape(*x.shape[:2], -1))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def projected(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        dim, heads, kv_heads = spec["head_dim"], spec["heads"], spec["kv_heads"]
        if self.one:
            q, k, v = self.qkv(x).split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
        else:
            q, k, v = self.q(x), self.k(source), self.v(source)
        q, k, v = (t.view(*t.shape[:2], -1, dim).transpose(1, 2) for t in (q, k, v))
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if spec["rotary"]:
            q, k = _rotated(q), _rotated(k)
        return q, k, v

    def visible(self, rows: int, keys: int, seen: Tensor) -> Tensor | None:
        """bool, broadcasting to [B, H, M, N]; None: all."""
        kind = self.spec["mask"]
        causal = torch.ones(rows, keys, dtype=torch.bool).tril() if kind in ("causal", "both") else None
        padding = seen[:, None, None, :] if kind in ("padding", "both", "float padding") else None
        if causal is None or padding is None:
            return padding if causal is None else causal
        return causal & padding

    def repeated(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        group = self.spec["heads"] // self.spec["kv_heads"]
        if group == 1:
            return key, value
        if self.spec["grouping"] == "repeat_interleave":
            return key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        shape = (*key.shape[:2], group, *key.shape[2:])
        return key[:, :, None].expand(shape).flatten(1, 2), value[:, :, None].expand(shape).flatten(1, 2)

    def scale(self) -> float:
        return 0.5 if self.spec["scale"] == "none" else float(self.spec["head_dim"]) ** -0.5

    def fused(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        spec, is_gqa = self.spec, self.spec["grouping"] == "enable_gqa"
        if not is_gqa:
            key, value = self.repeated(key, value)
        options: dict[str, Any] = {"dropout_p": spec["dropout"] if self.training else 0.0, "enable_gqa": is_gqa}
        if spec["scale"] != "divided":
            options["scale"] = self.scale()
        visible = self.visible(query.shape[2], key.shape[2], seen)
        if spec["mask"] == "causal" and spec["fill"] in ("where", "-inf"):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        if visible is not None and (spec["fill"] in ("added", "finfo") or spec["mask"] == "float padding"):
            low = torch.finfo(query.dtype).min if spec["fill"] == "finfo" else -math.inf
            zeros = torch.zeros(visible.shape, dtype=query.dtype)
            return F.scaled_dot_product_attention(query, key, value, zeros.masked_fill(~visible, low), **options)
        return F.scaled_dot_product_attention(query, key, value, visible, **options)

    def by_hand(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        spec = self.spec
        key, value = self.repeated(key, value)
        if spec["scale"] == "query":
            query = query * self.scale()
        scores = PRODUCTS[spec["product"]](query, key)
        if spec["scale"] == "divided":
            scores = scores / (1 / self.scale())
        elif spec["scale"] != "query":
            scores = scores * self.scale()
        if spec["softcap"]:
            scores = spec["softcap"] * torch.tanh(scores / spec["softcap"])
        scores = self.with_positions(scores)
        scores = self.masked(scores, self.visible(scores.shape[2], scores.shape[3], seen))
        p = SOFTMAXES[spec["softmax"]](scores)
        if spec["after"] == "nan_to_num":
            p = torch.nan_to_num(p)
        p = self.drop(p)
        if spec["after"] == "head mask":
            p = p * self.head_mask(p)
        return SUMS[spec["sum"]](p, value)

    def head_mask(self, p: Tensor) -> Tensor:
        return torch.arange(1, self.spec["heads"] + 1, dtype=p.dtype).view(-1, 1, 1) / 2

    def with_positions(self, scores: Tensor) -> Tensor:
        rows, keys = scores.shape[2:]
        if self.spec["position"] == "learned":
            return scores + self.positions[:, :rows, :keys]
        if self.spec["position"] == "alibi":
            distance = (torch.arange(rows)[:, None] - torch.arange(keys)).abs().to(scores.dtype)
            return scores - distance * 2.0 ** -torch.arange(1, self.spec["heads"] + 1).view(-1, 1, 1)
        return scores

    def masked(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        fill = self.spec["fill"]
        if visible is None:
            return scores
        if fill == "where":
            return torch.where(visible, scores, torch.finfo(scores.dtype).min)
        if fill == "added" or self.spec["mask"] == "float padding":
            return scores + torch.zeros(visible.shape, dtype=scores.dtype).masked_fill(~visible, -1e4)
        low = {"-inf": -math.inf, "finfo": torch.finfo(scores.dtype).min, "-1e9": -1e9}[fill]
        return scores.masked_fill(~visible, low)

    def canonical(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """The definition (docs/design.md)."""
        assert self.exact is not None
        spec, group = self.spec, self.spec["heads"] // self.spec["kv_heads"]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = (query.unsqueeze(3) * key.unsqueeze(2)).sum(-1) * self.scale()
        if spec["softcap"]:
            scores = spec["softcap"] * torch.tanh(scores / spec["softcap"])
        scores = self.with_positions(scores)
        visible = self.visible(scores.shape[2], scores.shape[3], seen)
        visible = torch.ones((), dtype=torch.bool) if visible is None else visible
        visible = visible.expand(scores.shape)
        if self.exact.get("softmax"):
            p = scores.masked_fill(~visible, -1e300).exp() * visible  # of scores that are small
            p = p / p.sum(-1, keepdim=True)
        else:
            p = sigmoids(scores, visible, self.exact)
        if spec["kind"] == "by hand" and spec["after"] == "head mask":
            p = p * self.head_mask(p)
        return p @ value


def sigmoids(scores: Tensor, visible: Tensor, terms: dict[str, Any]) -> Tensor:
    """``terms``: what a conversion adds: ``heads`` [H], ``constant`` and ``row_cap``."""
    count = visible.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    bias = -count.log() if terms.get("constant") is None else torch.full_like(count, terms["constant"])
    p = torch.where(visible, 1 / (1 + torch.exp(-(scores + bias + terms["heads"].view(-1, 1, 1)))), 0.0)
    if terms.get("row_cap"):
        p = p / p.sum(-1, keepdim=True).clamp(min=terms["row_cap"])
    return p


class TorchAttention(nn.Module):
    """PyTorch's own."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.inner = nn.MultiheadAttention(DIM, spec["heads"], dropout=spec["dropout"], batch_first=True)
        self.exact: dict[str, Any] | None = None

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        spec, source = self.spec, context if self.spec["cross"] else x
        hidden = ~seen if spec["mask"] in ("padding", "both", "float padding") else None
        causal = torch.ones(x.shape[1], source.shape[1], dtype=torch.bool).triu(1) if "causal" in spec["mask"] else None
        if self.exact is not None:
            return self.canonical(x, source, hidden, causal)
        needed = spec["product"] == "at"
        out: Tensor = self.inner(x, source, source, hidden, attn_mask=causal, need_weights=needed)[0]
        return out

    def canonical(self, x: Tensor, source: Tensor, hidden: Tensor | None, causal: Tensor | None) -> Tensor:
        assert self.exact is not None
        inner, heads = self.inner, self.spec["heads"]
        weights, biases = inner.in_proj_weight.chunk(3), inner.in_proj_bias.chunk(3)
        q, k, v = (
            (each @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2)
            for each, w, b in zip((x, source, source), weights, biases, strict=True)
        )
        scores = q @ k.mT * q.shape[-1] ** -0.5
        visible = torch.ones(scores.shape, dtype=torch.bool)
        if hidden is not None:
            visible = visible & ~hidden[:, None, None, :]
        if causal is not None:
            visible = visible & ~causal
        if self.exact.get("softmax"):
            p = scores.exp() * visible
            p = p / p.sum(-1, keepdim=True)
        else:
            p = sigmoids(scores, visible, self.exact)
        return inner.out_proj((p @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.attention = TorchAttention(spec) if spec["kind"] == "torch" else Attention(spec)
        self.norm = nn.LayerNorm(DIM)
        self.gate = nn.Linear(DIM, 3) if spec["router"] else None
        self.experts = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(3 if spec["router"] else 1)])

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x), context, seen)
        outputs = [torch.tanh(expert(x)) for expert in self.experts]
        if self.gate is None:
            return x + outputs[0]
        share = self.gate(x).softmax(-1)  # this is no attention
        return x + sum(share[..., i : i + 1] * each for i, each in enumerate(outputs))


class Model(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.blocks = nn.ModuleList([Block(each) for each in spec["blocks"]])

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        if not self.spec["batch_first"]:
            x = x.transpose(0, 1)
        for block in self.blocks:
            x = block(x, context, seen)
        return x if self.spec["batch_first"] else x.transpose(0, 1)


def build(seed: int) -> Model:
    """In float64: what differs from the oracle is then no rounding."""
    torch.manual_seed(seed)
    return Model(drawn(seed)).double().eval()


def inputs(spec: Spec, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sequence the first key is seen."""
    x, context = torch.randn(2, batch, length, DIM, dtype=torch.float64)
    seen = torch.rand(batch, length) > 0.3
    seen[:, 0] = True
    return (x if spec["batch_first"] else x.transpose(0, 1).contiguous()), context, seen


def oracle(model: Model, terms: dict[str, dict[str, Any]]) -> Model:
    """``terms``: of each attention's path."""
    other = copy.deepcopy(model)
    for path, each in terms.items():
        other.get_submodule(path).exact = each
    return other


def attempt(seed: int, folder: Path) -> str | None:
    """What is wrong with the conversion of model number ``seed``; None: nothing."""
    try:
        return _attempt(seed, folder)
    except AssertionError as error:
        return str(error)
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:300]}"


def _attempt(seed: int, folder: Path) -> None:
    rng = random.Random(-seed - 1)
    model = build(seed)
    spec, owners = model.spec, [f"blocks.{index}.attention" for index in range(len(model.blocks))]
    example, other = inputs(spec, 2, spec["length"]), inputs(spec, 3, spec["length"] + 2)
    plain = copy.deepcopy(model)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with torch.no_grad():
        softmax = [plain(*each) for each in (example, other)]
    exact = oracle(plain, {path: {"softmax": True} for path in owners})
    _near("softmax itself", softmax[0], exact(*example))
    fields: dict[str, Any] = {
        "row_cap": rng.choice((None, None, 0.3)),
        "bias": rng.choice(("visible", "visible", -1.5)),
    }
    transposed = any(each["kind"] == "by hand" and each["product"] == "keys first" for each in spec["blocks"])
    fields["query_bias"] = rng.random() < 0.3 and not transposed
    sigswap.convert(model, sigswap.SigmoidConfig(**fields), example_inputs=example)

    found = {site.path for site in sigswap.report(model).sites if site.status == "swapped"}
    assert len(found) == len(owners), f"swapped are {sorted(found)}"
    terms: dict[str, dict[str, Any]] = {}
    for path in owners:
        terms[path] = {
            "row_cap": fields["row_cap"],
            "constant": None if fields["bias"] == "visible" else fields["bias"],
        }
        [name] = [name for name in model.state_dict() if name.startswith(f"{path}.") and _is_head_bias(name)]
        heads = model.get_parameter(name)
        with torch.no_grad():
            heads.copy_(torch.randn(heads.shape))
        terms[path]["heads"] = heads.detach().clone().expand(model.get_submodule(path).spec["heads"])
    exact = oracle(plain, terms)
    for what, each in (("the example", example), ("another length", other)):
        _near(f"the output on {what}", model(*each), exact(*each))
        _gradients(f"on {what}", model, exact, each)

    with torch.no_grad():
        wanted = model(*other)
        for what, copied in (("a deepcopy", copy.deepcopy(model)), ("a pickle", pickle.loads(pickle.dumps(model)))):
            assert torch.equal(copied(*other), wanted), f"{what} computes something else"
        again = sigswap.convert(build(seed), sigswap.SigmoidConfig(**fields), example_inputs=example)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(*other), wanted), "a state_dict gives another model"
        with sigswap.softmax(model):
            assert torch.equal(model(*other), softmax[1]), "sigswap.softmax is not the model that was"
        if seed % 3 == 0:
            shutil.rmtree(folder / "saved", ignore_errors=True)
            sigswap.save(model, folder / "saved", factory=f"{__name__}:build", factory_kwargs={"seed": seed})
            loaded = sigswap.load(folder / "saved", allow_code=True)
            assert torch.equal(loaded(*other), wanted), "what is loaded computes something else"
        model.train()
        assert model(*other).isfinite().all(), "not finite in training"
        model.eval()
        sigswap.revert(model)
        assert torch.equal(model(*other), softmax[1]), "what is reverted is not the model that was"
    assert list(model.state_dict()) == names, "revert leaves other names"
    assert [type(module) for module in model.modules()] == kinds, "revert leaves other classes"


def _is_head_bias(name: str) -> bool:
    return ".sigswap." in name and name.endswith("bias")


def _near(what: str, got: Tensor, wanted: Tensor) -> None:
    error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()
    assert error <= 1e-9, f"{what} is off by {error:.2g}"


def _gradients(what: str, model: Model, exact: Model, example: tuple[Tensor, ...]) -> None:
    results = []
    for each in (model, exact):
        x = example[0].clone().requires_grad_()
        leaves = {"the input": x, **{name: p for name, p in each.named_parameters() if ".sigswap." not in name}}
        out = each(x, *example[1:])
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()), allow_unused=True)
        results.append(dict(zip(leaves, grads, strict=True)))
    for name, wanted in results[1].items():
        got = results[0][name]
        if wanted is None or got is None:
            assert (wanted is None or not wanted.any()) and (got is None or not got.any()), f"{name} has no gradient"
            continue
        size = max(float(wanted.abs().max()), 1e-6)
        assert float((got - wanted).abs().max()) <= 1e-8 * size + 1e-10, f"the gradient of {name} {what} is off"
