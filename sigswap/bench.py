"""``sigswap bench``: sigswap's op beside PyTorch's softmax attention, on one GPU, in one run.

The suites are lists of cells, a cell is one problem. In each, sigswap's result is first compared with a float64
computation of some rows and keys, so that a wrong kernel gets no figure. Then sigswap and its peers are timed in
turns, on the same tensors. The peers' results are not checked: theirs is another function (softmax).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import itertools
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sigswap.attention import sigmoid_attention, sigmoid_attention_varlen
from sigswap.errors import ArgumentError, BenchmarkError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

SUITES: dict[str, tuple[str, ...]] = {
    "train": ("fa2", "cudnn", "efficient", "flex", "triton-sigmoid"),
    "short": ("fa2", "cudnn", "efficient", "flex", "triton-sigmoid"),
    "decode": ("fa2", "cudnn", "efficient", "flex"),
    "varlen": ("fa2", "flex", "padded", "nested", "triton-sigmoid"),
    "host": ("sdpa",),
}
"""Each suite's peers. fa2, cudnn, efficient: that backend of ``scaled_dot_product_attention`` (fa2 in varlen:
``torch.nn.attention.varlen``); sdpa: the backend that PyTorch chooses; flex: FlexAttention, softmax, compiled (varlen:
one long sequence, and a block mask of its documents); padded: sdpa on padded sequences; nested: sdpa on jagged nested
tensors; triton-sigmoid: the package of that name, if it is installed."""

PEERS = tuple(dict.fromkeys(peer for peers in SUITES.values() for peer in peers))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 5e-3}
"""The relative error (Frobenius) above which a result is wrong: well above rounding, well below a misplaced mask."""

COPIED_BYTES = 2**30
HOST_CALLS = 100  # per timing; few enough for all their kernels to fit into the GPU's launch queue


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem. Causal ones have as many queries as keys.

    In the suite varlen ``lengths`` holds the sequences' lengths, and q_len and kv_len are the longest.
    ``without``: the peers that are left out unless they are asked for, as they compile or tune for each shape.
    """

    suite: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    causal: bool = False
    lengths: tuple[int, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass: a decoding step has none."""
        return self.q_len == self.kv_len

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are visible, of one head, in the whole batch; padding is not counted."""
        if self.lengths:
            return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        one = self.q_len * (self.q_len + 1) // 2 if self.causal else self.q_len * self.kv_len
        return self.batch * one

    @property
    def forward_flops(self) -> int:
        """Of the two matrix products, over visible pairs. Backward's five products count 2.5 times as much."""
        return 4 * self.pairs * self.heads * self.head_dim

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Of key and value."""
        return 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim * dtype.itemsize

    @property
    def label(self) -> str:
        mask = " causal" if self.causal else ""
        if self.lengths:
            return f"{len(self.lengths)} x {min(self.lengths)}..{max(self.lengths)} D={self.head_dim}{mask}"
        if not self.trains:
            return f"B={self.batch} keys={self.kv_len}"
        return f"B={self.batch} N={self.kv_len} D={self.head_dim}{mask}"


def cells(suite: str, quick: bool = False) -> list[Cell]:
    """The suite's cells; with ``quick`` as few as possible, and none with a peer that is slow to compile but one."""
    return _QUICK[suite]() if quick else _FULL[suite]()


def _train_cell(head_dim: int, length: int, causal: bool, without: tuple[str, ...]) -> Cell:
    """16,384 tokens of width 2048."""
    heads = 2048 // head_dim
    return Cell("train", 16384 // length, heads, heads, length, length, head_dim, causal, without=without)


def _train() -> list[Cell]:
    # FlexAttention in one length, and triton-sigmoid, which tries 49 kernels in each cell, in two cells.
    without: dict[tuple[int, int, bool], tuple[str, ...]] = {
        (64, 4096, False): (),
        (64, 4096, True): ("triton-sigmoid",),
        (128, 4096, False): ("triton-sigmoid",),
        (128, 4096, True): (),
    }
    shapes = itertools.product((64, 128), (1024, 4096, 16384), (False, True))
    return [_train_cell(*shape, without.get(shape, ("flex", "triton-sigmoid"))) for shape in shapes]


def _short_cell(length: int, batch: int, without: tuple[str, ...]) -> Cell:
    """The attention of a ViT-B, for images of 50, 197 or 577 patches and class token."""
    return Cell("short", batch, 12, 12, length, length, 64, without=without)


def _short() -> list[Cell]:
    return [
        _short_cell(length, batch, ("triton-sigmoid",) if length == 197 else ("flex", "triton-sigmoid"))
        for length, batch in ((50, 1024), (197, 256), (577, 128))
    ]


def _decode_cell(batch: int, keys: int, without: tuple[str, ...]) -> Cell:
    return Cell("decode", batch, 32, 8, 1, keys, 128, without=without)


def _decode() -> list[Cell]:
    return [
        _decode_cell(batch, keys, () if keys == 8192 and batch in (1, 64) else ("flex",))
        for batch in (1, 4, 16, 64)
        for keys in (1024, 8192, 32768, 131072)
        if batch * keys <= 2**21  # key and value take 8 GiB in bf16
    ]


def _varlen_cell(sequences: int, longest: int, head_dim: int, causal: bool, without: tuple[str, ...]) -> Cell:
    """Some 35,000 tokens of width 2048. The lengths are random, and the same in each run."""
    draw = random.Random(longest)
    lengths = tuple(draw.randint(longest // 16, longest) for _ in range(sequences))
    heads = 2048 // head_dim
    return Cell(
        "varlen", sequences, heads, heads, max(lengths), max(lengths), head_dim, causal, lengths, without=without
    )


def _varlen() -> list[Cell]:
    return [
        _varlen_cell(sequences, longest, head_dim, causal, ("triton-sigmoid",))
        for sequences, longest, head_dim in ((64, 1024, 64), (16, 4096, 128))
        for causal in (False, True)
    ]


def _host() -> list[Cell]:
    """So small that the GPU waits for the host."""
    return [Cell("host", 1, 12, 12, 64, 64, 64), Cell("host", 1, 32, 8, 1, 1024, 128)]


_FULL = {"train": _train, "short": _short, "decode": _decode, "varlen": _varlen, "host": _host}
_QUICK: dict[str, Callable[[], list[Cell]]] = {
    "train": lambda: [_train_cell(128, 4096, True, ("triton-sigmoid",))],
    "short": lambda: [_short_cell(197, 256, ("flex", "triton-sigmoid"))],
    "decode": lambda: [_decode_cell(16, 8192, ("flex",))],
    "varlen": lambda: [_varlen_cell(64, 1024, 64, True, ("flex", "triton-sigmoid"))],
    "host": _host,
}


def phases(cell: Cell) -> tuple[str, ...]:
    """What is measured in a cell: "forward", "backward", "forward+backward" (their time) or "memory" (their peak)."""
    if not cell.trains:
        return ("forward",)
    if cell.suite == "host":
        return "forward", "forward+backward"
    return ("forward", "backward", "memory") if cell.suite == "train" else ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Row:
    """One phase of one cell.

    ``measured``: by implementation ("sigswap" or a peer): milliseconds; in the suite host microseconds; in the phase
    memory MiB. ``reasons``: why an implementation was not measured.
    """

    cell: Cell
    dtype: str
    phase: str
    measured: dict[str, float]
    reasons: dict[str, str]

    @property
    def unit(self) -> str:
        """Of :meth:`value`: "TFLOP/s", "GB/s" (of key and value), "us" (per call) or "MiB"."""
        if self.phase == "memory":
            return "MiB"
        return {"host": "us", "decode": "GB/s"}.get(self.cell.suite, "TFLOP/s")

    def value(self, name: str) -> float | None:
        """The implementation's figure, in :attr:`unit`; None if it was not measured."""
        measured = self.measured.get(name)
        if measured is None or self.unit in ("MiB", "us"):
            return measured
        if self.unit == "GB/s":
            return self.cell.kv_bytes(DTYPES[self.dtype]) / measured / 1e6
        return self.cell.forward_flops * (2.5 if self.phase == "backward" else 1.0) / measured / 1e9

    def ratio(self, peer: str) -> float | None:
        """How many times as much time or memory as sigswap the peer takes: above 1, sigswap is better."""
        if peer not in self.measured or "sigswap" not in self.measured:
            return None
        return self.measured[peer] / self.measured["sigswap"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What :func:`run` has measured. It can be printed with rich, plotted, and turned into JSON.

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
        failed = [row for row in self.rows if "sigswap" in row.reasons]
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
                    "cell": dataclasses.asdict(row.cell),
                    "results": {name: self._result(row, name) for name in (*row.measured, *row.reasons)},
                }
                for row in self.rows
            ],
        }

    def _result(self, row: Row, name: str) -> dict[str, Any]:
        if name in row.reasons:
            return {"reason": row.reasons[name]}
        result: dict[str, Any] = {"value": row.value(name)}
        if row.unit in ("TFLOP/s", "GB/s"):
            result["milliseconds"] = row.measured[name]
        if name != "sigswap":
            result["ratio"] = row.ratio(name)
        share = self.share_of_copy(row, name)
        return result if share is None else {**result, "share_of_copy": share}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for suite in dict.fromkeys(row.cell.suite for row in self.rows):
            yield self._table(suite)

    def _table(self, suite: str) -> Table:
        """A peer that ran nowhere in the suite has no column."""
        from rich.table import Table

        rows = [row for row in self.rows if row.cell.suite == suite]
        peers = [peer for peer in SUITES[suite] if any(peer in row.measured for row in rows)]
        title = f"{suite}, {self.dtype}: {_described(self.machine)}"
        table = Table(title=title, title_justify="left", caption_justify="left")
        shares = suite == "decode" and self.copy_gb_per_s is not None
        for heading in ("cell", "pass", "unit", "sigswap", *(("of copy",) if shares else ()), *peers):
            table.add_column(heading, justify="left" if heading in ("cell", "pass", "unit") else "right")
        for row in rows:
            share = self.share_of_copy(row, "sigswap")
            table.add_row(
                row.cell.label,
                row.phase,
                row.unit,
                _figure(row, "sigswap"),
                *((("-" if share is None else f"{share:.0%}"),) if shares else ()),
                *(_figure(row, peer) for peer in peers),
            )
        table.caption = "2.00x: the peer takes twice sigswap's time, or memory. -: not measured; --json FILE says why."
        if shares:
            table.caption += f" A copy on this device runs at {self.copy_gb_per_s:.0f} GB/s."
        return table

    def figure(self) -> Figure:
        """A bar chart per suite and phase, of the figures that the tables have."""
        from matplotlib.figure import Figure

        panels = list(dict.fromkeys((row.cell.suite, row.phase) for row in self.rows))
        figure = Figure(figsize=(14, 3.2 * max(1, len(panels))), layout="constrained")
        figure.suptitle(f"{_described(self.machine)}, {self.dtype}", fontsize=9)
        for place, (suite, phase) in enumerate(panels, start=1):
            rows = [row for row in self.rows if (row.cell.suite, row.phase) == (suite, phase)]
            axes = figure.add_subplot(len(panels), 1, place)
            names = [name for name in ("sigswap", *SUITES[suite]) if any(name in row.measured for row in rows)]
            width = 0.8 / max(1, len(names))
            for index, name in enumerate(names):
                values = {at: value for at, row in enumerate(rows) if (value := row.value(name)) is not None}
                positions = [at + (index - (len(names) - 1) / 2) * width for at in values]
                color = f"C{('sigswap', *PEERS).index(name)}"
                axes.bar(positions, list(values.values()), width, label=name, color=color)
            axes.set_title(f"{suite}, {phase}", loc="left")
            axes.set_ylabel(rows[0].unit)
            axes.set_xticks(range(len(rows)), [row.cell.label for row in rows], fontsize=7, rotation=15, ha="right")
            if names:
                axes.legend(fontsize=7, ncols=len(names), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
        return figure


def _described(machine: dict[str, str]) -> str:
    return ", ".join(text if name == "gpu" else f"{name} {text}" for name, text in machine.items())


def _figure(row: Row, name: str) -> str:
    value = row.value(name)
    if value is None:
        return "-"
    text = f"{value:.1f}" if row.unit == "us" or value < 10 else f"{value:.0f}"
    ratio = None if name == "sigswap" else row.ratio(name)
    return text if ratio is None else f"{text} ({ratio:.2f}x)"


def check_plot(path: Path) -> None:
    """Raises unless :meth:`Benchmark.figure` could be saved there, which is better known before the run than after.

    Raises:
        SigswapError: matplotlib is not installed.
        ArgumentError: matplotlib does not write files of that ending.
    """
    from sigswap.sources import require

    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    endings = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in endings:
        raise ArgumentError(f"{path} must end in one of {', '.join(f'.{ending}' for ending in endings)}.")


def run(
    suites: Sequence[str] | None = None,
    *,
    peers: Sequence[str] | None = None,
    dtype: str = "bf16",
    quick: bool = False,
    console: Console | None = None,
) -> Benchmark:
    """Measures on the current CUDA device.

    Args:
        suites: Of ``SUITES``; None: all.
        peers: Of ``PEERS``; None: all, but those that compile or tune for each shape (``flex`` and
            ``triton-sigmoid``) in some cells only. Named here, they run in all cells that they can.
        dtype: Of ``DTYPES``.
        quick: The fewest cells, to see that it works.
        console: Shows the progress.

    Raises:
        ArgumentError: A suite, a peer or the dtype is unknown.
        BenchmarkError: There is no GPU that sigswap's kernels run on.
    """
    suites = _known("suite", suites, SUITES)
    wanted = _known("peer", peers, PEERS)
    _known("dtype", [dtype], DTYPES)
    _require_gpu()
    machine = _machine()
    rows: list[Row] = []
    copy_gb_per_s = stopped = None
    with nullcontext() if console is None else console.status("Measuring") as status:
        if "decode" in suites:
            copy_gb_per_s = _copy_gb_per_s()
        for cell in (cell for suite in suites for cell in cells(suite, quick)):
            if status is not None:
                status.update(f"Measuring: {cell.suite} {cell.label}")
            chosen = [peer for peer in SUITES[cell.suite] if peer in wanted]
            left_out = cell.without if peers is None else ()
            try:
                rows += measure(cell, dtype, chosen, left_out)
                _free()
            except (torch.AcceleratorError, torch.OutOfMemoryError) as error:  # what was measured so far is kept
                stopped = f"The run ended in {cell.suite} {cell.label}: {error}"
                break
    return Benchmark(machine, dtype, copy_gb_per_s, rows, stopped)


def _known(what: str, names: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """``names`` without duplicates, all that are known if None."""
    chosen = list(dict.fromkeys(known if names is None else names))
    for name in chosen:
        if name not in known:
            raise ArgumentError(f"{what} {name!r} is not one of {', '.join(known)}.")
    return chosen


def _require_gpu() -> None:
    needed = "sigswap bench needs an NVIDIA GPU of compute capability 8.0 or later, and Triton"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise BenchmarkError(f"{needed}; PyTorch {torch.__version__} sees no such GPU here.")
    if torch.cuda.get_device_capability() < (8, 0):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        raise BenchmarkError(f"{needed}; {torch.cuda.get_device_name()} has {found}.")
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise BenchmarkError(f"{needed}; Triton could not be imported ({error}).") from error


def _machine() -> dict[str, str]:
    """The device and the versions of what runs on it."""
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "torch": str(torch.__version__),
    }
    for package in ("triton", "sigswap", "triton-sigmoid"):
        with suppress(PackageNotFoundError):  # sigswap, run from its source tree; triton-sigmoid is optional
            machine[package] = version(package)
    return machine


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


# One cell.


class Inputs(NamedTuple):
    """[batch, heads, length, head_dim], stored as [batch, length, heads, head_dim] but for decoding; varlen:
    [tokens, heads, head_dim]. ``grad_out`` is of query's shape, and None where there is no backward pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


class Implementation(NamedTuple):
    """``forward`` takes nothing: it holds its inputs. It, and its backward pass, run within ``context()``."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    grad_out: Tensor | None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def measure(cell: Cell, dtype: str, peers: Sequence[str], left_out: Sequence[str] = ()) -> list[Row]:
    """The cell's rows. Only errors that leave the GPU unusable are raised; others become reasons.

    Each figure is the median of three medians, between which the other implementations had their turns.
    """
    inputs = make_inputs(cell, DTYPES[dtype], "cuda")
    refused = {peer: "It compiles or tunes for each shape; --peers runs it." for peer in peers if peer in left_out}
    implementations: dict[str, Implementation] = {}
    for name in ("sigswap", *peers):
        if name in refused:
            continue
        with _refusals(name, refused):
            implementation = _implementation(name, cell, inputs)
            with implementation.context():
                out = implementation.forward()
            if name == "sigswap":
                grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_out) if cell.trains else ()
                check(cell, inputs, out, grads)
                del grads
            del out
            torch.cuda.synchronize()  # lest an error of this implementation show in the next one
            implementations[name] = implementation
    return [_measure_phase(cell, dtype, phase, implementations, refused) for phase in phases(cell)]


def _measure_phase(
    cell: Cell, dtype: str, phase: str, implementations: dict[str, Implementation], refused: dict[str, str]
) -> Row:
    timer = _peak_mib if phase == "memory" else _host_us if cell.suite == "host" else _gpu_ms
    reasons = dict(refused)
    calls: dict[str, Callable[[], object]] = {}
    for name, implementation in implementations.items():
        with _refusals(name, reasons), implementation.context():
            calls[name] = _call(implementation, phase)
            calls[name]()  # compiles and tunes
            torch.cuda.synchronize()
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            if name not in reasons:
                with _refusals(name, reasons), implementations[name].context():
                    figures[name].append(timer(call))
    measured = {name: statistics.median(values) for name, values in figures.items() if name not in reasons}
    return Row(cell, dtype, phase, measured, reasons)


def _call(implementation: Implementation, phase: str) -> Callable[[], object]:
    forward, leaves, grad_out = implementation[:3]
    if phase == "forward":
        return forward
    if phase == "backward":
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, grad_out)


def make_inputs(cell: Cell, dtype: torch.dtype, device: str) -> Inputs:
    """Normally distributed, the same in each run."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        if cell.lengths:
            shape: tuple[int, ...] = (sum(cell.lengths), heads, cell.head_dim)
        elif cell.trains:
            shape = (cell.batch, length, heads, cell.head_dim)
        else:  # as a cache is stored
            shape = (cell.batch, heads, length, cell.head_dim)
        tensor = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return tensor.transpose(1, 2) if cell.trains and not cell.lengths else tensor

    query, key, value = draw(cell.heads, cell.q_len), *(draw(cell.kv_heads, cell.kv_len) for _ in range(2))
    if not cell.trains:
        return Inputs(query, key, value, None)
    grad_out = draw(cell.heads, cell.q_len)
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_out)


@contextmanager
def _refusals(name: str, reasons: dict[str, str]) -> Iterator[None]:
    """Makes an exception the reason why ``name`` is not measured. PyTorch gives its reasons in warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            told = (warning.message for warning in caught if warning.category is UserWarning)
            texts = dict.fromkeys(str(text) for text in (error, *told))
            reasons[name] = f"{type(error).__name__}: {' '.join(texts)}"[:2000]
            torch.cuda.synchronize()  # raises again if the GPU cannot be used any more


def _free() -> None:
    torch.compiler.reset()  # also lest FlexAttention hit the limit of compilations per function
    gc.collect()
    torch.cuda.empty_cache()


# Correctness.


@torch.no_grad()
def check(cell: Cell, inputs: Inputs, out: Tensor, grads: Sequence[Tensor]) -> None:
    """Raises BenchmarkError unless ``out`` and ``grads`` (of query, key, value; or none) are sigmoid attention's.

    Compared in some rows and keys of up to three heads.
    """
    names = ("output", "gradient of query", "gradient of key", "gradient of value")[: 1 + len(grads)]
    squares = {name: [0.0, 0.0] for name in names}
    last = cell.batch - 1, cell.heads - 1
    for batch, head in {(0, 0), (last[0] // 2, last[1] // 2), last}:
        kv_head = head * cell.kv_heads // cell.heads
        heads = (head, kv_head, kv_head)
        query, key, value = (_head(tensor, cell, batch, at) for tensor, at in zip(inputs.leaves, heads, strict=True))
        grad_out = None if inputs.grad_out is None or not grads else _head(inputs.grad_out, cell, batch, head)
        rows, keys = _some(query.shape[0], out.device), _some(key.shape[0], out.device)
        truths = expected(query, key, value, grad_out, causal=cell.causal, rows=rows, keys=keys)
        for name, tensor, at, chosen, truth in zip(
            names, (out, *grads), (head, *heads), (rows, rows, keys, keys), truths, strict=False
        ):
            result = _head(tensor, cell, batch, at)[chosen].double()
            squares[name][0] += (result - truth).square().sum().item()
            squares[name][1] += truth.square().sum().item()
    for name, (error, norm) in squares.items():
        relative = (error / norm) ** 0.5
        if not relative <= TOLERANCES[out.dtype]:
            raise BenchmarkError(f"wrong result: the relative error of the {name} is {relative:.2g}")


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None,
    *,
    causal: bool,
    rows: Tensor,
    keys: Tensor,
) -> list[Tensor]:
    """One head's sigmoid attention, with the default scale and bias, in float64, in some rows and keys.

    Args:
        query: [M, D].
        key: [N, D].
        value: [N, Dv].
        grad_out: [M, Dv] or None.
        causal: Row i sees the keys 0 ... i.
        rows: Indices into query, int64.
        keys: Indices into key and value, int64.

    Returns:
        The output in ``rows``; with grad_out also the gradients of query in ``rows``, of key and value in ``keys``.
    """
    query, key, value = (tensor.detach().double() for tensor in (query, key, value))
    all_rows, all_keys = (torch.arange(tensor.shape[0], device=query.device) for tensor in (query, key))
    scale = query.shape[1] ** -0.5

    def probabilities(rows: Tensor, keys: Tensor) -> Tensor:
        seen = (rows + 1).clamp(max=key.shape[0]) if causal else torch.full_like(rows, key.shape[0])
        p = (scale * query[rows] @ key[keys].T - seen.double().log()[:, None]).sigmoid()
        return p.masked_fill(keys > rows[:, None], 0.0) if causal else p

    p = probabilities(rows, all_keys)
    results = [p @ value]
    if grad_out is not None:
        grad = grad_out.double()
        results.append(scale * (p * (1 - p) * (grad[rows] @ value.T)) @ key)
        p = probabilities(all_rows, keys)
        results.append(scale * (p * (1 - p) * (grad @ value[keys].T)).T @ query)
        results.append(p.T @ grad)
    return results


def _head(tensor: Tensor, cell: Cell, batch: int, head: int) -> Tensor:
    """[length, head_dim]: one head of one sequence."""
    if cell.lengths:
        start = sum(cell.lengths[:batch])
        return tensor[start : start + cell.lengths[batch], head]
    return tensor[batch, head]


def _some(length: int, device: torch.device) -> Tensor:
    """Up to 32 indices below length, the first and the last among them."""
    return torch.linspace(0, length - 1, min(length, 32), device=device).round().long()


# Timing.


def _gpu_ms(call: Callable[[], object]) -> float:
    """The median of CUDA event timings, with the L2 cache cleared before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def _host_us(call: Callable[[], object]) -> float:
    """Wall clock time per call of calls that wait for nothing."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / HOST_CALLS * 1e6


def _peak_mib(call: Callable[[], object]) -> float:
    """The most memory that the call had allocated at one time, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _copy_gb_per_s() -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _gpu_ms(lambda: target.copy_(source)) / 1e6


# Implementations.


def _implementation(name: str, cell: Cell, inputs: Inputs) -> Implementation:
    if cell.suite == "varlen":
        return _VARLEN[name](cell, inputs)
    return _DENSE[name](cell, inputs)


def _sigswap(cell: Cell, inputs: Inputs) -> Implementation:
    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(sigmoid_attention, *inputs.leaves, is_causal=cell.causal, enable_gqa=gqa)
    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _sdpa(backend: str | None, cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(F.scaled_dot_product_attention, *inputs.leaves, is_causal=cell.causal, enable_gqa=gqa)
    context = nullcontext if backend is None else functools.partial(sdpa_kernel, getattr(SDPBackend, backend))
    return Implementation(forward, inputs.leaves, inputs.grad_out, context)


def _flex(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if cell.causal:
        block_mask = create_block_mask(_is_causal, None, None, cell.q_len, cell.kv_len, device=inputs.query.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = cell.heads != cell.kv_heads
    forward = functools.partial(compiled, *inputs.leaves, block_mask=block_mask, enable_gqa=gqa)
    return Implementation(forward, inputs.leaves, inputs.grad_out, _compiled_backward_can_repeat)


def _is_causal(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return row >= key


@contextmanager
def _compiled_backward_can_repeat() -> Iterator[None]:
    """Compiled code may overwrite what forward saved for backward, unless told not to (which can cost it some peak
    memory). It is told per thread, so backward stays in this one."""
    import torch._functorch.config

    with torch._functorch.config.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        yield


def _triton_sigmoid(cell: Cell, inputs: Inputs) -> Implementation:
    sigmoid = importlib.import_module("triton_sigmoid").sigmoid_attention
    query, key, value = inputs.leaves

    def forward() -> Tensor:  # of [batch, length, heads, head_dim], as the tensors are stored
        return sigmoid(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=cell.causal).transpose(1, 2)

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _sigswap_varlen(cell: Cell, inputs: Inputs) -> Implementation:
    ends = _ends(cell, inputs)
    longest = cell.kv_len
    forward = functools.partial(
        sigmoid_attention_varlen, *inputs.leaves, ends, ends, longest, longest, is_causal=cell.causal
    )
    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _fa2_varlen(cell: Cell, inputs: Inputs) -> Implementation:
    from torch.nn.attention.varlen import varlen_attn

    ends = _ends(cell, inputs)
    window = (-1, 0) if cell.causal else (-1, -1)
    forward: Callable[[], Any] = functools.partial(
        varlen_attn, *inputs.leaves, ends, ends, cell.q_len, cell.kv_len, window_size=window
    )
    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _flex_varlen(cell: Cell, inputs: Inputs) -> Implementation:
    """One sequence of all tokens, whose block mask (not timed: a model makes it once) lets documents see themselves."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, total, causal = inputs.query.device, sum(cell.lengths), cell.causal
    documents = torch.arange(cell.batch, device=device).repeat_interleave(torch.tensor(cell.lengths, device=device))

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same = documents[row] == documents[key]
        return same & (row >= key) if causal else same

    block_mask = create_block_mask(visible, None, None, total, total, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    leaves = inputs.leaves

    def forward() -> Tensor:
        query, key, value = (leaf.transpose(0, 1).unsqueeze(0) for leaf in leaves)
        return compiled(query, key, value, block_mask=block_mask).squeeze(0).transpose(0, 1)

    return Implementation(forward, leaves, inputs.grad_out, _compiled_backward_can_repeat)


def _padded(cell: Cell, inputs: Inputs) -> Implementation:
    """Padding and removing it are not timed. Under a causal mask no token sees the padding after it."""
    leaves, grad_out = _pad(cell, inputs)
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    mask = None
    if not cell.causal:
        at = torch.arange(cell.kv_len, device=query.device)
        mask = (at < torch.tensor(cell.lengths, device=query.device)[:, None])[:, None, None, :]

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=cell.causal)
        return out.transpose(1, 2)

    return Implementation(forward, leaves, grad_out)


def _nested(cell: Cell, inputs: Inputs) -> Implementation:
    offsets = _ends(cell, inputs).long()
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            leaf, offsets, min_seqlen=min(cell.lengths), max_seqlen=max(cell.lengths)
        ).transpose(1, 2)
        for leaf in inputs.leaves
    )

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal)
        return out.transpose(1, 2).values()

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _triton_sigmoid_padded(cell: Cell, inputs: Inputs) -> Implementation:
    sigmoid = importlib.import_module("triton_sigmoid").sigmoid_attention_padded
    leaves, grad_out = _pad(cell, inputs)
    lengths = torch.tensor(cell.lengths, dtype=torch.int32, device=inputs.query.device)
    forward = functools.partial(sigmoid, *leaves, lengths, lengths, is_causal=cell.causal)
    return Implementation(forward, leaves, grad_out)


def _ends(cell: Cell, inputs: Inputs) -> Tensor:
    """0 and each sequence's end in the packed tensors, int32 [batch + 1]."""
    lengths = torch.tensor([0, *cell.lengths], device=inputs.query.device)
    return lengths.cumsum(0).to(torch.int32)


def _pad(cell: Cell, inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Copies of the leaves and of grad_out as [batch, longest, heads, head_dim], with zeros after each sequence."""
    assert inputs.grad_out is not None
    query, key, value, grad_out = (
        torch.nn.utils.rnn.pad_sequence(list(tensor.detach().split(cell.lengths)), batch_first=True)
        for tensor in (*inputs.leaves, inputs.grad_out)
    )
    return (query.requires_grad_(), key.requires_grad_(), value.requires_grad_()), grad_out


_Builder = Callable[[Cell, Inputs], Implementation]
_DENSE: dict[str, _Builder] = {
    "sigswap": _sigswap,
    "fa2": functools.partial(_sdpa, "FLASH_ATTENTION"),
    "cudnn": functools.partial(_sdpa, "CUDNN_ATTENTION"),
    "efficient": functools.partial(_sdpa, "EFFICIENT_ATTENTION"),
    "sdpa": functools.partial(_sdpa, None),
    "flex": _flex,
    "triton-sigmoid": _triton_sigmoid,
}
_VARLEN: dict[str, _Builder] = {
    "sigswap": _sigswap_varlen,
    "fa2": _fa2_varlen,
    "flex": _flex_varlen,
    "padded": _padded,
    "nested": _nested,
    "triton-sigmoid": _triton_sigmoid_padded,
}
