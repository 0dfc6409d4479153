"""Checks cases in processes of their own, each within a time limit, and writes a row to a file as each one ends."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests.coverage.check import Row

CASES_OF_A_WORKER = 60
"""After so many a worker is replaced: libraries keep what they were asked for."""
WAITING = 20
"""Times the limit: longer than any machine that is shared lets a process wait."""
MEMORY = 8 << 30
"""Bytes that a process may take: a model that cannot be made small fails to be built, and takes nothing else down."""


class _Worker:
    """A process that checks one case at a time; ``case``: the one it has."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.case: str | None = None
        self.begun, self.begun_at = 0.0, 0.0
        self.done = 0

    def give(self, case: str) -> None:
        self.pipe.send(case)
        self.case, self.begun, self.begun_at = case, self.work(), time.monotonic()

    def work(self) -> float:
        """Seconds of compute that the process has had; where the system does not say, those that went by."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return time.monotonic()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_over(self, limit: float) -> bool:
        """Whether its case has had more than ``limit`` seconds of compute, or waits for something for ever."""
        return self.work() - self.begun > limit or time.monotonic() - self.begun_at > WAITING * limit

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import warnings

    import torch

    from tests.coverage.cases import build
    from tests.coverage.check import check

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    pipe.send("ready")
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(dataclasses.asdict(check(name, lambda name=name: build(name))))


def run(
    cases: Sequence[str], results: Path, workers: int, limit: float, progress: Callable[[Row, Sequence[str]], None]
) -> None:
    """Checks ``cases`` and appends their rows to ``results``, a file of JSON lines.

    ``limit``: seconds of compute for one case. ``progress`` is called with each row, and with the cases that run now.
    """
    commit = _commit()
    waiting = list(reversed(cases))
    crew = [_Worker() for _ in range(min(workers, len(cases)))]
    try:
        with results.open("a", encoding="utf-8") as file:
            for worker, row in _rows(crew, waiting, limit):
                row.commit = commit
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
                file.flush()
                del worker
                progress(row, [each.case for each in crew if each.case])
    finally:
        for each in crew:
            each.end()


def _rows(crew: list[_Worker], waiting: list[str], limit: float) -> Iterator[tuple[_Worker, Row]]:
    ready: set[int] = set()
    while waiting or any(worker.case for worker in crew):
        for place, worker in enumerate(crew):
            if worker.case is not None or not waiting:
                continue
            if worker.done >= CASES_OF_A_WORKER:
                ready.discard(id(worker))
                worker.end()
                worker = crew[place] = _Worker()
            if id(worker) in ready:
                worker.give(waiting.pop())
        for pipe in wait([worker.pipe for worker in crew], timeout=1.0):
            place = next(i for i, worker in enumerate(crew) if worker.pipe is pipe)
            worker = crew[place]
            try:
                message = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                case = worker.case
                worker.end()
                if case is None:
                    raise RuntimeError("a worker ended before it was given anything to do") from None
                crew[place] = _Worker()
                yield worker, Row(case, "died", f"exit code {worker.process.exitcode}")
                continue
            if message == "ready":
                ready.add(id(worker))
                continue
            worker.case = None
            worker.done += 1
            yield worker, Row(**message)
        for place, worker in enumerate(crew):
            if worker.case is not None and worker.is_over(limit):
                case = worker.case
                worker.end()
                crew[place] = _Worker()
                yield worker, Row(case, "too slow", f"more than {limit:g} s", seconds=limit)


def _commit() -> str:
    """That of the working tree; "" outside of one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip()


def read(results: Path) -> dict[str, Row]:
    """The last row of each case in the file."""
    if not results.exists():
        return {}
    rows = (Row(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines() if line.strip())
    return {row.name: row for row in rows}
