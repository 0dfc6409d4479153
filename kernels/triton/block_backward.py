"""The backward under a mask by blocks, with the formulas of :mod:`sigswap.kernels.triton.backward`. Two kernels: one of
dK and dV, by blocks of keys, over the lists of the rows that see them; one of dQ and the row sums of dS, by blocks of
rows. Each walks over the full blocks first, without any mask, and then over the mixed ones. There are no atomics."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from sigswap.kernels.host.blocks import BLOCK
from sigswap.kernels.host.forms import AUTO
from sigswap.kernels.host.launch import Described, Launch, by_rows, describable
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of, new_tensor
from sigswap.kernels.host.problem import MAX_PLANS, Gradients, Problem, Signature, output_arguments
from sigswap.kernels.host.results import gradients_for, hand_over
from sigswap.kernels.host.tiles import Tile
from sigswap.kernels.triton import blocks as shared
from sigswap.kernels.triton.backward import key_tile_for, row_tile_for
from sigswap.kernels.triton.block_backward_kernels import keys_kernel, rows_kernel
from sigswap.kernels.triton.blocks import BlockLayouts, form_of, layouts_of, within_block
from sigswap.kernels.triton.common import ROW_BIAS_BLOCK
from sigswap.kernels.triton.row_biases import bias_kernel
from sigswap.kernels.triton.sums import Sum

supports = shared.supports

KEY_SPAN, ROW_SPAN = 4, 4
"""(Batch element, head) pairs that run at once: of dK and dV, and of dQ."""


class Tuning(NamedTuple):
    """For tests and tuning; None: as it is chosen. Tiles' sizes divide 128."""

    key_tile: Tile | None = None
    row_tile: Tile | None = None
    tma: bool | None = None
    key_span: int | None = None
    row_span: int | None = None


_AS_CHOSEN = Tuning()


def backward(problem: Problem, tuning: Tuning = _AS_CHOSEN) -> Gradients:
    """Deterministic. Of query, key, value, bias, and None of attn_mask."""
    grads, written, layouts = gradients_for(problem)
    if problem.signature.is_empty:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return grads
    grad_out, problem = problem.readable_grad_out(), problem.readable()
    query, key, value, bias, _ = problem.inputs
    new_query, new_key, new_value, new_bias, _ = written
    delta, blocks = problem.row_delta, problem.blocks
    assert blocks is not None
    of_delta = None if delta is None else layout_of(delta)
    plan = _plan(problem.signature, layout_of(grad_out), of_delta, layouts, layouts_of(blocks), tuning)

    if plan.keys is not None and plan.biases is not None:
        row_bias = new_tensor(plan.biases.layout, query.device)
        floor = None if plan.biases.floor is None else new_tensor(plan.biases.floor, query.device)
        plan.biases.launch(row_bias, floor, bias, blocks.visible, None, None)
        lists = blocks.keys, blocks.key_bits
        plan.keys(query, key, value, grad_out, delta, new_key, new_value, row_bias, floor, *lists)
    if plan.rows is not None:
        row_sums = None if plan.sum_rows is None else plan.sum_rows.empty_parts()
        sides = bias, blocks.visible, blocks.rows, blocks.row_bits
        plan.rows(query, key, value, grad_out, delta, new_query, row_sums, *sides)
        if plan.sum_rows is not None and row_sums is not None and new_bias is not None:
            plan.sum_rows(row_sums, new_bias)
    hand_over(grads, written)
    return grads


class _Biases(NamedTuple):
    """Works out each row's bias, float32 [B|1, H|1, M] with rows a multiple of 4 long, and the least of each block."""

    launch: Launch
    layout: Layout
    floor: Layout | None


class _Plan(NamedTuple):
    """The launches of a backward, in their order; None: not needed."""

    biases: _Biases | None
    keys: Launch | None
    rows: Launch | None
    sum_rows: Sum | None


@functools.lru_cache(MAX_PLANS)
def _plan(
    signature: Signature,
    grad_out: Layout,
    delta: Layout | None,
    grads: tuple[Layout | None, ...],
    blocks: BlockLayouts,
    tuning: Tuning,
) -> _Plan:
    """grads: of query, key, value, bias and attn_mask; None: not needed."""
    grad_query, grad_key, grad_value, grad_bias, _ = grads
    biases = keys = rows = sum_rows = None
    if grad_key is not None or grad_value is not None:
        biases = _biases_for(signature, blocks)
        keys = _walk_rows_of_keys(signature, grad_out, delta, grad_key, grad_value, biases, blocks, tuning)
    if grad_query is not None or grad_bias is not None:
        sums = contiguous_layout(signature.query.shape[:3], torch.float32) if grad_bias is not None else None
        rows = _walk_keys_of_rows(signature, grad_out, delta, grad_query, sums, blocks, tuning)
    if grad_bias is not None:
        sum_rows = Sum(grad_bias, (*signature.query.shape[:3], 1), signature.device)
    return _Plan(biases, keys, rows, sum_rows)


def _biases_for(signature: Signature, blocks: BlockLayouts) -> _Biases:
    shapes = [blocks.visible.shape[:2]] if signature.options.visible_bias else []
    shapes += [signature.bias.shape[:2]] if signature.bias is not None else []
    batch, heads = (max((shape[dim] for shape in shapes), default=1) for dim in (0, 1))
    rows = triton.cdiv(signature.q_len, 4) * 4
    out = contiguous_layout((batch, heads, rows), torch.float32)
    bias_blocks = triton.cdiv(signature.q_len, ROW_BIAS_BLOCK)
    auto = form_of(signature) == AUTO
    floor = contiguous_layout((batch, heads, bias_blocks), torch.float32) if auto else None
    seen_b, seen_h = blocks.visible.strides_or_zero(2)
    arguments = signature.arguments() | {
        "heads": heads,
        "BLOCK_M": ROW_BIAS_BLOCK,
        "stride_out_h": rows,
        "mask_batches": batch,
        "stride_count_b": seen_b,
        "stride_count_h": seen_h,
        "stride_count_m": 1,
        "HAS_LEFT": False,
        "HAS_RIGHT": False,
    }
    tensors = (out, floor, signature.bias, blocks.visible, None, None)
    launch = Launch(bias_kernel, bias_blocks * heads * batch, signature.device, tensors, arguments)
    return _Biases(launch, out, floor)


def _walk_rows_of_keys(
    signature: Signature,
    grad_out: Layout,
    delta: Layout | None,
    grad_key: Layout | None,
    grad_value: Layout | None,
    biases: _Biases,
    blocks: BlockLayouts,
    tuning: Tuning,
) -> Launch:
    query, key, value = signature.query, signature.key, signature.value
    tile = within_block(tuning.key_tile or key_tile_for(signature))
    described: tuple[Described, ...] | None = None
    strides = biases.layout.strides_or_zero(2)
    if _with_tma(signature, tuning) and describable(query) and describable(grad_out):
        batch, heads, rows = biases.layout.shape
        of_bias = Described((batch * heads, rows), (rows, 1), (1, tile.rows), torch.float32)
        described = by_rows(query, tile.rows), by_rows(grad_out, tile.rows), of_bias
        strides = strides[0] // rows, strides[1] // rows
    floors = (0, 0) if biases.floor is None else biases.floor.strides_or_zero(2)
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    arguments |= output_arguments(arguments, dk=grad_key, dv=grad_value, delta=delta)
    arguments |= {"stride_bias_b": strides[0], "stride_bias_h": strides[1]}
    arguments |= {"stride_floor_b": floors[0], "stride_floor_h": floors[1]}
    arguments |= _loop_arguments(signature, blocks, blocks.keys, tile, described)
    walked = described or (query, grad_out, biases.layout)
    tensors = (walked[0], key, value, walked[1], delta, grad_key, grad_value, walked[2], biases.floor)
    members = signature.batch * signature.kv_heads
    arguments |= {"members": members, "span": min(tuning.key_span or KEY_SPAN, members)}
    programs = triton.cdiv(signature.kv_len, BLOCK) * (BLOCK // tile.keys) * members
    return Launch(
        keys_kernel,
        programs,
        signature.device,
        (*tensors, blocks.keys, blocks.bits),
        arguments,
        **tile.launch_options(),
    )


def _walk_keys_of_rows(
    signature: Signature,
    grad_out: Layout,
    delta: Layout | None,
    grad_query: Layout | None,
    row_sums: Layout | None,
    blocks: BlockLayouts,
    tuning: Tuning,
) -> Launch:
    query, key, value = signature.query, signature.key, signature.value
    tile = within_block(tuning.row_tile or row_tile_for(signature))
    described = None
    if _with_tma(signature, tuning) and describable(key) and describable(value):
        described = by_rows(key, tile.keys), by_rows(value, tile.keys)
    arguments = signature.arguments(q=query, k=key, v=value, do=grad_out)
    arguments |= output_arguments(arguments, dq=grad_query, sum=row_sums, delta=delta)
    members = signature.batch * signature.heads
    arguments |= _loop_arguments(signature, blocks, blocks.rows, tile, described)
    arguments |= {"members": members, "span": min(tuning.row_span or ROW_SPAN, members)}
    keys = described or (key, value)
    tensors = (query, *keys, grad_out, delta, grad_query, row_sums, signature.bias, blocks.visible, blocks.rows)
    programs = triton.cdiv(signature.q_len, BLOCK) * (BLOCK // tile.rows) * members
    return Launch(rows_kernel, programs, signature.device, (*tensors, blocks.bits), arguments, **tile.launch_options())


def _with_tma(signature: Signature, tuning: Tuning) -> bool:
    return signature.tma(min(signature.q_len, signature.kv_len)) if tuning.tma is None else tuning.tma


def _loop_arguments(
    signature: Signature, blocks: BlockLayouts, lists: Layout, tile: Tile, described: tuple[Described, ...] | None
) -> dict[str, int | bool]:
    own = {"FORM": form_of(signature), "TMA": described is not None, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    return blocks.arguments(lists) | own
