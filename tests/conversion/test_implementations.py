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


@pytest.mark.slow
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


def test_sinks_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss, set to flex attention: its softmax has the sinks, its sigmoid does not."""
    from transformers.models.gpt_oss import modeling_gpt_oss

    model = build("GptOss", num_local_experts=2, num_experts_per_tok=1, head_dim=16, layer_types=["full_attention"])
    torch.nn.init.constant_(model.model.layers[0].self_attn.sinks, 3.0)
    set_implementations(model, {"": "eager", "model": "eager"})
    with torch.no_grad():
        before = model(IDS).logits
    set_implementations(model, {"": "flex_attention", "model": "flex_attention"})
    sigswap.convert(model)
    assert model.config._attn_implementation == "eager"
    with torch.no_grad(), sigswap.softmax(model):
        assert torch.allclose(model(IDS).logits, before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        after = model(IDS).logits
    sigswap.revert(model)

    def eager(module, query, key, value, attention_mask, scaling, **others):  # type: ignore[no-untyped-def]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = query @ key.mT * scaling + attention_mask
        return (sigmoid_of_scores(scores) @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", eager)
    set_implementations(model, {"": "eager", "model": "eager"})
    with torch.no_grad():
        assert torch.allclose(after, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


def test_on_the_meta_device_the_class_is_believed() -> None:
    with torch.device("meta"):
        model = build("Llama")
    set_implementations(model, {"": "flash_attention_2", "model": "flash_attention_2"})
    sigswap.convert(model)
    assert model.config._attn_implementation == "sdpa"
