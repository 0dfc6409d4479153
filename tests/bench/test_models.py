"""The suite models of ``sigswap bench``: its cells, figures, checks, and what is compiled and runs when."""

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
from rich.console import Console
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from sigswap.bench import models as bench_models
from sigswap.bench import plain_models, timing, versions
from sigswap.bench import subject as subjects
from sigswap.bench.cells import DEFAULT_SUITES, MODELS, ModelCell, cells
from sigswap.bench.peers import peers_of
from sigswap.bench.results import Benchmark, Row
from sigswap.commands.cli import app
from sigswap.errors import BenchmarkError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def model_row(quantity: str, **measured: float) -> Row:
    return Row(ModelCell("block", 4, 4096), "bf16", "training step", measured, {"fa2": "no"}, quantity, "cudnn")


def test_model_cells() -> None:
    full, quick = cells("models"), cells("models", quick=True)
    assert "models" not in DEFAULT_SUITES
    peers = {peer.name for peer in peers_of("models")}
    for some in (full, quick):
        assert {cell.model for cell in some} == set(MODELS) == set(bench_models._BUILDERS)
        assert len({cell.label for cell in some}) == len(some)
        assert all(cell.suite == "models" and set(cell.without) <= peers for cell in some)
    assert [cell.label for cell in full[:2]] == ["block 4 x 4096", "ViT-B/16 256 x 224"]


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


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize(
    ("model", "peer", "packages"),
    [
        ("block", "sdpa", ()),
        ("llama-no-mask", "sdpa", ("transformers",)),
        ("swin", "unfused", ("timm",)),
        ("t5-padding", "unfused", ("transformers",)),
        ("llama-left-padding", "sdpa", ("transformers",)),
        ("llama-packed", "sdpa", ("transformers",)),
        ("gemma2", "unfused", ("transformers",)),
        ("whisper", "sdpa", ("transformers",)),
    ],
)
def test_a_model_is_measured_on_a_cpu(model: str, peer: str, packages: tuple[str, ...]) -> None:
    for package in packages:
        pytest.importorskip(package)
    cell = next(cell for cell in cells("models", quick=True) if cell.model == model)
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
    assert versions.keeps_memory("reduce-overhead") and versions.keeps_memory("max-autotune")
    assert not versions.keeps_memory("max-autotune-no-cudagraphs") and not versions.keeps_memory(None)


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


@pytest.mark.slow
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
    by_hand = subjects.ModelPeer(functools.partial(sdpa_kernel, SDPBackend.MATH))  # which a CPU has
    monkeypatch.setitem(subjects.SDPA, "efficient", by_hand)
    monkeypatch.setattr(bench_models, "repeated_ms", recorder.timed)
    cell = next(cell for cell in cells("models", quick=True) if cell.model == model)
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
    monkeypatch.setattr(plain_models, "SDPA", dict.fromkeys(peers, subjects.ModelPeer()))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        cell = ModelCell("block", 2, 32, small=True)
        rows = bench_models.measure(cell, "fp32", peers, device="cpu", inner="eager")
    for row in rows:
        assert row.quantity != "time" or set(row.measured) == {"sigswap", *peers}


def test_a_peer_that_fails_in_training_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(*arguments: Any) -> subjects.Subject:
        subject = original(*arguments)
        subject.peers = {"fa2": subjects.ModelPeer(failing), "sdpa": subjects.ModelPeer()}
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

    monkeypatch.setattr(versions, "convert", wrong)
    rows = bench_models.measure(ModelCell("block", 2, 32, small=True), "fp32", [], device="cpu", inner="eager")
    for row in rows:
        assert not row.measured and "relative error of the compiled model's output is" in row.reasons["sigswap"]
    assert Benchmark({}, "fp32", None, rows).failures


def test_outputs_that_are_not_finite_are_wrong() -> None:
    out = torch.ones(3, 4)
    versions.check_output(out, out)
    with pytest.raises(BenchmarkError, match="not all outputs are finite"):
        versions.check_output(out * torch.nan, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_quick_run_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = CliRunner().invoke(app, ["bench", "--quick", "--suite", "models", "--cell", "*block*", "--json", str(file)])
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["original"] in ("fa2", "cudnn", "efficient", "sdpa")
        assert row["results"]["sigswap"]["of_original"] > 0
