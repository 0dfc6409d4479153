"""transformers' Trainer leaves sigswap's parameters out of its weight decay. Set up when its module is imported.

Trainer decides by the names of parameters (none that hold "bias" or "norm"), and would decay ``query_weight``,
``layer_scale`` and others.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any

from sigswap.conversion.record import conversion_of, converted_part
from sigswap.conversion.wrappers import unwrapped
from sigswap.errors import ArgumentError, Hint
from sigswap.optional import require
from sigswap.training.calibrate import calibrate, unchanged_if_it_fails
from sigswap.training.weight_decay import added_parameters, decayed_parameters, undecayed
from sigswap.transaction import Transaction
from sigswap.when_imported import WhenImported

_WRAPPED = "_sigswap_wrapped"


def install() -> None:
    """At once if Trainer is imported, else when it will be."""
    _waiting.install()


def calibration_callback(batches: Any = 8, **options: Any) -> Any:
    """A ``TrainerCallback`` with which transformers' Trainer calibrates a converted model before its first step.

    >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[sigswap.calibration_callback()])

    What calibration adds to the model (``query_weight`` and others of a decoder) is trained, too: it joins a group of
    the optimizer that decays nothing, in the model's order. A run that is resumed from a checkpoint is not calibrated
    again; its model has to be that of the checkpoint: ``sigswap.load(checkpoint)``.

    Args:
        batches: As for :func:`sigswap.calibrate`; or a number: so many batches of Trainer's own training data.
        options: Keyword arguments of :func:`sigswap.calibrate`. The report is the callback's attribute ``report``.

    Raises:
        SigswapError: transformers is not installed.
        ArgumentError: in training: a run is resumed with a model that is not calibrated, or the optimizer has no group
            for what calibration adds.
    """
    transformers = require("transformers", "hf")

    class CalibrationCallback(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        """Its ``report`` is None until training has begun."""

        def __init__(self) -> None:
            self.report: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model = given["model"]
            if state.global_step > 0:
                _check_resumed(model)
                return
            before = {id(parameter) for parameter in model.parameters()}
            data = _first(given["train_dataloader"], batches) if isinstance(batches, int) else batches
            with Transaction() as undo, undo:
                unchanged_if_it_fails(undo, converted_part(model))
                report = calibrate(model, data, **options)
                _train_too(given["optimizer"], model, before)
            self.report = report

    return CalibrationCallback()


def _first(loader: Iterable[Any], number: int) -> list[dict[str, Any]]:
    """Without the labels, which the model needs for its loss alone."""
    taken = [batch for batch, _ in zip(loader, range(number), strict=False)]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in taken]


def _check_resumed(model: Any) -> None:
    if conversion_of(unwrapped(model)).fitted_length is None:
        raise ArgumentError(
            "{argument} is not calibrated, and the run that is resumed was: it has other row caps, and may have no "
            "parameters for what the checkpoint holds.",
            argument="model",
            hint=Hint("Make Trainer with sigswap.load(checkpoint), and resume from that checkpoint."),
        )


def _train_too(optimizer: Any, model: Any, before: Collection[int]) -> None:
    """Puts the parameters that are not among ``before`` into the group without weight decay that is as the one of
    sigswap's others (or as the first), in the order of the model, as Trainer makes its groups: a state_dict goes by
    that order."""
    new = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in before]
    if not new:
        return
    ours, groups = {number for number, _ in added_parameters(model)}, optimizer.param_groups
    like = next((each for each in groups if any(id(p) in ours for p in each["params"])), groups[0])
    group = undecayed(groups, like)
    if group is None or "param_names" in group:
        raise ArgumentError(
            "{argument} has no group without weight decay that can take the parameters which calibration adds.",
            argument="optimizer",
            hint=Hint(
                "Convert with {query_bias} and {first_token}, so that they are there before the optimizer is made.",
                {"query_bias": "True", "first_token": "True"},
            ),
        )
    order = {id(parameter): number for number, parameter in enumerate(model.parameters())}
    group["params"] = sorted([*group["params"], *new], key=lambda parameter: order.get(id(parameter), -1))


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
