"""Reports as pages of one file, and in notebooks."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sigswap
from sigswap.compiling.explain import CompiledSite
from sigswap.errors import ArgumentError
from sigswap.training.calibration_report import LengthRecord, SiteExclusion

EVIL = "layers.0.<script>alert(1)</script>"
SITES = [
    sigswap.SiteRecord(f"encoder.{index}.attn", "softmax", 2, 8, "none", "swapped" if index else "left", "a & b")
    for index in range(3)
]
REPORT = sigswap.Report([*SITES, sigswap.SiteRecord(EVIL, "sdpa", None, None, "causal", "swapped")], ["A note."])
HEADS = [sigswap.HeadRecord("attn", 0, head, 0.1, 0.5, None if head else 0.25) for head in range(2)]
CALIBRATION = sigswap.CalibrationReport(HEADS, 3, ["Noted."], [LengthRecord("attn", 0, 1, 8, 90, 0.125, 0.75)])


class Parsed(HTMLParser):
    """Rows of the cells' text, by table; and what is asked of the network."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.asked: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.asked += [value for name, value in attrs if name in ("src", "href") and value and value[:5] != "data:"]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def test_a_reports_page(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Parsed(text)
    assert page.asked == [] and "@import" not in text and "url(" not in text
    folded, each = page.tables
    assert [row[0] for row in each[1:]] == [site.path for site in REPORT.sites]
    assert folded[2] == ["encoder.{1..2}.attn (2x)", "softmax", "2", "8", "none", "swapped", "a & b"]
    assert EVIL in [row[0] for row in each] and EVIL not in text
    assert "A note." in text and 'querySelectorAll("table")' in text
    assert re.findall("aria-sort", text)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"\.html"):
        REPORT.save(tmp_path / "report.png")
    with pytest.raises(ArgumentError, match="no directory"):
        REPORT.save(tmp_path / "missing" / "report.html")
    with pytest.raises(ArgumentError, match="path must be the path of a file, not a NoneType"):
        REPORT.save(None)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_calibrations_page_has_heads_lengths_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    CALIBRATION.save(tmp_path / "heads.html")
    text = (tmp_path / "heads.html").read_text(encoding="utf-8")
    page = Parsed(text)
    sites, heads, lengths = page.tables
    assert sites[1][:2] == ["attn", "2"]
    assert heads[1:] == [["attn", "0", "0", "0.1", "0.5", "0.25"], ["attn", "0", "1", "0.1", "0.5", ""]]
    assert lengths[1] == ["attn", "0", "1", "8", "90", "0.125", "0.75"]
    assert page.asked == [] and "data:image/png;base64," in text and "Noted." in text


def test_notebooks_show_tables() -> None:
    reports = {
        "softmax sites: 3 swapped, 1 left": REPORT,
        "calibration on 3 batches": CALIBRATION,
        "compiled attention: 1 lowered, in 1 graph": sigswap.CompileReport([CompiledSite("a", "lowered", "x")], 1),
        "relative squared error of the model's output": sigswap.SiteRanking(0.5, [SiteExclusion("a", 0.1, 0.2)]),
        "decoder: 2 batches": sigswap.Comparison("decoder", 2, [sigswap.Measure("loss", "nats", 1.0, 2.0)], []),
    }
    for title, report in reports.items():
        shown = report._repr_html_()
        assert f"<caption>{title.replace(chr(39), '&#x27;')}</caption>" in shown
        assert Parsed(shown).tables and "<script" not in shown
