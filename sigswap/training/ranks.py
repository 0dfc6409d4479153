"""Calibration by several processes: each gathers sums over batches of its own, and all solve from the same totals.

Ranks of tensor parallelism have the same batches, and each the sums of its own heads: these are put where they are
among all heads before they are added up. What such ranks all have alike counts once.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sigswap.conversion.recording import Inputs
from sigswap.conversion.state import OwnerState
from sigswap.conversion.wrappers import is_shard
from sigswap.distributed.heads import DividedHeads
from sigswap.distributed.ranks import Ranks
from sigswap.errors import ArgumentError, CalibrationError, Hint
from sigswap.training.observe import Observer
from sigswap.training.sums import ChannelSums, Sample, SiteSums

_ADDED = tuple(field.name for field in dataclasses.fields(SiteSums) if field.name not in ("site", "sample", "longest"))
_SECOND = ("lengths", "query_fit", "key_fit")
"""Sums whose second axis is that of the heads; of the others it is the first one."""


def conversions_of(states: Mapping[str, OwnerState]) -> dict[str, Any]:
    """What has to be the same on all ranks of the converted modules: their plans, terms and parameters."""
    values = {}
    for path, state in states.items():
        for name, parameter in state.named_parameters():
            # Of parts each process has its own.
            value = None if is_shard(parameter) else float(parameter.detach().double().sum())
            values[f"{path}.{name}"] = (tuple(parameter.shape), value)
    plans = {path: (state.plan, [site.row_cap for site in state.sites()]) for path, state in states.items()}
    return {"conversion": plans, "parameters": values}


def add_up(ranks: Ranks, observer: Observer, states: Sequence[OwnerState], heads: DividedHeads) -> None:
    """Puts the totals over all ranks, of all heads, in place of what ``observer`` has gathered in this one."""
    if ranks.size == 1:
        return
    parts = list(_parts(ranks, observer, states, heads))
    for part in parts:
        part.place()
    places = ranks.gathered((heads.first, heads.number))
    everywhere = ranks.gathered([part.form() for part in parts])
    for part, forms in zip(parts, zip(*everywhere, strict=True), strict=True):
        part.add_up(ranks, forms, places)


def check_holders(ranks: Ranks, heads: DividedHeads) -> None:
    """Raises ArgumentError unless all that hold parts of the model are among the ranks that calibrate it."""
    if heads.mesh is not None and not set(heads.mesh.mesh.flatten().tolist()) <= set(ranks.members()):
        raise ArgumentError(
            f"{{argument}} leaves out ranks that hold parts of the model: it has {ranks.members()}, and tensor "
            f"parallelism has divided the model among {sorted(heads.mesh.mesh.flatten().tolist())}.",
            argument="group",
            hint=Hint("Pass a group with all ranks that calibrate, or {group} for all there are.", {"group": "None"}),
        )


def check_batches(ranks: Ranks, heads: DividedHeads, call: Inputs | None, device: torch.device) -> list[bool]:
    """Which of the ranks have a ``call``; this one's is None if it has none left.

    Raises CalibrationError, in all ranks, where ranks of tensor parallelism have other batches than one another.
    """
    known = fingerprint(call) if heads.mesh is not None and call is not None else 0
    found = ranks.numbers(int(call is not None), heads.first, known, device=device)
    copies: dict[int, set[tuple[int, int]]] = {}
    for there, first, known in found:
        copies.setdefault(first, set()).add((there, known))
    if heads.mesh is not None and any(len(each) > 1 for each in copies.values()):
        raise CalibrationError(
            "the ranks of tensor parallelism have other batches than one another.",
            argument="batches",
            hint=Hint("Pass the same batches to all that hold parts of one copy of the model."),
        )
    return [bool(there) for there, _, _ in found]


def fingerprint(call: Inputs) -> int:
    """Of the shapes of its tensors and the values of those that are no floating point numbers: the same on ranks that
    have the same batch."""
    known = 0
    for leaf in tree_leaves(call):
        if isinstance(leaf, Tensor):
            known = zlib.crc32(repr((tuple(leaf.shape), leaf.dtype)).encode(), known)
            if not leaf.is_floating_point() and not leaf.is_complex():
                known = zlib.crc32(leaf.detach().cpu().contiguous().numpy().tobytes(), known)
    return known


@dataclasses.dataclass(frozen=True)
class _Form:
    """Of what one rank has gathered: the shapes of its sums, where there are some; None: nothing is there."""

    shapes: tuple[tuple[int, ...] | None, ...]
    longest: int
    sample: tuple[int, ...] | None


@dataclasses.dataclass
class _Part:
    """The sums of one site, or of one owner's channels, by the names of their fields in ``sums``.

    ``among``: how many ranks each have sums of some heads; ``copies``: how many have the same ones; ``index``: of this
    rank among these.
    """

    sums: Any
    names: tuple[str, ...]
    there: bool
    device: torch.device
    keep: Any  # puts the sums into the observer
    among: int
    copies: int
    index: int

    def place(self) -> None:
        """Makes the sums a summand of the whole."""
        for name in self.names if self.there else ():
            value = getattr(self.sums, name)
            if not isinstance(value, Tensor):
                continue
            if self.among > 1:
                axis = int(name in _SECOND)
                own = value.shape[axis]
                shape = list(value.shape)
                shape[axis] = self.among * own
                whole = value.new_zeros(shape)
                whole.narrow(axis, self.index * own, own).copy_(value)
                value = whole
            setattr(self.sums, name, value / self.copies if self.copies > 1 else value)
        if self.copies > 1 and self.index > 0 and self.there and isinstance(self.sums, SiteSums):
            self.sums.sample = None

    def form(self) -> _Form | None:
        if not self.there:
            return None
        values = [getattr(self.sums, name) for name in self.names]
        sample = getattr(self.sums, "sample", None)
        return _Form(
            tuple(tuple(value.shape) if isinstance(value, Tensor) else None for value in values),
            getattr(self.sums, "longest", 0),
            None if sample is None else sample.shape(),
        )

    def add_up(self, ranks: Ranks, forms: Sequence[_Form | None], places: Sequence[tuple[int, int]]) -> None:
        """``places`` of the ranks: which copy of the model they hold a part of, and which part."""
        found = [form for form in forms if form is not None]
        if not found:
            return
        shapes = {}
        for index, name in enumerate(self.names):
            shape = next((form.shapes[index] for form in found if form.shapes[index] is not None), None)
            if shape is not None:
                shapes[name] = shape
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        for name, piece in zip(shapes, torch.split(flat, sizes), strict=True):
            value = getattr(self.sums, name)
            if isinstance(value, Tensor):
                piece.copy_(value.flatten())
        for (name, shape), total in zip(shapes.items(), torch.split(ranks.sum(flat), sizes), strict=True):
            setattr(self.sums, name, total.view(shape))
        if isinstance(self.sums, SiteSums):
            self.sums.longest = max(form.longest for form in found)
            if any(form.sample is not None for form in found):
                rows = [(0, 0, 0) if form is None or form.sample is None else form.sample for form in forms]
                self.sums.sample = self._joined(ranks, self.sums.sample, rows, places)
        self.keep(self.sums)

    def _joined(
        self,
        ranks: Ranks,
        sample: Sample | None,
        shapes: Sequence[tuple[int, ...]],
        places: Sequence[tuple[int, int]],
    ) -> Sample:
        """The samples of all ranks, in their order: their rows, of all heads."""
        heads, most, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        padded = torch.zeros(heads, most, columns, device=self.device)
        if sample is not None:
            rows = sample.rows()
            padded[:, : rows.shape[1]] = rows
        parts = [torch.empty_like(padded) for _ in shapes]
        torch.distributed.all_gather(parts, padded, group=ranks.group)
        found = [part[:, : shape[1]] for part, shape in zip(parts, shapes, strict=True)]
        if self.among == 1:
            return Sample.of(found)
        copies: dict[int, dict[int, Tensor]] = {}
        for (first, index), rows in zip(places, found, strict=True):
            copies.setdefault(first, {})[index] = rows
        joined = []
        for by_index in copies.values():
            common = min(rows.shape[1] for rows in by_index.values())
            joined.append(torch.cat([by_index[index][:, :common] for index in sorted(by_index)]))
        return Sample.of(joined)


def _parts(ranks: Ranks, observer: Observer, states: Sequence[OwnerState], heads: DividedHeads) -> Iterator[_Part]:
    """The same ones on all ranks, whatever each of them has seen."""
    for state in states:
        among = heads.among(state)
        for site in state.sites():
            sums = observer.sites.get(site, SiteSums(site))
            device = ranks.place(_device(site, sums))
            yield _Part(
                sums,
                _ADDED,
                site in observer.sites,
                device,
                lambda sums, site=site: observer.sites.update({site: sums}),
                among,
                heads.size // among,
                heads.number,
            )
        channels = observer.owners.get(state, ChannelSums())
        device = ranks.place(_device(state, channels))
        there = state in observer.owners
        yield _Part(
            channels,
            ("sums",),
            there,
            device,
            lambda sums, state=state: observer.owners.update({state: sums}),
            1,  # of all heads together
            heads.size,
            heads.number,
        )


def _device(module: nn.Module, sums: SiteSums | ChannelSums) -> torch.device:
    """Where the sums are; of one that was not reached, where its parameters are."""
    gathered = [value for value in vars(sums).values() if isinstance(value, Tensor)]
    return next((tensor.device for tensor in [*gathered, *module.parameters()]), torch.device("cpu"))
