"""Distillation by several processes equals one process on all their batches, and fails in all of them together."""

from __future__ import annotations

import copy
import itertools
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from spread import (
    WAYS,
    alone,
    assert_near,
    batches,
    by_heads,
    check_distillation,
    converted,
    distilled,
    fully,
    llama,
    own,
    plain,
    values,
)

from sigswap.errors import ArgumentError, CalibrationError, SigswapError
from sigswap.training import steps as stepping

pytest.importorskip("transformers")


def check_ways() -> list[list[Any]]:
    return check_distillation(WAYS)


def test_equals_one_process() -> None:
    first, second = on_ranks(2, check_ways)
    assert first == second  # to the bit, on all ranks


# A rank that is lost, and other numbers of ranks


def lost_at(step: int) -> Any:
    """A callback that ends rank 1 there."""

    def callback(done: int, loss: float) -> None:
        if done == step and torch.distributed.get_rank() == 1:
            os._exit(1)

    return callback


def check_lost(way: str, file: str) -> None:
    stepping.EVERY = 2
    with pytest.raises(CalibrationError, match="lost a rank"):
        spread, shared_by, _ = WAYS[way]
        given = own(batches()) if shared_by else batches()
        distilled(spread(converted()), spread(llama()), given, resume=file, callback=lost_at(7))


def check_resumed(files: list[str]) -> list[dict[str, Any]]:
    ways = [fully, plain, by_heads]
    found = []
    for file, way in zip(files, ways, strict=False):
        model, done = way(converted()), []
        given = batches() if way is by_heads else own(batches())
        distilled(model, way(llama()), given, resume=file, callback=lambda step, loss, done=done: done.append(step))
        assert done and min(done) > 6, done
        found.append({name: value.tolist() for name, value in values(model).items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fully", "plain", "by heads"])
def test_a_run_that_lost_a_rank_goes_on_with_any_number(way: str, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    on_ranks(2, check_lost, way, str(file), lost=1)
    state = torch.load(file)
    assert len(state["losses"][0]) + len(state["losses"][1]) in (6, 7)
    whole, model = converted(), converted()
    distilled(whole, llama(), batches())
    copies = [tmp_path / str(index) for index in range(4)]
    for each in copies:
        each.write_bytes(file.read_bytes())
    distilled(model, llama(), batches(), resume=file)
    assert_near(values(model), values(whole), "one process")
    names = [str(each) for each in copies]
    found = [*on_ranks(2, check_resumed, names[:3]), *on_ranks(4, check_resumed, names[3:])]
    for each in itertools.chain.from_iterable(found):
        assert_near({name: torch.tensor(value) for name, value in each.items()}, values(whole), "other processes")


# Errors


def check_errors() -> None:
    rank = torch.distributed.get_rank()
    teacher, whole = llama(), batches(3)

    def refused(message: str, model: Any, given: Any = None, kind: Any = SigswapError, **arguments: Any) -> None:
        before = values(model)
        with pytest.raises(kind, match=message):
            distilled(model, teacher, own(whole) if given is None else given, **{"steps": 3, **arguments})
        for name, value in values(model).items():
            assert torch.equal(value, before[name]), name

    bad = copy.deepcopy(own(whole))
    bad[1]["input_ids"][0, 0] = 99  # not in the vocabulary
    late = bad if rank == 1 else None
    refused("rank 1 \\(" if rank == 0 else "failed on batch 1", converted(), late)
    refused("rank 1 \\(" if rank == 0 else "failed on batch 1", converted(), late, layerwise_steps=0)
    for way in (plain, fully):
        refused("another steps than", way(converted()), steps=3 + rank)
        refused("another lr than", way(converted()), lr=0.1 * (1 + rank))
        short = own(whole) if rank == 0 else [{"input_ids": torch.zeros(2, 3, 4, dtype=torch.int64)}]
        refused("rank 1 \\(" if rank == 0 else "first one does", way(converted()), [own(whole)[0], short[-1]])
        once = iter(()) if rank == 0 else own(whole)
        refused("rank 0 \\(" if rank == 1 else "is empty", way(converted()), once)

        def stop(done: int, loss: float) -> None:
            if done == 2 and rank == 1:
                raise ValueError("enough")

        refused("rank 1 \\(ValueError" if rank == 0 else "enough", way(converted()), kind=Exception, callback=stop)
    other = converted()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(rank)
    refused("another weights than", other)
    refused("another tokens than", converted(), tokens=range(1, 30 - rank))
    images = [torch.randn(2, 3, 4, 4)] if rank == 0 else None
    refused("another kind of batches", converted(), images)
    refused("find other losses", by_heads(converted()))
    refused("hold other parts", by_heads(converted()), kind=ArgumentError, group=torch.distributed.group.WORLD)
    refused("has 1 ranks", fully(converted()), kind=ArgumentError, group=alone())
    refused("is not compiled", fully(converted()), kind=ArgumentError, compile=True)
    group = torch.distributed.new_group([0, 1])
    if rank == 0:  # the other one does not come
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sigswap.distributed.ranks.ARRIVAL", timedelta(seconds=2))
            refused("not all 2 ranks", converted(), group=group)


def test_errors_are_of_all_ranks() -> None:
    on_ranks(2, check_errors)
