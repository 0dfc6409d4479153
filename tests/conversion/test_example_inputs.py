"""What convert runs a model on if it is given nothing: what transformers and timm models know of themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers as T
from torch import nn

import sigswap
from sigswap.conversion.example_inputs import as_call, resolve_inputs
from sigswap.errors import ArgumentError, CalibrationError, ExampleInputsError

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WHISPER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4}
WHISPER |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99}
WHISPER |= {"max_source_positions": 20, "num_mel_bins": 8, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1}

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bert": (lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)), 2),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT)), 2),
    "t5": (lambda: T.T5Model(T.T5Config(d_model=32, d_kv=8, num_layers=2, num_heads=4, d_ff=64, vocab_size=99)), 6),
    "vit": (lambda: T.ViTModel(T.ViTConfig(**VISION, image_size=32, patch_size=8)), 2),
    "clip": (
        lambda: T.CLIPModel(
            T.CLIPConfig(
                text_config={**TEXT, "eos_token_id": 98}, vision_config={**VISION, "image_size": 32, "patch_size": 8}
            )
        ),
        4,
    ),
    "whisper": (lambda: T.WhisperModel(T.WhisperConfig(**WHISPER, decoder_start_token_id=1)), 4),
    "timm": (lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2), 2),
    "timm_size": (lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, img_size=64, in_chans=1), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_know_their_inputs(name: str) -> None:
    build, sites = MODELS[name]
    model = build().eval()
    ((args, kwargs),) = resolve_inputs(model, None)
    with torch.no_grad():
        model(*args, **kwargs)  # they run for real, not only on fake tensors
    report = sigswap.inspect(model)
    assert report.count("swappable") == sites and not report.count("left"), str(report)


def test_forms_of_example_inputs() -> None:
    x = torch.zeros(1)
    model = nn.Identity()
    assert resolve_inputs(model, x) == [((x,), {})]
    assert resolve_inputs(model, (x, 1)) == [((x, 1), {})]
    assert resolve_inputs(model, {"input": x}) == [((), {"input": x})]
    assert resolve_inputs(model, [x, {"input": x}]) == [((x,), {}), ((), {"input": x})]
    assert as_call([x, x], "batches") == ((x, x), {})  # of a DataLoader
    assert resolve_inputs(model, T.BatchEncoding({"input": x})) == [((), {"input": x})]


def test_unknown_inputs_are_asked_for() -> None:
    with pytest.raises(sigswap.errors.ExampleInputsError, match="a tensor, a tuple of positional arguments"):
        sigswap.inspect(nn.MultiheadAttention(8, 2))
    model = T.LlamaModel(T.LlamaConfig(**TEXT))
    type(model).main_input_name, before = "spectrum", type(model).main_input_name
    try:
        with pytest.raises(sigswap.errors.ExampleInputsError, match="'spectrum'"):
            sigswap.inspect(model)
    finally:
        type(model).main_input_name = before


@pytest.mark.parametrize("inputs", ["some words", {"input_ids": [[1, 2, 3]]}], ids=["text", "lists of ids"])
def test_what_is_no_tensor_yet_is_to_be_made_one_by_the_tokenizer(inputs: object) -> None:
    """By convert, and by calibrate, whose batches are such inputs."""
    model = T.BertModel(T.BertConfig(**TEXT)).eval()
    with pytest.raises(ExampleInputsError, match='return_tensors="pt"'):
        sigswap.convert(model, example_inputs=[inputs])
    sigswap.convert(model)
    with pytest.raises((ArgumentError, CalibrationError), match='return_tensors="pt"'):
        sigswap.calibrate(model, [inputs], progress=False)
