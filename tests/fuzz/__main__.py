"""The long run: ``python -m tests.fuzz --minutes 30 --workers 2``. It prints each fault with the arguments that repeat
it, and exits 1 if there is one.

``--soak``: instead of the parts, one program that converts, trains, saves and loads all the time, and must not grow.

``--part NAME``: that one alone, or several; else all of them, each with its share of the time. ``--first SEED``: from
that number on. ``--count N``: so many numbers of each part. ``--json FILE``: writes the figures.

Of the op: ``--device cuda``, ``--dtype bfloat16``. Of loading: ``--no-checksums``, without what tells one right plan
from another one, so that some of these damages have to compute something else.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from workers import Ended, in_workers

from tests.fuzz.parts import PARTS, work

MOST_SHOWN = 20
"""Faults of one part that are printed; all are counted, and in the JSON."""


def soaked(minutes: float) -> int:
    import transformers

    from tests.fuzz.soak import soak

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    faults = soak(minutes)
    print("\n".join([*faults, f"{len(faults)} faults"]))
    return int(bool(faults))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=sys.maxsize // 2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float16", "float32", "float64"])
    parser.add_argument("--no-checksums", action="store_true", help="of directories as version 0.1 wrote them")
    given = parser.parse_args()
    given.part = given.part or list(PARTS)
    if given.minutes is None:
        given.minutes = 30.0 if given.count == sys.maxsize // 2 else float("inf")
    if given.soak:
        return soaked(given.minutes)
    start = time.monotonic()
    results: collections.Counter[tuple[str, str, str]] = collections.Counter()
    worst: dict[str, float] = {}
    faults: list[str] = []
    shown: collections.Counter[str] = collections.Counter()
    for found in in_workers(given.workers, work, given):
        if isinstance(found, Ended):
            faults.append(f"worker {found.worker} ended with exit code {found.exit_code}")
            print(faults[-1], flush=True)
            continue
        for (kind, result), number in found.results.items():
            results[found.part, kind, result] += number
        for kind, share in found.worst.items():
            worst[f"{found.part}, {kind}"] = max(worst.get(f"{found.part}, {kind}", 0.0), share)
        for fault in found.faults:
            shown[found.part] += 1
            if shown[found.part] <= MOST_SHOWN:
                print(fault, flush=True)
        faults += found.faults
    for (part, kind, result), number in sorted(results.items()):
        print(f"{part}, {kind}: {result}: {number}")
    for name, share in sorted(worst.items()):
        if share:
            print(f"{name}: errors of at most {share:.2f} of the bound")
    print(f"{results.total()} in all, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    if given.json is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        summary: dict[str, Any] = {"all": results.total(), "faults": faults, "versions": versions, "worst": worst}
        summary["results"] = [[*key, number] for key, number in sorted(results.items())]
        given.json.write_text(json.dumps(summary, indent=1))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
