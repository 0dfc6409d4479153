"""What a peer is: a name, what it takes, and how it is built on a cell's tensors."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigswap.bench.cells import Cell, Feature, Setup
from sigswap.bench.inputs import Inputs
from sigswap.errors import BenchmarkError


class Implementation(NamedTuple):
    """``forward`` takes nothing: it holds its inputs. It, and its backward pass, run within ``context()``."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor | None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


_IN_WORDS: dict[Feature, str] = {
    "softcap": "a soft cap",
    "dropout": "dropout",
    "window": "a window",
    "mask": "a mask tensor",
    "bias": "a bias tensor",
    "pages": "pages",
}


def _takes_all(cell: Cell, dtype: torch.dtype) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation that ``sigswap bench`` measures beside sigswap's own.

    Attributes:
        name: In tables, JSON and ``--peers``.
        about: What it is, in a few words, for ``--help``.
        suites: Those in whose cells it is measured.
        build: Makes it ready to run on a cell's tensors. It raises what the implementation raises where it cannot run,
            and that becomes the reason why there is no figure. None: it is of the suite models alone, whose models say
            themselves how they run as each peer.
        package: The optional package that it is from, whose version the results name.
        setup: What it does on each new shape. Peers with a setup run in some cells only, unless they are asked for.
        forward_only: It has no backward pass.
        features: Those that it takes.
        why_not: Why it does not take a cell in this dtype; None: it does, or says so itself when it is built or run.
    """

    name: str
    about: str
    suites: tuple[str, ...]
    build: Callable[[Cell, Inputs], Implementation] | None = None
    package: str | None = None
    setup: Setup = "none"
    forward_only: bool = False
    features: tuple[Feature, ...] = ()
    why_not: Callable[[Cell, torch.dtype], str | None] = _takes_all

    def implementation(self, cell: Cell, inputs: Inputs) -> Implementation:
        """The peer on a cell's tensors.

        Raises:
            BenchmarkError: The peer does not take the cell, or its package is not installed.
        """
        for feature in cell.features:
            if feature not in self.features:
                raise BenchmarkError(f"It does not take {_IN_WORDS[feature]}.")
        reason = self.why_not(cell, inputs.query.dtype)
        if reason is not None:
            raise BenchmarkError(reason)
        if self.build is None:
            raise BenchmarkError("It is a peer of whole models.")
        return self.build(cell, inputs)


def package_module(module: str, package: str) -> ModuleType:
    """The module of an optional package; a BenchmarkError that names the package if something is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"It needs the package {package}: {error}") from error
