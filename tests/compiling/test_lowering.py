"""How users reach the lower pass: inductor's hook, regional compilation, explain; caches, modes, export."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from graphs import Graphs
from handwritten import DIM, Grouped, Handwritten, LocalWithSoftcap, NanoGPT, sigmoid
from interruptions import interrupted, lines_of
from oracle import sigmoid_oracle
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from typer.testing import CliRunner
from zoo import BY_NAME, call, hf

import sigswap
from sigswap.commands.cli import app
from sigswap.compiling import inductor
from sigswap.errors import ExampleInputsError, NotConvertedError
from sigswap.kernels import settings

B, M = 2, 12


class Blocks(nn.Module):
    """A model around hand-written attention."""

    def __init__(self, kind: type[Handwritten] = Grouped, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


def oracle(model: nn.Module, x: Tensor) -> Tensor:
    """The model before its conversion, in float64, with sigmoid."""
    double = copy.deepcopy(model).double()
    for layer in double.layers:  # type: ignore[union-attr]
        layer.normalise = sigmoid
    return double(x.double())


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(B, M, DIM)


@pytest.fixture
def model() -> Blocks:
    torch.manual_seed(0)
    return Blocks().eval()


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the pass in inductor's hook did, call by call. Without caches, which an earlier run has filled."""
    results: list[Any] = []
    original = inductor.lower

    def recorded(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(inductor, "lower", recorded)
    with inductor_config.patch(force_disable_caches=True):
        yield results


def count(results: list[Any]) -> int:
    return sum(len(result.lowered) for result in results)


# ------------------------------------------------------------------------------------------- the hook


def test_hook_for_one_model(model: Blocks, x: Tensor, lowered: list[Any]) -> None:
    expected = oracle(model, x)
    sigswap.convert(model, example_inputs=(x,))
    options = {"pre_grad_custom_pass": sigswap.InductorLowering()}
    compiled = torch.compile(model, options=options, fullgraph=True)
    close(compiled(x), expected)
    assert count(lowered) == 3
    assert inductor_config.pre_grad_custom_pass is None


@pytest.mark.slow
def test_hook_for_all_models(model: Blocks, x: Tensor, lowered: list[Any]) -> None:
    expected = oracle(model, x)
    sigswap.convert(model, example_inputs=(x,))
    with sigswap.enable_inductor_lowering():
        with sigswap.enable_inductor_lowering():  # a second time: the same
            pass
        sigswap.enable_inductor_lowering()
        assert isinstance(inductor_config.post_grad_custom_post_pass, sigswap.InductorLaunches)
        out = torch.compile(model)(x)
    assert inductor_config.pre_grad_custom_pass is None
    assert inductor_config.post_grad_custom_post_pass is None
    close(out, expected)
    out.sum().backward()
    assert count(lowered) == 3


def test_hook_changes_no_other_model(x: Tensor, lowered: list[Any]) -> None:
    """Softmax stays softmax, and a sigmoid attention that is not sigswap's stays unfused."""
    model = Blocks(layers=1).eval().requires_grad_(False)
    softmax = model(x)
    with sigswap.enable_inductor_lowering():
        close(torch.compile(model)(x), softmax)
        model.layers[0].normalise = sigmoid  # type: ignore[assignment]
        torch._dynamo.reset()
        close(torch.compile(model)(x), model(x))
    assert count(lowered) == 0


def test_hook_runs_a_pass_that_is_there_first(model: Blocks, x: Tensor) -> None:
    seen: list[torch.fx.Graph] = []
    sigswap.convert(model, example_inputs=(x,))
    later: list[torch.fx.Graph] = []
    with inductor_config.patch(pre_grad_custom_pass=seen.append, post_grad_custom_post_pass=later.append):
        enabled = sigswap.enable_inductor_lowering()
        torch.compile(model)(x)
        enabled.remove()
        assert inductor_config.pre_grad_custom_pass == seen.append
        assert inductor_config.post_grad_custom_post_pass == later.append
    assert seen
    assert later


def test_a_hook_with_several_passes_keeps_them() -> None:
    passes = [print, len]
    found = inductor.with_pass(passes, sigswap.InductorLaunches)
    assert found[:2] == passes and isinstance(found[2], sigswap.InductorLaunches)
    assert inductor.with_pass(found, sigswap.InductorLaunches) is found
    assert passes == [print, len]


def test_uuid_is_that_of_the_source() -> None:
    code = "import sigswap; print(sigswap.InductorLowering().uuid())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert str(sigswap.InductorLowering().uuid()) == other.strip()
    first = sigswap.InductorLowering(sigswap.InductorLowering())
    assert first.uuid() not in (None, sigswap.InductorLowering().uuid())
    assert sigswap.InductorLowering(lambda graph: None).uuid() is None  # its source is not known: no caching


def test_uuid_of_launches_has_what_chooses_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sigswap.InductorLaunches().uuid()
    assert before == sigswap.InductorLaunches().uuid()
    monkeypatch.setattr(settings, "sigmoid_form", "accurate")
    assert sigswap.InductorLaunches().uuid() != before
    assert sigswap.InductorLaunches(lambda graph: None).uuid() is None


@pytest.mark.parametrize("backend", ["inductor", "sigswap"])
def test_caches_hit(backend: str, model: Blocks, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    sigswap.convert(model, example_inputs=(x,))
    options = {"pre_grad_custom_pass": sigswap.InductorLowering()} if backend == "inductor" else None
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad():
            torch.compile(model, backend=backend, options=options)(x)
        found.append((counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"]))
        found[-1] += (counters["aot_autograd"]["autograd_cache_hit"],)
    assert found[0][1:] == (0, 0) and found[1][0] == 0 and (found[1][1] or found[1][2])


# -------------------------------------------------------------------------------- regional compilation


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Grouped, NanoGPT, LocalWithSoftcap])
def test_compile_attention(kind: type[Handwritten], x: Tensor) -> None:
    """The layers share one graph, the rest stays eager, and it trains."""
    torch.manual_seed(0)
    model = Blocks(kind).eval()
    x64 = x.double().requires_grad_()
    expected = oracle(model, x64)
    sigswap.convert(model, example_inputs=(x,))
    counter = CompileCounterWithBackend("aot_eager")
    assert sigswap.compile_attention(model, options={"inner": counter}) is model
    x.requires_grad_()
    out = model(x)
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    close(x.grad, x64.grad)  # type: ignore[arg-type]
    assert counter.frame_count == 1
    ops = [n for graph in counter.graphs for n in graph.graph.nodes if "sigmoid_attention" in str(n.target)]
    assert len(ops) == 1
    # A copy is not compiled, and converts back.
    assert copy.deepcopy(model).layers[0]._compiled_call_impl is None
    sigswap.revert(model)


def test_compile_attention_of_swin() -> None:
    """Its windows, relative biases and masks, of which each kind of block has its own graph."""
    entry = BY_NAME["swin"]
    model, inputs = entry.build("unfused"), entry.make_inputs("unfused")
    sigswap.convert(model, example_inputs=inputs)
    with torch.no_grad():
        expected = call(model, inputs)
        counter = CompileCounterWithBackend("eager")
        actual = call(sigswap.compile_attention(model, options={"inner": counter}), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    ops = [n for graph in counter.graphs for n in graph.graph.nodes if "sigmoid_attention" in str(n.target)]
    assert len(ops) == counter.frame_count and not any(
        "sigmoid_probs" in str(n.target) for graph in counter.graphs for n in graph.graph.nodes
    )


def test_an_interruption_compiles_all_or_nothing(model: Blocks, x: Tensor) -> None:
    sigswap.convert(model, example_inputs=(x,))
    states = [layer.sigswap for layer in model.layers]

    def state() -> list[tuple[bool, bool]]:
        return [
            (each.compiled, layer._compiled_call_impl is not None)
            for each, layer in zip(states, model.layers, strict=True)
        ]

    def compiled() -> None:
        for each, layer in zip(states, model.layers, strict=True):
            each.compiled, layer._compiled_call_impl = False, None
        sigswap.compile_attention(model)

    for at in lines_of(compiled):
        came, raised = interrupted(compiled, at, KeyboardInterrupt())
        assert came and isinstance(raised, KeyboardInterrupt) and len(set(state())) == 1, at
        assert len(set(state()[0])) == 1, at


def test_an_interruption_sets_both_of_inductors_passes_or_none() -> None:
    hooks = ("pre_grad_custom_pass", "post_grad_custom_post_pass")

    def state() -> list[Any]:
        return [getattr(inductor_config, hook) for hook in hooks]

    def enabled() -> None:
        sigswap.enable_inductor_lowering().__enter__()

    before = state()
    try:
        for at in lines_of(enabled):
            for hook, value in zip(hooks, before, strict=True):
                setattr(inductor_config, hook, value)
            _, raised = interrupted(enabled, at, KeyboardInterrupt())
            assert state() == before or None not in state(), (at, raised)
    finally:
        for hook, value in zip(hooks, before, strict=True):
            setattr(inductor_config, hook, value)


def test_compile_attention_needs_a_converted_model(model: Blocks) -> None:
    with pytest.raises(NotConvertedError):
        sigswap.compile_attention(model)


# --------------------------------------------------------------------------------------------- explain


def test_explain(model: Blocks, x: Tensor) -> None:
    model.layers[2] = NanoGPT().eval()
    before = list(model.state_dict()), type(model)
    for _ in range(2):  # unconverted, converted
        report = sigswap.explain(model, (x,))
        assert report.graphs == 1 and report.count("lowered") == 3
        assert [site.path for site in report.sites] == ["layers.0", "layers.1", "layers.2"]
        assert "4 heads over 2" in report.sites[0].detail and "causal" in report.sites[2].detail
        assert "layers.{0..1} (2x)" in str(report)
        assert (list(model.state_dict()), type(model)) == before or sigswap.is_converted(model)
        if not sigswap.is_converted(model):
            sigswap.convert(model, example_inputs=(x,))


def test_explain_says_why_not(x: Tensor) -> None:
    model = nn.MultiheadAttention(DIM, 4, batch_first=True)
    report = sigswap.explain(model, (x, x, x))  # need_weights is its default
    assert report.count("unfused") == 1 and "used elsewhere" in report.sites[0].detail
    with pytest.raises(ExampleInputsError, match="example_inputs"):
        sigswap.explain(model, (x,))


class Clamped(nn.Module):
    """Attention that is not lowered, in code that Dynamo names in its own ways."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.softmax = nn.Softmax(-1)

    def forward(this, x: Tensor) -> Tensor:
        if this.breaks:
            torch._dynamo.graph_break()
        return this.softmax((x @ x.mT).clamp(-1, 1)) @ x


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Clamped(False), Clamped(True)])

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = self.layers[1](x)
        return (x @ x.mT).clamp(-1, 1).softmax(-1) @ x


def test_explain_names_modules_as_the_user_does(x: Tensor) -> None:
    """Whatever the forward's first parameter is called, behind graph breaks, and without nn.Softmax's own name."""
    report = sigswap.explain(Decorated(), (x,))
    assert report.graphs > 1
    assert sorted(site.path for site in report.sites) == ["", "layers.0", "layers.1"]


def test_inspect_compile() -> None:
    done = CliRunner().invoke(app, ["inspect", "timm:vit_tiny_patch16_224", "--compile", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [site["status"] for site in report["sites"]] == ["lowered"] * 12
    assert report["sites"][3]["path"] == "blocks.3.attn" and report["graphs"] == 1


# ------------------------------------------------------------------------------------------ whole models


def t5_inputs(length: int, decoded: int, left: bool) -> dict[str, Tensor]:
    torch.manual_seed(length)
    lengths = torch.tensor([[length], [4], [1]]), torch.tensor([[3], [decoded], [2]])
    masks = [(torch.arange(n) < own).long() for n, own in zip((length, decoded), lengths, strict=True)]
    masks = [mask.flip(1) for mask in masks] if left else masks
    return {
        "input_ids": torch.randint(3, 50, (3, length)),
        "attention_mask": masks[0],
        "decoder_input_ids": torch.randint(3, 50, (3, decoded)),
        "decoder_attention_mask": masks[1],
    }


def t5_result(model: Any, module: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Where there is no padding, the outputs; and all gradients."""
    module.zero_grad()
    found = model(**inputs)
    shown = [
        state * inputs[mask][..., None]
        for state, mask in (
            (found.encoder_last_hidden_state, "attention_mask"),
            (found.last_hidden_state, "decoder_attention_mask"),
        )
    ]
    sum((each * torch.linspace(-1, 1, each.numel()).view(each.shape)).sum() for each in shown).backward()  # type: ignore
    grads = [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]
    return [each.detach() for each in shown] + grads


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "inner"), [("sdpa", "aot_eager"), ("eager", "aot_eager"), ("sdpa", "inductor")])
def test_t5_with_padding(attention: str, inner: str) -> None:
    """On the right and on the left. From the second lengths on they vary, in one graph."""
    entry = BY_NAME["t5"]
    if inner == "inductor":  # which takes a minute for two layers of each kind
        entry = dataclasses.replace(
            entry, builder=functools.partial(hf, "T5Model", num_layers=1, num_decoder_layers=1), sites=3
        )
    model, double = entry.build(attention), entry.build("eager").double()
    graphs = Graphs(inner)
    compiled = graphs.compile(model)
    for lengths in ((11, 7), (9, 6), (13, 10)):
        for left in (False, True):
            inputs = t5_inputs(*lengths, left)
            with sigmoid_oracle(entry.owners) as log:
                expected = t5_result(double, double, inputs)
            assert log.swapped == entry.sites
            for ours, theirs in zip(t5_result(compiled, model, inputs), expected, strict=True):
                scale = theirs.abs().max().item()
                torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 + 1e-4 * scale)
    assert len(graphs.modules) == 2 and len(graphs.calls) == 2 * entry.sites and graphs.unfused == 0


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_tensor_of_t5_is_as_large_as_its_scores(attention: str) -> None:
    sizes: list[torch.Size] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        values = [node.meta.get("val") for node in graph.graph.nodes]
        sizes.extend(value.shape for value in values if isinstance(value, Tensor))
        return graph.forward

    model = BY_NAME["t5"].build(attention)
    options = {"inner": aot_autograd(fw_compiler=compiler, bw_compiler=compiler)}
    torch._dynamo.reset()
    t5_result(torch.compile(model, backend="sigswap", options=options), model, t5_inputs(11, 7, False))
    scores = [size for size in sizes if size[-2:] in [(11, 11), (7, 7), (7, 11)]]
    assert scores and all(size[:-2].numel() <= 4 for size in scores)  # the heads of one sequence, of three


# --------------------------------------------------------------------------------- modes and packages


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_modes(mode: str, model: Blocks, x: Tensor) -> None:
    expected = oracle(model, x)
    sigswap.convert(model, example_inputs=(x,))
    close(torch.compile(model, backend="sigswap", mode=mode)(x), expected)


def test_no_copies_around_the_op(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated code: what stands before the op is one kernel for QK-norm and rotation, and after it no copy."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._inductor.utils import run_and_get_code

    class Rotated(Handwritten):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            q, k = (nn.functional.rms_norm(t, (8,)) for t in (q, k))
            angle = torch.arange(x.shape[1])[:, None] * torch.ones(8)
            q, k = (t * angle.cos() + t.roll(4, -1) * angle.sin() for t in (q, k))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.merged(out) * 0.5 + x

    model = Rotated().eval()
    kernels = []
    for name in ("inductor", "sigswap"):
        torch._dynamo.reset()
        with torch.no_grad():
            _, (code,) = run_and_get_code(torch.compile(model, backend=name, fullgraph=True), x)
        kernels.append(code.count("async_compile.cpp_pybinding("))
        assert (".sigmoid_attention.default(" in code) == (name == "sigswap")
    assert kernels[1] <= kernels[0]


@pytest.mark.slow
def test_export_and_package(model: Blocks, x: Tensor, tmp_path: Path) -> None:
    expected = oracle(model, x)
    sigswap.convert(model, example_inputs=(x,))
    program = torch.export.export(model, (x,))
    close(program.module()(x), expected)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        close(torch._inductor.aoti_load_package(path)(x), expected)


@pytest.mark.slow
def test_package_of_a_model_with_sdpa(tmp_path: Path) -> None:
    """The op is in the package: sigswap must be imported where that is loaded."""
    entry = BY_NAME["vit"]
    model, inputs = entry.build("fused"), entry.make_inputs("fused")
    sigswap.convert(model, example_inputs=inputs)
    with torch.no_grad():
        expected = call(model, inputs)
        program = torch.export.export(model, inputs)  # type: ignore[arg-type]
        assert [n for n in program.graph.nodes if "sigmoid_attention" in str(n.target)]
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        actual = torch._inductor.aoti_load_package(path)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
