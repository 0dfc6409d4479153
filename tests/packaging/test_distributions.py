"""What is built from the source: a wheel for any platform, and a source distribution with all that it takes."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sigswap

ROOT = Path(__file__).parents[2]
FOLDERS = {"sigswap": "sigswap", "passes": "sigswap/passes", "kernels": "sigswap/kernels"}
BUILD = "import sys; out = sys.argv[1]; from setuptools import build_meta as b; b.build_sdist(out); b.build_wheel(out)"


@pytest.mark.slow
def test_wheel_and_source_distribution(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path / "source", tmp_path / "out"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copyfile(ROOT / name, source / name)
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    [wheel], [archive] = out.glob("*.whl"), out.glob("*.tar.gz")
    assert wheel.name == f"sigswap-{sigswap.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        info = f"sigswap-{sigswap.__version__}.dist-info"
        metadata = email.message_from_bytes(opened.read(f"{info}/METADATA"))
        entry_points = opened.read(f"{info}/entry_points.txt").decode()
    files = {
        f"{target}/{path.relative_to(source / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (source / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == files  # no package is forgotten
    assert "sigswap/py.typed" in names
    assert metadata["Version"] == sigswap.__version__ and metadata["License-Expression"] == "Apache-2.0"
    extras = metadata.get_all("Provides-Extra")
    assert extras is not None and {"all", "demo", "hf", "onnx", "plot", "vision"} <= set(extras)
    required = metadata.get_all("Requires-Dist")
    assert required is not None
    [triton] = [line for line in required if line.startswith("triton")]
    assert "Linux" in triton and "x86_64" in triton  # nor macOS nor Windows has it
    plain = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert plain == {"torch", "triton", "numpy", "safetensors", "rich", "typer"}
    assert "sigswap = sigswap.commands.cli:main" in entry_points and "[torch_dynamo_backends]" in entry_points
    with tarfile.open(archive) as opened_archive:
        kept = {name.partition("/")[2] for name in opened_archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "kernels/dispatch.py", "passes/ops.py"} <= kept


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import fails, as on macOS and Windows
import torch
import sigswap

assert sys.modules["triton"] is None
layer, x = torch.nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.randn(1, 3, 8)
model = sigswap.convert(layer, example_inputs=x)
model(x).sum().backward()
from sigswap.commands import cli
"""


def test_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_changelog_has_the_version() -> None:
    """Or what is to be in it."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    [*headings] = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].startswith(sigswap.__version__)
