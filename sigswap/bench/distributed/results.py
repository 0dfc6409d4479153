"""What the suite distributed has measured, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sigswap.bench.distributed.cells import Cell
from sigswap.bench.distributed.overlap import Overlap

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of a step, forward and backward.

    Attributes:
        milliseconds: Of the slowest rank.
        sent_bytes: By a rank to other ones, the mean over the ranks.
        peak_bytes: Allocated at one time beyond what was before the step, on the rank where that is most; None without
            a GPU.
        exposed: The part of the time that is not there without communication, from 0 to 1.
        scaling: Tokens per second, over those of one process by itself; None where that is not measured.
        overlap: What was seen under the profiler, the mean over the ranks; None if it was not asked for.
    """

    milliseconds: float
    sent_bytes: float
    peak_bytes: float | None
    exposed: float
    scaling: float | None
    overlap: Overlap | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell's figures by the way of computing attention, and the reasons of those that have none."""

    cell: Cell
    figures: dict[str, Figures]
    reasons: dict[str, str]

    @property
    def softmax(self) -> str | None:
        """The fastest of softmax attention; None: none ran."""
        others = [name for name in self.figures if not name.startswith("sigswap")]
        return min(others, key=lambda name: self.figures[name].milliseconds, default=None)

    @property
    def summary(self) -> str:
        """One line, for a run that may not come to its end."""
        measured = [f"{name} {found.milliseconds:.2f} ms" for name, found in self.figures.items()]
        return ", ".join([*measured, *(f"{name}: {reason[:200]}" for name, reason in self.reasons.items())])

    def of_softmax(self, name: str) -> float | None:
        """The time as a part of softmax attention's: below 1, it takes less."""
        if self.softmax is None:
            return None
        return self.figures[name].milliseconds / self.figures[self.softmax].milliseconds


@dataclasses.dataclass(frozen=True)
class DistributedBenchmark:
    """The same on all ranks, but for ``is_first``. It can be printed with rich, and turned into JSON."""

    machine: dict[str, str]
    ranks: int
    dtype: str
    rows: list[Row]
    is_first: bool = True

    @property
    def failures(self) -> list[str]:
        """Where sigswap itself raised or was wrong, and why."""
        return [
            f"{row.cell.parallel} {row.cell.label}: {name}: {reason}"
            for row in self.rows
            for name, reason in row.reasons.items()
            if name.startswith("sigswap")
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {
            "machine": self.machine,
            "ranks": self.ranks,
            "dtype": self.dtype,
            "rows": [
                {
                    "cell": dataclasses.asdict(row.cell),
                    "label": row.cell.label,
                    "softmax": row.softmax,
                    "results": {
                        **{
                            name: {
                                **dataclasses.asdict(found),
                                "tokens_per_s": self._tokens_per_s(row, name),
                                "of_softmax": row.of_softmax(name),
                            }
                            for name, found in row.figures.items()
                        },
                        **{name: {"reason": reason} for name, reason in row.reasons.items()},
                    },
                }
                for row in self.rows
            ],
        }

    def _tokens_per_s(self, row: Row, name: str) -> float:
        return 1e3 * row.cell.tokens(self.ranks) / row.figures[name].milliseconds

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        machine = ", ".join(text if name == "device" else f"{name} {text}" for name, text in self.machine.items())
        yield f"distributed, {self.ranks} ranks, {self.dtype}: {machine}"
        for row in self.rows:
            title = f"{row.cell.parallel}: {row.cell.label}"
            table = Table("attention", title=title, title_justify="left")
            for heading in ("ms", "tokens/s", "of softmax", "sent MiB", "exposed", "peak MiB", "scaling"):
                table.add_column(heading, justify="right", no_wrap=True)
            for name, found in row.figures.items():
                ratio = row.of_softmax(name)
                table.add_row(
                    name,
                    f"{found.milliseconds:.2f}",
                    f"{self._tokens_per_s(row, name):,.0f}",
                    "-" if ratio is None else f"{ratio:.2f}",
                    f"{found.sent_bytes / 2**20:.2f}",
                    f"{found.exposed:.0%}",
                    "-" if found.peak_bytes is None else f"{found.peak_bytes / 2**20:,.0f}",
                    "-" if found.scaling is None else f"{found.scaling:.2f}",
                )
            for name in row.reasons:
                table.add_row(name, *["-"] * 7)
            yield table
            seen = {name: found.overlap for name, found in row.figures.items() if found.overlap is not None}
            if seen:
                yield _profile(seen)
        yield (
            "of softmax: the time as a part of the fastest softmax attention's. sent: by a rank, per step. exposed: "
            "the part of the time that communication adds. peak: beyond what is there before the step. scaling: "
            "tokens per second over one process's. -: not measured; --json FILE says why."
        )


def _profile(seen: Mapping[str, Overlap]) -> Table:
    from rich.table import Table

    table = Table("profiled, ms", title_justify="left")
    for heading in ("computing", "NCCL", "NCCL alone", "idle", "NCCL alone, of the step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, each in seen.items():
        times = (each.computing, each.communicating, each.exposed, each.idle)
        table.add_row(name, *(f"{value:.2f}" for value in times), f"{each.share:.0%}")
    return table
