"""Finds the softmax attentions in a pre-dispatch ATen graph: a walk over the data flow, no list of patterns.

From each softmax up, through scale, soft cap, casts, views, additive bias and masks, to the product of query and
key; and down, through dropout, casts and views, to the product with the value. Along the way the axis that holds
the keys is followed, so that a softmax over another axis (experts, slots, channels of a linear attention) is told
from one over the keys. A softmax for which both ends can't be shown is left alone, with the reason.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.fx

from sigswap.passes.axes import (
    ORDERED,
    RESHAPES,
    axis_map,
    chain_inputs,
    op_name,
    rank_of,
    reshape_groups,
    shape_of,
    static_int,
)
from sigswap.passes.site import AttentionSite, FindResult, HeadLayout, LeftAlone, Product

PARAMETER = "sigswap_parameter"  # node.meta key: set on the placeholders that are parameters

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "special_softmax"})
_PARAMETER_VIEWS = frozenset("permute transpose t mT numpy_T expand repeat slice select".split())
_LONGEST_WALK = 256  # ops between a product and its softmax; real models have fewer than 40
_REDUCTIONS = frozenset({"amax", "max", "logsumexp", "mean", "amin", "min", "topk", "sort", "median", "kthvalue"})
_SHIFT_STEPS = RESHAPES | frozenset(
    "detach getitem to _to_copy alias clone unsqueeze squeeze neg expand select slice".split()
)
_OPAQUE = (  # attention that runs inside one op, of which sigswap cannot change the softmax
    "flex_attention",
    "flash_attn",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "scaled_dot_product_fused",
)


def find(graph: torch.fx.Graph) -> FindResult:
    """Every softmax attention in ``graph``, and every softmax that is left alone with its reason.

    ``graph``: pre-dispatch ATen with ``meta["val"]`` on its nodes (as ``make_fx(pre_dispatch=True)`` gives), and
    ``meta[PARAMETER]`` set on placeholders that are parameters. The graph is not changed.
    """
    sites: list[AttentionSite] = []
    left: list[LeftAlone] = []
    data = data_dependent(graph)
    for node in graph.nodes:
        name = op_name(node)
        if name == "scaled_dot_product_attention":
            sites.append(_sdpa_site(node))
        elif name in _SOFTMAX:
            found = _softmax_site(node, data)
            (sites if isinstance(found, AttentionSite) else left).append(found)  # type: ignore[arg-type]
        elif any(part in name for part in _OPAQUE):
            left.append(LeftAlone(node, f"it runs inside {name}, whose softmax cannot be reached", True))
    return FindResult(tuple(sites), tuple(left))


def _sdpa_site(node: torch.fx.Node) -> AttentionSite:
    arguments = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False))
    arguments.update(node.kwargs)
    query, key = arguments["query"], arguments["key"]
    rank, query_shape, key_shape = rank_of(query), shape_of(query), shape_of(key)
    head = _factor_heads(query, rank - 1)
    if head is None:
        head = HeadLayout(rank - 3, query_shape[-3]) if query_shape and rank >= 4 else HeadLayout(None, 1)
    mask = arguments.get("attn_mask")
    if arguments.get("is_causal"):
        mask_kind = "causal"
    elif isinstance(mask, torch.fx.Node):
        mask_kind = "boolean" if mask.meta["val"].dtype == torch.bool else "additive"
    else:
        mask_kind = "none"
    scale = arguments.get("scale")
    return AttentionSite(
        kind="sdpa",
        anchor=node,
        output=node,
        products=(),
        key_axis=rank - 1,
        head=head,
        head_dim=query_shape[-1] if query_shape else None,
        key_heads=_key_heads(key, head, key_shape),
        mask=mask_kind,
        scale=scale if isinstance(scale, float) else None,
        dropout=bool(arguments.get("dropout_p")),
    )


def data_dependent(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """The nodes that depend on the model's inputs, not on its parameters alone."""
    data: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if not node.meta.get(PARAMETER):
                data.add(node)
        elif any(source in data for source in node.all_input_nodes):
            data.add(node)
    return data


def _key_heads(key: torch.fx.Node, head: HeadLayout, shape: tuple[int, ...] | None) -> int:
    """The heads of the key, before they were repeated for the query's (grouped-query attention)."""
    if head.axis is None or head.merged or shape is None or head.axis >= len(shape):
        return head.heads
    return _unrepeated(key, head.axis)


def _product_key_heads(product: Product) -> int:
    head = product.key_head
    if head.axis is None or head.merged:
        return head.heads
    key = [x for x in product.node.all_input_nodes if rank_of(x) > 1][-2:]
    return _unrepeated(key[product.key_arg], head.axis) if len(key) == 2 else head.heads


def _unrepeated(key: torch.fx.Node, axis: int) -> int:
    """The size of ``axis`` before an expand and reshape, or a repeat_interleave, repeated its heads."""
    node: torch.fx.Node = key
    while True:
        name = op_name(node)
        if name == "repeat_interleave":
            repeats = static_int(node.args[1])
            size = shape_of(node)
            return size[axis] // repeats if size and repeats else (size or (1,))[axis]
        if name in RESHAPES and isinstance(node.args[0], torch.fx.Node):
            before, after = shape_of(node.args[0]), shape_of(node)
            source = node.args[0]
            while op_name(source) in ("clone", "contiguous"):
                source = source.args[0]
            for old, new in (reshape_groups(before, after) or []) if before and after else []:
                if new == [axis] and len(old) == 2 and op_name(source) == "expand":
                    return before[old[0]]  # type: ignore[index]
        step = _source_of(node, axis)
        if step is None:
            size = shape_of(node)
            return size[axis] if size else 1
        node, axis = step


def _softmax_site(anchor: torch.fx.Node, data: set[torch.fx.Node]) -> AttentionSite | LeftAlone:
    axis = static_int(anchor.args[1] if len(anchor.args) > 1 else anchor.kwargs.get("dim"))
    return score_site(anchor, axis, data)


def score_site(anchor: torch.fx.Node, axis: int | None, data: set[torch.fx.Node]) -> AttentionSite | LeftAlone:
    """The attention whose probabilities ``anchor`` makes from its first argument, the scores, over their axis ``axis``.

    ``data``: :func:`data_dependent` of the graph.
    """
    scores = anchor.args[0]
    shape = shape_of(scores)
    if shape is None or axis is None or not shape:
        return LeftAlone(anchor, "the shape of its scores is not known", False)
    key_axis = axis % len(shape)

    origin = _trace_scores(scores, key_axis, set())
    # Keys that no input reaches are weights (a router's), unless a layer computed them from learned queries (DETR).
    # Beside a true product they are a bias that depends on the query (DeBERTa, XLNet), so they come last.
    origin.products.sort(key=lambda product: product.key not in data)
    if origin.products and not _is_computed(origin.products[0].key, data):
        return LeftAlone(anchor, "its keys do not depend on the model's input (a router or a classifier)", False)
    output = _weighted_sum(anchor, key_axis)
    if not origin.products:
        # A product of activations that is not understood, over an axis that a value is weighted over: in doubt, an
        # attention, so that it is not left without a word.
        doubtful = output is not None and _has_product_above(scores)
        return LeftAlone(anchor, origin.reason or "its scores are not a product of query and key", doubtful)
    if output is None:
        return LeftAlone(anchor, "its probabilities do not weight a value over the softmax's axis", False)
    if output.remade and origin.obstacle is None:
        origin.obstacle = (
            "its probabilities are mixed with others or normalised again before they weight the value, which would "
            "undo or bend what a sigmoid gives"
        )
    if origin.obstacle:
        return LeftAlone(anchor, origin.obstacle, True)

    head = _score_heads(origin, scores, shape, key_axis)
    products = tuple(_with_heads(traced, head) for traced in origin.products)
    return AttentionSite(
        kind="softmax",
        anchor=anchor,
        output=output.product,
        products=products,
        key_axis=key_axis,
        head=head,
        head_dim=products[0].head_dim,
        key_heads=_product_key_heads(products[0]),
        mask="+".join(sorted(origin.masks)) or "none",
        softcap=origin.softcap,
        dropout=output.dropout,
    )


_LAYERS = frozenset({"linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution", "embedding"})


def _is_computed(node: torch.fx.Node, data: set[torch.fx.Node]) -> bool:
    """Whether ``node`` depends on the model's inputs, or is what a layer makes of parameters."""
    if node in data:
        return True
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if op_name(current) in _LAYERS or op_name(current) in ("matmul", "mm", "bmm", "einsum"):
            return True
        pending += [source for source in current.all_input_nodes if source not in seen]
        seen.update(current.all_input_nodes)
    return False


def _has_product_above(node: torch.fx.Node) -> bool:
    """Whether a product of two activations goes into ``node``, with no layer in between."""
    pending, seen = [node], set()
    while pending and len(seen) < _LONGEST_WALK:
        current = pending.pop()
        name = op_name(current)
        if name in ("matmul", "mm", "bmm", "baddbmm", "einsum", "cdist", "_cdist_forward", "inner", "tensordot", "dot"):
            factors = [source for source in current.all_input_nodes if rank_of(source) > 0]
            if not any(_is_parameter(factor) for factor in factors):
                return True
        elif name not in _LAYERS and name not in _SOFTMAX:
            pending += [source for source in current.all_input_nodes if source not in seen]
            seen.update(current.all_input_nodes)
    return False


# Up: from the softmax to the product of query and key.


@dataclasses.dataclass
class _Factors:
    """A product whose output's ``key_axis`` comes from one factor; ``query_axis`` from the other, if known."""

    node: torch.fx.Node
    query: torch.fx.Node
    key: torch.fx.Node
    query_arg: int
    query_dim_axis: int
    key_dim_axis: int
    key_axis: int
    query_axis: int | None
    batch_axes: dict[int, tuple[int, int]]  # axis of the output -> (axis of the query, axis of the key)
    path: list[tuple[torch.fx.Node, torch.fx.Node]] = dataclasses.field(default_factory=list)  # (op, its input)
    query_in_order: bool = True


@dataclasses.dataclass
class _Origin:
    """Where scores come from: the products summed in them, and what was met on the way."""

    products: list[_Factors] = dataclasses.field(default_factory=list)
    masks: set[str] = dataclasses.field(default_factory=set)
    softcap: bool = False
    reason: str | None = None  # why no product was found
    obstacle: str | None = None  # why the attention cannot be swapped


def _trace_scores(node: torch.fx.Node, key_axis: int, seen: set[tuple[torch.fx.Node, int]]) -> _Origin:
    name = op_name(node)
    if (node, key_axis) in seen or len(seen) > _LONGEST_WALK:
        return _Origin(reason="its scores come from too many ops to follow")
    seen.add((node, key_axis))
    product = _product(node, key_axis)
    if isinstance(product, str):
        return _Origin(reason=product)
    origin = _Origin()
    if product is not None:
        origin.products.append(product)
        if name == "baddbmm" and node.kwargs.get("beta", 1) != 0:
            _merge_term(origin, node, node.args[0], key_axis, seen)
        return origin

    inputs = chain_inputs(node)
    if not inputs:
        origin.reason = f"its scores come from {name or node.op}, not from a product of query and key"
        return origin
    if name in ("masked_fill", "where", "masked_scatter", "index_put", "tril", "triu"):
        origin.masks.add("boolean")
    origin.softcap = name == "tanh"
    for source in inputs:
        _merge_term(origin, node, source, key_axis, seen)
    if not origin.products:
        return origin
    if name in ("sub", "subtract", "add"):
        for source in inputs:
            if _is_row_reduction(source):
                origin.obstacle = (
                    "its scores are shifted by a reduction over their own row, which a softmax ignores and a sigmoid "
                    "does not; remove the shift"
                )
    if name in ("constant_pad_nd", "pad") and shape_of(node)[key_axis] != shape_of(inputs[0])[key_axis]:  # type: ignore[index]
        origin.obstacle = "its softmax runs over the keys and padded logits"
    if name in ("cat", "concat", "concatenate"):
        axis = static_int(node.args[1]) if len(node.args) > 1 else 0
        if axis is not None and axis % rank_of(node) == key_axis and len(origin.products) < len(inputs):
            origin.obstacle = "its softmax runs over the keys and extra logits (attention sinks)"
    return origin


def _merge_term(
    origin: _Origin,
    node: torch.fx.Node,
    source: torch.fx.Node,
    key_axis: int,
    seen: set[tuple[torch.fx.Node, int]],
) -> None:
    """Adds to ``origin`` what flows from ``source`` into ``node``."""
    axes, after = axis_map(node, source), shape_of(node)
    if op_name(node) == "baddbmm":
        axes = [axis + rank_of(node) - rank_of(source) for axis in range(rank_of(source))]
    before = shape_of(source)
    additive = op_name(node) in ("add", "sub", "subtract", "baddbmm")
    source_axis = axes.index(key_axis) if axes is not None and key_axis in axes else None
    if source_axis is None or before is None or after is None or (before[source_axis] == 1 != after[key_axis]):
        if additive:
            origin.masks.add("additive")
        elif origin.reason is None and source_axis is None:
            origin.reason = f"the softmax's axis cannot be followed through {op_name(node)}"
        return
    term = _trace_scores(source, source_axis, seen)
    if op_name(node) in ("linear", "conv2d", "convolution"):
        term.products = [product for product in term.products if _mixes_heads(product, node, source)]
    for product in term.products:
        product.path.append((node, source))
    if term.products:
        origin.masks |= term.masks
    elif additive:
        origin.masks.add("additive")
    origin.products += term.products
    origin.softcap |= term.softcap
    origin.obstacle = origin.obstacle or term.obstacle
    origin.reason = origin.reason or term.reason


def _mixes_heads(product: _Factors, node: torch.fx.Node, source: torch.fx.Node) -> bool:
    """Whether a linear layer on the scores mixes heads ("talking heads"), and not queries or channels."""
    mixed = rank_of(source) - 1 if op_name(node) == "linear" else 1
    return any(_follow(product.path, axis) == mixed for axis in product.batch_axes)


def _is_row_reduction(node: torch.fx.Node) -> bool:
    while op_name(node) in _SHIFT_STEPS and isinstance(node.args[0], torch.fx.Node):
        node = node.args[0]
    return op_name(node) in _REDUCTIONS


def _product(node: torch.fx.Node, key_axis: int) -> _Factors | str | None:
    """``node`` as a product whose ``key_axis`` comes from the key; a reason if it is a product but not that one."""
    name = op_name(node)
    if name in ("matmul", "mm", "bmm", "baddbmm", "linear"):
        first, second = node.args[1:3] if name == "baddbmm" else node.args[:2]
        found = _matrix_product(node, first, second, key_axis, transposed=name == "linear")
    elif name == "einsum":
        found = _einsum_product(node, key_axis)
    elif name == "sum":
        found = _summed_product(node, key_axis)
    else:
        return None
    if isinstance(found, _Factors) and (_is_parameter(found.query) or _is_parameter(found.key)):
        return "its scores are a product with a parameter (a router, a classifier, a pooling), not of query and key"
    return found


def _matrix_product(
    node: torch.fx.Node, first: torch.fx.Node, second: torch.fx.Node, key_axis: int, transposed: bool
) -> _Factors | str | None:
    rank, rank1, rank2 = rank_of(node), rank_of(first), rank_of(second)
    if rank1 < 2 or rank2 < 2:
        # A linear layer follows an axis (talking heads), a matrix-vector product scores keys by one vector.
        return "its scores are a matrix-vector product, not one of queries and keys"
    if transposed and key_axis != rank - 1:
        return None  # a linear layer over another axis: the walk goes on through it
    contracted2 = rank2 - 1 if transposed else rank2 - 2
    batch = {
        axis: (axis - (rank - rank1), axis - (rank - rank2))
        for axis in range(rank - 2)
        if axis >= rank - rank1 and axis >= rank - rank2
    }
    if key_axis == rank - 1:
        return _Factors(node, first, second, 0, rank1 - 1, contracted2, key_axis, rank - 2, batch)
    if key_axis == rank - 2:
        swapped = {axis: (second_axis, first_axis) for axis, (first_axis, second_axis) in batch.items()}
        return _Factors(node, second, first, 1, contracted2, rank1 - 1, key_axis, rank - 1, swapped)
    return "its softmax runs over a batch axis of the product, not over keys"


def _einsum_product(node: torch.fx.Node, key_axis: int) -> _Factors | str:
    labels = einsum_labels(node)
    if labels is None:
        return "its scores are an einsum that is not a product of two tensors"
    (first, second), out = labels
    operands = node.args[1]
    label = out[key_axis]
    if (label in first) == (label in second):
        return "its softmax runs over a batch axis of the product, not over keys"
    query_arg = 0 if label in second else 1
    query, key = (first, second) if query_arg == 0 else (second, first)
    contracted = [c for c in query if c in key and c not in out]
    if len(contracted) != 1:
        return "its scores are an einsum that contracts no axis or several"
    rows = [c for c in out if c in query and c not in key]
    batch = {out.index(c): (query.index(c), key.index(c)) for c in out if c in query and c in key}
    factors = _Factors(
        node,
        operands[query_arg],
        operands[1 - query_arg],
        query_arg,
        query.index(contracted[0]),
        key.index(contracted[0]),
        key_axis,
        out.index(rows[-1]) if rows else None,
        batch,
    )
    factors.query_in_order = [c for c in query if c != contracted[0]] == [c for c in out if c != label]
    return factors


def einsum_labels(node: torch.fx.Node) -> tuple[tuple[list[str], list[str]], list[str]] | None:
    """The labels of a two-operand einsum's factors and output, an ellipsis spelled out as "0", "1", ..."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if len(operands) != 2:
        return None
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")

    def spelled(term: str, rank: int) -> list[str]:
        before, dots, after = term.partition("...")
        width = rank - len(before) - len(after) if dots else 0
        return [*before, *(str(i) for i in range(9 - width, 9)), *after]

    first, second = (spelled(term, rank_of(x)) for term, x in zip(terms, operands, strict=True))
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        return None
    if not arrow:
        counts = [c for c in (*first, *second) if c.isalpha()]
        dotted = sorted({c for c in (*first, *second) if c.isdigit()})
        return (first, second), [*dotted, *sorted(c for c in set(counts) if counts.count(c) == 1)]
    return (first, second), spelled(output, rank_of(node))


def _summed_product(node: torch.fx.Node, key_axis: int) -> _Factors | str:
    """``(query * key).sum(head_dim)``, with queries and keys spread over axes of their own."""
    reason = "its scores are a sum that is not a product of query and key"
    source = node.args[0]
    if op_name(source) != "mul" or len(node.args) < 2:
        return reason
    axes = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])
    if len(axes) != 1:
        return reason
    rank, contracted = rank_of(source), axes[0] % rank_of(source)
    keepdim = len(node.args) > 2 and node.args[2]
    spread = [axis for axis in range(rank) if axis != contracted or keepdim]
    factors = list(source.args[:2])
    if not all(isinstance(x, torch.fx.Node) and rank_of(x) == rank for x in factors):
        return reason
    key_source = spread[key_axis]
    shapes = [shape_of(x) for x in factors]
    whole = shape_of(source)
    if None in shapes or whole is None or key_source == contracted:
        return reason
    broad = [shape[key_source] == 1 != whole[key_source] for shape in shapes]  # type: ignore[index]
    if broad[0] == broad[1]:
        return reason
    query_arg = broad.index(True)
    query, key = factors[query_arg], factors[1 - query_arg]
    batch, row = {}, None
    for out_axis, axis in enumerate(spread):
        if axis in (key_source, contracted):
            continue
        if shapes[1 - query_arg][axis] == 1 != whole[axis]:  # type: ignore[index]
            row = out_axis
        else:
            batch[out_axis] = (axis, axis)
    found = _Factors(node, query, key, query_arg, contracted, contracted, key_axis, row, batch)
    found.query_in_order = False  # the factors are spread over axes of size 1
    return found


def _is_parameter(node: torch.fx.Node) -> bool:
    """Whether ``node`` is a parameter, as it is or through views, casts and scaling by a number."""
    while op_name(node) in ORDERED | RESHAPES | _PARAMETER_VIEWS:
        if any(isinstance(arg, torch.fx.Node) and rank_of(arg) > 0 for arg in node.args[1:]):
            return False
        if not isinstance(node.args[0], torch.fx.Node):
            return False
        node = node.args[0]
    return node.op == "get_attr" or bool(node.meta.get(PARAMETER))


# Down: from the softmax to the product with the value.


@dataclasses.dataclass
class _WeightedSum:
    product: torch.fx.Node
    dropout: bool
    remade: bool  # the probabilities are added to or divided before, by more than a number


def _weighted_sum(anchor: torch.fx.Node, key_axis: int) -> _WeightedSum | None:
    """The product that contracts the probabilities' keys with a value, and what happens to them before it."""
    pending = [_Weights(anchor, key_axis)]
    seen = set()
    while pending:
        weights = pending.pop(0)
        for user in weights.node.users:
            if (user, weights.axis) in seen:
                continue
            seen.add((user, weights.axis))
            if _contracts(user, weights.node, weights.axis) or (weights.multiplied and _sums(user, weights)):
                return _WeightedSum(user, weights.dropout, weights.remade)
            axes = axis_map(user, weights.node) if weights.node in chain_inputs(user) else None
            if axes is None or axes[weights.axis] is None:
                continue
            name, tensors = op_name(user), len(chain_inputs(user))
            pending.append(
                _Weights(
                    user,
                    axes[weights.axis],
                    weights.dropout or "dropout" in name,
                    weights.multiplied or (name == "mul" and tensors == 2),
                    weights.remade or name in ("add", "sub") or (name == "div" and tensors == 2),
                )
            )
    return None


@dataclasses.dataclass
class _Weights:
    """The probabilities at one node on their way down."""

    node: torch.fx.Node
    axis: int | None
    dropout: bool = False
    multiplied: bool = False  # by another tensor: a sum over the keys would then be the product with the value
    remade: bool = False


def _sums(user: torch.fx.Node, weights: _Weights) -> bool:
    if op_name(user) != "sum" or len(user.args) < 2:
        return False
    axes = [user.args[1]] if isinstance(user.args[1], int) else user.args[1]
    return [axis % rank_of(weights.node) for axis in axes] == [weights.axis]


def _contracts(user: torch.fx.Node, weights: torch.fx.Node, axis: int) -> bool:
    name = op_name(user)
    if name in ("matmul", "mm", "bmm", "baddbmm"):
        first, second = user.args[1:3] if name == "baddbmm" else user.args[:2]
        if rank_of(second) < 2 and first is weights:
            return axis == rank_of(first) - 1
        return (first is weights and axis == rank_of(first) - 1) or (
            second is weights and axis == max(rank_of(second) - 2, 0)
        )
    if name == "linear":
        return user.args[0] is weights and axis == rank_of(weights) - 1 and not _is_parameter(user.args[1])
    if name == "einsum":
        labels = einsum_labels(user)
        if labels is None or weights not in user.args[1]:
            return False
        position = list(user.args[1]).index(weights)
        label = labels[0][position][axis]
        return label in labels[0][1 - position] and label not in labels[1]
    return False


# Heads.


def _score_heads(origin: _Origin, scores: torch.fx.Node, shape: tuple[int, ...], key_axis: int) -> HeadLayout:
    """Where the heads are in the scores. See :func:`_factor_heads`; the axis is followed from the query down."""
    product = origin.products[0]
    found = _factor_heads(product.query, product.query_dim_axis)
    if found is not None and found.axis is None:
        return HeadLayout(None, 1)
    merged = _merged_heads(scores, 0) if len(shape) == 3 and key_axis != 0 else None
    if merged is not None:  # the module merged batch and heads in the scores themselves
        return HeadLayout(0, merged.heads, merged=True)
    if found is not None:
        for out_axis, (axis_in_query, _) in product.batch_axes.items():
            if axis_in_query != found.axis:
                continue
            axis = _follow(product.path, out_axis)
            if axis is not None:
                return HeadLayout(axis, found.heads, found.merged)
            if found.merged:  # [batch*heads, M, N], viewed as [batch, heads, M, N] before the softmax
                split = [a for a in range(len(shape) - 2) if shape[a] == found.heads]
                return HeadLayout(split[-1], found.heads) if split else HeadLayout(None, 1)
        return HeadLayout(None, 1)
    query_axis = _follow(product.path, product.query_axis)
    if query_axis is None:
        query_axis = key_axis - 1 if key_axis > 0 else 1
    batch = [axis for axis in range(len(shape)) if axis not in (query_axis, key_axis)]
    return HeadLayout(batch[-1], shape[batch[-1]]) if len(batch) > 1 else HeadLayout(None, 1)


def _factor_heads(factor: torch.fx.Node, dim_axis: int) -> HeadLayout | None:
    """Where the heads are in a query: on the axis that was split from the channels together with head_dim.

    HeadLayout(None, 1): the channels were never split. None: it cannot be told (the split is outside of the graph).
    """
    steps: list[tuple[torch.fx.Node, torch.fx.Node]] = []  # (op, its input)
    node, axis = factor, dim_axis
    while True:
        if op_name(node) in RESHAPES:
            source = node.args[0]
            before, after = shape_of(source), shape_of(node)
            groups = reshape_groups(before, after) if before and after else None
            for old, new in groups or []:
                others = [a for a in new if a != axis and after[a] != 1]  # type: ignore[index]
                if axis not in new or not others:
                    continue
                if len([a for a in old if before[a] != 1]) > 1:  # type: ignore[index]
                    return _followed_heads(steps, _merged_heads(node, others[-1]))
                layouts = [HeadLayout(a, after[a]) for a in reversed(others)]  # type: ignore[index]
                followed = (_followed_heads(steps, layout) for layout in layouts)
                found = next((layout for layout in followed if layout is not None), HeadLayout(None, 1))
                sizes = shape_of(factor)
                if found.axis is None or found.merged or sizes is None:
                    return found
                return HeadLayout(found.axis, sizes[found.axis])  # some may have been sliced off (Falcon)
        step = _source_of(node, axis)
        if step is None:
            # A layer on [batch, length, channels]: its channels are head_dim as a whole.
            whole = op_name(node) in ("linear", "addmm") and rank_of(node) <= 3 and axis == rank_of(node) - 1
            return HeadLayout(None, 1) if whole else None
        steps.append((node, step[0]))
        node, axis = step


def _source_of(node: torch.fx.Node, axis: int) -> tuple[torch.fx.Node, int] | None:
    """The input of ``node`` from which ``axis`` comes, and that axis there."""
    if op_name(node) == "getitem" and isinstance(node.args[0], torch.fx.Node):
        pieces = node.args[0]
        if not pieces.args or not isinstance(pieces.args[0], torch.fx.Node):
            return None
        if op_name(pieces) == "unbind":
            gone = static_int(pieces.args[1]) if len(pieces.args) > 1 else 0
            gone = (gone or 0) % rank_of(pieces.args[0])
            return pieces.args[0], axis + (axis >= gone)
        return (
            (pieces.args[0], axis)
            if op_name(pieces) in ("chunk", "split", "split_with_sizes", "tensor_split")
            else None
        )
    if op_name(node) in ("layer_norm", "rms_norm"):
        return node.args[0], axis  # type: ignore[return-value]
    if op_name(node) in ("amax", "mean") and len(node.args) == 2 and isinstance(node.args[1], list):
        gone_axes = {a % rank_of(node.args[0]) for a in node.args[1]}  # type: ignore[arg-type]
        return node.args[0], [a for a in range(rank_of(node.args[0])) if a not in gone_axes][axis]  # type: ignore
    if op_name(node) in _LAYERS:
        return None
    for source in chain_inputs(node):
        axes = axis_map(node, source)
        if axes is not None and axis in axes:
            return source, axes.index(axis)
    return None


def _followed_heads(steps: list[tuple[torch.fx.Node, torch.fx.Node]], layout: HeadLayout | None) -> HeadLayout | None:
    """``layout`` at the input of the last step, followed down to the factor; None where its axis ends."""
    for node, source in reversed(steps):
        if layout is None or layout.axis is None:
            return layout
        axis: int | None = layout.axis
        if op_name(node) in ("getitem", "amax", "mean"):
            positions = {_source_of(node, a)[1]: a for a in range(rank_of(node))}  # type: ignore[index]
            axis = positions.get(layout.axis)
        elif op_name(node) not in ("layer_norm", "rms_norm"):
            axes = axis_map(node, source)
            axis = axes[layout.axis] if axes is not None else None
        if axis is None and op_name(node) in RESHAPES and not layout.merged:
            merged = _merged_axis(source, node, layout.axis)
            layout = None if merged is None else HeadLayout(merged, layout.heads, merged=True)
        else:
            layout = None if axis is None else dataclasses.replace(layout, axis=axis)
    return layout


def _merged_axis(source: torch.fx.Node, node: torch.fx.Node, axis: int) -> int | None:
    """The axis of the reshape ``node`` into which ``axis`` was merged as the inner one, or None."""
    before, after = shape_of(source), shape_of(node)
    for old, new in (reshape_groups(before, after) or []) if before and after else []:
        large = [a for a in new if after[a] != 1]  # type: ignore[index]
        if axis == old[-1] and len(large) == 1:
            return large[0]
    return None


def _follow(path: list[tuple[torch.fx.Node, torch.fx.Node]], axis: int | None) -> int | None:
    for node, source in path:
        if axis is None:
            return None
        if op_name(node) == "baddbmm":
            continue
        axes = axis_map(node, source)
        axis = axes[axis] if axes is not None else None
    return axis


def _merged_heads(node: torch.fx.Node, axis: int) -> HeadLayout | None:
    """If ``axis`` of ``node`` is batch*heads, the heads in it: the walk up ends where a reshape merged them."""
    current, position = node, axis
    while True:
        inputs = chain_inputs(current)
        if not inputs:
            return None
        for source in inputs:
            axes = axis_map(current, source)
            if axes is not None and position in axes:
                current, position = source, axes.index(position)
                break
        else:
            break
    if op_name(current) not in RESHAPES:
        return None
    before, after = shape_of(inputs[0]), shape_of(current)
    if before is None or after is None:
        return None
    for old, new in reshape_groups(before, after) or []:
        if position in new:
            if new[-1] == position and len(old) > 1:  # [batch, heads] -> [batch*heads]
                heads = before[old[-1]]
                return HeadLayout(axis, heads, merged=True)
            if new[-1] > position and before[old[-1]] % after[new[-1]] == 0:  # [batch, heads*dim] -> [batch*heads, dim]
                heads = before[old[-1]] // after[new[-1]]
                if heads and after[position] % heads == 0:
                    return HeadLayout(axis, heads, merged=True)
    return None


def _with_heads(factors: _Factors, head: HeadLayout) -> Product:
    """``factors`` as the Product that a site holds, with the heads in each factor."""

    def layout(operand: torch.fx.Node, which: int) -> HeadLayout:
        if head.axis is None:
            return HeadLayout(None, 1)
        shape = shape_of(operand)
        for out_axis, axes in factors.batch_axes.items():
            if shape is None or _follow(factors.path, out_axis) != head.axis:
                continue
            if head.merged:
                return HeadLayout(axes[which], head.heads, merged=True)
            return HeadLayout(axes[which], shape[axes[which]])
        # [batch*heads, M, D] whose scores are viewed as [batch, heads, M, N] afterwards
        if len(factors.batch_axes) == 1:
            axes = next(iter(factors.batch_axes.values()))
            return HeadLayout(axes[which], head.heads, merged=True)
        return HeadLayout(None, 0)

    shape = shape_of(factors.query)
    ordered = factors.query_in_order and all(
        op_name(node) in ORDERED | RESHAPES | {"baddbmm"} for node, _ in factors.path
    )
    return Product(
        node=factors.node,
        query_arg=factors.query_arg,
        key_arg=1 - factors.query_arg,
        query_dim_axis=factors.query_dim_axis,
        key_dim_axis=factors.key_dim_axis,
        query_head=layout(factors.query, 0),
        key_head=layout(factors.key, 1),
        head_dim=shape[factors.query_dim_axis] if shape else 0,
        rows_in_order=ordered,
        query_scale=_constant_scale(factors.query),
        key_scale=_constant_scale(factors.key),
    )


def _constant_scale(factor: torch.fx.Node) -> float:
    """The product of the numbers by which ``factor`` was multiplied on its way to the product."""
    scale, node = 1.0, factor
    while len(chain_inputs(node)) == 1 and op_name(node) not in ("linear", "conv2d", "convolution", "cat"):
        name, operand = op_name(node), node.args[1] if len(node.args) > 1 else None
        if name in ("mul", "multiply", "div", "divide", "true_divide"):
            if not isinstance(operand, int | float):
                break
            scale = scale * operand if name in ("mul", "multiply") else scale / operand
        elif name not in ORDERED | RESHAPES | {"transpose", "permute", "mT", "expand"} or name in ("add", "tanh"):
            break
        node = node.args[0]
    return scale
