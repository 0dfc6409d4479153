"""``sigswap bench``: its cells, figures, tables, files and checks, without a GPU; and on one, the quick run."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch._dynamo.backends.common import aot_autograd
from typer.testing import CliRunner

import sigswap
from sigswap.bench import models as bench_models
from sigswap.bench import peers as bench_peers
from sigswap.bench import run as bench
from sigswap.bench import timing
from sigswap.bench.run import Benchmark, Cell, ModelCell, Row
from sigswap.commands.cli import app
from sigswap.errors import ArgumentError, BenchmarkError

FULL = Cell("train", 2, 3, 3, 40, 40, 16)
CAUSAL = Cell("train", 2, 3, 3, 40, 40, 16, causal=True)
DECODE = Cell("decode", 3, 4, 2, 1, 50, 16)
VARLEN = Cell("varlen", 3, 2, 2, 40, 40, 16, lengths=(7, 40, 13))
VARLEN_CAUSAL = Cell("varlen", 3, 2, 2, 40, 40, 16, causal=True, lengths=(7, 40, 13))

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# Cells and counts.


@pytest.mark.parametrize("cell", [FULL, CAUSAL, DECODE, VARLEN, VARLEN_CAUSAL])
def test_flops_and_bytes_are_those_of_the_visible_pairs(cell: Cell) -> None:
    flops = 0
    for length in cell.lengths or [cell.kv_len] * cell.batch:
        for row in range(length if cell.trains else 1):
            keys = sum(key <= row or not cell.causal for key in range(length))
            flops += cell.heads * keys * (2 * cell.head_dim + 2 * cell.head_dim)
    assert cell.forward_flops == flops
    if not cell.lengths:
        inputs = bench.make_inputs(cell, torch.bfloat16, "cpu")
        assert cell.kv_bytes(torch.bfloat16) == inputs.key.nbytes + inputs.value.nbytes


@pytest.mark.parametrize("suite", bench.DEFAULT_SUITES)
def test_cells(suite: str) -> None:
    cells, quick = bench.cells(suite), bench.cells(suite, quick=True)
    assert cells == bench.cells(suite)  # the random lengths, too
    assert 1 <= len(quick) <= len(cells)
    assert len({cell.label for cell in cells}) == len(cells)
    for cell in cells + quick:
        assert cell.suite == suite and set(cell.without) <= set(bench.SUITES[suite])
        assert cell.heads % cell.kv_heads == 0 and (cell.kv_heads == cell.heads or not cell.trains)
        tokens = sum(cell.lengths) or cell.batch * cell.q_len
        if suite in ("train", "varlen"):
            assert cell.heads * cell.head_dim == 2048
        if suite == "train":
            assert tokens == 16384
        if suite == "short":
            assert 50_000 <= tokens <= 130_000
        if suite == "decode":
            assert 2 * cell.batch * cell.kv_heads * cell.kv_len * cell.head_dim * 2 <= 8 * 2**30


def test_figures_of_a_row() -> None:
    train = Cell("train", 4, 16, 16, 4096, 4096, 128)  # 4 * 16 * 4096^2 * 128 multiplications, twice
    flops = 2 * 2 * 4 * 16 * 4096**2 * 128
    forward = Row(train, "bf16", "forward", {"sigswap": 0.5, "fa2": 1.0}, {"cudnn": "no"})
    assert forward.unit == "TFLOP/s"
    assert forward.value("sigswap") == pytest.approx(flops / 0.5e-3 / 1e12)
    assert forward.ratio("fa2") == 2.0
    assert forward.value("cudnn") is None and forward.ratio("cudnn") is None
    backward = Row(train, "bf16", "backward", {"sigswap": 1.0}, {})
    assert backward.value("sigswap") == pytest.approx(2.5 * flops / 1e-3 / 1e12)
    memory = Row(train, "bf16", "memory", {"sigswap": 100.0, "fa2": 150.0}, {})
    assert (memory.unit, memory.value("fa2"), memory.ratio("fa2")) == ("MiB", 150.0, 1.5)
    decode = Row(Cell("decode", 1, 32, 8, 1, 8192, 128), "fp16", "forward", {"sigswap": 0.02}, {})
    assert decode.value("sigswap") == pytest.approx(2 * 8192 * 8 * 128 * 2 / 0.02e-3 / 1e9)
    host = Row(Cell("host", 1, 2, 2, 16, 16, 16), "bf16", "forward+backward", {"sigswap": 30.0, "sdpa": 15.0}, {})
    assert (host.unit, host.value("sigswap"), host.ratio("sdpa")) == ("us", 30.0, 0.5)


# What a result becomes.


@pytest.fixture
def result() -> Benchmark:
    rows = [
        Row(FULL, "bf16", "forward", {"sigswap": 2.0, "fa2": 4.0}, {"cudnn": "RuntimeError: No available kernel."}),
        Row(CAUSAL, "bf16", "forward", {"sigswap": 1.0, "cudnn": 1.5}, {"fa2": "RuntimeError: no"}),
        Row(DECODE, "bf16", "forward", {"sigswap": 1e-3, "flex": 2e-3}, {}),
        Row(VARLEN, "bf16", "backward", {"padded": 1.0}, {"sigswap": "BenchmarkError: wrong result"}),
    ]
    machine = {"gpu": "A GPU", "driver": "1.2.3", "cuda": "13.0", "torch": "2.11.0", "triton": "3.6.0"}
    return Benchmark(machine, "bf16", 40.0, rows)


def test_json(result: Benchmark) -> None:
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["machine"]["gpu"] == "A GPU" and data["dtype"] == "bf16"
    first, _, decode, failed = data["rows"]
    assert first["cell"]["head_dim"] == 16 and first["unit"] == "TFLOP/s"
    assert first["results"]["fa2"]["ratio"] == 2.0 and first["results"]["fa2"]["milliseconds"] == 4.0
    assert "No available kernel" in first["results"]["cudnn"]["reason"]
    gb_per_s = 2 * 3 * 2 * 50 * 16 * 2 / 1e-6 / 1e9
    assert decode["results"]["sigswap"]["value"] == pytest.approx(gb_per_s)
    assert decode["results"]["sigswap"]["share_of_copy"] == pytest.approx(gb_per_s / 40)
    assert failed["cell"]["lengths"] == [7, 40, 13] and failed["results"]["sigswap"] == {
        "reason": "BenchmarkError: wrong result"
    }


def test_tables(result: Benchmark) -> None:
    stream = io.StringIO()
    Console(file=stream, width=160).print(result)
    text = stream.getvalue()
    titles = " ".join(text.split())
    assert titles.count("A GPU, driver 1.2.3, cuda 13.0, torch 2.11.0, triton 3.6.0") == 3  # one table per suite
    assert "(2.00x)" in text and "(1.50x)" in text
    assert "efficient" not in text  # it ran nowhere
    assert "48%" in text  # 19.2 of 40 GB/s
    causal = next(line for line in text.splitlines() if "B=2 N=40 D=16 causal" in line)
    assert [part.strip() for part in causal.split("│")][4:6] == ["0.0", "-"]


def test_failures(result: Benchmark) -> None:
    assert result.failures == ["varlen 3 x 7..40 D=16: BenchmarkError: wrong result"]


def test_plot(result: Benchmark, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    bench.check_plot(file)
    figure = result.figure()
    figure.savefig(file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [axes.get_ylabel() for axes in figure.axes] == ["TFLOP/s", "GB/s", "TFLOP/s"]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == pytest.approx([19.2, 9.6])
    with pytest.raises(ArgumentError, match=r"must end in one of .*\.png"):
        bench.check_plot(tmp_path / "plot.txt")


# Correctness.


@pytest.mark.parametrize("cell", [FULL, CAUSAL, DECODE, VARLEN, VARLEN_CAUSAL])
def test_check_accepts_the_op_and_nothing_else(cell: Cell) -> None:
    inputs = bench.make_inputs(cell, torch.float32, "cpu")
    out = bench_peers.build("sigswap", cell, inputs).forward()
    grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_out) if cell.trains else ()
    out = out.detach()
    bench.check(cell, inputs, out, grads)
    with pytest.raises(BenchmarkError, match="error of the output"):
        bench.check(cell, inputs, 1.01 * out, grads)
    with pytest.raises(BenchmarkError, match="error of the output is nan"):
        bench.check(cell, inputs, out * torch.nan, grads)
    for index, name in enumerate(("query", "key", "value")[: len(grads)]):
        wrong = [1.01 * grad if at == index else grad for at, grad in enumerate(grads)]
        with pytest.raises(BenchmarkError, match=f"gradient of {name}"):
            bench.check(cell, inputs, out, wrong)


def test_check_sees_a_wrong_mask() -> None:
    inputs = bench.make_inputs(CAUSAL, torch.float32, "cpu")
    with pytest.raises(BenchmarkError, match="output"):
        bench.check(CAUSAL, inputs, sigswap.sigmoid_attention(*inputs.leaves).detach(), ())


@pytest.mark.parametrize("cell", [VARLEN, VARLEN_CAUSAL])
def test_padded_peer_is_softmax_attention_of_each_sequence(cell: Cell) -> None:
    inputs = bench.make_inputs(cell, torch.float32, "cpu")
    padded = bench_peers._padded(cell, inputs)
    out = padded.forward()
    for number, (length, *parts) in enumerate(
        zip(cell.lengths, *(leaf.split(cell.lengths) for leaf in inputs.leaves), strict=True)
    ):
        query, key, value = (part.transpose(0, 1) for part in parts)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=cell.causal).transpose(0, 1)
        torch.testing.assert_close(out[number, :length], expected)
    assert torch.autograd.grad(out, padded.leaves, padded.grad_out)[0].shape == out.shape


# The run, on a CPU in the GPU's place.


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make_inputs = bench.make_inputs

    def timed(call: Callable[[], object]) -> float:
        call()
        return 1.0

    monkeypatch.setattr(bench, "make_inputs", lambda cell, dtype, device: make_inputs(cell, dtype, "cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for timer in ("gpu_ms", "host_us", "peak_mib"):
        monkeypatch.setattr(bench, timer, timed)


@pytest.mark.usefixtures("on_cpu")
def test_measure_times_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bench_peers.Implementation:
        raise RuntimeError("No available kernel.")

    monkeypatch.setitem(bench_peers._DENSE, "cudnn", refuse)
    monkeypatch.setitem(bench_peers._DENSE, "fa2", bench_peers._DENSE["sdpa"])
    rows = bench.measure(CAUSAL, "fp32", ["fa2", "cudnn", "flex"], left_out=["flex"])
    assert [row.phase for row in rows] == ["forward", "backward", "memory"]
    for row in rows:
        assert row.measured == {"sigswap": 1.0, "fa2": 1.0}
        assert row.reasons["cudnn"] == "RuntimeError: No available kernel."
        assert "--peers" in row.reasons["flex"]
    assert [row.phase for row in bench.measure(DECODE, "fp32", [])] == ["forward"]


@pytest.mark.usefixtures("on_cpu")
def test_a_wrong_kernel_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "sigmoid_attention", lambda query, key, value, **_: query + key + value)
    monkeypatch.setitem(bench_peers._DENSE, "fa2", bench_peers._DENSE["sdpa"])
    for row in bench.measure(FULL, "fp32", ["fa2"]):
        assert set(row.measured) == {"fa2"} and row.ratio("fa2") is None
        assert "wrong result: the relative error of the output" in row.reasons["sigswap"]


def test_turns() -> None:
    log: list[str] = []

    @contextmanager
    def entered(name: str) -> Iterator[None]:
        log.append(f"({name}")
        yield
        log.append(")")

    def timed(call: Callable[[], object]) -> float:
        call()
        return float(len(log))

    def fail() -> None:
        log.append("fails")
        raise RuntimeError("no")

    calls = {"a": lambda: log.append("a"), "failing": fail, "left out": fail, "b": lambda: log.append("b")}
    contexts = {name: functools.partial(entered, name) for name in calls}
    reasons = {"left out": "why"}
    figures = timing.in_turns(timed, calls, contexts, reasons, rounds=3)
    first, second, third = "(a a ) (failing fails (b b )", "(b b ) (a a )", "(a a ) (b b )"
    assert " ".join(log) == f"{first} {second} {third}"
    assert reasons == {"left out": "why", "failing": "RuntimeError: no"}
    assert figures == {"a": 13.0, "b": 10.0}  # the medians of 2, 13, 16 and of 7, 10, 19


# Whole models.


def model_row(quantity: str, **measured: float) -> Row:
    return Row(ModelCell("block", 4, 4096), "bf16", "training step", measured, {"fa2": "no"}, quantity, "cudnn")


def test_model_cells() -> None:
    cells, quick = bench.cells("models"), bench.cells("models", quick=True)
    assert "models" not in bench.DEFAULT_SUITES
    for some in (cells, quick):
        assert {cell.model for cell in some} == set(bench_models.MODELS)
        assert len({cell.label for cell in some}) == len(some)
        assert all(cell.suite == "models" and set(cell.without) <= set(bench.SUITES["models"]) for cell in some)
    assert [cell.label for cell in cells[:2]] == ["block 4 x 4096", "ViT-B/16 256 x 224"]


def test_figures_of_models() -> None:
    rows = [model_row("time", sigswap=8.0, cudnn=10.0, sdpa=12.0), model_row("kernels", sigswap=20.0, cudnn=16.0)]
    assert [row.unit for row in rows] == ["ms", "kernels"]
    assert [row.of_original for row in rows] == [0.8, 1.25]
    assert rows[0].ratio("cudnn") == 1.25 and rows[0].value("sdpa") == 12.0
    assert model_row("memory", sigswap=1.0).of_original is None

    result = Benchmark({"gpu": "A GPU"}, "bf16", None, rows)
    first, second = json.loads(json.dumps(result.to_dict()))["rows"]
    assert (first["original"], first["unit"], first["cell"]["model"]) == ("cudnn", "ms", "block")
    assert first["results"]["sigswap"] == {"value": 8.0, "of_original": 0.8}
    assert first["results"]["sdpa"] == {"value": 12.0, "ratio": 1.5} and first["results"]["fa2"] == {"reason": "no"}
    assert second["results"]["cudnn"]["value"] == 16.0
    stream = io.StringIO()
    Console(file=stream, width=160).print(result)
    line = next(line for line in stream.getvalue().splitlines() if "│ ms" in line)
    parts = [part.strip() for part in line.strip("│").split("│")]
    assert parts == ["block 4 x 4096", "training step", "ms", "8.00", "80%", "cudnn", "10.00 (1.25x)", "12.00 (1.50x)"]
    pytest.importorskip("matplotlib")
    assert [axes.get_ylabel() for axes in result.figure().axes] == ["ms", "kernels"]


@without_gpu
@pytest.mark.parametrize(
    ("model", "peer", "packages"),
    [
        ("block", "sdpa", ()),
        ("llama-no-mask", "sdpa", ("transformers",)),
        ("swin", "unfused", ("timm",)),
        ("t5", "unfused", ("transformers",)),
    ],
)
def test_a_model_is_measured_on_a_cpu(model: str, peer: str, packages: tuple[str, ...]) -> None:
    for package in packages:
        pytest.importorskip(package)
    cell = next(cell for cell in bench.cells("models", quick=True) if cell.model == model)
    peers = ["cudnn", "efficient", peer]
    rows = bench_models.measure(cell, "fp32", peers, ["efficient"], device="cpu", inner="eager")
    assert [(row.phase, row.quantity) for row in rows] == [
        (phase, quantity) for phase in ("forward", "training step") for quantity in ("time", "memory", "kernels")
    ]
    for row in rows:
        assert set(row.measured) | set(row.reasons) == {"sigswap", *peers}
        assert row.reasons["cudnn"] and row.reasons["efficient"]  # a GPU's; left out, or of no such model
        if row.quantity == "time":
            assert set(row.measured) == {"sigswap", peer} and not row.unavailable
            assert min(row.measured.values()) > 0
            assert row.original == peer
            assert row.of_original == row.measured["sigswap"] / row.measured[peer]
        else:
            assert not row.measured and row.unavailable and "needs a GPU" in row.reasons["sigswap"]
    assert not Benchmark({}, "fp32", None, rows).failures


def test_a_model_is_measured_in_a_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    cell = ModelCell("block", 2, 32, small=True)
    rows = bench_models.measure(cell, "fp32", ["sdpa"], device="cpu", inner="eager", mode="reduce-overhead")
    times = [row for row in rows if row.quantity == "time"]
    assert len(times) == 2 and all(set(row.measured) == {"sigswap", "sdpa"} for row in times)
    calls = 3 + bench_models.ROUNDS * (1 + timing.LONG_CALLS)
    assert len(marks) == len(bench_models.PHASES) * 2 * calls  # in each call of each of the two
    assert not Benchmark({}, "fp32", None, rows).failures
    assert bench_models.keeps_memory("reduce-overhead") and bench_models.keeps_memory("max-autotune")
    assert not bench_models.keeps_memory("max-autotune-no-cudagraphs") and not bench_models.keeps_memory(None)


class Recorder:
    """A compiler that notes which of its graphs run in which turn, and which attention is in each graph."""

    def __init__(self) -> None:
        self.attentions: list[str] = []  # by the graph's number
        self.turns: list[set[int]] = []
        self.compiled_in_turns = 0
        self._running: set[int] = set()

    def __call__(self, graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return aot_autograd(fw_compiler=self._compile)(graph_module, example_inputs)

    def _compile(self, graph_module: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.attentions)
        targets = " ".join(str(node.target) for node in graph_module.graph.nodes)
        kinds = {"sigmoid": "sigswap", "flash_attention": "flash", "softmax": "unfused"}
        self.attentions.append(next((kind for part, kind in kinds.items() if part in targets), "none"))

        def run(args: list[Any]) -> Any:
            self._running.add(number)
            return graph_module.forward(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def timed(self, call: Callable[[], object]) -> float:
        before = len(self.attentions)
        self._running.clear()
        call()
        self.turns.append(set(self._running))
        self.compiled_in_turns += len(self.attentions) - before
        return 1.0


@without_gpu
@pytest.mark.parametrize(
    ("model", "attentions", "packages"),
    [
        ("block", {"fa2": "flash", "efficient": "unfused", "sdpa": "flash"}, ()),
        ("swin", {"unfused": "unfused", "sdpa": "flash"}, ("timm",)),
    ],
)
def test_each_version_of_a_model_runs_in_its_turns(
    model: str, attentions: dict[str, str], packages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        pytest.importorskip(package)
    recorder = Recorder()
    by_hand = bench_models.Peer(functools.partial(bench_models._sdpa_backend, "MATH"))  # which a CPU has
    monkeypatch.setitem(bench_models._SDPA, "efficient", by_hand)
    monkeypatch.setattr(bench_models, "repeated_ms", recorder.timed)
    cell = next(cell for cell in bench.cells("models", quick=True) if cell.model == model)
    rows = bench_models.measure(cell, "fp32", list(attentions), device="cpu", inner=recorder)
    assert all(set(row.measured) == {"sigswap", *attentions} for row in rows if row.quantity == "time")

    kinds = ["sigswap", *attentions.values()]
    count = len(kinds)
    assert recorder.attentions[:count] == kinds  # the forward pass; then a training step's two
    if model == "block":  # a CPU has no flash attention that gives the gradient of Swin's bias
        assert recorder.attentions[count::2] == kinds and recorder.attentions[count + 1 :: 2] == kinds
    graphs = [[{at} for at in range(count)], [{count + 2 * at, count + 2 * at + 1} for at in range(count)]]
    order = [at for number in range(bench_models.ROUNDS) for at in range(count)[:: -1 if number % 2 else 1]]
    assert recorder.turns == [own[at] for own in graphs for at in order]
    assert recorder.compiled_in_turns == 0


@without_gpu
def test_a_peer_that_fails_to_compile_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    recorder = Recorder()
    monkeypatch.setattr(bench_models, "repeated_ms", recorder.timed)
    cell = ModelCell("llama", 2, 32, small=True)
    rows = bench_models.measure(cell, "fp32", ["efficient", "sdpa"], device="cpu", inner=recorder)
    for row in rows:
        assert "TorchRuntimeError" in row.reasons["efficient"]
        assert row.quantity != "time" or set(row.measured) == {"sigswap", "sdpa"}
    # One graph each, and in training its backward pass: Dynamo skips no code that it could not compile for the peer.
    turns = 2 * bench_models.ROUNDS
    assert [len(turn) for turn in recorder.turns] == [1] * turns + [2] * turns
    assert recorder.compiled_in_turns == 0


def test_more_versions_than_dynamo_compiles_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = ("fa2", "cudnn", "efficient", "sdpa")
    monkeypatch.setattr(bench_models, "_SDPA", dict.fromkeys(peers, bench_models.Peer()))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        cell = ModelCell("block", 2, 32, small=True)
        rows = bench_models.measure(cell, "fp32", peers, device="cpu", inner="eager")
    for row in rows:
        assert row.quantity != "time" or set(row.measured) == {"sigswap", *peers}


def test_a_peer_that_fails_in_training_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(*arguments: Any) -> bench_models.Subject:
        subject = original(*arguments)
        subject.peers = {"fa2": bench_models.Peer(failing), "sdpa": bench_models.Peer()}
        backward = subject.backward

        def fail_late(returned: Any) -> None:
            backward(returned)
            if fails:
                raise RuntimeError("no")

        subject.backward = fail_late
        built.append(subject)
        return subject

    @contextmanager
    def failing() -> Iterator[None]:
        fails.append(True)
        yield
        fails.clear()

    original, fails = bench_models.build, []
    monkeypatch.setattr(bench_models, "build", build)
    cell = ModelCell("block", 2, 32, small=True)
    rows = bench_models.measure(cell, "fp32", ["fa2", "sdpa"], device="cpu", inner="eager")
    times = {row.phase: row for row in rows if row.quantity == "time"}
    assert set(times["forward"].measured) == {"sigswap", "fa2", "sdpa"} and not times["forward"].reasons
    assert times["training step"].reasons["fa2"] == "RuntimeError: no"
    assert all(leaf.grad is None for leaf in built[0].leaves)


@pytest.mark.parametrize(("model", "package"), [("vit", "timm"), ("t5", "transformers")])
def test_a_model_without_its_package(model: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    rows = bench_models.measure(ModelCell(model, 2, 56, small=True), "fp32", ["sdpa"], device="cpu")
    assert len(rows) == 6
    for row in rows:
        assert not row.measured and row.of_original is None
        assert all(f"needs the package '{package}'" in row.reasons[name] for name in ("sigswap", "sdpa"))
    assert not Benchmark({}, "fp32", None, rows).failures


@without_gpu
def test_a_wrong_model_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module, **_: object) -> None:
        """Computes something else when it is compiled."""
        model.register_forward_hook(lambda _, __, out: 2 * out if torch.compiler.is_compiling() else out)

    monkeypatch.setattr(bench_models, "convert", wrong)
    rows = bench_models.measure(ModelCell("block", 2, 32, small=True), "fp32", [], device="cpu", inner="eager")
    for row in rows:
        assert not row.measured and "relative error of the compiled model's output is" in row.reasons["sigswap"]
    assert Benchmark({}, "fp32", None, rows).failures


def test_outputs_that_are_not_finite_are_wrong() -> None:
    out = torch.ones(3, 4)
    bench_models._check_output(out, out)
    with pytest.raises(BenchmarkError, match="not all outputs are finite"):
        bench_models._check_output(out * torch.nan, None)


# The command.


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_help_names_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = run("--help").stdout
    for name in (*bench.SUITES, *bench.PEERS, *bench.DTYPES):
        assert name in text


@without_gpu
def test_without_a_gpu() -> None:
    result = run("--quick")
    assert result.exit_code == 1
    assert "needs an NVIDIA GPU of compute capability 8.0" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "trian"), "suite 'trian' is not one of train, short, decode, varlen, host, models."),
        (("--peers", "fa4"), "peer 'fa4' is not one of fa2, cudnn,"),
        (("--cell", "ViT*"), "no cell of train, short, decode, varlen, host has a label like ViT*."),
        (("--dtype", "int8"), "dtype 'int8' is not one of bf16, fp16, fp32."),
        (("--json", "nowhere/figures.json"), "there is no directory nowhere"),
        (("--plot", "nowhere/plot.png"), "there is no directory nowhere"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1 and message in result.stderr


def test_a_plot_without_matplotlib_fails_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("it ran"))
    result = run("--plot", tmp_path / "plot.png")
    assert result.exit_code == 1 and "pip install 'sigswap[bench]'" in result.stderr


def test_files_are_written_and_a_failure_of_sigswap_is_an_error(
    result: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run", lambda *_, **__: result)
    done = run("--json", tmp_path / "figures.json")
    assert done.exit_code == 1 and "varlen 3 x 7..40 D=16: BenchmarkError: wrong result" in done.stderr
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(json.dumps(result.to_dict()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_quick_run(tmp_path: Path) -> None:
    done = run("--quick", "--json", tmp_path / "figures.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert {row["suite"] for row in rows} == set(bench.DEFAULT_SUITES)
    for row in rows:
        assert row["results"]["sigswap"]["value"] > 0
        assert any("ratio" in result for result in row["results"].values()), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_quick_run_of_a_model(tmp_path: Path) -> None:
    done = run("--quick", "--suite", "models", "--cell", "*block*", "--json", tmp_path / "figures.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["original"] in ("fa2", "cudnn", "efficient", "sdpa")
        assert row["results"]["sigswap"]["of_original"] > 0
