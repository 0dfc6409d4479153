"""What a comparison of a converted model with its softmax original measured: a table, plain data, a picture."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from typing import TYPE_CHECKING, Any, Literal

from sigswap.errors import ArgumentError
from sigswap.page import fragment
from sigswap.training.pictures import plain_logarithm, save_picture, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

Kind = Literal["language model", "encoder-decoder", "token predictor", "classifier", "encoder"]
"""By what it is measured: a decoder; what gives logits over its vocabulary otherwise (a masked language model, say), or
over classes; and what gives vectors."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of the softmax ``original`` and of the ``converted`` model. ``unit``: "nats", "share" or ""."""

    name: str
    unit: str
    original: float
    converted: float


@dataclasses.dataclass(frozen=True)
class DistanceMeasure:
    """The share of values recalled from ``distance`` tokens back."""

    distance: int
    original: float
    converted: float


@dataclasses.dataclass(frozen=True)
class PositionMeasure:
    """The mean loss, in nats, of ``tokens`` tokens that have ``start`` to below ``end`` tokens before them."""

    start: int
    end: int
    tokens: int
    original: float
    converted: float


@dataclasses.dataclass(frozen=True)
class LayerMeasure:
    """The converted module ``path``. ``error``: the squared difference of its output from that of the original's
    module, relative to that, each in its own model; ``row_sum``, ``largest_row_sum``: the mean and the largest sum of a
    row of its sigmoids, where softmax's is 1, before its ``row_cap``, if it has one. None: not seen in the batches."""

    path: str
    error: float | None
    row_sum: float | None
    largest_row_sum: float | None
    row_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What :func:`sigswap.compare` measured on ``batches`` batches, each figure beside its softmax counterpart."""

    kind: Kind
    batches: int
    measures: list[Measure]
    by_distance: list[DistanceMeasure] = dataclasses.field(default_factory=list)
    by_position: list[PositionMeasure] = dataclasses.field(default_factory=list)
    layers: list[LayerMeasure] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __getitem__(self, name: str) -> Measure:
        """The measure of this name, or whose name starts so. Raises ArgumentError."""
        for measure in self.measures:
            if measure.name == name or measure.name.startswith(f"{name},"):
                return measure
        known = [measure.name for measure in self.measures]
        raise ArgumentError(
            f"{{argument}}={name!r} is no measure of this comparison; they are {known}.", argument="name"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draws recall by distance, loss by position and the layers into a .png, .svg or .pdf, or, with the tables,
        into an .html.

        Raises ArgumentError for another suffix or a directory that is not there, and SigswapError without matplotlib.
        """
        save_picture(
            path,
            self._figure,
            shown="recall by distance, loss by position, layers",
            title=f"sigswap: a converted {self.kind} and its original",
            parts=[self],
        )

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return fragment(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table(title=f"{self.kind}: {self.batches} batches", title_justify="left")
        table.add_column("", overflow="fold")
        for heading in ("original (softmax)", "converted (sigmoid)"):
            table.add_column(heading, justify="right")
        for measure in self.measures:
            label = f"{measure.name}, {measure.unit}" if measure.unit == "nats" else measure.name
            table.add_row(label, *(_written(x, measure.unit) for x in (measure.original, measure.converted)))
        for far in self.by_distance:
            figures = (_written(x, "share") for x in (far.original, far.converted))
            table.add_row(f"recall from {far.distance:,} tokens back", *figures)
        for span in self.by_position:
            label = f"loss with {span.start:,} to {span.end - 1:,} tokens before, nats"
            table.add_row(label, *(_written(x, "nats") for x in (span.original, span.converted)))
        yield table
        if self.layers:
            table = Table(title="layers (softmax: an error of 0, row sums of 1)", title_justify="left")
            table.add_column("path", overflow="fold")
            capped = any(layer.row_cap is not None for layer in self.layers)
            for heading in ("error", "mean\nrow sum", "largest\nrow sum", *(["row cap"] if capped else [])):
                table.add_column(heading, justify="right")
            for layer in self.layers:
                known = (layer.error, layer.row_sum, layer.largest_row_sum, *([layer.row_cap] if capped else []))
                table.add_row(layer.path or "(the model)", *("" if x is None else f"{x:.3g}" for x in known))
            yield table
        yield from self.notes

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=140).print(self)
        return stream.getvalue()

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        panels = []
        if self.by_distance:
            panels.append(self._draw_distances)
        if self.by_position:
            panels.append(self._draw_positions)
        panels += [self._draw_errors, self._draw_row_sums]
        columns = 2 if len(panels) % 2 == 0 else len(panels)  # four beside one another are too small to read on a page
        rows = len(panels) // columns
        figure = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
        for axis, draw in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
            draw(axis)
        return figure

    def _draw_distances(self, axis: Axes) -> None:
        x = [far.distance for far in self.by_distance]
        axis.plot(x, [far.original for far in self.by_distance], "o-", label="softmax")
        axis.plot(x, [far.converted for far in self.by_distance], "o--", label="sigmoid")
        axis.set(ylim=(-0.03, 1.03), xlabel="tokens back", ylabel="share recalled")
        axis.set_xscale("log", base=2)
        axis.set_title("recall by distance")
        axis.legend()

    def _draw_positions(self, axis: Axes) -> None:
        edges = [span.start for span in self.by_position] + [self.by_position[-1].end]
        axis.stairs([span.original for span in self.by_position], edges, baseline=None, label="softmax")
        axis.stairs(
            [span.converted for span in self.by_position], edges, baseline=None, label="sigmoid", linestyle="--"
        )
        axis.set(xlabel="tokens before", ylabel="loss, nats")
        axis.set_xscale("symlog", base=2, linthresh=16)
        axis.set_title("loss by position")
        axis.legend()

    def _draw_errors(self, axis: Axes) -> None:
        axis.bar(range(len(self.layers)), [_or_nan(layer.error) for layer in self.layers])
        axis.set(xlabel="converted module", ylabel="squared error of its output, relative")
        whole_numbers(axis)
        axis.set_title("error by layer (softmax: 0)")

    def _draw_row_sums(self, axis: Axes) -> None:
        x = range(len(self.layers))
        axis.plot(x, [_or_nan(layer.row_sum) for layer in self.layers], "o", label="mean")
        axis.plot(x, [_or_nan(layer.largest_row_sum) for layer in self.layers], "^", label="largest")
        axis.axhline(1.0, color="grey", linewidth=1, label="softmax")
        axis.set(yscale="log", xlabel="converted module", ylabel="sum of a row")
        whole_numbers(axis)
        plain_logarithm(axis)
        axis.set_title("row sums by layer")
        axis.legend()


def _written(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:.2g}" if 0.0 < abs(value) < 0.01 else f"{value:.3f}"


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
