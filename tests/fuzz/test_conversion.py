"""The first seeds of ``python -m tests.fuzz --part conversion``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fuzz import conversion


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_a_random_model_is_converted_right(seed: int, tmp_path: Path) -> None:
    assert conversion.attempt(seed, tmp_path) is None


def test_a_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = conversion.sigmoids
    monkeypatch.setattr(conversion, "sigmoids", lambda *arguments: right(*arguments) * (1 + 1e-6))
    assert "the output on the example is off" in str(conversion.attempt(2, tmp_path))


def test_models_differ() -> None:
    blocks = [block for seed in range(200) for block in conversion.drawn(seed)["blocks"]]
    for name, choices in (
        ("product", conversion.PRODUCTS),
        ("softmax", conversion.SOFTMAXES),
        ("sum", conversion.SUMS),
    ):
        assert {block[name] for block in blocks if block["kind"] == "by hand"} == set(choices)
    assert torch.equal(conversion.build(3).state_dict()["blocks.0.norm.weight"], torch.ones(conversion.DIM).double())
