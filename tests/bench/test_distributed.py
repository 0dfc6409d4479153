"""``sigswap bench --suite distributed``, by two processes without GPUs, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from typer.testing import CliRunner

from sigswap.bench.distributed import run as bench
from sigswap.bench.distributed.cells import cells
from sigswap.bench.distributed.cost import fsdp_bytes, tensor_bytes
from sigswap.bench.distributed.overlap import Overlap
from sigswap.bench.distributed.results import DistributedBenchmark, Figures, Row
from sigswap.bench.distributed.subjects import _compare
from sigswap.commands.cli import app
from sigswap.errors import ArgumentError, BenchmarkError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def measured() -> tuple[dict[str, Any], list[str], str]:
    told: list[str] = []
    result = bench.run(dtype="fp32", quick=True, tell=told.append)
    rank = torch.distributed.get_rank()
    with pytest.MonkeyPatch.context() as patch:  # no kernels here
        patch.setattr(bench, "profiled", lambda step, trace: Overlap(4.0, 2.0, 2.0 * rank, 0.0))
        seen = bench._overlap(lambda: None, init_device_mesh("cpu", (2,)), Path("trace.json"))
    assert seen == Overlap(computing=4.0, communicating=2.0, exposed=1.0, idle=0.0)  # the mean
    console = Console(file=io.StringIO(), width=100)
    console.print(result)
    return result.to_dict(), told, console.file.getvalue()  # type: ignore[attr-defined]


@without_gpu
@pytest.mark.slow
def test_two_ranks() -> None:
    pytest.importorskip("transformers")
    (first, told, text), (second, other_told, _) = on_ranks(2, measured)
    assert len(told) == 6 and other_told == []
    assert "softmax ring" in told[-1] and told[-1].count(" ms") == 3
    assert json.loads(json.dumps(first)) == first and first["ranks"] == 2
    names = [set(row["results"]) for row in first["rows"]]
    assert names == [{"sigswap", "sdpa"}, {"sigswap", "sdpa"}, {"sigswap ring", "sigswap all_to_all", "softmax ring"}]
    for row, other in zip(first["rows"], second["rows"], strict=True):
        for name, figures in row["results"].items():
            assert "reason" not in figures, figures
            assert figures["milliseconds"] > 0 and figures["sent_bytes"] > 0 and 0 <= figures["exposed"] <= 1
            assert figures == other["results"][name]  # the slowest rank's, on all
    data, tensor, context = first["rows"]
    assert data["results"]["sigswap"]["scaling"] > 0 and tensor["results"]["sigswap"]["scaling"] is None
    sent = {name: figures["sent_bytes"] for name, figures in context["results"].items()}
    assert sent["sigswap all_to_all"] < sent["sigswap ring"] < sent["softmax ring"]
    llama = cells(quick=True)[0]
    hidden, kv = llama.heads * llama.head_dim, llama.kv_heads * llama.head_dim
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * llama.intermediate + 2 * hidden
    root = (2 * llama.vocabulary + 1) * hidden
    assert data["results"]["sdpa"]["sent_bytes"] == fsdp_bytes(2 * layer, root, 2, 4).both
    assert tensor["results"]["sdpa"]["sent_bytes"] == tensor_bytes(64, hidden, 2, 2, 4).both
    for label in ("data: Llama x2", "tensor: Llama x2", "context: attention 64 tokens", "softmax ring"):
        assert label in text


def test_cells() -> None:
    for quick in (True, False):
        assert {cell.parallel for cell in cells(quick)} == {"data", "tensor", "context"}
    lengths = [cell.length for cell in cells(quick=False) if cell.parallel == "context"]
    assert lengths == [32768, 32768, 131072]
    data, tensor, *_ = cells(quick=False)
    assert data.tokens(2) == 2 * 8192 and tensor.tokens(2) == 8192


def test_figures() -> None:
    cell = cells(quick=True)[2]
    ours, best, other = (Figures(ms, 2**20, None, 0.1, None) for ms in (8.0, 10.0, 12.0))
    row = Row(cell, {"sigswap": ours, "fa2": best, "cudnn": other}, {"sigswap all_to_all": "no"})
    assert row.softmax == "fa2" and row.of_softmax("sigswap") == 0.8
    result = DistributedBenchmark({"device": "X"}, 2, "bf16", [row])
    assert result.failures == [f"context {cell.label}: sigswap all_to_all: no"]
    found = result.to_dict()["rows"][0]["results"]
    assert found["sigswap"]["tokens_per_s"] == 64 / 8e-3 and found["sigswap all_to_all"] == {"reason": "no"}
    assert dataclasses.replace(row, figures={"sigswap": ours}).of_softmax("sigswap") is None


def test_figures_of_a_profile() -> None:
    seen = Overlap(computing=6.0, communicating=3.0, exposed=1.0, idle=1.0)
    row = Row(cells(quick=True)[2], {"sigswap ring": Figures(8.0, 2**20, None, 0.1, None, seen)}, {})
    result = DistributedBenchmark({"device": "X"}, 2, "bf16", [row])
    console = Console(file=io.StringIO(), width=100)
    console.print(result)
    line = console.file.getvalue().split("profiled, ms")[1]  # type: ignore[attr-defined]
    assert [text in line for text in ("6.00", "3.00", "1.00", "12%")] == [True] * 4
    assert result.to_dict()["rows"][0]["results"]["sigswap ring"]["overlap"]["exposed"] == 1.0


def test_a_wrong_result_has_no_figure() -> None:
    right = torch.ones(8, dtype=torch.float64)
    _compare("output", 1.01 * right, right)
    with pytest.raises(BenchmarkError, match="the output is wrong"):
        _compare("output", 1.1 * right, right)


@without_gpu
def test_what_it_refuses() -> None:
    with pytest.raises(BenchmarkError, match="torchrun"):
        bench.run(quick=True)
    with pytest.raises(ArgumentError, match="dtype"):
        bench.run(dtype="int8")
    with pytest.raises(ArgumentError, match="no cell"):
        bench.run(labels=["pipeline*"])
    with pytest.raises(ArgumentError, match="no directory nowhere"):
        bench.run(quick=True, profile=Path("nowhere"))
    answer = CliRunner().invoke(app, ["bench", "--suite", "distributed", "--peers", "fa2"])
    assert answer.exit_code == 2 and "--peers" in answer.output
    answer = CliRunner().invoke(app, ["bench", "--suite", "train", "--profile", "."])
    assert answer.exit_code == 2 and "--profile" in answer.output
    answer = CliRunner().invoke(app, ["bench", "--suite", "distributed", "--suite", "train"])
    assert answer.exit_code == 2 and "--suite" in answer.output
