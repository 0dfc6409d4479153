"""Calibration by several processes: each gathers sums over batches of its own, and all solve from the same totals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from sigswap.conversion.state import OwnerState, SiteState
from sigswap.errors import CalibrationError, Hint
from sigswap.training.observe import Observer
from sigswap.training.sums import ChannelSums, Sample, SiteSums

ARRIVAL = timedelta(minutes=5)
"""For so long a rank waits for the others to begin, where the backend can tell which of them do not come."""

_ADDED = tuple(field.name for field in dataclasses.fields(SiteSums) if field.name not in ("site", "sample", "longest"))


class Ranks:
    """The ranks of a process group that calibrate copies of one model, each on batches of its own; or one process."""

    def __init__(self, group: Any = None) -> None:
        """``group`` None: all ranks, if torch.distributed is initialised."""
        is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.group = group
        self.size = torch.distributed.get_world_size(group) if is_there else 1
        self.rank = torch.distributed.get_rank(group) if is_there else 0

    def check_same(self, states: Mapping[str, OwnerState], **arguments: Any) -> None:
        """Raises CalibrationError unless all ranks have come, with the same conversion, arguments and parameters."""
        if self.size == 1:
            return
        if torch.distributed.get_backend(self.group) == "gloo":
            try:
                torch.distributed.monitored_barrier(self.group, ARRIVAL, wait_all_ranks=True)
            except RuntimeError as error:
                raise CalibrationError(
                    f"not all {self.size} ranks of the process group calibrate: {error}",
                    hint=Hint("Call calibrate on every rank, or give those that do so a group of their own."),
                ) from error
        plans = {path: (state.plan, [site.row_cap for site in state.sites()]) for path, state in states.items()}
        values = [
            float(parameter.detach().double().sum()) for state in states.values() for parameter in state.parameters()
        ]
        mine = {"conversion": repr(plans), "parameters": repr(values)} | {k: repr(v) for k, v in arguments.items()}
        for rank, theirs in enumerate(self._gathered(mine)):
            differing = [name for name in mine if theirs.get(name) != mine[name]]
            if differing:
                raise CalibrationError(
                    f"rank {rank} calibrates with another {' and '.join(differing)} than rank {self.rank}.",
                    hint=Hint("Convert the same model in the same way on all ranks, and pass the same arguments."),
                )

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """An error in one rank is one in all of them; without this, they would wait for it."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            problem = error
        if self.size == 1:
            return
        texts = self._gathered(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        failed = [f"rank {rank} ({text})" for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise CalibrationError(f"the calibration failed on {', '.join(failed)}.")

    def add_up(self, observer: Observer, states: Sequence[OwnerState]) -> None:
        """Puts the totals over all ranks in place of what ``observer`` has gathered in this one."""
        if self.size == 1:
            return
        for state in states:
            for site in state.sites():
                self._add_up_site(observer, site)
            [channels] = self._totals([getattr(observer.owners.get(state), "sums", 0.0)], _device(state))
            if isinstance(channels, Tensor):
                observer.owners[state] = ChannelSums(channels)

    def _add_up_site(self, observer: Observer, site: SiteState) -> None:
        mine = observer.sites.get(site, SiteSums(site))
        device = _device(site)
        totals = self._totals([getattr(mine, name) for name in _ADDED], device)
        seen = self._gathered(
            (site in observer.sites, mine.longest, None if mine.sample is None else mine.sample.shape())
        )
        if not any(there for there, _, _ in seen):
            return
        for name, total in zip(_ADDED, totals, strict=True):
            setattr(mine, name, total)
        mine.longest = max(longest for _, longest, _ in seen)
        shapes = [shape for _, _, shape in seen if shape is not None]
        if shapes:
            mine.sample = self._joined(
                mine.sample, shapes, [0 if shape is None else shape[1] for _, _, shape in seen], device
            )
        observer.sites[site] = mine

    def _totals(self, values: Sequence[Any], device: torch.device) -> list[Any]:
        """Of tensors and of numbers that stand for tensors of zeros; where no rank has a tensor, what this one has."""
        shapes = self._gathered([tuple(value.shape) if isinstance(value, Tensor) else None for value in values])
        totals = []
        for index, value in enumerate(values):
            shape = next((each[index] for each in shapes if each[index] is not None), None)
            if shape is not None:
                total = (
                    value.clone()
                    if isinstance(value, Tensor)
                    else torch.zeros(shape, dtype=torch.float64, device=device)
                )
                torch.distributed.all_reduce(total, group=self.group)
                value = total
            totals.append(value)
        return totals

    def _joined(
        self, sample: Sample | None, shapes: Sequence[tuple[int, ...]], rows: Sequence[int], device: torch.device
    ) -> Sample:
        """The samples of all ranks, in their order."""
        heads, _, columns = shapes[0]
        padded = torch.zeros(heads, max(rows), columns, device=device)
        if sample is not None:
            padded[:, : rows[self.rank]] = sample.rows()
        parts = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather(parts, padded, group=self.group)
        return Sample.of([part[:, :count] for part, count in zip(parts, rows, strict=True)])

    def _gathered(self, mine: Any) -> list[Any]:
        """``mine`` of each rank: plain data."""
        theirs: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(theirs, mine, group=self.group)
        return theirs


def _device(module: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
