"""examples/distributed.py in each of its ways: it learns, and what it saves loads in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks

import sigswap

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
STEPS = 6


def example() -> Any:
    spec = importlib.util.spec_from_file_location("distributed_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(parallel: str, out: str) -> list[float]:
    losses: list[float] = example().main(
        ["--parallel", parallel, "--distill", "2", "--steps", str(STEPS), "--out", out]
    )
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "sharded", "tensor", "context"])
def test_it_learns_and_saves(parallel: str, tmp_path: Path) -> None:
    first, second = on_ranks(2, run, parallel, str(tmp_path / "out"))
    assert first == second and len(first) == STEPS
    assert first[-1] < first[0] - 0.3
    model = sigswap.load(tmp_path / "out")
    module = example()
    device = torch.device("cpu")
    [ids] = module.batches(1, 0, device)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < first[0]  # the trained weights, not the first ones
