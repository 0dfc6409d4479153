"""The sums of a converted model's rows, sum over j of p_ij, before the row cap: 1 under softmax, anything here."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sigswap.conversion.mode import SwapMode, scores_of
from sigswap.conversion.state import OwnerState, SiteState
from sigswap.functional.torch_functions import SWAPS


@dataclasses.dataclass
class RowSums:
    """What the rows of one owner's attention sum to, over all heads, calls and batches. Rows that see no key, of
    padding say, sum to 0 and count as any other."""

    total: float = 0.0
    rows: int = 0
    largest: float = 0.0

    def add(self, sums: Tensor) -> None:
        """The sums of some rows, of any shape."""
        if sums.numel():
            self.total += float(sums.double().sum())
            self.rows += sums.numel()
            self.largest = max(self.largest, float(sums.max()))

    @property
    def mean(self) -> float | None:
        return self.total / self.rows if self.rows else None


class RowSumObserver:
    """Runs converted modules as they are, and gathers their row sums (see sigswap.training.observe.observed)."""

    def __init__(self) -> None:
        self.owners: dict[OwnerState, RowSums] = {}

    def run(self, owner: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The owner's forward as sigmoid, as without an observer."""
        state: OwnerState = owner.sigswap  # type: ignore[assignment]
        mode = _SummingMode(state, self.owners.setdefault(state, RowSums()))
        with mode:
            output = forward(owner, *args, **kwargs)
        state.check_totals(mode.counts)
        return state.finish(output)


class _SummingMode(SwapMode):
    """The sum of a row is its attention to values that are 1, without the site's row cap. They are as wide as the
    model's own, and lie as those do, so that the kernels are those that the model runs."""

    def __init__(self, state: OwnerState, sums: RowSums) -> None:
        super().__init__(state)
        self.sums = sums

    def _softmax(self, site: SiteState, args: Any, kwargs: Any) -> Tensor:
        of_product, uncapped = (self.product_of, self.query_bias), _uncapped(site)
        self.product_of = uncapped if self.product_of is site else self.product_of
        probabilities = super()._softmax(uncapped, args, kwargs)
        _, dim = scores_of(args, kwargs)
        self.sums.add(probabilities.sum(dim))
        if site.row_cap is None:
            return probabilities
        self.product_of, self.query_bias = of_product
        return super()._softmax(site, args, kwargs)

    def _sdpa(self, site: SiteState, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.sums.add(super()._sdpa(_uncapped(site), query, key, torch.ones_like(value), *args, **kwargs)[..., 0])
        return super()._sdpa(site, query, key, value, *args, **kwargs)

    def _whole(self, site: SiteState, func: Any, args: Any, kwargs: Any) -> Any:
        def attention(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> tuple[Tensor, Tensor | None]:
            asked = {**arguments, "need_weights": False}
            self.sums.add(_uncapped(site).attention(query, key, torch.ones_like(value), **asked)[0][..., 0])
            return site.attention(query, key, value, **arguments)

        return SWAPS[func].stand_in(attention, *args, **kwargs)


def _uncapped(site: SiteState) -> SiteState:
    """``site`` without its row cap, around the same parameters; the site itself may run in other threads."""
    uncapped = copy.copy(site)
    uncapped.row_cap = None
    return uncapped
