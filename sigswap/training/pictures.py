"""Writes what a report draws into a file: the picture alone, or a page with the report's tables below it."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigswap import files
from sigswap.errors import ArgumentError
from sigswap.optional import require
from sigswap.page import document
from sigswap.report import path_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def check_picture(path: Path) -> None:
    """Raises unless :func:`save_picture` can write ``path``, which is better known before what is drawn is measured.

    Raises ArgumentError for another suffix than .png, .svg, .pdf and .html, or a directory that is not there, and
    SigswapError if matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf", ".html"):
        raise ArgumentError(f"{path}: the picture's suffix must be .png, .svg, .pdf or .html.", argument="path")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{path} cannot be written: there is no directory {path.parent}.", argument="path")
    require("matplotlib", "plot")


def save_picture(
    path: str | os.PathLike[str], draw: Callable[[], Figure], *, shown: str, title: str, parts: Sequence[Any]
) -> None:
    """Writes the figure that ``draw`` returns into ``path``.

    If that is an .html, a page as of :func:`sigswap.page.document` with ``title``, the figure, which shows what
    ``shown`` says, and ``parts``. Raises as :func:`check_picture`, before anything is drawn.
    """
    path = path_of(path)
    check_picture(path)
    kind, stream = path.suffix.lower().removeprefix("."), io.BytesIO()
    draw().savefig(stream, format="png" if kind == "html" else kind, dpi=150)
    if kind == "html":
        files.write_text(path, document(title, parts, (shown, base64.b64encode(stream.getvalue()).decode())))
    else:
        files.write_bytes(path, stream.getvalue())


def whole_numbers(axis: Axes) -> None:
    """No ticks between the whole numbers of the x axis, which counts steps or modules."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def plain_logarithm(axis: Axes) -> None:
    """Numbers such as 2 and 0.5 on a logarithmic y axis that has its limits, and not 2 x 10^0."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
