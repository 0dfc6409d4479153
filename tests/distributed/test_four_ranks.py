"""Four ranks, and two axes of a mesh: training, distillation and saving equal one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from spread import (
    alone,
    assert_near,
    batches,
    by_heads,
    by_two_axes,
    check_distillation,
    converted,
    distilled,
    fully,
    in_copies,
    llama,
    mesh,
    own,
    plain,
    values,
    wrapped,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import sigswap
from sigswap.errors import ArgumentError

pytest.importorskip("transformers")

WAYS: dict[str, tuple[Any, int]] = {
    "plain": (plain, 1),
    "wrapped": (wrapped, 1),
    "fully": (fully, 1),
    "by heads": (by_heads, 0),
    "by two axes": (by_two_axes, 2),
    "in copies": (in_copies, 1),
}


def trained(model: Any, given: list[Any]) -> None:
    """By a rule that has no state; the loss counts each sequence alike."""
    for batch in given:
        model(input_ids=batch["input_ids"]).logits.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None


def check_training() -> list[str]:
    done = []
    for what, (way, shared_by) in WAYS.items():
        if way is plain:
            continue
        expected = converted()
        model = way(copy.deepcopy(expected))
        given = batches(2, padded=False)
        with torch.no_grad():
            whole = expected(**given[0]).logits
            mine = model(**(own(given, shared_by) if shared_by else given)[0]).logits
        size, rank = torch.distributed.get_world_size() // (shared_by or 4), torch.distributed.get_rank()
        torch.testing.assert_close(mine, whole.chunk(size)[rank // (shared_by or 4)], atol=1e-5, rtol=1e-4)
        trained(expected, given)
        trained(model, own(given, shared_by) if shared_by else given)
        found = values(model)
        for name, value in values(expected).items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3, msg=f"{what} {name}")
        done.append(what)
    return done


def check_saving(folder: str) -> list[str]:
    """By sigswap.save, and by a distributed checkpoint that one way writes and the next one reads."""
    model = converted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/checkpoint")
    last = f"{folder}/checkpoint"
    for what, (way, _) in WAYS.items():
        if way not in (plain, wrapped):
            sigswap.save(way(copy.deepcopy(model)), Path(folder, what))
            found = sigswap.load(Path(folder, what)).state_dict()
            for name, value in model.state_dict().items():
                assert torch.equal(found[name], value), f"{what} {name}"
            spread = way(converted())
            state = {"model": get_model_state_dict(spread)}
            dcp.load(state, checkpoint_id=last)
            set_model_state_dict(spread, state["model"])
            for name, value in values(spread).items():
                assert torch.equal(value, model.get_parameter(name)), f"{what} {name}"
            last = f"{folder}/checkpoint of {what}"
            dcp.save({"model": get_model_state_dict(spread)}, checkpoint_id=last)
    return list(WAYS)


def check_calibration() -> list[Any]:
    """Of a copy of the model on each two ranks, and of parts of parts: as of one process."""
    both, given, found = mesh(2, 2, names=("data", "heads")), batches(3), []
    start = converted()
    expected = copy.deepcopy(start)
    sigswap.calibrate(expected, given, lookups=False, progress=False, group=alone())
    for way in (lambda model: by_heads(model, both["heads"]), by_two_axes, in_copies):
        model = way(copy.deepcopy(start))
        mine = own(given, 1 if way is in_copies else 2)
        sigswap.calibrate(model, mine, lookups=False, progress=False)
        assert_near(values(model), values(expected), "calibrated", atol=2e-4)
        found.append({name: value.tolist() for name, value in values(model).items()})
    return found


def check_beside_tensor_parallelism() -> list[Any]:
    """Two copies of a model of which each has some heads on two ranks."""
    both = mesh(2, 2, names=("data", "heads"))
    expected, model = converted(), by_heads(converted(), both["heads"])
    one, group = alone(), both.get_group("data")
    with pytest.raises(ArgumentError, match="group is needed: of 4 ranks, 2 hold"):
        distilled(model, llama(), own(batches(), 2))
    distilled(expected, llama(), batches(), group=one)
    distilled(model, by_heads(llama(), both["heads"]), own(batches(), 2), group=group)
    assert_near(values(model), values(expected), "two copies")
    return [{name: value.tolist() for name, value in values(model).items()}]


def check_distilling(*ways: str) -> list[Any]:
    each = {what: (*WAYS[what], {}) for what in ways}
    return check_distillation({**each, "own teacher": (*WAYS[ways[-1]], {"train": "sigmoid"})})


CASES: dict[str, tuple[Any, ...]] = {"training": (check_training,), "saving": (check_saving,)}
CASES |= {"calibration": (check_calibration,)}
CASES |= {"tensor parallelism and copies": (check_beside_tensor_parallelism,)}
CASES |= {"distillation": (check_distilling, "plain", "wrapped", "by heads", "fully")}
CASES |= {f"distillation, {what}": (check_distilling, what) for what in ("by two axes", "in copies")}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_ranks(case: str, tmp_path: Path) -> None:
    check, *arguments = CASES[case]
    first, *others = on_ranks(4, check, *([str(tmp_path)] if check is check_saving else arguments))
    assert first and all(other == first for other in others)
