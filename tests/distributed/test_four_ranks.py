"""Four ranks, and two axes of a mesh: training, distillation and saving equal one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from spread import batches, by_heads, by_two_axes, check_distillation, converted, fully, own, plain, values, wrapped

import sigswap

pytest.importorskip("transformers")

WAYS: dict[str, tuple[Any, int]] = {
    "plain": (plain, 1),
    "wrapped": (wrapped, 1),
    "fully": (fully, 1),
    "by heads": (by_heads, 0),
    "by two axes": (by_two_axes, 2),
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
    model = converted()
    for what, (way, _) in WAYS.items():
        if way not in (plain, wrapped):
            sigswap.save(way(copy.deepcopy(model)), Path(folder, what))
            found = sigswap.load(Path(folder, what)).state_dict()
            for name, value in model.state_dict().items():
                assert torch.equal(found[name], value), f"{what} {name}"
    return list(WAYS)


def check_distilling(what: str) -> list[Any]:
    way, shared_by = WAYS[what]
    return check_distillation({what: (way, shared_by, {}), "own teacher": (way, shared_by, {"train": "sigmoid"})})


CASES: dict[str, tuple[Any, ...]] = {"training": (check_training,), "saving": (check_saving,)}
CASES |= {f"distillation, {what}": (check_distilling, what) for what in WAYS}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_ranks(case: str, tmp_path: Path) -> None:
    check, *arguments = CASES[case]
    first, *others = on_ranks(4, check, *([str(tmp_path)] if check is check_saving else arguments))
    assert first and all(other == first for other in others)
