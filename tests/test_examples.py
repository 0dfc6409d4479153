"""The examples run from beginning to end, with few steps, and draw their pictures.

Their figures are in docs/results.md.
What examples/minilm.py runs is tested by test_demo.py and test_calibrate.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "arguments", "needs", "pictures", "batches"),
    [
        ("digits_vit", ("--steps", "20", "--tuning-steps", "2"), ("timm", "sklearn"), {"digits.png", "heads.png"}, 20),
        ("decoder", ("--small", "--steps", "20"), ("transformers",), {"decoder.png", "heads.png"}, 4),
    ],
)
def test_example(
    name: str, arguments: tuple[str, ...], needs: tuple[str, ...], pictures: set[str], batches: int, tmp_path: Path
) -> None:
    for package in ("matplotlib", *needs):
        pytest.importorskip(package)
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, "--out", str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert f"calibration on {batches} batches" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures


def test_the_extra_of_the_examples_reads_gguf_files() -> None:
    """transformers needs both for the weights of examples/smollm.py, which imports neither."""
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"accelerate", "gguf"} <= set(project["optional-dependencies"]["examples"])


def test_the_example_of_distillations_speed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = tmp_path / "speed.json"
    subprocess.run(
        [sys.executable, str(EXAMPLES / "distillation_speed.py"), "--small", "--json", str(found)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=300,
    )
    rows = json.loads(found.read_text())
    assert set(rows) == {"training", "distillation"} and min(rows.values()) > 0
