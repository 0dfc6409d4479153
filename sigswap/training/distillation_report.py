"""What a distillation gives back: its losses by step, as a line, a picture or a page."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from sigswap.training.pictures import save_picture, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class DistillationReport:
    """Losses by step. ``layerwise``: the mean over the modules of the relative squared error of their outputs;
    ``end_to_end``: the loss of the model's output, without that of the modules' own. ``lookups``: which sequences
    that need looking back were mixed in, and how many; or why none. ``row_cap``: where the row caps stand."""

    layerwise: list[float]
    end_to_end: list[float]
    lookups: str = ""
    row_cap: str = ""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draws the losses by step into a .png, .svg or .pdf, or, with all of them in a table, into an .html.

        Raises ArgumentError for another suffix or a directory that is not there, and SigswapError without matplotlib.
        """
        save_picture(
            path,
            self._figure,
            shown="losses by step",
            title="sigswap: distillation",
            parts=[str(self), *(self._table(name, losses) for name, losses in self._stages())],
        )

    def __str__(self) -> str:
        parts = [
            f"{name}: {len(losses)} steps, loss {losses[0]:.4g} to {losses[-1]:.4g}" for name, losses in self._stages()
        ]
        return "; ".join(
            [*parts, *filter(None, (self.lookups, self.row_cap)), "sigswap.compare shows what the loss does not"]
        )

    def _stages(self) -> list[tuple[str, list[float]]]:
        """Those that had steps."""
        stages = (("layer-wise", self.layerwise), ("end to end", self.end_to_end))
        return [(name, losses) for name, losses in stages if losses]

    def _figure(self) -> Figure:
        from matplotlib.figure import Figure

        stages = self._stages()
        figure = Figure(figsize=(2 + 4 * max(1, len(stages)), 3.5), layout="constrained")
        axes = figure.subplots(1, max(1, len(stages)), squeeze=False)[0]
        for axis, (name, losses) in zip(axes, stages, strict=False):
            axis.plot(range(1, len(losses) + 1), losses, marker="." if len(losses) < 20 else None)
            axis.set(title=name, xlabel="step", ylabel="loss", ylim=(0.0, None))
            whole_numbers(axis)
        return figure

    @staticmethod
    def _table(name: str, losses: list[float]) -> Table:
        from rich.table import Table

        table = Table(title=name)
        for column in ("step", "loss"):
            table.add_column(column, justify="right")
        for step, loss in enumerate(losses, 1):
            table.add_row(str(step), f"{loss:.4g}")
        return table
