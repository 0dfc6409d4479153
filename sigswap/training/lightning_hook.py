"""Lightning: a callback that calibrates, and keeps sigswap's parameters out of weight decay."""

from __future__ import annotations

import sys
from typing import Any

from sigswap.conversion.record import converted_part
from sigswap.optional import require
from sigswap.training.calibrate import calibrate
from sigswap.training.weight_decay import added_parameters, exempt_from_decay


def lightning_callback(batches: Any = None, **options: Any) -> Any:
    """A ``lightning.pytorch.Callback`` for a LightningModule that holds a converted model.

    >>> trainer = lightning.pytorch.Trainer(callbacks=[sigswap.lightning_callback(batches)])

    With ``batches`` the model is calibrated before ``configure_optimizers`` is called, so that what calibration adds is
    trained. And of the optimizers that ``configure_optimizers`` returns none decays sigswap's parameters: they are
    moved to groups without, as by :func:`sigswap.exempt_from_decay`. Where those would be new ones, and a learning rate
    scheduler counts the groups already, call that before the scheduler is made.

    Args:
        batches: as for :func:`sigswap.calibrate`, a list of inputs of the converted model; None: do not calibrate.
        options: keyword arguments of :func:`sigswap.calibrate`. The report is the callback's attribute ``report``.

    Raises:
        SigswapError: lightning is not installed.
        NotConvertedError: in training: the LightningModule holds no converted model, or several.
        ArgumentError: in training: there is a scheduler, see above.
    """
    old = "pytorch_lightning"  # a package of its own, with a Trainer that takes no callbacks of the other
    pytorch: Any = require(
        old if old in sys.modules and "lightning.pytorch" not in sys.modules else "lightning", "lightning"
    )
    base: Any = getattr(pytorch, "pytorch", pytorch).Callback

    class Callback(base):  # type: ignore[misc]
        """Its ``report`` is None until training has begun."""

        def __init__(self) -> None:
            self.report: Any = None

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit" and batches is not None:
                self.report = calibrate(converted_part(pl_module), batches, **options)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            ours = {number for number, _ in added_parameters(pl_module)}
            for optimizer in trainer.optimizers:
                if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
                    exempt_from_decay(optimizer, converted_part(pl_module))

    return Callback()
