"""A mask by blocks, for :func:`sigswap.sigmoid_attention`: the counterpart of FlexAttention's ``BlockMask``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.kernels.host.blocks import BLOCK, HEADER, Blocks, blocks_of, dense_mask

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``mask_mod(b, h, q_idx, kv_idx)``, as FlexAttention has it: integer tensors to a bool one, True is visible."""


class BlockMask:
    """Which keys each row sees, by blocks of 128 rows and 128 keys: which of them are empty, full, or mixed, and a bit
    for each score in the mixed ones.

    The kernels skip empty blocks, run full ones without a mask, and read the bits of the mixed ones; in their backward,
    too. So a mask costs what is visible, and is held in little memory: documents in a packed sequence, for example.
    One is made once, and used for all layers and steps that have the same mask. It is not to be changed.

    :meth:`from_mask`, :meth:`from_function` and :meth:`from_flex` make one.

    Attributes:
        shape: (B, H, M, N): the batch size or 1, the heads or 1 (1: for all), rows and keys.
        visible: int32 [B, H, M]: how many keys each row sees.
    """

    def __init__(self, blocks: Blocks, q_len: int, kv_len: int) -> None:
        """Of tensors that one of the methods made."""
        self.blocks = blocks
        self.shape: tuple[int, int, int, int] = (blocks.visible.shape[0], blocks.visible.shape[1], q_len, kv_len)

    @classmethod
    def from_mask(cls, mask: Tensor) -> BlockMask:
        """From a bool tensor, True is visible.

        Args:
            mask: [B|1, H|1, M, N], or without the first dimensions, on any device. It is not kept.

        Raises:
            ArgumentError: It is no such tensor, or on the meta device.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(f"mask must be a bool tensor, not {kind}.")
        if not 2 <= mask.dim() <= 4:
            raise ArgumentError(f"mask must be [B, H, M, N], [H, M, N] or [M, N], not {list(mask.shape)}.")
        full = mask[(None,) * (4 - mask.dim())]
        # What is expanded over the batch, or the heads, is looked at once.
        full = full[tuple(slice(0, 1) if full.stride(dim) == 0 else slice(None) for dim in (0, 1))]
        return cls._of(tuple(full.shape), lambda first, last: full[:, :, first:last], mask.device)

    @classmethod
    def from_function(
        cls,
        mask_mod: MaskFunction,
        batch: int | None,
        heads: int | None,
        q_len: int,
        kv_len: int,
        *,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """From a function, as ``torch.nn.attention.flex_attention.create_block_mask`` has it. It is called on a chunk
        of rows at a time: there is no tensor of M by N.

        Args:
            mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, of integer tensors, returns a bool tensor; True is visible.
            batch: The batch size, or None, if the function does not depend on b.
            heads: The heads, or None, if it does not depend on h.
            q_len: M.
            kv_len: N.
            device: Where the mask is made, and the tensors that the function uses are.

        Raises:
            ArgumentError: A size is not positive, or mask_mod returns something else.
        """
        if not callable(mask_mod):
            raise ArgumentError(f"mask_mod must be a function, not a {type(mask_mod).__name__}.")
        sizes = (1 if batch is None else batch, 1 if heads is None else heads, q_len, kv_len)
        part = _evaluated(mask_mod, sizes, torch.device(device))
        return cls._of(sizes, part, torch.device(device))

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockMask:
        """From FlexAttention's ``torch.nn.attention.flex_attention.BlockMask``, on its device, with blocks of any size.

        Args:
            block_mask: What ``create_block_mask``, or ``BlockMask.from_kv_blocks``, returns.

        Raises:
            ArgumentError: It is something else.
        """
        names = (
            "mask_mod",
            "kv_num_blocks",
            "kv_indices",
            "full_kv_num_blocks",
            "full_kv_indices",
            "BLOCK_SIZE",
            "shape",
        )
        missing = [name for name in names if not hasattr(block_mask, name)]
        if missing:
            raise ArgumentError(
                f"block_mask must be FlexAttention's BlockMask; a {type(block_mask).__name__} has no {missing[0]}."
            )
        batch, heads, q_len, kv_len = (int(size) for size in block_mask.shape[-4:])
        device = block_mask.kv_indices.device
        rows_in, keys_in = block_mask.BLOCK_SIZE
        key_blocks = -(-kv_len // keys_in)
        mixed = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, key_blocks)
        full = None
        if block_mask.full_kv_num_blocks is not None:
            full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, key_blocks)
        sizes = (batch, heads, q_len, kv_len)
        inside = _evaluated(block_mask.mask_mod, sizes, device)
        key_block = torch.arange(kv_len, device=device) // keys_in

        def part(first: int, last: int) -> Tensor:
            row_block = torch.arange(first, last, device=device) // rows_in
            at = row_block[:, None], key_block
            # A block that is in no list is empty, whatever the function says.
            visible = inside(first, last) & mixed[:, :, *at]
            return visible if full is None else visible | full[:, :, *at]

        return cls._of(sizes, part, device)

    @classmethod
    def _of(cls, sizes: tuple[int, ...], part: Callable[[int, int], Tensor], device: torch.device) -> BlockMask:
        if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ArgumentError(f"The sizes of a mask by blocks must be positive integers, not {list(sizes)}.")
        if device.type == "meta":
            raise ArgumentError("A mask by blocks is made of numbers, which the meta device has not: use another.")
        # Not as inference tensors: a mask made while a model is evaluated may be trained with, and is saved then.
        with torch.inference_mode(False), torch.no_grad():
            return cls(blocks_of((sizes[0], sizes[1], sizes[2], sizes[3]), part, device), sizes[2], sizes[3])

    @property
    def visible(self) -> Tensor:
        return self.blocks.visible

    @property
    def device(self) -> torch.device:
        return self.blocks.visible.device

    def to(self, device: torch.device | str) -> BlockMask:
        """On another device; itself, if it is there."""
        if torch.device(device) == self.device:
            return self
        return BlockMask(Blocks(*(tensor.to(device) for tensor in self.blocks)), *self.shape[2:])

    def dense(self) -> Tensor:
        """The mask as a bool tensor [B, H, M, N]."""
        return dense_mask(self.blocks, *self.shape[2:])

    def sparsity(self) -> float:
        """Which share of the blocks is empty. Waits for a GPU."""
        listed = self.blocks.rows
        key_blocks = (listed.shape[3] - HEADER) // 2
        return 1.0 - float(listed[..., :2].sum(dtype=torch.float64)) / (listed[..., 0].numel() * key_blocks)

    def __repr__(self) -> str:
        blocks = " x ".join(str(-(-size // BLOCK)) for size in self.shape[2:])
        return f"BlockMask(shape={self.shape}, blocks={blocks}, device={str(self.device)!r})"


def _evaluated(mask_mod: MaskFunction, sizes: tuple[int, ...], device: torch.device) -> Callable[[int, int], Tensor]:
    """The function of rows: bool [b, h, last - first, N]."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    def function(*places: Tensor) -> Tensor:
        found = mask_mod(*places)
        if not isinstance(found, Tensor) or found.dtype != torch.bool:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise ArgumentError(f"mask_mod must return a bool tensor, not {kind}.")
        if found.dim() > 0:  # under vmap: it is called for each score
            raise ArgumentError(f"mask_mod must return one bool for each score, [], not {list(found.shape)}.")
        return found

    each: Any = function
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        each = torch.vmap(each, in_dims=dims)
    batch, heads, keys = (torch.arange(size, device=device) for size in (sizes[0], sizes[1], sizes[3]))

    def part(first: int, last: int) -> Tensor:
        with TransformGetItemToIndex():
            visible: Tensor = each(batch, heads, torch.arange(first, last, device=device), keys)
        return visible

    return part


def _listed(counts: Tensor, indices: Tensor, key_blocks: int) -> Tensor:
    """Bool [b, h, row blocks, key blocks]: which are among the first ``counts`` of the indices. What is behind these
    may be any number."""
    places = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    found = torch.zeros((*indices.shape[:-1], key_blocks + 1), dtype=torch.bool, device=indices.device)
    return found.scatter_(-1, indices.long().where(places, key_blocks), True)[..., :key_blocks]
