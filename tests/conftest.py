"""What all tests share: the zoo and the oracle as modules, no network, one thread, a fresh compiler."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported by anyone: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

# Tiny tensors: more threads only add overhead, and fight with pytest-xdist's workers.
torch.set_num_threads(1)


def _load(name: str) -> None:
    """Makes tests/<name>.py importable as ``name``.

    Not by putting tests/ on sys.path: there, tests/sigswap would be found as a namespace package before an
    editable install of sigswap is.
    """
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # also where pickle looks the hand-written classes up
    spec.loader.exec_module(module)


_load("graphs")
_load("h100")
_load("handwritten")
_load("oracle")
_load("zoo")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No test sees another's compiled code, guards or recompile counts."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
