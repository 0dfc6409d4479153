"""Models that are converted and quantized: loaded so, trained with adapters, saved and loaded again.

Each test's docstring is its row of docs/ecosystem.md, which tests/ecosystem/page.py writes. The oracle is the model in
floats whose linear layers hold what the quantized ones give for each unit vector.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sigswap
from sigswap.errors import ArgumentError, CheckpointError

transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 13).view(2, 6)
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


def torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="it is none of the tests' packages: peft would import it everywhere")
    return transformers.BitsAndBytesConfig(**options)


METHODS = {
    "torchao, int8": torchao_int8,
    "bitsandbytes, int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes, nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
every_method = pytest.mark.parametrize("method", METHODS)


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_attention_heads=2, pad_token_id=0, initializer_range=0.3)
    ).eval()


def converted(model: Any) -> Any:
    sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    sigswap.save(converted(llama()), directory)
    return directory


def out(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def in_floats(model: Any) -> Any:
    """The converted llama with the values of the quantized one's linear layers."""
    floats = converted(llama())
    with torch.no_grad():
        for name, module in floats.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(model.get_submodule(name)(torch.eye(module.in_features)).T)
    return floats


def check(model: Any) -> None:
    """It computes sigmoid attention on quantized weights; bitsandbytes also rounds what is multiplied by them."""
    assert sigswap.report(model).count("swapped") == 1
    projection = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(projection.weight) is not nn.Parameter
    expected = out(in_floats(model))
    rounded = type(model.hf_quantizer).__name__.startswith("Bnb")  # nf4: to bfloat16, on some CPUs
    assert (out(model) - expected).abs().max() <= (0.05 if rounded else 1e-4) * expected.abs().max()
    assert (out(llama()) - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.slow
@every_method
def test_quantized_while_it_is_loaded(method: str, saved: Path) -> None:
    """from_pretrained(..., quantization_config=) of a converted directory (torchao, bitsandbytes)"""
    for loader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
        model = loader.from_pretrained(saved, quantization_config=METHODS[method]())
        check(model)
    assert type(model.hf_quantizer).__module__.startswith("transformers.quantizers.")
    assert not sigswap.is_converted(llama()) and type(sigswap.load(saved).lm_head.weight) is nn.Parameter


@pytest.mark.slow
@every_method
def test_quantized_and_saved(method: str, saved: Path, tmp_path: Path) -> None:
    """sigswap.save, save_pretrained and from_pretrained of a model that is converted and quantized, in either order"""
    first = transformers.LlamaForCausalLM.from_pretrained(saved, quantization_config=METHODS[method]())
    llama().save_pretrained(tmp_path / "plain")
    second = converted(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=METHODS[method]())
    )
    torch.testing.assert_close(out(second), out(first))
    for number, model in enumerate((first, second)):
        directory = tmp_path / str(number)
        sigswap.save(model, directory) if number else model.save_pretrained(directory)
        entry = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert entry["quant_method"] == "sigswap" and entry["quantized"]["quant_method"] == method.partition(",")[0]
        for loaded in (sigswap.load(directory), transformers.AutoModelForCausalLM.from_pretrained(directory)):
            assert torch.equal(out(loaded), out(model))
        check(loaded)
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=METHODS[method]())
    assert torch.equal(out(again), out(model))
    assert not sigswap.is_converted(sigswap.revert(again)) and out(again).isfinite().all()


@pytest.mark.slow
@every_method
def test_adapters_on_quantized_weights(method: str, saved: Path, tmp_path: Path) -> None:
    """peft LoRA on a quantized converted model (QLoRA): trained with sigswap's parameters, saved, loaded"""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["sigswap"], init_lora_weights=False)

    def quantized() -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(saved, quantization_config=METHODS[method]())

    model = peft.get_peft_model(quantized(), lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.train()  # with no forward before: after one in eval mode, bitsandbytes' nf4 has no gradients on a CPU
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path).eval()
    torch.testing.assert_close(out(loaded), out(model))
    assert not torch.allclose(out(model), out(quantized()), atol=1e-2)


def test_from_config_of_a_quantized_one(saved: Path, tmp_path: Path) -> None:
    """AutoModel.from_config of a directory that is converted and quantized: converted, in floats"""
    model = transformers.LlamaForCausalLM.from_pretrained(saved, quantization_config=torchao_int8())
    sigswap.save(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    built = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(built.lm_head.weight) is nn.Parameter and not hasattr(built.config, "quantization_config")
    built.load_state_dict(converted(llama()).state_dict())
    torch.testing.assert_close(out(built), out(converted(llama())))


def test_calibration(saved: Path) -> None:
    """sigswap.calibrate, distill(train="sigmoid") and compare of a quantized converted model"""
    model = transformers.LlamaForCausalLM.from_pretrained(saved, quantization_config=torchao_int8())
    batches = [{"input_ids": IDS}]
    report = sigswap.calibrate(model, batches, lookups=False, row_cap=None, progress=False)
    assert report.heads and all(head.after <= head.before for head in report.heads)
    sigswap.distill(model, None, batches, steps=1, train="sigmoid", lookups=False, progress=False)
    loss = sigswap.compare(model, None, batches, max_length=6, sequences=1)["loss"]
    assert 0 < loss.converted < float("inf") and loss.converted != loss.original


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    """sigswap.save of a model that something else has quantized: error, names the method"""
    model = converted(llama())
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(CheckpointError, match="quantized by 'gptq' cannot be saved; by torchao and bitsandbytes"):
        sigswap.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_damage_and_mistakes(saved: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(saved, quantization_config=torchao_int8())
    sigswap.save(model, tmp_path)
    with pytest.raises(ArgumentError, match="dtype"):
        sigswap.load(tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    entry = config["quantization_config"]["quantized"]
    for change in ({"quant_method": "gptq"}, {"modules_to_not_convert": ["lm_head"]}):
        path.write_text(json.dumps({**config, "quantization_config": {
            **config["quantization_config"], "quantized": {**entry, **change}
        }}))  # fmt: skip
        with pytest.raises(CheckpointError, match="quantized"):
            sigswap.load(tmp_path)
    given = transformers.BitsAndBytesConfig(load_in_8bit=True)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="TorchAoConfig"):  # of transformers', as for any quantized model
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    assert torch.equal(out(sigswap.load(tmp_path)), out(model))
