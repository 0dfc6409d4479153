"""The steps of a distillation: compiled as in eager, without waiting for a GPU, and nothing lost that was learned."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_once import made_once
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import hf, randomise

import sigswap
from sigswap.errors import ArgumentError, CalibrationError
from sigswap.training import compiled as compiling
from sigswap.training import steps as stepping
from sigswap.training.lesson import Lesson
from sigswap.training.teaching import Original
from sigswap.training.together import together
from sigswap.transaction import Transaction

pytest.importorskip("transformers")
VOCABULARY = 61


def texts(count: int = 4, length: int = 12, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, length - 3 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return batches


@made_once
def pair(variant: str = "sdpa", **config: Any) -> tuple[Any, Any]:
    """A converted language model with biases away from 0, and the original."""
    original = randomise(hf("LlamaForCausalLM", variant, num_hidden_layers=1), gain=0.7).eval()
    model = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(query_bias=True, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, original


def distilled(model: Any, original: Any, **options: Any) -> Any:
    arguments: dict[str, Any] = {"steps": 4, "lr": 1e-3, "progress": False, **options}
    return sigswap.distill(model, original, arguments.pop("batches", texts()), **arguments)


def assert_near(one: nn.Module, other: nn.Module, tolerance: float = 1e-4) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated by AOTAutograd as ever, but run by its ops: inductor takes a minute."""
    monkeypatch.setattr(compiling, "SIGMOID_BACKEND", "aot_eager")
    monkeypatch.setattr(compiling, "SOFTMAX_BACKEND", "aot_eager")


# Compiled


SLOW = pytest.mark.slow


@pytest.mark.parametrize("case", ["plain", pytest.param("padded", marks=SLOW), pytest.param("by hand", marks=SLOW)])
def test_compiled_steps_are_those_of_eager(case: str, quick: None) -> None:
    """Padded: and taught by itself."""
    options: dict[str, Any] = {"layerwise_steps": 2, "accumulate": 2}
    if case == "padded":
        options = {"batches": texts(padded=True), "lookups": False, "train": "sigmoid"}
    results = []
    for compile in (False, True):
        model, original = pair("eager" if case == "by hand" else "sdpa")
        teacher = None if case == "padded" else original
        results.append((model, distilled(model, teacher, compile=compile, **options)))
        assert not any(module._forward_hooks for root in (model, original) for module in root.modules())
    (eager, expected), (compiled, report) = results
    assert report.end_to_end == pytest.approx(expected.end_to_end, rel=1e-4)
    assert report.layerwise == pytest.approx(expected.layerwise, rel=1e-4)
    assert_near(compiled, eager)


def test_a_step_is_compiled_once_for_each_run(quick: None) -> None:
    """Further steps, other runs, and callbacks that run the models in between, compile nothing more."""
    found = []
    for _ in range(2):
        torch._dynamo.utils.counters.clear()
        model, original = pair()

        def evaluate(done: int, loss: float, model: Any = model, original: Any = original) -> None:
            sigswap.compare(model, original, texts(1), max_length=16, progress=False)

        distilled(model, original, steps=3, compile=True, callback=evaluate)
        found.append(dict(torch._dynamo.utils.counters["stats"]))
        assert found[-1]["unique_graphs"] == 3  # model, teacher, losses: no graph breaks
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_compiled_with_row_caps_that_rise(quick: None) -> None:
    model, original = pair(row_cap=0.5)
    seen = []

    def note(done: int, loss: float) -> None:
        seen.append(model.model.layers[0].self_attn.sigswap.site(0).row_cap)

    distilled(model, original, steps=41, compile=True, lift_row_cap=8.0, callback=note)
    assert sorted(set(seen)) == pytest.approx([1.0, 2.0, 4.0, 8.0]) and seen == sorted(seen)


@pytest.mark.slow
def test_compiled_where_some_attention_stays_softmax(quick: None) -> None:
    """It must stay so, whatever the backend makes of a graph without a converted module."""
    from sigswap.training.distill import _backends

    original = randomise(hf("LlamaForCausalLM"), gain=0.7).eval()
    model = sigswap.convert(copy.deepcopy(original), exclude=["*.1.*"])
    assert _backends(model) == (compiling.SOFTMAX_BACKEND, compiling.SOFTMAX_BACKEND)
    eager = copy.deepcopy(model)
    report, expected = distilled(model, original, compile=True), distilled(eager, original)
    assert report.end_to_end == pytest.approx(expected.end_to_end, rel=1e-4)


def test_what_does_not_compile_is_an_error_about_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    model, original = pair()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(compiling, "SIGMOID_BACKEND", broken)
    monkeypatch.setattr(compiling, "SOFTMAX_BACKEND", "eager")
    with pytest.raises(
        ArgumentError, match=r"(?s)compile: the step does not compile .*no compiler here.*compile=False"
    ):
        distilled(model, original, compile=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for root in (model, original) for module in root.modules())
    with pytest.raises(ArgumentError, match="compile must be True or False"):
        distilled(model, original, compile="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sdpa", "eager"])
def test_compiled_by_inductor(variant: str) -> None:
    results = []
    for compile in (False, True):
        model, original = pair(variant, row_cap=0.5)
        results.append((model, distilled(model, original, compile=compile)))
    (eager, expected), (compiled, report) = results
    assert report.end_to_end == pytest.approx(expected.end_to_end, rel=1e-4)
    assert_near(compiled, eager)


# Without waiting for a GPU


class Reads(TorchDispatchMode):
    """Counts what hands a tensor's value to Python, which on a GPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["layerwise", "end_to_end"])
def test_a_lesson_reads_nothing(stage: str) -> None:
    model, original = pair()
    ids = texts(1)[0]["input_ids"]
    with Transaction() as undo:
        among = together(model, None)
        lesson = Lesson(undo, model, Original(original), ["model.layers.0.self_attn"], among)
        with Reads() as reads:
            original(input_ids=ids, use_cache=False)
            theirs = reads.count  # what transformers reads itself
            getattr(lesson, stage)(((), {"input_ids": ids, "use_cache": False}), 0)
    assert reads.count <= (3 if stage == "end_to_end" else 2) * theirs


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read in tens."""
    monkeypatch.setattr(stepping, "device_of", lambda model: torch.device("cuda"))


def test_losses_that_are_read_later_are_the_same(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = pair()
    late = distilled(model, original, steps=23, layerwise_steps=4)
    monkeypatch.undo()
    expected, _ = pair()
    assert late == distilled(expected, original, steps=23, layerwise_steps=4)
    assert_near(model, expected, 0.0)


def test_a_loss_that_is_not_finite_is_seen_later(as_on_a_gpu: None, tmp_path: Path) -> None:
    """Its step is named, the model is as it was, and what was learned from it is not kept."""

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = nn.MultiheadAttention(16, 2, batch_first=True), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x, x, x)[0] * (math.nan if self.calls == 14 else 1.0)

    torch.manual_seed(0)
    original, x = Poisoned().eval(), torch.randn(2, 5, 16)
    model = sigswap.convert(copy.deepcopy(original), example_inputs=(x,))
    original.calls = model.calls = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="the loss is nan at step 13"):
        distilled(model, original, batches=[(x,)], steps=30, resume=tmp_path / "run.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "run.pt").exists()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [3, 14])
def test_an_interruption_between_reads_loses_nothing(
    after: int, as_on_a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, original = pair()
    expected = distilled(whole, original, steps=20)
    model, _ = pair()
    update = stepping.Run._update
    taken = []

    def interrupted(self: Any, *args: Any) -> None:
        update(self, *args)
        taken.append(1)
        if len(taken) == after:
            raise Interrupted

    monkeypatch.setattr(stepping.Run, "_update", interrupted)
    with pytest.raises(Interrupted):
        distilled(model, original, steps=20, resume=tmp_path / "run.pt")
    report = distilled(model, original, steps=20, resume=tmp_path / "run.pt")
    assert len(taken) == 20 and report == expected
    assert_near(model, whole, 0.0)


def test_labels_are_left_out_for_a_language_model() -> None:
    """Its own loss would be computed for nothing."""
    model, original = pair()
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    distilled(model, original, steps=2)
    assert seen and not any("labels" in each for each in seen)


# On a GPU


@pytest.mark.parametrize("variant", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_compiled_on_a_gpu(variant: str, autocast: torch.dtype | None) -> None:
    """By Triton kernels and the fused AdamW: the losses and weights of eager on the CPU."""
    expected_model, original = pair(variant, row_cap=0.5)
    expected = distilled(expected_model, original)
    for compile in (False, True):
        model, teacher = pair(variant, row_cap=0.5)
        report = distilled(model.cuda(), teacher.cuda(), compile=compile, autocast=autocast)
        assert report.end_to_end == pytest.approx(expected.end_to_end, rel=1e-3 if autocast is None else 0.1)
        if autocast is None:
            assert_near(model.cpu(), expected_model, 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_steps_do_not_wait_for_the_gpu(compile: bool) -> None:
    """But for the reads of the losses, of which 18 steps have two."""
    model, original = (each.cuda() for each in pair())
    batches = [{"input_ids": batch["input_ids"]} for batch in texts()]
    read, waited = stepping.Run._read, []

    def allowed(self: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        waited.append(1)
        read(self)
        torch.cuda.set_sync_debug_mode("error")

    update, done = stepping.Run._update, []

    def watched(self: Any, *args: Any) -> None:
        update(self, *args)
        done.append(1)
        if len(done) == 2:  # compiled, and the optimizer's state made
            torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping.Run, "_update", watched)
        patch.setattr(stepping.Run, "_read", allowed)
        # transformers waits itself, to see whether sequences are packed.
        patch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
        try:
            distilled(model, original, batches=batches, steps=18, compile=compile)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == 2
