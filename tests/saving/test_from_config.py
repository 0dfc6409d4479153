"""Models of transformers that are built from the config of a converted directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sigswap

transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = transformers.LlamaForCausalLM(config).eval()
    sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True, row_cap=0.5))
    sigswap.save(model, directory)
    return directory


def built(config: Any, **arguments: Any) -> dict[str, Any]:
    return {
        "auto": lambda: transformers.AutoModelForCausalLM.from_config(config, **arguments),
        "base": lambda: transformers.AutoModel.from_config(config, **arguments),
        "class": lambda: transformers.LlamaForCausalLM._from_config(config, **arguments),
    }


@pytest.mark.slow
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("how", ["auto", "base", "class"])
def test_a_model_from_the_config(how: str, attention: str | None, saved: Path) -> None:
    """It is converted, its weights are new, and config and model can be used again."""
    config = transformers.AutoConfig.from_pretrained(saved)
    for _ in range(2):
        arguments = {} if attention is None else {"attn_implementation": attention}
        model = built(config, **arguments)[how]()
    report = sigswap.report(model)
    assert report.count("swapped") == 1 and "Row cap: 0.5 (1 attentions)." in report.notes
    assert model.config._attn_implementation == (attention or "sdpa")
    assert not hasattr(model.config, "quantization_config")
    loaded = sigswap.load(saved)
    inner = loaded.model if how == "base" else loaded
    model.load_state_dict(inner.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS)[0], inner(IDS)[0])


def test_a_model_from_the_config_is_saved_again(saved: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(saved)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(sigswap.load(tmp_path)(IDS)[0], model(IDS)[0], rtol=0, atol=0)


def test_on_the_meta_device(saved: Path) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(saved))
    assert sigswap.is_converted(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_any_other_config_is_as_ever(saved: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(saved, attn_implementation="sdpa")
    del config.quantization_config
    assert not sigswap.is_converted(transformers.AutoModel.from_config(config))
