"""Vision-language models and mixtures of experts of transformers convert in every dtype that they run in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import sigswap
from tests.coverage.cases import build
from tests.coverage.check import tensors_of

TYPES = {
    "llava": 4,
    "gemma3": 2,
    "paligemma": 4,
    "qwen2_5_vl": 2,
    "smolvlm": 4,
    "mixtral": 2,
    "qwen3_moe": 2,
    "olmoe": 2,
    "gpt_oss": 2,
    "granitemoe": 2,
}
"""With the number of attentions in each, small as it is built here."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_in_every_dtype(model_type: str) -> None:
    """As softmax it is bit for bit what it was, and as sigmoid near what it is in float32."""
    case = build(f"transformers/{model_type}")
    exact: list[Tensor] = []
    for dtype in DTYPES:
        model = case.make().to(dtype)
        args, kwargs = tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x,  # noqa: B023
            case.inputs,
        )
        before = _run(model, args, kwargs)
        sigswap.convert(model, example_inputs=args or kwargs)
        assert sigswap.report(model).count("swapped") == TYPES[model_type]
        after = _run(model, args, kwargs)
        with sigswap.softmax(model):
            assert all(map(torch.equal, _run(model, args, kwargs), before))
        exact = exact or after
        for x, y in zip(after, exact, strict=True):
            assert x.isfinite().all() and (x.float() - y).norm() <= 0.1 * y.norm()


def _run(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors_of(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
