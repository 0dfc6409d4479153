"""Ring attention: keys and values go from rank to rank, query and output stay.

In round t each rank sends its own keys and values to the rank t places on, and has those of the rank t places back,
whose part of the output it computes while the next round's are under way. The parts add, for no row is normalised:
there is no maximum and no logsumexp to carry along, and the order does not matter.

Of a rank's keys only those are sent that the receiver's rows see: under a causal mask, with balanced chunks, three
quarters of all. The backward recomputes the probabilities, so keys and values go round once more; the gradients of a
block go back to its owner at once, in its dtype, and are added up there.

What a row cap divides by is a sum over keys, too, and divides at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigswap.kernels import dispatch, reference
from sigswap.kernels.host.problem import Options
from sigswap.sequence.exchange import Pending, SequenceGroup
from sigswap.sequence.layout import Call, range_of

_KEYS, _GRADIENTS = 0, 1  # kinds of messages


class Rounds(NamedTuple):
    """``computed[t]``: the calls of this rank's rows on the keys that it has in round t. ``sent[t]``: of its own keys
    those that the rank needs which gets them for round t."""

    computed: Sequence[Sequence[Call]]
    sent: Sequence[slice]


class Problem(NamedTuple):
    """``options``: of the op, for one call of a block; their masks are the blocks'. ``row_cap``: 0: none."""

    ranks: SequenceGroup
    rounds: Rounds
    options: Options
    row_cap: float


def ring_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """Attention of this rank's rows to the keys of all ranks. Has gradients.

    Args:
        query: [B, H, M, D], this rank's part, as all of these.
        key: [B, Hk, N, D].
        value: [B, Hk, N, Dv].
        bias: The whole row bias but for ``options.const_bias``, as the op takes it; has a gradient.
        problem: The same on all ranks, each with its own rounds.

    Returns:
        [B, H, M, Dv], of query's dtype.
    """
    out: Tensor = _Ring.apply(query, key, value, bias, problem)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        own = _along_sequence(key), _along_sequence(value)
        capped = problem.row_cap > 0.0
        blocks = sum(map(len, problem.rounds.computed))
        shape = (*query.shape[:3], value.shape[3])
        out = _Sum(shape, query, blocks if not capped else max(3, blocks))  # what is divided is not rounded before
        sums = _Sum((*query.shape[:3], 1), query, blocks)
        for calls, (keys, values), at in _visits(problem, own):
            for call in calls:
                inputs = _inputs(call, at, query, keys, values, bias)
                options = _options(call, problem.options)._asdict()
                if capped:
                    part, of_rows = torch.ops.sigswap.sigmoid_attention_sums.default(*inputs, None, None, **options)
                    sums.add(of_rows, call.batch, call.rows)
                else:
                    part = torch.ops.sigswap.sigmoid_attention.default(*inputs, None, None, **options)
                out.add(part, call.batch, call.rows)
        ctx.problem = problem
        if not capped:
            ctx.save_for_backward(query, key, value, bias)
            return out.total()
        row_sums = sums.total(of_sums=True)
        whole = out.total(divided_by=row_sums.clamp(min=problem.row_cap))
        ctx.save_for_backward(query, key, value, bias, whole, row_sums)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        problem: Problem = ctx.problem
        query, key, value, bias, *of_rows = ctx.saved_tensors
        ranks, rounds = problem.ranks, problem.rounds
        row_delta = None
        if of_rows:
            implementation = dispatch if grad.is_cuda else reference
            grad, row_delta = implementation.undivided(grad, *of_rows, problem.row_cap)
        needed = [*ctx.needs_input_grad[:4], False]
        of_keys = needed[1], needed[2]
        own = _along_sequence(key), _along_sequence(value)
        options = problem.options._replace(row_cap=problem.row_cap)
        blocks = sum(map(len, rounds.computed))
        grad_query, grad_bias = _Sum(query.shape, query, blocks), None if bias is None else _BiasSum(bias, blocks)
        wanted = [(index, tensor) for index, tensor in ((0, key), (1, value)) if of_keys[index]]
        received = [where for where in rounds.sent[1:] if where.stop > where.start]
        totals = {index: _Sum(x.shape, x, len(rounds.computed[0]) + len(received)) for index, x in wanted}
        under_way: tuple[Pending, list[tuple[int, Tensor]], slice] | None = None
        for number, (calls, (keys, values), at) in enumerate(_visits(problem, own)):
            parts = (
                totals
                if number == 0
                else {index: _Sum((*x.shape[:2], at.stop - at.start, x.shape[3]), x, len(calls)) for index, x in wanted}
            )
            for call in calls:
                inputs = _inputs(call, at, query, keys, values, bias)
                found = torch.ops.sigswap.sigmoid_attention_backward.default(
                    _part(grad, call.batch, call.rows),
                    *inputs,
                    None,
                    None,
                    needed,
                    None if row_delta is None else _part(row_delta, call.batch, call.rows),
                    **_options(call, options)._asdict(),
                )
                if needed[0]:
                    grad_query.add(found[0], call.batch, call.rows)
                where = slice(call.keys.start - at.start, call.keys.stop - at.start)
                for index, total in parts.items():
                    total.add(found[1 + index], call.batch, where)
                if grad_bias is not None and needed[3]:
                    grad_bias.add(found[3], call.batch, call.rows)
            _collect(under_way, totals)
            under_way = None
            if number > 0 and wanted:
                under_way = _return_gradients(ranks, number, parts, totals, own, rounds.sent[number])
        _collect(under_way, totals)
        return (
            grad_query.total() if needed[0] else None,
            *(totals[index].total() if index in totals else None for index in (0, 1)),
            grad_bias.total() if grad_bias is not None and needed[3] else None,
            None,
        )


def _visits(problem: Problem, own: tuple[Tensor, Tensor]) -> Any:
    """Of each round: the calls, the keys and values that are here, as [B, H, N, D], and which ones these are."""
    ranks, rounds = problem.ranks, problem.rounds
    here = own[0].permute(1, 2, 0, 3), own[1].permute(1, 2, 0, 3)
    at = slice(0, own[0].shape[0])
    for number in range(ranks.size):
        coming = None
        if number + 1 < ranks.size:
            coming = _ask(ranks, number + 1, own, rounds)
        yield rounds.computed[number], here, at
        if coming is not None:
            pending, buffers, at = coming
            pending.wait()
            here = buffers[0].permute(1, 2, 0, 3), buffers[1].permute(1, 2, 0, 3)


def _ask(ranks: SequenceGroup, number: int, own: tuple[Tensor, Tensor], rounds: Rounds) -> Any:
    to, source = (ranks.rank + number) % ranks.size, (ranks.rank - number) % ranks.size
    at = range_of(rounds.computed[number])
    buffers = [x.new_empty((at.stop - at.start, *x.shape[1:])) for x in own]
    sent = [x[rounds.sent[number]] for x in own]
    return ranks.exchange(to, sent, source, buffers, 2 * number + _KEYS), buffers, at


def _return_gradients(
    ranks: SequenceGroup,
    number: int,
    parts: dict[int, _Sum],
    totals: dict[int, _Sum],
    own: tuple[Tensor, Tensor],
    where: slice,
) -> tuple[Pending, list[tuple[int, Tensor]], slice]:
    """Sends the gradients of a block to its owner, and starts to get those of this rank's own keys ``where``."""
    owner, source = (ranks.rank - number) % ranks.size, (ranks.rank + number) % ranks.size
    sent = [_along_sequence(part.total()) for part in parts.values()]
    buffers = [own[index].new_empty((where.stop - where.start, *own[index].shape[1:])) for index in totals]
    pending = ranks.exchange(owner, sent, source, buffers, 2 * number + _GRADIENTS)
    return pending, list(zip(totals, buffers, strict=True)), where


def _collect(under_way: tuple[Pending, list[tuple[int, Tensor]], slice] | None, totals: dict[int, _Sum]) -> None:
    if under_way is None:
        return
    pending, buffers, where = under_way
    pending.wait()
    if where.stop > where.start:
        for index, buffer in buffers:
            totals[index].add(buffer.permute(1, 2, 0, 3), None, where)


def _along_sequence(tensor: Tensor) -> Tensor:
    """[B, H, N, D] as contiguous [N, B, H, D], of which any range of N is contiguous, too."""
    return tensor.permute(2, 0, 1, 3).contiguous()


def _part(tensor: Tensor, batch: int | None, rows: slice) -> Tensor:
    """A block of [B|1, H|1, M|1, d]: what has size 1 is for all."""
    if batch is not None and tensor.shape[0] > 1:
        tensor = tensor[batch : batch + 1]
    return tensor[:, :, rows] if tensor.shape[2] > 1 else tensor


def _inputs(
    call: Call, at: slice, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """query, key, value and bias of a call; ``at``: which keys of their owner's are here."""
    where = slice(call.keys.start - at.start, call.keys.stop - at.start)
    one = slice(None) if call.batch is None else slice(call.batch, call.batch + 1)
    return (
        query[one, :, call.rows],
        keys[one, :, where],
        values[one, :, where],
        None if bias is None else _part(bias, call.batch, call.rows),
    )


def _options(call: Call, options: Options) -> Options:
    causal = call.right == 0
    return options._replace(is_causal=causal, window_left=call.left, window_right=-1 if causal else call.right)


class _Sum:
    """A sum of blocks of a tensor of ``shape``; ``of`` has its dtype, in which blocks come.

    Two blocks are added in that dtype, where one addition rounds once, and more in float32. The first block is the sum
    itself, if it is all of it.
    """

    def __init__(self, shape: Sequence[int], of: Tensor, blocks: int) -> None:
        self._shape, self._of, self._blocks = tuple(shape), of, blocks
        self._wide = torch.float64 if of.dtype == torch.float64 else torch.float32
        self._sum: Tensor | None = None

    def add(self, block: Tensor, batch: int | None, rows: slice) -> None:
        whole = tuple(block.shape) == self._shape
        if self._sum is None and whole:
            self._sum = block if self._blocks <= 2 else block.to(self._wide)
            return
        if self._sum is None:
            self._sum = self._zeros()
        one = slice(None) if batch is None else slice(batch, batch + 1)
        self._sum[one, :, rows] += block

    def total(self, divided_by: Tensor | None = None, of_sums: bool = False) -> Tensor:
        total = self._zeros() if self._sum is None else self._sum
        if divided_by is not None:
            total = total / divided_by
        return total if of_sums else total.to(self._of.dtype)

    def _zeros(self) -> Tensor:
        batch, heads, rows, width = self._shape
        zeros = self._of.new_zeros((batch, rows, heads, width), dtype=self._wide)
        return zeros.transpose(1, 2)


class _BiasSum:
    """The gradient of a row bias [B|1, H|1, M|1, 1]: its blocks are sums over what has the same bias already."""

    def __init__(self, bias: Tensor, blocks: int) -> None:
        self._bias = bias
        wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
        self._sum = torch.zeros(bias.shape, dtype=wide, device=bias.device)

    def add(self, block: Tensor, batch: int | None, rows: slice) -> None:
        _part(self._sum, batch, rows).add_(block)

    def total(self) -> Tensor:
        return self._sum.to(self._bias.dtype)
