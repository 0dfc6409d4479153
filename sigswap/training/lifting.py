"""The row caps of a model lifted while it is distilled: from what calibration chose towards the paper's sigmoid.

Calibration puts the rows of a model with a low cap C to sums near sqrt(C) (:mod:`sigswap.training.fit`). So the biases
rise with the cap, by half of its logarithm, up to a cap of 1: else the rows would be as small as they were, and nothing
would divide them any more. Rows whose sums are wrong show only once nothing divides them, so the caps rise early, and
all other steps learn with the last ones (docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sigswap.conversion.record import RECORD, converted_part, owners_of, set_row_cap
from sigswap.conversion.state import SiteState
from sigswap.errors import ArgumentError, Hint
from sigswap.transaction import Transaction, entries

RISING = 0.1
"""The share of the steps in which the caps rise."""
HIGHEST = 1.0
"""The cap after which there is none, on the way to no cap."""


def lifted_caps(
    undo: Transaction, model: nn.Module, target: float | None, rises: int | None = None
) -> Callable[[float], None]:
    """What sets each module's cap for a share of the steps done, 0 to 1. If the transaction fails, they are as they
    were; the parameters are the caller's to put back.

    A cap rises from what it is to ``target`` by the same factor in each step of the first 10%, and stays there; with
    ``math.inf`` it rises to 1 and is then taken away. Of modules whose offset d_h or c_h is trained that rises by half
    of what the cap's logarithm does, up to a cap of 1; but not at the first call, which may go on from other steps.
    Modules without a cap have none throughout. None sets nothing. ``rises``: in so many equal ones instead of one in
    each step.

    Raises ArgumentError if no module has a cap, or one has a higher one than ``target``.
    """
    model = converted_part(model)
    owners = owners_of(model)
    caps = {path: state.site(0).row_cap for path, state in owners.items()}
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

    moved = {path: [p for site in state.sites() if (p := _moved(site)) is not None] for path, state in owners.items()}
    former: dict[str, float] = {}

    def at(share: float) -> None:
        risen = min(1.0, share / RISING)
        if rises is not None:
            risen = math.floor(risen * rises + 1e-9) / rises
        without = target == math.inf and risen == 1.0
        new: dict[str, float | None] = {}
        for path, cap in start.items():
            last = max(cap, HIGHEST) if target == math.inf else target
            now = cap * (last / cap) ** risen
            new[path] = None if without else now
            log = math.log(min(now, 1.0))
            rise, former[path] = 0.5 * (log - former.get(path, log)), log
            if rise and moved[path]:
                with torch.no_grad():
                    torch._foreach_add_(moved[path], rise)
        set_row_cap(model, new)

    undo.on_failure("the record of the conversion", entries(vars(model), RECORD))
    for state in owners.values():
        for site in state.sites():
            undo.on_failure("the row cap", entries(vars(site), "row_cap"))
    return at


def _moved(site: SiteState) -> Tensor | None:
    """What rises with the cap."""
    parameter = site.bias if site.offset is None else site.offset
    return parameter if parameter is not None and parameter.requires_grad else None
