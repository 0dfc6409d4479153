"""Tests that run in Triton's interpreter, in a process of their own: Triton reads TRITON_INTERPRET when it is imported,
which another test may have done already."""

from __future__ import annotations

import os
import subprocess
import sys


def run_interpreted(file: str, shard: int) -> None:
    """Runs the tests of ``file`` that have "interpreted" and the shard in their names; they have to pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    command += ["-o", "addopts=--import-mode=importlib"]  # no xdist in there
    command += ["-p", "no:hypothesispytest"]  # which imports hypothesis for its summary
    selection = ["-k", f"interpreted and shard{shard}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command + selection, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
