"""What a decoder's calibration adds to a conversion whose config leaves it open, and what it must not touch."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from made_once import made_once
from torch import Tensor, nn
from zoo import BY_NAME, hf, randomise

import sigswap
from sigswap.conversion.record import conversion_of
from sigswap.errors import CalibrationError

pytest.importorskip("transformers")
VOCABULARY = 61


def llama() -> Any:
    return randomise(hf("LlamaForCausalLM"), gain=0.7).eval()


@made_once
def converted(config: sigswap.SigmoidConfig | None = None) -> Any:
    return sigswap.convert(llama(), config)


def texts(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (4, 24), generator=generator)} for _ in range(count)]


def names(model: nn.Module) -> set[str]:
    """Of sigswap's parameters, without their paths."""
    return {name.rpartition(".")[2] for name, _ in model.named_parameters() if ".sigswap." in f".{name}"}


def caps(model: nn.Module) -> set[float | None]:
    owners = (module.sigswap for module in model.modules() if hasattr(type(module), "_sigswap_base"))
    return {site.row_cap for owner in owners for site in owner.sites()}


def divergence(model: Any, original: Any) -> float:
    with torch.no_grad():
        pairs = [(original(**b).logits.double(), model(**b).logits.double()) for b in texts()]
    return float(sum((t.softmax(-1) * (t.log_softmax(-1) - y.log_softmax(-1))).sum(-1).mean() for t, y in pairs))


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"query_bias": True}, {"qk_norm": "rms"}])
def test_a_decoder_gets_what_its_config_leaves_open(given: dict[str, Any], tmp_path: Path) -> None:
    original = llama()
    model = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(**given))
    assert not {"length_share", "offset"} & names(model)
    before = {name: p for name, p in model.named_parameters() if ".sigswap." in name}
    report = sigswap.calibrate(model, texts(), progress=False)
    assert {"bias", "query_weight", "length_share", "offset"} <= names(model) and caps(model) == {0.01}
    assert all(model.get_parameter(name) is p for name, p in before.items())  # an optimizer may hold them
    assert any("2 of 2 modules have the terms" in note for note in report.notes)
    if not given:
        closed = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(query_bias=True, first_token=False))
        sigswap.calibrate(closed, texts(), progress=False)
        assert names(closed) == {"bias", "query_weight"} and caps(closed) == {None}
        assert divergence(model, original) < 0.1 * divergence(closed, original)
    config = conversion_of(model).config
    assert config.query_bias is True and config.first_token is True
    sigswap.save(model, tmp_path)
    loaded = sigswap.load(tmp_path)
    assert conversion_of(loaded).config == config and caps(loaded) == {0.01}
    batch = texts(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        again = copy.deepcopy(model)
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert torch.equal(sigswap.revert(model)(**batch).logits, original(**batch).logits)
    sigswap.calibrate(again, texts(), progress=False)  # nothing is open any more
    assert not any("modules have the terms" in note for note in sigswap.report(again).notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        sigswap.SigmoidConfig(query_bias=False, first_token=False),
        sigswap.SigmoidConfig(bias=24),
        sigswap.SigmoidConfig(bias=-3.0),
        sigswap.SigmoidConfig(learn_bias=False, query_bias=True),
        sigswap.SigmoidConfig.from_scratch(n=24),
    ],
)
def test_what_a_config_says_is_as_it_says(config: sigswap.SigmoidConfig) -> None:
    model = converted(config)
    before = names(model)
    sigswap.calibrate(model, texts(), progress=False)
    assert names(model) == before and caps(model) == {None} and conversion_of(model).config == config


def test_encoders_and_vision_models_get_none() -> None:
    for name in ("bert", "vit", "t5"):
        entry = BY_NAME[name]
        inputs = entry.make_inputs()
        model = sigswap.convert(entry.build(), example_inputs=inputs)
        sigswap.calibrate(model, [inputs], progress=False)
        assert names(model) == {"bias"} and caps(model) == {None}


def test_by_path() -> None:
    config = sigswap.SigmoidConfig(overrides={"*.0.*": {"first_token": False}})
    model = converted(config)
    sigswap.calibrate(model, texts(), progress=False)
    first, second = (model.model.layers[index].self_attn.sigswap.site(0) for index in range(2))
    assert first.query_weight is not None and first.length_share is None and first.row_cap is None
    assert second.query_weight is not None and second.length_share is not None and second.row_cap == 0.01
    again = sigswap.convert(llama(), conversion_of(model).config)
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in model.named_parameters()
    }


class Summed(nn.Module):
    """A decoder whose scores are the sum of two products: w_h cannot be, for there is no one query."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.attention = SummedAttention()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.attention(self.embed(input_ids)))


class SummedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Linear(16, 80)

    def forward(self, x: Tensor) -> Tensor:
        q, k, r, s, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.parts(x).chunk(5, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = ((q @ k.mT + r @ s.mT) * 8**-0.5).masked_fill(hidden, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_without_one_product_there_is_the_first_key_alone() -> None:
    torch.manual_seed(0)
    batches = [(batch["input_ids"],) for batch in texts()]
    model = sigswap.convert(Summed(), example_inputs=batches[0])
    sigswap.calibrate(model, batches, progress=False)
    assert names(model) == {"bias", "length_share", "offset"} and caps(model) == {0.01}
    assert conversion_of(model).config.query_bias is False


def test_a_failed_calibration_adds_nothing() -> None:
    model = converted()
    conversion = conversion_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**texts(1)[0]).logits
    wrong = [*texts(), {"input_ids": torch.tensor([[10**6]])}]
    with pytest.raises(CalibrationError, match="batch 3"):
        sigswap.calibrate(model, wrong, lookups=False, progress=False)
    assert names(model) == {"bias"} and conversion_of(model) is conversion
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        assert torch.equal(model(**texts(1)[0]).logits, expected)
    state = model.model.layers[0].self_attn.sigswap
    assert not state.intercepts_products and not state.site(0).acts_on_product


def test_terms_that_are_added_in_inference_mode_can_be_trained() -> None:
    model = converted()
    with torch.inference_mode():
        sigswap.calibrate(model, texts(), progress=False)
    model(**texts(1)[0]).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".sigswap." in name)


@pytest.mark.parametrize(
    ("config", "as_data"),
    [
        (sigswap.SigmoidConfig(), {}),
        (sigswap.SigmoidConfig(query_bias=False, first_token=False), {"query_bias": False}),
        (sigswap.SigmoidConfig(query_bias=True, first_token=True), {"query_bias": True, "first_token": True}),
        (sigswap.SigmoidConfig(query_bias=True), {"query_bias": True, "first_token": None}),
    ],
)
def test_saved_configs(config: sigswap.SigmoidConfig, as_data: dict[str, Any]) -> None:
    """Version 0.1 has query_bias, False by default, and no first_token."""
    data = config.to_dict()
    assert {name: data[name] for name in ("query_bias", "first_token") if name in data} == as_data
    assert sigswap.SigmoidConfig.from_dict(data) == config
    assert not sigswap.SigmoidConfig.from_dict({"query_bias": True}).first_token
    assert sigswap.SigmoidConfig.from_dict({"query_bias": True}).open_fields() == []


def test_a_pickle_of_version_0_1_leaves_nothing_open() -> None:
    state = {name: x for name, x in vars(sigswap.SigmoidConfig(query_bias=False)).items() if name != "first_token"}
    old = sigswap.SigmoidConfig.__new__(sigswap.SigmoidConfig)
    old.__setstate__(state)
    assert old == sigswap.SigmoidConfig(query_bias=False, first_token=False) and not old.open_fields()
    open_ = sigswap.SigmoidConfig()
    assert pickle.loads(pickle.dumps(open_)) == open_ and open_.open_fields() == ["query_bias", "first_token"]
