"""What a distillation gives back: as text, as a picture, as a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from sigswap.errors import ArgumentError
from sigswap.training.distillation_report import DistillationReport

pytest.importorskip("matplotlib")

REPORT = DistillationReport([0.5, 0.25], [3.0, 2.0, 1.5], "12 lookups", "row caps at 1")


def test_it_says_where_the_losses_went() -> None:
    text = str(REPORT)
    assert "layer-wise: 2 steps, loss 0.5 to 0.25" in text and "end to end: 3 steps, loss 3 to 1.5" in text
    assert "12 lookups" in text and "row caps at 1" in text


@pytest.mark.parametrize(("suffix", "starts"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
@pytest.mark.parametrize("report", [REPORT, DistillationReport([], [1.0]), DistillationReport([], [])])
def test_a_picture(report: DistillationReport, suffix: str, starts: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"losses{suffix}"
    report.save(path)
    assert path.read_bytes().startswith(starts)


def test_a_page_has_each_step(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "losses.html")
    page = (tmp_path / "losses.html").read_text()
    assert page.count("<table>") == 2 and page.count("<tr>") == 2 + 5 and "data:image/png" in page
    assert '<td class="number">0.25</td>' in page and "12 lookups" in page


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "losses.txt", tmp_path / "nowhere" / "losses.png"):
        with pytest.raises(ArgumentError, match=path.suffix):
            REPORT.save(path)
    assert not list(tmp_path.iterdir())
