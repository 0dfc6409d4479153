"""A sample of the models of ``python -m tests.coverage``, checked as they are there; and the checks themselves."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from tests.coverage import page, workers
from tests.coverage.cases import build
from tests.coverage.check import Built, Row, check
from tests.coverage.oracle import attention_calls

ROOT = Path(__file__).parents[2]
SEED = 17
SAMPLE = {"timm": 14, "torchvision": 4, "transformers": 50, "third-party": 24}
ALWAYS = {"timm": 3, "torchvision": 1, "transformers": 10, "third-party": 5}
SLOW_SAMPLE = {"timm": 6, "torchvision": 2, "transformers": 12, "third-party": 8}


def _drawn(numbers: dict[str, int], light: bool) -> list[str]:
    """So many of each kind, of those that are right in docs/coverage.json, the same ones each time."""
    rows = json.loads((ROOT / "docs/coverage.json").read_text())["rows"]
    names: list[str] = []
    for kind, number in numbers.items():
        good = [row for row in rows if page.kind_of(row["name"]) == kind and row["verdict"] == "right"]
        chosen = sorted(row["name"] for row in good if row["light"] is light)
        names += random.Random(SEED).sample(chosen, min(number, len(chosen)))
    return names


def assert_right(name: str) -> None:
    row = check(name, lambda: build(name))
    if row.verdict == "not installed":
        pytest.skip(row.reason)
    assert row.verdict == "right", row.reason


def _light() -> Iterator[Any]:
    """The sample of light models, of which the first ones of each kind are always run."""
    names = _drawn(SAMPLE, light=True)
    for kind, number in ALWAYS.items():
        of_kind = [name for name in names if page.kind_of(name) == kind]
        yield from of_kind[:number]
        yield from (pytest.param(name, marks=pytest.mark.slow) for name in of_kind[number:])


@pytest.mark.parametrize("name", list(_light()))
def test_model(name: str) -> None:
    assert_right(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", _drawn(SLOW_SAMPLE, light=False))
def test_larger_model(name: str) -> None:
    assert_right(name)


def test_the_sample_is_of_all_kinds() -> None:
    names = _drawn(SAMPLE, light=True)
    assert len(names) == len(set(names)) >= 80
    assert {page.kind_of(name) for name in names} == set(SAMPLE)


# The oracle tells attention from other softmaxes by itself, and the check sees what is wrong.


class Attention(nn.Module):
    """[B, N, 16], two heads; ``probabilities`` of the scores, ``products`` of query and key."""

    def __init__(self, probabilities: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.probabilities = nn.Linear(16, 48), probabilities
        nn.init.normal_(self.qkv.weight, std=0.4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return (self.probabilities(q @ k.mT) @ v).transpose(1, 2).flatten(2)


class Others(nn.Module):
    """Softmaxes that are none: of a router, over a weight's rows, of pooling, of features."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.mixed, self.codes = nn.Linear(16, 3), nn.Linear(16, 16), nn.Parameter(torch.randn(40, 16))
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.softmax(self.router(x), -1)
        x = torch.stack([expert(x) for expert in self.experts], -1) @ gate.unsqueeze(-1)
        x = self.mixed(x.squeeze(-1))
        x = x + torch.softmax(x @ self.codes.T, -1) @ self.codes
        pooled = torch.softmax(self.router(x)[..., :1], 1) * x
        features = x.softmax(-1) @ (x.softmax(1).mT @ x)
        return x + pooled + features


class Spellings(nn.Module):
    """By mul and sum, in one fused call, within nn.MultiheadAttention, with mixed heads, with a row shift."""

    def __init__(self) -> None:
        super().__init__()
        self.of_all = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mixed = Attention(lambda s: torch.einsum("bhij,hg->bgij", s, torch.eye(2)).softmax(-1))
        self.shifted = Attention(lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1))
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        k = self.project(x)
        by_hand = (x.unsqueeze(2) * k.unsqueeze(1)).sum(-1).softmax(-1)
        x = x + (by_hand.unsqueeze(-1) * x.unsqueeze(1)).sum(2)
        x = x + F.scaled_dot_product_attention(self.project(x), x, x)
        return self.shifted(self.mixed(self.of_all(x, x, x)[0]))


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


def test_the_oracle_finds_attention_and_nothing_else() -> None:
    others, spellings = Others().eval(), Spellings().eval()
    assert not attention_calls(others, lambda: others(X))
    found = attention_calls(spellings, lambda: spellings(X))
    assert {path for _, path, _ in found.softmaxes} == {"", "of_all", "mixed", "shifted"}
    assert [path for _, path, _ in found.fused] == [""]
    assert [path for _, path, _ in found.shifts] == ["shifted"]


def checked(model: Callable[[], nn.Module]) -> Row:
    factory = {"factory": "tests.coverage.test_coverage:attention"}
    return check("case", lambda: Built(lambda: model().eval(), ((X,), {}), factory=factory))


def attention() -> nn.Module:
    return Attention().eval()


def test_what_is_right_and_what_has_none() -> None:
    row = checked(attention)
    assert (row.verdict, row.attentions) == ("right", 1) and row.error is not None and row.error < 1e-5
    assert checked(Others).verdict == "none"


def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("of its own")

    class Broken(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return fails(x)

    row = checked(Broken)
    assert row.verdict == "does not run" and "KeyError: 'of its own' (test_coverage.py:" in row.reason
    assert checked(lambda: fails(X)).verdict == "not built"  # type: ignore[arg-type, return-value]

    convert = sigswap.convert
    config = sigswap.SigmoidConfig(bias=0.3)
    with monkeypatch.context() as patched:
        patched.setattr(sigswap, "convert", lambda model, **options: convert(model, config, **options))
        row = checked(attention)
    assert row.verdict == "wrong" and "(float64;" in row.reason
    with monkeypatch.context() as patched:
        patched.setattr(sigswap, "convert", lambda model, **options: convert(nn.Identity(), **options))
        assert checked(attention).verdict == "missed"
    with monkeypatch.context() as patched:
        patched.setattr(sigswap, "revert", lambda model: model)
        assert "after revert" in checked(attention).reason
    with monkeypatch.context() as patched:
        patched.setattr("tests.coverage.check.attention_calls", lambda model, run: ())
        assert checked(attention).verdict == "false swap"


def test_rows_are_kept_and_figures_have_their_denominators(tmp_path: Path) -> None:
    verdicts = ["right", "right", "none", "refused", "too slow", "died", "not built", "does not run", "not installed"]
    rows = [Row(f"timm/{index}", verdict, "why") for index, verdict in enumerate(verdicts)]
    results = tmp_path / "rows.jsonl"
    lines = [json.dumps(dataclasses.asdict(row)) for row in [Row("timm/0", "wrong"), *rows]]
    results.write_text("\n".join(lines))
    read = workers.read(results)
    assert list(read.values()) == rows  # the last row of a case counts
    assert page.figures(rows) == {"run": 6, "attention": 5, "right": 2, "none": 1, "bad": 3}
    page.write(rows, [*(row.name for row in rows), "timm/last"], tmp_path)
    text = (tmp_path / "coverage.md").read_text()
    assert "| timm | 10 | 6 | 5 | 2 (40.0%) | 1 | 3 |" in text and "1 of 10 models were not checked yet" in text
    written: dict[str, Any] = json.loads((tmp_path / "coverage.json").read_text())
    assert len(written["rows"]) == len(rows) and written["models"][-1] == "timm/last"
