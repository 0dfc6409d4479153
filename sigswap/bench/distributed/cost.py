"""What a step costs on more GPUs than were measured: bytes, flops and latency, and from these a time.

The bytes are exact, and equal to what :class:`sigswap.bench.distributed.traffic.Traffic` counts. The times are an
estimate: each exchange takes its bytes over a link's speed and a latency, each block of attention its flops over the
speed of the kernels, and what does not fit under the other one is exposed.

>>> print(table(predictions()))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sigswap.sequence.attention import SHORT


class Bytes(NamedTuple):
    """Sent by a rank to other ones, the mean over the ranks."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class Attention:
    """One causal attention over ``tokens`` on ``ranks``; ``element``: bytes of a number of query, key and value."""

    tokens: int
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int = 2
    batch: int = 1

    @property
    def rows(self) -> float:
        """Of a rank, in the whole batch."""
        return self.batch * self.tokens / self.ranks

    @property
    def block(self) -> float:
        """Bytes of a rank's keys and values."""
        return self.rows * self.kv_heads * 2 * self.head_dim * self.element

    @property
    def forward_flops(self) -> float:
        """Of a rank: two products of the visible half of the scores."""
        return 2 * self.rows * self.tokens * self.heads * self.head_dim

    @property
    def form(self) -> str:
        """Which one ``context_parallel`` takes."""
        short = self.tokens / self.ranks * self.heads / self.kv_heads < SHORT
        return "all_to_all" if short and self.kv_heads % self.ranks == 0 else "ring"

    def ring(self) -> Bytes:
        """Of a rank's two chunks the later one is sent to those ranks only that see it: half of them. The backward
        sends as much again, and its gradients."""
        forward = 0.75 * (self.ranks - 1) * self.block
        return Bytes(forward, 2 * forward)

    def all_to_all(self) -> Bytes:
        """Query, key, value and output; in the backward their gradients."""
        all_heads = self.rows * 2 * (self.heads + self.kv_heads) * self.head_dim * self.element
        sent = all_heads * (self.ranks - 1) / self.ranks
        return Bytes(sent, sent)

    def softmax_ring(self) -> Bytes:
        """PyTorch's: all keys and values, in the backward again; and their gradients in float32, all round."""
        forward = (self.ranks - 1) * self.block
        return Bytes(forward, forward + self.ranks * self.block * 4 / self.element)

    def sent(self) -> Bytes:
        """In the form that is taken."""
        return self.ring() if self.form == "ring" else self.all_to_all()


def fsdp_bytes(in_layers: int, in_root: int, ranks: int, element: int = 2) -> Bytes:
    """Of a step of FSDP2 with so many parameters in layers that are sharded by themselves, and in the root, which keeps
    its own between forward and backward. Gradients are reduced in the parameters' dtype."""
    part = element * (ranks - 1) / ranks
    return Bytes(part * (in_layers + in_root), part * (2 * in_layers + in_root))


def tensor_bytes(tokens: int, hidden: int, layers: int, ranks: int, element: int = 2) -> Bytes:
    """Of a step of tensor parallelism by ``parallelize_module`` with a plan for each projection: an all-reduce of the
    activations behind each of a layer's two projections by rows, and of the gradient before each of its five by
    columns."""
    part = layers * 2 * tokens * hidden * element * (ranks - 1) / ranks
    return Bytes(2 * part, 5 * part)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speeds that are reached, not nominal ones: on two H200s of one node, but for ``far`` and ``latency``.

    Attributes:
        forward, backward: Flop/s of the attention kernels.
        near, far: Bytes/s that a GPU sends within a node, and to others.
        latency: Seconds of an exchange.
        per_node: GPUs of a node.
    """

    forward: float = 700e12
    backward: float = 600e12
    near: float = 150e9
    far: float = 45e9
    latency: float = 20e-6
    per_node: int = 8

    def exchange(self, sent: float, ranks: int) -> float:
        """Seconds of an exchange in which the rank that sends most sends so many bytes."""
        return self.latency + sent / (self.near if ranks <= self.per_node else self.far)


class Prediction(NamedTuple):
    """Seconds, of one attention, forward and backward; ``exposed``: of communication that nothing hides."""

    attention: Attention
    compute: float
    exposed: float

    @property
    def share(self) -> float:
        """Of the time, that is exposed."""
        return self.exposed / (self.compute + self.exposed)


def predict(attention: Attention, machine: Machine) -> Prediction:
    ranks, flops = attention.ranks, attention.forward_flops
    forward, backward = flops / machine.forward, 2.5 * flops / machine.backward
    if ranks == 1:
        return Prediction(attention, forward + backward, 0.0)
    if attention.form == "all_to_all":
        # Query, key and value go in three exchanges, the output in a fourth.
        latency = 3 * machine.latency
        exposed = sum(latency + machine.exchange(sent, ranks) for sent in attention.all_to_all())
        return Prediction(attention, forward + backward, exposed)
    # In each round some rank sends both of its chunks. The first block is computed while the second one is under way.
    keys = machine.exchange(attention.block, ranks)
    both = machine.exchange(2 * attention.block, ranks)
    exposed = (ranks - 1) * (max(0.0, keys - forward / ranks) + max(0.0, both - backward / ranks))
    return Prediction(attention, forward + backward, exposed + keys)  # the last gradients come after all else


def predictions(
    gpus: Iterable[int] = (8, 64, 1024),
    tokens: Iterable[int] = (8192, 131072, 2**20),
    machine: Machine = Machine(),
) -> Iterator[Prediction]:
    """Of an attention with 32 heads over 8 of width 128 in bfloat16, one sequence."""
    gpus = list(gpus)
    for length in tokens:
        for ranks in gpus:
            yield predict(Attention(length, ranks, 32, 8, 128), machine)


def table(found: Iterable[Prediction]) -> str:
    """In Markdown."""
    lines = [
        "| tokens | GPUs | form | sent MiB | softmax's ring | computing, ms | exposed, ms | exposed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        attention = each.attention
        sent, softmax = attention.sent().both / 2**20, attention.softmax_ring().both / 2**20
        lines.append(
            f"| {attention.tokens:,} | {attention.ranks:,} | {attention.form} | {sent:,.1f} | {softmax:,.1f} "
            f"| {1e3 * each.compute:.3f} | {1e3 * each.exposed:.3f} | {each.share:.0%} |"
        )
    return "\n".join(lines)
