"""How tensors lie in memory: all that a launch needs to know of them but their addresses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sigswap.kernels.host.recording import recording

UNIT = 8
"""Elements: 16 bytes in half precision, which is what a thread loads at once."""


class Layout(NamedTuple):
    """All that a launch needs to know of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool
    """Whether it starts at a multiple of 16 bytes."""

    def strides_or_zero(self, dims: int) -> tuple[int, ...]:
        """The first strides, 0 where there is one element: its index is 0, or it is broadcast."""
        pairs = zip(self.shape, self.strides[:dims], strict=False)  # parts of a torch.Size take long to make
        return tuple([0 if size == 1 else stride for size, stride in pairs])


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, is_aligned(tensor))


def is_aligned(tensor: Tensor) -> bool:
    if recording.by is None:
        return tensor.data_ptr() % 16 == 0
    # Inductor aligns what it allocates and what it is given.
    return bool(tensor.storage_offset() * tensor.itemsize % 16 == 0)


def contiguous_layout(shape: Iterable[int], dtype: torch.dtype = torch.int32) -> Layout:
    """The layout of a new tensor."""
    sizes = tuple(shape)
    strides = tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
    return Layout(sizes, strides, dtype, True)


def new_tensor(layout: Layout, device: torch.device) -> Tensor:
    """Uninitialised."""
    # torch.empty takes twice as long.
    return torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=device)


def are_wide(strides: Iterable[tuple[int, ...]]) -> bool:
    """Whether a block's rows, at most 256, may be 2^31 elements apart, or more."""
    return any(stride[2] >= 1 << 23 for stride in strides)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is not contiguous."""
    return tensor if has_unit_stride(tensor.shape, tensor.stride()) else tensor.contiguous()


def has_unit_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 or shape[-1] == 1


def has_whole_rows(layout: Layout) -> bool:
    """Whether the rows of a [B, H, N, D] tensor start at multiples of :data:`UNIT` elements from its first one."""
    return all(stride % UNIT == 0 for stride in layout.strides_or_zero(3))


def is_whole(layout: Layout) -> bool:
    """Whether kernels read a [B, H, N, D] tensor as it lies, by rows that start at such multiples."""
    return has_unit_stride(layout.shape, layout.strides) and has_whole_rows(layout)


def whole_rows(tensor: Tensor) -> Tensor:
    """The tensor if it :func:`is_whole`, or a copy that is, with room between its rows."""
    if is_whole(layout_of(tensor)):
        return tensor
    dim = tensor.shape[3]
    return tensor.new_empty((*tensor.shape[:3], -(-dim // UNIT) * UNIT))[..., :dim].copy_(tensor)


def readable_mask(attn_mask: Tensor) -> Tensor:
    """The mask, copied if its rows are read for each sequence and head, and their numbers are not neighbours in memory:
    as T5's, which is an embedding with the heads last. Then the copy is the smaller part of what reading it costs."""
    if has_readable_rows(layout_of(attn_mask)):
        return attn_mask
    # What is expanded stays so.
    own = attn_mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in attn_mask.stride())]
    return own.contiguous().expand(attn_mask.shape)


def has_readable_rows(mask: Layout) -> bool:
    return mask.shape[2] == 1 or mask.shape[3] == 1 or mask.strides[3] <= 1


def width(dim: int) -> int:
    """A head dimension as the tiles hold it."""
    return max(16, next_power_of_2(dim))


def next_power_of_2(number: int) -> int:
    """The least power of 2 that is not below the number; Triton's, without Triton."""
    return 1 << max(0, number - 1).bit_length()


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up; Triton's takes the host sixty times as long."""
    return -(-number // divisor)


def output_layout(query: tuple[int, ...], value: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The output's shape and strides, for shapes of query and value."""
    batch, heads, q_len, _ = query
    dim = value[3]
    return (batch, heads, q_len, dim), (q_len * heads * dim, dim, heads * dim, 1)


def heads_first(packed: Tensor) -> Tensor:
    """[total, H, D] as [1, H, total, D]; a view."""
    return packed.transpose(0, 1).unsqueeze(0)


def by_rows(bias: Tensor) -> Tensor:
    """A row bias [1|total, 1|H] of packed sequences as [1, 1|H, 1|total, 1]; a view."""
    return bias.t()[None, :, :, None]
