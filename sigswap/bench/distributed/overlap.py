"""What of a step's communication runs while the GPU computes, and what does not: from the kernels that it ran, by
torch.profiler.

NCCL sends and receives in kernels of its own, on streams of its own. Their time has parts in which another kernel runs,
too, and parts in which none does. It includes the wait for a rank that is late.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

STEPS = 3
"""That are profiled."""

_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Milliseconds per step of one GPU.

    Attributes:
        computing: Some kernel runs that is not NCCL's, or memory is copied.
        communicating: A kernel of NCCL's runs.
        exposed: A kernel of NCCL's runs, and nothing else.
        idle: Nothing runs.
    """

    computing: float
    communicating: float
    exposed: float
    idle: float

    @property
    def step(self) -> float:
        """From the first kernel to the last one."""
        return self.computing + self.exposed + self.idle

    @property
    def share(self) -> float:
        """``exposed`` as a part of the step, from 0 to 1."""
        return self.exposed / self.step if self.step > 0 else 0.0


class _Interval(NamedTuple):
    start: float
    stop: float


def profiled(step: Callable[[], object], trace: Path) -> Overlap:
    """Runs some steps on this process's GPU. Its trace is written to ``trace``: JSON that Perfetto and Chrome show."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found.export_chrome_trace(str(trace))
    return overlap_of(json.loads(trace.read_text())["traceEvents"], STEPS)


def overlap_of(events: Iterable[Mapping[str, Any]], steps: int) -> Overlap:
    """Of the events of a trace in Chrome's format, in microseconds, of ``steps`` steps."""
    computing: list[_Interval] = []
    communicating: list[_Interval] = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _WORK:
            start = float(event["ts"])
            kind = communicating if event["name"].lower().startswith("nccl") else computing
            kind.append(_Interval(start, start + float(event["dur"])))
    apart, together = _length(computing), _length([*computing, *communicating])
    ends = [*computing, *communicating]
    span = max(each.stop for each in ends) - min(each.start for each in ends) if ends else 0.0
    per_step = (apart, _length(communicating), together - apart, span - together)
    return Overlap(*(1e-3 * microseconds / steps for microseconds in per_step))


def _length(intervals: Iterable[_Interval]) -> float:
    """Of their union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
