"""A model that is spread over processes is saved by all of them, and loads in any number of them."""

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
from sigswap.distributed import shards
from sigswap.errors import CheckpointError, SigswapError
from sigswap.saving import gathered

transformers = pytest.importorskip("transformers")

CONFIG = {"learn_bias": True, "query_bias": True, "first_token": True, "row_cap": 0.5}


class Small(nn.Module):
    """Hand-written, with a tied weight, a buffer, and one that no state_dict has."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 31, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5, dtype=torch.int32))
        self.register_buffer("made", torch.zeros(()), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o_proj(attended.transpose(1, 2).flatten(2))


def ids() -> Tensor:
    return torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(1))


def small() -> Any:
    torch.manual_seed(0)
    return sigswap.convert(Small().eval(), sigswap.SigmoidConfig(**CONFIG), example_inputs=(ids(),))


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return sigswap.convert(transformers.LlamaForCausalLM(config).eval(), sigswap.SigmoidConfig(**CONFIG))


def moved(model: Any) -> Any:
    """With parameters that tell the heads apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def layers_of(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.layers


def fully(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_heads(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    styles = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}
    for layer in layers_of(model):
        parallelize_module(getattr(layer, "self_attn", layer), mesh, styles)
    return sigswap.shard_heads(model)


MODELS = {
    "llama": (llama, {}),
    "small": (small, {"factory": f"{__name__}:Small"}),
}


def check_saving(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for kind, (build, arguments) in MODELS.items():
        model = moved(build())
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        output = model(ids())
        for way in (fully, by_heads):
            spread = way(copy.deepcopy(model))
            if way is fully:
                with torch.no_grad():
                    spread(ids())  # after which the outermost parameters are whole
            target = Path(folder, kind, way.__name__)
            sigswap.save(spread, target, **arguments)
            found = sigswap.load(target, allow_code=True)  # on each rank, at once
            state = found.state_dict()
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(state[name], value), f"{kind} {way.__name__} {name}"
            found_output, first = (each if isinstance(each, Tensor) else each.logits for each in (found(ids()), output))
            assert torch.equal(found_output, first)
        model = nn.parallel.DistributedDataParallel(model)
        if rank == 0:  # one process of a model that is whole does not ask the others
            sigswap.save(model, Path(folder, kind, "whole"), **arguments)
            files = {path.name: path.read_bytes() for path in Path(folder, kind, "whole").iterdir()}
            for way in (fully, by_heads):
                assert {path.name: path.read_bytes() for path in Path(folder, kind, way.__name__).iterdir()} == files
        torch.distributed.barrier()


def test_what_is_saved_from_parts_is_what_one_process_saves(tmp_path: Path) -> None:
    on_ranks(2, check_saving, str(tmp_path))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_room(*given: Any) -> None:
    raise OSError("no room on the disk")


def check_failures(folder: str) -> Any:
    rank, target = torch.distributed.get_rank(), Path(folder, "model")
    model = fully(moved(llama()))
    sigswap.save(model, target)
    before = content(target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    message = "as it was before: no room" if rank == 0 else "failed on rank 0"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=message):
        patch.setattr(gathered, "_write", no_room)
        sigswap.save(model, target)
    with pytest.raises(SigswapError, match="factory"):  # no argument of a transformers model
        sigswap.save(model, target, factory="a:b" if rank == 1 else None)
    assert content(target) == before and os.listdir(folder) == ["model"]
    return model


def ended_on_the_way(tensor: Tensor) -> Tensor:
    if gathered_so_far.append(tensor) or len(gathered_so_far) == 5:
        os._exit(1)
    return shards.whole(tensor)


gathered_so_far: list[Tensor] = []


def check_a_lost_rank(folder: str) -> None:
    model, target = check_failures(folder), Path(folder, "model")
    before = content(target)
    if torch.distributed.get_rank() == 1:
        gathered.whole = ended_on_the_way
    with pytest.raises(CheckpointError, match="lost a rank"):
        sigswap.save(model, target)
    with pytest.raises(CheckpointError, match="not all 2 ranks"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sigswap.distributed.ranks.ARRIVAL", timedelta(seconds=1))
        sigswap.save(model, target)
    assert content(target) == before and os.listdir(folder) == ["model"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    on_ranks(2, check_a_lost_rank, str(tmp_path), lost=1)
