"""Context parallelism: each process has a part of every sequence, and attention sees all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sigswap.conversion.keeping import thread_state
from sigswap.errors import ArgumentError, Hint
from sigswap.functional.torch_functions import SWAPS
from sigswap.sequence.active import activated, refuse_parts
from sigswap.sequence.attention import FORMS, Form, SequenceAttention
from sigswap.sequence.exchange import SequenceGroup
from sigswap.sequence.layout import Layout, Segment
from sigswap.transaction import Transaction

_WHOLE = frozenset(function for function, swap in SWAPS.items() if swap.family not in ("softmax", "log_softmax"))
"""Functions that are attention, whatever they are called for."""


class ContextParallel:
    """The parts into which :func:`context_parallel` divides sequences."""

    def __init__(self, ranks: SequenceGroup) -> None:
        self._ranks = ranks

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self._ranks.size

    def shard(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that all ranks have whole, such as input ids [B, N] along dimension 1.

        Raises:
            ArgumentError: the sequence cannot be divided into two chunks of equal length for each rank.
        """
        chunks = self._layout(tensor.shape[dim]).chunks(self._ranks.rank)
        return torch.cat([tensor.narrow(dim, chunk.start, chunk.stop - chunk.start) for chunk in chunks], dim)

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """The positions of this rank's part of a sequence, int64 [1, length / size]: what models take as
        ``position_ids``."""
        return self.shard(torch.arange(length, device=device)[None])

    @torch.no_grad()
    def gather(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The whole of a tensor of which each rank has its part, in the sequence's order, on every rank. Without
        gradients."""
        part = tensor.movedim(dim, 0).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part, group=self._ranks.group)
        whole = part.new_empty((part.shape[0] * self.size, *part.shape[1:]))
        layout = self._layout(whole.shape[0])
        for rank, theirs in enumerate(parts):
            for start, stop, at in layout.chunks(rank):
                whole[start:stop] = theirs[at : at + stop - start]
        return whole.movedim(0, dim)

    def _layout(self, total: int) -> Layout:
        if total == 0 or total % (2 * self.size):
            raise ArgumentError(
                f"a sequence of {total} cannot be divided among {self.size} ranks, of which each gets two chunks of "
                "equal length.",
                hint=Hint(f"Pad it to a multiple of {2 * self.size}."),
            )
        return Layout(total // self.size, self.size, True)


@contextmanager
def context_parallel(
    mesh: Any = None, *, causal: bool | None = None, documents: Tensor | None = None, form: Form = "auto"
) -> Iterator[ContextParallel]:
    """Sigmoid attention runs among the ranks of ``mesh`` inside: each has a part of the sequence, and all keys count.

    >>> with sigswap.context_parallel(mesh["cp"]) as context:
    ...     part, positions = context.shard(ids), context.positions(ids.shape[1])
    ...     logits = model(part, torch.ones_like(part), positions).logits  # ids, attention_mask, position_ids
    ...     loss = F.cross_entropy(logits.flatten(0, 1), context.shard(next_ids).flatten())
    ...     loss.backward()

    (The mask of ones is for transformers, which else may take positions with a jump for two documents.)

    All of a model but its attention acts on each position for itself, and runs on the part. Results are this rank's
    part of what one process computes, to rounding; gradients of parameters are those of the part, to be added up over
    the ranks as those of data parallelism are (by DDP or FSDP2 on a mesh that has these ranks, too). A sequence is cut
    into 2n chunks for n ranks, of which rank r has the chunks r and 2n - 1 - r, so that a causal mask is the same work
    for all. In gradient checkpoints forwards run again in the backward pass, so that is to be inside, too.

    It is for attention that calls ``scaled_dot_product_attention`` in converted models, and for
    :func:`sigswap.sigmoid_attention`: with grouped heads, row biases, windows, soft caps, row caps. Dropout, mask
    tensors, a cache, and models that compute their scores themselves are errors, before anything is sent.

    Args:
        mesh: A one-dimensional DeviceMesh or a process group; None: all ranks.
        causal: True: every attention is causal, and bool masks that a model makes of its part are left out. None:
            masks are as the calls say, and mask tensors are an error.
        documents: Integers [B, N] (or [N], for all rows), of the whole sequence and the same on all ranks: positions
            that follow one another with the same number see one another only. Negative: padding, that is not seen.
        form: "ring": keys and values go round, and the next ones are under way while those here are used.
            "all_to_all": heads are exchanged for positions, before and after the attention; the ranks have to divide
            the key heads. "auto": all_to_all where that is so and a rank has fewer than 4,096 rows (times query heads
            per key head), for which a round of the ring is too short to hide what it sends; else ring.

    Yields:
        What divides sequences, and brings them together.

    Raises:
        ArgumentError: an argument is not as above.
        ContextParallelError: it is on already.
    """
    if form not in FORMS:
        raise ArgumentError(f"form must be one of {', '.join(map(repr, FORMS))}, not {form!r}.", argument="form")
    ranks = SequenceGroup(_group(mesh))
    segments = None if documents is None else _segments(documents)
    total = None if documents is None else documents.shape[-1]
    attention = SequenceAttention(ranks, form=form, causal=causal, documents=segments, total=total)
    with Transaction() as undo, undo:
        thread_state(undo.on_failure)
        with activated(attention), _Softmax():
            yield ContextParallel(ranks)


class _Softmax(TorchFunctionMode):
    """Refuses attention that is not converted, which would take a part of the keys for all of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE:
            refuse_parts(f"softmax attention ({func.__name__} of what is not converted)")
        return func(*args, **kwargs) if kwargs else func(*args)


def _group(mesh: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            "{argument} has no process group: torch.distributed is not initialised.",
            argument="mesh",
            hint=Hint("Start the processes by torchrun, and call torch.distributed.init_process_group()."),
        )
    if mesh is None:
        return dist.group.WORLD
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if hasattr(mesh, "get_group"):
        if mesh.ndim != 1:
            raise ArgumentError(
                f"{{argument}} must have one dimension, not {mesh.ndim}: {mesh}.",
                argument="mesh",
                hint=Hint("Take one of its dimensions: mesh['cp']."),
            )
        return mesh.get_group()
    raise ArgumentError(
        f"{{argument}} must be a DeviceMesh, a process group or None, not a {type(mesh).__name__}.", argument="mesh"
    )


def _segments(documents: Tensor) -> tuple[tuple[Segment, ...], ...]:
    """By row; one entry if all rows have the same."""
    if documents.dim() not in (1, 2) or documents.is_floating_point() or documents.is_complex():
        raise ArgumentError(
            f"{{argument}} must be integers [B, N] or [N], not {documents.dtype} {list(documents.shape)}.",
            argument="documents",
        )
    rows = documents.cpu().long().reshape(-1, documents.shape[-1])
    found = tuple(tuple(_runs(row)) for row in rows)
    return found[:1] if len(set(found)) == 1 else found


def _runs(row: Tensor) -> Iterator[Segment]:
    values, lengths = torch.unique_consecutive(row, return_counts=True)
    start = 0
    for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
        if value >= 0:
            yield Segment(start, start + length)
        start += length
