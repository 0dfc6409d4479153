"""Attention implementations of transformers: changed only to what gives the same; else the user's own is swapped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from sigswap import errors
from sigswap.conversion.implementations import set_implementations
from tests.support.oracle import sigmoid_of_scores

transformers = pytest.importorskip("transformers")
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
IDS = torch.randint(1, 97, (2, 8), generator=torch.Generator().manual_seed(0))


def build(name: str, implementation: str = "eager", **config: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**SMALL, **config)
    return getattr(transformers, f"{name}ForCausalLM")._from_config(made, attn_implementation=implementation).eval()


class Far:
    """Scores fall with the distance; ``sigmoid`` makes it its own oracle."""

    def __init__(self, fused: bool) -> None:
        self.fused, self.sigmoid = fused, False
        self.__module__ = __name__

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **others: Any
    ) -> tuple[Tensor, None]:
        i = torch.arange(q.shape[2])
        bias = (i[None] - i[:, None]).to(q.dtype).masked_fill(i[None] > i[:, None], float("-inf"))
        if self.fused and not self.sigmoid:
            return F.scaled_dot_product_attention(q, k, v, bias, scale=scaling).transpose(1, 2).contiguous(), None
        scores = q @ k.mT * scaling + bias
        p = sigmoid_of_scores(scores) if self.sigmoid else scores.softmax(-1)
        return (p @ v).transpose(1, 2).contiguous(), None


@pytest.fixture(params=[False, True], ids=["by hand", "fused"])
def far(request: pytest.FixtureRequest) -> Iterator[Far]:
    interface = transformers.AttentionInterface
    function = Far(request.param)
    interface.register("far", function)
    transformers.AttentionMaskInterface.register("far", lambda *arguments, **keywords: None)
    yield function
    del interface._global_mapping["far"]


def test_a_registered_function_is_what_is_swapped(far: Far) -> None:
    model = build("Llama", "far")
    original = copy.deepcopy(model)
    sigswap.convert(model)
    assert model.config._attn_implementation == "far"
    with torch.no_grad():
        with sigswap.softmax(model):
            assert torch.equal(model(IDS).logits, original(IDS).logits)
        far.sigmoid = True
        expected = original.double()(IDS).logits
        far.sigmoid = False
        assert torch.allclose(model(IDS).logits.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2", "kernels-community/flash-attn"])
@pytest.mark.parametrize(("name", "becomes"), [("Llama", "sdpa"), ("Gemma2", "eager")])
def test_an_opaque_one_becomes_what_is_equal(name: str, implementation: str, becomes: str) -> None:
    """Gemma 2's soft cap is none of sdpa's."""
    model = build(name)
    with torch.no_grad():
        before = model(IDS).logits
    set_implementations(model, {"": implementation, "model": implementation})
    report = sigswap.inspect(model)
    assert model.config._attn_implementation == implementation
    sigswap.convert(model)
    assert model.config._attn_implementation == becomes
    for notes in (report.notes, sigswap.report(model).notes):
        assert f"was {implementation}" in notes[0] and f"is {becomes} now" in notes[0]
    with torch.no_grad(), sigswap.softmax(model):
        assert torch.allclose(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    sigswap.revert(model)
    assert model.config._attn_implementation == implementation


def test_sinks_are_never_dropped() -> None:
    model = build(
        "GptOss", num_local_experts=2, num_experts_per_tok=1, head_dim=16, layer_types=["full_attention"]
    ).bfloat16()
    set_implementations(model, {"": "flex_attention", "model": "flex_attention"})
    for strict, error in ((True, errors.UnswappableSiteError), (False, errors.NoAttentionError)):
        with pytest.raises(error, match=r"sinks|shifted"):
            sigswap.convert(model, strict=strict)
        assert model.config._attn_implementation == "flex_attention"


def test_on_the_meta_device_the_class_is_believed() -> None:
    with torch.device("meta"):
        model = build("Llama")
    set_implementations(model, {"": "flash_attention_2", "model": "flash_attention_2"})
    sigswap.convert(model)
    assert model.config._attn_implementation == "sdpa"
