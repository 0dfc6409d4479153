"""What the passes talk about: an attention that was found in a graph, one that was lowered, a softmax left alone."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch.fx import Node


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """Where the heads are in a tensor: ``axis`` holds ``heads``, or, if ``merged``, those and the batch or the rows.

    Merged heads are the inner ones (batch*heads), or, if ``outer``, the outermost (heads*batch). ``axis`` counts from
    0; None: one head and no axis for it.
    """

    axis: int | None
    heads: int
    merged: bool = False
    outer: bool = False

    def at(self, axis: int) -> HeadLayout:
        """The same heads on another axis, of a tensor that the axis was followed to."""
        return dataclasses.replace(self, axis=axis)


ONE_HEAD = HeadLayout(None, 1)


@dataclasses.dataclass(frozen=True)
class Factor:
    """The query or the key of a product: its tensor, ``position`` among the two factors, and axis of head_dim.

    ``scale``: the number by which it was multiplied before the product.
    """

    node: Node
    position: int
    dim_axis: int
    head: HeadLayout
    scale: float


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of query and key.

    ``key_axis``: of the product. ``path``: the nodes through which it flows, from after it to the softmax's scores.
    ``row_order``: the axes of the query without head_dim, in the order in which they reshape to the scores without
    their key axis; None: in none.
    """

    node: Node
    path: tuple[Node, ...]
    key_axis: int
    query: Factor
    key: Factor
    head_dim: int
    row_order: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One softmax attention.

    ``anchor`` is the softmax (or log_softmax), or the function of query, key and value that holds it
    (scaled_dot_product_attention, flex_attention: "sdpa"); ``key_axis``, ``row_axis``
    (None: not known) and ``head`` are axes of the scores (of a softmax) or of the query (of a
    scaled_dot_product_attention).
    ``products`` are the q.k products whose sum the scores are (empty for scaled_dot_product_attention).
    ``output`` is the product with the value, ``weights_path`` what the probabilities flow through on the way to it.
    ``shifts`` are reductions of rows (a maximum, say) that are subtracted from the scores and used for nothing else: a
    softmax ignores that, a sigmoid does not, so they have to be zeros.
    ``exponential``: the exp of a softmax by hand, ``exp(scores) / exp(scores).sum(-1)``, whose division the anchor is,
    or of ``exp(scores - scores.logsumexp(-1))``, where it is the anchor itself;
    ``weighted``: in between its numbers are multiplied, or some of them hidden. ``inverse``: the reciprocal of the sum,
    if the anchor multiplies by it instead of dividing.
    ``extra``: how many logits stand before and behind those of the keys, and have no value (attention sinks).
    """

    kind: Literal["softmax", "sdpa"]
    anchor: Node
    output: Node
    products: tuple[Product, ...]
    key_axis: int
    row_axis: int | None
    head: HeadLayout
    head_dim: int | None
    key_heads: int | None
    mask: str
    scale: float | None = None
    softcap: bool = False
    dropout: bool = False
    weights_path: tuple[Node, ...] = ()
    shifts: tuple[Node, ...] = ()
    exponential: Node | None = None
    weighted: bool = False
    inverse: Node | None = None
    extra: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A softmax that is not swapped. ``attention``: it is one, but of a form that cannot be swapped."""

    anchor: Node
    reason: str
    attention: bool


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A site that is now one call of the op: ``node``, in the Dynamo graph, and its operands in words."""

    node: Node
    operands: str


@dataclasses.dataclass(frozen=True)
class FindResult:
    """What the find pass saw in a graph, in the graph's order."""

    sites: tuple[AttentionSite, ...]
    left_alone: tuple[LeftAlone, ...]
