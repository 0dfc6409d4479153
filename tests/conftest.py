"""What all tests share: no network, one thread, a fresh compiler. Modules that they import are in tests/support."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Before transformers is imported by anyone: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

# Tiny tensors: more threads only add overhead, and fight with pytest-xdist's workers.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """No test sees another's compiled code, guards or recompile counts."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
