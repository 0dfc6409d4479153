"""The tensors of a model that is saved, one after the other and each of them whole, wherever its parts are.

Where each process holds a part of the parameters, all of them go through the same tensors in the same order, and one
writes: more than one whole tensor there never is. Where that one fails, it goes on without writing, for the others
would wait.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sigswap.conversion.wrappers import is_shard
from sigswap.distributed.ranks import Ranks
from sigswap.distributed.shards import whole
from sigswap.errors import CheckpointError
from sigswap.saving.weights import DTYPE_NAMES


class Gathered:
    """The tensors of a ``state``, by name. Each can be had once."""

    def __init__(self, ranks: Ranks, state: Mapping[str, Tensor], apart: Mapping[str, Tensor]) -> None:
        """Of tied ones in ``state`` the first is taken, and ``aliases`` says by which name the others are stored; those
        ``apart`` are taken all."""
        self.ranks = ranks
        self.state, self.aliases = untied(state)
        self.state |= apart
        for name, tensor in self.state.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{name} is of {tensor.dtype}, which no safetensors file can hold.")
        # As safetensors lays them out, so that each is aligned.
        self._left = sorted(self.state, key=lambda name: (-self.state[name].dtype.itemsize, name))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """On the CPU, contiguous."""
        while self._left:
            name = self._left.pop(0)
            yield name, self._whole(name).cpu().contiguous()

    def drain(self) -> None:
        """Takes part in gathering what is left."""
        while self._left:
            self._whole(self._left.pop(0))

    def _whole(self, name: str) -> Tensor:
        try:
            return whole(self.state[name])
        except RuntimeError as error:
            self._left.clear()
            if is_shard(self.state[name]):
                raise self.ranks.lost(error) from error
            raise

    def write_file(self, path: Path) -> None:
        """All of them as a safetensors file."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name in self._left:
            tensor = self.state[name]
            end = begin + tensor.numel() * tensor.dtype.itemsize
            shape = list(tensor.shape)
            header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for _, tensor in self:
                _write(file, tensor)

    def write_folder(self, folder: Path) -> dict[str, Tensor]:
        """Each in a file of its own, and all of them, the tied ones too, as tensors whose memory these files are."""
        mapped: dict[str, Tensor] = {}
        for index, (name, tensor) in enumerate(self):
            path = folder / str(index)
            with path.open("wb") as file:
                _write(file, tensor)
            size = tensor.numel() * tensor.dtype.itemsize
            mapped[name] = torch.empty_like(tensor)
            if size:
                memory = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
                mapped[name] = memory.view(tensor.dtype).view(tensor.shape)
        return mapped | {alias: mapped[name] for alias, name in self.aliases.items()}


def _write(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that are to be stored, and for each name of a tied one the name it is stored under."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in state.items():
        same: object = id(tensor)
        if not is_shard(tensor):
            same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and same in first:
            aliases[name] = first[same]
            continue
        first[same] = name
        kept[name] = tensor
    return kept, aliases
