"""Distillation by several processes equals one process on all their batches, and fails in all of them together."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import sigswap
from sigswap.errors import ArgumentError, CalibrationError, SigswapError
from sigswap.training import steps as stepping

transformers = pytest.importorskip("transformers")

ROWS, TOKENS = 4, 12
STEPS = {"steps": 7, "layerwise_steps": 3}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.15,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def converted() -> Any:
    return sigswap.convert(llama(), sigswap.SigmoidConfig(learn_bias=True, query_bias=True, layer_scale=0.9))


def batches(count: int = 10, *, padded: bool = True) -> list[dict[str, Tensor]]:
    """Of ROWS sequences, of which some are padded, to another length on each rank."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(1, 31, (ROWS, TOKENS), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, TOKENS - 1 - index % 4 :] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def own(whole: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """This rank's rows."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    return [{name: value[rows] for name, value in batch.items()} for batch in whole]


def alone() -> Any:
    """A group of this rank."""
    groups = [torch.distributed.new_group([rank]) for rank in range(torch.distributed.get_world_size())]
    return groups[torch.distributed.get_rank()]


def device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def mesh(*shape: int, names: tuple[str, ...] = ("ranks",)) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device(), shape or (torch.distributed.get_world_size(),), mesh_dim_names=names)


def plain(model: Any) -> Any:
    return model


def wrapped(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def fully(model: Any, over: Any = None) -> Any:
    from torch.distributed.fsdp import fully_shard

    over = mesh() if over is None else over
    for layer in model.model.layers:
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


def by_heads(model: Any, over: Any = None) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    styles |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")} | {"mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh() if over is None else over, styles)
    return sigswap.shard_heads(model) if sigswap.is_converted(model) else model


def values(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): each for name, each in model.named_parameters()}
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in found.items()
    }


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{what}: {name}: {text}"
        )


def distilled(model: Any, teacher: Any, given: Any, **arguments: Any) -> Any:
    return sigswap.distill(model, teacher, given, **{**STEPS, "progress": False, **arguments})


def check_equal(ways: dict[str, tuple[Any, bool, dict[str, Any]]]) -> list[list[Any]]:
    """``ways``: what spreads a model, whether ranks have batches of their own, and arguments."""
    group, results, expected = alone(), [], {}
    place = torch.device(device())
    for what, (way, divided, arguments) in ways.items():
        key = repr(arguments)
        start = converted().to(place)
        if key not in expected:
            model = copy.deepcopy(start)
            report = distilled(model, None if arguments else llama().to(place), batches(), group=group, **arguments)
            expected[key] = values(model), report
        model = way(copy.deepcopy(start))
        teacher = None if arguments else (llama().to(place) if way is wrapped else way(llama().to(place)))
        report = distilled(model, teacher, own(batches()) if divided else batches(), **arguments)
        found, (wanted, other) = values(model), expected[key]
        assert_near(found, wanted, what)
        for name in ("layerwise", "end_to_end"):
            ours, theirs = getattr(report, name), getattr(other, name)
            assert ours == pytest.approx(theirs, rel=1e-4), f"{what} {name} {ours} {theirs}"
        assert report.lookups == other.lookups and "of 40 sequences" in report.lookups
        moved = [name for name, value in start.state_dict().items() if name in found and not value.equal(found[name])]
        assert len(moved) > (20 if not arguments else 5), what
        assert all(each.requires_grad for each in model.parameters())
        results.append([what, report.end_to_end, {name: value.tolist() for name, value in found.items()}])
    return results


SIGMOID = {"train": "sigmoid"}
WAYS = {
    "plain": (plain, True, {}),
    "wrapped": (wrapped, True, {}),
    "fully": (fully, True, {}),
    "fully, own teacher": (fully, True, SIGMOID),
    "by heads": (by_heads, False, {}),
    "by heads, own teacher": (by_heads, False, SIGMOID),
}


def check_ways() -> list[list[Any]]:
    return check_equal(WAYS)


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
        distilled(WAYS[way][0](converted()), llama(), own(batches()), resume=file, callback=lost_at(7))


def check_resumed(files: list[str]) -> list[dict[str, Any]]:
    ways = [fully, plain, by_heads]
    found = []
    for file, way in zip(files, ways, strict=True):
        model, done = way(converted()), []
        given = batches() if way is by_heads else own(batches())
        distilled(model, way(llama()), given, resume=file, callback=lambda step, loss, done=done: done.append(step))
        assert done and min(done) > 6, done
        found.append({name: value.tolist() for name, value in values(model).items()})
    return found


@pytest.mark.parametrize("way", ["fully", pytest.param("plain", marks=pytest.mark.slow)])
def test_a_run_that_lost_a_rank_goes_on_with_any_number(way: str, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    on_ranks(2, check_lost, way, str(file), lost=1)
    state = torch.load(file)
    assert len(state["losses"][0]) + len(state["losses"][1]) in (6, 7)
    whole, model = converted(), converted()
    distilled(whole, llama(), batches())
    copies = [tmp_path / str(index) for index in range(3)]
    for each in copies:
        each.write_bytes(file.read_bytes())
    distilled(model, llama(), batches(), resume=file)
    assert_near(values(model), values(whole), "one process")
    for found in on_ranks(2, check_resumed, [str(each) for each in copies]):
        for each in found:
            assert_near({name: torch.tensor(value) for name, value in each.items()}, values(whole), "two processes")


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
