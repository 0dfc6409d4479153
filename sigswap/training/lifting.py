"""The row caps of a model lifted while it is distilled: from what calibration chose towards the paper's sigmoid."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from sigswap.conversion.record import RECORD, converted_part, owners_of, set_row_cap
from sigswap.errors import ArgumentError, Hint
from sigswap.transaction import Transaction, entries

RISING = 0.8
"""The share of the steps in which the caps rise; in the others the model learns with the last ones."""
HIGHEST = 64.0
"""The cap after which there is none, on the way to no cap: rows that sum to more are rare."""


def lifted_caps(
    undo: Transaction, model: nn.Module, target: float | None, rises: int | None = None
) -> Callable[[float], None]:
    """What sets each module's cap for a share of the steps done, 0 to 1. If the transaction fails, they are as they
    were.

    A cap rises from what it is to ``target`` by the same factor in each step of the first 80%, and stays there; with
    ``math.inf`` it rises to 64 and is then taken away. Modules without a cap have none throughout. None sets nothing.
    ``rises``: in so many equal ones instead of one in each step.

    Raises ArgumentError if no module has a cap, or one has a higher one than ``target``.
    """
    model = converted_part(model)
    caps = {path: state.site(0).row_cap for path, state in owners_of(model).items()}
    start = {path: cap for path, cap in caps.items() if cap is not None}
    if target is None:
        return lambda share: None
    if not start:
        raise ArgumentError(
            "no attention of the model has a row cap to lift.",
            argument="lift_row_cap",
            hint=Hint("Convert with row_cap in the config, or call sigswap.set_row_cap."),
        )
    above = [path for path, cap in start.items() if cap > target]
    if above:
        raise ArgumentError(
            f"{above[0] or 'the model'} has the row cap {start[above[0]]}, which is above {{argument}}={target}.",
            argument="lift_row_cap",
        )

    def at(share: float) -> None:
        risen = min(1.0, share / RISING)
        if rises is not None:
            risen = math.floor(risen * rises) / rises
        without = target == math.inf and risen == 1.0
        new: dict[str, float | None] = {}
        for path, cap in start.items():
            last = max(cap, HIGHEST) if target == math.inf else target
            new[path] = None if without else cap * (last / cap) ** risen
        set_row_cap(model, new)

    undo.on_failure("the record of the conversion", entries(vars(model), RECORD))
    for state in owners_of(model).values():
        for site in state.sites():
            undo.on_failure("the row cap", entries(vars(site), "row_cap"))
    return at
