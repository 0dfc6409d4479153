"""``python -m tests.interruptions``: interrupts every line of the calls, several times, and prints what is wrong.

``--turns N``: each line's first N runs and its last. ``--case NAME``: only that one. ``--share I/N``: a part of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch

from tests.interruptions.cases import CASES
from tests.interruptions.check import ERRORS, Checked


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--case", action="append")
    parser.add_argument("--share", default="0/1")
    given = parser.parse_args()
    part, parts = map(int, given.share.split("/"))
    torch.set_num_threads(1)
    total = wrong = 0
    for name in given.case or CASES:
        start = time.monotonic()
        checked = Checked(name, given.turns)
        problems = []
        lines = checked.lines[part::parts]
        for at in lines:
            for kind in ERRORS:
                problem = checked.problem(at, kind)
                if problem is not None:
                    problems.append(problem)
        total += 2 * len(lines)
        wrong += len(problems)
        print(
            f"{name}: {2 * len(lines)} interruptions, {len(problems)} wrong, {time.monotonic() - start:.0f} s",
            flush=True,
        )
        for problem in problems[:40]:
            print("  ", problem, flush=True)
    print(f"{total} interruptions, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
