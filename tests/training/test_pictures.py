"""Pictures of reports: what is checked before one is drawn, and what is in the file."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console

from sigswap.errors import ArgumentError
from sigswap.training.calibration_report import CalibrationReport, HeadRecord
from sigswap.training.comparison_report import Comparison, LayerMeasure, Measure
from sigswap.training.distillation_report import DistillationReport
from sigswap.training.pictures import save_picture

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("name", ["heads.txt", "heads", "nowhere/heads.png", "nowhere/heads.html"])
def test_what_cannot_be_written_is_not_drawn(name: str, tmp_path: Path) -> None:
    def draw() -> NoReturn:
        raise AssertionError

    with pytest.raises(ArgumentError, match=re.escape(name)):
        save_picture(tmp_path / name, draw, shown="", title="", parts=[])
    assert not list(tmp_path.iterdir())


def test_a_page_holds_the_picture(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for name in ("one.PNG", "one.html"):
        save_picture(str(tmp_path / name), lambda: Figure((1, 1)), shown="a < b", title="One", parts=["below"])
    page = (tmp_path / "one.html").read_text()
    (encoded,) = re.findall(r'alt="a &lt; b" src="data:image/png;base64,([^"]+)"', page)
    picture = (tmp_path / "one.PNG").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64decode(encoded) == picture
    assert page.index("One") < page.index(encoded) < page.index("below")


def labels(axis: Any) -> list[list[str]]:
    """What is written at the two axes."""
    ticks = ([*each.get_major_ticks(), *each.get_minor_ticks()] for each in (axis.xaxis, axis.yaxis))
    return [[text for tick in each if (text := tick.label1.get_text())] for each in ticks]


def test_numbers_at_the_axes_are_plain_and_do_not_touch() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    losses = DistillationReport([], [0.3, 0.2])._figure()
    FigureCanvasAgg(losses).draw()
    assert {"1", "2"} <= set(labels(losses.axes[0])[0]) <= {"0", "1", "2", "3"}  # and no step 1.2

    layers = [LayerMeasure(f"layers.{i}", 0.1, 0.9, 3.0 + i) for i in range(3)]
    compared = Comparison("encoder", 1, [Measure("cosine similarity", "", 1.0, 0.9)], layers=layers)
    figure = compared._figure()
    FigureCanvasAgg(figure).draw()
    sums = labels(figure.axes[1])[1]
    assert {"1", "2", "5"} <= set(sums) and not any("10^" in label or "e" in label for label in sums)

    heads = [HeadRecord("attn", 0, head, 0.1, 1.0, 0.1) for head in range(12)]
    calibrated = CalibrationReport(heads, 1)._figure()
    canvas = FigureCanvasAgg(calibrated)
    canvas.draw()
    boxes = [
        tick.label1.get_window_extent(canvas.get_renderer()) for tick in calibrated.axes[0].xaxis.get_major_ticks()
    ]
    assert all(first.x1 < second.x0 for first, second in itertools.pairwise(boxes))


def test_a_table_of_layers_fits_a_terminal() -> None:
    """Paths of 30 characters are in one line of 80 columns."""
    layers = [LayerMeasure(f"encoder.layer.{i}.attention.self", 0.1, 0.9, 3.0) for i in range(2)]
    compared = Comparison("encoder", 1, [Measure("cosine similarity", "", 1.0, 0.9)], layers=layers)
    stream = io.StringIO()
    Console(file=stream, width=80).print(compared)
    text = stream.getvalue()
    assert "encoder.layer.1.attention.self" in text and "row cap" not in text
    capped = dataclasses.replace(compared, layers=[dataclasses.replace(layers[0], row_cap=0.01), *layers[1:]])
    assert "row cap" in str(capped) and "0.01" in str(capped)
