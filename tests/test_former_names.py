"""What version 0.1 wrote still loads: pickles, which name its modules, and saved directories."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import torch

import sigswap

WRITTEN = Path(__file__).parent / "support" / "version_0_1"
"""A converted and calibrated ``nn.TransformerEncoderLayer(8, 2, 8)``: ``converted.pickle`` holds it with an input, its
output and its reports; ``saved/`` is what ``sigswap.save`` made of it."""


def test_a_pickle_of_version_0_1_loads() -> None:
    written = pickle.loads((WRITTEN / "converted.pickle").read_bytes())
    model = written["model"]
    with torch.no_grad():
        torch.testing.assert_close(model(written["input"]), written["output"])
    assert sigswap.report(model).to_dict() == written["report"].to_dict()
    assert written["calibration"].heads
    assert pickle.loads(pickle.dumps(model)).state_dict().keys() == model.state_dict().keys()
    assert not sigswap.is_converted(sigswap.revert(model))


def test_a_directory_of_version_0_1_loads() -> None:
    written = pickle.loads((WRITTEN / "converted.pickle").read_bytes())
    model = sigswap.load(WRITTEN / "saved")
    with torch.no_grad():
        torch.testing.assert_close(model(written["input"]), written["output"])


def test_imports_of_version_0_1() -> None:
    for former, name in [("convert", "conversion_of"), ("state", "OwnerState"), ("own_batches", "own_batches")]:
        assert hasattr(importlib.import_module(f"sigswap.{former}"), name)
    convert = importlib.import_module("sigswap.convert")  # has been split
    for name in ("convert", "inspect", "revert", "softmax", "Conversion", "apply_conversion", "owners_of"):
        assert getattr(convert, name, None) is not None, name
    assert callable(sigswap.convert) and callable(sigswap.calibrate)  # functions of the package, not modules
