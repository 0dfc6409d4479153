"""The long run: ``python -m tests.fuzz --minutes 30``. It prints each fault with its seed, and exits 1 if there is one.

``--first SEED`` starts at another seed than 0; ``--count 1`` runs that one again. ``--no-checksums``: without what
tells one right plan from another one, so that some of these damages have to compute something else.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from tests.fuzz import loading


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=sys.maxsize)
    parser.add_argument("--no-checksums", action="store_true", help="of directories as version 0.1 wrote them")
    options = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    end = time.monotonic() + 60 * options.minutes
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        cases = list(loading.cases(Path(name)))
        seed = options.first
        while time.monotonic() < end and seed < options.first + options.count:
            case = cases[seed % len(cases)]
            result = loading.attempt(case, seed, Path(name), not options.no_checksums)
            kind = result.partition(" after ")[0]
            found[case.directory.name, kind] += 1
            if result not in ("refused", "same") and not result.endswith("(with a message)"):
                faults += 1
                print(f"seed {seed}, {case.directory.name}: {result}", flush=True)
            seed += 1
    for (kind, result), number in sorted(found.items()):
        print(f"{kind}: {result}: {number}")
    print(f"{sum(found.values())} damages of saved directories, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
