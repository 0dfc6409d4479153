"""What a calibration measured, per head, as a table and as a picture; and which sites would better stay softmax."""

from __future__ import annotations

import dataclasses
import io
import os
from typing import TYPE_CHECKING, Any

from sigswap.page import fragment
from sigswap.training.pictures import save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class HeadRecord:
    """One head of the ``site``-th attention of the module ``path``. None: not seen.

    ``unexpressed``: the share of the softmax's probability mass that sigmoid cannot express, between 0 (spread out)
    and 0.5 (one key takes all): the mean over rows of ``sum_j p^2 / (1 + p)``, for sigmoid at minus the row's
    logsumexp gives ``p / (1 + p)``. ``before``, ``after``: the squared error of the head's output relative to the
    squared output of softmax, before and after calibration.
    """

    path: str
    site: int
    head: int
    unexpressed: float | None
    before: float | None
    after: float | None


@dataclasses.dataclass(frozen=True)
class LengthRecord:
    """The rows of the ``site``-th attention of the module ``path`` that see ``least`` to ``most`` keys: how many there
    were, heads apart. After calibration: the squared ``error`` of their outputs relative to the squared outputs of
    softmax, and ``row_sum``, the mean of the sums of their sigmoids (of softmax's probabilities it is 1)."""

    path: str
    site: int
    least: int
    most: int
    rows: int
    error: float
    row_sum: float


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What :func:`sigswap.calibrate` measured on ``batches`` batches. It can be printed, plotted and stored."""

    heads: list[HeadRecord]
    batches: int
    notes: list[str] = dataclasses.field(default_factory=list)
    lengths: list[LengthRecord] = dataclasses.field(default_factory=list)

    def by_length(self) -> str:
        """One line: error and row sum by the number of visible keys, the mean over all attentions; "" if not seen."""
        each: dict[tuple[int, int], list[LengthRecord]] = {}
        for record in self.lengths:
            each.setdefault((record.least, record.most), []).append(record)
        parts = []
        for (least, most), records in sorted(each.items()):
            error = _number(sum(record.error for record in records) / len(records))
            row_sum = _number(sum(record.row_sum for record in records) / len(records))
            parts.append(f"{least}" + (f" to {most}" if most > least else "") + f": {error}, {row_sum}")
        return "Relative error and row sum by visible keys: " + "; ".join(parts) + "." if parts else ""

    def mean(self, field: str) -> float | None:
        """The mean over the heads of "unexpressed", "before" or "after"; None if none was seen."""
        values = [value for head in self.heads if (value := getattr(head, field)) is not None]
        return sum(values) / len(values) if values else None

    def summary(self) -> str:
        """One sentence."""
        before, after, unexpressed = (_number(self.mean(field)) for field in ("before", "after", "unexpressed"))
        return (
            f"{self.batches} batches; mean squared error of a head's output, relative: {before} before, {after} after; "
            f"probability mass that sigmoid cannot express without a row cap: {unexpressed}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draws the heads as heat maps, layers by heads, into a .png, .svg or .pdf, or with the table into an .html.

        Raises ArgumentError for another suffix or a directory that is not there, and SigswapError without matplotlib.
        """
        save_picture(
            path,
            self._figure,
            shown="heat maps, layers by heads",
            title=f"sigswap: calibration on {self.batches} batches",
            parts=[self, self._each_head(), *self._each_length()],
        )

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return fragment(self)

    def __rich__(self) -> Table:
        """One line per site: the mean of its heads, and the worst one."""
        from rich.table import Table

        table = Table(title=f"calibration on {self.batches} batches", title_justify="left")
        table.add_column("path", overflow="fold")
        for column in ("heads", "mass not\nexpressed", "error\nbefore", "error\nafter", "worst\nhead"):
            table.add_column(column, justify="right")
        for (path, _), heads in self._sites().items():
            part = CalibrationReport(heads, self.batches)
            seen = [head for head in heads if head.after is not None]
            worst = max(seen, key=lambda head: head.after or 0.0, default=None)
            table.add_row(
                path or "(the model)",
                str(len(heads)),
                *(_number(part.mean(field)) for field in ("unexpressed", "before", "after")),
                "" if worst is None else f"{worst.head}: {_number(worst.after)}",
            )
        last = "sigswap.compare shows what is left of the whole model."
        lines = [self.summary(), self.by_length(), *self.notes, last]
        table.caption = "\n".join(line for line in lines if line)
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        return _printed(self)

    def _sites(self) -> dict[tuple[str, int], list[HeadRecord]]:
        sites: dict[tuple[str, int], list[HeadRecord]] = {}
        for head in self.heads:
            sites.setdefault((head.path, head.site), []).append(head)
        return sites

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        sites = self._sites()
        width = max((len(heads) for heads in sites.values()), default=1)
        names = [path or "(the model)" for path, _ in sites]
        panels = (("unexpressed", "probability mass\nnot expressed", 0.5), ("before", "relative error\nbefore", 1.0),
                  ("after", "relative error\nafter", 1.0))  # fmt: skip
        figure = Figure(figsize=(3 + 3 * max(1.0, width / 12) * 2, 1.6 + 0.28 * len(sites)), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (field, title, top) in zip(axes, panels, strict=True):
            grid = [[_or_nan(getattr(head, field)) for head in heads] for heads in sites.values()]
            grid = [row + [float("nan")] * (width - len(row)) for row in grid]
            image = axis.imshow(grid, vmin=0.0, vmax=top, cmap="viridis", aspect="auto")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("head")
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_xticks(range(0, width, -(-width // 8)))  # more numbers would run into one another
            figure.colorbar(image, ax=axis, extend="max")
        return figure

    def _each_head(self) -> Table:
        from rich.table import Table

        table = Table(title="heads")
        table.add_column("path")
        for column in ("attention", "head", "mass not expressed", "error before", "error after"):
            table.add_column(column, justify="right")
        for head in self.heads:
            figures = map(_number, (head.unexpressed, head.before, head.after))
            table.add_row(head.path or "(the model)", str(head.site), str(head.head), *figures)
        return table

    def _each_length(self) -> list[Table]:
        """A table, if lengths were seen."""
        from rich.table import Table

        table = Table(title="by the number of visible keys")
        table.add_column("path")
        for column in ("attention", "least keys", "most keys", "rows", "error after", "row sum"):
            table.add_column(column, justify="right")
        for each in self.lengths:
            counts = map(str, (each.site, each.least, each.most, each.rows))
            table.add_row(each.path or "(the model)", *counts, _number(each.error), _number(each.row_sum))
        return [table] if self.lengths else []


@dataclasses.dataclass(frozen=True)
class SiteExclusion:
    """The relative squared error of the model's output if the module ``path`` stays softmax: ``alone``, and
    ``together`` with all that come before it in the ranking."""

    path: str
    alone: float
    together: float


@dataclasses.dataclass(frozen=True)
class SiteRanking:
    """The converted modules by what is gained if they stay softmax, most first, as :func:`sigswap.rank_sites` measured.

    ``error``: with all of them converted.
    """

    error: float
    sites: list[SiteExclusion]

    def exclude(self, count: int) -> list[str]:
        """The first ``count`` module paths, for ``convert(..., exclude=)``."""
        return [site.path for site in self.sites[:count]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return fragment(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title="relative squared error of the model's output", title_justify="left")
        table.add_column("left as softmax", overflow="fold")
        table.add_column("alone", justify="right")
        table.add_column("with those above", justify="right")
        table.add_row("(none)", _number(self.error), _number(self.error))
        for site in self.sites:
            table.add_row(site.path or "(the model)", _number(site.alone), _number(site.together))
        table.caption = "Pass the paths whose gain is worth a softmax to convert as exclude=[...]."
        table.caption_justify = "left"
        return table

    def __str__(self) -> str:
        return _printed(self)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _printed(item: Any) -> str:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=140).print(item)
    return stream.getvalue()
