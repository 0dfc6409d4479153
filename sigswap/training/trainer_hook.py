"""transformers' Trainer leaves sigswap's parameters out of its weight decay. Set up when its module is imported.

Trainer decides by the names of parameters (none that hold "bias" or "norm"), and would decay ``query_weight``,
``layer_scale`` and others.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from sigswap.optional import require
from sigswap.training.calibrate import calibrate
from sigswap.training.weight_decay import added_parameters, decayed_parameters
from sigswap.when_imported import WhenImported

_WRAPPED = "_sigswap_wrapped"


def install() -> None:
    """At once if Trainer is imported, else when it will be."""
    _waiting.install()


def calibration_callback(batches: Any = 8, **options: Any) -> Any:
    """A ``TrainerCallback`` with which transformers' Trainer calibrates a converted model before its first step.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[sigswap.calibration_callback()])

    A run that is resumed from a checkpoint is not calibrated again.

    Args:
        batches: As for :func:`sigswap.calibrate`; or a number: so many batches of Trainer's own training data.
        options: Keyword arguments of :func:`sigswap.calibrate`. The report is the callback's attribute ``report``.

    Raises SigswapError if transformers is not installed.
    """
    transformers = require("transformers", "hf")

    class CalibrationCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Its ``report`` is None until training has begun."""

        def __init__(self) -> None:
            self.report: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step > 0:
                return
            data = _first(given["train_dataloader"], batches) if isinstance(batches, int) else batches
            self.report = calibrate(given["model"], data, **options)

    return CalibrationCallback()


def _first(loader: Iterable[Any], number: int) -> list[dict[str, Any]]:
    """Without the labels, which the model needs for its loss alone."""
    taken = [batch for batch, _ in zip(loader, range(number), strict=False)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in taken]


def _set_up(module: ModuleType) -> None:
    """Wraps Trainer's methods, once. A version in which that is not possible is left as it is."""
    try:
        _wrap(module.Trainer)
    except AttributeError as error:
        warnings.warn(
            f"this version of transformers' Trainer decays the parameters of sigmoid attention ({error}); make its "
            "optimizer with sigswap.param_groups.",
            stacklevel=2,
        )


_waiting = WhenImported("transformers.trainer", _set_up)


def _wrap(trainer: Any) -> None:
    if _WRAPPED in vars(trainer):
        return
    decay_names, create_optimizer = trainer.get_decay_parameter_names, trainer.create_optimizer

    @functools.wraps(decay_names)
    def exempting_decay_names(self: Any, model: Any) -> Any:
        names = decay_names(self, model)
        ours = {name for _, name in added_parameters(model)}
        return [name for name in names if name not in ours]

    @functools.wraps(create_optimizer)
    def checking_create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create_optimizer(self, *args, **kwargs)
        decayed = decayed_parameters(self.optimizer, self.model) if hasattr(self.optimizer, "param_groups") else []
        if decayed:
            warnings.warn(
                f"the optimizer decays parameters of sigmoid attention ({decayed[0]}{', ...' if decayed[1:] else ''}), "
                "which pulls a calibrated bias back. Call sigswap.exempt_from_decay(optimizer, model) before the "
                "learning rate scheduler is made, or make it with sigswap.param_groups.",
                stacklevel=2,
            )
        return optimizer

    setattr(trainer, _WRAPPED, (decay_names, create_optimizer))
    trainer.get_decay_parameter_names = exempting_decay_names
    trainer.create_optimizer = checking_create_optimizer
