"""Sigmoid attention over a sequence of which each rank has a part: what is checked and prepared, and in which form it
runs: as a ring (:mod:`sigswap.sequence.ring`) or with the heads travelling (:mod:`sigswap.sequence.all_to_all`)."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sigswap.errors import ArgumentError, ContextParallelError, Hint, SigswapError
from sigswap.kernels.host.problem import Options
from sigswap.kernels.op.checks import check_attention
from sigswap.kernels.op.first_token import bias_of_first
from sigswap.sequence.all_to_all import differentiated_once, to_heads, to_sequence
from sigswap.sequence.exchange import SequenceGroup
from sigswap.sequence.first_keys import Routes, first_keys, routes
from sigswap.sequence.inputs import Inputs
from sigswap.sequence.layout import Band, Chunk, Layout, Segment, Segments, calls_of, range_of
from sigswap.sequence.ring import Problem, Rounds, ring_attention

Form = Literal["auto", "ring", "all_to_all"]
FORMS: tuple[Form, ...] = ("auto", "ring", "all_to_all")

SHORT = 4096
"""With fewer rows on a rank, times query heads per key head, a ring's rounds are too short to hide what they send."""


class _Places(NamedTuple):
    """Of each position of a part: ``counts`` [B|1, 1, M, 1], the keys that it sees; ``segment`` [B|1, M], the number of
    its segment among those of its row of the batch; ``first`` [B|1, M], the position of the first key that it sees."""

    counts: Tensor
    segment: Tensor
    first: Tensor


class SequenceAttention:
    """Attention among ``ranks``, each with its part of the sequence.

    Args:
        ranks: In the order of their parts.
        balanced: As :class:`sigswap.sequence.layout.Layout` has it.
        form: "auto": with the heads travelling where the ranks divide the key heads and a part is shorter than
            ``SHORT``, else as a ring.
        causal: Each attention is causal, and the masks that it gets are left out; None: as the calls say.
        documents: The segments of the sequence, by row of the batch; None: it is one. ``total``: its length then.
        agreed: It is known that all ranks come to the same attentions.
    """

    def __init__(
        self,
        ranks: SequenceGroup,
        *,
        balanced: bool = True,
        form: Form = "auto",
        causal: bool | None = None,
        documents: Segments | None = None,
        total: int | None = None,
        agreed: bool = False,
    ) -> None:
        self.ranks, self.balanced, self.form, self.causal = ranks, balanced, form, causal
        self.documents, self.total = documents, total
        self._places: dict[tuple[Layout, Band, bool, torch.device], _Places] = {}
        self._routes: dict[tuple[Layout, Band, int, torch.device], Routes] = {}
        self._agreed = agreed
        self.as_written = _outside_compiled_code()  # for it waits for other ranks

    def __call__(self, inputs: Inputs, options: Options) -> Tensor:
        """[B, H, M, Dv]. Raises ArgumentError or ContextParallelError before anything is sent."""
        out: Tensor = self.as_written(self._run, inputs, options)
        return out

    def _run(self, inputs: Inputs, options: Options) -> Tensor:
        with torch._C.DisableTorchFunction():
            problem, layout = None, Layout(0, 1, False)
            try:
                inputs, options = self._checked(inputs, options)
                layout = self._layout(inputs)
            except SigswapError as error:
                problem = error
            self._agree(inputs, options, problem)
            if problem is not None:
                raise problem
            if self._form(inputs, layout) == "all_to_all":
                return self._all_to_all(inputs, options, layout)
            return self._ring(inputs, options, layout)

    def _checked(self, inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        if self.causal:
            if inputs.attn_mask is not None and inputs.attn_mask.is_floating_point():
                raise ContextParallelError(
                    "an attention has a mask tensor that is added to its scores; causal=True leaves out bool ones only."
                )
            inputs = inputs._replace(attn_mask=None)
            options = options._replace(is_causal=True)
        if inputs.attn_mask is not None:
            raise ContextParallelError(
                "an attention has a mask tensor, which under context parallelism has columns for some keys only.",
                hint=Hint(
                    "A model of transformers makes none if its attention_mask is all ones. Pass {causal} to "
                    "sigswap.context_parallel if all attentions are causal, and {documents} for padding and packed "
                    "documents.",
                    {"causal": "True", "documents": ""},
                ),
            )
        if options.dropout_p > 0.0:
            raise ArgumentError(f"dropout_p must be 0 under context parallelism, not {options.dropout_p}.")
        query = inputs.query
        if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(query.device.type)
            inputs = inputs._replace(query=query.to(dtype), key=inputs.key.to(dtype), value=inputs.value.to(dtype))
        check_attention(*inputs[:5], None, options)
        query, key = inputs.query, inputs.key
        if key.shape[2] != query.shape[2]:
            raise ArgumentError(
                f"query has {query.shape[2]} positions and key {key.shape[2]}: under context parallelism both are a "
                "rank's part of the same sequence, without a cache."
            )
        if self.form == "all_to_all" and key.shape[1] % self.ranks.size:
            raise ContextParallelError(
                f"its {key.shape[1]} key heads cannot be divided evenly among {self.ranks.size} ranks.",
                hint=Hint("Use {form}.", {"form": "'ring'"}),
            )
        return inputs, options

    def _layout(self, inputs: Inputs) -> Layout:
        length = inputs.query.shape[2]
        if self.balanced and length % 2:
            raise ArgumentError(
                f"query has {length} positions, which must be even: under context parallelism each rank has two "
                "chunks of equal length (ContextParallel.shard makes them)."
            )
        layout = Layout(length, self.ranks.size, self.balanced)
        if self.documents is not None:
            if layout.total != self.total:
                raise ArgumentError(f"the ranks' parts are {layout.total} positions together, documents {self.total}.")
            if len(self.documents) not in (1, inputs.query.shape[0]):
                raise ArgumentError(f"documents has {len(self.documents)} rows, query {inputs.query.shape[0]}.")
        return layout

    def _agree(self, inputs: Inputs, options: Options, problem: SigswapError | None) -> None:
        """Raises ContextParallelError unless all ranks have come to the same first attention, and with the same
        ``problem``, if there is one. Waits for them, once."""
        if self._agreed:
            return
        mine = {
            name: repr(None if tensor is None else (list(tensor.shape), tensor.dtype, tensor.requires_grad))
            for name, tensor in inputs._asdict().items()
        }
        mine |= {name: repr(value) for name, value in options._asdict().items()}
        mine |= {name: repr(getattr(self, name)) for name in ("balanced", "form", "causal", "documents")}
        mine["error"] = "" if problem is None else str(problem)
        number = torch.tensor([zlib.crc32(repr(mine).encode())], device=inputs.query.device)
        numbers = [torch.empty_like(number) for _ in range(self.ranks.size)]
        dist.all_gather(numbers, number, group=self.ranks.group)
        if len(set(torch.cat(numbers).tolist())) > 1:
            plans: list[Any] = [None] * self.ranks.size
            dist.all_gather_object(plans, mine, group=self.ranks.group)
            if problem is None:
                self._refuse(plans)
        self._agreed = problem is None

    def _refuse(self, plans: Sequence[dict[str, str]]) -> None:
        own = plans[self.ranks.rank]
        rank = next((rank for rank, other in enumerate(plans) if other["error"]), None)
        if rank is not None:
            raise ContextParallelError(f"rank {rank} of the group refuses its first attention: {plans[rank]['error']}")
        rank = next(rank for rank, other in enumerate(plans) if other != own)
        differing = [f"{name} {value}, here {own[name]}" for name, value in plans[rank].items() if value != own[name]]
        raise ContextParallelError(
            f"rank {rank} of the group comes to another first attention than rank {self.ranks.rank}: "
            f"{'; '.join(differing)}.",
            hint=Hint("Run the same model on all ranks, on parts of equal length, with the same arguments."),
        )

    def _form(self, inputs: Inputs, layout: Layout) -> Form:
        if self.form != "auto":
            return self.form
        heads, key_heads = inputs.query.shape[1], inputs.key.shape[1]
        short = layout.length * heads // key_heads < SHORT
        return "all_to_all" if short and key_heads % self.ranks.size == 0 else "ring"

    def _ring(self, inputs: Inputs, options: Options, layout: Layout) -> Tensor:
        band, segments = _band(options), self._segments(layout)
        bias, const_bias = self._row_bias(inputs, options, layout, whole=False)
        rounds = _rounds(layout, self.ranks.rank, band, segments)
        plain = _plain(options, const_bias)
        problem = Problem(self.ranks, rounds, plain, options.row_cap)
        return ring_attention(inputs.query, inputs.key, inputs.value, bias, problem)

    def _all_to_all(self, inputs: Inputs, options: Options, layout: Layout) -> Tensor:
        """One call on all positions, and no round but the first."""
        ranks = self.ranks
        query, key, value = (to_heads(each, ranks, layout) for each in inputs[:3])
        inputs = inputs._replace(query=query, key=key, value=value)
        bias, share, rest = (self._of_own_heads(term, layout) for term in (inputs.bias, inputs.share, inputs.rest))
        inputs = inputs._replace(bias=bias, share=share, rest=rest)
        row_bias, const_bias = self._row_bias(inputs, options, layout, whole=True)
        whole = Chunk(0, layout.total, 0)
        calls = calls_of([whole], [whole], _band(options), self._segments(layout))
        rounds = Rounds([calls], [slice(0, 0)])
        problem = Problem(Alone(), rounds, _plain(options, const_bias), options.row_cap)
        return to_sequence(ring_attention(query, key, value, row_bias, problem), ranks, layout)

    def _of_own_heads(self, term: Tensor | None, layout: Layout) -> Tensor | None:
        """A term of the row bias [B|1, H|1, M|1, 1] for the heads and the positions that this rank computes."""
        if term is None:
            return None
        ranks = self.ranks
        if term.shape[2] > 1:
            heads = term.shape[1] if term.shape[1] > 1 else ranks.size
            moved = to_heads(term.expand(-1, heads, -1, -1).contiguous(), ranks, layout)
            return moved if term.shape[1] > 1 else moved[:, :1]
        own = term.shape[1] // ranks.size
        return term[:, ranks.rank * own : (ranks.rank + 1) * own] if term.shape[1] > 1 else term

    def _segments(self, layout: Layout) -> Segments:
        return ((Segment(0, layout.total),),) if self.documents is None else self.documents

    def _row_bias(
        self, inputs: Inputs, options: Options, layout: Layout, *, whole: bool
    ) -> tuple[Tensor | None, float]:
        """The row bias, but for a number that all rows have, and that number. ``whole``: of all positions."""
        band, wide = _band(options), torch.promote_types(inputs.query.dtype, torch.float32)
        if inputs.share is not None:
            places = self._known_places(layout, band, whole, inputs.query.device)
            picked = self._first_keys(inputs, layout, band, places, whole)
            first = _scores(inputs.query, picked, options)
            bias = bias_of_first(
                first, places.counts, inputs.share, inputs.rest, options.const_bias, options.visible_bias
            )
            return bias if inputs.bias is None else bias + inputs.bias, 0.0
        if not options.visible_bias:
            return inputs.bias, options.const_bias
        if band == Band(None, None) and self.documents is None:
            return inputs.bias, options.const_bias - math.log(layout.total)
        places = self._known_places(layout, band, whole, inputs.query.device)
        counted = -places.counts.to(wide).log()
        return counted if inputs.bias is None else counted + inputs.bias, options.const_bias

    def _known_places(self, layout: Layout, band: Band, whole: bool, device: torch.device) -> _Places:
        known = self._places.get((layout, band, whole, device))
        if known is None:
            chunks = (Chunk(0, layout.total, 0),) if whole else layout.chunks(self.ranks.rank)
            with torch.inference_mode(False):  # they are kept, and a training step saves them for its backward
                known = self._places[layout, band, whole, device] = _places(
                    chunks, band, self._segments(layout), layout.total, device
                )
        return known

    def _first_keys(self, inputs: Inputs, layout: Layout, band: Band, places: _Places, whole: bool) -> Tensor:
        """The first key that each row sees, [B, Hk, M or 1, D]."""
        key = inputs.key
        if band.left is not None and whole:
            at = places.first[:, None, :, None].expand(*key.shape[:2], -1, key.shape[3])
            return key.gather(2, at)
        if band.left is not None:
            return first_keys(key, self.ranks, self._known_routes(layout, band, key))
        segments = self._segments(layout)
        batch, key_heads = key.shape[:2]
        most = max((len(each) for each in segments), default=0)
        chunks = (Chunk(0, layout.total, 0),) if whole else layout.chunks(self.ranks.rank)
        index = torch.full((len(segments), max(1, most)), -1, dtype=torch.long)
        for row, each in enumerate(segments):
            for number, segment in enumerate(each):
                for chunk in chunks:
                    if chunk.start <= segment.start < chunk.stop:
                        index[row, number] = chunk.at + segment.start - chunk.start
        index = index.to(key.device)[:, None, :, None].expand(batch, key_heads, -1, key.shape[3])
        firsts = key.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0.0)
        if not whole:
            firsts = _Shared.apply(firsts, self.ranks)
        at = places.segment[:, None, :, None].expand(batch, key_heads, -1, key.shape[3])
        return firsts.gather(2, at) if firsts.shape[2] > 1 else firsts

    def _known_routes(self, layout: Layout, band: Band, key: Tensor) -> Routes:
        known = self._routes.get((layout, band, key.shape[0], key.device))
        if known is None:
            cpu = torch.device("cpu")
            each = [layout.chunks(rank) for rank in range(layout.ranks)]
            firsts = [_places(chunks, band, self._segments(layout), layout.total, cpu).first for chunks in each]
            known = routes(firsts, layout, self.ranks.rank, key.shape[0], key.device)
            self._routes[layout, band, key.shape[0], key.device] = known
        return known


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@functools.cache
def _outside_compiled_code() -> Callable[..., Any]:
    """Calls a function as it is written. Made on use, for it imports Dynamo."""
    made: Callable[..., Any] = torch.compiler.disable(_called)  # type: ignore[no-untyped-call]
    return made


def _scores(query: Tensor, keys: Tensor, options: Options) -> Tensor:
    """Of each row of ``query`` [B, H, M, D] on its own of the ``keys`` [B, Hk, M or 1, D], [B, H, M, 1]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(query.shape[0], keys.shape[1], -1, *query.shape[2:]).to(wide)
    score = (grouped * keys.unsqueeze(2).to(wide)).sum(-1, keepdim=True).flatten(1, 2) * options.scale
    return options.softcap * torch.tanh(score / options.softcap) if options.softcap > 0.0 else score


class Alone(SequenceGroup):
    """This rank by itself, with nobody to send to."""

    def __init__(self) -> None:
        self.size, self.rank = 1, 0


class _Shared(torch.autograd.Function):
    """A tensor of which each rank has a part, and 0 elsewhere, whole on each of them."""

    @staticmethod
    def forward(ctx: object, part: Tensor, ranks: SequenceGroup) -> Tensor:
        ctx.ranks = ranks  # type: ignore[attr-defined]
        whole = part.contiguous().clone()
        ranks.sum(whole)
        return whole

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        ranks: SequenceGroup = ctx.ranks  # type: ignore[attr-defined]
        whole = grad.detach().contiguous().clone()
        ranks.sum(whole)
        return differentiated_once(whole, grad), None


def _band(options: Options) -> Band:
    left = options.window_left if options.window_left >= 0 else None
    right = 0 if options.is_causal else options.window_right if options.window_right >= 0 else None
    return Band(left, right)


def _plain(options: Options, const_bias: float) -> Options:
    """The options of one block, whose mask is its own, and whose row bias is given."""
    return Options(scale=options.scale, const_bias=const_bias, visible_bias=False, softcap=options.softcap)


@functools.lru_cache(64)
def _rounds(layout: Layout, rank: int, band: Band, segments: Segments) -> Rounds:
    ranks, own = layout.ranks, layout.chunks(rank)
    computed = [calls_of(own, layout.chunks((rank - number) % ranks), band, segments) for number in range(ranks)]
    sent = [range_of(calls_of(layout.chunks((rank + number) % ranks), own, band, segments)) for number in range(ranks)]
    return Rounds(computed, sent)


def _places(chunks: Sequence[Chunk], band: Band, segments: Segments, total: int, device: torch.device) -> _Places:
    positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
    starts, stops, numbers = [], [], []
    for each in segments:
        first = torch.tensor([segment.start for segment in each], dtype=torch.long)
        last = torch.tensor([segment.stop for segment in each], dtype=torch.long)
        number = (torch.searchsorted(first, positions, right=True) - 1).clamp(min=0)
        if len(each) == 0:
            first = last = torch.zeros(1, dtype=torch.long)
        starts.append(first[number])
        stops.append(last[number])
        numbers.append(number)
    low, high = torch.stack(starts), torch.stack(stops)
    outside = (positions < low) | (positions >= high)
    if band.left is not None:
        low = torch.maximum(low, positions - band.left)
    if band.right is not None:
        high = torch.minimum(high, positions + band.right + 1)
    count = (high - low).masked_fill(outside, 1).clamp(min=1)
    first = low.clamp(min=0, max=max(0, total - 1))
    return _Places(count[:, None, :, None].to(device), torch.stack(numbers).to(device), first.to(device))
