"""What ranks send one another: tensors from rank to rank, while they go on computing."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


class Pending:
    """What is under way. The tensors are kept until it is there."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Until what was to come is there: a GPU's current stream waits, not the host."""
        for work in self._works:
            work.wait()
        self._works, self._tensors = (), ()


class SequenceGroup:
    """The ranks among which a sequence is divided, ``group``, in its order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._global = dist.get_process_group_ranks(group)

    def exchange(
        self, to: int, sent: Sequence[Tensor], source: int, received: Sequence[Tensor], tag: int = 0
    ) -> Pending:
        """Starts to send contiguous tensors to the rank ``to``, and to receive others from ``source``; empty ones are
        left out. ``tag``: tells two exchanges apart that are under way at the same time."""
        operations = [
            dist.P2POp(operation, tensor, self._global[peer], self.group, 2 * tag + number)
            for operation, peer, tensors in ((dist.isend, to, sent), (dist.irecv, source, received))
            for number, tensor in enumerate(tensors)
            if tensor.numel() > 0
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, [*sent, *received])

    def all_to_all(
        self,
        sent: Tensor,
        received: Tensor,
        sent_sizes: list[int] | None = None,
        received_sizes: list[int] | None = None,
    ) -> None:
        """The r-th of the parts of ``sent`` along the first dimension goes to rank r; waits. The parts have these
        sizes; None: equal ones."""
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group)

    def sum(self, tensor: Tensor) -> None:
        """In place, over the ranks; waits."""
        dist.all_reduce(tensor, group=self.group)
