"""What runs on a GPU: the Triton kernels, or the reference where they cannot, which the log says once.

:mod:`sigswap.kernels.op.dense` registers the functions here for CUDA, and imports this module at the first call there.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sigswap.kernels import reference
from sigswap.kernels.host.problem import Options, Packed
from sigswap.kernels.host.results import empty_gradients, empty_varlen_output

MAX_HEAD_DIM = 256

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HERE = nullcontext()

_log = logging.getLogger("sigswap")


class _Kernels(NamedTuple):
    flash_fwd: ModuleType
    flash_bwd: ModuleType
    decode: ModuleType
    short_masked: ModuleType
    hopper_fwd: ModuleType | None
    """Only for the GPUs that it is written for; as is the next one."""
    hopper_bwd: ModuleType | None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> Tensor:
    kernels = kernels_for(query, value)
    if kernels is None:
        return reference.forward(query, key, value, bias, attn_mask, seed, options)
    with _on(query.device):
        if kernels.decode.suits(query, key, options):
            return kernels.decode.forward(query, key, value, bias, attn_mask, options)
        if kernels.short_masked.suits(query, key, value, bias, attn_mask, options):
            return kernels.short_masked.forward(query, key, value, bias, attn_mask, options)
        hopper = kernels.hopper_fwd
        if hopper is not None and hopper.suits(query, key, value, bias, attn_mask, options):
            return hopper.forward(query, key, value, bias, options)
        return kernels.flash_fwd.forward(query, key, value, bias, attn_mask, seed, options)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output_mask: list[bool],
    options: Options,
) -> tuple[Tensor | None, ...]:
    kernels = kernels_for(query, value)
    arguments = grad_out, query, key, value, bias, attn_mask, seed, output_mask, options
    if kernels is None:
        return reference.backward(*arguments)
    with _on(query.device):
        if kernels.short_masked.suits(query, key, value, bias, attn_mask, options):
            return kernels.short_masked.backward(grad_out, query, key, value, bias, attn_mask, output_mask, options)
        hopper = kernels.hopper_bwd
        if hopper is not None and hopper.suits(grad_out, query, key, value, bias, attn_mask, output_mask, options):
            return hopper.backward(grad_out, query, key, value, bias, output_mask, options)
        return kernels.flash_bwd.backward(*arguments)


def varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
) -> Tensor:
    kernels = kernels_for(query, value)
    if kernels is None:
        return reference.varlen_forward(
            query, key, value, bias, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen_q, max_seqlen_k, options
        )
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    views = _heads_first(query), _heads_first(key), _heads_first(value), _row_bias_view(bias)
    out = empty_varlen_output(query, value)
    with _on(query.device):
        kernels.flash_fwd.forward(*views, None, seed, options, packed=packed, out=_heads_first(out))
    return out


def varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    output_mask: list[bool],
    options: Options,
) -> tuple[Tensor | None, ...]:
    kernels = kernels_for(query, value)
    if kernels is None:
        inputs = query, key, value, bias, cu_seqlens_q, cu_seqlens_k, seed, max_seqlen_q, max_seqlen_k
        return reference.varlen_backward(grad_out, *inputs, output_mask, options)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    views = _heads_first(grad_out), _heads_first(query), _heads_first(key), _heads_first(value), _row_bias_view(bias)
    grads = empty_gradients((query, key, value, bias), output_mask)
    targets = [None if grad is None else _heads_first(grad) for grad in grads[:3]]
    targets += [_row_bias_view(grads[3]), None]
    with _on(query.device):
        kernels.flash_bwd.backward(
            *views, None, seed, [*output_mask, False], options, packed=packed, grads=tuple(targets)
        )
    return grads


def _heads_first(tensor: Tensor) -> Tensor:
    """[total, H, D] as [1, H, total, D]."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _row_bias_view(bias: Tensor | None) -> Tensor | None:
    """[1|total, 1|H] as [1, 1|H, 1|total, 1]."""
    return None if bias is None else bias.t()[None, :, :, None]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The device as the current one; without a switch, if it is that already."""
    return _HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def kernels_for(query: Tensor, value: Tensor) -> _Kernels | None:
    """The Triton kernels, or None, if they do not take such tensors on such a device."""
    if query.dtype not in _DTYPES:
        return _unable(f"they compute in float32, which is not enough for {query.dtype}")
    if query.shape[-1] > MAX_HEAD_DIM or value.shape[-1] > MAX_HEAD_DIM:
        return _unable(f"they hold head_dim up to {MAX_HEAD_DIM}")
    return _device_kernels(query.device.index or 0)


@functools.cache
def _device_kernels(device: int) -> _Kernels | None:
    if torch.version.hip is not None:
        return _unable("they are written for NVIDIA GPUs")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return _unable(f"{torch.cuda.get_device_name(device)} has a compute capability below 8.0")
    try:
        from sigswap.kernels.triton import backward as flash_bwd
        from sigswap.kernels.triton import decode, short_masked
        from sigswap.kernels.triton import forward as flash_fwd
    except ImportError as error:
        return _unable(f"Triton could not be imported ({error})")
    hopper_fwd = hopper_bwd = None
    if capability[0] == 9:
        try:
            from sigswap.kernels.hopper import backward as hopper_bwd
            from sigswap.kernels.hopper import forward as hopper_fwd
        except (ImportError, AttributeError) as error:  # Gluon is experimental: names change
            _log.warning("Long sequences are slower than they could be: this Triton's Gluon differs (%s).", error)
    return _Kernels(flash_fwd, flash_bwd, decode, short_masked, hopper_fwd, hopper_bwd)


@functools.cache
def _unable(reason: str) -> None:
    """Says once per reason why it will be slow."""
    _log.warning("sigmoid_attention runs in plain PyTorch here, not in sigswap's Triton kernels: %s.", reason)
