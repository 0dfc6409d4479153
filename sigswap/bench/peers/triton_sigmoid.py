"""The package triton-sigmoid: sigmoid attention in Triton, which tries 49 kernels on each new shape."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, padded
from sigswap.bench.peers.peer import Implementation, Peer, package_module

PACKAGE = "triton-sigmoid"


def _build(cell: Cell, inputs: Inputs) -> Implementation:
    return _packed(cell, inputs) if cell.lengths else _dense(cell, inputs)


def _dense(cell: Cell, inputs: Inputs) -> Implementation:
    sigmoid = package_module("triton_sigmoid", PACKAGE).sigmoid_attention
    query, key, value = inputs.qkv

    def forward() -> Tensor:  # of [batch, length, heads, head_dim], as the tensors are stored
        out: Tensor = sigmoid(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=cell.causal)
        return out.transpose(1, 2)

    return Implementation(forward, inputs.leaves, inputs.grad_out)


def _packed(cell: Cell, inputs: Inputs) -> Implementation:
    """On padded sequences. Padding and removing it are not timed."""
    sigmoid = package_module("triton_sigmoid", PACKAGE).sigmoid_attention_padded
    copies = padded(cell, inputs)
    lengths = torch.tensor(cell.lengths, dtype=torch.int32, device=inputs.query.device)
    forward = functools.partial(sigmoid, *copies.qkv, lengths, lengths, is_causal=cell.causal)
    return Implementation(forward, copies.leaves, copies.grad_out)


TRITON_SIGMOID = Peer(
    "triton-sigmoid",
    "sigmoid attention in Triton",
    ("train", "short", "varlen"),
    _build,
    package=PACKAGE,
    setup="tune",
)
