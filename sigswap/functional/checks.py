"""Checks of the arguments of attention as functions, each of which raises ArgumentError that names the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.functional.block_mask import BlockMask

_NUMBERS = (int, float, Tensor, torch.SymInt, torch.SymFloat)  # a tensor of one element is one, as for PyTorch


def check_types(tensors: dict[str, Any], scale: Any, dropout_p: Any, softcap: Any, row_cap: Any) -> None:
    """Raises ArgumentError for what is no tensor, or no number."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name} must be a tensor, not a {type(tensor).__name__}.")
    check_dense(**tensors)
    for name, number in (("scale", scale), ("dropout_p", dropout_p), ("softcap", softcap), ("row_cap", row_cap)):
        if number is not None and not isinstance(number, _NUMBERS):
            raise ArgumentError(f"{name} must be a number, not {number!r}.")
        if isinstance(number, Tensor) and (number.numel() != 1 or number.is_complex()):
            raise ArgumentError(f"{name} must be a number, not a tensor {list(number.shape)} of {number.dtype}.")
    if dropout_p is None:
        raise ArgumentError("dropout_p must be a number, not None.")


def check_block_mask(
    block_mask: Any, query: Tensor, attn_mask: Tensor | None, is_causal: bool, has_window: bool
) -> None:
    if not isinstance(block_mask, BlockMask):
        raise ArgumentError(
            f"block_mask must be None or a sigswap.BlockMask, not a {type(block_mask).__module__}."
            f"{type(block_mask).__qualname__}; BlockMask.from_flex takes FlexAttention's."
        )
    others = {"attn_mask": attn_mask is not None, "is_causal=True": is_causal, "window": has_window}
    for name, given in others.items():
        if given:
            raise ArgumentError(
                f"block_mask must not be given together with {name}: make it of the keys that both leave visible."
            )
    if hasattr(query, "device_mesh"):
        raise ArgumentError("block_mask must be None where query is a DTensor; attn_mask can be given instead.")


def check_block_sizes(block_mask: BlockMask, query: Tensor, key: Tensor) -> None:
    """query and key have four dimensions."""
    batch, heads, q_len, kv_len = block_mask.shape
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if (q_len, kv_len) != full[2:] or batch not in (1, full[0]) or heads not in (1, full[1]):
        raise ArgumentError(
            f"block_mask {list(block_mask.shape)} must be {list(full)}: batch, heads, rows and keys "
            "(1 for the batch or the heads: for all)."
        )
    if block_mask.device != query.device:
        raise ArgumentError(f"block_mask must be on query's device {query.device}, not {block_mask.device}; use .to().")


def check_switches(**switches: Any) -> None:
    for name, switch in switches.items():
        if not isinstance(switch, bool | torch.SymBool):
            raise ArgumentError(f"{name} must be True or False, not {switch!r}.")


def check_dense(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout is not torch.strided):
            kind = "a nested" if tensor.is_nested else f"a {tensor.layout}"
            raise ArgumentError(
                f"{name} must be a dense tensor, not {kind} one; sigmoid_attention_varlen takes packed sequences."
            )
