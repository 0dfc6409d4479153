"""Adapters of a converted model know it: they go onto a converted model, and onto no other."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import interrupted, lines_of

import sigswap
from sigswap.errors import CheckpointError
from sigswap.saving import peft_hook

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

IDS = torch.arange(1, 13).view(2, 6)
CONFIGS = {
    "lora": peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    "sigswap's parameters, too": peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["sigswap"], init_lora_weights=False
    ),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
    "multitask prompt": peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_tasks=2, num_ranks=1
    ),
    "context-aware prompt": peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 3]
    ),
    "cartridge": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_frozen_tokens=1),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "trainable tokens": peft.TrainableTokensConfig(token_indices=[2, 3], target_modules=["embed_tokens"]),
    "shadow": peft.ShadowConfig(target_modules=["q_proj"]),
    "llama adapter": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any) -> torch.Tensor:
    kind = next(iter(model.peft_config.values())).peft_type.value if hasattr(model, "peft_config") else ""
    tasks = {"task_ids": torch.tensor([0, 1])} if kind == "MULTITASK_PROMPT_TUNING" else {}
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS, **tasks).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_a_converted_model(kind: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(sigswap.convert(llama()), copy.deepcopy(CONFIGS[kind])).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained on a model with sigmoid attention, and LlamaForCausalLM has"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unexpected keyword")  # peft's, of an entry that it does not know
        loaded = peft.PeftModel.from_pretrained(sigswap.convert(llama()), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_an_interruption_leaves_no_half_of_a_config(tmp_path: Path) -> None:
    model = peft.get_peft_model(sigswap.convert(llama()), CONFIGS["lora"])

    def save() -> None:
        with peft_hook.marked(model):
            model.peft_config["default"].save_pretrained(tmp_path)

    save()
    for at in lines_of(save):
        came, raised = interrupted(save, at, KeyboardInterrupt())
        assert came and isinstance(raised, KeyboardInterrupt), at
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA", at
        assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"], at


def test_a_second_adapter(tmp_path: Path) -> None:
    peft.get_peft_model(sigswap.convert(llama()), CONFIGS["lora"]).save_pretrained(tmp_path)
    plain = peft.get_peft_model(llama(), CONFIGS["lora"])
    with pytest.raises(CheckpointError, match="softmax attention"):
        plain.load_adapter(tmp_path, "second")
    assert list(plain.peft_config) == ["default"]


def test_an_adapter_that_transformers_puts_on(tmp_path: Path) -> None:
    model = sigswap.convert(llama())
    try:
        model.add_adapter(CONFIGS["lora"])
    except ValueError as error:
        pytest.skip(f"transformers does not work with this peft: {error}")
    model.save_pretrained(tmp_path)
    plain = llama()
    with pytest.raises(CheckpointError, match="softmax attention"):
        plain.load_adapter(str(tmp_path))
    assert not any("lora" in name for name, _ in plain.named_parameters())
    again = sigswap.convert(llama())
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_an_adapter_of_a_softmax_model_is_as_ever(tmp_path: Path) -> None:
    """It has no mark, and may be put onto a converted model, too."""
    peft.get_peft_model(llama(), CONFIGS["lora"]).save_pretrained(tmp_path)
    assert "sigswap" not in json.loads((tmp_path / "adapter_config.json").read_text())
    peft.PeftModel.from_pretrained(llama(), tmp_path)
    peft.PeftModel.from_pretrained(sigswap.convert(llama()), tmp_path)


def test_a_config_alone_is_not_marked(tmp_path: Path) -> None:
    model = peft.get_peft_model(sigswap.convert(llama()), CONFIGS["lora"])
    model.peft_config["default"].save_pretrained(tmp_path)
    assert "sigswap" not in json.loads((tmp_path / "adapter_config.json").read_text())
