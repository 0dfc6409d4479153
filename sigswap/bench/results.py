"""What ``sigswap bench`` has measured, as tables, a picture and JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigswap.bench.cells import DTYPES, Cell, GenerationCell, ModelCell
from sigswap.bench.peers import peer_names, peers_of
from sigswap.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One phase of one cell.

    ``measured``: by implementation ("sigswap" or a peer): milliseconds (in the suite generation: of a step, in which
    each sequence gets a token); in the suite host microseconds; in the phase memory MiB. ``reasons``: why an
    implementation was not measured. In the suite models ``quantity`` says what was measured ("time", "memory" in MiB or
    "kernels", their number), and ``original`` which peer counts as the model without sigswap. ``unavailable``: this
    machine lacks what the row needs, so nothing is measured, and nothing failed.
    """

    cell: Cell | ModelCell | GenerationCell
    dtype: str
    phase: str
    measured: dict[str, float]
    reasons: dict[str, str]
    quantity: str = "time"
    original: str | None = None
    unavailable: bool = False

    @property
    def unit(self) -> str:
        """Of :meth:`value`: "TFLOP/s", "GB/s" (of key and value), "us" (per call), "ms", "MiB", "kernels" or
        "tokens/s" (of all sequences)."""
        if isinstance(self.cell, GenerationCell):
            return "tokens/s"
        if isinstance(self.cell, ModelCell):
            return {"time": "ms", "memory": "MiB", "kernels": "kernels"}[self.quantity]
        if self.phase == "memory":
            return "MiB"
        return {"host": "us", "decode": "GB/s", "features": "ms"}.get(self.cell.suite, "TFLOP/s")

    def value(self, name: str) -> float | None:
        """The implementation's figure, in :attr:`unit`; None if it was not measured."""
        measured = self.measured.get(name)
        if measured is None or isinstance(self.cell, ModelCell) or self.unit in ("MiB", "us", "ms"):
            return measured
        if isinstance(self.cell, GenerationCell):
            return 1e3 * self.cell.batch / measured
        if self.unit == "GB/s":
            return self.cell.kv_bytes(DTYPES[self.dtype]) / measured / 1e6
        flops = self.cell.backward_flops if self.phase == "backward" else self.cell.forward_flops
        return flops / measured / 1e9

    def ratio(self, peer: str) -> float | None:
        """How many times as much time or memory as sigswap the peer takes: above 1, sigswap is better."""
        if peer not in self.measured or "sigswap" not in self.measured:
            return None
        return self.measured[peer] / self.measured["sigswap"]

    @property
    def best_other(self) -> str | None:
        """The peer with the least time, memory or kernels; None if no peer was measured."""
        others = [name for name in self.measured if name != "sigswap"]
        return min(others, key=self.measured.__getitem__, default=None)

    @property
    def of_original(self) -> float | None:
        """sigswap's time, memory or kernels as a part of the original's: below 1, sigswap is better."""
        if self.original not in self.measured or "sigswap" not in self.measured:
            return None
        return self.measured["sigswap"] / self.measured[self.original]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What :func:`sigswap.bench.run.run` has measured. It can be printed with rich, plotted, and turned into JSON.

    ``copy_gb_per_s``: bytes read and written per second by a large copy on the device; None without decode.
    ``stopped``: the error that ended the run early, or None.
    """

    machine: dict[str, str]
    dtype: str
    copy_gb_per_s: float | None
    rows: list[Row]
    stopped: str | None = None

    @property
    def failures(self) -> list[str]:
        """Where sigswap itself raised or was wrong, and why."""
        failed = [row for row in self.rows if "sigswap" in row.reasons and not row.unavailable]
        found = dict.fromkeys(f"{row.cell.suite} {row.cell.label}: {row.reasons['sigswap']}" for row in failed)
        return [*found, *([] if self.stopped is None else [self.stopped])]

    def share_of_copy(self, row: Row, name: str) -> float | None:
        """A decoding row's GB/s as a part of the copy's; None for other rows."""
        value = row.value(name)
        if row.unit != "GB/s" or value is None or self.copy_gb_per_s is None:
            return None
        return value / self.copy_gb_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return {
            "machine": self.machine,
            "dtype": self.dtype,
            "copy_gb_per_s": self.copy_gb_per_s,
            "stopped": self.stopped,
            "rows": [
                {
                    "suite": row.cell.suite,
                    "phase": row.phase,
                    "unit": row.unit,
                    **({"original": row.original} if isinstance(row.cell, ModelCell) else {}),
                    "cell": dataclasses.asdict(row.cell),
                    "best_other": _best_other(row),
                    "results": {name: self._result(row, name) for name in (*row.measured, *row.reasons)},
                }
                for row in self.rows
            ],
        }

    def _result(self, row: Row, name: str) -> dict[str, Any]:
        if name in row.reasons:
            return {"reason": row.reasons[name]}
        result: dict[str, Any] = {"value": row.value(name)}
        if row.unit in ("TFLOP/s", "GB/s", "tokens/s"):
            result["milliseconds"] = row.measured[name]
        if name != "sigswap":
            result["ratio"] = row.ratio(name)
        elif row.of_original is not None:
            result["of_original"] = row.of_original
        share = self.share_of_copy(row, name)
        return result if share is None else {**result, "share_of_copy": share}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for suite in dict.fromkeys(row.cell.suite for row in self.rows):
            yield self._table(suite)

    def _table(self, suite: str) -> Table:
        """A peer that ran nowhere in the suite has no column."""
        from rich.table import Table

        rows = [row for row in self.rows if row.cell.suite == suite]
        peers = [peer.name for peer in peers_of(suite) if any(peer.name in row.measured for row in rows)]
        title = f"{suite}, {self.dtype}: {_described(self.machine)}"
        table = Table(title=title, title_justify="left", caption_justify="left")
        shares = suite == "decode" and self.copy_gb_per_s is not None
        models = suite == "models"
        further = ("of original", "original") if models else ("of copy", "best other") if shares else ("best other",)
        for heading in ("cell", "pass", "unit", "sigswap", *further, *peers):
            left = heading in ("cell", "pass", "unit", "original", "best other")
            table.add_column(heading, justify="left" if left else "right")
        for row in rows:
            best = (row.original or "-") if models else _named_ratio(row)
            share = _percent(row.of_original if models else self.share_of_copy(row, "sigswap"))
            table.add_row(
                row.cell.label,
                row.phase,
                row.unit,
                _figure(row, "sigswap"),
                *((share, best) if shares or models else (best,)),
                *(_figure(row, peer) for peer in peers),
            )
        table.caption = "2.00x: the peer takes twice sigswap's time, or memory. -: not measured; --json FILE says why."
        if models:
            table.caption += (
                " original: the peer that counts as the model without sigswap; of original: sigswap's part."
            )
        else:
            table.caption += " best other: the fastest peer, or that with the least memory."
        if shares:
            table.caption += f" A copy on this device runs at {self.copy_gb_per_s:.0f} GB/s."
        return table

    def figure(self) -> Figure:
        """A bar chart per suite and phase, of the figures that the tables have. Below each cell: the best peer in it,
        and how many times as much time or memory as sigswap it takes."""
        from matplotlib.figure import Figure

        panels = list(dict.fromkeys((row.cell.suite, row.phase, row.unit) for row in self.rows))
        figure = Figure(figsize=(14, 3.2 * max(1, len(panels))), layout="constrained")
        figure.suptitle(f"{_described(self.machine)}, {self.dtype}", fontsize=9)
        for place, (suite, phase, unit) in enumerate(panels, start=1):
            rows = [row for row in self.rows if (row.cell.suite, row.phase, row.unit) == (suite, phase, unit)]
            axes = figure.add_subplot(len(panels), 1, place)
            suites_names = ("sigswap", *(peer.name for peer in peers_of(suite)))
            names = [name for name in suites_names if any(name in row.measured for row in rows)]
            width = 0.8 / max(1, len(names))
            for index, name in enumerate(names):
                values = {at: value for at, row in enumerate(rows) if (value := row.value(name)) is not None}
                positions = [at + (index - (len(names) - 1) / 2) * width for at in values]
                axes.bar(positions, list(values.values()), width, label=name, color=_color(name))
            axes.set_title(f"{suite}, {phase}", loc="left")
            axes.set_ylabel(unit)
            labels = [f"{row.cell.label}\n{_named_ratio(row)}" for row in rows]
            axes.set_xticks(range(len(rows)), labels, fontsize=7, rotation=15, ha="right")
            if names:
                axes.legend(fontsize=7, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
        return figure


def _color(name: str) -> tuple[float, ...]:
    """The same for an implementation in all charts; matplotlib's ten colours first, then their lighter shades."""
    from matplotlib import colormaps

    index = ("sigswap", *peer_names()).index(name)
    return tuple(colormaps["tab20"](2 * index % 20 + index // 10))


def _described(machine: dict[str, str]) -> str:
    return ", ".join(text if name == "gpu" else f"{name} {text}" for name, text in machine.items())


def _figure(row: Row, name: str) -> str:
    value = row.value(name)
    if value is None:
        return "-"
    if row.unit == "ms":
        text = f"{value:.2f}"
    elif row.unit == "kernels":
        text = f"{value:.0f}"
    else:
        text = f"{value:.1f}" if row.unit == "us" or value < 10 else f"{value:.0f}"
    ratio = None if name == "sigswap" else row.ratio(name)
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def _best_other(row: Row) -> dict[str, Any] | None:
    best = row.best_other
    return None if best is None else {"name": best, "ratio": row.ratio(best)}


def _named_ratio(row: Row) -> str:
    """Such as "cudnn 1.12x"; "-" if no peer was measured."""
    best = row.best_other
    ratio = None if best is None else row.ratio(best)
    return best or "-" if ratio is None else f"{best} {ratio:.2f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def check_plot(path: Path) -> None:
    """Raises unless :meth:`Benchmark.figure` could be saved there, which is better known before the run than after.

    Raises:
        SigswapError: matplotlib is not installed.
        ArgumentError: matplotlib does not write files of that ending.
    """
    from sigswap.optional import require

    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    endings = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in endings:
        raise ArgumentError(f"{path} must end in one of {', '.join(f'.{ending}' for ending in endings)}.")
