"""Where the modules of version 0.1 are now: pickles of that time, and imports written for it, name the old places."""

from __future__ import annotations

import importlib
import sys

MOVED = {
    "attention": "functional.attention",
    "calibrate": "training.calibrate",
    "calibration_report": "training.calibration_report",
    "convert": "conversion.api",
    "distill": "training.distill",
    "explain": "compiling.explain",
    "mode": "conversion.mode",
    "own_batches": "training.own_batches",
    "state": "conversion.state",
}


def keep() -> None:
    """Makes ``sigswap.state`` and the like importable. Attributes of the package stay what they are (functions)."""
    for former, present in MOVED.items():
        sys.modules.setdefault(f"sigswap.{former}", importlib.import_module(f"sigswap.{present}"))
