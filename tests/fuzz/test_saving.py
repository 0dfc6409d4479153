"""The first seeds of ``python -m tests.fuzz``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import saving


@pytest.mark.slow
def test_an_interrupted_save_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    pair = saving.pair(tmp_path)
    results = {seed: saving.attempt(pair, seed, tmp_path) for seed in range(30)}
    assert {seed: result for seed, result in results.items() if not result.startswith(("old", "new"))} == {}
