"""Calibration by several processes: each gathers sums over batches of its own, and all solve from the same totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from sigswap.conversion.state import OwnerState
from sigswap.conversion.wrappers import is_shard
from sigswap.distributed.ranks import Ranks
from sigswap.training.observe import Observer
from sigswap.training.sums import ChannelSums, Sample, SiteSums

_ADDED = tuple(field.name for field in dataclasses.fields(SiteSums) if field.name not in ("site", "sample", "longest"))


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


def add_up(ranks: Ranks, observer: Observer, states: Sequence[OwnerState]) -> None:
    """Puts the totals over all ranks in place of what ``observer`` has gathered in this one."""
    if ranks.size == 1:
        return
    parts = list(_parts(ranks, observer, states))
    everywhere = ranks.gathered([part.form() for part in parts])
    for part, forms in zip(parts, zip(*everywhere, strict=True), strict=True):
        part.add_up(ranks, forms)


@dataclasses.dataclass(frozen=True)
class _Form:
    """Of what one rank has gathered: the shapes of its sums, where there are some; None: nothing is there."""

    shapes: tuple[tuple[int, ...] | None, ...]
    longest: int
    sample: tuple[int, ...] | None


@dataclasses.dataclass
class _Part:
    """The sums of one site, or of one owner's channels, by the names of their fields in ``sums``."""

    sums: Any
    names: tuple[str, ...]
    there: bool
    device: torch.device
    keep: Any  # puts the sums into the observer

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

    def add_up(self, ranks: Ranks, forms: Sequence[_Form | None]) -> None:
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
                self.sums.sample = self._joined(ranks, self.sums.sample, rows)
        self.keep(self.sums)

    def _joined(self, ranks: Ranks, sample: Sample | None, shapes: Sequence[tuple[int, ...]]) -> Sample:
        """The samples of all ranks, in their order."""
        heads, most, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        padded = torch.zeros(heads, most, columns, device=self.device)
        if sample is not None:
            rows = sample.rows()
            padded[:, : rows.shape[1]] = rows
        parts = [torch.empty_like(padded) for _ in shapes]
        torch.distributed.all_gather(parts, padded, group=ranks.group)
        return Sample.of([part[:, : shape[1]] for part, shape in zip(parts, shapes, strict=True)])


def _parts(ranks: Ranks, observer: Observer, states: Sequence[OwnerState]) -> Iterator[_Part]:
    """The same ones on all ranks, whatever each of them has seen."""
    for state in states:
        for site in state.sites():
            sums = observer.sites.get(site, SiteSums(site))
            device = ranks.place(_device(site, sums))
            yield _Part(
                sums,
                _ADDED,
                site in observer.sites,
                device,
                lambda sums, site=site: observer.sites.update({site: sums}),
            )
        channels = observer.owners.get(state, ChannelSums())
        device = ranks.place(_device(state, channels))
        there = state in observer.owners
        yield _Part(channels, ("sums",), there, device, lambda sums, state=state: observer.owners.update({state: sums}))


def _device(module: nn.Module, sums: SiteSums | ChannelSums) -> torch.device:
    """Where the sums are; of one that was not reached, where its parameters are."""
    gathered = [value for value in vars(sums).values() if isinstance(value, Tensor)]
    return next((tensor.device for tensor in [*gathered, *module.parameters()]), torch.device("cpu"))
