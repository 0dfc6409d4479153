"""What the Triton kernels share: from a tile of q . k to probabilities, launch arguments, tile configurations.

The definition is :mod:`sigswap.kernels.reference`'s. Everything here works on a tile of scores in either
orientation: ``row`` (queries) and ``col`` (keys) are index tensors that broadcast to the tile, so that the kernel
of dK and dV can hold its scores transposed.

Two forms of the sigmoid. The special-function unit is the bottleneck beside the matrix units, so they are counted:

- fast: ``0.5 + 0.5 tanh.approx(x / 2)``, one special instruction per element. Its absolute error is about that of
  float32 near 1, so p is good to 1e-4 down to x = -8 and to 1% at -10: below bfloat16's rounding as long as the
  row bias, near which most scores lie, is above :data:`FAST_BIAS`.
- accurate: ``1 / (1 + 2^(-x log2 e))``, 1e-6 everywhere. Two elements share one
  reciprocal (``1/a = b/(ab)``), so that it takes one and a half special instructions.

The choice (:class:`Form`) is the kernel's where it depends on a tensor: per block of rows, from the row bias itself.

Out of range rows and keys of a tile are loaded as zeros. Then ``v = 0`` makes their part of the output 0, and
``dO = 0`` or ``v = 0`` makes their dS 0: no tile needs a mask for its ends.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sigswap.kernels import MASKED_SCORE, settings
from sigswap.kernels.reference import Options

FAST_BIAS = -8.5
"""The fast form is used where the row bias is at least this (with the visible-keys bias: up to 4,900 keys).

Measured on an H100 in bfloat16 with n keys, error of the fast over that of the accurate form, in the output and each
gradient: 1.00 at n = 1024, 1.01 at 2048, 1.05 at 4096, 1.16 at 8192, 1.39 at 16,384, 2.2 at 131,072."""

ACCURATE, FAST, AUTO = 0, 1, 2
"""Values of the kernels' FORM; AUTO: FAST in blocks whose rows all have a bias of at least FAST_BIAS."""

_ACCURATE = tl.constexpr(ACCURATE)
_FAST = tl.constexpr(FAST)
_AUTO = tl.constexpr(AUTO)
_FAST_BIAS = tl.constexpr(FAST_BIAS)
_MASKED_SCORE = tl.constexpr(MASKED_SCORE)
_LOG2E = tl.constexpr(1.4426950408889634)

UNSPECIALIZED = ("heads", "group", "q_len", "kv_len", "left", "right", "scale", "softcap", "const_bias", "dropout_p")
"""Scalars whose value (1, a multiple of 16) must not compile another kernel."""


# Device functions.


@triton.jit
def sigmoid(x, FAST: tl.constexpr, ASM: tl.constexpr):
    """sigmoid(y), from x = y / 2 if FAST, else x = y log2(e). Without ASM (the interpreter), in plain Triton."""
    if FAST:
        if ASM:
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            tanh = 1 - 2 / (tl.exp2(tl.minimum(x, 20.0) * (2 * _LOG2E)) + 1)
        return 0.5 + 0.5 * tanh
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
def unit_of(FAST: tl.constexpr):
    """The factor from a score to sigmoid()'s argument."""
    return 0.5 if FAST else _LOG2E


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
    MASK_ROWS: tl.constexpr,
    BAND_LEFT: tl.constexpr,
    BAND_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FAST: tl.constexpr,
    ASM: tl.constexpr,
):
    """p, before dropout, and d(score) / d(scale * s), from a tile s of q . k.

    row_bias is in units of unit_of(FAST). Masked scores become -inf before the sigmoid, so that a NaN in a masked
    key does not reach its neighbour through the shared reciprocal, and 0 after it.
    """
    unit: tl.constexpr = unit_of(FAST)
    slope = s
    if SOFTCAP:
        # tanh.approx would be off by 5e-4 of the cap. 1 - 2 / (e^2x + 1), for |x| large and small alike, by 1e-7.
        tanh = 1 - 2 / (tl.exp2(tl.minimum(s * (scale / softcap), 20.0) * (2 * _LOG2E)) + 1)
        slope = 1 - tanh * tanh
        x = tanh * (softcap * unit) + row_bias
    else:
        x = s * (scale * unit) + row_bias
    if mask is not None:
        pointers = mask + col.to(tl.int64) * stride_mask_n
        inside = col < kv_len
        if MASK_ROWS:
            pointers += row.to(tl.int64) * stride_mask_m
            inside &= row < q_len
        tile = tl.load(pointers, mask=inside, other=0)
        if mask.dtype.element_ty.is_int():
            x = tl.where(tile != 0, x, float("-inf"))
        else:
            tile = tile.to(tl.float32)
            x = tl.where(tile <= _MASKED_SCORE, float("-inf"), x + tile * unit)
    if BAND_RIGHT:
        x = tl.where(col <= row + (shift + right), x, float("-inf"))
    if BAND_LEFT:
        x = tl.where(col >= row + (shift - left), x, float("-inf"))
    p = sigmoid(x, FAST, ASM)
    if (mask is not None or BAND_RIGHT) or BAND_LEFT:
        p = tl.where(x == float("-inf"), 0.0, p)
    return p, slope


@triton.jit
def kept(seed, head, row, col, q_len, kv_len, dropout_p):
    """Which probabilities dropout keeps: score (b, h, i, j) draws number ((b H + h) M + i) N + j; head is b H + h."""
    offset = (head.to(tl.int64) * q_len + row) * kv_len + col
    return tl.rand(tl.load(seed), offset) >= dropout_p


@triton.jit
def load_rows(
    source, batch, head, start, length, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rows start ... of one head, [BLOCK, WIDTH]; zeros beyond length (unless CHECK is off) and beyond DIM.

    source is a descriptor of [B, H, length, DIM] if TMA, else the address of the head's first row.
    """
    if TMA:
        return source.load([batch, head, start, 0]).reshape(BLOCK, WIDTH)
    else:
        row = tl.arange(0, BLOCK)
        dim = tl.arange(0, WIDTH)
        pointers = source + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
        if DIM == WIDTH:
            if CHECK:
                return tl.load(pointers, mask=(start + row < length)[:, None], other=0.0)
            else:
                return tl.load(pointers)
        else:
            if CHECK:
                return tl.load(pointers, mask=(start + row < length)[:, None] & (dim < DIM)[None, :], other=0.0)
            else:
                return tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(
    target, tile, start, length, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    pointers = target + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=(start + row < length)[:, None] & (dim < DIM)[None, :])


@triton.jit
def keys_of_rows(
    first_row, last_row, kv_len, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(begin, inner_begin, inner_end, end): the keys that some of the rows see; the whole blocks that all see.

    begin, inner_begin and inner_end are multiples of BLOCK_N, and inner_begin <= inner_end, begin <= inner_begin.
    Without WHOLE the last block may be cut by kv_len and still count as inner.
    """
    begin = 0
    inner_begin = 0
    end = kv_len
    inner_end = kv_len
    if HAS_RIGHT:
        end = tl.maximum(tl.minimum(end, last_row + shift + right + 1), 0)
        inner_end = tl.maximum(tl.minimum(inner_end, first_row + shift + right + 1), 0)
    if HAS_LEFT:
        begin = tl.maximum(first_row + shift - left, 0) // BLOCK_N * BLOCK_N
        inner_begin = tl.cdiv(tl.maximum(last_row + shift - left, 0), BLOCK_N) * BLOCK_N
    if WHOLE:
        inner_end = inner_end // BLOCK_N * BLOCK_N
    else:
        if inner_end < kv_len:
            inner_end = inner_end // BLOCK_N * BLOCK_N
    return begin, inner_begin, tl.maximum(inner_end, inner_begin), end


@triton.jit
def rows_of_keys(
    first_key, last_key, q_len, shift, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """keys_of_rows with the sides swapped: row i sees the keys i + shift - left ... i + shift + right, so key j is
    seen by the rows j - shift - right ... j - shift + left."""
    return keys_of_rows(first_key, last_key, q_len, -shift, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M, WHOLE)


@triton.jit(do_not_specialize=("heads", "q_len", "kv_len", "left", "right", "const_bias"))
def _bias_kernel(
    out, bias, count, stride_bias_b, stride_bias_h, stride_bias_m, stride_count_b, stride_count_h, stride_count_m,
    heads, q_len, kv_len, left, right, const_bias,
    VISIBLE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[b, h, i] = b_i, contiguous."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    if bias is not None:
        bias += batch.to(tl.int64) * stride_bias_b + head.to(tl.int64) * stride_bias_h
    if count is not None:
        count += batch.to(tl.int64) * stride_count_b + head.to(tl.int64) * stride_count_h
    result = row_biases(
        row, bias, stride_bias_m, count, stride_count_m, const_bias, q_len, kv_len, shift, left, right,
        bias is not None, VISIBLE, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    tl.store(out + (batch.to(tl.int64) * heads + head) * q_len + row, result, mask=row < q_len)


@triton.jit(do_not_specialize=("heads", "q_len", "kv_len", "left", "right"))
def _count_kernel(
    mask, count, stride_b, stride_h, stride_m, stride_n, heads, q_len, kv_len, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """count[b, h, i] = the keys that row i sees: in its band, and not masked."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    start = tl.program_id(0) % blocks * BLOCK_M
    head = (tl.program_id(0) // blocks) % heads
    batch = tl.program_id(0) // blocks // heads
    shift = kv_len - q_len if BOTTOM_RIGHT else 0
    row = start + tl.arange(0, BLOCK_M)
    mask += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    total = tl.zeros((BLOCK_M,), tl.int32)
    last_row = tl.minimum(start + BLOCK_M, q_len) - 1
    begin, _inner_begin, _inner_end, end = keys_of_rows(
        start, last_row, kv_len, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N, True
    )
    for key in range(begin, end, BLOCK_N):
        col = key + tl.arange(0, BLOCK_N)
        pointers = mask + (row.to(tl.int64) * stride_m)[:, None] + (col.to(tl.int64) * stride_n)[None, :]
        inside = (row < q_len)[:, None] & (col < kv_len)[None, :]
        if HAS_LEFT:
            inside &= col[None, :] >= (row + (shift - left))[:, None]
        if HAS_RIGHT:
            inside &= col[None, :] <= (row + (shift + right))[:, None]
        if mask.dtype.element_ty.is_int():
            visible = tl.load(pointers, mask=inside, other=0) != 0
        else:
            tile = tl.load(pointers, mask=inside, other=float("-inf"))
            visible = (tile.to(tl.float32) <= _MASKED_SCORE) == 0  # NaN is visible
        total += tl.sum((visible & inside).to(tl.int32), 1)
    offset = (batch.to(tl.int64) * heads + head) * q_len
    tl.store(count + offset + row, total, mask=row < q_len)


# Host side.


class Band(NamedTuple):
    """Row i sees the keys i + shift - left ... i + shift + right, where has_left, has_right."""

    left: int
    right: int
    has_left: bool
    has_right: bool


def band_of(options: Options, q_len: int, kv_len: int) -> Band:
    """The band, without the sides that hide no key (e.g. a causal mask when decoding one token)."""
    shift, left, right = options.band(q_len, kv_len)
    has_left = left is not None and q_len - 1 + shift - left > 0
    has_right = right is not None and shift + right < kv_len - 1
    # Longer than everything is all; so the kernels' sums stay within int32.
    longest = q_len + kv_len
    return Band(min(left or 0, longest), min(right or 0, longest), has_left, has_right)


class Tile(NamedTuple):
    """A tile configuration. One program has ``subtiles`` blocks of rows that take turns on the matrix units."""

    rows: int
    keys: int
    subtiles: int
    warps: int
    stages: int
    registers: int = 0
    """Per thread, at most, if positive: so that more programs fit on a multiprocessor."""

    def launch_options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


@functools.cache
def device_limits(index: int) -> tuple[int, int, int]:
    """(compute capability * 10, shared memory per program in bytes, multiprocessors) of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    return properties.major * 10 + properties.minor, shared, properties.multi_processor_count


def limits_of(tensor: Tensor) -> tuple[int, int, int]:
    """device_limits; on a CPU (the interpreter) those of an H100."""
    if tensor.device.type != "cuda":
        return 90, 232448, 132
    return device_limits(tensor.device.index or 0)


def fit(tile: Tile, row_bytes: int, key_bytes: int, shared: int) -> Tile:
    """The tile, made smaller until rows and ``stages`` times keys fit into shared memory."""

    def needed() -> int:
        return tile.rows * tile.subtiles * row_bytes + tile.keys * key_bytes * max(1, tile.stages) + 4096

    while needed() > shared:
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.subtiles > 1:
            tile = tile._replace(subtiles=1)
        elif tile.keys > 32:
            tile = tile._replace(keys=tile.keys // 2)
        elif tile.stages > 1:
            tile = tile._replace(stages=1)
        elif tile.rows > 16:
            tile = tile._replace(rows=tile.rows // 2)
        elif tile.keys > 16:
            tile = tile._replace(keys=tile.keys // 2)
        else:
            break
    return tile


def short_rows(tile: Tile, rows: int) -> Tile:
    """The tile for few rows: no larger than needed."""
    if rows <= tile.rows * (tile.subtiles - 1):
        tile = tile._replace(subtiles=1, warps=max(4, tile.warps // 2), registers=0)
    size = max(16, triton.next_power_of_2(rows))
    if size < tile.rows:
        tile = tile._replace(rows=size, warps=4, registers=0)
    return tile


def width(dim: int) -> int:
    """A head dimension as the tiles hold it."""
    return max(16, triton.next_power_of_2(dim))


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides_of(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """The first strides, 0 where the tensor is broadcast."""
    if tensor is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape[:dims], tensor.stride(), strict=False))


def stride_unit(*strides: tuple[int, ...]) -> int:
    """8, if it divides all strides, else 1. Kernels get strides in this unit: so the compiler knows it, and loads
    16 bytes at once, for head_dims that are no multiple of 16, too."""
    return 8 if all(stride % 8 == 0 for each in strides for stride in each) else 1


def in_units(names: Sequence[str], strides: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """The strides as kernel arguments."""
    unit = stride_unit(*strides)
    flat = [stride // unit for each in strides for stride in each]
    return {**dict(zip(names, flat, strict=True)), "UNIT": unit}


def tma_fits(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can hold [B, H, N, D] tensors as they lie in memory."""
    for tensor in tensors:
        size = tensor.element_size()
        if tensor.data_ptr() % 16 or tensor.stride(3) != 1 or tensor.shape[3] * size < 16:
            return False
        for length, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            # An expanded dimension has stride 0, which a descriptor does not take.
            if length > 1 and (stride <= 0 or stride * size % 16 or stride * size >= 1 << 40):
                return False
    return True


def descriptor(tensor: Tensor, rows: int, block_width: int) -> TensorDescriptor:
    size = tensor.element_size()
    # The stride of a dimension of size 1 is never used, but must be valid.
    strides = [
        stride if length > 1 else 16 // size for length, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    strides[3] = 1
    return TensorDescriptor(tensor, list(tensor.shape), strides, [1, 1, rows, block_width])


def precision_of(dtype: torch.dtype) -> str:
    """tl.dot's input_precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def is_plain(attn_mask: Tensor | None, options: Options) -> bool:
    """Nothing that takes many registers per score: no dropout, no softcap, no mask but one that all rows share."""
    return options.dropout_p == 0.0 and options.softcap == 0.0 and (attn_mask is None or attn_mask.shape[2] == 1)


def form_of(
    query: Tensor, bias: Tensor | None, attn_mask: Tensor | None, options: Options, kv_len: int, band: Band
) -> int:
    """Which form of the sigmoid a kernel uses; see the module's docstring."""
    if settings.sigmoid_form != "auto":
        return FAST if settings.sigmoid_form == "fast" else ACCURATE
    # float16 and float32 would show the fast form's 1e-4. Where scores cost much anyway, one form is enough.
    if query.dtype != torch.bfloat16 or not is_plain(attn_mask, options):
        return ACCURATE
    if bias is not None:
        return AUTO
    lowest = options.const_bias
    if options.visible_bias:
        count = kv_len
        if band.has_left and band.has_right:
            count = min(kv_len, band.left + band.right + 1)
        lowest -= math.log(max(count, 1))
        if lowest < FAST_BIAS and (band.has_left or band.has_right or attn_mask is not None):
            return AUTO
    return FAST if lowest >= FAST_BIAS else ACCURATE


def visible_counts(attn_mask: Tensor, q_len: int, kv_len: int, options: Options, band: Band) -> Tensor:
    """How many keys each row sees, int32 [B|1, H|1, M|1], under a mask and a band.

    A mask that all rows (and all heads, all batch entries) share is counted once, unless a band tells rows apart.
    """
    batch, heads, rows, keys = attn_mask.shape
    banded = band.has_left or band.has_right
    if not banded and keys == kv_len and keys > 1 and rows == 1:
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask <= MASKED_SCORE
        return (keys - hidden.sum(-1)).to(torch.int32)
    if banded:
        rows = q_len
    count = torch.empty((batch, heads, rows), dtype=torch.int32, device=attn_mask.device)
    block_m, block_n = (1, 1024) if rows == 1 else (16, 128)
    grid = (triton.cdiv(rows, block_m) * heads * batch,)
    # With rows == 1 there is no band, and q_len is the number of rows only.
    _count_kernel[grid](
        attn_mask, count, *strides_of(attn_mask, 4), heads, rows, kv_len, band.left, band.right,
        HAS_LEFT=band.has_left, HAS_RIGHT=band.has_right, BOTTOM_RIGHT=options.bottom_right,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return count


def row_bias_tensor(bias: Tensor | None, arguments: dict[str, Any], device: torch.device) -> Tensor:
    """b_i, float32 [B|1, H|1, M], from common_arguments()."""
    count = arguments["count"]
    shapes = [tensor.shape[:2] for tensor in (bias, count) if tensor is not None]
    batch, heads = (max((shape[dim] for shape in shapes), default=1) for dim in (0, 1))
    out = torch.empty((batch, heads, arguments["q_len"]), dtype=torch.float32, device=device)
    names = [f"stride_{tensor}_{dim}" for tensor in ("bias", "count") for dim in "bhm"]
    names += ["bias", "count", "q_len", "kv_len", "left", "right", "const_bias"]
    names += ["VISIBLE", "HAS_LEFT", "HAS_RIGHT", "BOTTOM_RIGHT"]
    grid = (triton.cdiv(out.shape[2], 256) * heads * batch,)
    _bias_kernel[grid](out, heads=heads, **{name: arguments[name] for name in names}, BLOCK_M=256)
    return out


def common_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    *,
    count: Tensor | None,
    q_len: int,
    kv_len: int,
    band: Band,
) -> dict[str, Any]:
    """The arguments that every attention kernel has, but for query, key, value and their strides."""
    names = [f"stride_bias_{n}" for n in "bhm"] + [f"stride_count_{n}" for n in "bhm"]
    names += [f"stride_mask_{n}" for n in "bhmn"]
    strides = strides_of(bias, 3) + strides_of(count, 3) + strides_of(attn_mask, 4)
    return {
        "bias": bias,
        "count": count,
        "mask": attn_mask,
        "seed": seed if options.dropout_p > 0.0 else None,
        **dict(zip(names, strides, strict=True)),
        "heads": query.shape[-3] if query.dim() == 4 else query.shape[1],
        "group": query.shape[1] // max(1, key.shape[1]),
        "q_len": q_len,
        "kv_len": kv_len,
        "left": band.left,
        "right": band.right,
        "scale": options.scale,
        "softcap": options.softcap,
        "const_bias": options.const_bias,
        "dropout_p": options.dropout_p,
        "HEAD_DIM": query.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "BLOCK_D": width(query.shape[-1]),
        "BLOCK_DV": width(value.shape[-1]),
        "BIAS_ROWS": bias is not None and bias.shape[2] > 1,
        # A mask that all rows share is loaded as one row per tile.
        "MASK_ROWS": attn_mask is not None and attn_mask.shape[2] > 1,
        "VISIBLE": options.visible_bias,
        "HAS_LEFT": band.has_left,
        "HAS_RIGHT": band.has_right,
        "BOTTOM_RIGHT": options.bottom_right,
        "SOFTCAP": options.softcap > 0.0,
        "ASM": isinstance(_count_kernel, triton.JITFunction),
        "PRECISION": precision_of(query.dtype),
    }
