"""What a converted model carries: the :class:`Conversion` it was given, and one :class:`OwnerState` per owner."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from sigswap.config import SigmoidConfig
from sigswap.conversion.mode import base_class
from sigswap.conversion.state import OwnerPlan, OwnerState
from sigswap.errors import Hint, NotConvertedError
from sigswap.report import Report

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

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "owners": [owner.to_dict() for owner in self.owners],
            "guarded": list(self.guarded),
            "report": self.report.to_dict(),
            "attn_implementations": dict(self.attn_implementations),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Conversion:
        return cls(
            SigmoidConfig.from_dict(data["config"]),
            tuple(OwnerPlan.from_dict(owner) for owner in data["owners"]),
            tuple(data["guarded"]),
            Report.from_dict(data["report"]),
            dict(data["attn_implementations"]),
        )


def report(model: nn.Module) -> Report:
    """What :func:`convert` did to ``model``. Raises NotConvertedError."""
    return conversion_of(model).report


def is_converted(model: nn.Module) -> bool:
    """Whether ``model``, or a module in it, has been converted."""
    return any(base_class(module) is not None for module in model.modules())


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion that ``model`` carries. Raises NotConvertedError, also for a part of a converted model."""
    conversion: Conversion | None = model.__dict__.get(RECORD)
    if conversion is None:
        part = " (a part of it is: pass the model that was given to sigswap.convert)" if is_converted(model) else ""
        raise NotConvertedError(f"{type(model).__name__} is not converted{part}.", hint=_CONVERT)
    return conversion


def owners_of(model: nn.Module) -> dict[str, OwnerState]:
    """What sigswap added to each converted module of ``model``, by the module's path. Raises NotConvertedError."""
    states = {path: module.sigswap for path, module in model.named_modules() if base_class(module) is not None}
    if not states:
        raise NotConvertedError(f"{type(model).__name__} is not converted.", hint=_CONVERT)
    return states


def note_calibration(model: nn.Module, text: str) -> None:
    """Puts ``text`` into the report of a converted model, in place of what an earlier calibration said there."""
    conversion = conversion_of(model)
    notes = [old for old in conversion.report.notes if not old.startswith(_CALIBRATED)]
    report = Report(conversion.report.sites, [*notes, _CALIBRATED + text])
    model.__dict__[RECORD] = dataclasses.replace(conversion, report=report)
