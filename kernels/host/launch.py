"""The host side of the Triton kernels: from tensors to launches, at little cost per call.

What a launch needs (tile, band, strides, grid, the compiled kernel) depends on the tensors' layouts, not on their
values. So it is worked out once per :class:`Signature`, and kept: ``functools.lru_cache`` holds the signatures and the
plans of each kernel's module, and :class:`Launch` the compiled kernel, past Triton's binder, which takes longer than
the kernels of short sequences run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sigswap.kernels import settings
from sigswap.kernels.reference import Options, empty_gradients, output_layout
from sigswap.kernels.triton.common import (
    ACCURATE,
    AUTO,
    CUBIC_TAIL,
    CUBIC_TAIL_BIAS,
    FAST,
    FAST_BIAS,
    ROW_BIAS_BLOCK,
    TAIL,
    bias_kernel,
    count_kernel,
)

FEW_SCORES = 1 << 24
"""Fewer take the GPU less time than a call takes the host, to which tensor descriptors add: two of them more than a
launch. So there are none, though the GPU would be faster with them."""

MAX_PLANS = 4096
"""Signatures whose plans are kept, per kernel. A generated token makes a new one: its cache is longer by one."""


class Layout(NamedTuple):
    """All that a launch needs to know of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool
    """Whether it starts at a multiple of 16 bytes."""

    def strides_or_zero(self, dims: int) -> tuple[int, ...]:
        """The first strides, 0 where there is one element: its index is 0, or it is broadcast."""
        return tuple(0 if size == 1 else stride for size, stride in zip(self.shape[:dims], self.strides, strict=False))


class Packed(NamedTuple):
    """Sequences one behind the other. Sequence i is the rows cu_q[i] ... cu_q[i + 1] of query, likewise of key."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int


class Band(NamedTuple):
    """Row i sees the keys i + shift - left ... i + shift + right, where has_left, has_right."""

    left: int
    right: int
    has_left: bool
    has_right: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """What plans depend on. query, key and value are [B, H, N, D]; of packed sequences [1, H, total, D].

    :func:`signature_of` gives the same object for what is equal, so that plans are looked up by its identity.
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
        return all(_has_unit_stride(each.shape, each.strides) for each in inputs) and (
            self.attn_mask is None or _has_readable_rows(self.attn_mask)
        )

    @functools.cached_property
    def gradient_layouts(self) -> dict[tuple[bool, ...] | None, tuple[Layout | None, ...]]:
        """The layouts of new gradients by output_mask, where gradients_for() found all to be written in themselves."""
        return {}

    def output(self) -> Layout:
        """Of a new output."""
        shape, strides = output_layout(self.query.shape, self.value.shape)
        return Layout(shape, strides, self.query.dtype, True)

    @property
    def widths(self) -> tuple[int, int]:
        """head_dim and value's head_dim as the tiles hold them."""
        return width(self.query.shape[3]), width(self.value.shape[3])

    @property
    def plain(self) -> bool:
        """Nothing that takes many registers per score: no dropout, no softcap, no mask but one that all rows share."""
        shared = self.attn_mask is None or self.attn_mask.shape[2] == 1
        return shared and self.options.dropout_p == 0.0 and self.options.softcap == 0.0

    @property
    def only_masked(self) -> bool:
        """A mask with rows of its own is all that is not plain."""
        return not self.plain and self.options.dropout_p == 0.0 and self.options.softcap == 0.0

    @property
    def counted(self) -> bool:
        """Whether the visible keys of a row are counted, rather than known from its number."""
        return self.attn_mask is not None and self.options.visible_bias

    @property
    def has_rows(self) -> bool:
        """Whether each row has a bias of its own, not one for the head."""
        band = self.band()
        visible = self.options.visible_bias and (band.has_left or band.has_right or self.counted)
        return visible or (self.bias is not None and self.bias.shape[2] > 1)

    def band(self) -> Band:
        """The band, without the sides that hide no key (e.g. a causal mask when decoding one token)."""
        shift, left, right = self.options.band(self.q_len, self.kv_len)
        has_left, has_right = left is not None, right is not None
        if self.packed is None:  # else each sequence has its own lengths
            has_left = left is not None and self.q_len - 1 + shift - left > 0
            has_right = right is not None and shift + right < self.kv_len - 1
        return Band(left or 0, right or 0, has_left, has_right)

    @property
    def mixed_forms(self) -> bool:
        """Whether kernels may use other forms of the sigmoid than the accurate one, each where it is good enough.

        float32 would show their errors. Where scores cost much anyway, one form is enough.
        """
        return self.sigmoid_form == "auto" and self.element_size == 2 and self.plain

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
        if not self.mixed_forms:
            return ACCURATE
        if self.query.dtype == torch.bfloat16:
            return TAIL
        return CUBIC_TAIL if self._lowest_bias() <= CUBIC_TAIL_BIAS else ACCURATE

    def _lowest_bias(self) -> float:
        """Of all rows, without the tensor of biases."""
        lowest = self.options.const_bias
        if self.options.visible_bias:
            band = self.band()
            count = self.kv_len
            if band.has_left and band.has_right:
                count = min(count, band.left + band.right + 1)
            lowest -= math.log(max(count, 1))
        return lowest

    def tma(self, shortest: int) -> bool:
        """Whether tensor descriptors of [B, H, N, D] tensors pay off, for tensors that are describable()."""
        if not (self.descriptors and self.plain and capability(self.device) >= 90 and self.element_size == 2):
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
        unit = 8 if all(stride % 8 == 0 for each in strides for stride in each) else 1
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
            "mask_batches": self.attn_mask.shape[0] if self.attn_mask is not None else 1,
            "left": band.left,
            "right": band.right,
            "scale": options.scale,
            "softcap": options.softcap,
            "const_bias": options.const_bias,
            "dropout_p": options.dropout_p,
            "HEAD_DIM": self.query.shape[3],
            "VALUE_DIM": self.value.shape[3],
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "BIAS_ROWS": self.bias is not None and self.bias.shape[2] > 1,
            # A mask that all rows share is loaded as one row per tile.
            "MASK_ROWS": self.attn_mask is not None and self.attn_mask.shape[2] > 1,
            "VISIBLE": options.visible_bias,
            "HAS_LEFT": band.has_left,
            "HAS_RIGHT": band.has_right,
            "BOTTOM_RIGHT": options.bottom_right,
            "SOFTCAP": options.softcap > 0.0,
            "DROPOUT": options.dropout_p > 0.0,
            # Small probabilities would be subnormal in float16; they are held times 1024 there.
            "P_SCALE": 1024.0 if self.query.dtype == torch.float16 else 1.0,
            "FORM": self.form(),
            "SLOW": self.slow_form(),
            "ASM": isinstance(count_kernel, triton.JITFunction),
            "PRECISION": "tf32" if self.allow_tf32 else "ieee",
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


def signature_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    options: Options,
    packed: Packed | None = None,
) -> Signature:
    """query, key and value are of one dtype, on one device."""
    dtype, recorder = query.dtype, _recording.by
    return _signature(
        query.shape,
        query.stride(),
        key.shape,
        key.stride(),
        value.shape,
        value.stride(),
        (_is_aligned(query), _is_aligned(key), _is_aligned(value)),
        (dtype, key.dtype, value.dtype),
        query.device,
        None if bias is None else layout_of(bias),
        None if attn_mask is None else layout_of(attn_mask),
        options,
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


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, _is_aligned(tensor))


def _is_aligned(tensor: Tensor) -> bool:
    if _recording.by is None:
        return tensor.data_ptr() % 16 == 0
    return tensor.storage_offset() * tensor.itemsize % 16 == 0  # inductor aligns what it allocates and what it is given


def are_wide(strides: Iterable[tuple[int, ...]]) -> bool:
    """Whether a block's rows, at most 256, may be 2^31 elements apart, or more."""
    return any(stride[2] >= 1 << 23 for stride in strides)


def contiguous_layout(shape: Iterable[int], dtype: torch.dtype = torch.int32) -> Layout:
    """The layout of a new tensor."""
    sizes = tuple(shape)
    strides = tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
    return Layout(sizes, strides, dtype, True)


def new_tensor(layout: Layout, device: torch.device) -> Tensor:
    """Uninitialised."""
    # torch.empty takes twice as long.
    return torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=device)


def output_arguments(arguments: dict[str, Any], **outputs: Layout | None) -> dict[str, Any]:
    """Strides of outputs [B, H, N, ...], named as in Signature.arguments(), but in elements; and WIDE for all."""
    strides = {name: (0, 0, 0) if layout is None else layout.strides_or_zero(3) for name, layout in outputs.items()}
    named = {f"stride_{name}_{dim}": s for name, each in strides.items() for dim, s in zip("bhn", each, strict=True)}
    return named | {"WIDE": arguments["WIDE"] or are_wide(strides.values())}


def width(dim: int) -> int:
    """A head dimension as the tiles hold it."""
    return max(16, triton.next_power_of_2(dim))


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if _has_unit_stride(tensor.shape, tensor.stride()) else tensor.contiguous()


def _has_unit_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 or shape[-1] == 1


Gradients = tuple[Tensor | None, ...]
"""Of query, key, value, bias and attn_mask; None: not needed."""


def gradients_for(
    signature: Signature, inputs: Gradients, output_mask: Sequence[bool], grads: Gradients | None = None
) -> tuple[Gradients, Gradients, tuple[Layout | None, ...]]:
    """The gradients of the inputs, uninitialised; where they are written; and the layouts of that.

    They are written in themselves, but for the first three, which kernels write: in new tensors, where the last
    dimension is strided. signature: of these inputs. grads: the gradients, if they exist already.
    """
    needed = tuple(output_mask) if grads is None else None
    grads = grads or empty_gradients(inputs, output_mask)
    if needed in signature.gradient_layouts:
        return grads, grads, signature.gradient_layouts[needed]
    written = list(grads)
    for index, grad in enumerate(grads[:3]):
        if grad is not None and not _has_unit_stride(grad.shape, grad.stride()):
            written[index] = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    layouts = tuple([None if new is None else layout_of(new) for new in written])
    if needed is not None and all(new is grad for new, grad in zip(written, grads, strict=True)):
        signature.gradient_layouts[needed] = layouts
    return grads, tuple(written), layouts


def hand_over(grads: Gradients, written: Gradients) -> None:
    """Copies to the gradients what was written in new tensors."""
    if written is grads:
        return
    for grad, new in zip(grads, written, strict=True):
        if grad is not None and grad is not new:
            grad.copy_(new)


def readable_mask(attn_mask: Tensor) -> Tensor:
    """The mask, copied if its rows are read for each sequence and head, and their numbers are not neighbours in memory:
    as T5's, which is an embedding with the heads last. Then the copy is the smaller part of what reading it costs."""
    if _has_readable_rows(layout_of(attn_mask)):
        return attn_mask
    # What is expanded stays so.
    own = attn_mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in attn_mask.stride())]
    return own.contiguous().expand(attn_mask.shape)


def _has_readable_rows(mask: Layout) -> bool:
    return mask.shape[2] == 1 or mask.shape[3] == 1 or mask.strides[3] <= 1


# Launches.


class Described:
    """How a kernel gets a tensor as a tensor descriptor."""

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.shape, self.strides, self.block, self.dtype = shape, strides, block, dtype
        self._kind: type = TensorDescriptor
        self._checked: dict[str, Any] | None = None

    def describe(self, tensor: Tensor) -> Any:
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block))

    def __call__(self, tensor: Tensor) -> Any:
        if _recording.by is not None:
            return tensor
        # Making one checks what is the same in all tensors of a layout. That takes as long as the launch.
        if self._checked is None:
            descriptor = self.describe(tensor)
            self._kind, self._checked = type(descriptor), vars(descriptor) | {"base": None}  # no plan keeps a tensor
            return descriptor
        descriptor = object.__new__(self._kind)
        vars(descriptor).update(self._checked)
        descriptor.base = tensor
        return descriptor


def by_rows(layout: Layout, rows: int) -> Described:
    """A describable [B, H, N, D] tensor, in blocks of rows."""
    # The stride of a dimension of size 1 is never used, but must be valid.
    unit = 16 // layout.dtype.itemsize
    strides = [unit if size == 1 else s for size, s in zip(layout.shape[:3], layout.strides, strict=False)]
    return Described(tuple(layout.shape), (*strides, 1), (1, 1, rows, width(layout.shape[3])), layout.dtype)


def describable(layout: Layout) -> bool:
    """Whether a tensor descriptor can hold a [B, H, N, D] tensor as it lies in memory."""
    size = layout.dtype.itemsize
    if not layout.aligned or layout.strides[3] != 1 or layout.shape[3] * size < 16:
        return False
    # An expanded dimension has stride 0, which a descriptor does not take.
    return all(
        length == 1 or (stride > 0 and stride * size % 16 == 0 and stride * size < 1 << 40)
        for length, stride in zip(layout.shape[:3], layout.strides[:3], strict=True)
    )


class Launch:
    """A kernel with its grid and every argument but the tensors, which come first in its signature.

    Triton's launch hooks work. Its debugging switches (``knobs``) count when a kernel is compiled, at its first launch.

    tensors: their layouts; None: not given.
    arguments: the others by name; those that the kernel does not have are left out. UPPER-CASE ones are constants.
    """

    def __init__(
        self,
        kernel: Any,
        blocks: int,
        device: torch.device,
        tensors: tuple[Layout | Described | None, ...],
        arguments: dict[str, Any],
        **options: int,
    ) -> None:
        names = kernel.arg_names[len(tensors) :]
        self._kernel = kernel
        self._grid = (blocks, 1, 1)
        self._rest = tuple(arguments[name] for name in names)
        self._options = options
        # What Triton compiles another kernel for.
        self._key = (
            kernel,
            device,
            tuple(_tensor_key(tensor) for tensor in tensors),
            tuple(_scalar_key(name, value) for name, value in zip(names, self._rest, strict=True)),
            tuple(options.items()),
        )
        self._device = device.index
        self._compiled: Any = None

    def __call__(self, *tensors: Tensor | TensorDescriptor | None) -> None:
        compiled = self._compiled
        if _recording.by is not None:
            _recording.by.record(self._kernel, self._grid, (*tensors, *self._rest), self._options)
        elif compiled is None:
            self._launch_first(*tensors)
        elif _have_hooks():
            compiled[self._grid](*tensors, *self._rest)
        else:  # what Triton does in the line above, without looking for the device and for hooks
            stream = torch._C._cuda_getCurrentRawStream(self._device)
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(*self._grid, stream, function, metadata, None, None, None, *tensors, *self._rest)

    def _launch_first(self, *tensors: Tensor | TensorDescriptor | None) -> None:
        """Compiles the kernel, unless it is. Triton's interpreter compiles nothing."""
        compiled = _compiled.get(self._key)
        if compiled is None:
            compiled = self._kernel[self._grid](*tensors, *self._rest, **self._options)
            if compiled is not None:
                _compiled[self._key] = compiled
        else:
            compiled[self._grid](*tensors, *self._rest)
        self._compiled = compiled


def _have_hooks() -> bool:
    """Whether anyone is told of Triton's launches, such as a profiler."""
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain of hooks, or one


_compiled: dict[Any, Any] = {}


class Recorder(NamedTuple):
    """What gets a thread's launches instead of the GPU; their tensors may be fake."""

    record: Callable[[Any, tuple[int, int, int], tuple[Any, ...], dict[str, int]], None]
    """``record(kernel, grid, arguments, options)``"""
    descriptors: bool
    """Whether the launches may be given tensor descriptors."""


class _Recording(threading.local):
    by: Recorder | None = None


_recording = _Recording()


@contextmanager
def recorded_by(
    record: Callable[[Any, tuple[int, int, int], tuple[Any, ...], dict[str, int]], None], *, descriptors: bool
) -> Iterator[None]:
    """This thread's launches go to ``record``."""
    _recording.by = Recorder(record, descriptors)
    try:
        yield
    finally:
        _recording.by = None


def _tensor_key(tensor: Layout | Described | None) -> Any:
    if isinstance(tensor, Described):
        return tensor.dtype, tensor.block
    return None if tensor is None else (tensor.dtype, tensor.aligned)


def _scalar_key(name: str, value: Any) -> Any:
    if name.isupper() or not isinstance(value, int):
        return value if name.isupper() else None
    # Kernels have lengths and strides of their operands unspecialised; of the others 1 and multiples of 16 differ.
    return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31


# Tile configurations.


class Tile(NamedTuple):
    """A tile configuration."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0
    """Per thread, at most, if positive: so that more programs fit on a multiprocessor."""

    def launch_options(self) -> dict[str, int]:
        # The sigmoid takes elements by twos, so every thread must have two of a tile.
        options = {"num_warps": min(self.warps, self.rows * self.keys // 64), "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


class Limits(NamedTuple):
    """Of a device."""

    capability: int
    """Compute capability times 10."""
    shared: int
    """Shared memory per program, in bytes."""
    multiprocessors: int


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """Of a CUDA device; on a CPU (the interpreter) those of an H100."""
    if device.type != "cuda":
        return Limits(90, 232448, 132)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    return Limits(properties.major * 10 + properties.minor, shared, properties.multi_processor_count)


def capability(device: torch.device) -> int:
    return limits_of(device).capability


def fit(tile: Tile, row_bytes: int, key_bytes: int, shared: int) -> Tile:
    """The tile, made smaller until rows and ``stages`` times keys fit into shared memory."""

    def needed() -> int:
        return tile.rows * row_bytes + tile.keys * key_bytes * max(1, tile.stages) + 4096

    while needed() > shared:
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
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


# Kernels that come before others.


class Counts(NamedTuple):
    """Counts how many keys each row sees, int32 [b, H|1, M|1], under a mask [b, ...] and a band."""

    launch: Launch
    layout: Layout

    def __call__(self, attn_mask: Tensor) -> Tensor:
        count = new_tensor(self.layout, attn_mask.device)
        self.launch(attn_mask, count)
        return count


def counts_for(signature: Signature) -> Counts | None:
    """None: they are known without counting."""
    if not signature.counted:
        return None
    batch, heads, rows = signature.count_shape()
    block_m, block_n = (1, 1024) if rows == 1 else (16, 128)
    arguments = signature.arguments() | {"heads": heads, "q_len": rows, "BLOCK_M": block_m, "BLOCK_N": block_n}
    # With rows == 1 there is no band, and q_len is the number of rows only.
    blocks = triton.cdiv(rows, block_m) * heads * batch
    layout = contiguous_layout((batch, heads, rows))
    launch = Launch(count_kernel, blocks, signature.device, (signature.attn_mask, layout), arguments)
    return Counts(launch, layout)


class RowBiases(NamedTuple):
    """Works out b_i, and the least of each block of rows."""

    launch: Launch
    layout: Layout
    """Of b_i: float32 [B|1, H|1, M], of packed sequences [1, H|1, total]. If not packed, rows are a multiple of 4
    long, so that descriptors can hold them; the added ones are finite."""
    floor: Layout | None
    """Of the least of each block of rows, float32 [B|1, H|1, blocks], or [sequences, ...] if packed; None if no
    kernel asks for it."""

    def __call__(
        self, bias: Tensor | None, count: Tensor | None, packed: Packed | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        out = new_tensor(self.layout, device)
        floor = None if self.floor is None else new_tensor(self.floor, device)
        self.launch(out, floor, bias, count, *cu_tensors(packed))
        return out, floor


def row_biases_for(signature: Signature) -> RowBiases | None:
    """None: a head's rows all have the same."""
    if not signature.has_rows:
        return None
    shapes = [signature.bias.shape[:2]] if signature.bias is not None else []
    shapes += [signature.count_shape()[:2]] if signature.counted else []
    batch, heads = (max((shape[dim] for shape in shapes), default=1) for dim in (0, 1))
    batch = 1 if batch == 1 else signature.batch  # a mask's batch size may be a divisor
    rows = signature.query.shape[2] if signature.packed else triton.cdiv(signature.q_len, 4) * 4
    out = contiguous_layout((batch, heads, rows), torch.float32)
    sequences = signature.batch if signature.packed else batch
    blocks = triton.cdiv(signature.q_len, ROW_BIAS_BLOCK)
    floor = contiguous_layout((sequences, heads, blocks), torch.float32) if signature.form() == AUTO else None
    arguments = signature.arguments() | {"heads": heads, "BLOCK_M": ROW_BIAS_BLOCK, "stride_out_h": rows}
    tensors = (out, floor, *signature.side_layouts()[:2], *cu_layouts(signature))
    return RowBiases(Launch(bias_kernel, blocks * heads * sequences, signature.device, tensors, arguments), out, floor)


def cu_tensors(packed: Packed | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if packed is None else (packed.cu_q, packed.cu_k)


def cu_layouts(signature: Signature) -> tuple[Layout | None, Layout | None]:
    """cu_seqlens are contiguous. Whether they are aligned does not matter to loads of single numbers."""
    layout = contiguous_layout((2,)) if signature.packed is not None else None
    return layout, layout
