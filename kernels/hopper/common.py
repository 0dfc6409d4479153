"""What the Gluon kernels for Hopper GPUs share: tiles in shared memory, visible keys, the sigmoid in few registers."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sigswap.kernels.host.launch import Described, by_rows
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.triton.common import _AUTO, _CUBIC_TAIL, _FAST, _TAIL, tail_assembly

_PACK = tl.constexpr(8)
_TAIL_ASSEMBLY = tl.constexpr(tail_assembly(8, paired=False))
_CUBIC_TAIL_ASSEMBLY = tl.constexpr(tail_assembly(8, cubic=True, paired=False))
_TAIL_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))

# Triton 3.8 has other names for them.
sync = getattr(gl, "barrier", None) or gl.thread_barrier
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


class Tiles(Described):
    """A [B, H, N, D] tensor for Gluon, which is told how a tile lies in shared memory.

    columns: of a tile; 0: the head's, up to a power of two.
    """

    def __init__(self, layout: Layout, rows: int, columns: int = 0) -> None:
        rows_of = by_rows(layout, rows)
        block = (*rows_of.block[:3], columns or rows_of.block[3])
        super().__init__(rows_of.shape, rows_of.strides, block, rows_of.dtype)

    def describe(self, tensor: Tensor) -> Any:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block), shared)


class Numbers(Described):
    """Float32 numbers of rows, [B, H, N] contiguous, for Gluon: [B * H, N], of which a tile is 1 by so many rows."""

    def __init__(self, layout: Layout, rows: int) -> None:
        batch, heads, length = layout.shape
        super().__init__((batch * heads, length), (length, 1), (1, rows), layout.dtype)

    def describe(self, tensor: Tensor) -> Any:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block), shared)


@gluon.jit
def log_of_visible(row, kv_len, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """ln(max(n_i, 1)) of rows, n_i being the number of keys that a row sees."""
    first = gl.full(row.shape, 0, gl.int32, row.type.layout)
    last = first + (kv_len - 1)
    if HAS_LEFT:
        first = gl.maximum(row + shift - left, 0)
    if HAS_RIGHT:
        last = gl.minimum(row + shift + right, kv_len - 1)
    return gl.log(gl.maximum(last - first + 1, 1).to(gl.float32))


@gluon.jit
def sigmoid(x, fast, FORM: gl.constexpr, SLOW: gl.constexpr):
    """As triton_common.sigmoid(), in fewer registers; and -inf gives exactly 0 in every form.

    fast: if FORM is AUTO, whether the form is FAST, else it is SLOW, which ACCURATE stands for, too.
    """
    if FORM == _FAST:
        p = _sigmoid(x, _FAST)
    elif FORM == _AUTO:
        p = _sigmoid(x, _FAST) if fast else _sigmoid(x, SLOW)
    else:
        p = _sigmoid(x, SLOW)
    return p


@gluon.jit
def _sigmoid(x, FORM: gl.constexpr):
    if FORM == _FAST:
        tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
        return 0.5 + 0.5 * tanh
    elif FORM == _TAIL:
        return gl.inline_asm_elementwise(
            _TAIL_ASSEMBLY, _TAIL_CONSTRAINTS, [x], dtype=gl.float32, is_pure=True, pack=_PACK
        )
    elif FORM == _CUBIC_TAIL:
        return gl.inline_asm_elementwise(
            _CUBIC_TAIL_ASSEMBLY, _TAIL_CONSTRAINTS, [x], dtype=gl.float32, is_pure=True, pack=_PACK
        )
    else:
        return 1 / (1 + gl.exp2(-x))
