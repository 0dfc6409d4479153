"""What a converted model carries: the :class:`Conversion` it was given, and one :class:`OwnerState` per owner."""

from __future__ import annotations

import dataclasses
import glob
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sigswap.config import SigmoidConfig, check_row_cap
from sigswap.conversion import accelerate_hooks
from sigswap.conversion.mode import base_class
from sigswap.conversion.state import OwnerPlan, OwnerState
from sigswap.conversion.wrappers import check_module
from sigswap.errors import AlreadyConvertedError, ConfigError, Hint, NotConvertedError
from sigswap.report import Report
from sigswap.transaction import Transaction, entries

RECORD = "_sigswap_conversion"  # the attribute of a converted model that holds its Conversion
_CONVERT = Hint("Call sigswap.convert first.")
_CALIBRATED = "Calibrated: "  # how the note of a calibration starts


@dataclasses.dataclass(frozen=True)
class Conversion:
    """All that is needed to convert an equal model again without looking at it: plain data, also as JSON."""

    config: SigmoidConfig
    owners: tuple[OwnerPlan, ...]
    guarded: tuple[str, ...]
    report: Report
    attn_implementations: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by module path, before sdpa
    fitted_length: int | None = None  # the most visible keys of a row that a calibration saw

    def to_dict(self) -> dict[str, Any]:
        fitted = {} if self.fitted_length is None else {"fitted_length": self.fitted_length}
        return {
            "config": self.config.to_dict(),
            "owners": [owner.to_dict() for owner in self.owners],
            "guarded": list(self.guarded),
            "report": self.report.to_dict(),
            "attn_implementations": dict(self.attn_implementations),
            **fitted,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Conversion:
        return cls(
            SigmoidConfig.from_dict(data["config"]),
            tuple(OwnerPlan.from_dict(owner) for owner in data["owners"]),
            tuple(data["guarded"]),
            Report.from_dict(data["report"]),
            dict(data["attn_implementations"]),
            data.get("fitted_length"),
        )


def report(model: nn.Module) -> Report:
    """What :func:`convert` did to ``model``, and the row caps as they are now. Raises NotConvertedError."""
    model = converted_part(model)
    found = conversion_of(model).report
    caps = Counter(site.row_cap for state in owners_of(model).values() for site in state.sites())
    if set(caps) == {None}:
        return found
    each = ", ".join(f"{'none' if cap is None else f'{cap:.4g}'} ({number} attentions)" for cap, number in caps.items())
    return Report(found.sites, [*found.notes, f"Row cap: {each}."])


def set_row_cap(model: nn.Module, row_cap: float | Mapping[str, float | None] | None) -> nn.Module:
    """Changes the row caps of a converted model, in place; what is saved then has them, and compiled code follows.

    Biases stay: those that :func:`calibrate` has fitted are for the cap that they were fitted with, and the outputs of
    a calibrated model change with another. ``distill(lift_row_cap=...)`` moves both; or calibrate again.

    Args:
        model: As :func:`convert` returned it.
        row_cap: For all attentions: a positive number, or None for no cap (:class:`SigmoidConfig`). Or by the path of
            a converted module; others stay as they are.

    Returns:
        ``model``.

    Raises:
        NotConvertedError: ``model`` is not converted.
        ConfigError: A cap is not as above, or a path is not that of a converted module.
    """
    part = converted_part(model)
    conversion, states = conversion_of(part), owners_of(part)
    given = row_cap if isinstance(row_cap, Mapping) else dict.fromkeys(states, row_cap)
    unknown = sorted(set(given) - set(states))
    if unknown:
        raise ConfigError(
            f"{{argument}} names {unknown}, which are no converted modules of {sorted(states)}.", argument="row_cap"
        )
    for cap in given.values():
        check_row_cap(cap)
    before = {path: state.site(0).row_cap for path, state in states.items()}
    caps = {**before, **given}
    # In the config without any other row_cap, so that no pattern comes after these.
    config = conversion.config
    overrides = {
        pattern: {name: value for name, value in fields.items() if name != "row_cap"}
        for pattern, fields in config.overrides.items()
    }
    common = next(iter(caps.values())) if len(set(caps.values())) == 1 else None
    for path, cap in caps.items():
        if cap != common:
            pattern = glob.escape(path)
            overrides[pattern] = {**overrides.get(pattern, {}), "row_cap": cap}
    changed = dataclasses.replace(config, row_cap=common, overrides=overrides)
    with Transaction() as undo, undo:
        undo.on_failure("the record of the conversion", entries(vars(part), RECORD))
        for path, cap in given.items():
            for site in states[path].sites():
                undo.on_failure("the row cap", entries(vars(site), "row_cap"))
                site.row_cap = cap
        part.__dict__[RECORD] = dataclasses.replace(conversion, config=changed)
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether ``model``, or a module in it, has been converted. Raises ArgumentError if it is no module."""
    check_module(model)
    return any(base_class(module) is not None for module in model.modules())


def check_unconverted(model: Any, to_do: str) -> None:
    """Raises ArgumentError if ``model`` is no module, and AlreadyConvertedError if it, or a part of it, is converted.

    ``to_do``: what the user is to revert it for, "to convert it in another way" say.
    """
    check_module(model)
    if is_converted(model):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is converted already.", hint=Hint(f"Call sigswap.revert first {to_do}.")
        )


def converted_part(model: nn.Module) -> nn.Module:
    """The module that was given to :func:`convert`, if there is one such: ``model``, or what is in it.

    What is around it (a wrapper, a LightningModule, an nn.Sequential) does not matter to those who run nothing.
    """
    check_module(model)
    parts = [module for module in model.modules() if RECORD in vars(module)]
    return parts[0] if len(parts) == 1 else model


def part_to_pass(model: nn.Module) -> Hint | None:
    """Which part of ``model`` to pass in its place, where that was converted, and not ``model``."""
    inside = [path for path, module in model.named_modules() if RECORD in vars(module)]
    if not inside or "" in inside:
        return None
    return Hint(f"Pass {' or '.join(f'model.{path}' for path in inside)}, which was converted.")


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion that ``model`` carries. Raises NotConvertedError, also for a part of a converted model, and for
    what is around one.
    """
    conversion: Conversion | None = model.__dict__.get(RECORD)
    if conversion is None:
        hint = part_to_pass(model)
        if hint is not None:
            raise NotConvertedError(f"{type(model).__name__} is not converted itself.", argument="model", hint=hint)
        part = " (a part of it is: pass the model that was given to sigswap.convert)" if is_converted(model) else ""
        raise NotConvertedError(f"{type(model).__name__} is not converted{part}.", hint=_CONVERT)
    return conversion


def owners_of(model: nn.Module) -> dict[str, OwnerState]:
    """What sigswap added to each converted module of ``model``, by the module's path. Raises NotConvertedError."""
    check_module(model)
    states = {path: module.sigswap for path, module in model.named_modules() if base_class(module) is not None}
    if not states:
        raise NotConvertedError(f"{type(model).__name__} is not converted.", hint=_CONVERT)
    for state in states.values():
        accelerate_hooks.bring_parameters(state)
    return states


def note_calibration(model: nn.Module, text: str, longest: int) -> None:
    """Puts ``text`` into the report of a converted model, in place of what an earlier calibration said there.

    ``longest``: the most visible keys of a row that it saw. A run that is much longer warns from now on.
    """
    conversion = conversion_of(model)
    notes = [old for old in conversion.report.notes if not old.startswith(_CALIBRATED)]
    report = Report(conversion.report.sites, [*notes, _CALIBRATED + text])
    model.__dict__[RECORD] = dataclasses.replace(conversion, report=report, fitted_length=longest)
    set_fitted_length(owners_of(model).values(), longest)


def set_fitted_length(states: Iterable[OwnerState], longest: int | None) -> None:
    """Tells each attention what length it was fitted on."""
    for state in states:
        for site in state.sites():
            site.fitted_length = longest
