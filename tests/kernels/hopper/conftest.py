"""What the tests of the kernels for Hopper GPUs share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors need no memory to be at an address."""
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)
