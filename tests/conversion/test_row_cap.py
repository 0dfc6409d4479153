"""SigmoidConfig(row_cap=C) through the life of a converted model, against float64."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import handwritten
import pytest
import torch
from graphs import Graphs
from handwritten import MODELS, Handwritten
from torch import Tensor, nn

import sigswap
from sigswap import SigmoidConfig
from sigswap.conversion.record import conversion_of
from sigswap.errors import ConfigError, NotConvertedError

CAP = 0.6


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


def oracle_of(model: Handwritten, row_cap: float = CAP) -> Handwritten:
    exact = copy.deepcopy(model).double()
    exact.normalise = handwritten.capped(row_cap)
    return exact


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_handwritten_models(kind: type[Handwritten]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 12, handwritten.DIM)
    expected = oracle_of(model)(x.double())
    before = copy.deepcopy(model)
    sigswap.convert(model, SigmoidConfig(row_cap=CAP), example_inputs=x)
    close(model(x), expected)
    graphs = Graphs()
    close(graphs.compile(model)(x), expected)
    assert len(graphs.calls) == kind.sites and graphs.unfused == 0
    close(torch.export.export(model, (x,)).module()(x), expected)
    sigswap.revert(model)
    assert torch.equal(model(x), before(x))


class Fused(nn.Module):
    """Two attentions: scaled_dot_product_attention, and torch.nn's module, whose weights are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Own()
        self.second = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        output, weights = self.second(x, x, x)
        return output, weights


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


def made() -> tuple[Fused, Tensor]:
    torch.manual_seed(0)
    return Fused().eval(), 3 * torch.randn(2, 9, 16)


def oracle(model: Fused, x: Tensor, caps: tuple[float | None, float | None]) -> tuple[Tensor, Tensor]:
    model, x = copy.deepcopy(model).double(), x.double()

    def normalise(scores: Tensor, cap: float | None) -> Tensor:
        return (handwritten.sigmoid if cap is None else handwritten.capped(cap))(scores, -1)

    q, k, v = model.first.qkv(x).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 8**0.5).masked_fill(~torch.ones(9, 9).tril().bool(), -math.inf)
    x = (normalise(scores, caps[0]) @ v).transpose(1, 2).flatten(2)
    own = model.second
    projected = nn.functional.linear(x, own.in_proj_weight, own.in_proj_bias)
    q, k, v = projected.view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    weights = normalise(q @ k.mT / 8**0.5, caps[1])
    return own.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights.mean(1)


CONFIGS: dict[str, tuple[SigmoidConfig, tuple[float | None, float | None]]] = {
    "all": (SigmoidConfig(row_cap=0.4), (0.4, 0.4)),
    "one": (SigmoidConfig(overrides={"second": {"row_cap": 0.3}}), (None, 0.3)),
    "all but one": (SigmoidConfig(row_cap=0.4, overrides={"sec*": {"row_cap": None}}), (0.4, None)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", [None, "aot_eager", "sigswap"])
def test_per_site(name: str, backend: str | None) -> None:
    config, caps = CONFIGS[name]
    model, x = made()
    expected = oracle(model, x, caps)
    sigswap.convert(model, config, example_inputs=x)
    run: Any = model if backend is None else torch.compile(model, backend=backend)
    for actual, exact in zip(run(x), expected, strict=True):
        close(actual, exact)
    assert [m.row_cap for m in (model.first.sigswap.site(0), model.second.sigswap.site(0))] == list(caps)


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    x = (3 * torch.randn(2, 9, 16)).requires_grad_()
    exact = copy.deepcopy(attention).double()
    sigswap.convert(attention, SigmoidConfig(row_cap=0.4), example_inputs=(x, x, x))
    out = attention(x, x, x, need_weights=need_weights)[0]
    x64 = x.detach().double().requires_grad_()
    q, k, v = (
        nn.functional.linear(x64, exact.in_proj_weight, exact.in_proj_bias).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    )
    weights = handwritten.capped(0.4)(q @ k.mT / 8**0.5, -1)
    expected = exact.out_proj((weights @ v).transpose(1, 2).flatten(2))
    close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), [x, attention.in_proj_weight])
    for ours, theirs in zip(
        grads, torch.autograd.grad(expected.square().sum(), [x64, exact.in_proj_weight]), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_loaded_copied_and_reported(name: str, tmp_path: Path) -> None:
    config, caps = CONFIGS[name]
    model, x = made()
    sigswap.convert(model, config, example_inputs=x)
    expected = model(x)
    sigswap.save(model, tmp_path, factory=f"{__name__}:Fused")
    for other in (sigswap.load(tmp_path, allow_code=True), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x)[0], expected[0])
        text = str(sigswap.report(other))
        assert all(f"{cap:.4g} (1 attentions)" in text for cap in caps if cap is not None and caps[0] != caps[1])
        assert "Row cap: " in text and f"row_cap={max(cap or 0 for cap in caps)}" in repr(other)
    assert "Row cap" not in str(sigswap.report(sigswap.convert(made()[0], example_inputs=x)))


def test_a_model_that_was_pickled_before_there_were_caps() -> None:
    model, x = made()
    sigswap.convert(model, example_inputs=x)
    expected = model(x)[0]
    for state in (model.first.sigswap, model.second.sigswap):
        del vars(state.site(0))["row_cap"]
    assert torch.equal(model(x)[0], expected) and "row_cap" not in repr(model)


def test_set_row_cap(tmp_path: Path) -> None:
    model, x = made()
    plain = copy.deepcopy(model)
    config = SigmoidConfig(row_cap=0.4, overrides={"*": {"bias": "visible"}, "second": {"row_cap": 0.1}})
    sigswap.convert(model, config, example_inputs=x)
    compiled = torch.compile(model, backend="aot_eager")
    changes: list[tuple[Any, tuple[float | None, float | None]]] = [
        (0.8, (0.8, 0.8)),
        ({"second": None}, (0.8, None)),
        ({"first": 2, "second": 0.5}, (2, 0.5)),
        (None, (None, None)),
        ({"first": 0.7}, (0.7, None)),
    ]
    for number, (change, caps) in enumerate(changes):
        assert sigswap.set_row_cap(model, change) is model
        expected = oracle(plain, x, caps)
        for actual, exact in zip((*model(x), *compiled(x)), expected * 2, strict=True):
            close(actual, exact)
        sigswap.save(model, tmp_path / str(number), factory=f"{__name__}:Fused")
        close(sigswap.load(tmp_path / str(number), allow_code=True).eval()(x)[0], expected[0])
        assert [conversion_of(model).config.for_path(path).row_cap for path in ("first", "second")] == list(caps)


def test_set_row_cap_fails_without_a_trace() -> None:
    model, x = made()
    with pytest.raises(NotConvertedError):
        sigswap.set_row_cap(model, 0.5)
    sigswap.convert(model, SigmoidConfig(row_cap=0.4), example_inputs=x)
    before = conversion_of(model)
    for change in (0.0, {"first": -1.0}, {"first": 0.5, "third": 0.5}, math.nan):
        with pytest.raises(ConfigError, match="row_cap"):
            sigswap.set_row_cap(model, change)  # type: ignore[arg-type]
        assert conversion_of(model) is before and model.first.sigswap.site(0).row_cap == 0.4


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan, "1", True])
def test_errors_of_the_config(cap: Any) -> None:
    with pytest.raises(ConfigError, match="row_cap must be a positive finite number where it is given"):
        SigmoidConfig(row_cap=cap)
    with pytest.raises(ConfigError, match="row_cap"):
        SigmoidConfig(overrides={"*": {"row_cap": cap}})


def test_the_config_as_plain_data() -> None:
    config = SigmoidConfig(row_cap=0.5, overrides={"a": {"row_cap": None}})
    assert SigmoidConfig.from_dict(config.to_dict()) == config
    old = {name: value for name, value in SigmoidConfig().to_dict().items() if name != "row_cap"}
    assert SigmoidConfig.from_dict(old) == SigmoidConfig() and SigmoidConfig().row_cap is None


def small_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, **heads, attn_implementation="sdpa", initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_decoder_generates_pads_and_comes_back_from_pretrained(tmp_path: Path) -> None:
    model = small_llama()
    softmax = copy.deepcopy(model)
    sigswap.convert(model, SigmoidConfig(row_cap=0.3))
    ids = torch.randint(50, (2, 7))
    full = model(ids).logits
    assert not torch.allclose(full, softmax(ids).logits, atol=1e-3)
    assert not torch.allclose(full, sigswap.convert(softmax)(ids).logits, atol=1e-3)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(out, plain)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(10) >= 3).long().expand(2, 10)
    positions = (torch.arange(10) - 3).clamp(min=0).expand(2, 10)
    shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(shifted, full, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, full)
    graphs = Graphs()
    torch.testing.assert_close(graphs.compile(loaded)(ids).logits, full, rtol=1e-4, atol=1e-4)
    assert {node.kwargs["row_cap"] for node in graphs.calls} == {0.3} and len(graphs.calls) == 2
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)(ids).logits, full)
