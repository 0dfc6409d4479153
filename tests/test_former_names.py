"""What version 0.1 wrote still loads: pickles, which name its modules, and saved directories."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
from pathlib import Path

import handwritten
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sigswap
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion

WRITTEN = Path(__file__).parent / "support" / "version_0_1"
"""A converted and calibrated ``nn.TransformerEncoderLayer(8, 2, 8)``: ``converted.pickle`` holds it with an input, its
output and its reports; ``saved/`` is what ``sigswap.save`` made of it. ``plans.pickle`` holds, for each of OWNERS, its
conversion and that conversion's ``to_dict()``."""


class HeadsByBatch(handwritten.Handwritten):
    """scaled_dot_product_attention on heads*batch, heads outermost."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in self.heads(x))
        return self.merged(F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, x.shape[0])).transpose(0, 1))


OWNERS = [
    HeadsByBatch,
    handwritten.Grouped,
    handwritten.MultiQuery,
    handwritten.MergedBatches,
    handwritten.KeysFirst,
    handwritten.TwoStreams,
]


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
    model = sigswap.load(WRITTEN / "saved", allow_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(written["input"]), written["output"])


@pytest.mark.parametrize("owner", OWNERS)
def test_a_plan_of_version_0_1_loads(owner: type[handwritten.Handwritten]) -> None:
    plan, saved = pickle.loads((WRITTEN / "plans.pickle").read_bytes())[owner.__name__]
    assert plan.to_dict() == saved  # what is saved now, version 0.1 can read
    assert Conversion.from_dict(json.loads(json.dumps(saved))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    torch.manual_seed(0)
    model, x = owner().eval(), torch.randn(2, 16, handwritten.DIM)
    planned = apply_conversion(copy.deepcopy(model), plan)
    converted = sigswap.convert(model, plan.config, example_inputs=x)
    assert converted.state_dict().keys() == planned.state_dict().keys()
    with torch.no_grad():
        for name, values in converted.named_parameters():
            if ".sigswap" in f".{name}":
                values.normal_()
        planned.load_state_dict(converted.state_dict())
        torch.testing.assert_close(planned(x), converted(x), rtol=0, atol=0)
        assert not torch.equal(planned(x), sigswap.revert(converted)(x))


def test_imports_of_version_0_1() -> None:
    for former, name in [("convert", "conversion_of"), ("state", "OwnerState"), ("own_batches", "own_batches")]:
        assert hasattr(importlib.import_module(f"sigswap.{former}"), name)
    convert = importlib.import_module("sigswap.convert")  # has been split
    for name in ("convert", "inspect", "revert", "softmax", "Conversion", "apply_conversion", "owners_of"):
        assert getattr(convert, name, None) is not None, name
    assert callable(sigswap.convert) and callable(sigswap.calibrate)  # functions of the package, not modules
