"""What the Gluon kernels for Hopper GPUs share: tiles in shared memory, visible keys, the sigmoid in few registers."""

from __future__ import annotations

import struct
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sigswap.kernels.host.forms import NO_TANH, SHORT_TANH
from sigswap.kernels.host.launch import Described, by_rows
from sigswap.kernels.host.layout import Layout
from sigswap.kernels.host.problem import Problem
from sigswap.kernels.triton.common import _AUTO, _CUBIC_TAIL, _FAST, _TAIL, TANH_COEFFICIENTS

BY_ROW, BY_KEY = ((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 2), (1, 3), (4, 6), (5, 7))
"""Which of eight scores that a thread has one behind the other are of one row, in a tile [rows, keys]; in one [keys,
rows]. Those may share a reciprocal: a score that is not a number spoils no other row."""


SCALE = 1024
"""Of probabilities as float16 numbers, so that few are subnormal (P_SCALE)."""


def tail_assembly(pack: int, sharing: tuple[tuple[int, ...], ...], *, cubic: bool = False, scaled: bool = False) -> str:
    """PTX of a tail form of the sigmoid, from y = x log2 e, of as many elements. -inf gives 0.

    scaled: SCALE times that, by t (SCALE - 0.985 SCALE t), which is off by 0.015 t where that is small, and by 5e-4 of
    itself where t is 2^-5: of outputs in float16 the error grows by 4% at most. A multiply-add, and none for SCALE.

    As triton_common.tail_assembly(), but what the form is not good for is worked out from the same powers, so that all
    elements stay in their registers. Half of the powers are on their way before it is known which branch is taken, the
    other half beside what becomes of the first ones: 560 TFLOP/s at head_dim 64 and 16,384 keys on an H200, 522 with
    all of them before, 533 with none.
    """
    each, early = range(pack), pack // 2
    source = [f"${pack + i}" for i in each]
    lines = [f"{{ .reg .f32 t<{pack}>, d<4>, r, s; .reg .b32 u<4>; .reg .pred large;"]
    powers = [f"ex2.approx.ftz.f32 t{i}, {source[i]};" for i in each]
    lines += powers[:early]
    # As unsigned integers, floats up to -5 (0xC0A00000) are above all others, and NaN.
    lines += [f"min.u32 u{i}, {source[i]}, {source[i + 4]};" for i in range(4)]
    lines += [f"min.u32 u{i % 4}, u{i % 4}, {source[i]};" for i in each[8:]]
    lines += ["min.u32 u0, u0, u1; min.u32 u2, u2, u3; min.u32 u0, u0, u2;"]
    # The vote makes the branch the whole warp's: none diverges.
    lines += ["setp.lt.u32 large, u0, 0xC0A00000;", "vote.sync.any.pred large, large, 0xffffffff;", "@large bra LARGE;"]
    for i in each:  # t - t^2, or t - t (t - t^2)
        lines += powers[i : i + 1] if i >= early else []
        if scaled:
            lines += [f"fma.rn.f32 r, t{i}, {_number(-0.985 * SCALE)}, {_number(SCALE)}; mul.f32 ${i}, t{i}, r;"]
            continue
        lines += [f"neg.f32 r, t{i}; fma.rn.f32 ${i}, t{i}, r, t{i};"]
        lines += [f"fma.rn.f32 ${i}, ${i}, r, t{i};"] if cubic else []
    lines += ["bra DONE;", "LARGE:", *powers[early:], *_exact(pack, sharing, scaled=scaled)]
    return " ".join([*lines, "DONE: }"])


def exact_assembly(pack: int, sharing: tuple[tuple[int, ...], ...], *, scaled: bool = False) -> str:
    """PTX of the sigmoid from y = x log2 e, to 1e-6, of as many elements. -inf gives 0. scaled: SCALE times that."""
    lines = [f"{{ .reg .f32 t<{pack}>, d<4>, r, s;"]
    lines += [f"ex2.approx.ftz.f32 t{i}, ${pack + i};" for i in range(pack)]
    return " ".join([*lines, *_exact(pack, sharing, scaled=scaled), "}"])


SINGLE_ASSEMBLY = (
    "{ .reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"
)
"""PTX of the sigmoid of one element from y = x log2 e, to 1e-6. -inf gives 0."""


def _number(value: float) -> str:
    """As PTX has it, in float32."""
    return f"0f{struct.unpack('>I', struct.pack('>f', value))[0]:08X}"


def _exact(pack: int, sharing: tuple[tuple[int, ...], ...], *, scaled: bool) -> list[str]:
    """t / (1 + t), or SCALE times that. Of t up to 2^30, so that the product of four sums is a number."""
    lines = []
    by_scale = "" if not scaled else f"mul.f32 {{0}}, {{0}}, {_number(SCALE)};"
    for group in [[first + i for i in group] for first in range(0, pack, 8) for group in sharing]:
        for n, i in enumerate(group):
            lines += [f"min.NaN.f32 t{i}, t{i}, 0f4E800000; add.f32 d{n}, t{i}, 0f3F800000;"]
        for n in range(0, len(group), 2):  # each times the sum of the other one
            a, b = group[n : n + 2]
            lines += [f"mul.f32 t{a}, t{a}, d{n + 1}; mul.f32 t{b}, t{b}, d{n};"]
        if len(group) == 2:
            lines += ["mul.f32 r, d0, d1; rcp.approx.ftz.f32 r, r;", by_scale.format("r")]
        else:  # s and r become the reciprocals of the first and the second pair's product
            lines += ["mul.f32 r, d0, d1; mul.f32 s, d2, d3;"]
            lines += ["mul.f32 d0, r, s; rcp.approx.ftz.f32 d0, d0;", by_scale.format("d0")]
            lines += ["mul.f32 s, s, d0; mul.f32 r, r, d0;"]
        for n, i in enumerate(group):
            lines += [f"mul.f32 ${i}, t{i}, {'s' if n < 2 and len(group) == 4 else 'r'};"]
    return lines


def soft_cap_assembly(pack: int, *, slope: bool = False) -> str:
    """PTX of factor * tanh(scale * s) + bias of as many elements s, with a bias each, and one scale and factor.

    tanh is that of triton_common.tanh_assembly(). Its polynomial is one in s, with scale (and factor) in the
    coefficients: ten instructions less than a warp's part of a tile would have by itself. Whether that is good for all
    of a warp's elements is known first: so results take the registers of elements, and few branches leave instructions
    one behind the other, as their cache needs them. It is not where some |scale * s| > 1, nor for a scale of which the
    ninth power is no float32.

    slope: 1 - tanh^2 is another result, in float16.
    """
    each, others = range(pack), pack // 2 if slope else 0
    s, bias = ([f"${place * pack + others + i}" for i in each] for place in (1, 2))
    scale, factor = f"${3 * pack + others}", f"${4 * pack + others}"
    numbers = [_number(number) for number in TANH_COEFFICIENTS]
    lines = ["{ .reg .f32 r, t, m<4>, c<5>, h<2>; .reg .pred large, other;"]
    lines += [f"abs.f32 m{i}, {s[i]};" for i in range(4)]
    lines += [f"abs.f32 r, {s[i]}; max.f32 m{i % 4}, m{i % 4}, r;" for i in each[4:]]
    lines += ["max.f32 m0, m0, m1; max.f32 m2, m2, m3; max.f32 m0, m0, m2;"]
    lines += [f"abs.f32 r, {scale}; mul.f32 m0, m0, r; setp.gtu.f32 large, m0, 0f3F800000;"]
    # 2^-12 and 2^10
    lines += ["setp.lt.f32 other, r, 0f39800000; or.pred large, large, other;"]
    lines += ["setp.gt.f32 other, r, 0f44800000; or.pred large, large, other;"]
    lines += ["vote.sync.any.pred large, large, 0xffffffff; @large bra LARGE;"]
    lines += [f"mul.f32 t, {scale}, {scale}; mul.f32 r, {scale}, {'0f3F800000' if slope else factor};"]
    lines += [f"mul.f32 c{j}, r, {number}; mul.f32 r, r, t;" for j, number in enumerate(numbers)]

    def keep(i: int) -> list[str]:
        """The results of the element of which tanh is in t."""
        kept = [f"fma.rn.f32 ${i}, t, {factor}, {bias[i]};"]
        if slope:
            kept += [f"neg.f32 r, t; fma.rn.f32 h{i % 2}, r, t, 0f3F800000;"]
            kept += [f"cvt.rn.f16x2.f32 ${pack + i // 2}, h1, h0;"] if i % 2 else []
        return kept

    for i in each:
        lines += [f"mul.f32 t, {s[i]}, {s[i]}; fma.rn.f32 r, t, c4, c3;"]
        lines += [f"fma.rn.f32 r, r, t, c{j};" for j in (2, 1, 0)]
        lines += [f"mul.f32 t, r, {s[i]};", *keep(i)] if slope else [f"fma.rn.f32 ${i}, r, {s[i]}, {bias[i]};"]
    lines += ["bra DONE;", f"LARGE: mul.f32 c0, {scale}, 0f4038AA3B;"]
    for i in each:
        lines += [f"mul.f32 r, {s[i]}, c0; min.NaN.f32 r, r, 0f4266D4CA; ex2.approx.ftz.f32 r, r;"]
        lines += ["add.f32 r, r, 0f3F800000; rcp.approx.ftz.f32 r, r; fma.rn.f32 t, r, 0fC0000000, 0f3F800000;"]
        lines += keep(i)
    return " ".join([*lines, "DONE: }"])


_LN2 = tl.constexpr(0.6931471805599453)
# Of tiles [rows, keys], and of [keys, rows].
_TAIL_ASSEMBLY = tl.constexpr(tail_assembly(32, BY_ROW))
_TAIL_ASSEMBLY_BY_KEY = tl.constexpr(tail_assembly(32, BY_KEY))
_FEW_TAIL_ASSEMBLY_BY_KEY = tl.constexpr(tail_assembly(8, BY_KEY))
_CUBIC_TAIL_ASSEMBLY = tl.constexpr(tail_assembly(32, BY_ROW, cubic=True))
_CUBIC_TAIL_ASSEMBLY_BY_KEY = tl.constexpr(tail_assembly(32, BY_KEY, cubic=True))
_FEW_CUBIC_TAIL_ASSEMBLY_BY_KEY = tl.constexpr(tail_assembly(8, BY_KEY, cubic=True))
_EXACT_ASSEMBLY = tl.constexpr(exact_assembly(8, BY_ROW))
_EXACT_ASSEMBLY_BY_KEY = tl.constexpr(exact_assembly(8, BY_KEY))
_SINGLE_ASSEMBLY = tl.constexpr(SINGLE_ASSEMBLY)
_SCALED_TAIL_ASSEMBLY = tl.constexpr(tail_assembly(32, BY_ROW, scaled=True))
_SCALED_EXACT_ASSEMBLY = tl.constexpr(exact_assembly(8, BY_ROW, scaled=True))
_SCALE = tl.constexpr(SCALE)
_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 32))
_FEW_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))
_SOFT_CAP_PACK = tl.constexpr(32)
_SOFT_CAP_ASSEMBLY = tl.constexpr(soft_cap_assembly(32))
_SOFT_CAP_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 128))
_SLOPE_ASSEMBLY = tl.constexpr(soft_cap_assembly(32, slope=True))
_SLOPE_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 48 + ["r"] * 128))

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
    """Float32 numbers of rows, [B, H, N], for Gluon: [B * H, N], of which a tile is 1 by so many rows.

    layout: heads are a multiple of 4 numbers apart, and follow one another.
    """

    def __init__(self, layout: Layout, rows: int) -> None:
        batch, heads, length = layout.shape
        super().__init__((batch * heads, length), (layout.strides[1], 1), (1, rows), layout.dtype)

    def describe(self, tensor: Tensor) -> Any:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block), shared)


def takes_row_cap(problem: Problem) -> bool:
    """Whether the problem has no row cap, or is one that these kernels were compared with float64 on an H200 with: as
    many queries as keys, all or those up to a row's own visible. Triton's kernels take the others."""
    signature = problem.signature
    windowed = problem.options.window_left >= 0 or problem.options.window_right >= 0
    return problem.is_uncapped or (signature.q_len == signature.kv_len and not windowed)


@gluon.constexpr_function
def tiles_like(number: int, block: Any) -> list[int]:
    """The shape of so many tiles of a descriptor, one behind the other."""
    return [number, *block.shape]


def takes_soft_cap(problem: Problem) -> bool:
    """Whether the problem has no soft cap, or one whose tanh is the short one, in half precision, without a row cap
    beside it. Triton's kernels take the others, and caps of thousands far above all scores: with a scale below 2^-12 of
    the cap the tanh here is off by 2e-7, which the cap multiplies."""
    form, options = problem.signature.tanh_form(), problem.options
    exact = options.softcap <= 1024 or options.softcap <= abs(options.scale) * 4096
    return form == NO_TANH or (form == SHORT_TANH and problem.is_uncapped and exact)


@gluon.jit
def cut(tile, CUT: gl.constexpr):
    """The columns of a tile in shared memory; if CUT 64 of them and the next 32, of 65 to 96 that are loaded as 128."""
    if CUT:
        return tile.slice(0, 64, 1), tile.slice(64, 32, 1)
    else:
        return (tile,)


@gluon.jit
def as_operands(tile, of_first: gl.constexpr, of_rest: gl.constexpr, CUT: gl.constexpr):
    """A tile as the first operand of products of both widths, which hold it in the same registers."""
    first = gl.convert_layout(tile, gl.DotOperandLayout(0, of_first, 2))
    if CUT:
        return first, gl.convert_layout(tile, gl.DotOperandLayout(0, of_rest, 2))
    else:
        return (first,)


@gluon.jit
def start_over_columns(first, second, start, USE_START: gl.constexpr):
    """Starts the product of first and the transpose of second, piece by piece of their columns, on top of start."""
    token = warpgroup_mma(first[0], second[0].permute((1, 0)), start, use_acc=USE_START, is_async=True)
    for j in gl.static_range(1, len(second)):
        token = warpgroup_mma(first[j], second[j].permute((1, 0)), token, use_acc=True, is_async=True)
    return token


@gluon.jit
def start_by_columns(operands, second, sums, CUT: gl.constexpr):
    """Starts the products of an operand and the pieces of second's columns, which are added to sums."""
    tokens = sums[:0]
    for j in gl.static_range(len(sums)):
        tokens += (warpgroup_mma(operands[j if CUT else 0], second[j], sums[j], is_async=True),)
    return tokens


@gluon.jit
def log_of_visible(
    row, kv_len, shift, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, SHORT: gl.constexpr = False
):
    """ln(max(n_i, 1)) of rows, n_i being the number of keys that a row sees.

    SHORT: in few instructions, to 1e-6 of itself.
    """
    first = gl.full(row.shape, 0, gl.int32, row.type.layout)
    last = first + (kv_len - 1)
    if HAS_LEFT:
        first = gl.maximum(row + shift - left, 0)
    if HAS_RIGHT:
        last = gl.minimum(row + shift + right, kv_len - 1)
    count = gl.maximum(last - first + 1, 1).to(gl.float32)
    if SHORT:
        log2 = gl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [count], dtype=gl.float32, is_pure=True, pack=1
        )
        return log2 * _LN2
    else:
        return gl.log(count)


@gluon.jit
def soft_capped(s, scale, factor, bias):
    """factor * tanh(scale * s) + bias, of which a thread has a multiple of 32."""
    return gl.inline_asm_elementwise(
        _SOFT_CAP_ASSEMBLY, _SOFT_CAP_CONSTRAINTS, [s, bias, scale, factor],
        dtype=gl.float32, is_pure=True, pack=_SOFT_CAP_PACK,
    )  # fmt: skip


@gluon.jit
def soft_capped_with_slope(s, scale, factor, bias):
    """soft_capped(), and 1 - tanh(scale * s)^2 in float16."""
    return gl.inline_asm_elementwise(
        _SLOPE_ASSEMBLY, _SLOPE_CONSTRAINTS, [s, bias, scale, factor],
        dtype=(gl.float32, gl.float16), is_pure=True, pack=_SOFT_CAP_PACK,
    )  # fmt: skip


@gluon.jit
def sigmoid(x, fast, FORM: gl.constexpr, SLOW: gl.constexpr, BY_KEY: gl.constexpr, AT_ONCE: gl.constexpr):
    """As triton_common.sigmoid(), in fewer registers; and -inf gives exactly 0 in every form.

    x: of a product's tile, [rows, keys] or, BY_KEY, [keys, rows]. fast: if FORM is AUTO, whether the form is FAST, else
    it is SLOW, which ACCURATE stands for, too. AT_ONCE: 32 scores at a time, or 8, BY_KEY, where there are no registers
    for more; or 1, where special instructions do not limit the kernel: two for each score, in all forms but FAST.
    """
    if FORM == _FAST:
        p = _fast_sigmoid(x)
    elif FORM == _AUTO:
        p = _fast_sigmoid(x) if fast else _slow_sigmoid(x, SLOW, BY_KEY, AT_ONCE)
    else:
        p = _slow_sigmoid(x, SLOW, BY_KEY, AT_ONCE)
    return p


@gluon.jit
def scaled_sigmoid(x, fast, FORM: gl.constexpr, SLOW: gl.constexpr):
    """SCALE times sigmoid(), of a tile [rows, keys], 32 scores at a time; the scale costs hardly an instruction."""
    if FORM == _FAST:
        p = _SCALE * _fast_sigmoid(x)
    elif FORM == _AUTO:
        p = _SCALE * _fast_sigmoid(x) if fast else _scaled_slow_sigmoid(x, SLOW)
    else:
        p = _scaled_slow_sigmoid(x, SLOW)
    return p


@gluon.jit
def _scaled_slow_sigmoid(x, FORM: gl.constexpr):
    EXACT: gl.constexpr = FORM != _TAIL and FORM != _CUBIC_TAIL
    return gl.inline_asm_elementwise(
        _SCALED_EXACT_ASSEMBLY if EXACT else _SCALED_TAIL_ASSEMBLY, _FEW_CONSTRAINTS if EXACT else _CONSTRAINTS,
        [x], dtype=gl.float32, is_pure=True, pack=8 if EXACT else 32,
    )  # fmt: skip


@gluon.jit
def sigmoid_of_rows(x, fast):
    """Of a number of each row, in the form's unit."""
    return _fast_sigmoid(x) if fast else 1 / (1 + gl.exp2(-x))


@gluon.jit
def _fast_sigmoid(x):
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
    return 0.5 + 0.5 * tanh


@gluon.jit
def _slow_sigmoid(x, FORM: gl.constexpr, BY_KEY: gl.constexpr, AT_ONCE: gl.constexpr):
    LONG_TAIL: gl.constexpr = _TAIL_ASSEMBLY_BY_KEY if BY_KEY else _TAIL_ASSEMBLY
    TAIL: gl.constexpr = _FEW_TAIL_ASSEMBLY_BY_KEY if AT_ONCE == 8 else LONG_TAIL
    LONG_CUBIC: gl.constexpr = _CUBIC_TAIL_ASSEMBLY_BY_KEY if BY_KEY else _CUBIC_TAIL_ASSEMBLY
    CUBIC: gl.constexpr = _FEW_CUBIC_TAIL_ASSEMBLY_BY_KEY if AT_ONCE == 8 else LONG_CUBIC
    EXACT: gl.constexpr = _EXACT_ASSEMBLY_BY_KEY if BY_KEY else _EXACT_ASSEMBLY
    ASSEMBLY: gl.constexpr = TAIL if FORM == _TAIL else (CUBIC if FORM == _CUBIC_TAIL else EXACT)
    EIGHT: gl.constexpr = FORM != _TAIL and FORM != _CUBIC_TAIL
    PACK: gl.constexpr = 8 if EIGHT and AT_ONCE == 32 else AT_ONCE
    return gl.inline_asm_elementwise(
        _SINGLE_ASSEMBLY if PACK == 1 else ASSEMBLY,
        "=r,r" if PACK == 1 else _FEW_CONSTRAINTS if PACK == 8 else _CONSTRAINTS, [x],
        dtype=gl.float32, is_pure=True, pack=PACK,
    )  # fmt: skip
