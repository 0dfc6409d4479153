"""Distillation and fine-tuning: the softmax switch, who learns what, and the trainers that people use."""

from __future__ import annotations

import copy
import functools
import io
import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_once import made_once
from torch import Tensor, nn
from zoo import BY_NAME, call, hf, randomise

import sigswap
from sigswap.conversion.record import conversion_of
from sigswap.errors import ArgumentError, CalibrationError, NotConvertedError

pytest.importorskip("transformers")
QUERY_BIAS = sigswap.SigmoidConfig(query_bias=True, first_token=False)
VOCABULARY = 61


def language_model() -> Any:
    return randomise(hf("LlamaForCausalLM"), gain=0.7).eval()


def texts(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 4, 12), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]


@made_once
def converted() -> tuple[Any, Any]:
    """A calibrated language model, and the original."""
    original = language_model()
    model = sigswap.convert(copy.deepcopy(original), QUERY_BIAS)
    sigswap.calibrate(model, texts(), progress=False)
    return model, original


def ours(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".sigswap." in name}


def divergence(model: Any, original: Any) -> float:
    """KL(original || model) per position, in float64."""
    with torch.no_grad():
        pairs = [(original(**b).logits.double(), model(**b).logits.double()) for b in texts()]
    terms = [(t.softmax(-1) * (t.log_softmax(-1) - y.log_softmax(-1))).sum(-1).mean() for t, y in pairs]
    return float(sum(terms)) / len(terms)


def test_softmax_is_the_original_without_a_copy() -> None:
    model, original = converted()
    batch = texts(1)[0]
    with torch.no_grad():
        truth, swapped = original(**batch).logits, model(**batch).logits
        with sigswap.softmax(model) as same:
            assert same is model and torch.equal(model(**batch).logits, truth)
            with sigswap.softmax(model):
                pass
            assert torch.equal(model(**batch).logits, truth)
        assert torch.equal(model(**batch).logits, swapped)
        with pytest.raises(KeyError), sigswap.softmax(model):
            raise KeyError
        assert torch.equal(model(**batch).logits, swapped)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**batch).logits, swapped)
        with sigswap.softmax(model):
            torch.testing.assert_close(compiled(**batch).logits, truth)


def test_sigmoid_parameters_alone_with_the_model_as_its_own_teacher() -> None:
    original = language_model()
    model = sigswap.convert(copy.deepcopy(original), QUERY_BIAS)  # not calibrated: there is much to learn
    base = {name: p.detach().clone() for name, p in model.named_parameters() if name not in ours(model)}
    before = divergence(model, original)
    report = sigswap.distill(
        model, None, texts(), steps=20, layerwise_steps=4, train="sigmoid", lr=1e-3, progress=False
    )
    assert divergence(model, original) < before
    assert (len(report.layerwise), len(report.end_to_end)) == (4, 20)
    assert report.end_to_end[16] < report.end_to_end[0] and "end to end" in str(report)  # the same batch
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
def test_everything_from_a_teacher(copied: bool) -> None:
    """The teacher is the original, or a converted copy, which runs as softmax."""
    model, original = converted()
    teacher = copy.deepcopy(model) if copied else original
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = divergence(model, original)
    sigswap.distill(model, teacher, texts(), steps=20, lr=1e-3, progress=False)
    assert divergence(model, original) < 0.7 * before
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bert", "t5", "albert", "fairseq_moe"])
def test_layerwise_loss_against_an_oracle(name: str) -> None:
    """The first layer-wise loss is the relative error of the modules' outputs on the original's own inputs."""
    entry = BY_NAME[name]
    inputs = entry.make_inputs()
    original = entry.build()
    model = sigswap.convert(copy.deepcopy(original), example_inputs=inputs)
    paths = {record.path for record in sigswap.report(model).sites if record.status == "swapped"}
    losses = []

    def compare(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            y, t = (x[0] if isinstance(x, tuple) else x for x in (model.get_submodule(path)(*args, **kwargs), output))
            losses.append(float((y - t).square().sum() / t.square().sum()))

        return hook

    for path in paths:
        original.get_submodule(path).register_forward_hook(compare(path), with_kwargs=True)
    with torch.no_grad():
        call(original, inputs)
    expected = sum(losses) / len(losses)
    for path in paths:
        original.get_submodule(path)._forward_hooks.clear()
    report = sigswap.distill(model, original, [inputs], steps=0, layerwise_steps=8, lr=1e-3, progress=False)
    assert report.layerwise[0] == pytest.approx(expected, rel=1e-4)
    assert report.layerwise[-1] < report.layerwise[0]


@pytest.mark.parametrize("stage", ["steps", "layerwise_steps"])
def test_batches_that_reach_no_converted_module(stage: str) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor, attend: bool = True) -> Tensor:
            return self.attention(x, x, x)[0] if attend else x

    original, x = Routed(), torch.randn(2, 5, 8)
    model = sigswap.convert(copy.deepcopy(original), example_inputs=x)
    with pytest.raises(CalibrationError, match="batch 0 reaches none of the converted modules"):
        sigswap.distill(model, original, [(x, False)], **{"steps": 0, stage: 1}, progress=False)


def test_arguments_and_failures() -> None:
    model, original = converted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotConvertedError):
        sigswap.distill(original, None, texts(), steps=1)
    with pytest.raises(ArgumentError, match="train='sigmoid'"):
        sigswap.distill(model, None, texts(), steps=1)
    with pytest.raises(ArgumentError, match="train='sigmoid'"):
        sigswap.distill(model, model, texts(), steps=1)
    for wrong in ({"lr": "1e-4"}, {"lr": -1e-4}, {"sigmoid_lr": True}, {"weight_decay": float("nan")}):
        with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} must be a number"):
            sigswap.distill(model, original, texts(), steps=1, **wrong)
    with pytest.raises(ArgumentError, match="steps"):
        sigswap.distill(model, original, texts(), steps=-1)
    with pytest.raises(ArgumentError, match="batches is empty"):
        sigswap.distill(model, original, [], steps=1, progress=False)
    with pytest.raises(CalibrationError, match=r"teacher has no module 'model\.layers"):
        sigswap.distill(model, original.model, texts(), steps=1)
    model.train()
    bad = [*texts(2), {"input_ids": torch.tensor([[10**6]])}]
    with pytest.raises(CalibrationError, match="batch 2"):
        sigswap.distill(model, original, bad, steps=9, lr=1e-2, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_param_groups() -> None:
    model, original = converted()
    groups = {group["name"]: group for group in sigswap.param_groups(model, 1e-4, weight_decay=0.1)}
    assert {id(p) for p in groups["sigmoid"]["params"]} == {id(p) for p in ours(model).values()}
    grouped = [p for group in groups.values() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()} and len(grouped) == len(set(grouped))
    assert all(p.dim() > 1 for p in groups["decay"]["params"]) and all(
        p.dim() < 2 for p in groups["no_decay"]["params"]
    )
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"sigmoid": (1e-3, 0.0), "decay": (1e-4, 0.1), "no_decay": (1e-4, 0.0)}
    torch.optim.AdamW(groups.values())
    for wrong in ({"lr": "1e-4"}, {"lr": -1.0}, {"lr": 1e-4, "weight_decay": None}):
        with pytest.raises(ArgumentError, match="must be a number, 0 or more, not"):
            sigswap.param_groups(model, **wrong)  # type: ignore[arg-type]
    assert sigswap.param_groups(model, torch.tensor(1e-4))[0]["lr"] > 0  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ArgumentError, match="requires_grad"):
        sigswap.param_groups(model, 1e-4)
    with pytest.raises(NotConvertedError):
        sigswap.param_groups(original, 1e-4)


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(sum(model(**b, labels=b["input_ids"]).loss for b in texts()))


def test_a_plain_loop() -> None:
    model, _ = converted()
    before = loss_of(model)
    optimizer = torch.optim.AdamW(sigswap.param_groups(model, 1e-3))
    changed = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in texts() * 3:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(model) < before
    assert all(not torch.equal(p, changed[name]) for name, p in ours(model).items())


def test_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    import transformers

    model, _ = converted()
    before = loss_of(model)
    rows = [{"input_ids": ids, "labels": ids} for batch in texts() for ids in batch["input_ids"]]
    optimizer = torch.optim.AdamW(sigswap.param_groups(model, 1e-3))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, save_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    assert loss_of(model) < before
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert sigswap.is_converted(loaded)
    assert all(torch.equal(p, ours(model)[name]) for name, p in ours(loaded).items())
    assert any(line.startswith("Calibrated") for line in sigswap.report(loaded).notes)


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, _ = converted()
    before = loss_of(model)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(sigswap.param_groups(model, 1e-3))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for batch in texts() * 2:
        accelerator.backward(prepared(**batch, labels=batch["input_ids"]).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(accelerator.unwrap_model(prepared)) < before


def test_calibration_of_a_dispatched_model() -> None:
    """Under accelerate's device map, whose hooks replace each forward."""
    accelerate = pytest.importorskip("accelerate")
    one, two = (sigswap.convert(language_model(), QUERY_BIAS) for _ in range(2))
    accelerate.dispatch_model(two, {"": "cpu"}, main_device="cpu", force_hooks=True)
    for model in (one, two):
        sigswap.calibrate(model, texts(), progress=False)
    assert all(torch.equal(p, ours(two)[name]) for name, p in ours(one).items())


def test_lora_on_a_converted_model() -> None:
    peft = pytest.importorskip("peft")
    model, _ = converted()
    names = [name.rsplit(".", 1)[0] for name in ours(model) if name.endswith(".0.bias")]
    lora = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["sigswap"])
    )
    groups = {group["name"]: group["params"] for group in sigswap.param_groups(lora, 1e-3)}
    trained = {id(p) for p in lora.parameters() if p.requires_grad}
    assert {id(p) for part in groups.values() for p in part} == trained
    assert names and "decay" in groups
    before = loss_of(lora)
    optimizer = torch.optim.AdamW(sigswap.param_groups(lora, 1e-2))
    for batch in texts() * 3:
        lora(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_of(lora) < before
    tuned = loss_of(lora)
    assert loss_of(lora.merge_and_unload()) == pytest.approx(tuned, rel=1e-4)


def adapted(**options: Any) -> tuple[Any, Any]:
    """A converted model with adapters, of which some are not 0, and the original."""
    peft = pytest.importorskip("peft")
    model, original = converted()
    arguments = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "modules_to_save": ["sigswap"]} | options
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**arguments)).eval(), original


def test_a_student_with_adapters_needs_no_second_model() -> None:
    """Each loss is that beside a copy of the original; adapters and sigswap's parameters learn, and nothing else."""
    student, original = adapted()
    other = copy.deepcopy(student)
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    far = divergence(student, original)
    report = sigswap.distill(student, None, texts(), steps=20, layerwise_steps=2, lr=1e-2, progress=False)
    teacher = copy.deepcopy(other)  # of the same modules' names
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if "lora_B" in name:
                p.zero_()
    expected = sigswap.distill(other, teacher, texts(), steps=20, layerwise_steps=2, lr=1e-2, progress=False)
    assert report.end_to_end == pytest.approx(expected.end_to_end, rel=1e-4)
    assert report.layerwise == pytest.approx(expected.layerwise, rel=1e-4)
    assert divergence(student, original) < 0.9 * far
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, flag in flags.items() if flag}
    assert any("lora_A" in name for name in changed) and any("sigswap" in name for name in changed)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == flags
    with student.disable_adapter(), torch.no_grad(), sigswap.softmax(student):
        for batch in texts():
            torch.testing.assert_close(student(**batch).logits, original(**batch).logits)


def test_a_trained_weight_that_is_no_adapters_needs_a_teacher() -> None:
    student, _ = adapted()
    student.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ArgumentError, match=r"would change \((lm_head|model\.embed_tokens)\.weight is no"):
        sigswap.distill(student, None, texts(), steps=1)
    biased, _ = adapted(target_modules=["q_proj"], bias="all")
    assert sigswap.distill(biased, None, texts(), steps=1, progress=False)  # Llama has no biases


def test_comparing_and_lifting_a_student_with_adapters() -> None:
    student, original = adapted()
    sigswap.set_row_cap(student.base_model.model, 0.5)
    report = sigswap.distill(student, None, texts(), steps=6, lr=1e-2, lift_row_cap=2.0, progress=False)
    assert report.row_cap == "row cap 2 in 2 attentions"
    found = sigswap.compare(student, None, texts(), max_length=16, progress=False)["loss"]
    with torch.no_grad():
        losses = [original(**batch, labels=batch["input_ids"]).loss for batch in texts()]
    assert found.original == pytest.approx(float(sum(losses)) / len(losses), rel=1e-4)
    assert found.converted != found.original


# Distillation that scales: each option gives what a plain run gives


def tuned(**options: Any) -> tuple[Any, Any]:
    """A model after six steps of both stages, and the report."""
    model, original = converted()
    arguments: dict[str, Any] = {"steps": 4, "layerwise_steps": 2, "lr": 1e-3, "progress": False, **options}
    batches = arguments.pop("batches", texts())
    return model, sigswap.distill(model, original, batches, **arguments)


def assert_same_weights(one: nn.Module, other: nn.Module, **tolerances: float) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, **(tolerances or {"rtol": 0.0, "atol": 0.0}))


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    """Of batches that are equal: the losses scale with each one's own error, so that halves of one would differ."""
    twice = [batch for batch in texts() for _ in range(2)]
    one, first = tuned(lookups=False)
    other, second = tuned(lookups=False, batches=twice, accumulate=2)
    assert_same_weights(one, other, rtol=1e-4, atol=1e-6)
    assert second.end_to_end == pytest.approx(first.end_to_end, rel=1e-4) and len(second.layerwise) == 2


def test_checkpointed_layers_give_the_same_gradients() -> None:
    calls = []
    model, original = converted()
    plain, _ = tuned()
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    sigswap.distill(model, original, texts(), steps=4, layerwise_steps=2, lr=1e-3, checkpointing=True, progress=False)
    assert_same_weights(model, plain, rtol=1e-5, atol=1e-7)
    assert sum(calls) == 8  # of each end-to-end step one forward and one that is recomputed
    assert all("forward" not in vars(module) for module in model.modules())
    flat = sigswap.convert(
        copy.deepcopy(BY_NAME["two_sites"].build()), example_inputs=BY_NAME["two_sites"].make_inputs()
    )
    with pytest.raises(ArgumentError, match=r"no nn\.ModuleList"):
        sigswap.distill(flat, copy.deepcopy(flat), [BY_NAME["two_sites"].make_inputs()], steps=1, checkpointing=True)


def test_autocast_learns_in_bfloat16() -> None:
    model, original = converted()
    before, seen = divergence(model, original), []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    sigswap.distill(model, original, texts(), steps=20, lr=1e-3, autocast=torch.bfloat16, lookups=False, progress=False)
    assert set(seen) == {torch.bfloat16} and divergence(model, original) < 0.8 * before
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupted_run_goes_on_where_it_was(after: int, tmp_path: Path) -> None:
    """In either stage, or between them: the weights and losses are those of a run in one go, bit for bit."""

    def interrupt(done: int, loss: float) -> None:
        if done == after:
            raise Interrupted

    whole, expected = tuned()
    model, original = converted()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments: dict[str, Any] = {"steps": 4, "layerwise_steps": 2, "lr": 1e-3, "progress": False}
    with pytest.raises(Interrupted):
        sigswap.distill(model, original, texts(), **arguments, resume=tmp_path / "run.pt", callback=interrupt)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    seen = []
    for _ in range(2):  # the second time all is done
        report = sigswap.distill(
            model, original, texts(), **arguments, resume=tmp_path / "run.pt", callback=lambda *step: seen.append(step)
        )
        assert_same_weights(model, whole)
        assert report == expected
    losses = [*expected.layerwise, *expected.end_to_end]
    assert seen == [(index + 1, losses[index]) for index in range(after, 6)]
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    with pytest.raises(ArgumentError, match=r"resume=.*holds another run: steps was 4 and is 5"):
        sigswap.distill(model, original, texts(), **{**arguments, "steps": 5}, resume=tmp_path / "run.pt")
    saved = (tmp_path / "run.pt").read_bytes()
    named = saved.rindex(b"data.pkl")
    for damaged in (b"damaged", saved[:-9], saved[:named] + b"\xd0" + saved[named + 1 :], *with_other_values(saved)):
        (tmp_path / "run.pt").write_bytes(damaged)
        with pytest.raises(ArgumentError, match="is not the state of a distillation"):
            sigswap.distill(model, original, texts(), **arguments, resume=tmp_path / "run.pt")
    with pytest.raises(ArgumentError, match=r"is not a file\. Pass the path"):  # nobody is told to delete a directory
        sigswap.distill(model, original, texts(), **arguments, resume=tmp_path)
    assert_same_weights(model, whole)


def with_other_values(saved: bytes) -> Iterator[bytes]:
    for path, value in (
        ("losses", None), ("losses.1", {}), ("losses.1", [math.nan]), ("mixer", [0]), ("mixer.0", -1), ("settings", []),
        ("settings.lr", torch.zeros(2)), ("parameters", 3), ("optimizer", torch.zeros(2)), ("optimizer.state", None),
        ("optimizer.state.0", []), ("optimizer.state.0.step", 1), ("optimizer.state.0.exp_avg", torch.zeros(77)),
    ):  # fmt: skip
        state = torch.load(io.BytesIO(saved), weights_only=True)
        *outer, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
        holder = functools.reduce(operator.getitem, outer, state)
        holder[last] = value
        stream = io.BytesIO()
        torch.save(state, stream)
        yield stream.getvalue()


def test_comparing_in_a_callback() -> None:
    found = []
    model, original = converted()

    def evaluate(done: int, loss: float) -> None:
        found.append(sigswap.compare(model, original, texts(1), max_length=16, progress=False)["loss"].converted)

    sigswap.distill(model, original, texts(), steps=3, lr=1e-3, callback=evaluate, progress=False)
    assert len(found) == 3 and len(set(found)) == 3
    expected, _ = converted()
    sigswap.distill(expected, original, texts(), steps=3, lr=1e-3, progress=False)
    assert_same_weights(model, expected)


def caps_of(model: Any) -> list[float | None]:
    return [module.sigswap.site(0).row_cap for name, module in model.named_modules() if name.endswith("self_attn")]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "last"), [(8.0, 8.0), (math.inf, None)])
def test_row_caps_are_lifted(target: float, last: float | None, tmp_path: Path) -> None:
    """By the same factor in each of the first steps, to the target; one module without a cap has none throughout."""
    config = sigswap.SigmoidConfig(row_cap=0.5, overrides={"*.1.*": {"row_cap": None}})
    original = language_model()
    model = sigswap.convert(copy.deepcopy(original), config)
    seen = []

    def stop(done: int, loss: float) -> None:
        seen.append(caps_of(model))
        if len(seen) == 2:
            raise Interrupted

    arguments: dict[str, Any] = {"steps": 31, "lr": 1e-3, "lift_row_cap": target, "progress": False}
    conversion = conversion_of(model)
    with pytest.raises(Interrupted):
        sigswap.distill(model, original, texts(), **arguments, callback=stop, resume=tmp_path / "run.pt")
    assert caps_of(model) == [0.5, None] and conversion_of(model) is conversion
    report = sigswap.distill(model, original, texts(), **arguments, callback=stop, resume=tmp_path / "run.pt")
    caps = [cap for cap, other in seen if other is None]
    top = 8.0 if last else 1.0
    expected = [0.5 * (top / 0.5) ** min(1.0, step / 3) for step in range(1, 32)]
    assert caps == [pytest.approx(cap) if cap < top or last else None for cap in expected]
    assert caps_of(model) == [last, None]
    assert report.row_cap == ("row cap 8 in 1 attentions" if last else "")
    sigswap.save(model, tmp_path / "out")
    assert caps_of(sigswap.load(tmp_path / "out")) == [last, None]
    whole = sigswap.convert(copy.deepcopy(original), config)
    sigswap.distill(whole, original, texts(), **arguments)
    assert_same_weights(model, whole)


def test_biases_rise_with_the_row_cap_up_to_one() -> None:
    """By half of its logarithm: calibration puts a row's sum to the square root of the cap."""
    original = language_model()
    for cap, target, rise in ((0.01, 0.25, 0.5 * math.log(25.0)), (0.01, math.inf, math.log(10.0)), (2.0, 4.0, 0.0)):
        model = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(row_cap=cap))
        found = [name for name, _ in model.named_parameters() if ".sigswap." in name and name.endswith("bias")]
        biases = {name: model.get_parameter(name).detach().clone() for name in found}
        assert biases
        sigswap.distill(model, original, texts(), steps=12, lr=1e-12, lift_row_cap=target, progress=False)
        for name, before in biases.items():
            torch.testing.assert_close(model.get_parameter(name).detach(), before + rise)


def test_row_caps_that_cannot_be_lifted() -> None:
    original = language_model()
    model = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(row_cap=2.0))
    with pytest.raises(ArgumentError, match=r"has the row cap 2\.0, which is above lift_row_cap=1"):
        sigswap.distill(model, original, texts(), steps=2, lift_row_cap=1, progress=False)
    sigswap.set_row_cap(model, None)
    with pytest.raises(ArgumentError, match="no attention of the model has a row cap to lift"):
        sigswap.distill(model, original, texts(), steps=2, lift_row_cap=4.0, progress=False)
    with pytest.raises(ArgumentError, match="lift_row_cap must be a number above 0"):
        sigswap.distill(model, original, texts(), steps=2, lift_row_cap=-1.0, progress=False)


def test_wrong_options() -> None:
    model, original = converted()
    for wrong, message in (
        ({"accumulate": 0}, "accumulate must be a number of batches, 1 or more"),
        ({"autocast": torch.float16}, "autocast must be None or torch.bfloat16"),
        ({"checkpointing": 1}, "checkpointing must be True or False"),
        ({"compile": torch.zeros(2)}, "compile must be True or False"),
        ({"callback": 5}, "callback must be a function, not 5"),
        ({"resume": 5}, "resume must be the path of a file, not 5"),
        ({"lookups": 2.0}, "lookups must be a share"),
        ({"resume": "/no/such/directory/run.pt"}, "there is no directory"),
    ):
        with pytest.raises(ArgumentError, match=message):
            sigswap.distill(model, original, texts(), steps=1, progress=False, **wrong)
    with pytest.raises(ArgumentError, match=r"teacher must be a torch\.nn\.Module, not a str"):
        sigswap.distill(model, "original", texts(), steps=1, progress=False)  # type: ignore[arg-type]


def test_where_no_training_is_possible() -> None:
    model, original = converted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode(), pytest.raises(ArgumentError, match=r"no gradients inside torch.inference_mode\(\)"):
        sigswap.distill(model, original, texts(), steps=1, progress=False)
    for argument, given in (
        ("model", (torch.compile(model, backend="eager"), original)),
        ("teacher", (model, torch.compile(original, backend="eager"))),
    ):
        with pytest.raises(ArgumentError, match=f"{argument} is compiled. Pass what was given to torch.compile"):
            sigswap.distill(*given, texts(), steps=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        made = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match=r"model: .* was made inside torch.inference_mode\(\)"):
        sigswap.distill(made, original, texts(), steps=1, progress=False)
    sigswap.distill(model, original, texts(), steps=1, progress=False)
