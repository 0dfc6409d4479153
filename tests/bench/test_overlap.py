"""What of NCCL's time other kernels cover, from a trace's events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sigswap.bench.distributed.overlap import STEPS, Overlap, overlap_of, profiled


def event(name: str, start: float, stop: float, cat: str = "kernel", **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": stop - start, **more}


def test_what_is_covered() -> None:
    events = [
        event("sigmoid_forward", 0, 4000),
        event("ncclDevKernel_SendRecv(args)", 1000, 6000, tid=20),
        event("ncclDevKernel_AllReduce", 5000, 6500, tid=21),  # beside the other one
        event("sigmoid_forward", 7000, 9000),
        event("elementwise", 8000, 10000),
        event("Memcpy DtoD", 11000, 12000, "gpu_memcpy"),
        event("aten::add", 0, 90000, "cpu_op"),
        event("ncclAllGather", 0, 90000, "cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]
    found = overlap_of(events, 2)
    assert found == Overlap(computing=4.0, communicating=2.75, exposed=1.25, idle=0.75)
    assert found.step == 6.0 and found.share == pytest.approx(1.25 / 6)


def test_nothing() -> None:
    assert overlap_of([], 3) == Overlap(0, 0, 0, 0) and overlap_of([], 3).share == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_of_a_gpu(tmp_path: Path) -> None:
    x = torch.randn(2048, 2048, device="cuda")
    found = profiled(lambda: x @ x, tmp_path / "trace.json")
    assert found.computing > 0 and found.communicating == found.exposed == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(each.get("cat") == "kernel" for each in events) >= STEPS
