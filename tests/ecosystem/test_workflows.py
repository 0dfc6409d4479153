"""What users do with a converted model, by tools that they have: equal to plain eager calls of it, or a clear error.

Each test's docstring is its row of docs/ecosystem.md, which tests/ecosystem/page.py writes.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from made_once import made_once
from torch import Tensor, nn

import sigswap

transformers = pytest.importorskip("transformers")

IDS = torch.arange(1, 13).view(2, 6)
MASK = torch.ones_like(IDS)
SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def randomised(model: Any) -> Any:
    """Its biases are away from where they start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


@made_once
def bert(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, num_attention_heads=2, pad_token_id=0)
    model = transformers.BertModel._from_config(config, attn_implementation=attention).eval()
    return randomised(sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True)))


@made_once
def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SMALL, "num_attention_heads": 2, "pad_token_id": 0, "initializer_range": 0.3, **fields}
    config = transformers.LlamaConfig(**sizes)
    return randomised(sigswap.convert(transformers.LlamaForCausalLM(config).eval()))


def out(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids)[0]
    return result


def equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_deepcopy() -> None:
    """copy.deepcopy"""
    model = bert()
    equal(out(copy.deepcopy(model)), out(model))


def test_pickle() -> None:
    """pickle, torch.save of the module"""
    model = bert()
    equal(out(pickle.loads(pickle.dumps(model))), out(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    equal(out(torch.load(file, weights_only=False)), out(model))


def test_state_dict() -> None:
    """state_dict, load_state_dict(strict=True) between converted models"""
    model, other = bert(), bert()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    equal(out(other), out(model))


def test_state_dict_onto_softmax() -> None:
    """load_state_dict of a converted model's onto softmax: error, unexpected keys"""
    model = bert()
    plain = transformers.BertModel(model.config)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sigswap"):
        plain.load_state_dict(model.state_dict())


def test_functional_call() -> None:
    """torch.func.functional_call with other values"""
    model, other = bert(), bert()
    values = {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(values[name])
        equal(torch.func.functional_call(model, values, (), {"input_ids": IDS})[0], other(input_ids=IDS)[0])


def test_to_meta() -> None:
    """model.to("meta"), to_empty, load_state_dict"""
    model, other = bert(), copy.deepcopy(bert()).to("meta")
    assert all(parameter.is_meta for parameter in other.parameters())
    assert other(input_ids=IDS.to("meta"))[0].shape == (2, 6, 16)
    other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    for (_, into), (_, buffer) in zip(other.named_buffers(), model.named_buffers(), strict=True):
        into.copy_(buffer)
    equal(out(other), out(model))


def test_dtype() -> None:
    """model.double(), model.to(dtype)"""
    model = bert()
    equal(out(copy.deepcopy(model).double()).float(), out(model))


def test_forward_hooks_everywhere() -> None:
    """forward hooks on every module, as torchinfo and profilers set them"""
    model, seen = bert(), []
    expected = out(model)
    handles = [m.register_forward_hook(lambda module, args, output: seen.append(type(module))) for m in model.modules()]
    equal(out(model), expected)
    assert any(kind.__name__ == "BertSelfAttention" for kind in seen)
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(name: str) -> None:
    """torch.nn.utils.parametrizations of projections, put on and removed"""
    model = bert()
    expected = out(model)
    linear = model.encoder.layer[0].attention.self.query
    getattr(nn.utils.parametrizations, name)(linear)
    changed = out(model)
    if name == "weight_norm":
        equal(changed, expected)
    nn.utils.parametrize.remove_parametrizations(linear, "weight")
    model.eval()
    equal(out(model), changed)


def test_parametrization_of_a_bias() -> None:
    """a parametrization of c_h itself"""
    model = bert()
    site = model.encoder.layer[0].attention.self.sigswap.get_submodule("0")
    with torch.no_grad():
        site.bias.mul_(2)
        expected = out(model)
        site.bias.div_(2)
    double = nn.Module()
    double.forward = lambda values: values * 2  # type: ignore[method-assign]
    nn.utils.parametrize.register_parametrization(site, "bias", double)
    equal(out(model), expected)


def test_pruning() -> None:
    """torch.nn.utils.prune of projections"""
    from torch.nn.utils import prune

    model, other = bert(), bert()
    linear = model.encoder.layer[0].attention.self.query
    prune.l1_unstructured(linear, "weight", amount=0.5)
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight.mul_(linear.weight_mask)
    equal(out(model), out(other))


def test_dynamic_quantization() -> None:
    """torch.ao's quantize_dynamic of linear layers to int8: within 5% of the float model"""
    model = bert()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    reference = copy.deepcopy(model)
    assert sigswap.is_converted(quantized)
    assert (out(quantized) - out(reference)).abs().max() < 0.05 * out(reference).abs().max()


def test_autocast() -> None:
    """torch.autocast to bfloat16: within 5% of float32"""
    model = bert()
    with torch.autocast("cpu", torch.bfloat16):
        low = out(model)
    assert (low - out(model)).abs().max() < 0.05 * out(model).abs().max()


def test_gradient_checkpointing() -> None:
    """gradient_checkpointing_enable"""
    plain, model = llama().train(), llama().train()
    model.gradient_checkpointing_enable()
    for each in (plain, model):
        each(input_ids=IDS).logits.square().mean().backward()
    for name, parameter in plain.named_parameters():
        equal(model.get_parameter(name).grad, parameter.grad)


def test_output_attentions() -> None:
    """output_attentions=True: the sigmoid's probabilities"""
    model = bert("eager")
    with torch.no_grad():
        result = model(input_ids=IDS, output_attentions=True)
    equal(result[0], out(model))
    (probabilities,) = result.attentions
    assert probabilities.shape == (2, 2, 6, 6)
    assert not torch.allclose(probabilities.sum(-1), torch.ones(2, 2, 6))


def test_output_hidden_states() -> None:
    """output_hidden_states=True"""
    model = bert()
    with torch.no_grad():
        equal(model(input_ids=IDS, output_hidden_states=True).hidden_states[-1], out(model))


GENERATING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "top-k and top-p": {"do_sample": True, "top_k": 5, "top_p": 0.9},
    "static cache": {"cache_implementation": "static"},
    "quantity of returns": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "repetition penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", GENERATING)
def test_generate(mode: str) -> None:
    """generate: greedy, beams, sampling, static cache, prompt lookup"""
    model = llama()
    ids = IDS[:1] if mode == "prompt lookup" else IDS
    made = []
    for options in (GENERATING[mode], {**GENERATING[mode], "use_cache": mode in ("static cache", "prompt lookup")}):
        torch.manual_seed(1)
        made.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **options))
    assert torch.equal(*made)
    if mode == "greedy":
        step = made[0][:, : IDS.shape[1]]
        for _ in range(5):
            step = torch.cat([step, out(model, step)[:, -1:].argmax(-1)], 1)
        assert torch.equal(step, made[0])


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    """torch.export, strict and not, with dynamic batch and length"""
    model = bert()
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}}
    exported = torch.export.export(model, (), {"input_ids": IDS}, dynamic_shapes=shapes, strict=strict).module()
    for ids in (IDS, torch.arange(1, 28).view(3, 9)):
        equal(exported(input_ids=ids)[0], out(model, ids))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "sigswap"])
def test_compile(backend: str) -> None:
    """torch.compile: eager, aot_eager, inductor, sigswap"""
    model = bert()
    equal(out(torch.compile(model, backend=backend)), out(model))


class Images(nn.Module):
    """A ViT's block by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


def images() -> Images:
    torch.manual_seed(0)
    model: Images = randomised(sigswap.convert(Images().eval(), example_inputs=X))
    return model


def test_jit_trace() -> None:
    """torch.jit.trace"""
    model = images()
    with torch.no_grad():
        equal(torch.jit.trace(model, X, check_trace=False)(X), model(X))


def test_feature_extraction() -> None:
    """torchvision's create_feature_extractor (symbolic tracing, owners as leaves)"""
    pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = images()
    extracted = create_feature_extractor(
        model, ["head"], tracer_kwargs={"leaf_modules": [nn.MultiheadAttention]}, suppress_diff_warning=True
    )
    with torch.no_grad():
        equal(extracted(X)["head"], model(X))


def test_feature_extraction_inside() -> None:
    """torchvision's create_feature_extractor on torchvision's ViT, traced through its attention"""
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 16, num_classes=3).eval()
    image = torch.randn(1, 3, 32, 32)
    randomised(sigswap.convert(model, example_inputs=image))
    extracted = create_feature_extractor(model, ["encoder", "heads.head"])
    with torch.no_grad():
        equal(extracted(image)["heads.head"], model(image))


class Block(nn.Module):
    """Scores by hand, and a softmax that is a method: symbolic tracing does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


def test_symbolic_tracing() -> None:
    """torch.fx.symbolic_trace through attention whose softmax is a tensor's method: error, says what to do instead"""
    model = sigswap.convert(nn.Sequential(Block()), example_inputs=X)
    with pytest.raises(sigswap.errors.UnknownCallError, match=r"traced symbolically.*torch\.export"):
        torch.fx.symbolic_trace(model)
    with torch.no_grad():
        equal(torch.export.export(model, (X,)).module()(X), model(X))


def test_torchinfo() -> None:
    """torchinfo's summary: all parameters are counted, the model stays as it is"""
    torchinfo = pytest.importorskip("torchinfo")
    model = bert()
    expected = out(model)
    summary = torchinfo.summary(model, input_data={"input_ids": IDS}, verbose=0)
    assert summary.total_params == sum(parameter.numel() for parameter in model.parameters())
    equal(out(model), expected)


def test_weight_only_quantization(tmp_path: Path) -> None:
    """torchao's quantize_ of linear layers to int8: within 5% of the float model"""
    torchao = pytest.importorskip("torchao.quantization")
    model = bert()
    expected = out(model)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert sigswap.is_converted(model)
    assert (out(model) - expected).abs().max() < 0.05 * expected.abs().max()


def test_saving_a_quantized_model(tmp_path: Path) -> None:
    """sigswap.save of a model that torchao's quantize_ has changed by hand: error, names the tensor and what works"""
    torchao = pytest.importorskip("torchao.quantization")
    model = bert()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(sigswap.errors.CheckpointError, match=r"weight is quantized.*before.*quantization_config"):
        sigswap.save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_weight_averaging() -> None:
    """torch.optim.swa_utils.AveragedModel, timm's ModelEmaV3"""
    model = images()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        equal(averaged(X), model(X))
    timm = pytest.importorskip("timm.utils")
    ema = timm.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in ema.module.parameters()]
    ema.update(model)
    for ours, old, new in zip(ema.module.parameters(), before, model.parameters(), strict=True):
        equal(ours, 0.5 * old + 0.5 * new)


def test_accelerate() -> None:
    """accelerate's Accelerator.prepare, unwrap_model and a step"""
    accelerate = pytest.importorskip("accelerate")
    model, plain = images(), images()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(X).square().mean())
    optimizer.step()
    plain(X).square().mean().backward()
    for parameter in plain.parameters():
        parameter.data -= 0.1 * (parameter.grad if parameter.grad is not None else 0)
    with torch.no_grad():
        equal(accelerator.unwrap_model(prepared)(X), plain(X))


def trained(model: Any, folder: Path, **arguments: Any) -> Any:
    """The Trainer, after a step."""
    pytest.importorskip("accelerate")
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True}
    args = transformers.TrainingArguments(str(folder), use_cpu=True, **options, **arguments)
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    trainer = transformers.Trainer(model, args, train_dataset=data)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_trainer_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Trainer with `torch_compile_backend="sigswap"`"""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # Trainer's arguments write to it
    plain, model = llama(num_hidden_layers=1), llama(num_hidden_layers=1)
    trained(plain, tmp_path, learning_rate=0.1)
    state = pytest.importorskip("accelerate.state").AcceleratorState
    try:
        state._reset_state(reset_partial_state=True)
        compiled = trained(model, tmp_path, learning_rate=0.1, torch_compile_backend="sigswap")
        assert compiled.accelerator.state.dynamo_plugin.backend.value == "SIGSWAP"
    finally:
        state._reset_state(reset_partial_state=True)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_trainer(tmp_path: Path) -> None:
    """transformers' Trainer, whose checkpoint loads as sigmoid attention"""
    model = llama()
    trainer = trained(model, tmp_path)
    trainer.save_model(str(tmp_path / "end"))
    equal(out(sigswap.load(tmp_path / "end")), out(model.eval()))
