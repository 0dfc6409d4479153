"""The long run: ``python -m tests.interruptions --workers 8``. It interrupts calls at each line, with both kinds of
error, and by real signals, and prints what is wrong.

``--count N``: so many interruptions, spread over the cases, and ``--minutes M``: for so long; else every line with
each error. ``--turns N``: each line's first N runs and its last. ``--signals N``: of a hundred interruptions N are
signals. ``--case NAME``: only that one. ``--line FILE:NUMBER``: only that line. ``--json FILE``: writes the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with GPUs, autograd has threads, which do not go well with copies
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from workers import Ended, in_workers

from tests.interruptions.share import NAMES, work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interruptions", description=__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--count", type=int)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--signals", type=int, default=10)
    parser.add_argument("--case", action="append", choices=NAMES)
    parser.add_argument("--line")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    start = time.monotonic()
    figures: dict[str, Any] = {
        name: {"errors": 0, "signals": 0, "wrong": 0, "seconds": 0.0} for name in given.case or NAMES
    }
    wrong: list[str] = []
    for result in in_workers(given.workers, work, given):
        if isinstance(result, Ended):
            wrong.append(f"worker {result.worker} ended with exit code {result.exit_code}")
            print(wrong[-1], flush=True)
            continue
        name, errors, signals, seconds, problems = result
        for field, value in zip(figures[name], (errors, signals, len(problems), seconds), strict=True):
            figures[name][field] += value
        for problem in problems:
            print(problem, flush=True)
        wrong += problems
    for name, figure in figures.items():
        print("{}: {errors} errors, {signals} signals, {wrong} wrong, {seconds:.0f} s".format(name, **figure))
    total = sum(figure["errors"] + figure["signals"] for figure in figures.values())
    print(f"{total} interruptions, {len(wrong)} wrong, {time.monotonic() - start:.0f} s")
    if given.json is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        summary = {"interruptions": total, "wrong": len(wrong), "versions": versions, "cases": figures}
        given.json.write_text(json.dumps({**summary, "problems": wrong}, indent=1))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
