"""``sigswap bench``: its cells, figures, tables, files and checks, without a GPU; and on one, the quick run."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import sigswap
from sigswap.bench import own, peers, timing
from sigswap.bench import run as bench
from sigswap.bench.cells import DEFAULT_SUITES, DTYPES, SETUPS, SUITES, Cell, Feature, Mask, cells
from sigswap.bench.correctness import check
from sigswap.bench.inputs import Inputs, in_pages, make_inputs
from sigswap.bench.peers.peer import Implementation, Peer
from sigswap.bench.peers.sdpa import SDPA
from sigswap.bench.results import Benchmark, Row, _color, check_plot
from sigswap.commands.cli import app
from sigswap.errors import ArgumentError, BenchmarkError

FULL = Cell("train", 2, 3, 3, 40, 40, 16, 16)
CAUSAL = Cell("train", 2, 3, 3, 40, 40, 16, 16, causal=True)
WIDER_KEYS = Cell("train", 2, 3, 3, 40, 40, 24, 16, causal=True)
GROUPED = Cell("train", 2, 4, 2, 40, 40, 16, 16)
DECODE = Cell("decode", 3, 4, 2, 1, 50, 16, 16)
LATENT = Cell("decode", 2, 4, 1, 1, 50, 24, 16, latent=True)
PAGED = Cell("decode", 3, 4, 2, 1, 48, 16, 16, page_size=8)
LATENT_PAGED = Cell("decode", 3, 4, 1, 1, 48, 24, 16, latent=True, page_size=8)
VARLEN = Cell("varlen", 3, 2, 2, 40, 40, 16, 16, lengths=(7, 40, 13))
VARLEN_CAUSAL = Cell("varlen", 3, 2, 2, 40, 40, 16, 16, causal=True, lengths=(7, 40, 13))

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# Cells and counts.


@pytest.mark.parametrize("cell", [FULL, CAUSAL, WIDER_KEYS, DECODE, VARLEN, VARLEN_CAUSAL])
def test_flops_and_bytes_are_those_of_the_visible_pairs(cell: Cell) -> None:
    flops = 0
    for length in cell.lengths or [cell.kv_len] * cell.batch:
        for row in range(length if cell.trains else 1):
            keys = sum(key <= row or not cell.causal for key in range(length))
            flops += cell.heads * keys * (2 * cell.head_dim + 2 * cell.value_dim)
    assert cell.forward_flops == flops
    if cell.value_dim == cell.head_dim:
        assert cell.backward_flops == 2.5 * flops
    if not cell.lengths:
        inputs = make_inputs(cell, torch.bfloat16, "cpu")
        assert cell.kv_bytes(torch.bfloat16) == inputs.key.nbytes + inputs.value.nbytes


@pytest.mark.parametrize("suite", [*DEFAULT_SUITES, "features"])
def test_cells(suite: str) -> None:
    full, quick = cells(suite), cells(suite, quick=True)
    assert full == cells(suite)  # the random lengths, too
    assert 1 <= len(quick) <= len(full)
    assert len({cell.label for cell in full}) == len(full)
    for cell in full + quick:
        assert isinstance(cell, Cell) and cell.suite == suite and cell.setup in SETUPS
        assert cell.heads % cell.kv_heads == 0
        tokens = sum(cell.lengths) or cell.batch * cell.q_len
        if suite in ("train", "varlen"):
            assert 0 <= 2048 - cell.heads * cell.value_dim < cell.value_dim
        if suite == "train":
            assert tokens == 16384
        if suite == "short":
            assert 50_000 <= tokens <= 130_000
        if suite == "decode":
            assert 2 * cell.batch * cell.kv_heads * cell.kv_len * cell.head_dim * 2 <= 8 * 2**30


@pytest.mark.parametrize("cell", [PAGED, LATENT_PAGED])
def test_a_paged_cell_computes_what_the_same_cell_without_pages_does(cell: Cell) -> None:
    inputs = make_inputs(cell, torch.float32, "cpu")
    out = own.build(cell, inputs).forward()
    check(cell, inputs, out, ())
    with pytest.raises(BenchmarkError, match="wrong result"):
        check(cell, inputs, out.flip(0), ())
    assert cell.label == f"B=3 keys=48{' latent D=24/16 H=4/1' if cell.latent else ''} pages of 8"
    pages = in_pages(cell, inputs)
    assert (pages.key_cache.data_ptr() == pages.value_cache.data_ptr()) == cell.latent


def test_a_latent_cache_is_read_once() -> None:
    inputs = make_inputs(LATENT, torch.bfloat16, "cpu")
    assert inputs.value.data_ptr() == inputs.key.data_ptr() and inputs.value.shape[3] == 16
    assert LATENT.kv_bytes(torch.bfloat16) == 2 * 50 * 24 * 2 == inputs.key.nbytes
    assert LATENT.label == "B=2 keys=50 latent D=24/16 H=4/1"
    latent = [(cell.heads, cell.page_size) for cell in cells("decode") if isinstance(cell, Cell) and cell.latent]
    assert latent == [(16, None), (16, None), (128, None), (128, None), (16, 64), (128, 64)]


def test_features_has_what_models_add_to_plain_attention() -> None:
    found = [cell for cell in cells("features") if isinstance(cell, Cell)]
    assert {feature for cell in found for feature in cell.features} == {*get_args(Feature)} - {"pages"}  # of decode
    assert {cell.mask for cell in found} == {None, *get_args(Mask)}
    assert [cell.label for cell in found[:4]] == [
        "B=4 N=4096 D=128 H=16/8 causal softcap=50.0",
        "B=4 N=4096 D=256 H=8/4 causal softcap=50.0",
        "B=16 N=1024 D=64 dropout=0.1",
        "B=4 N=1024 D=64 fp32",
    ]
    assert sum(bool(cell.lengths) for cell in found) == 2 and sum(not cell.trains for cell in found) == 3


def test_train_has_wide_narrow_and_grouped_heads() -> None:
    labels = [cell.label for cell in cells("train")]
    shapes = {cell.label: (cell.heads, cell.kv_heads) for cell in cells("train") if isinstance(cell, Cell)}
    for mask in ("", " causal"):
        assert {f"B=4 N=4096 D={dims}{mask}" for dims in ("64", "96", "128", "192/128", "256")} <= set(labels)
        assert shapes[f"B=4 N=4096 D=192/128{mask}"] == (16, 16)
        assert shapes[f"B=4 N=4096 D=64 H=32/8{mask}"] == (32, 8)
        assert shapes[f"B=4 N=4096 D=128 H=16/4{mask}"] == (16, 4)


def test_backward_flops_of_values_narrower_than_keys() -> None:
    """Three products are as wide as the keys (scores, gradients of query and key), two as wide as the values."""
    pairs = 2 * 3 * sum(range(1, 41))
    assert WIDER_KEYS.backward_flops == 2 * pairs * (3 * 24 + 2 * 16)


def test_figures_of_a_row() -> None:
    train = Cell("train", 4, 16, 16, 4096, 4096, 128, 128)  # 4 * 16 * 4096^2 * 128 multiplications, twice
    flops = 2 * 2 * 4 * 16 * 4096**2 * 128
    forward = Row(train, "bf16", "forward", {"sigswap": 0.5, "fa2": 1.0}, {"cudnn": "no"})
    assert forward.unit == "TFLOP/s"
    assert forward.value("sigswap") == pytest.approx(flops / 0.5e-3 / 1e12)
    assert forward.ratio("fa2") == 2.0
    assert forward.value("cudnn") is None and forward.ratio("cudnn") is None
    assert forward.best_other == "fa2"
    three = Row(train, "bf16", "forward", {"sigswap": 0.5, "fa2": 1.0, "cudnn": 0.4, "flex": 2.0}, {})
    assert three.best_other == "cudnn" and three.ratio("cudnn") == pytest.approx(0.8)
    assert Row(train, "bf16", "forward", {"sigswap": 0.5}, {}).best_other is None
    backward = Row(train, "bf16", "backward", {"sigswap": 1.0}, {})
    assert backward.value("sigswap") == pytest.approx(2.5 * flops / 1e-3 / 1e12)
    memory = Row(train, "bf16", "memory", {"sigswap": 100.0, "fa2": 150.0}, {})
    assert (memory.unit, memory.value("fa2"), memory.ratio("fa2")) == ("MiB", 150.0, 1.5)
    decode = Row(Cell("decode", 1, 32, 8, 1, 8192, 128, 128), "fp16", "forward", {"sigswap": 0.02}, {})
    assert decode.value("sigswap") == pytest.approx(2 * 8192 * 8 * 128 * 2 / 0.02e-3 / 1e9)
    host = Row(Cell("host", 1, 2, 2, 16, 16, 16, 16), "bf16", "forward+backward", {"sigswap": 30.0, "sdpa": 15.0}, {})
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
    assert first["best_other"] == {"name": "fa2", "ratio": 2.0} and failed["best_other"]["ratio"] is None
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
    assert [part.strip() for part in causal.split("│")][4:7] == ["0.0", "cudnn 1.50x", "-"]
    assert "best other: the fastest peer" in titles


def test_failures(result: Benchmark) -> None:
    assert result.failures == ["varlen 3 x 7..40 D=16: BenchmarkError: wrong result"]


def test_plot(result: Benchmark, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    check_plot(file)
    figure = result.figure()
    figure.savefig(file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [axes.get_ylabel() for axes in figure.axes] == ["TFLOP/s", "GB/s", "TFLOP/s"]
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["B=2 N=40 D=16\nfa2 2.00x", "B=2 N=40 D=16 causal\ncudnn 1.50x"]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == pytest.approx([19.2, 9.6])
    with pytest.raises(ArgumentError, match=r"must end in one of .*\.png"):
        check_plot(tmp_path / "plot.txt")


# Correctness.


@pytest.mark.parametrize("cell", [FULL, CAUSAL, WIDER_KEYS, GROUPED, DECODE, LATENT, VARLEN, VARLEN_CAUSAL])
def test_check_accepts_the_op_and_nothing_else(cell: Cell) -> None:
    inputs = make_inputs(cell, torch.float32, "cpu")
    out = own.build(cell, inputs).forward()
    grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_out) if cell.trains else ()
    out = out.detach()
    check(cell, inputs, out, grads)
    with pytest.raises(BenchmarkError, match="error of the output"):
        check(cell, inputs, 1.01 * out, grads)
    with pytest.raises(BenchmarkError, match="error of the output is nan"):
        check(cell, inputs, out * torch.nan, grads)
    for index, name in enumerate(("query", "key", "value")[: len(grads)]):
        wrong = [1.01 * grad if at == index else grad for at, grad in enumerate(grads)]
        with pytest.raises(BenchmarkError, match=f"gradient of {name}"):
            check(cell, inputs, out, wrong)


FEATURES = [
    Cell("features", 2, 4, 2, 40, 40, 16, 16, True, softcap=0.5),
    Cell("features", 2, 2, 2, 40, 40, 16, 16, True, window=5),
    *(Cell("features", 3, 2, 2, 40, 40, 16, 16, mask=mask) for mask in get_args(Mask)),
    Cell("features", 3, 2, 2, 40, 40, 16, 16, mask="documents=1,1,N,N", by_blocks=True),
    Cell("features", 3, 2, 2, 40, 40, 16, 16, mask="padding=B,1,N,N", by_blocks=True),
]


@pytest.mark.parametrize("cell", FEATURES, ids=lambda cell: cell.label)
def test_check_of_features(cell: Cell) -> None:
    """It accepts the op, and neither the op without the feature nor one wrong gradient."""
    inputs = make_inputs(cell, torch.float32, "cpu")
    out = own.build(cell, inputs).forward()
    grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_out)
    assert len(grads) == (4 if "bias" in cell.features else 3)
    check(cell, inputs, out.detach(), grads)
    for at in range(len(grads)):
        wrong = [1.01 * grad if index == at else grad for index, grad in enumerate(grads)]
        with pytest.raises(BenchmarkError, match="wrong result: the relative error of the gradient"):
            check(cell, inputs, out.detach(), wrong)
    plain = dataclasses.replace(cell, softcap=None, window=None, mask=None)
    with pytest.raises(BenchmarkError, match="wrong result: the relative error of the output"):
        check(cell, inputs, own.build(plain, inputs._replace(mask=None)).forward().detach(), grads)


def test_check_of_dropout() -> None:
    cell = Cell("features", 2, 3, 3, 1024, 1024, 32, 32, dropout_p=0.1)
    inputs = make_inputs(cell, torch.float32, "cpu")
    torch.manual_seed(0)
    out = own.build(cell, inputs).forward()
    grads = torch.autograd.grad(out, inputs.leaves, inputs.grad_out)
    other = torch.autograd.grad(own.build(cell, inputs).forward(), inputs.leaves, inputs.grad_out)
    none = own.build(dataclasses.replace(cell, dropout_p=0.0), inputs).forward().detach()
    out = out.detach()
    check(cell, inputs, out, grads)
    with pytest.raises(BenchmarkError, match="dropout changes the output"):
        check(cell, inputs, none, grads)
    with pytest.raises(BenchmarkError, match="dropout changes the output"):
        check(cell, inputs, 0.9 * out, grads)  # not divided by 1 - p
    with pytest.raises(BenchmarkError, match="forward and backward do not drop the same"):
        check(cell, inputs, out, other)


def test_check_sees_a_wrong_mask() -> None:
    inputs = make_inputs(CAUSAL, torch.float32, "cpu")
    with pytest.raises(BenchmarkError, match="output"):
        check(CAUSAL, inputs, sigswap.sigmoid_attention(*inputs.leaves).detach(), ())


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


def replace_build(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[Cell, Inputs], Implementation]) -> None:
    replaced = [dataclasses.replace(peer, build=build) if peer.name == name else peer for peer in peers.PEERS]
    monkeypatch.setattr(peers, "PEERS", tuple(replaced))


@pytest.mark.usefixtures("on_cpu")
def test_measure_times_all_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Implementation:
        raise RuntimeError("No available kernel.")

    replace_build(monkeypatch, "cudnn", refuse)
    replace_build(monkeypatch, "fa2", SDPA.implementation)
    rows = bench.measure(CAUSAL, "fp32", ["fa2", "cudnn", "flex"], left_out=["flex"])
    assert [row.phase for row in rows] == ["forward", "backward", "memory"]
    for row in rows:
        assert row.measured == {"sigswap": 1.0, "fa2": 1.0}
        assert row.reasons["cudnn"] == "RuntimeError: No available kernel."
        assert "--peers" in row.reasons["flex"]
    assert [row.phase for row in bench.measure(DECODE, "fp32", [])] == ["forward"]


@pytest.mark.usefixtures("on_cpu")
def test_measure_features() -> None:
    cell = Cell("features", 2, 2, 2, 16, 16, 8, 8, mask="padding=B,1,1,N", dtype="fp32")
    rows = bench.measure(cell, "bf16", ["fa2"])
    assert [(row.phase, row.unit, row.dtype) for row in rows] == [
        ("forward", "ms", "fp32"),
        ("forward+backward", "ms", "fp32"),
    ]
    for row in rows:
        assert row.value("sigswap") == 1.0
        assert row.reasons == {"fa2": "BenchmarkError: It does not take a mask tensor."}


@pytest.mark.usefixtures("on_cpu")
def test_a_peer_without_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_build(monkeypatch, "fa3", SDPA.implementation)
    for row in bench.measure(CAUSAL, "bf16", ["fa3"]):
        assert ("fa3" in row.measured) == (row.phase == "forward")
        assert row.reasons == ({} if row.phase == "forward" else {"fa3": "It has no backward pass."})
    for row in bench.measure(CAUSAL, "fp32", ["fa3"]):
        assert row.reasons == {"fa3": "BenchmarkError: The package fa3-fwd is built for bfloat16 alone."}


@pytest.mark.usefixtures("on_cpu")
def test_a_wrong_kernel_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "sigmoid_attention", lambda query, key, value, **_: query + key + value)
    replace_build(monkeypatch, "fa2", SDPA.implementation)
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


@pytest.mark.usefixtures("on_cpu")
def test_one_object_in_the_list_is_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its suites, order, tables, JSON, colour, default and version come from there, and so does what --peers knows."""
    toy = Peer("toy", "a toy", ("train", "decode"), SDPA.implementation, package="pytest", setup="tune")
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, toy))
    assert [peer.name for peer in peers.peers_of("decode")][-1] == "toy"
    assert "toy: a toy" in peers.described()
    assert "toy" in bench._left_out(FULL) and "toy" not in bench._left_out(dataclasses.replace(FULL, setup="tune"))

    rows = bench.measure(FULL, "fp32", ["toy"])
    assert all(row.measured == {"sigswap": 1.0, "toy": 1.0} for row in rows)
    figures = Benchmark({"gpu": "A GPU"}, "fp32", None, rows)
    assert json.loads(json.dumps(figures.to_dict()))["rows"][0]["results"]["toy"]["ratio"] == 1.0
    stream = io.StringIO()
    Console(file=stream, width=160).print(figures)
    assert " toy ┃" in next(line for line in stream.getvalue().splitlines() if "sigswap" in line)

    monkeypatch.setattr(bench, "_require_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(bench, "copy_gb_per_s", lambda: 1.0)
    monkeypatch.setattr(bench, "cells", lambda suite, quick: [dataclasses.replace(FULL, suite=suite)])
    found = bench.run(["decode"], peers=["toy"], dtype="fp32")
    assert found.machine["pytest"] == pytest.__version__
    assert found.rows[0].measured == {"sigswap": 1.0, "toy": 1.0}


def test_each_peer_has_its_name_and_colour() -> None:
    pytest.importorskip("matplotlib")
    names = peers.peer_names()
    assert len(set(names)) == len(names)
    assert len({_color(name) for name in ("sigswap", *names)}) == len(names) + 1
    for peer in peers.PEERS:
        assert set(peer.suites) <= set(SUITES) and peers.find_peer(peer.name) is peer
        assert peer.build is not None or peer.suites == ("models",)


# The command.


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_help_names_every_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = run("--help").stdout
    for name in (*SUITES, *peers.peer_names(), *DTYPES):
        assert name in text


@without_gpu
def test_without_a_gpu() -> None:
    result = run("--quick")
    assert result.exit_code == 1
    assert "needs an NVIDIA GPU of compute capability 8.0" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--suite", "trian"),
            "suite 'trian' is not one of train, short, decode, varlen, host, features, models, generation, "
            "distributed.",
        ),
        (("--peers", "fa5"), "peer 'fa5' is not one of fa2, fa3, fa4, cudnn,"),
        (("--suite", "host", "--peers", "cudnn"), "peer 'cudnn' is not measured in host: host has sdpa."),
        (
            ("--suite", "host", "--peers", "sdpa", "--peers", "unfused"),
            "peer 'unfused' is not measured in host: host has sdpa.",
        ),
        (
            ("--peers", "unfused"),
            "peer 'unfused' is not measured in train, short, decode, varlen, host: train has fa2,",
        ),
        (
            ("--suite", "train", "--suite", "host", "--peers", "cudnn", "--peers", "fa3"),
            "suite 'host' is measured beside none of the peers cudnn, fa3: it has sdpa.",
        ),
        (("--cell", "ViT*"), "no cell of train, short, decode, varlen, host has a label like ViT*."),
        (("--dtype", "int8"), "dtype 'int8' is not one of bf16, fp16, fp32."),
        (("--json", "nowhere/figures.json"), "there is no directory nowhere"),
        (("--plot", "nowhere/plot.png"), "there is no directory nowhere"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    result = run(*arguments)
    assert message in result.stderr
    assert result.exit_code == (1 if message.startswith("there is no directory") else 2)


@without_gpu
@pytest.mark.parametrize(
    "arguments",
    [("--peers", "cudnn"), ("--suite", "train", "--suite", "varlen", "--peers", "fa3", "--peers", "padded")],
)
def test_peers_need_not_be_in_every_suite(arguments: tuple[str, ...]) -> None:
    """The first: no suite is named, and host, one of those by default, has others."""
    assert "needs an NVIDIA GPU" in run(*arguments).stderr


def test_a_plot_without_matplotlib_fails_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("it ran"))
    result = run("--plot", tmp_path / "plot.png")
    assert result.exit_code == 1 and "pip install 'sigswap[plot]'" in result.stderr


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
    assert {row["suite"] for row in rows} == set(DEFAULT_SUITES)
    for row in rows:
        assert row["results"]["sigswap"]["value"] > 0
        assert any("ratio" in result for result in row["results"].values()), row
