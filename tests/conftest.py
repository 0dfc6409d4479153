"""What all tests share: no network, one thread, a fresh compiler, a sample of the slow ones.

Modules that they import are in tests/support.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator

# Before transformers is imported by anyone: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

# Tiny tensors: more threads only add overhead, and fight with pytest-xdist's workers.
torch.set_num_threads(1)


SAMPLE = 4
"""Of the tests marked slow, one in so many is run, the same ones each time."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help=f"run all tests that are marked slow, not one in {SAMPLE}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or config.getoption("keyword") or any("::" in each for each in config.args):
        return  # who names tests gets them
    drawn = [
        item.get_closest_marker("slow") is None or zlib.crc32(item.nodeid.encode()) % SAMPLE == 0 for item in items
    ]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, drawn, strict=True) if not kept])
    items[:] = [item for item, kept in zip(items, drawn, strict=True) if kept]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No test sees another's compiled code, guards or recompile counts."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
