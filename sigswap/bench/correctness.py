"""Whether sigswap's results in a cell are sigmoid attention's, compared with a float64 computation of some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs
from sigswap.errors import BenchmarkError

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 5e-3}
"""The relative error (Frobenius) above which a result is wrong: well above rounding, well below a misplaced mask."""


@torch.no_grad()
def check(cell: Cell, inputs: Inputs, out: Tensor, grads: Sequence[Tensor]) -> None:
    """Raises BenchmarkError unless ``out`` and ``grads`` (of query, key, value; or none) are sigmoid attention's.

    Compared in some rows and keys of up to three heads of key and value, and of all query heads that share them.
    """
    names = ("output", "gradient of query", "gradient of key", "gradient of value")[: 1 + len(grads)]
    squares = {name: [0.0, 0.0] for name in names}

    def compare(name: str, result: Tensor, truth: Tensor) -> None:
        squares[name][0] += (result.double() - truth).square().sum().item()
        squares[name][1] += truth.square().sum().item()

    group = cell.heads // cell.kv_heads
    last = cell.batch - 1, cell.kv_heads - 1
    for batch, kv_head in {(0, 0), (last[0] // 2, last[1] // 2), last}:
        key, value = (_head(tensor, cell, batch, kv_head) for tensor in inputs.leaves[1:])
        keys = _some(key.shape[0], out.device)
        of_key_and_value: list[list[Tensor]] = []  # their gradients, by query head
        for head in range(kv_head * group, (kv_head + 1) * group):
            query = _head(inputs.query, cell, batch, head)
            grad_out = None if inputs.grad_out is None or not grads else _head(inputs.grad_out, cell, batch, head)
            rows = _some(query.shape[0], out.device)
            truths = expected(query, key, value, grad_out, causal=cell.causal, rows=rows, keys=keys)
            for name, result, truth in zip(names[:2], (out, *grads), truths, strict=False):
                compare(name, _head(result, cell, batch, head)[rows], truth)
            of_key_and_value.append(truths[2:])
        for name, result, parts in zip(names[2:], grads[1:], zip(*of_key_and_value, strict=True), strict=True):
            compare(name, _head(result, cell, batch, kv_head)[keys], torch.stack(parts).sum(dim=0))
    for name, (error, norm) in squares.items():
        relative = (error / norm) ** 0.5
        if not relative <= TOLERANCES[out.dtype]:
            raise BenchmarkError(f"wrong result: the relative error of the {name} is {relative:.2g}")


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None,
    *,
    causal: bool,
    rows: Tensor,
    keys: Tensor,
) -> list[Tensor]:
    """One head's sigmoid attention, with the default scale and bias, in float64, in some rows and keys.

    Args:
        query: [M, D].
        key: [N, D].
        value: [N, Dv].
        grad_out: [M, Dv] or None.
        causal: Row i sees the keys 0 ... i.
        rows: Indices into query, int64.
        keys: Indices into key and value, int64.

    Returns:
        The output in ``rows``; with grad_out also the gradients of query in ``rows``, of key and value in ``keys``.
    """
    query, key, value = (tensor.detach().double() for tensor in (query, key, value))
    all_rows, all_keys = (torch.arange(tensor.shape[0], device=query.device) for tensor in (query, key))
    scale = query.shape[1] ** -0.5

    def probabilities(rows: Tensor, keys: Tensor) -> Tensor:
        seen = (rows + 1).clamp(max=key.shape[0]) if causal else torch.full_like(rows, key.shape[0])
        p: Tensor = (scale * query[rows] @ key[keys].T - seen.double().log()[:, None]).sigmoid()
        return p.masked_fill(keys > rows[:, None], 0.0) if causal else p

    p = probabilities(rows, all_keys)
    results = [p @ value]
    if grad_out is not None:
        grad = grad_out.double()
        results.append(scale * (p * (1 - p) * (grad[rows] @ value.T)) @ key)
        p = probabilities(all_rows, keys)
        results.append(scale * (p * (1 - p) * (grad @ value[keys].T)).T @ query)
        results.append(p.T @ grad)
    return results


def _head(tensor: Tensor, cell: Cell, batch: int, head: int) -> Tensor:
    """[length, head_dim]: one head of one sequence."""
    if cell.lengths:
        start = sum(cell.lengths[:batch])
        return tensor[start : start + cell.lengths[batch], head]
    return tensor[batch, head]


def _some(length: int, device: torch.device) -> Tensor:
    """Up to 32 indices below length, the first and the last among them."""
    return torch.linspace(0, length - 1, min(length, 32), device=device).round().long()
