"""PyTorch's ring of softmax attention, which sigswap's is compared with: on GPUs as ``context_parallel`` runs it, and
on a CPU, for which that has no kernel, the same ring around the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
ROTATIONS = ("allgather", "alltoall")


@contextmanager
def of_context_parallel(mesh: DeviceMesh, backend: str, rotation: str) -> Iterator[None]:
    """``F.scaled_dot_product_attention`` is PyTorch's ring attention inside, of parts in head-and-tail order."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotation)
    sequence = torch.zeros(1, 2 * mesh.size(), device=mesh.device_type)
    with context_parallel(mesh, buffers=[sequence], buffer_seq_dims=[1]), sdpa_kernel(BACKENDS[backend]):
        yield


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """To be called in :func:`of_context_parallel`. [B, H, M, D], of this rank's part."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1])


def causal_attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, mesh: DeviceMesh) -> Tensor:
    """PyTorch's ring, of parts in head-and-tail order. It has no grouped heads."""
    out: Tensor = _OnCPU.apply(query, key, value, mesh.get_group())
    return out


class _OnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: Any) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention

        op: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, logsumexp, *_ = _templated_ring_attention(group, 2, op, query, key, value, is_causal=True)
        ctx.group = group
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        def op(**arguments: Any) -> Any:
            arguments["grad_out"] = arguments["grad_out"].contiguous()
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
                dropout_p=0.0, **arguments
            )

        query, key, value, out, logsumexp = ctx.saved_tensors
        gradients = _attention._templated_ring_attention_backward(
            ctx.group,
            2,
            op,  # type: ignore[arg-type]
            grad,
            "grad_out",
            query,
            key,
            value,
            out,
            logsumexp,
            is_causal=True,
        )
        return *gradients[:3], None
