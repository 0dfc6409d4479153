"""Where the modules of version 0.1 are now: pickles of that time, and imports written for it, name the old places."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

MOVED = {
    "attention": ("functional.attention",),
    "calibrate": ("training.calibrate",),
    "calibration_report": ("training.calibration_report",),
    "convert": ("api", "conversion.record", "conversion.install", "conversion.softmax"),
    "distill": ("training.distill",),
    "explain": ("compiling.explain",),
    "mode": ("conversion.mode",),
    "own_batches": ("training.own_batches",),
    "state": ("conversion.state",),
}
"""By the former name, the modules that hold what was there; where it was split, the former one has all their names."""


def keep() -> None:
    """Makes ``sigswap.state`` and the like importable. Attributes of the package stay what they are (functions)."""
    for former, present in MOVED.items():
        name = f"sigswap.{former}"
        modules = [importlib.import_module(f"sigswap.{module}") for module in present]
        sys.modules.setdefault(name, modules[0] if len(modules) == 1 else _joined(name, modules))


def _joined(name: str, modules: list[ModuleType]) -> ModuleType:
    joined = ModuleType(name)
    for module in reversed(modules):
        vars(joined).update({key: value for key, value in vars(module).items() if not key.startswith("__")})
    return joined
