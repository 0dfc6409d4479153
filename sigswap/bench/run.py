"""``sigswap bench``: sigswap's op beside PyTorch's softmax attention, on one GPU, in one run.

The suites are lists of cells, a cell is one problem. In each, sigswap's result is first compared with a float64
computation of some rows and keys, so that a wrong kernel gets no figure. Then sigswap and its peers are timed in
turns, on the same tensors. The peers' results are not checked: theirs is another function (softmax). The suites models
and generation run whole models, and differ: see :mod:`sigswap.bench.models` and :mod:`sigswap.bench.generation`.
"""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from sigswap.bench import generation, own
from sigswap.bench import models as bench_models
from sigswap.bench.cells import (
    DEFAULT_SUITES,
    DISTRIBUTED,
    DTYPES,
    SETUPS,
    SUITES,
    Cell,
    GenerationCell,
    ModelCell,
    cells,
    phases,
)
from sigswap.bench.correctness import check
from sigswap.bench.inputs import make_inputs
from sigswap.bench.peers import find_peer, peer_names, peers_of
from sigswap.bench.peers.peer import Implementation
from sigswap.bench.results import Benchmark, Row
from sigswap.bench.timing import copy_gb_per_s, free, gpu_ms, host_us, in_turns, peak_mib, refusals
from sigswap.errors import ArgumentError, BenchmarkError

if TYPE_CHECKING:
    from rich.console import Console

MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def run(
    suites: Sequence[str] | None = None,
    *,
    labels: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    dtype: str = "bf16",
    quick: bool = False,
    mode: str | None = None,
    console: Console | None = None,
) -> Benchmark:
    """Measures on the current CUDA device.

    Args:
        suites: Of ``SUITES``; None: ``DEFAULT_SUITES``, all but features, models and generation.
        labels: Glob patterns of the cells' labels, such as "ViT*"; None: all cells of the suites.
        peers: Of ``sigswap.bench.peers.PEERS``, by name; None: all, but those that compile or tune for each shape (and
            in models and generation any) in some cells only. Named here, they run in all cells that they can.
        dtype: Of ``DTYPES``.
        quick: The fewest cells, to see that it works.
        mode: Of torch.compile, in the suites models and generation: of ``MODES``. None: its default, but in
            generation CUDA graphs ("reduce-overhead").
        console: Shows the progress.

    Raises:
        ArgumentError: A suite, a peer, the dtype or the mode is unknown, a named peer is in none of the suites, a named
            suite has none of the named peers, or no cell has such a label.
        BenchmarkError: There is no GPU that sigswap's kernels run on.
    """
    suites, wanted, chosen = choose(suites, labels=labels, peers=peers, dtype=dtype, quick=quick, mode=mode)
    _require_gpu()
    packages = [peer.package for suite in suites for peer in peers_of(suite) if peer.package and peer.name in wanted]
    needed = {"models": ("timm", "transformers"), "generation": ("transformers",)}
    packages += [package for suite in suites for package in needed.get(suite, ())]
    machine = _machine(list(dict.fromkeys(packages)))
    if mode is not None:
        machine["mode"] = mode
    rows: list[Row] = []
    copy = stopped = None
    with nullcontext() if console is None else console.status("Measuring") as status:
        if "decode" in suites:
            copy = copy_gb_per_s()
        for cell in chosen:
            if status is not None:
                status.update(f"Measuring: {cell.suite} {cell.label}")
            named = [peer.name for peer in peers_of(cell.suite) if peer.name in wanted]
            left_out = _left_out(cell) if peers is None else ()
            try:
                if isinstance(cell, ModelCell):
                    rows += bench_models.measure(cell, dtype, named, left_out, mode=mode)
                elif isinstance(cell, GenerationCell):
                    rows += generation.measure(cell, dtype, named, left_out, mode=mode)
                else:
                    rows += measure(cell, dtype, named, left_out)
                free()
            except (torch.AcceleratorError, torch.OutOfMemoryError) as error:  # what was measured so far is kept
                stopped = f"The run ended in {cell.suite} {cell.label}: {error}"
                break
    return Benchmark(machine, dtype, copy, rows, stopped)


def choose(
    suites: Sequence[str] | None,
    *,
    labels: Sequence[str] | None,
    peers: Sequence[str] | None,
    dtype: str,
    quick: bool,
    mode: str | None,
) -> tuple[list[str], list[str], list[Cell | ModelCell | GenerationCell]]:
    """The suites, peers and cells that :func:`run` is to measure; raises its ArgumentErrors, which are about them."""
    known = _known("suite", DEFAULT_SUITES if suites is None else suites, SUITES, f", {DISTRIBUTED}")
    wanted = _known("peer", peers, peer_names())
    if peers is not None:
        _require_peers(wanted, known, each=suites is not None)
    _known("dtype", [dtype], DTYPES)
    _known("mode", [] if mode is None else [mode], MODES)
    chosen = [cell for suite in known for cell in cells(suite, quick) if _is_labelled(cell.label, labels)]
    if not chosen:
        raise ArgumentError(f"no cell of {', '.join(known)} has a label like {', '.join(labels or ())}.")
    return known, wanted, chosen


def _left_out(cell: Cell | ModelCell | GenerationCell) -> Sequence[str]:
    """The peers that are not measured in the cell unless they are asked for."""
    if isinstance(cell, ModelCell | GenerationCell):
        return cell.without
    longer = SETUPS[SETUPS.index(cell.setup) + 1 :]
    return [peer.name for peer in peers_of(cell.suite) if peer.setup in longer]


def _is_labelled(label: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(label, pattern) for pattern in patterns)


def _known(what: str, names: Sequence[str] | None, known: Collection[str], others: str = "") -> list[str]:
    """``names`` without duplicates, all that are known if None. ``others``: what the command line knows as well."""
    chosen = list(dict.fromkeys(known if names is None else names))
    for name in chosen:
        if name not in known:
            raise ArgumentError(f"{what} {name!r} is not one of {', '.join(known)}{others}.")
    return chosen


def _require_peers(wanted: Sequence[str], suites: Sequence[str], each: bool) -> None:
    """Raises unless each of the peers is measured in one of the suites, and, if ``each``, one of them in each suite."""
    has = {suite: [peer.name for peer in peers_of(suite)] for suite in suites}
    for name in wanted:
        if not any(name in names for names in has.values()):
            known = "; ".join(f"{suite} has {', '.join(names)}" for suite, names in has.items())
            raise ArgumentError(f"peer {name!r} is not measured in {', '.join(suites)}: {known}.")
    for suite, names in has.items():
        if each and not set(names) & set(wanted):
            raise ArgumentError(
                f"suite {suite!r} is measured beside none of the peers {', '.join(wanted)}: it has {', '.join(names)}."
            )


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


def _machine(packages: Sequence[str]) -> dict[str, str]:
    """The device and the versions of what runs on it, ``packages`` among them."""
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "torch": str(torch.__version__),
    }
    for package in ("triton", "sigswap", *packages):
        with suppress(PackageNotFoundError):  # sigswap, run from its source tree; the others are optional
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


def measure(cell: Cell, dtype: str, peers: Sequence[str], left_out: Sequence[str] = ()) -> list[Row]:
    """The cell's rows. Only errors that leave the GPU unusable are raised; others become reasons.

    Each figure is the median of three medians, one from each of three rounds in which all had their turns.
    """
    dtype = cell.dtype or dtype
    inputs = make_inputs(cell, DTYPES[dtype], "cuda")
    refused = {peer: "It compiles or tunes for each shape; --peers runs it." for peer in peers if peer in left_out}
    implementations: dict[str, Implementation] = {}
    for name in ("sigswap", *peers):
        if name in refused:
            continue
        with refusals(name, refused):
            if name == "sigswap":
                torch.manual_seed(0)  # of dropout
                implementation = own.build(cell, inputs)
            else:
                implementation = find_peer(name).implementation(cell, inputs)
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
    timer = peak_mib if phase == "memory" else host_us if cell.suite == "host" else gpu_ms
    reasons = dict(refused)
    calls: dict[str, Callable[[], object]] = {}
    for name, implementation in implementations.items():
        if phase != "forward" and name != "sigswap" and find_peer(name).forward_only:
            reasons[name] = "It has no backward pass."
            continue
        with refusals(name, reasons), implementation.context():
            calls[name] = _call(implementation, phase)
            calls[name]()  # compiles and tunes
            torch.cuda.synchronize()
    contexts = {name: implementation.context for name, implementation in implementations.items()}
    measured = in_turns(timer, calls, contexts, reasons, rounds=3)
    return Row(cell, dtype, phase, measured, reasons)


def _call(implementation: Implementation, phase: str) -> Callable[[], object]:
    forward, leaves, grad_out = implementation[:3]
    if phase == "forward":
        return forward
    if phase == "backward":
        out = forward()
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, grad_out)
