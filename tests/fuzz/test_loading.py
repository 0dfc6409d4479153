"""The first seeds of ``python -m tests.fuzz``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import loading

PARTS = 4


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[loading.Case]]:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    yield list(loading.cases(tmp_path_factory.mktemp("saved")))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_directory_is_refused_or_computes_what_was_saved(
    cases: list[loading.Case], tmp_path: Path, part: int, checksums: bool
) -> None:
    faults = []
    for seed in range(part, 120, PARTS):
        result = loading.attempt(cases[seed % len(cases)], seed, tmp_path, checksums)
        if not checksums and result.startswith("computes"):
            continue  # of one right plan in place of another, nothing else can tell
        if result not in ("refused", "same"):
            faults.append((seed, result))
    assert faults == []
