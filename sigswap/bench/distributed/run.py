"""``sigswap bench --suite distributed``: a step of training on several processes, which torchrun has started, with
sigmoid and with softmax attention under the same parallelism.

A cell's ways are made first, and checked; then they have their turns. All ranks do the same at the same time, and what
fails on one of them is left out on all. A figure is that of the slowest rank.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sigswap import files
from sigswap.bench.cells import DTYPES
from sigswap.bench.distributed.cells import Cell, cells
from sigswap.bench.distributed.overlap import Overlap, profiled
from sigswap.bench.distributed.results import DistributedBenchmark, Figures, Row
from sigswap.bench.distributed.subjects import Way, entered, ways
from sigswap.bench.distributed.traffic import Traffic, silenced
from sigswap.bench.timing import free, refusals
from sigswap.errors import ArgumentError, BenchmarkError, Hint

if TYPE_CHECKING:
    from rich.console import Console

ROUNDS = 3
LONG_MS = 200.0
"""A step that takes longer is timed once in a turn, not three times."""

LIMIT = timedelta(minutes=3)
"""For so long a rank waits for another one."""


def run(
    *,
    dtype: str = "bf16",
    quick: bool = False,
    labels: Sequence[str] | None = None,
    profile: Path | None = None,
    tell: Callable[[str], None] = print,
) -> DistributedBenchmark:
    """Measures on this process's GPU, or if there is none on its CPU; to be called in all processes.

    Args:
        dtype: Of ``DTYPES``.
        quick: Sizes that a CPU is enough for.
        labels: Glob patterns of "<parallel> <label>", such as "context*"; None: all cells.
        profile: A directory that is there: each way's steps are run under torch.profiler, too, the figures tell what
            of NCCL's time nothing else covers, and the first rank's traces are written here.
        tell: Gets the progress, on the first rank.

    Raises:
        ArgumentError: dtype is unknown, no cell has such a label, or ``profile`` is no directory.
        BenchmarkError: the process is none of several that torchrun has started, or without a GPU not ``quick``, or to
            be profiled.
    """
    chosen = choose(dtype, quick, labels)
    if profile is not None and not profile.is_dir():
        raise ArgumentError(f"the traces cannot be written: there is no directory {profile}.")
    with _processes(quick, profile is not None) as mesh:
        rows = []
        for cell in chosen:
            if dist.get_rank() == 0:
                tell(f"Measuring: {cell.parallel} {cell.label}")
            rows.append(measure(cell, mesh, DTYPES[dtype], profile))
            if dist.get_rank() == 0:
                tell(rows[-1].summary)
            if mesh.device_type == "cuda":
                free()
        return DistributedBenchmark(_machine(mesh), mesh.size(), dtype, rows, dist.get_rank() == 0)


def choose(dtype: str, quick: bool, labels: Sequence[str] | None) -> list[Cell]:
    """The cells that :func:`run` is to measure; raises its ArgumentErrors about them."""
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    chosen = [
        cell
        for cell in cells(quick)
        if labels is None or any(fnmatchcase(f"{cell.parallel} {cell.label}", each) for each in labels)
    ]
    if not chosen:
        raise ArgumentError(f"no cell of distributed has a label like {', '.join(labels or ())}.")
    return chosen


def report(json_file: Path | None, *, console: Console, **arguments: Any) -> None:
    """:func:`run` with ``arguments``, and what the command line makes of it: the first rank prints and writes.

    Raises BenchmarkError as :func:`run`, and if sigswap has failed anywhere.
    """
    from rich.console import Console

    result = run(**arguments, tell=functools.partial(console.print, markup=False))
    if result.is_first:
        Console().print(result)
        if json_file is not None:
            files.write_text(json_file, json.dumps(result.to_dict(), indent=2) + "\n")
    if result.failures:
        raise BenchmarkError("sigswap failed, and has no figures there:\n" + "\n".join(result.failures))


@contextmanager
def _processes(quick: bool, profiled: bool) -> Iterator[DeviceMesh]:
    started = dist.is_available() and dist.is_initialized()
    if not started and "RANK" not in os.environ:
        raise BenchmarkError(
            "the suite distributed runs in several processes, and this is none of them.",
            hint=Hint(
                "Start it by torchrun: torchrun --nproc-per-node 2 --no-python sigswap bench --suite distributed"
            ),
        )
    gpu = torch.cuda.is_available()
    if not gpu and not quick:
        raise BenchmarkError(
            "without GPUs the suite distributed would take hours.",
            hint=Hint("Pass {quick} for sizes that a CPU is enough for.", {"quick": "True"}),
        )
    if not gpu and profiled:
        raise BenchmarkError("what overlaps is seen in the kernels of a GPU, and there is none here.")
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if not started:
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=LIMIT, device_id=device)
    try:
        yield init_device_mesh("cuda" if gpu else "cpu", (dist.get_world_size(),), mesh_dim_names=("all",))
    finally:
        if not started:
            dist.destroy_process_group()


def measure(cell: Cell, mesh: DeviceMesh, dtype: torch.dtype, profile: Path | None = None) -> Row:
    made: dict[str, Way] = {}
    reasons: dict[str, str] = {}
    for name, make in ways(cell, mesh, dtype).items():
        with _together(name, reasons, mesh):
            way = make()
            with entered(way):
                way.check()
                way.step()  # compiles
                _wait(mesh)
            made[name] = way
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(ROUNDS):
        for name in reversed(times) if number % 2 else times:
            if name not in reasons:
                with _together(name, reasons, mesh), entered(made[name]):
                    times[name].append(_milliseconds(made[name].step, mesh))
    figures = {}
    for name, way in made.items():
        if name not in reasons:
            with _together(name, reasons, mesh):
                title = re.sub(r"[^\w=.-]+", "-", f"{cell.parallel} {cell.label} {name}")
                trace = None if profile is None else profile / f"{title}.json"
                figures[name] = _figures(way, statistics.median(times[name]), mesh, trace)
    return Row(cell, {name: found for name, found in figures.items() if name not in reasons}, reasons)


def _figures(way: Way, milliseconds: float, mesh: DeviceMesh, trace: Path | None) -> Figures:
    with entered(way):
        way.step()
        with Traffic() as traffic:
            way.step()
        peak = _peak(way.step, mesh)
        if way.alone is None:
            with Traffic():  # whose work in Python is in the other figure, too
                counted = _milliseconds(way.step, mesh)
            with silenced():
                quiet = _milliseconds(way.step, mesh)
            exposed = 1 - quiet / counted
        else:
            quiet = _milliseconds(way.alone, mesh)
            exposed = 1 - quiet / milliseconds
        overlap = None if trace is None else _overlap(way.step, mesh, trace)
    sent = _over_ranks(float(traffic.sent), mesh, dist.ReduceOp.SUM) / mesh.size()
    scaling = None if way.alone is None else mesh.size() * quiet / milliseconds
    return Figures(milliseconds, sent, peak, max(0.0, exposed), scaling, overlap)


def _overlap(step: Callable[[], object], mesh: DeviceMesh, trace: Path) -> Overlap:
    """The mean over the ranks."""
    step()
    _wait(mesh)
    dist.barrier()
    with tempfile.TemporaryDirectory() as folder:
        mine = profiled(step, trace if dist.get_rank() == 0 else Path(folder, "trace.json"))
    means = (_over_ranks(value, mesh, dist.ReduceOp.SUM) / mesh.size() for value in dataclasses.astuple(mine))
    return Overlap(*means)


@contextmanager
def _together(name: str, reasons: dict[str, str], mesh: DeviceMesh) -> Iterator[None]:
    """What fails on one rank has a reason on all of them."""
    with refusals(name, reasons):
        yield
    failed = _over_ranks(float(name in reasons), mesh, dist.ReduceOp.MAX)
    if failed:
        reasons.setdefault(name, "It failed on another rank.")


def _milliseconds(step: Callable[[], object], mesh: DeviceMesh) -> float:
    """The median of some calls, of the slowest rank. The first call is not timed."""
    first = _timed(step, mesh)
    calls = 1 if _over_ranks(first, mesh, dist.ReduceOp.MAX) > LONG_MS else 3
    return _over_ranks(statistics.median(_timed(step, mesh) for _ in range(calls)), mesh, dist.ReduceOp.MAX)


def _timed(step: Callable[[], object], mesh: DeviceMesh) -> float:
    _wait(mesh)
    dist.barrier()
    start = time.perf_counter()
    step()
    _wait(mesh)
    return 1e3 * (time.perf_counter() - start)


def _wait(mesh: DeviceMesh) -> None:
    if mesh.device_type == "cuda":
        torch.cuda.synchronize()


def _peak(step: Callable[[], object], mesh: DeviceMesh) -> float | None:
    if mesh.device_type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return _over_ranks(float(torch.cuda.max_memory_allocated() - before), mesh, dist.ReduceOp.MAX)


def _over_ranks(value: float, mesh: DeviceMesh, how: Any) -> float:
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else None
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, how)
    return float(found)


def _machine(mesh: DeviceMesh) -> dict[str, str]:
    gpu = mesh.device_type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}",
        "backend": "nccl" if gpu else "gloo",
        "torch": str(torch.__version__),
    }
