"""The one table of ops: what the passes know of each ATen op, one row per op with all of its spellings.

The passes ask a row's properties, never lists of names of their own, so a new spelling of attention is one row here.
An op without a row ends every walk. What an op does beside its properties (``add`` adds a term to the scores, ``tanh``
is a soft cap) is told by :func:`op_name`, which is the same for all spellings.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

AxisMap = list[int | None]
"""For every axis of an op's input the axis of its output that holds it, or None where it is merged, split or gone."""


@dataclasses.dataclass(frozen=True)
class Op:
    """One op, and its properties.

    Which axis of an input is which of the output (:func:`sigswap.passes.axes.axis_map`), one of:
        elementwise: each number comes from those at its own place; operands broadcast from the right.
        reshapes: neighbouring axes are merged or split.
        broadcasts: axes are expanded, without a copy. tiles: they are repeated as a whole, with a copy.
        moves: axes are permuted, or come and go: ``moves(arguments, rank of the input)`` is the map.
        mixes: a layer along one axis, through which the others can be followed.

    What becomes of the numbers of an input:
        operands: the positions of the arguments (tensors, or a list of them) that hold the numbers.
        same: they stay as they are, perhaps in new memory (``copies``) or in another dtype (``casts``).
        picks: some are left out, or they are put in another order along an axis, or beside others.
        part: ``picks`` a part that numbers among the arguments tell.
        overwrites: other values are written over some of them.
        masks: some scores are hidden.
        linear: ``f(c * x) == c * f(x)``, and f is not told by name.
        cuts: no gradient flows through.
        keeps_rows: ``moves`` an axis of size 1 only, so that rows stay in their order.
        shifts: what was one number per row is so afterwards, and no other property says it.

    What kind of op it is:
        product: a sum over an axis that two tensors share. matrix: of matrices, the last two arguments' last two axes.
        layer: it has parameters. norm: it normalises over the last axes.
        reduces: the numbers along an axis become one, or are sorted. splits: pieces along the axis ``args[2]``.
        softmax. fills: a constant tensor. compares: with which function.
    """

    name: str
    spellings: str = ""
    operands: tuple[int, ...] = (0,)
    moves: Callable[[Sequence[Any], int], AxisMap | None] | None = None
    elementwise: bool = False
    reshapes: bool = False
    broadcasts: bool = False
    tiles: bool = False
    mixes: bool = False
    same: bool = False
    copies: bool = False
    casts: bool = False
    picks: bool = False
    part: bool = False
    overwrites: bool = False
    masks: bool = False
    linear: bool = False
    cuts: bool = False
    keeps_rows: bool = False
    shifts: bool = False
    product: bool = False
    matrix: bool = False
    layer: bool = False
    norm: bool = False
    reduces: bool = False
    splits: bool = False
    softmax: bool = False
    fills: bool = False
    compares: Callable[[float, float], bool] | None = None

    @property
    def flows_from(self) -> tuple[int, ...]:
        """The positions of the arguments through which scores may flow into the output; (): a walk ends here."""
        followed = self.elementwise or self.reshapes or self.broadcasts or self.tiles or self.mixes or self.moves
        return self.operands if followed else ()

    @property
    def in_order(self) -> bool:
        """Whether the rows of a tensor stay in their order."""
        return self.reshapes or self.keeps_rows or (self.elementwise and not self.picks and not self.overwrites)

    @property
    def views(self) -> bool:
        """Whether the output is all of the input's numbers with its axes in another form or order."""
        return self.reshapes or self.broadcasts or (self.moves is not None and not self.picks)

    @property
    def labelled(self) -> bool:
        """Whether an axis of the input that is one of the output means the same there, index by index."""
        return (self.moves is not None or self.elementwise) and not self.picks and not self.overwrites

    @property
    def undone(self) -> bool:
        """Whether it can be left out above an operand, gradients and all, by following the operand's axes up."""
        return self.views or (self.same and not self.casts and not self.cuts)

    @property
    def keeps_scale(self) -> bool:
        """Whether a number by which the input was multiplied is one by which the output is."""
        return self.linear or self.same or self.views or self.part

    @property
    def keeps_parameter(self) -> bool:
        """Whether of a parameter, beside numbers, it gives what is as good as the parameter."""
        return self.in_order or self.views or self.part or self.tiles

    @property
    def keeps_row_numbers(self) -> bool:
        """Whether what was one number per row of scores is so afterwards."""
        return self.shifts or self.same or self.reshapes or self.broadcasts or self.keeps_rows or self.part


def _elementwise(name: str, spellings: str = "", **properties: Any) -> Op:
    return Op(name, spellings, elementwise=True, **properties)


_ROWS = (
    # Arithmetic on scores.
    _elementwise("add", operands=(0, 1)),
    _elementwise("sub", "subtract", operands=(0, 1)),
    _elementwise("rsub", operands=(0, 1)),
    _elementwise("mul", "multiply", operands=(0, 1)),
    _elementwise("div", "divide true_divide", operands=(0, 1)),
    _elementwise("minimum", operands=(0, 1)),
    _elementwise("maximum", operands=(0, 1)),
    _elementwise("neg", "negative", linear=True, shifts=True),
    _elementwise("tanh"),
    _elementwise("pow", "square abs absolute sqrt"),
    _elementwise("clamp", "clip"),
    _elementwise("clamp_min"),
    _elementwise("clamp_max"),
    _elementwise("nan_to_num", linear=True),
    _elementwise("dropout", linear=True),
    _elementwise("feature_dropout", linear=True),
    _elementwise("alpha_dropout"),
    # Masks.
    _elementwise("where", operands=(1, 2), masks=True),
    _elementwise("masked_fill", masks=True),
    _elementwise("tril", masks=True, linear=True),
    _elementwise("triu", masks=True, linear=True),
    _elementwise("masked_scatter", masks=True, overwrites=True),
    _elementwise("index_put", masks=True, overwrites=True),
    _elementwise("copy", operands=(0, 1), overwrites=True),
    _elementwise("slice_scatter", overwrites=True, picks=True),
    # The same numbers in another dtype, or in other memory.
    _elementwise("to", "_to_copy type_as float half bfloat16 double", same=True, casts=True),
    Op("bool", same=True, casts=True),  # no score comes out of it
    _elementwise("contiguous", same=True, copies=True),
    _elementwise("clone", same=True, copies=True),
    _elementwise("alias", same=True),
    _elementwise("lift_fresh", "lift_fresh_copy", same=True),
    _elementwise("detach", same=True, cuts=True),
    # A part of the numbers, or another order.
    _elementwise("slice", picks=True, part=True),
    _elementwise("narrow", picks=True, part=True),
    _elementwise("index_select", picks=True),
    _elementwise("gather", picks=True),
    _elementwise("take_along_dim", picks=True),
    _elementwise("roll", picks=True),
    _elementwise("flip", picks=True),
    _elementwise("pad", "constant_pad_nd", picks=True),
    _elementwise("cat", "concat concatenate", picks=True),
    # Views.
    Op("view", "reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias", reshapes=True),
    Op("expand", "expand_as broadcast_to", broadcasts=True),
    Op("permute", moves=lambda args, rank: _permutation(args[1], rank)),
    Op("transpose", "swapaxes swapdims", moves=lambda args, rank: _swap(args[1], args[2], rank)),
    Op("t", moves=lambda args, rank: _swap(0, 1, rank) if rank == 2 else [0]),
    Op("mT", moves=lambda args, rank: _swap(-1, -2, rank)),
    Op("numpy_T", moves=lambda args, rank: _permutation(range(rank)[::-1], rank)),
    Op("movedim", "moveaxis", moves=lambda args, rank: _movedim(args, rank)),
    Op("unsqueeze", moves=lambda args, rank: _unsqueeze(args, rank), keeps_rows=True),
    Op("squeeze", moves=lambda args, rank: _squeeze(args, rank), keeps_rows=True),
    Op("select", moves=lambda args, rank: _select(args, rank), picks=True, part=True),
    Op("getitem", shifts=True),  # one of several results
    Op("repeat", tiles=True, copies=True),
    Op("repeat_interleave", copies=True),
    # Products, layers, norms.
    Op("matmul", "mm bmm linalg_matmul", operands=(0, 1), product=True, matrix=True),
    Op("baddbmm", operands=(1, 2), product=True, matrix=True),
    Op("einsum", product=True),
    Op("cdist", "_cdist_forward", product=True),
    Op("inner", "tensordot dot vdot linalg_vecdot outer ger mv linalg_multi_dot chain_matmul bilinear", product=True),
    Op("addbmm", "addmv addr", operands=(1, 2), product=True),
    Op("embedding_bag", "_embedding_bag _embedding_bag_forward_only", product=True),
    Op("cosine_similarity", product=True),
    Op("pairwise_distance", product=True),
    Op("linear", layer=True, mixes=True),
    Op("convolution", "conv2d", layer=True, mixes=True),
    Op("addmm", operands=(1, 2), layer=True),
    Op("conv1d", "conv3d embedding", layer=True),
    Op("layer_norm", "rms_norm", norm=True),
    # Over an axis.
    Op("softmax", "_softmax _safe_softmax special_softmax", softmax=True),
    Op("log_softmax", "_log_softmax special_log_softmax"),
    Op("amax", reduces=True),
    Op("mean", reduces=True),
    Op("max", "min amin median kthvalue logsumexp special_logsumexp", reduces=True),
    Op("topk", "sort", reduces=True),
    Op("split", "chunk split_with_sizes tensor_split", splits=True),
    # What masks are made of.
    Op("ones", "ones_like new_ones", fills=True),
    Op("zeros", "zeros_like new_zeros", fills=True),
    Op("full", "full_like new_full", fills=True),
    Op("scalar_tensor", fills=True),
    Op("logical_and", "bitwise_and __and__"),
    Op("logical_not", "bitwise_not"),
    Op("le", "less_equal", compares=operator.le),
    Op("lt", "less", compares=operator.lt),
    Op("ge", "greater_equal", compares=operator.ge),
    Op("gt", "greater", compares=operator.gt),
    Op("eq", compares=operator.eq),
    Op("ne", "not_equal", compares=operator.ne),
)
OPS: dict[str, Op] = {spelling: row for row in _ROWS for spelling in (row.name, *row.spellings.split())}
"""Each row by each of its spellings."""

OPAQUE = (
    "flash_attn",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "scaled_dot_product_fused",
)
"""Parts of the names of attention that runs inside one op, whose softmax cannot be changed."""


def spelling_of(node: Node) -> str:
    """The ATen name without namespace, overload and in-place underscore; "" for anything that is not a call."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return _spelling(node.target)
    return "getitem" if node.target is operator.getitem else getattr(node.target, "__name__", str(node.target))


def op_of(node: Node) -> Op:
    """The node's row; one without properties for an op that the table does not have, or for what is no call."""
    spelling = spelling_of(node)
    return OPS.get(spelling) or _without_row(spelling)


def op_name(node: Node) -> str:
    """The name of the node's row, the same for all spellings; its own where there is no row."""
    return op_of(node).name


def is_exponential(node: Node) -> bool:
    """Whether ``node`` is an exp, to whatever base."""
    name = op_name(node)
    return name in ("exp", "exp2", "expm1") or (spelling_of(node) == "pow" and isinstance(node.args[0], int | float))


@functools.cache
def _without_row(name: str) -> Op:
    return Op(name)


@functools.cache
def _spelling(target: torch._ops.OpOverload) -> str:
    name = target._schema.name.split("::")[-1]
    if name in ("max", "min") and target._overloadname == "other":
        return name + "imum"
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


# Where axes go. Each function takes the arguments of the op and the rank of its input.


def _permutation(order: Sequence[int], rank: int) -> AxisMap:
    inverse: AxisMap = [None] * rank
    for new, old in enumerate(order):
        inverse[old % rank] = new
    return inverse


def _swap(first: int, second: int, rank: int) -> AxisMap:
    order = list(range(rank))
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return _permutation(order, rank)


def _movedim(args: Sequence[Any], rank: int) -> AxisMap:
    def as_tuple(value: Any) -> tuple[int, ...]:
        return tuple(axis % rank for axis in ([value] if isinstance(value, int) else value))

    sources, targets = as_tuple(args[1]), as_tuple(args[2])
    order: list[int] = [-1] * rank
    for old, new in zip(sources, targets, strict=True):
        order[new] = old
    rest = iter(axis for axis in range(rank) if axis not in sources)
    return _permutation([axis if axis >= 0 else next(rest) for axis in order], rank)


def _squeeze(args: Sequence[Any], rank: int) -> AxisMap | None:
    if len(args) < 2:
        return None
    gone = {axis % rank for axis in ([args[1]] if isinstance(args[1], int) else args[1])}
    kept = [axis for axis in range(rank) if axis not in gone]
    return [kept.index(axis) if axis in kept else None for axis in range(rank)]


def _unsqueeze(args: Sequence[Any], rank: int) -> AxisMap:
    new = args[1] % (rank + 1)
    return [axis + (axis >= new) for axis in range(rank)]


def _select(args: Sequence[Any], rank: int) -> AxisMap:
    gone = args[1] % rank
    return [None if axis == gone else axis - (axis > gone) for axis in range(rank)]
