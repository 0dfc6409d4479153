"""The tensors of a saved model: what a file says that it holds, before any of it is read, and its values."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from sigswap.errors import CheckpointError, Hint
from sigswap.transaction import Transaction

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER = 100_000_000  # bytes, as safetensors has it
_MISSING = 1 << 20
"""So many values may be missing without that they are compared before they are allocated."""


class Stored(NamedTuple):
    """A tensor of a file, as the file's header has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by name. No tensor is read. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > min(size - 8, _MOST_HEADER):
                raise CheckpointError(f"{path} could not be read: it is cut off, or no safetensors file.")
            data = json.loads(file.read(length))
        if not isinstance(data, dict):
            raise ValueError("its header is no object")
        found: dict[str, Stored] = {}
        for name, entry in data.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, begin, end)
            if not all(type(each) is int and each >= 0 for each in numbers) or end > size - 8 - length:
                raise ValueError(f"{name} lies outside of it")
            if math.prod(shape) * dtype.itemsize != end - begin:
                raise ValueError(f"{name} has another number of bytes than its shape says")
            found[name] = Stored(dtype, shape, begin, end)
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} could not be read: {type(error).__name__}: {error}") from error
    return found


def digest(header: Mapping[str, Stored]) -> str:
    """A checksum of names, dtypes, shapes and places, but not of values."""
    lines = [f"{name} {each.dtype} {each.shape} {each.begin} {each.end}" for name, each in sorted(header.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_digest(header: Mapping[str, Stored], written: str | None, path: Path, field: str) -> None:
    """Raises CheckpointError if the file is not the one that was saved. ``written`` None: nobody knows."""
    if written is not None and digest(header) != written:
        raise CheckpointError(
            f"{path}: names, dtypes, shapes or places of its tensors are not those that were saved.",
            hint=Hint(f"If another program wrote it on purpose, remove {field}."),
        )


def check_keys(where: Path, missing: Iterable[Any], unexpected: Iterable[Any], mismatched: Iterable[Any]) -> None:
    """Raises CheckpointError if there are any."""
    problems = []
    for what, names in (
        ("lacks the model's tensors", missing),
        ("has tensors that the model does not have:", unexpected),
        ("has tensors of another shape than the model's:", mismatched),
    ):
        texts = sorted(map(str, names))
        if texts:
            problems.append(f"{what} {texts[:5]}{' and more' if len(texts) > 5 else ''}")
    if problems:
        raise CheckpointError(f"{where} {', and '.join(problems)}")


def check_header(
    state: Mapping[str, Tensor], header: Mapping[str, Stored], aliases: Mapping[str, str], path: Path
) -> None:
    """Raises CheckpointError unless the file has just the tensors of ``state``, but for the ``aliases``, in their
    shapes and in dtypes of their kind.
    """
    both = [name for name in header if name in state]
    check_keys(
        path,
        set(state) - set(header) - set(aliases),
        set(header) - set(state),
        [
            (name, header[name].shape, tuple(state[name].shape))
            for name in both
            if header[name].shape != tuple(state[name].shape)
        ],
    )
    for name in both:
        check_dtype(name, header[name].dtype, state[name].dtype, path)
    for name, source in aliases.items():
        if name not in state or source not in state or source not in header or name in header:
            raise CheckpointError(f"{path}: the model has no tied tensors {name} and {source}.")
        if state[name].shape != state[source].shape:
            raise CheckpointError(f"{path}: {name} and {source} are of other shapes, and cannot be tied.")


def check_dtype(name: str, stored: torch.dtype, wanted: torch.dtype, path: Path) -> None:
    """Floats may be of another precision than what the model is built in; all else is what it is."""
    if stored != wanted and not (stored.is_floating_point and wanted.is_floating_point and stored.itemsize > 1):
        raise CheckpointError(f"{path}: {name} is of {stored}, and the model's is of {wanted}.")


def read_weights(
    model: nn.Module,
    targets: Mapping[str, Tensor],
    path: Path,
    header: Mapping[str, Stored],
    aliases: Mapping[str, str],
    written: str | None,
) -> None:
    """Gives ``targets``, the model's tensors, the values and dtypes in the file, in place, so that ties between them
    stay.

    ``written``: the digest of the file that was saved. Raises CheckpointError, before anything is read.
    """
    check_header(targets, header, aliases, path)
    check_digest(header, written, path, '"tensors" from sigswap.json')
    try:
        with path.open("rb", buffering=0) as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for name, stored in sorted(header.items(), key=lambda each: each[1].begin):
                file.seek(start + stored.begin)
                targets[name].data = _read(file, stored).to(targets[name].device)
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error
    for name, source in aliases.items():
        owner_path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        tensors: Any = owner._parameters if attribute in owner._parameters else owner._buffers
        tensors[attribute] = targets[source]


def _read(file: BinaryIO, stored: Stored) -> Tensor:
    """Not by safetensors, in which a Ctrl-C can become another error. What is allocated here is aligned in memory, too:
    in the last bit, results on a CPU can depend on that."""
    values = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
    left = memoryview(values.numpy())  # type: ignore[arg-type]
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise OSError("it was cut off meanwhile")
        left = left[count:]
    return values.view(stored.dtype).reshape(stored.shape)


# transformers


_complete: contextvars.ContextVar[bool] = contextvars.ContextVar("complete", default=False)


@contextlib.contextmanager
def all_of_the_model() -> Iterator[None]:
    """Within it the files that transformers reads have to hold all of the model, in its shapes."""
    with Transaction() as undo, undo:
        undo.afterwards("how files are compared", functools.partial(_complete.set, _complete.get()))
        _complete.set(True)
        yield


def check_files(model: nn.Module, paths: Iterable[str | os.PathLike[str]] | None, *, quantized: bool = False) -> None:
    """Compares ``model``, which has no data yet, with the headers of the files that transformers will read into it.

    By the names that are the same in both: transformers may rename others. ``quantized``: where the model has floats,
    the files may have integers in another shape, or several tensors beside one another. Raises CheckpointError.
    """
    header: dict[str, Stored] = {}
    places: dict[str, Path] = {}
    for path in map(Path, paths or ()):
        if path.suffix != ".safetensors":
            return
        for name, each in read_header(path).items():
            header[name], places[name] = each, path
    state = model.state_dict()
    if quantized:
        inside = {name.rpartition(".")[0] for name in header.keys() - state.keys()}
        packed = {
            name
            for name, tensor in state.items()
            if tensor.is_floating_point()
            and (name.rpartition(".")[0] in inside or (name in header and not header[name].dtype.is_floating_point))
        }
        state = {name: tensor for name, tensor in state.items() if name not in packed}
        header = {name: each for name, each in header.items() if name in state}
    for name in header.keys() & state.keys():
        check_dtype(name, header[name].dtype, state[name].dtype, places[name])
        if _complete.get() and header[name].shape != tuple(state[name].shape):
            check_keys(places[name], (), (), [(name, header[name].shape, tuple(state[name].shape))])
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = {name: tensor.numel() for name, tensor in state.items() if name not in header and name not in tied}
    others = sum(math.prod(each.shape) for name, each in header.items() if name not in state)
    if header and _complete.get() and sum(missing.values()) > others + _MISSING:
        check_keys(next(iter(places.values())), missing, (), ())
