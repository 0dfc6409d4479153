"""The processes that do one thing together: all of them, with the same arguments, and to one end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from sigswap.errors import CalibrationError, CheckpointError, ConversionError, Hint, SigswapError

ARRIVAL = timedelta(minutes=5)
"""For so long a rank waits for the others to begin, where the backend can tell which of them do not come."""


class Work(NamedTuple):
    """What ranks do together, as messages say it: the function that is called, and its noun."""

    function: str
    noun: str
    error: type[SigswapError]
    or_else: str = ", or give those that do so a group of their own"


CONVERSION = Work("convert", "conversion", ConversionError, "")
CALIBRATION = Work("calibrate", "calibration", CalibrationError)
DISTILLATION = Work("distill", "distillation", CalibrationError)
SAVE = Work("save", "save", CheckpointError, "")


class Ranks:
    """The ranks of a process group; or one process."""

    def __init__(self, work: Work, group: Any = None, *, alone: bool = False) -> None:
        """``group`` None: all ranks, if torch.distributed is initialised. ``alone``: this process alone."""
        is_there = torch.distributed.is_available() and torch.distributed.is_initialized() and not alone
        self.work = work
        self.group = group
        self.size: int = torch.distributed.get_world_size(group) if is_there else 1
        self.rank: int = torch.distributed.get_rank(group) if is_there else 0

    def members(self) -> list[int]:
        """The global ranks, in the order of the group's."""
        if self.size == 1:
            return [torch.distributed.get_rank() if torch.distributed.is_initialized() else 0]
        if self.group is None:
            return list(range(self.size))
        found: list[int] = torch.distributed.get_process_group_ranks(self.group)
        return found

    def place(self, device: torch.device) -> torch.device:
        """``device``, if the ranks can send what is there to one another; else this process's GPU."""
        if device.type == "cpu" and self.size > 1 and torch.distributed.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def arrive(self) -> None:
        """Waits for the others. Raises the work's error if not all come, where the backend can tell."""
        if self.size == 1 or torch.distributed.get_backend(self.group) != "gloo":
            return
        function = self.work.function
        try:
            torch.distributed.monitored_barrier(self.group, ARRIVAL, wait_all_ranks=True)
        except RuntimeError as error:
            raise self.work.error(
                f"not all {self.size} ranks of the process group {function}: {error}",
                hint=Hint(f"Call {function} on every rank{self.work.or_else}."),
            ) from error

    def check_same(self, **mine: Any) -> None:
        """Raises the work's error unless all ranks come, with equal things by these names."""
        if self.size == 1:
            return
        self.arrive()
        function = self.work.function
        texts = {name: repr(value) for name, value in mine.items()}
        for rank, theirs in enumerate(self.gathered(texts)):
            differing = [name for name in texts if theirs.get(name) != texts[name]]
            if differing:
                raise self.work.error(
                    f"rank {rank} {function}s with another {' and '.join(differing)} than rank {self.rank}.",
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
        if self.size > 1:
            self.agree(problem)

    def agree(self, problem: Exception | None) -> None:
        """Raises ``problem``, or the work's error if another rank has one."""
        try:
            texts = self.gathered(None if problem is None else f"{type(problem).__name__}: {problem}")
        except RuntimeError as error:
            raise problem or self.lost(error) from error
        if problem is not None:
            raise problem
        failed = [f"rank {rank} ({text})" for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise self.work.error(f"the {self.work.noun} failed on {', '.join(failed)}.")

    def lost(self, error: RuntimeError) -> SigswapError:
        """About a rank that has ended, or does not answer."""
        return self.work.error(f"the {self.work.noun} lost a rank: {error}")

    def gathered(self, mine: Any) -> list[Any]:
        """``mine`` of each rank: plain data."""
        if self.size == 1:
            return [mine]
        theirs: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(theirs, mine, group=self.group)
        return theirs

    def sent(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        """The tensor of rank 0, in the shape, dtype and on the device of ``like``. Others need have none."""
        if self.size == 1:
            assert tensor is not None
            return tensor
        place = self.place(like.device)
        found = (
            torch.empty(like.shape, dtype=like.dtype, device=place) if tensor is None else tensor.to(place, like.dtype)
        )
        torch.distributed.broadcast(found.contiguous(), self.members()[0], group=self.group)
        return found.to(like.device)

    def numbers(self, *mine: int, device: torch.device) -> list[list[int]]:
        """Some numbers of each rank; as many of each."""
        if self.size == 1:
            return [list(mine)]
        sent = torch.tensor(mine, dtype=torch.int64, device=self.place(device))
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            torch.distributed.all_gather(parts, sent, group=self.group)
            found: list[list[int]] = torch.stack(parts).tolist()
        except RuntimeError as error:
            raise self.lost(error) from error
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on the device that ``tensor`` is on."""
        if self.size == 1:
            return tensor
        place = self.place(tensor.device)
        total = tensor.detach().clone() if place == tensor.device else tensor.detach().to(place)
        try:
            torch.distributed.all_reduce(total, group=self.group)
        except RuntimeError as error:
            raise self.lost(error) from error
        return total.to(tensor.device)
