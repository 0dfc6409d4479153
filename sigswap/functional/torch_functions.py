"""The torch functions that attention is written with, one row for each spelling: all else derives its tables from here.

A function's *family* is the name by which a saved plan addresses its calls ("softmax:0" is the first softmax of one
forward); all spellings of a family are counted together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._higher_order_ops.flex_attention import flex_attention

from sigswap.functional import flex, multi_head, stand_ins


class Swap(NamedTuple):
    """What a torch function that holds a softmax becomes.

    ``stand_in`` takes the function's own arguments. Where ``whole`` is set it takes an
    :class:`sigswap.functional.multi_head.Attention` before them, else the row bias by keyword.
    ``family`` None: no plan addresses it, because the conversion switches off what calls it.
    """

    family: str | None
    stand_in: Callable[..., Any]
    whole: bool = False


SWAPS: dict[Callable[..., Any], Swap] = {
    F.softmax: Swap("softmax", stand_ins.softmax),
    torch.softmax: Swap("softmax", stand_ins.softmax),
    torch.special.softmax: Swap("softmax", stand_ins.softmax),
    torch.Tensor.softmax: Swap("softmax", stand_ins.softmax),
    F.log_softmax: Swap("log_softmax", stand_ins.log_softmax),
    torch.log_softmax: Swap("log_softmax", stand_ins.log_softmax),
    torch.special.log_softmax: Swap("log_softmax", stand_ins.log_softmax),
    torch.Tensor.log_softmax: Swap("log_softmax", stand_ins.log_softmax),
    F.scaled_dot_product_attention: Swap("sdpa", stand_ins.scaled_dot_product_attention),
    flex_attention: Swap("flex", flex.flex_attention),
    F.multi_head_attention_forward: Swap("mha", multi_head.multi_head_attention_forward, whole=True),
    torch._native_multi_head_attention: Swap("mha", multi_head.native_multi_head_attention, whole=True),
    torch._transformer_encoder_layer_fwd: Swap(None, multi_head.transformer_encoder_layer_fwd, whole=True),
}
PRODUCTS: dict[Callable[..., Any], tuple[str, ...]] = {
    torch.matmul: ("input", "other"),
    torch.Tensor.matmul: ("input", "other"),
    torch.Tensor.__matmul__: ("input", "other"),
    torch.bmm: ("input", "mat2"),
    torch.Tensor.bmm: ("input", "mat2"),
    torch.baddbmm: ("input", "batch1", "batch2"),
    torch.Tensor.baddbmm: ("input", "batch1", "batch2"),
    torch.Tensor.baddbmm_: ("input", "batch1", "batch2"),
    operator.matmul: ("input", "other"),  # under torch.export, where Dynamo does not make it Tensor.__matmul__
    torch.einsum: (),
}
"""By function that makes scores, the names of its arguments, of which the last two are the factors. Those of einsum
have no names: it takes an equation and operands."""

SHIFTS: tuple[Callable[..., Any], ...] = (
    torch.amax,
    torch.Tensor.amax,
    torch.max,
    torch.Tensor.max,
    torch.logsumexp,
    torch.Tensor.logsumexp,
    torch.special.logsumexp,
)
"""What is subtracted from scores before a softmax, which ignores it."""

EXPONENTIALS: tuple[Callable[..., Any], ...] = (torch.exp, torch.exp_, torch.Tensor.exp, torch.Tensor.exp_)
DIVISIONS: tuple[Callable[..., Any], ...] = (
    torch.div,
    torch.divide,
    torch.true_divide,
    *(
        getattr(torch.Tensor, name)
        for name in ("div", "div_", "divide", "divide_", "true_divide", "true_divide_", "__truediv__", "__itruediv__")
    ),
)
INVERSES: tuple[Callable[..., Any], ...] = (torch.reciprocal, torch.Tensor.reciprocal)
NUMBER_BY_TENSOR: Callable[..., Any] = torch.Tensor.__rdiv__
"""``1 / total``. It is in no dict, for with it as a key Dynamo's guard on the dict fails as soon as it is made."""
POWERS: tuple[Callable[..., Any], ...] = (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__)
MULTIPLICATIONS: tuple[Callable[..., Any], ...] = (
    torch.mul,
    torch.multiply,
    *(
        getattr(torch.Tensor, name)
        for name in ("mul", "mul_", "multiply", "multiply_", "__mul__", "__imul__", "__rmul__")
    ),
)
"""The parts of a softmax by hand, ``exp(scores) / exp(scores).sum(-1)``, or times the inverse of that sum."""
IN_PLACE: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch.Tensor, name)
    for name in ("div_", "divide_", "true_divide_", "__idiv__", "__itruediv__", "mul_", "multiply_", "__imul__")
)
"""Those of them whose result is in the memory of what they are given."""

FAMILIES: dict[Callable[..., Any], str] = {
    **{function: swap.family for function, swap in SWAPS.items() if swap.family is not None},
    **dict.fromkeys(PRODUCTS, "product"),
    **dict.fromkeys(SHIFTS, "shift"),
    **dict.fromkeys(EXPONENTIALS, "exp"),
    **dict.fromkeys((*DIVISIONS, *INVERSES), "division"),
}
NOT_IN_EVERY_PLAN = ("log_softmax", "exp", "flex")
"""Families that a plan names only where it has a site of theirs; elsewhere their calls are left alone."""


def is_reciprocal(func: Any, args: Any) -> bool:
    """Whether a call gives the reciprocal of a tensor, in whatever spelling."""
    if func in POWERS:
        return len(args) > 1 and isinstance(args[1], int | float) and args[1] == -1
    return func is NUMBER_BY_TENSOR or func in INVERSES
