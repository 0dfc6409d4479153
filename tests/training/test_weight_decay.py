"""sigswap's parameters are not decayed: by optimizers that others make, and by transformers' Trainer."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import interrupted, lines_of
from made_once import made_once
from torch import Tensor, nn

import sigswap
from sigswap.errors import ArgumentError, NotConvertedError

ALL = sigswap.SigmoidConfig(query_bias=True, first_token=True, layer_scale=0.1, qk_norm="rms")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return result


@made_once
def model() -> nn.Module:
    torch.manual_seed(0)
    return sigswap.convert(nn.Sequential(Block(), Block()), ALL, example_inputs=torch.randn(2, 5, 8))


def ours(model: nn.Module) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in model.named_parameters() if ".sigswap." in name}
    assert {name.rpartition(".")[2] for name in found} >= {"bias", "query_weight", "length_share", "layer_scale"}
    return found


def decayed(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}


def all_of(optimizer: Any) -> list[int]:
    return sorted(id(p) for group in optimizer.param_groups for p in group["params"])


def test_a_step_of_decay_alone_leaves_them() -> None:
    each = model()
    before = copy.deepcopy(each.state_dict())
    optimizer = torch.optim.AdamW(each.named_parameters(), lr=0.1, weight_decay=0.5)
    assert sigswap.exempt_from_decay(optimizer, each) is optimizer
    for parameter in each.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in each.state_dict().items():
        torch.testing.assert_close(value, before[name] * (1.0 if ".sigswap." in name else 0.95), rtol=1e-5, atol=0.0)
    for group in optimizer.param_groups:  # names stay beside their parameters
        assert [id(each.get_parameter(name)) for name in group["param_names"]] == [id(p) for p in group["params"]]


def test_an_optimizer_of_timms() -> None:
    """timm.optim.create_optimizer_v2, then `sigswap.exempt_from_decay`: sigswap's parameters are not decayed"""
    optim = pytest.importorskip("timm.optim")
    each = model()
    optimizer = optim.create_optimizer_v2(each, "adamw", lr=1e-3, weight_decay=0.05)
    before, groups = all_of(optimizer), len(optimizer.param_groups)
    assert decayed(optimizer) & {id(p) for p in ours(each).values()}  # else this is not needed any more
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # which counts the groups: there is one for them
    sigswap.exempt_from_decay(optimizer, each)
    assert not decayed(optimizer) & {id(p) for p in ours(each).values()}
    assert all_of(optimizer) == before and len(optimizer.param_groups) == groups


def test_learning_rates_stay() -> None:
    each = model()
    rates = {id(p): 1e-3 * (1 + index % 3) for index, p in enumerate(each.parameters())}
    groups = [
        {"params": [p for p in each.parameters() if rates[id(p)] == rate], "lr": rate} for rate in set(rates.values())
    ]
    optimizer = torch.optim.SGD(groups, weight_decay=0.1)
    sigswap.exempt_from_decay(optimizer, each)
    sigswap.exempt_from_decay(optimizer, each)  # again: nothing to do
    assert {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]} == rates
    assert not decayed(optimizer) & {id(p) for p in ours(each).values()}


def test_what_is_refused() -> None:
    each = model()
    optimizer = torch.optim.AdamW(each.parameters(), weight_decay=0.1)
    before = all_of(optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ArgumentError, match="before the scheduler is made"):
        sigswap.exempt_from_decay(optimizer, each)
    assert all_of(optimizer) == before and len(optimizer.param_groups) == 1
    with pytest.raises(ArgumentError, match="no parameter of the model"):
        sigswap.exempt_from_decay(optimizer, model())
    with pytest.raises(NotConvertedError):
        sigswap.exempt_from_decay(optimizer, Block())


def test_an_optimizer_from_before_the_conversion_is_told() -> None:
    """`sigswap.exempt_from_decay` of an optimizer made before the conversion, which lacks them: a warning"""
    before = nn.Sequential(Block(), Block())
    optimizer = torch.optim.AdamW(before.parameters(), weight_decay=0.1)
    sigswap.convert(before, ALL, example_inputs=torch.randn(2, 5, 8))
    with pytest.warns(UserWarning, match="made before the model was converted"):
        sigswap.exempt_from_decay(optimizer, before)
    for parameter in ours(before).values():  # frozen ones are to be left out
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sigswap.exempt_from_decay(optimizer, before)


def test_an_interruption_leaves_the_groups_as_they_were_or_moves_all() -> None:
    each = model()

    def made() -> Any:
        groups = [{"params": list(part.parameters()), "lr": 0.1 * (1 + i)} for i, part in enumerate(each)]
        return torch.optim.AdamW(groups, weight_decay=0.5)

    def state(optimizer: Any) -> Any:
        return [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]

    after = state(sigswap.exempt_from_decay(made(), each))
    for at in lines_of(lambda: sigswap.exempt_from_decay(made(), each), turns=2):
        if at.file.endswith("weight_decay.py"):
            optimizer = made()
            before = state(optimizer)
            came, raised = interrupted(
                functools.partial(sigswap.exempt_from_decay, optimizer, each), at, KeyboardInterrupt()
            )
            assert came and isinstance(raised, KeyboardInterrupt) and state(optimizer) in (before, after), at


def trainer(folder: Path, each: nn.Module, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    kept = {key: arguments.pop(key) for key in ("optimizers", "callbacks") if key in arguments}
    ids = torch.arange(1, 13).view(2, 6)
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True}
    args = transformers.TrainingArguments(str(folder), use_cpu=True, **settings, **arguments)
    data = [{"input_ids": row, "labels": row} for row in ids]
    return transformers.Trainer(each, args, train_dataset=data, **kept)


@made_once
def decoder(config: sigswap.SigmoidConfig | None = ALL) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, pad_token_id=0, **sizes))
    return sigswap.convert(made, config)


def test_trainer_leaves_them_alone(tmp_path: Path) -> None:
    """transformers' Trainer with `weight_decay`: sigswap's parameters are not decayed"""
    each = decoder()
    made = trainer(tmp_path, each, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = made.create_optimizer()
    assert not decayed(optimizer) & {id(p) for p in ours(each).values()}
    assert id(each.lm_head.weight) in decayed(optimizer)
    assert all_of(optimizer) == sorted(id(p) for p in each.parameters())
    sigswap.revert(each)
    assert made.get_decay_parameter_names(each) and not any(".sigswap." in n for n, _ in each.named_parameters())


def test_trainer_warns_of_an_optimizer_that_decays_them(tmp_path: Path) -> None:
    """transformers' Trainer with an optimizer of the user's own that decays them: a warning"""
    each = decoder()
    own = torch.optim.AdamW(each.parameters(), weight_decay=0.1)
    with pytest.warns(UserWarning, match="exempt_from_decay"):
        trainer(tmp_path, each, optimizers=(own, None)).create_optimizer()
    sigswap.exempt_from_decay(own, each)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, each, optimizers=(own, None)).create_optimizer()


def test_trainer_calibrates_before_its_first_step(tmp_path: Path) -> None:
    """transformers' Trainer with `sigswap.calibration_callback()`"""
    each, other = decoder(), decoder()
    callback = sigswap.calibration_callback(1, lookups=False, progress=False)
    trainer(tmp_path, each, callbacks=[callback], learning_rate=0.0).train()
    assert callback.report is not None
    sigswap.calibrate(other, [{"input_ids": torch.arange(1, 13).view(2, 6)}], lookups=False, progress=False)
    for name, parameter in ours(each).items():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-3, atol=1e-4)


def names_of(optimizer: Any, each: torch.nn.Module) -> list[list[str]]:
    known = {id(parameter): name for name, parameter in each.named_parameters()}
    return [[known[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def test_trainer_trains_what_its_calibration_adds(tmp_path: Path) -> None:
    """transformers' Trainer with `calibration_callback()`: what it adds is trained, and resumes"""
    each = decoder(None)
    before = {name for name, _ in each.named_parameters()}
    callback = sigswap.calibration_callback(1, lookups=False, progress=False)
    made = trainer(tmp_path, each, callbacks=[callback], weight_decay=0.1)
    made.train()
    added = {name for name, _ in each.named_parameters()} - before
    assert any(name.endswith("query_weight") for name in added)
    names = names_of(made.optimizer, each)
    assert added <= set(names[1]) and made.optimizer.param_groups[1]["weight_decay"] == 0.0
    # In the order of an optimizer that is made for the calibrated model: a state_dict goes by numbers.
    assert names == names_of(trainer(tmp_path, each, weight_decay=0.1).create_optimizer(), each)


def test_a_resumed_run_needs_the_calibrated_model(tmp_path: Path) -> None:
    each = decoder()
    callback = sigswap.calibration_callback(1, lookups=False, progress=False)
    resumed = pytest.importorskip("transformers").TrainerState(global_step=3)
    with pytest.raises(sigswap.errors.ArgumentError, match="is not calibrated, and the run that is resumed was"):
        callback.on_train_begin(None, resumed, None, model=each)
    sigswap.calibrate(each, [{"input_ids": torch.arange(1, 13).view(2, 6)}], lookups=False, progress=False)
    callback.on_train_begin(None, resumed, None, model=each)
    assert callback.report is None


def test_an_optimizer_that_decays_all_takes_nothing_more(tmp_path: Path) -> None:
    each = decoder(None)
    own = torch.optim.AdamW(each.parameters(), weight_decay=0.1)
    callback = sigswap.calibration_callback(1, lookups=False, progress=False)
    with (
        pytest.warns(UserWarning, match="exempt_from_decay"),
        pytest.raises(sigswap.errors.ArgumentError, match="no group without weight decay"),
    ):
        trainer(tmp_path, each, callbacks=[callback], optimizers=(own, None)).train()
    assert callback.report is None and sigswap.report(each).notes == sigswap.report(decoder(None)).notes
    for (name, now), (other, before) in zip(each.state_dict().items(), decoder(None).state_dict().items(), strict=True):
        assert name == other and torch.equal(now, before), name
