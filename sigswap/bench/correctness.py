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
    """Raises BenchmarkError unless ``out`` and ``grads`` (of the inputs' leaves; or none) are sigmoid attention's.

    Compared in some rows and keys of up to three heads of key and value, and of all query heads that share them. With
    dropout the results have to differ from those without it by as much as they should, and both passes have to drop the
    same probabilities.
    """
    names = ("output", "gradient of query", "gradient of key", "gradient of value", "gradient of bias")
    differences = {name: _Difference() for name in names[: 1 + len(grads)]}
    group = cell.heads // cell.kv_heads
    for batch, kv_head in _some_pairs(cell.batch, cell.kv_heads):
        keys = _some(_head(inputs.key, cell, batch, kv_head).shape[0], out.device)
        of_key_and_value: list[list[Tensor]] = []  # their gradients, by query head
        for head in range(kv_head * group, (kv_head + 1) * group):
            rows = _some(_head(inputs.query, cell, batch, head).shape[0], out.device)
            truths = _expected(cell, inputs, batch, head, rows, keys)[: 1 + len(grads)]
            for name, result, truth in zip(names[:2], (out, *grads), truths, strict=False):
                differences[name].add(_head(result, cell, batch, head)[rows], truth)
            of_key_and_value.append(truths[2:4])
        for name, result, by_head in zip(names[2:4], grads[1:3], zip(*of_key_and_value, strict=True), strict=False):
            differences[name].add(_head(result, cell, batch, kv_head)[keys], torch.stack(by_head).sum(dim=0))
    if "bias" in cell.features and grads:
        rows = keys = _some(cell.q_len, out.device)
        for _, head in _some_pairs(1, cell.heads):
            parts = [_expected(cell, inputs, batch, head, rows, keys)[4] for batch in range(cell.batch)]
            differences["gradient of bias"].add(grads[3][0, head][rows][:, keys], torch.stack(parts).sum(dim=0))
    for name, difference in differences.items():
        if cell.dropout_p:
            difference.require_dropout(name, cell.dropout_p)
        else:
            difference.require_none(name, TOLERANCES[out.dtype])
    if cell.dropout_p and grads:
        _require_same_dropout(inputs, out, grads)


class _Difference:
    """Of results from the truth, added up over heads."""

    def __init__(self) -> None:
        self.error = self.norm = self.product = 0.0

    def add(self, result: Tensor, truth: Tensor) -> None:
        result = result.double()
        self.error += (result - truth).square().sum().item()
        self.norm += truth.square().sum().item()
        self.product += (result * truth).sum().item()

    def require_none(self, name: str, tolerance: float) -> None:
        relative = (self.error / self.norm) ** 0.5
        if not relative <= tolerance:
            raise BenchmarkError(f"wrong result: the relative error of the {name} is {relative:.2g}")

    def require_dropout(self, name: str, probability: float) -> None:
        """With dropout a result is the truth on average. As values and gradients are random, and so cancel out in sums,
        its relative error is the standard deviation of the factor of one probability, which is 0 or 1 / (1 - p).
        """
        relative, expected = (self.error / self.norm) ** 0.5, (probability / (1 - probability)) ** 0.5
        scale = self.product / self.norm
        if not abs(relative / expected - 1) <= 0.2 or not abs(scale - 1) <= 0.05:
            raise BenchmarkError(
                f"wrong result: dropout changes the {name} by {relative:.2g} and not {expected:.2g} of its norm, or "
                f"scales it by {scale:.3g}"
            )


def _require_same_dropout(inputs: Inputs, out: Tensor, grads: Sequence[Tensor]) -> None:
    """The output is linear in value. So, head by head, its product with grad_out is that of value with its gradient."""
    assert inputs.grad_out is not None
    pairs = ((out, inputs.grad_out), (grads[2], inputs.value))
    products = [(x.double() * y.double()).sum(dim=(-2, -1)) for x, y in pairs]
    relative = ((products[0] - products[1]).norm() / out.double().norm()).item()
    if not relative <= 0.1:
        raise BenchmarkError("wrong result: forward and backward do not drop the same probabilities")


def _expected(cell: Cell, inputs: Inputs, batch: int, head: int, rows: Tensor, keys: Tensor) -> list[Tensor]:
    """:func:`expected` for one query head of the cell."""
    kv_head = head * cell.kv_heads // cell.heads
    mask = inputs.mask
    if mask is not None:
        mask = mask.detach().expand(cell.batch, cell.heads, -1, -1)[batch, head]
    return expected(
        _head(inputs.query, cell, batch, head),
        _head(inputs.key, cell, batch, kv_head),
        _head(inputs.value, cell, batch, kv_head),
        None if inputs.grad_out is None else _head(inputs.grad_out, cell, batch, head),
        causal=cell.causal,
        window=cell.window,
        softcap=cell.softcap,
        mask=mask,
        rows=rows,
        keys=keys,
    )


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
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
        window: Row i sees the keys from i - window on.
        softcap: Scores become softcap * tanh(scores / softcap).
        mask: [1 or M, N]; bool: True is visible; else added to the scores. A bool one comes alone.
        rows: Indices into query, int64.
        keys: Indices into key and value, int64.

    Returns:
        The output in ``rows``; with grad_out also the gradients of query in ``rows``, of key and value in ``keys``, and
        of the scores in ``rows`` and ``keys``.
    """
    query, key, value = (tensor.detach().double() for tensor in (query, key, value))
    all_rows, all_keys = (torch.arange(tensor.shape[0], device=query.device) for tensor in (query, key))
    scale = query.shape[1] ** -0.5
    if mask is not None:
        mask = mask.expand(query.shape[0], -1)

    def probabilities(rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """And the derivative of each by its score before the soft cap."""
        scores = scale * query[rows] @ key[keys].T
        slope = torch.ones_like(scores)
        if softcap is not None:
            tanh = (scores / softcap).tanh()
            scores, slope = softcap * tanh, 1 - tanh.square()
        hidden = torch.zeros_like(scores, dtype=torch.bool)
        first, end = torch.zeros_like(rows), torch.full_like(rows, key.shape[0])
        if causal:
            hidden |= keys > rows[:, None]
            end = (rows + 1).clamp(max=key.shape[0])
        if window is not None:
            hidden |= keys < rows[:, None] - window
            first = (rows - window).clamp(min=0)
        seen = end - first
        if mask is not None and mask.dtype == torch.bool:
            hidden |= ~mask[rows][:, keys]
            seen = mask[rows].sum(dim=1)
        elif mask is not None:
            scores = scores + mask[rows][:, keys].double()
        p = (scores - seen.double().log()[:, None]).sigmoid().masked_fill(hidden, 0.0)
        return p, p * (1 - p) * slope

    p, derivative = probabilities(rows, all_keys)
    results = [p @ value]
    if grad_out is not None:
        grad = grad_out.double()
        grad_scores = derivative * (grad[rows] @ value.T)
        results.append(scale * grad_scores @ key)
        p, derivative = probabilities(all_rows, keys)
        results.append(scale * (derivative * (grad @ value[keys].T)).T @ query)
        results.append(p.T @ grad)
        results.append(grad_scores[:, keys])
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


def _some_pairs(batch: int, heads: int) -> set[tuple[int, int]]:
    """The first, the middle and the last head."""
    last = batch - 1, heads - 1
    return {(0, 0), (last[0] // 2, last[1] // 2), last}
