"""The suite generation of ``sigswap bench``: its cells, figures, what a timed call decodes, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sigswap.bench import generation, timing, versions
from sigswap.bench.cells import DEFAULT_SUITES, GenerationCell, cells
from sigswap.bench.peers import peers_of
from sigswap.bench.results import Benchmark, Row
from sigswap.commands.cli import app

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SMALL = GenerationCell(2, 64, small=True)


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "TOKENS", 3)
    monkeypatch.setattr(generation, "ROUNDS", 2)


def test_cells() -> None:
    assert "generation" not in DEFAULT_SUITES
    assert [cell.label for cell in cells("generation")] == [
        "Llama-1B 1 x 2048",
        "Llama-1B 1 x 16384",
        "Llama-1B 32 x 2048",
        "Llama-1B 32 x 16384",
    ]
    assert cells("generation", quick=True) == [SMALL] and SMALL.label == "tiny Llama-1B 2 x 64"
    assert [peer.name for peer in peers_of("generation")] == ["fa2", "cudnn", "efficient", "sdpa", "flex"]


def test_figures() -> None:
    row = Row(GenerationCell(32, 2048), "bf16", "decode", {"sigswap": 4.0, "cudnn": 8.0}, {"fa2": "no"})
    assert row.unit == "tokens/s" and row.value("sigswap") == 8000.0 and row.value("cudnn") == 4000.0
    assert row.ratio("cudnn") == 2.0 and row.best_other == "cudnn" and row.value("fa2") is None
    result = Benchmark({"gpu": "A GPU"}, "bf16", None, [row])
    (found,) = json.loads(json.dumps(result.to_dict()))["rows"]
    assert found["cell"] == {"batch": 32, "context": 2048, "small": False, "without": []}
    assert found["results"]["cudnn"] == {"value": 4000.0, "milliseconds": 8.0, "ratio": 2.0}
    stream = io.StringIO()
    Console(file=stream, width=160).print(result)
    line = next(line for line in stream.getvalue().splitlines() if "tokens/s" in line)
    parts = [part.strip() for part in line.strip("│").split("│")]
    assert parts == ["Llama-1B 32 x 2048", "decode", "tokens/s", "8000", "cudnn 2.00x", "4000 (2.00x)"]
    pytest.importorskip("matplotlib")
    assert [axes.get_ylabel() for axes in result.figure().axes] == ["tokens/s"]


def test_a_call_decodes_what_the_model_does_without_a_cache(few_tokens: None) -> None:
    pytest.importorskip("transformers")
    subject = generation.build(SMALL, torch.float32, "cpu")
    model, cache = subject.model, subject.inputs["past_key_values"]
    tokens = torch.randint(128, (SMALL.batch, SMALL.context - 3))
    for layer in cache.layers:
        layer.cumulative_length.zero_()
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        for _ in range(2):  # the second time it begins at the same token again
            found = generation.decode(subject, model)
        seen = torch.cat((tokens, subject.inputs["input_ids"]), 1)
        for at in range(3):
            likeliest = model(seen, use_cache=False).logits[:, -1:].argmax(-1)
            assert torch.equal(found[:, at : at + 1], likeliest)
            seen = torch.cat((seen, likeliest), 1)


@without_gpu
def test_it_is_measured_on_a_cpu(few_tokens: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    marks: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    (row,) = generation.measure(SMALL, "fp32", ["fa2", "sdpa", "flex"], ["flex"], device="cpu", inner="eager")
    assert set(row.measured) == {"sigswap", "sdpa"} and min(row.measured.values()) > 0 and row.phase == "decode"
    assert "takes no mask tensor" in row.reasons["fa2"] and "--peers runs it" in row.reasons["flex"]
    calls = 1 + 3 * (1 + 2 * (1 + timing.LONG_CALLS))  # the checked step; 3 tokens, once and in each round
    assert len(marks) == 2 * calls  # with CUDA graphs, though the mode was not given
    assert not Benchmark({}, "fp32", None, [row]).failures


@without_gpu
def test_a_wrong_model_gets_no_figure(few_tokens: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")

    def wrong(model: torch.nn.Module, **_: object) -> None:
        """Computes something else when it is compiled."""
        model.lm_head.register_forward_hook(lambda _, __, out: 2 * out if torch.compiler.is_compiling() else out)  # type: ignore

    monkeypatch.setattr(versions, "convert", wrong)
    (row,) = generation.measure(SMALL, "fp32", [], device="cpu", inner="eager")
    assert not row.measured and "relative error of the compiled model's output is" in row.reasons["sigswap"]
    assert Benchmark({}, "fp32", None, [row]).failures


def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (row,) = generation.measure(SMALL, "fp32", ["sdpa"], device="cpu")
    assert not row.measured and "needs the package 'transformers'" in row.reasons["sigswap"]
    assert not Benchmark({}, "fp32", None, [row]).failures


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_quick_run(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = CliRunner().invoke(app, ["bench", "--quick", "--suite", "generation", "--json", str(file)])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(file.read_text())["rows"]
    assert row["unit"] == "tokens/s" and row["results"]["sigswap"]["value"] > 0
    assert row["best_other"] is not None
