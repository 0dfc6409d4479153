"""What the Triton kernels share: from a tile of q . k to probabilities, and the loads and stores around it.

The definition is :mod:`sigswap.kernels.reference`'s. Everything here works on a tile of scores in either
orientation: ``row`` (queries) and ``col`` (keys) are index tensors that broadcast to the tile, so that the kernel
of dK and dV can hold its scores transposed.

Four forms of the sigmoid. The special-function unit is the bottleneck beside the matrix units, so they are counted:

- fast: ``0.5 + 0.5 tanh.approx(x / 2)``, one special instruction per element. Its absolute error is about that of
  float32 near 1, so p is good to 1e-4 down to x = -8 and to 1% at -10: below bfloat16's rounding as long as the
  row bias, near which most scores lie, is above :data:`~sigswap.kernels.host.forms.FAST_BIAS`. (A row of which all
  scores are lower still is small beside others, and has a larger error in itself: 1% at -12, 17% at -15, and 0 from -17
  on.)
- accurate: ``1 / (1 + 2^(-x log2 e))``, 1e-6 everywhere. Two elements share one
  reciprocal (``1/a = b/(ab)``), so that it takes one and a half special instructions.
- tail, for long sequences, where nearly all probabilities are small: with ``t = 2^(x log2 e)``, ``t / (1 + t)`` is
  ``t - t^2`` to a relative t^2. One special instruction per element, as long as t <= 1/32 in a whole warp's part of
  a tile; else that takes the accurate form.
- cubic tail, for float16, which would show that error: ``t - t^2 + t^3``, to a relative t^3.

The choice (FORM) is the kernel's where it depends on a tensor: per block of rows, from the row bias itself.

Out of range rows and keys of a tile are loaded as zeros. Then ``v = 0`` makes their part of the output 0, and
``dO = 0`` or ``v = 0`` makes their dS 0: no tile needs a mask for its ends. Only where rows have a cap (or their sums
are asked for) keys out of range would count, and are left out of the last tile.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from sigswap.kernels import MASKED_SCORE
from sigswap.kernels.host.forms import ACCURATE, AUTO, CUBIC_TAIL, FAST, FAST_BIAS, SHORT_TANH, TAIL
from sigswap.kernels.host.problem import Signature

_ACCURATE = tl.constexpr(ACCURATE)
_TAIL = tl.constexpr(TAIL)
_FAST = tl.constexpr(FAST)
_AUTO = tl.constexpr(AUTO)
_CUBIC_TAIL = tl.constexpr(CUBIC_TAIL)
_FAST_BIAS = tl.constexpr(FAST_BIAS)
_SHORT_TANH = tl.constexpr(SHORT_TANH)
_MASKED_SCORE = tl.constexpr(MASKED_SCORE)
ROW_BIAS_BLOCK = 256
"""Rows of a block of bias_kernel()."""
_ROW_BIAS_BLOCK = tl.constexpr(ROW_BIAS_BLOCK)
_LOG2E = tl.constexpr(1.4426950408889634)


def tail_assembly(pack: int, *, cubic: bool = False) -> str:
    """PTX of a tail form, from y = x log2 e, of as many elements. -inf gives 2^-60 where it takes the accurate form."""
    each = range(pack)
    source = [f"${pack + i}" for i in each]
    lines = [f"{{ .reg .f32 t<{pack}>, r; .reg .b32 u; .reg .pred large;"]
    lines += [f"ex2.approx.ftz.f32 t{i}, {source[i]};" for i in each]
    for i in each:  # t - t^2, or t - t (t - t^2)
        lines += [f"neg.f32 r, t{i}; fma.rn.f32 ${i}, t{i}, r, t{i};"]
        lines += [f"fma.rn.f32 ${i}, ${i}, r, t{i};"] if cubic else []
    # As unsigned integers, floats up to -5 (0xC0A00000) are above all others, and NaN. A minimum takes two at a time.
    lines += [f"min.u32 u, {source[0]}, {source[1]};", *(f"min.u32 u, u, {source[i]};" for i in each[2:])]
    # The vote makes the branch the whole warp's: none diverges.
    lines += ["setp.lt.u32 large, u, 0xC0A00000;", "vote.sync.any.pred large, large, 0xffffffff;", "@!large bra DONE;"]
    for i in range(0, pack, 2):  # as in sigmoid()
        for k in (i, i + 1):
            lines += [f"max.NaN.f32 t{k}, {source[k]}, 0fC2700000; neg.f32 t{k}, t{k};"]
            lines += [f"ex2.approx.ftz.f32 t{k}, t{k}; add.f32 t{k}, t{k}, 0f3F800000;"]
        lines += [f"mul.f32 r, t{i}, t{i + 1}; rcp.approx.ftz.f32 r, r;"]
        lines += [f"mul.f32 ${i}, t{i + 1}, r; mul.f32 ${i + 1}, t{i}, r;"]
    # On one line: inductor copies a kernel's source into a string literal, in which an escaped line end would not hold.
    return " ".join([*lines, "DONE: }"])


_TAIL_PACK = tl.constexpr(32)
_TAIL_ASSEMBLY = tl.constexpr(tail_assembly(32))
_CUBIC_TAIL_ASSEMBLY = tl.constexpr(tail_assembly(32, cubic=True))
# Outputs are written before the last inputs are read.
_TAIL_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 32 + ["r"] * 32))

# Of tanh(u) / u for |u| <= 1 in powers of u^2, to a relative 7e-6.
TANH_COEFFICIENTS = (
    0.999993085861206,
    -0.3329806327819824,
    0.1303680986166,
    -0.04481752216815949,
    0.009036408737301826,
)


def tanh_assembly(pack: int) -> str:
    """PTX of tanh of as many elements: a polynomial, or 1 - 2 / (e^2u + 1) if one of the warp's is above 1."""
    each = range(pack)
    source = [f"${pack + i}" for i in each]
    *lower, top = (f"0f{struct.unpack('>I', struct.pack('>f', number))[0]:08X}" for number in TANH_COEFFICIENTS)
    lines = ["{ .reg .f32 r, s, m; .reg .pred large;", f"abs.f32 m, {source[0]};"]
    lines += [f"abs.f32 r, {source[i]}; max.f32 m, m, r;" for i in each[1:]]
    for i in each:
        lines += [f"mul.f32 s, {source[i]}, {source[i]}; fma.rn.f32 r, s, {top}, {lower[-1]};"]
        lines += [f"fma.rn.f32 r, r, s, {number};" for number in reversed(lower[:-1])]
        lines += [f"mul.f32 ${i}, r, {source[i]};"]
    lines += ["setp.gt.f32 large, m, 0f3F800000;", "vote.sync.any.pred large, large, 0xffffffff;", "@!large bra DONE;"]
    for i in each:
        lines += [f"min.NaN.f32 r, {source[i]}, 0f41A00000; mul.f32 r, r, 0f4038AA3B; ex2.approx.ftz.f32 r, r;"]
        lines += [f"add.f32 r, r, 0f3F800000; rcp.approx.ftz.f32 r, r; fma.rn.f32 ${i}, r, 0fC0000000, 0f3F800000;"]
    return " ".join([*lines, "DONE: }"])


_TANH_PACK = tl.constexpr(16)
_TANH_ASSEMBLY = tl.constexpr(tanh_assembly(16))
_TANH_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 16))

UNSPECIALIZED = (
    *(f"stride_{tensor}_{dim}" for tensor in ("q", "k", "v", "o", "do", "da", "dq", "dk", "dv") for dim in "bhn"),
    *("stride_sum_b", "stride_sum_h", "stride_sum_n", "stride_delta_b", "stride_delta_h", "stride_delta_n"),
    *("stride_floor_b", "stride_floor_h", "stride_out_h", "stride_sums_b", "stride_sums_h"),
    *("heads", "group", "q_len", "kv_len", "total_q", "total_k", "left", "right", "scale", "softcap", "const_bias"),
    *("dropout_p", "row_cap"),
    *("stride_split", "splits", "mask_batches", "terms", "terms_per_split", "tiles", "total", "draw_rows"),
)
"""Scalars whose value (1, a multiple of 16) must not compile another kernel. Strides of operands come in units of 8
elements, if they allow it, so nothing is lost."""


def mask_unit(signature: Signature) -> int:
    """The kernels' MASK_UNIT: 16 where so many keys divide all, so that a mask is loaded 16 bytes at once; else 1."""
    return 16 if signature.masked_by_rows and signature.kv_len % 16 == 0 else 1


@triton.jit
def sigmoid(x, FORM: tl.constexpr, ASM: tl.constexpr):
    """sigmoid(y), from x = unit_of(FORM) * y. Without ASM (the interpreter), in plain Triton."""
    if FORM == _FAST:
        if ASM:
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            tanh = 1 - 2 / (tl.exp2(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL) * (2 * _LOG2E)) + 1)
        return 0.5 + 0.5 * tanh
    elif FORM == _TAIL and ASM:
        return tl.inline_asm_elementwise(
            _TAIL_ASSEMBLY, _TAIL_CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=_TAIL_PACK
        )
    elif FORM == _CUBIC_TAIL and ASM:
        return tl.inline_asm_elementwise(
            _CUBIC_TAIL_ASSEMBLY, _TAIL_CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=_TAIL_PACK
        )
    else:
        if ASM:
            # Clamped at 2^60, so that the product of two does not overflow: sigmoid is never below 2^-60. NaN stays.
            return tl.inline_asm_elementwise(
                """
                {
                .reg .f32 d<2>, r;
                max.NaN.f32 d0, $2, 0fC2700000;
                max.NaN.f32 d1, $3, 0fC2700000;
                neg.f32 d0, d0;
                neg.f32 d1, d1;
                ex2.approx.ftz.f32 d0, d0;
                ex2.approx.ftz.f32 d1, d1;
                add.f32 d0, d0, 0f3F800000;
                add.f32 d1, d1, 0f3F800000;
                mul.f32 r, d0, d1;
                rcp.approx.ftz.f32 r, r;
                mul.f32 $0, d1, r;
                mul.f32 $1, d0, r;
                }
                """,
                "=r,=r,r,r",
                [x],
                dtype=tl.float32,
                is_pure=True,
                pack=2,
            )
        else:
            return 1 / (1 + tl.exp2(-tl.maximum(x, -60.0, propagate_nan=tl.PropagateNan.ALL)))


@triton.jit
def soft_tanh(u, SOFTCAP: tl.constexpr, ASM: tl.constexpr):
    """tanh(u), by the kernels' SOFTCAP."""
    if SOFTCAP == _SHORT_TANH and ASM:
        return tl.inline_asm_elementwise(
            _TANH_ASSEMBLY, _TANH_CONSTRAINTS, [u], dtype=tl.float32, is_pure=True, pack=_TANH_PACK
        )
    else:
        # tanh.approx would be off by 5e-4. This is off by 1e-7, of which a large cap makes too much where |u| is small:
        # there a series is off by 1e-7 of tanh(u).
        capped = tl.minimum(u, 20.0, propagate_nan=tl.PropagateNan.ALL)
        tanh = 1 - 2 / (tl.exp2(capped * (2 * _LOG2E)) + 1)
        square = u * u
        series = u + u * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        return tl.where(tl.abs(u) < 0.3, series, tanh)


@triton.jit
def single(number):
    """A scalar in float32, which Triton passes floats as; inductor passes them in float64."""
    return tl.cast(number, tl.float32)


@triton.jit
def unit_of(FORM: tl.constexpr):
    """The factor from a score to sigmoid()'s argument."""
    return 0.5 if FORM == _FAST else _LOG2E


@triton.jit
def row_biases(
    row,
    bias,
    stride_bias_m,
    count,
    stride_count_m,
    const_bias,
    q_len,
    kv_len,
    shift,
    left,
    right,
    BIAS_ROWS: tl.constexpr,
    VISIBLE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """b_i of the rows: ``const_bias - ln(max(n_i, 1)) [+ bias_i, if BIAS_ROWS]``; finite for rows out of range, too.

    n_i is read from count, if given (there is a mask), else had in closed form.
    """
    result = tl.zeros(row.shape, tl.float32) + const_bias
    if VISIBLE:
        if count is not None:
            n = tl.load(count + row.to(tl.int64) * stride_count_m, mask=row < q_len, other=1)
        else:
            first = tl.zeros(row.shape, tl.int32)
            last = first + (kv_len - 1)
            if HAS_LEFT:
                first = tl.maximum(row + shift - left, 0)
            if HAS_RIGHT:
                last = tl.minimum(row + shift + right, kv_len - 1)
            n = last - first + 1
        result -= tl.log(tl.maximum(n, 1).to(tl.float32))
    if BIAS_ROWS:
        result += tl.load(bias + row.to(tl.int64) * stride_bias_m, mask=row < q_len, other=0.0).to(tl.float32)
    return result


@triton.jit
def probabilities(
    s,
    row_bias,
    row,
    col,
    mask,
    stride_mask_m,
    stride_mask_n,
    q_len,
    kv_len,
    shift,
    left,
    right,
    scale,
    softcap,
    edge,
    MASK_ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORM: tl.constexpr,
    ASM: tl.constexpr,
    seen=None,
    MASK_UNIT: tl.constexpr = 1,
):
    """p, before dropout, and d(score) / d(scale * s), from a tile s of q . k.

    row_bias is in units of unit_of(FORM). edge: whether the band cuts the tile. seen: which scores are visible, if not
    all are, besides mask and band. MASK_UNIT: a divisor of kv_len, and of the numbers of a mask that a thread loads at
    once. Masked scores become -inf before the
    sigmoid, so that a NaN in a masked key does not reach its neighbour through the shared reciprocal, and 0 after it.
    """
    unit: tl.constexpr = 0.5 if FORM == _FAST else _LOG2E  # unit_of(FORM), whose result is no constant
    slope = s
    if SOFTCAP:
        tanh = soft_tanh(s * (scale / softcap), SOFTCAP, ASM)
        slope = 1 - tanh * tanh
        x = tanh * (softcap * unit) + row_bias
    else:
        x = s * (scale * unit) + row_bias
    if mask is not None:
        pointers = mask + col.to(tl.int64) * stride_mask_n
        inside = col < kv_len // MASK_UNIT * MASK_UNIT  # so that the compiler knows it of kv_len
        if MASK_ROWS:
            pointers += row.to(tl.int64) * stride_mask_m
            inside &= row < q_len
        tile = tl.load(pointers, mask=inside, other=0)
        if mask.dtype.element_ty.is_int():
            x = tl.where(tile != 0, x, float("-inf"))
        else:
            tile = tile.to(tl.float32)
            x = tl.where(tile <= _MASKED_SCORE, float("-inf"), x + tile * unit)
    if (HAS_LEFT or HAS_RIGHT) and edge:
        if HAS_RIGHT:
            x = tl.where(col <= row + (shift + right), x, float("-inf"))
        if HAS_LEFT:
            x = tl.where(col >= row + (shift - left), x, float("-inf"))
    if seen is not None:
        x = tl.where(seen, x, float("-inf"))
    p = sigmoid(x, FORM, ASM)
    # The fast form of -inf is 0 as it is.
    if FORM != _FAST and (mask is not None or seen is not None or ((HAS_LEFT or HAS_RIGHT) and edge)):
        p = tl.where(x == float("-inf"), 0.0, p)
    return p, slope


@triton.jit
def elements(stride_b, stride_h, stride_n, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """An operand's strides, given in units, in elements. WIDE: rows of a block are 2^31 elements apart, or more."""
    stride_b = tl.cast(stride_b, tl.int64) * UNIT
    stride_h = tl.cast(stride_h, tl.int64) * UNIT
    if WIDE:
        return stride_b, stride_h, tl.cast(stride_n, tl.int64) * UNIT
    else:
        return stride_b, stride_h, stride_n * UNIT


@triton.jit
def row_stride(stride, WIDE: tl.constexpr):
    """An output's stride between rows."""
    return tl.cast(stride, tl.int64) if WIDE else stride


@triton.jit
def sequence(cu_seqlens, number, longest, total):
    """(first row, rows) of one of packed sequences, int64 and int32.

    Nothing on the host has seen the numbers in cu_seqlens. Whatever they are, the rows are among the tensor's total
    rows, and no more than the longest sequence was said to have, for which tensors and launches are made.
    """
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + number), 0), total)
    end = tl.maximum(tl.minimum(tl.load(cu_seqlens + number + 1), total), first)
    return first.to(tl.int64), tl.minimum(end - first, longest).to(tl.int32)


@triton.jit
def load_rows(
    source, batch, head, start, length, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows start ... of one head, [BLOCK, WIDTH]; zeros beyond length and beyond DIM.

    source is a descriptor of [B, H, length, DIM] if TMA, else the address of the head's first row.
    """
    if TMA:
        return source.load([batch, head, start, 0]).reshape(BLOCK, WIDTH)
    else:
        row = tl.arange(0, BLOCK)
        dim = tl.arange(0, WIDTH)
        pointers = source + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
        if DIM == WIDTH:
            return tl.load(pointers, mask=(start + row < length)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=(start + row < length)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def places_of_rows(
    target, start, length, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Addresses of the rows start ... of one head, [BLOCK, WIDTH], and which of them are up to length and DIM.

    target is the address of the head's first row.
    """
    row = tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    pointers = target + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    return pointers, (start + row < length)[:, None] & (dim < DIM)[None, :]


@triton.jit
def store_rows(
    target, tile, start, length, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    pointers, inside = places_of_rows(target, start, length, stride, DIM, BLOCK, WIDTH)
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def load_numbers(source, row, length, stride):
    """One number for each of the rows of one head, 0 beyond length. source is the address of the first row's."""
    return tl.load(source + row.to(tl.int64) * stride, mask=row < length, other=0.0)


@triton.jit
def store_numbers(target, numbers, row, length, stride):
    """One number for each of the rows, up to length, of one head. target is the address of the first row's."""
    tl.store(target + row.to(tl.int64) * stride, numbers, mask=row < length)


@triton.jit
def keys_of_rows(
    first_row, last_row, kv_len, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(begin, end) of the keys that some of the rows see; begin is a multiple of BLOCK_N."""
    begin = 0
    end = kv_len
    if HAS_RIGHT:
        end = tl.maximum(tl.minimum(end, last_row + shift + right + 1), 0)
    if HAS_LEFT:
        begin = tl.maximum(first_row + shift - left, 0) // BLOCK_N * BLOCK_N
    return begin, end


@triton.jit
def rows_of_keys(
    first_key, last_key, q_len, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """keys_of_rows with the sides swapped: row i sees the keys i + shift - left ... i + shift + right, so key j is
    seen by the rows j - shift - right ... j - shift + left."""
    return keys_of_rows(first_key, last_key, q_len, -shift, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M)


@triton.jit
def is_edge(
    first_row, last_row, first_key, last_key, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):  # fmt: skip
    """Whether some of the rows do not see some of the keys. Only such tiles need a mask."""
    if HAS_LEFT and HAS_RIGHT:
        return (last_key > first_row + shift + right) | (first_key < last_row + shift - left)
    elif HAS_RIGHT:
        return last_key > first_row + shift + right
    elif HAS_LEFT:
        return first_key < last_row + shift - left
    else:
        return False
