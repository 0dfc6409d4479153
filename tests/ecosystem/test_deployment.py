"""Converted models as programs of ATen's ops, in ONNX, in compiled packages, under counters and profilers.

Each test's docstring is its row of docs/ecosystem.md, which tests/ecosystem/page.py writes.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sigswap

IDS = torch.arange(1, 13).view(2, 6)
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
OTHER = torch.arange(1, 28).view(3, 9), torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [1] * 9])
SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Tensors(nn.Module):
    """A transformers model whose output is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return out


def converted(model: nn.Module, config: sigswap.SigmoidConfig, **inputs: Any) -> nn.Module:
    """With biases that are away from where they start."""
    sigswap.convert(model.eval(), config, **inputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def text(kind: str, attention: str, config: sigswap.SigmoidConfig) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made: Any = getattr(transformers, f"{kind}Config")(**SMALL, pad_token_id=0)
    made.use_cache = False
    return Tensors(
        converted(getattr(transformers, f"{kind}Model")._from_config(made, attn_implementation=attention), config)
    )


def fused() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)
    return converted(nn.TransformerEncoder(layer, 1), sigswap.SigmoidConfig(), example_inputs=torch.randn(2, 5, 16))


QUERY_BIAS = sigswap.SigmoidConfig(query_bias=True)
CAPPED = sigswap.SigmoidConfig(query_bias=True, row_cap=1.0, first_token=True)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT, sdpa": lambda: text("Bert", "sdpa", QUERY_BIAS),
    "BERT, eager": lambda: text("Bert", "eager", QUERY_BIAS),
    "Llama, row cap and first token": lambda: text("Llama", "sdpa", CAPPED),
    "Llama, eager, row cap and first token": lambda: text("Llama", "eager", CAPPED),
    "torch.nn's encoder": fused,
}


def inputs_of(model: nn.Module) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Two, of different batches and lengths."""
    if isinstance(model, Tensors):
        return (IDS, MASK), OTHER
    return (torch.randn(2, 5, 16),), (torch.randn(3, 8, 16),)


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    inputs, _ = inputs_of(model)
    shape = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    return torch.export.export(model, inputs, dynamic_shapes=tuple(shape for _ in inputs))


def equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_decompositions(name: str) -> None:
    """torch.export, `run_decompositions(sigswap.decompositions())`: core ATen, with dynamic batch and length"""
    model = MODELS[name]()
    table = {**torch.export.default_decompositions(), **sigswap.decompositions()}
    program = exported(model).run_decompositions(table)
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns:
            assert node.target.namespace == "aten", node
            assert torch.Tag.core in node.target.tags, node
    for inputs in inputs_of(model):
        with torch.no_grad():
            equal(program.module()(*inputs), model(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str) -> None:
    """torch.onnx.export of that, in onnxruntime, with padding, dynamic batch and length"""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = MODELS[name]()
    program = exported(model).run_decompositions(sigswap.decompositions())
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for inputs in inputs_of(model):
        [out] = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        with torch.no_grad():
            equal(out, model(*inputs))


@pytest.mark.slow
def test_onnx_without_decompositions() -> None:
    """torch.onnx.export without decompositions: error, of torch.onnx's, names the op that ONNX does not know"""
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        torch.onnx.export(fused(), (torch.randn(2, 5, 16),), dynamo=True, verbose=False)
    assert "sigswap.sigmoid_attention" in str(caught.value.__cause__ or caught.value)


class Documents(nn.Module):
    """Attention of three documents one behind the other, by a mask by blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.of = torch.tensor([0] * 130 + [1] * 60 + [2] * 110)
        self.mask = sigswap.BlockMask.from_mask(self.of[:, None] == self.of)

    def forward(self, query: Tensor) -> Tensor:
        return sigswap.sigmoid_attention(query, query, query, block_mask=self.mask)

    def expected(self, query: Tensor) -> Tensor:
        """One document after another, in float64."""
        parts = []
        for each in range(3):
            own = query[:, :, self.of == each].double()
            scores = own @ own.mT / query.shape[-1] ** 0.5
            parts.append(torch.sigmoid(scores - torch.tensor(own.shape[2]).double().log()) @ own)
        return torch.cat(parts, 2).float()


@pytest.mark.slow
def test_a_mask_by_blocks() -> None:
    """torch.export and torch.onnx.export of attention under a `sigswap.BlockMask`: core ATen, with a dynamic batch"""
    model, table = Documents(), {**torch.export.default_decompositions(), **sigswap.decompositions()}
    query = torch.randn(2, 3, 300, 8)
    program = torch.export.export(model, (query,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    program = program.run_decompositions(table)
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns:
            assert node.target.namespace == "aten" and torch.Tag.core in node.target.tags, node
    query = torch.randn(5, 3, 300, 8)
    equal(program.module()(query), model.expected(query))
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    [out] = session.run(None, {session.get_inputs()[0].name: query.numpy()})
    equal(out, model.expected(query))


PACKAGE = """
import sys
import torch

inputs, expected = torch.load(sys.argv[1])
model = torch._inductor.aoti_load_package(sys.argv[2])
for each, out in zip(inputs, expected, strict=True):
    torch.testing.assert_close(model(*each), out, rtol=1e-5, atol=1e-5)
assert "sigswap" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.slow
def test_compiled_package(tmp_path: Path) -> None:
    """AOTInductor: `torch._inductor.aoti_compile_and_package` of that, loaded in a process without sigswap"""
    model = MODELS["BERT, sdpa"]()
    program = exported(model).run_decompositions(sigswap.decompositions())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    inputs = inputs_of(model)
    with torch.no_grad():
        torch.save((inputs, [model(*each) for each in inputs]), tmp_path / "values.pt")
    arguments = [sys.executable, "-c", PACKAGE, str(tmp_path / "values.pt"), package]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_executorch(name: str) -> None:
    """ExecuTorch, by portable kernels and XNNPACK, of that, with padding, dynamic batch and length"""
    reason = "executorch is none of the tests' packages: each version wants its own torchao, and coremltools"
    exir = pytest.importorskip("executorch.exir", reason=reason)
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    model = MODELS[name]()
    table = {**torch.export.default_decompositions(), **sigswap.decompositions()}
    for partitioners in (None, [XnnpackPartitioner()]):
        program = exported(model).run_decompositions(table)
        file = exir.to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch().buffer
        method = Runtime.get().load_program(file).load_method("forward")
        for inputs in inputs_of(model):
            [out] = method.execute(list(inputs))
            with torch.no_grad():
                equal(out, model(*inputs))


def test_flop_counter() -> None:
    """torch.utils.flop_counter: attention counts as fused softmax attention does"""
    from torch.utils.flop_counter import FlopCounterMode

    model = fused()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(2, 5, 16))
    linear = 2 * (2 * 5) * 16 * (3 * 16 + 16 + 16 + 16)  # in and out projection, two layers of the feed-forward
    assert counter.get_total_flops() == linear + 2 * 2 * 2 * 5 * 5 * (8 + 8)


def test_profiler() -> None:
    """torch.profiler: attention is `sigswap::sigmoid_attention`"""
    model = fused()
    with torch.profiler.profile() as profile, torch.no_grad():
        model(torch.randn(2, 5, 16))
    assert "sigswap::sigmoid_attention" in {event.key for event in profile.key_averages()}
