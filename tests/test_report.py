"""The report: plain data, and a table that a person can read for a model with many layers."""

from __future__ import annotations

import json

import sigswap
from sigswap import Report, SiteRecord


def site(path: str, status: str = "swapped", reason: str = "", heads: int | None = 4) -> SiteRecord:
    return SiteRecord(path, "sdpa", heads, 8, "causal", status, reason)


def test_is_plain_data() -> None:
    report = Report([site("a"), site("b", "left", "excluded", None)], ["a note"])
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert (report.count("swapped"), report.count("left"), report.count("swappable")) == (1, 1, 0)


def test_folds_layers_that_are_alike() -> None:
    report = Report([site(f"encoder.layers.{i}.attn") for i in range(12)])
    text = str(report)
    assert "12 swapped" in text
    assert "encoder.layers.{0..11}.attn (12x)" in text
    assert text.count("sdpa") == 1


def test_folds_several_numbers_and_gaps() -> None:
    report = Report([site(f"stages.{s}.blocks.{b}.attn") for s in (0, 2) for b in range(2)])
    assert "stages.{0,2}.blocks.{0..1}.attn (4x)" in str(report)


def test_does_not_fold_what_differs() -> None:
    report = Report([site("layers.0.attn"), site("layers.1.attn", heads=2), site("layers.2.attn", "left", "excluded")])
    text = str(report)
    assert all(f"layers.{i}.attn" in text for i in range(3))
    assert "excluded" in text and "(2x)" not in text


def test_names_the_root_and_shows_notes() -> None:
    text = str(Report([site("")], ["looked at twice"]))
    assert "(the model)" in text and "looked at twice" in text
    assert "none" in str(Report([]))
    assert sigswap.Report is Report
