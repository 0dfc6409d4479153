"""``python -m tests.coverage``: checks every model, and writes docs/coverage.md and docs/coverage.json.

It can be stopped and goes on where it was: rows are in ``build/coverage.jsonl``. Third-party packages are those of
tests/coverage/requirements.txt.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.coverage import page, workers
from tests.coverage.cases import all_names
from tests.coverage.check import Row

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("patterns", nargs="*", help="only cases that match one: 'timm/*', 'transformers/bert'")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one for each core)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds of compute for one model (90)")
    parser.add_argument("--again", action="append", default=[], metavar="VERDICT", help="check those again; or: all")
    parser.add_argument("--results", type=Path, default=ROOT / "build/coverage.jsonl", help="the file of rows")
    parser.add_argument("--write", action="store_true", help="write the pages, also if only a part was asked for")
    options = parser.parse_args(arguments)

    names = all_names()
    wanted = [n for n in names if not options.patterns or any(fnmatch.fnmatchcase(n, p) for p in options.patterns)]
    rows = workers.read(options.results)
    again = set(options.again)
    cases = [n for n in wanted if n not in rows or "all" in again or rows[n].verdict in again]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(wanted)} models, {len(cases)} of them to be checked; rows go to {options.results}")
    random.Random(0).shuffle(cases)  # so that a part of the run is a sample of all
    if cases:
        _run(cases, options)
    rows = workers.read(options.results)
    done = [rows[name] for name in wanted if name in rows]
    print(", ".join(f"{verdict}: {number}" for verdict, number in Counter(row.verdict for row in done).most_common()))
    if options.write or not options.patterns:
        page.write([rows[name] for name in names if name in rows], names, ROOT / "docs")


def _run(cases: Sequence[str], options: argparse.Namespace) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))

        def advance(row: Row, running: Sequence[str]) -> None:
            progress.update(task, advance=1, description=", ".join(running)[:60])
            if row.verdict not in ("right", "none"):
                progress.console.print(f"{row.name}: {row.verdict}: {row.reason}", highlight=False, markup=False)

        workers.run(cases, options.results, options.workers, options.limit, advance)


if __name__ == "__main__":
    main()
