"""How ``sigswap bench`` times, and what it does about errors and memory between two measurements."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

COPIED_BYTES = 2**30
HOST_CALLS = 100  # per timing; few enough for all their kernels to fit into the GPU's launch queue
LONG_CALLS = 3  # per timing


def in_turns(
    timer: Callable[[Callable[[], object]], float],
    calls: Mapping[str, Callable[[], object]],
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    reasons: dict[str, str],
    rounds: int,
) -> dict[str, float]:
    """The medians of each call's timings: one per round, in which all have their turns.

    Every other round goes backwards, lest a clock that drifts favour the first or the last.

    Args:
        timer: Times a call.
        calls: By name.
        contexts: By name: what to enter for the call, which is not timed.
        reasons: By name: those in here have no turn and no figure. Why a call fails goes in here.
        rounds: How many.
    """
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in reversed(figures) if number % 2 else figures:
            if name not in reasons:
                with refusals(name, reasons), contexts[name]():
                    figures[name].append(timer(calls[name]))
    return {name: statistics.median(values) for name, values in figures.items() if name not in reasons}


def gpu_ms(call: Callable[[], object]) -> float:
    """The median of CUDA event timings, with the L2 cache cleared before each."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def repeated_ms(call: Callable[[], object]) -> float:
    """The median of timings of long calls that follow one another: by CUDA events, or without a GPU by the clock.

    The first call is not timed, as it finds the GPU idle: its kernels would wait for the host, the others' need not.
    """
    call()
    if not torch.cuda.is_available():
        times = []
        for _ in range(LONG_CALLS):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        for _ in range(LONG_CALLS)
    ]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return float(statistics.median(before.elapsed_time(after) for before, after in events))


def host_us(call: Callable[[], object]) -> float:
    """Wall clock time per call of calls that wait for nothing."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / HOST_CALLS * 1e6


def peak_mib(call: Callable[[], object]) -> float:
    """The most memory that the call had allocated at one time, its results included."""
    gc.collect()  # what is freed during the call would make up for a part of it
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launched_kernels(call: Callable[[], object]) -> int:
    """How many kernels the call runs on the GPU; copies and fills by the driver do not count."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as directory:  # only the written trace tells kernels from annotations
        file = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events)


def copy_gb_per_s() -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / gpu_ms(lambda: target.copy_(source)) / 1e6


@contextmanager
def refusals(name: str, reasons: dict[str, str]) -> Iterator[None]:
    """Makes an exception the reason why ``name`` is not measured. PyTorch gives its reasons in warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            told = (warning.message for warning in caught if warning.category is UserWarning)
            texts = dict.fromkeys(str(text) for text in (error, *told))
            reasons[name] = f"{type(error).__name__}: {' '.join(texts)}"[:2000]
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises again if the GPU cannot be used any more


def free() -> None:
    """Forgets compiled code, and gives memory back."""
    torch.compiler.reset()  # also lest FlexAttention hit the limit of compilations per function
    gc.collect()
    torch.cuda.empty_cache()
