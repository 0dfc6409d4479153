"""A tiny decoder, the ways to spread it over ranks, and its distillation there beside one process."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from ranks import device
from torch import Tensor, nn

import sigswap

ROWS, TOKENS = 4, 12
CONFIG = sigswap.SigmoidConfig(learn_bias=True, query_bias=True, layer_scale=0.9)
STEPS = {"steps": 7, "layerwise_steps": 3}


def llama(**changes: Any) -> Any:
    """In eval mode. ``changes``: of its config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {**sizes, "num_key_value_heads": 4, "initializer_range": 0.15, **changes}
    config = transformers.LlamaConfig(vocab_size=31, pad_token_id=0, **own)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


@functools.cache
def _converted() -> Any:
    return sigswap.convert(llama(), CONFIG)


def converted() -> Any:
    return copy.deepcopy(_converted())


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


def own(whole: list[dict[str, Tensor]], shared_by: int = 1) -> list[dict[str, Tensor]]:
    """This rank's rows; so many ranks have the same ones."""
    rank, size = (each() // shared_by for each in (torch.distributed.get_rank, torch.distributed.get_world_size))
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    return [{name: value[rows] for name, value in batch.items()} for batch in whole]


def alone() -> Any:
    """A group of this rank."""
    groups = [torch.distributed.new_group([rank]) for rank in range(torch.distributed.get_world_size())]
    return groups[torch.distributed.get_rank()]


def mesh(*shape: int, names: tuple[str, ...] = ("ranks",)) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device().type, shape or (torch.distributed.get_world_size(),), mesh_dim_names=names)


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


def by_two_axes(model: Any) -> Any:
    """Some heads on each of two ranks, and half of each parameter of these on each of the other two pairs."""
    both = mesh(2, 2, names=("data", "heads"))
    return fully(by_heads(model, both["heads"]), both["data"])


def in_copies(model: Any) -> Any:
    """Half of each parameter on each of two ranks, and the same on the other two (HSDP)."""
    return fully(model, mesh(2, 2, names=("copies", "parts")))


def values(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): each for name, each in model.named_parameters()}
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in found.items()
    }


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str, atol: float = 2e-5) -> None:
    """To float32 rounding, as AdamW enlarges it."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name],
            value,
            atol=atol,
            rtol=max(1e-4, 10 * atol),
            msg=lambda text, name=name: f"{what}: {name}: {text}",
        )


def distilled(model: Any, teacher: Any, given: Any, **arguments: Any) -> Any:
    return sigswap.distill(model, teacher, given, **{**STEPS, "progress": False, **arguments})


def check_distillation(ways: dict[str, tuple[Any, int, dict[str, Any]]]) -> list[list[Any]]:
    """``ways``: what spreads a model, how many ranks share their batches (0: all), and arguments."""
    group, results, expected = alone(), [], {}
    place = device()
    for what, (way, shared_by, arguments) in ways.items():
        key = repr(arguments)
        start = converted().to(place)
        if key not in expected:
            model = copy.deepcopy(start)
            report = distilled(model, None if arguments else llama().to(place), batches(), group=group, **arguments)
            expected[key] = values(model), report
        model = way(copy.deepcopy(start))
        teacher = None if arguments else (llama().to(place) if way is wrapped else way(llama().to(place)))
        report = distilled(model, teacher, own(batches(), shared_by) if shared_by else batches(), **arguments)
        found, (wanted, other) = values(model), expected[key]
        if place.type == "cpu":
            assert_near(found, wanted, what)
        else:  # where products are rounded by tile
            for name, value in start.named_parameters():
                way_to_go = (wanted[name] - value).norm()
                assert (found[name] - wanted[name]).norm() <= 0.1 * way_to_go, f"{what}: {name}"
        for name in ("layerwise", "end_to_end"):
            ours, theirs = getattr(report, name), getattr(other, name)
            near = pytest.approx(theirs, rel=1e-4 if place.type == "cpu" else 1e-2)
            assert ours == near, f"{what} {name} {ours} {theirs}"
        assert report.lookups == other.lookups and "of 40 sequences" in report.lookups
        moved = [name for name, value in start.state_dict().items() if name in found and not value.equal(found[name])]
        assert len(moved) > (20 if not arguments else 5), what
        assert all(each.requires_grad for each in model.parameters())
        results.append([what, report.end_to_end, {name: value.tolist() for name, value in found.items()}])
    return results


SIGMOID = {"train": "sigmoid"}
WAYS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "plain": (plain, 1, {}),
    "wrapped": (wrapped, 1, {}),
    "fully": (fully, 1, {}),
    "fully, own teacher": (fully, 1, SIGMOID),
    "by heads": (by_heads, 0, {}),
    "by heads, own teacher": (by_heads, 0, SIGMOID),
}
