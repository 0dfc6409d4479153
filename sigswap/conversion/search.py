"""Looks for the softmax attentions of a model, on every path through its code that is known, and plans their swap."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence

from torch import nn

from sigswap.conversion.implementations import Reachable, other_implementations
from sigswap.conversion.plan import AMBIGUOUS, Sites, merge, plan_run, without
from sigswap.conversion.recording import Example, Recording, Run
from sigswap.errors import ArgumentError, ConversionError, Hint
from sigswap.report import Report, SiteRecord

_NEVER_RUN = (nn.ModuleList, nn.ModuleDict)


def search(
    recording: Recording,
    examples: Sequence[Example],
    change: Reachable,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> tuple[Sites, Report]:
    """The sites of the recording's model that are to be swapped, and the report of a dry run. It is not changed.

    ``change``: of its attention implementation, that the conversion makes. Raises ExampleInputsError, or ArgumentError
    for a pattern in include or exclude that matches no attention module.
    """
    model = recording.model
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ArgumentError(
                "{argument} must be a list of patterns, not a string.",
                argument=name,
                hint=Hint(f"Pass {{{name}}}.", {name: f"[{patterns!r}]"}),
            )
        several = isinstance(patterns, Collection) and not isinstance(patterns, bytes)
        if patterns is not None and not (several and all(isinstance(pattern, str) for pattern in patterns)):
            raise ArgumentError(f"{{argument}} must be a list of patterns, not {patterns!r}.", argument=name)
    notes = [*change.note]
    runs = []
    recording.form = change.form
    for example in examples:
        runs.append(recording.run(example))
    given = len(runs)
    for name, form in other_implementations(model, change.now):
        for example in examples:
            try:
                runs.append(recording.run(example, form))
            except ConversionError as error:
                notes.append(f"not looked at with {name}: {error}")
    if any(recorded.way != "fake" for recorded in runs):
        notes.append("The forward cannot be run on fake tensors: it was run on the model's own.")

    everything = _merged(model, runs, given, None, notes)
    notes += _note_of_idle_modules(model, runs)
    for name, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not fnmatch.filter([*everything.owners, *(left.path for left in everything.left)], pattern):
                raise ArgumentError(
                    f"{{argument}}: {pattern!r} matches no attention module; they are {sorted(everything.owners)}.",
                    argument=name,
                )
    chosen = [path for path in everything.owners if selected(path, include, exclude)]
    sites = everything if len(chosen) == len(everything.owners) else _merged(model, runs, given, chosen, [])
    return sites, Report(_records(everything, chosen), list(dict.fromkeys(notes)))


def selected(path: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Whether the module at ``path`` is to be swapped by the user's patterns."""
    wanted = include is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in include)
    return wanted and not any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude or ())


def _merged(model: nn.Module, runs: Sequence[Run], given: int, wanted: Sequence[str] | None, notes: list[str]) -> Sites:
    """One plan from all runs: the first ``given`` are the user's inputs, the others variants of them.

    An owner of which two inputs call one expression for different things cannot be addressed, and is left.
    """
    known = dict.fromkeys(path for recorded in runs[:given] for path in plan_run(model, recorded, wanted).owners)
    sites = plan_run(model, runs[0], wanted, known)
    for index, recorded in enumerate(runs[1:], start=1):
        sites, clashes = merge(sites, plan_run(model, recorded, wanted, known if index < given else ()))
        for path in clashes:
            if index < given:
                sites = without(sites, path, AMBIGUOUS)
            else:
                notes.append(f"{path}: only the calls of its present form (attention implementation) are known")
    return sites


def _note_of_idle_modules(model: nn.Module, runs: Sequence[Run]) -> list[str]:
    """A note that names the modules with parameters that no run has reached, the outermost ones, if there are any."""
    executed = {path for recorded in runs for path in recorded.executed}
    if "" not in executed:  # parts of it were run: what is around them has run, as far as it can
        executed |= {path[:end] for path in executed for end in (0, *(m.start() for m in re.finditer(r"\.", path)))}
    idle = [
        f"{path} ({type(module).__name__})"
        for path, module in model.named_modules()
        if path not in executed
        and path.rpartition(".")[0] in executed
        and not isinstance(module, _NEVER_RUN)
        and not _is_a_layer_of_torch(module)
        and any(True for _ in module.parameters())
    ]
    if not idle:
        return []
    shown = ", ".join(idle[:5]) + (", ..." if len(idle) > 5 else "")
    return [
        f"Not run by the example inputs, so not looked at: {shown}. Attention in there stays softmax; add an input "
        "that reaches it."
    ]


def _is_a_layer_of_torch(module: nn.Module) -> bool:
    """One that holds no others: there is no attention in it. (nn.MultiheadAttention passes the weight of its last one
    to a function; peft keeps a copy of those that it trains whole.)
    """
    return type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())


def _records(sites: Sites, chosen: Sequence[str]) -> list[SiteRecord]:
    records = []
    for path, plan in sites.owners.items():
        status, reason = ("swappable", "") if path in chosen else ("left", "excluded")
        for site in plan.sites:
            records.append(SiteRecord(path, site.kind, site.heads, site.head_dim, site.mask, status, reason))
    for left in sites.left:
        records.append(SiteRecord(left.path, left.kind, None, None, "", "left", left.reason))
    return records
