"""The long run: ``python -m tests.fuzz --minutes 30``. It prints each fault with its seed, and exits 1 if there is one.

``--first SEED`` starts at another seed than 0; ``--count 1`` runs that one again. ``--no-checksums``: without what
tells one right plan from another one, so that some of these damages have to compute something else. ``--part saving``
or ``loading``: that one alone.
"""

from __future__ import annotations

import argparse
import collections
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from tests.fuzz import loading, saving

RIGHT = ("refused", "same", "old", "new", "old, by recover", "new, by recover", "old, and the new one by recover")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=sys.maxsize)
    parser.add_argument("--part", choices=["loading", "saving"])
    parser.add_argument("--no-checksums", action="store_true", help="of directories as version 0.1 wrote them")
    options = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # each names what a killed save has left
    transformers.utils.logging.disable_progress_bar()
    end = time.monotonic() + 60 * options.minutes
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [] if options.part == "saving" else list(loading.cases(folder))
        pair = None if options.part == "loading" else saving.pair(folder)
        seed = options.first
        while time.monotonic() < end and seed < options.first + options.count:
            results = []
            if cases:
                case = cases[seed % len(cases)]
                result = loading.attempt(case, seed, folder, not options.no_checksums)
                results.append((f"loading, {case.directory.name}", result))
            if pair is not None:
                results.append(("saving, a kill" if seed % 2 else "saving", saving.attempt(pair, seed, folder)))
            for kind, result in results:
                short = result.partition(" after ")[0]
                found[kind, short] += 1
                if short not in RIGHT and not result.endswith("(with a message)"):
                    faults += 1
                    print(f"seed {seed}, {kind}: {result}", flush=True)
            seed += 1
    for (kind, result), number in sorted(found.items()):
        print(f"{kind}: {result}: {number}")
    print(f"{sum(found.values())} in all, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
