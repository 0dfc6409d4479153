"""torch.distributed.checkpoint of a converted model: what some ranks write, others read, spread in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from spread import CONFIG, by_heads, converted, fully, llama, plain, values
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import sigswap

pytest.importorskip("transformers")


WRITERS = ("plain", "fully", "by heads")


def moved() -> Any:
    """With parameters that tell the heads apart."""
    model = converted()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def without_data(model: Any) -> Any:
    """A converted one like ``model`` that fully_shard has sharded on meta, with memory for this rank's part."""
    with torch.device("meta"):
        made = llama()
    made = fully(sigswap.convert(made, CONFIG)).to_empty(device="cpu")
    for name, buffer in model.named_buffers():  # of which no checkpoint has the values
        made.get_buffer(name).copy_(buffer)
    return made


WAYS: dict[str, Any] = {"plain": plain, "fully": fully, "by heads": by_heads, "without data": without_data}


def written(model: Any, folder: str) -> None:
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)


def read(model: Any, folder: str) -> dict[str, Tensor]:
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    return values(model)


def check(folder: str, from_ways: list[str]) -> None:
    """Reads what each way has written, and writes in each."""
    expected = values(moved())
    for name, way in WAYS.items():
        for other in from_ways:
            found = read(way(converted()), f"{folder}/{other}")
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), f"{other} to {name}: {key}"
        if way is not without_data:
            written(way(moved()), f"{folder}/{name} of {torch.distributed.get_world_size()}")


def test_any_number_of_ranks_reads_what_another_wrote(tmp_path: Path) -> None:
    written(moved(), f"{tmp_path}/one")
    on_ranks(2, check, str(tmp_path), ["one"])
    expected = values(moved())
    for way in WRITERS:
        found = read(converted(), f"{tmp_path}/{way} of 2")
        for name, value in expected.items():
            assert torch.equal(found[name], value), f"{way}: {name}"
