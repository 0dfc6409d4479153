"""``sigswap bench``: sigswap's op beside PyTorch's softmax attention, on one GPU, in one run.

The suites are lists of cells, a cell is one problem. In each, sigswap's result is first compared with a float64
computation of some rows and keys, so that a wrong kernel gets no figure. Then sigswap and its peers are timed in
turns, on the same tensors. The peers' results are not checked: theirs is another function (softmax). The suite models
runs whole models, and differs: see :mod:`sigswap.bench.models`.
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
from torch import Tensor

from sigswap.bench import models as bench_models
from sigswap.bench.cells import DEFAULT_SUITES, DTYPES, PEERS, SUITES, Cell, ModelCell, cells, phases
from sigswap.bench.peers import Implementation, Inputs, build, make_inputs
from sigswap.bench.results import Benchmark, Row, check_plot
from sigswap.bench.timing import copy_gb_per_s, free, gpu_ms, host_us, in_turns, peak_mib, refusals
from sigswap.errors import ArgumentError, BenchmarkError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "DEFAULT_SUITES",
    "DTYPES",
    "MODES",
    "PEERS",
    "SUITES",
    "Benchmark",
    "Cell",
    "ModelCell",
    "Row",
    "cells",
    "check",
    "check_plot",
    "expected",
    "make_inputs",
    "measure",
    "phases",
    "run",
]

MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 5e-3}
"""The relative error (Frobenius) above which a result is wrong: well above rounding, well below a misplaced mask."""


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
        suites: Of ``SUITES``; None: ``DEFAULT_SUITES``, which is all but models.
        labels: Glob patterns of the cells' labels, such as "ViT*"; None: all cells of the suites.
        peers: Of ``PEERS``; None: all, but those that compile or tune for each shape (``flex`` and
            ``triton-sigmoid``, any in models) in some cells only. Named here, they run in all cells that they can.
        dtype: Of ``DTYPES``.
        quick: The fewest cells, to see that it works.
        mode: Of torch.compile, in the suite models: of ``MODES``. None: its default.
        console: Shows the progress.

    Raises:
        ArgumentError: A suite, a peer, the dtype or the mode is unknown, or no cell has such a label.
        BenchmarkError: There is no GPU that sigswap's kernels run on.
    """
    suites = _known("suite", DEFAULT_SUITES if suites is None else suites, SUITES)
    wanted = _known("peer", peers, PEERS)
    _known("dtype", [dtype], DTYPES)
    _known("mode", [] if mode is None else [mode], MODES)
    chosen = [cell for suite in suites for cell in cells(suite, quick) if _is_labelled(cell.label, labels)]
    if not chosen:
        raise ArgumentError(f"no cell of {', '.join(suites)} has a label like {', '.join(labels or ())}.")
    _require_gpu()
    machine = _machine(["timm", "transformers"] if "models" in suites else [])
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
            named = [peer for peer in SUITES[cell.suite] if peer in wanted]
            left_out = cell.without if peers is None else ()
            try:
                if isinstance(cell, ModelCell):
                    rows += bench_models.measure(cell, dtype, named, left_out, mode=mode)
                else:
                    rows += measure(cell, dtype, named, left_out)
                free()
            except (torch.AcceleratorError, torch.OutOfMemoryError) as error:  # what was measured so far is kept
                stopped = f"The run ended in {cell.suite} {cell.label}: {error}"
                break
    return Benchmark(machine, dtype, copy, rows, stopped)


def _is_labelled(label: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(label, pattern) for pattern in patterns)


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


def _machine(packages: Sequence[str]) -> dict[str, str]:
    """The device and the versions of what runs on it, ``packages`` among them."""
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver_version(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "torch": str(torch.__version__),
    }
    for package in ("triton", "sigswap", "triton-sigmoid", *packages):
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
    inputs = make_inputs(cell, DTYPES[dtype], "cuda")
    refused = {peer: "It compiles or tunes for each shape; --peers runs it." for peer in peers if peer in left_out}
    implementations: dict[str, Implementation] = {}
    for name in ("sigswap", *peers):
        if name in refused:
            continue
        with refusals(name, refused):
            implementation = build(name, cell, inputs)
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
