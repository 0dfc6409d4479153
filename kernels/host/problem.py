"""The problem that a kernel solves, as one record, and its signature, which the plans of launches depend on.

What a launch needs (tile, band, strides, grid, the compiled kernel) depends on the tensors' layouts, not on their
values. So it is worked out once per :class:`Signature`, and kept: ``functools.lru_cache`` holds the signatures and the
plans of each kernel's module. Nothing here needs Triton.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sigswap.kernels import settings
from sigswap.kernels.host.blocks import Blocks
from sigswap.kernels.host.forms import (
    ACCURATE,
    AUTO,
    CUBIC_TAIL,
    CUBIC_TAIL_BIAS,
    EXACT_TANH,
    FAST,
    FAST_BIAS,
    NO_TANH,
    SHORT_TANH,
    TAIL,
)
from sigswap.kernels.host.layout import (
    UNIT,
    Layout,
    are_wide,
    contiguous_layout,
    has_readable_rows,
    has_unit_stride,
    has_whole_rows,
    is_aligned,
    is_whole,
    layout_of,
    output_layout,
    readable_mask,
    unit_stride,
    width,
)
from sigswap.kernels.host.recording import recording
from sigswap.kernels.host.tiles import limits_of

FEW_SCORES = 1 << 24
"""Fewer take the GPU less time than a call takes the host, to which tensor descriptors add: two of them more than a
launch. So there are none, though the GPU would be faster with them."""

LOWEST_MIXED_CAP = 1 / 16
"""With a lower row cap no sigmoids are of the fast form (:attr:`Signature.mixed_forms`)."""

LOW_CAP_TAIL_KEYS = 2048
"""With a lower row cap, and as many keys that a row may see, sigmoids are of a tail form: rows that need such a cap sum
to little, so that nearly all probabilities are small. Of fewer keys too many are not. Worked out, not measured."""

MAX_HEAD_DIM = 256
"""Of the Triton kernels, but for wide heads."""

WIDEST_HEAD_DIM, WIDEST_VALUE_DIM = 576, 512
"""Of the Triton kernels of wide heads (:mod:`sigswap.kernels.triton.wide_heads`): those of latent attention."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MAX_PLANS = 4096
"""Signatures whose plans are kept, per kernel. A generated token makes a new one: its cache is longer by one."""


class Options(NamedTuple):
    """The arguments of ``sigswap::sigmoid_attention`` that are not tensors, with the schema's defaults."""

    scale: float
    const_bias: float = 0.0
    visible_bias: bool = True
    is_causal: bool = False
    bottom_right: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    row_cap: float = 0.0

    def band(self, q_len: int, kv_len: int) -> tuple[int, int | None, int | None]:
        """Row i sees the keys i + shift - left ... i + shift + right; None: no limit on that side."""
        shift = kv_len - q_len if self.bottom_right else 0
        # Longer than everything is all; sums with it stay within their type.
        longest = q_len + kv_len
        left = min(self.window_left, longest) if self.window_left >= 0 else None
        right = min(self.window_right, longest) if self.window_right >= 0 else None
        return shift, left, 0 if self.is_causal else right


class Packed(NamedTuple):
    """Sequences one behind the other. Sequence i is the rows cu_q[i] ... cu_q[i + 1] of query, likewise of key."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int


class Pages(NamedTuple):
    """Packed sequences of rows, cut by cu_q, whose keys and values lie in pages of a cache.

    key and value are [pages, Hk, page_size, D] then. Key j of sequence b is row j % page_size of the page
    table[b, j // page_size]. The op documents the tensors (:func:`sigswap.kernels.op.paged.sigmoid_attention_paged`).
    """

    cu_q: Tensor
    table: Tensor
    lengths: Tensor
    """Of the sequences, in keys."""
    longest_q: int
    longest_k: int


Gradients = tuple[Tensor | None, ...]
"""Of query, key, value, bias and attn_mask; None: not needed."""


@dataclasses.dataclass(slots=True, eq=False)
class Problem:
    """One call of an attention op, or of its backward, which has ``grad_out``.

    The ops document the tensors (:func:`sigswap.kernels.op.dense.sigmoid_attention`), and have checked them. Packed
    sequences are seen with the heads first, as if they were one: [1, H, total, D], and [1, 1|H, 1|total, 1] of bias.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    attn_mask: Tensor | None
    seed: Tensor | None
    options: Options
    packed: Packed | None = None
    blocks: Blocks | None = None
    """A mask by blocks, in the place of attn_mask. The signature does not say that there is one: kernels that take it
    are in lists of their own in :mod:`sigswap.kernels.dispatch`."""
    pages: Pages | None = None
    """Where keys and values lie in pages. Of them the signature does not say either: for it the rows are one sequence,
    and a page's keys are another one's."""
    out: Tensor | None = None
    """Where the output is written, if that exists already."""
    grad_out: Tensor | None = None
    output_mask: tuple[bool, ...] = ()
    """Which of query, key, value, bias and attn_mask need a gradient."""
    grads: Gradients | None = None
    """Where the gradients are written, if they exist already."""
    row_sums: Tensor | None = None
    """Where the forward writes each row's sum of probabilities, before dropout, if it is asked for: [B, H, M, 1],
    float32 (float64 of a float64 query)."""
    row_delta: Tensor | None = None
    """Of a backward below a row cap, of row_sums' shape and dtype: it is subtracted from dP, after dropout's part in
    it. ``grad_out`` is that of the sums that the cap divides."""
    _signature: Signature | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """What has gradients."""
        return self.query, self.key, self.value, self.bias, self.attn_mask

    @property
    def signature(self) -> Signature:
        known = self._signature
        if known is None:
            known = self._signature = _signature_of(self)
        return known

    def has_signature(self, signature: Signature) -> None:
        """Says what its signature is, which is not looked up then."""
        self._signature = signature

    @property
    def asked_for(self) -> tuple[Any, ...]:
        """What, besides its signature, the choice of a kernel depends on."""
        if self.grad_out is None:
            return self.row_sums is None, self.value_is_of_key
        deterministic = torch.are_deterministic_algorithms_enabled()
        return layout_of(self.grad_out), self.output_mask, self.row_delta is None, deterministic

    @property
    def value_is_of_key(self) -> bool:
        """Whether value is a view of the first channels of a wide key, or may be: in code that is being compiled
        tensors have no addresses."""
        if not self.signature.value_may_be_of_key:
            return False
        return recording.by is not None or self.key.data_ptr() == self.value.data_ptr()

    @property
    def is_uncapped(self) -> bool:
        """Whether rows are plain sums, and these are not asked for."""
        return self.options.row_cap == 0.0 and self.row_sums is None and self.row_delta is None

    @property
    def cu_seqlens(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.packed is None else (self.packed.cu_q, self.packed.cu_k)

    def readable(self, *, masks: bool = True) -> Problem:
        """The same, with copies of what kernels cannot read as it lies; masks: of masks, too."""
        if self.signature.is_readable:
            return self
        query, key, value = unit_stride(self.query), unit_stride(self.key), unit_stride(self.value)
        attn_mask = readable_mask(self.attn_mask) if masks and self.attn_mask is not None else self.attn_mask
        return dataclasses.replace(self, query=query, key=key, value=value, attn_mask=attn_mask)

    def readable_grad_out(self) -> Tensor:
        assert self.grad_out is not None, "this is no backward"
        return unit_stride(self.grad_out)


def problem_of(
    inputs: Sequence[Any], options: Options, *, backward: bool = False, row_sums: Tensor | None = None
) -> Problem:
    """Of the inputs of an attention op: query, key, value, bias, attn_mask and seed; or of its backward: with grad_out
    before them, and output_mask and row_delta behind."""
    if not backward:
        query, key, value, bias, attn_mask, seed = inputs
        return Problem(query, key, value, bias, attn_mask, seed, options, row_sums=row_sums)
    grad_out, query, key, value, bias, attn_mask, seed, output_mask, row_delta = inputs
    problem = Problem(query, key, value, bias, attn_mask, seed, options, grad_out=grad_out, row_delta=row_delta)
    problem.output_mask = tuple(output_mask)
    return problem


class Band(NamedTuple):
    """Row i sees the keys i + shift - left ... i + shift + right, where has_left, has_right."""

    left: int
    right: int
    has_left: bool
    has_right: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """What plans depend on. query, key and value are [B, H, N, D]; of packed sequences [1, H, total, D].

    :attr:`Problem.signature` is the same object for what is equal, so that plans are looked up by its identity.
    """

    query: Layout
    key: Layout
    value: Layout
    bias: Layout | None
    attn_mask: Layout | None
    options: Options
    device: torch.device
    sigmoid_form: str
    allow_tf32: bool
    """Of float32."""
    packed: tuple[int, int, int] | None
    """(sequences, longest query, longest key)."""
    descriptors: bool
    """Whether there may be tensor descriptors."""

    @property
    def batch(self) -> int:
        return self.packed[0] if self.packed else self.query.shape[0]

    @property
    def q_len(self) -> int:
        return self.packed[1] if self.packed else self.query.shape[2]

    @property
    def kv_len(self) -> int:
        return self.packed[2] if self.packed else self.key.shape[2]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def element_size(self) -> int:
        return self.query.dtype.itemsize

    @functools.cached_property
    def is_empty(self) -> bool:
        """Whether there is no key, or nothing in the output."""
        return 0 in self.query.shape[:3] or self.key.shape[2] == 0 or self.value.shape[3] == 0

    @functools.cached_property
    def is_readable(self) -> bool:
        """Whether kernels read query, key, value and mask as they lie, not copies (unit_stride, readable_mask)."""
        inputs = self.query, self.key, self.value
        return all(has_unit_stride(each.shape, each.strides) for each in inputs) and (
            self.attn_mask is None or has_readable_rows(self.attn_mask)
        )

    @functools.cached_property
    def has_narrow_value(self) -> bool:
        """Whether value has at most 32 columns, in half precision, and is not loaded in whole units of 16 bytes.

        Triton 3.6 multiplies by the wrong numbers then, or reads beyond the tensor: of heads of 64, all widths from 1
        to 20 that are no multiple of 8 were wrong on an H200; 33 and 50 columns were right, and so were the gradients.
        Strides come in units only if all operands' do (:meth:`arguments`): so rows of query and key count, too.
        """
        if self.is_empty or self.element_size != 2 or width(self.value.shape[3]) >= 64:
            return False
        whole = self.value.aligned and self.value.shape[3] % UNIT == 0
        return not (whole and all(is_whole(each) for each in (self.query, self.key, self.value)))

    @functools.cached_property
    def value_may_be_of_key(self) -> bool:
        """Whether key is wide, and value lies in memory as a view of its first channels would."""
        key, value = self.key, self.value
        if key.shape[3] <= MAX_HEAD_DIM or value.shape[3] > key.shape[3] or value.dtype != key.dtype:
            return False
        alike = value.strides_or_zero(3) == key.strides_or_zero(3) and value.strides[3] == key.strides[3]
        return alike and self.packed is None

    @functools.cached_property
    def kernels(self) -> dict[Any, Any]:
        """Those that were chosen for it, by what they were chosen from and for (:mod:`sigswap.kernels.dispatch`)."""
        return {}

    @functools.cached_property
    def gradient_layouts(self) -> dict[tuple[bool, ...] | None, tuple[Layout | None, ...]]:
        """The layouts of new gradients by output_mask, where gradients_for() found all to be written in themselves."""
        return {}

    def too_much(self) -> str | None:
        """Why no Triton kernel takes such tensors but those of wide heads; None: some do."""
        if self.query.dtype not in _DTYPES:
            return f"they compute in float32, which is not enough for {self.query.dtype}"
        if max(self.query.shape[3], self.value.shape[3]) > MAX_HEAD_DIM:
            wide = f"up to {WIDEST_HEAD_DIM}, and {WIDEST_VALUE_DIM} of value, in a forward in half precision without"
            less = "dropout, packed sequences, block masks and, but for latent attention's, pages"
            return f"they hold head_dim up to {MAX_HEAD_DIM} ({wide} {less})"
        if self.query.shape[3] == 0:
            return "they multiply queries of at least one channel"
        return None

    def cu_layouts(self) -> tuple[Layout | None, Layout | None]:
        """cu_seqlens are contiguous. Whether they are aligned does not matter: no thread loads two numbers at once."""
        layout = contiguous_layout((2,)) if self.packed is not None else None
        return layout, layout

    def output(self) -> Layout:
        """Of a new output."""
        shape, strides = output_layout(self.query.shape, self.value.shape)
        return Layout(shape, strides, self.query.dtype, True)

    @property
    def widths(self) -> tuple[int, int]:
        """head_dim and value's head_dim as the tiles hold them."""
        return width(self.query.shape[3]), width(self.value.shape[3])

    @property
    def masked_by_rows(self) -> bool:
        """Whether there is a mask with rows of its own, which takes a load and registers per score."""
        return self.attn_mask is not None and self.attn_mask.shape[2] > 1

    @property
    def biased_by_rows(self) -> bool:
        """Whether there is a bias tensor that differs between rows."""
        return self.bias is not None and self.bias.shape[2] > 1

    @property
    def plain(self) -> bool:
        """Nothing that takes registers per score: no dropout, no softcap, no mask but one that all rows share."""
        return not self.masked_by_rows and self.options.dropout_p == 0.0 and self.options.softcap == 0.0

    @property
    def counted(self) -> bool:
        """Whether the visible keys of a row are counted, rather than known from its number."""
        return self.attn_mask is not None and self.options.visible_bias

    @property
    def has_rows(self) -> bool:
        """Whether each row has a bias of its own, not one for the head."""
        band = self.band()
        visible = self.options.visible_bias and (band.has_left or band.has_right or self.counted)
        return visible or self.biased_by_rows

    def band(self) -> Band:
        """The band, without the sides that hide no key (e.g. a causal mask when decoding one token)."""
        # None of packed sequences is longer than all together, whatever was said to be the longest.
        q_len, kv_len = min(self.q_len, self.query.shape[2]), min(self.kv_len, self.key.shape[2])
        shift, left, right = self.options.band(q_len, kv_len)
        has_left, has_right = left is not None, right is not None
        if self.packed is None:  # else each sequence has its own lengths
            has_left = left is not None and self.q_len - 1 + shift - left > 0
            has_right = right is not None and shift + right < self.kv_len - 1
        return Band(left or 0, right or 0, has_left, has_right)

    @property
    def mixed_forms(self) -> bool:
        """Whether kernels may use the fast form of the sigmoid beside others, each where it is good enough.

        float32 would show its errors, and so would a low row cap, which magnifies rows of which all scores are low.
        Where scores cost much anyway, as with a mask to load, one form is enough.
        """
        return self._may_be_inexact and not self._has_low_cap

    @property
    def _may_be_inexact(self) -> bool:
        return self.sigmoid_form == "auto" and self.element_size == 2 and not self.masked_by_rows

    @property
    def _has_low_cap(self) -> bool:
        return 0.0 < self.options.row_cap < LOWEST_MIXED_CAP

    def form(self) -> int:
        """FAST, AUTO or ACCURATE, which stands for the kernel's SLOW form (:mod:`sigswap.kernels.triton.common`)."""
        if not self.mixed_forms:
            return FAST if self.sigmoid_form == "fast" else ACCURATE
        if self.query.dtype == torch.float16:  # it would show the fast form's error
            return ACCURATE
        if self.bias is not None:
            return AUTO
        return FAST if self._lowest_bias() >= FAST_BIAS else ACCURATE

    def slow_form(self) -> int:
        """TAIL, CUBIC_TAIL or ACCURATE: what the form ACCURATE of form() stands for, and the other one of AUTO."""
        if self._may_be_inexact and self._has_low_cap and self._most_keys() >= LOW_CAP_TAIL_KEYS:
            return TAIL if self.query.dtype == torch.bfloat16 else CUBIC_TAIL  # which is exact where scores are low
        if not self.mixed_forms:
            return ACCURATE
        if self.query.dtype == torch.bfloat16:
            return TAIL
        return CUBIC_TAIL if self._lowest_bias() <= CUBIC_TAIL_BIAS else ACCURATE

    def tanh_form(self) -> int:
        """Of the soft cap."""
        if self.options.softcap == 0.0:
            return NO_TANH
        return SHORT_TANH if self.sigmoid_form == "auto" and self.element_size == 2 else EXACT_TANH

    def _precision(self) -> str:
        """Of products of float32. Three of tf32 numbers are as exact as one (errors of 5e-7 and 7e-7 of an output on an
        H200), in a third of the time; of wide heads they have not been measured."""
        if self.allow_tf32:
            return "tf32"
        return "tf32x3" if max(self.widths) <= 128 else "ieee"

    def _lowest_bias(self) -> float:
        """Of all rows, without the tensor of biases."""
        lowest = self.options.const_bias
        if self.options.visible_bias:
            lowest -= math.log(max(self._most_keys(), 1))
        return lowest

    def _most_keys(self) -> int:
        """That a row may see."""
        band = self.band()
        return min(self.kv_len, band.left + band.right + 1) if band.has_left and band.has_right else self.kv_len

    def tma(self, shortest: int, *, masked: bool = False) -> bool:
        """Whether tensor descriptors pay off, for tensors that are describable(); masked: below a mask with rows."""
        if not self.descriptors or (self.masked_by_rows and not masked) or self.element_size != 2:
            return False
        if limits_of(self.device).capability < 90:
            return False
        scores = self.batch * self.heads * self.q_len * self.kv_len
        return self.packed is None and shortest >= 128 and scores >= FEW_SCORES

    def arguments(self, **operands: Layout) -> dict[str, Any]:
        """Every argument that kernels share, by name; operands get strides ``stride_<name>_b``, ``_h`` and ``_n``.

        Strides of operands are given in units of 8 elements where all allow it (UNIT): so the compiler knows that,
        and loads 16 bytes at once, for head_dims that are no multiple of 16, too.
        """
        options, band = self.options, self.band()
        strides = [layout.strides_or_zero(3) for layout in operands.values()]
        unit = UNIT if all(has_whole_rows(layout) for layout in operands.values()) else 1
        names = [f"stride_{name}_{dim}" for name in operands for dim in "bhn"]
        arguments: dict[str, Any] = dict(zip(names, (s // unit for each in strides for s in each), strict=True))
        bias, count, mask, _ = self.side_layouts()
        for name, layout, dims in (("bias", bias, "bhm"), ("count", count, "bhm"), ("mask", mask, "bhmn")):
            values = layout.strides_or_zero(len(dims)) if layout is not None else (0,) * len(dims)
            arguments |= {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, values, strict=True)}
        block_d, block_dv = self.widths
        return arguments | {
            "heads": self.heads,
            "group": self.heads // max(1, self.kv_heads),
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "total_q": self.query.shape[2],
            "total_k": self.key.shape[2],
            "mask_batches": self.attn_mask.shape[0] if self.attn_mask is not None else 1,
            "left": band.left,
            "right": band.right,
            "scale": options.scale,
            "softcap": options.softcap,
            "const_bias": options.const_bias,
            "dropout_p": options.dropout_p,
            "row_cap": options.row_cap,
            "HEAD_DIM": self.query.shape[3],
            "VALUE_DIM": self.value.shape[3],
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "BIAS_ROWS": self.biased_by_rows,
            # A mask that all rows share is loaded as one row per tile.
            "MASK_ROWS": self.attn_mask is not None and self.attn_mask.shape[2] > 1,
            "VISIBLE": options.visible_bias,
            "HAS_LEFT": band.has_left,
            "HAS_RIGHT": band.has_right,
            "BOTTOM_RIGHT": options.bottom_right,
            "SOFTCAP": self.tanh_form(),
            "DROPOUT": options.dropout_p > 0.0,
            "CAP": options.row_cap > 0.0,
            # Small probabilities would be subnormal in float16; they are held times 1024 there.
            "P_SCALE": 1024.0 if self.query.dtype == torch.float16 else 1.0,
            "FORM": self.form(),
            "SLOW": self.slow_form(),
            "PRECISION": self._precision(),
            "UNIT": unit,
            "WIDE": are_wide(strides),
        }

    def side_layouts(self) -> tuple[Layout | None, Layout | None, Layout | None, Layout | None]:
        """Of bias, count, mask and seed."""
        count = contiguous_layout(self.count_shape()) if self.counted else None
        seed = contiguous_layout((1,), torch.int64) if self.options.dropout_p > 0.0 else None
        return self.bias, count, self.attn_mask, seed

    def count_shape(self) -> tuple[int, int, int]:
        """[b, H|1, M|1] of the counts under a mask [b, ...]: what all rows share is counted once, unless a band tells
        rows apart."""
        assert self.attn_mask is not None
        batch, heads, rows, _ = self.attn_mask.shape
        band = self.band()
        return batch, heads, self.q_len if band.has_left or band.has_right else rows


def _signature_of(problem: Problem) -> Signature:
    query, key, value, bias, attn_mask = problem.inputs
    dtype, packed, recorder = query.dtype, problem.packed, recording.by
    return _signature(
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        (is_aligned(query), is_aligned(key), is_aligned(value)),
        (dtype, key.dtype, value.dtype),
        query.device,
        None if bias is None else layout_of(bias),
        None if attn_mask is None else layout_of(attn_mask),
        problem.options,
        settings.sigmoid_form,
        # allow_tf32 would raise, once this is used.
        dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
        None if packed is None else (packed.cu_q.shape[0] - 1, packed.longest_q, packed.longest_k),
        recorder is None or recorder.descriptors,
    )


@functools.lru_cache(MAX_PLANS)
def _signature(
    query: tuple[int, ...],
    query_strides: tuple[int, ...],
    key: tuple[int, ...],
    key_strides: tuple[int, ...],
    value: tuple[int, ...],
    value_strides: tuple[int, ...],
    aligned: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    device: torch.device,
    bias: Layout | None,
    attn_mask: Layout | None,
    options: Options,
    sigmoid_form: str,
    allow_tf32: bool,
    packed: tuple[int, int, int] | None,
    descriptors: bool,
) -> Signature:
    """From parts that take no time to put together."""
    return Signature(
        Layout(query, query_strides, dtypes[0], aligned[0]),
        Layout(key, key_strides, dtypes[1], aligned[1]),
        Layout(value, value_strides, dtypes[2], aligned[2]),
        bias,
        attn_mask,
        options,
        device,
        sigmoid_form,
        allow_tf32,
        packed,
        descriptors,
    )


def output_arguments(arguments: dict[str, Any], **outputs: Layout | None) -> dict[str, Any]:
    """Strides of outputs [B, H, N, ...], named as in Signature.arguments(), but in elements; and WIDE for all."""
    strides = {name: (0, 0, 0) if layout is None else layout.strides_or_zero(3) for name, layout in outputs.items()}
    named = {f"stride_{name}_{dim}": s for name, each in strides.items() for dim, s in zip("bhn", each, strict=True)}
    return named | {"WIDE": arguments["WIDE"] or are_wide(strides.values())}
