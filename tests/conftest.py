"""What all tests share: no network, one thread, a fresh compiler, a sample of the slow ones.

Modules that they import are in tests/support.
"""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Iterator

# Before transformers is imported by anyone: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

# A process of tests holds half a million objects for good: by default a sixth of the time goes into looking at them.
gc.set_threshold(10_000, 10, 10)

# Tiny tensors: more threads only add overhead, and fight with pytest-xdist's workers.
torch.set_num_threads(1)


SAMPLE = 12
"""Of the cases of each test that is marked slow, one in so many is run, the same ones each time, and at least one. Of
tests without cases likewise, of all that one file has."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help=f"run all tests that are marked slow, not one in {SAMPLE}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or config.getoption("keyword") or any("::" in each for each in config.args):
        return  # who names tests gets them
    cases: dict[str, list[str]] = {}
    for item in items:
        if item.get_closest_marker("slow") is not None:
            test, case, _ = item.nodeid.partition("[")
            cases.setdefault(test if case else test.partition("::")[0], []).append(item.nodeid)
    left_out: set[str] = set()
    for each in cases.values():
        each.sort(key=lambda case: zlib.crc32(case.encode()))
        left_out.update(each[-(-len(each) // SAMPLE) :])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What is there by now, most of it imported, stays: neither the garbage collector nor a conversion, which looks for
    tensors among all that the collector knows, goes through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def thawed() -> Iterator[None]:
    """For tests in which a conversion has to find what a module of tests holds."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No test sees another's compiled code, guards, recompile counts or grad mode."""
    yield
    assert torch.is_grad_enabled(), "the test has switched gradients off"
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
