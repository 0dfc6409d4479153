"""Conversion of a model in place: find its softmax attentions, plan them, and make their owners run them as sigmoid."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sigswap.config import SigmoidConfig
from sigswap.conversion import accelerate_hooks
from sigswap.conversion.example_inputs import resolve_inputs
from sigswap.conversion.mode import base_class, swapped_class
from sigswap.conversion.plan import Sites, merge, plan_run, without
from sigswap.conversion.recording import Run, run
from sigswap.conversion.state import OwnerPlan, OwnerState, decided_models
from sigswap.errors import (
    AlreadyConvertedError,
    ArgumentError,
    ConfigError,
    ConversionError,
    ExampleInputsError,
    NoAttentionError,
    NotConvertedError,
    UnswappableSiteError,
)
from sigswap.report import Report, SiteRecord

_RECORD = "_sigswap_conversion"  # the attribute of a converted model that holds its Conversion
_CALIBRATED = "Calibrated: "  # how the note of a calibration starts
_FAST_PATH_BEFORE = "_sigswap_fast_path"  # the attribute of a torch.nn encoder (layer) that holds what was switched off


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


def convert(
    model: nn.Module,
    config: SigmoidConfig | None = None,
    *,
    example_inputs: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    strict: bool = True,
    calibrate_with: Any = None,
) -> nn.Module:
    """Swaps the softmax attentions of ``model`` for sigmoid attention, in place, and returns the same object.

    The sites are found by one run on fake tensors (no memory or compute of the model's size; a model on the meta
    device works as well). Every module that owns a site gets a child ``sigswap`` with the new parameters
    (``<owner>.sigswap.*`` in state_dict); the base parameters keep their names. From then on the model computes
    ``sigmoid(score + b)`` there, in eager, under any compile backend and in export (:class:`SigmoidConfig`: what b is).

    Args:
        model: the model; it may be on any device, also meta, or on several by accelerate (``device_map``).
        config: what becomes of each site; ``SigmoidConfig()`` by default.
        example_inputs: what the model is run on to find its sites: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or a list of those, one for each path through the code that is to be converted. By
            default what the model knows of itself (transformers, timm).
        include: glob patterns of module paths; only the attention modules that match one are swapped.
        exclude: glob patterns of module paths that stay as they are.
        strict: an attention that cannot be swapped is an error; otherwise it stays softmax and the report says why.
        calibrate_with: batches for :func:`sigswap.calibrate`, which is then run on the converted model.

    Raises:
        NoAttentionError: there is nothing to swap.
        UnswappableSiteError: ``strict``, and an attention cannot be swapped.
        AlreadyConvertedError: the model is converted already.
        ExampleInputsError: no inputs are known, or the model's forward fails on them.
        ConfigError: the config cannot be applied to a site.
        ConversionError: the model is compiled or scripted, or a module cannot be converted.
        CalibrationError, ArgumentError: as sigswap.calibrate raises them.

    Whatever is raised, the model is as it was.

    Source: arXiv 2409.04431, with the bias ``-ln(n)`` per row (its section 3) over the visible keys.
    """
    config = SigmoidConfig() if config is None else config
    if not isinstance(config, SigmoidConfig):
        raise ArgumentError(f"config must be a SigmoidConfig, not a {type(config).__name__}.")
    _check_convertible(model)
    with _ReachableAttention(model) as attention:
        sites, report = _look(model, example_inputs, include, exclude)
        stuck = [left for left in sites.left if left.attention and _selected(left.path, include, exclude)]
        if stuck and strict:
            raise UnswappableSiteError(
                f"{len(stuck)} softmax attention(s) of {type(model).__name__} cannot be swapped: "
                + "; ".join(f"{left.path or '(the model)'}: {left.reason}" for left in stuck[:5])
                + ("; ..." if len(stuck) > 5 else "")
                + ". Pass strict=False to leave them as softmax, or exclude=[...] to say which."
            )
        if not sites.owners:
            raise NoAttentionError(_why_none(model, report, include, exclude))
        swapped = [dataclasses.replace(r, status="swapped") if r.status == "swappable" else r for r in report.sites]
        conversion = Conversion(
            config,
            tuple(sites.owners.values()),
            tuple(sorted(sites.guarded)),
            Report(swapped, report.notes),
            attention.before,
        )
        apply_conversion(model, conversion)
        if calibrate_with is not None:
            _calibrate_or_revert(model, calibrate_with)
        attention.keep()
    return model


def _calibrate_or_revert(model: nn.Module, batches: Any) -> None:
    from sigswap.training.calibrate import calibrate

    try:
        calibrate(model, batches)
    except BaseException:
        revert(model)
        decided_models.discard(model)
        raise


def inspect(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Report:
    """The dry run of :func:`convert`: what would be swapped, what not, and why. The model is not changed.

    Raises ExampleInputsError, AlreadyConvertedError or ConversionError as convert does; finding nothing is no error.
    """
    _check_convertible(model)
    with _ReachableAttention(model):
        return _look(model, example_inputs, include, exclude)[1]


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, in place: the original model, bit for bit. Raises NotConvertedError.

    The parameters under ``*.sigswap.*`` are gone; base parameters keep whatever training made of them. What
    :func:`sigswap.compile_attention` has compiled is eager again. What ``torch.compile(backend="sigswap")`` compiled
    stays so, and swaps, as it does in any model that is not converted.
    """
    conversion = conversion_of(model)
    modules = [module for module in model.modules() if base_class(module) is not None]
    for path, module in model.named_modules():
        if base_class(module) is not None and "_sigswap_base" not in vars(type(module)):
            raise ConversionError(
                f"{path or 'the model'}: its class was changed after the conversion (by FSDP or a parametrization); "
                "undo that first."
            )
        replaced = accelerate_hooks.forward_is_replaced(module) and not accelerate_hooks.is_unhooked(module)
        if base_class(module) is not None and replaced:
            raise ConversionError(
                f"{path or 'the model'}: its forward was replaced on the instance after the conversion; delete that "
                "attribute first."
            )
    for module in modules:
        if not isinstance(module.__dict__.get("_modules", {}).get("sigswap"), OwnerState | None):
            raise ConversionError(
                f"{type(module).__name__}: its child sigswap is not sigswap's; revert is not possible."
            )
    for module in modules:
        if module.sigswap is not None and module.sigswap.compiled:
            module._compiled_call_impl = None
        accelerate_hooks.set_class(module, base_class(module))
        module._modules.pop("sigswap", None)
    for module in model.modules():
        module.__dict__.update(module.__dict__.pop(_FAST_PATH_BEFORE, {}))
    del model.__dict__[_RECORD]
    decided_models.add(model)
    _set_attn_implementations(model, conversion.attn_implementations)
    return model


def report(model: nn.Module) -> Report:
    """What :func:`convert` did to ``model``. Raises NotConvertedError."""
    return conversion_of(model).report


def is_converted(model: nn.Module) -> bool:
    """Whether ``model``, or a module in it, has been converted."""
    return any(base_class(module) is not None for module in model.modules())


@contextmanager
def softmax(model: nn.Module) -> Iterator[nn.Module]:
    """While it is open, the converted ``model`` runs as softmax, on the same weights and without a copy.

    >>> with sigswap.softmax(model):
    ...     before = model(x)

    LayerScale and hybrid-norm are off, too: it is the model that :func:`revert` would give. Code that was compiled
    before follows (torch.compile compiles once more); an exported program does not. Raises NotConvertedError.
    """
    with run_as_softmax(owners_of(model).values()):
        yield model


@contextmanager
def run_as_softmax(states: Collection[OwnerState]) -> Iterator[None]:
    """While it is open, these converted modules run as softmax."""
    switched = [state for state in states if not state.softmax]
    for state in switched:
        state.softmax = True
    try:
        yield
    finally:
        for state in switched:
            del state.softmax  # the class's again: nothing of it stays in what is saved


def owners_of(model: nn.Module) -> dict[str, OwnerState]:
    """What sigswap added to each converted module of ``model``, by the module's path. Raises NotConvertedError."""
    states = {path: module.sigswap for path, module in model.named_modules() if base_class(module) is not None}
    if not states:
        raise NotConvertedError(f"{type(model).__name__} is not converted; call sigswap.convert first.")
    return states


def note_calibration(model: nn.Module, text: str) -> None:
    """Puts ``text`` into the report of a converted model, in place of what an earlier calibration said there."""
    conversion = conversion_of(model)
    notes = [old for old in conversion.report.notes if not old.startswith(_CALIBRATED)]
    report = Report(conversion.report.sites, [*notes, _CALIBRATED + text])
    model.__dict__[_RECORD] = dataclasses.replace(conversion, report=report)


def conversion_of(model: nn.Module) -> Conversion:
    """The conversion that ``model`` carries. Raises NotConvertedError, also for a part of a converted model."""
    conversion = model.__dict__.get(_RECORD)
    if conversion is None:
        hint = " (a part of it is: pass the model that was given to sigswap.convert)" if is_converted(model) else ""
        raise NotConvertedError(f"{type(model).__name__} is not converted{hint}; call sigswap.convert first.")
    return conversion


def apply_conversion(model: nn.Module, conversion: Conversion) -> nn.Module:
    """Installs ``conversion`` on an unconverted ``model`` of the architecture it was made for, in place.

    New parameters take dtype and device from their owner (also meta, unless accelerate brings its weights for each
    call). Raises ConversionError if a module is missing or cannot be converted, and leaves the model as it was.
    """
    states: dict[str, OwnerState] = {}
    for plan in conversion.owners:
        owner = _owner(model, plan.path)
        _check_nesting(plan, conversion)
        states[plan.path] = OwnerState(
            plan, conversion.config.for_path(plan.path), *_dtype_and_device(model, plan.path)
        )
    guarded = [_owner(model, path) for path in conversion.guarded]
    unused = [pattern for pattern in conversion.config.overrides if not fnmatch.filter(states, pattern)]
    if unused:
        raise ConversionError(f"config.overrides names {unused}, which match no converted module of {sorted(states)}.")
    done: list[tuple[nn.Module, type]] = []
    try:
        for path, state in states.items():
            owner = model.get_submodule(path)
            done.append((owner, type(owner)))
            owner.add_module("sigswap", state.train(owner.training))
            accelerate_hooks.set_class(owner, swapped_class(type(owner)))
    except Exception as error:
        for module, cls in reversed(done):
            accelerate_hooks.set_class(module, cls)
            module._modules.pop("sigswap", None)
        raise ConversionError(f"{type(done[-1][0]).__name__} cannot be converted: {error}") from error
    for module in guarded:
        _switch_off_fast_path(module)
    model.__dict__[_RECORD] = conversion
    decided_models.add(model)
    return model


# What torch.nn.TransformerEncoder and TransformerEncoderLayer ask before they take the fused inference path, which
# never calls the attention module in them.
_FAST_PATH = {"use_nested_tensor": False, "activation_relu_or_gelu": 0}


def _switch_off_fast_path(module: nn.Module) -> None:
    before = {name: vars(module)[name] for name in _FAST_PATH if name in vars(module)}
    module.__dict__[_FAST_PATH_BEFORE] = before
    module.__dict__.update({name: _FAST_PATH[name] for name in before})


def _check_nesting(plan: OwnerPlan, conversion: Conversion) -> None:
    """The products of an owner inside another one would count as the outer one's: refused where products count."""
    config = conversion.config.for_path(plan.path)
    prefix = f"{plan.path}." if plan.path else ""
    inner = [other.path for other in conversion.owners if other is not plan and other.path.startswith(prefix)]
    intercepts = (config.query_bias or config.qk_norm is not None) and any(site.product for site in plan.sites)
    if inner and intercepts:
        raise ConfigError(
            f"{plan.path or 'the model'}: query_bias and qk_norm cannot act on a module that computes its own scores "
            f"and holds another attention module ({inner[0]}); switch them off for it with overrides."
        )


def _owner(model: nn.Module, path: str) -> nn.Module:
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise ConversionError(f"{type(model).__name__} has no module {path!r}, which was converted.") from error
    where = path or "the model"
    if accelerate_hooks.forward_is_replaced(owner):
        raise ConversionError(
            f"{where}: its forward is replaced on the instance, which would bypass the swap; convert the model first, "
            "or delete that attribute."
        )
    if any(accelerate_hooks.offloads_inner_modules(module) for module in _inside_out(model, path)):
        raise ConversionError(
            f"{where}: accelerate offloads its weights together with those of the modules in it "
            "(preload_module_classes), of which sigswap's parameters would be missing; convert the model before it is "
            "dispatched."
        )
    if hasattr(owner, "sigswap"):
        raise ConversionError(f"{where} has an attribute named sigswap, which the conversion needs; rename it.")
    if isinstance(owner, torch.jit.ScriptModule):
        raise ConversionError(f"{where} is scripted; convert the model before torch.jit.script.")
    return owner


def _dtype_and_device(model: nn.Module, path: str) -> tuple[torch.dtype, torch.device]:
    """Those of the owner's parameters, or of the nearest around it: the model may be spread over several devices."""
    for module in _inside_out(model, path):
        for tensor in module.parameters():
            if tensor.is_floating_point():
                offloaded = accelerate_hooks.execution_device(module) if tensor.is_meta else None
                return tensor.dtype, offloaded or tensor.device
    return torch.get_default_dtype(), torch.get_default_device()


def _inside_out(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The module at ``path``, the one that holds it, and so on up to ``model``."""
    while path:
        yield model.get_submodule(path)
        path = path.rpartition(".")[0]
    yield model


def _check_convertible(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not a {type(model).__name__}.")
    if is_converted(model):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is converted already; call sigswap.revert first to convert it in another way."
        )
    for path, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ConversionError(
                f"{path or 'the model'} is compiled. Convert the model first and compile it afterwards: "
                "torch.compile(sigswap.convert(model))."
            )


def _look(
    model: nn.Module, example_inputs: Any, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[Sites, Report]:
    """The sites that are to be swapped, and the report of a dry run."""
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ArgumentError(f"{name} must be a list of patterns, not a string: {name}=[{patterns!r}].")
    notes: list[str] = []
    runs = []
    inputs = resolve_inputs(model, example_inputs)
    for call in inputs:
        runs.append(run(model, call))
    given = len(runs)
    for name, prepare in _variants(model):
        for call in inputs:
            try:
                runs.append(run(model, call, prepare))
            except ExampleInputsError as error:
                notes.append(f"not looked at with {name}: {error.__cause__ or error}")
    if any(recorded.real for recorded in runs):
        notes.append("The forward depends on values of its inputs: it was run on copies of the real parameters.")

    everything = _merged(model, runs, given, None, notes)
    notes += _note_of_idle_modules(model, runs)
    for name, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not fnmatch.filter([*everything.owners, *(left.path for left in everything.left)], pattern):
                raise ArgumentError(
                    f"{name}: {pattern!r} matches no attention module; they are {sorted(everything.owners)}."
                )
    chosen = [path for path in everything.owners if _selected(path, include, exclude)]
    sites = everything if len(chosen) == len(everything.owners) else _merged(model, runs, given, chosen, [])
    return sites, Report(_records(everything, chosen), list(dict.fromkeys(notes)))


def _merged(model: nn.Module, runs: Sequence[Run], given: int, wanted: Sequence[str] | None, notes: list[str]) -> Sites:
    """One plan from all runs: the first ``given`` are the user's inputs, the others variants of them.

    An owner whose calls two inputs number differently cannot be addressed, and is left.
    """
    known = dict.fromkeys(path for recorded in runs[:given] for path in plan_run(model, recorded, wanted).owners)
    sites = plan_run(model, runs[0], wanted, known)
    for index, recorded in enumerate(runs[1:], start=1):
        sites, clashes = merge(sites, plan_run(model, recorded, wanted, known if index < given else ()))
        for path in clashes:
            if index < given:
                sites = without(
                    sites, path, "its inputs take paths through its code that number their calls differently"
                )
            else:
                notes.append(f"{path}: only the calls of its present form (attention implementation) are known")
    return sites


# Holders of modules, and of nn.MultiheadAttention's last weight and bias, which it passes to a function.
_NEVER_RUN = (nn.ModuleList, nn.ModuleDict, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _note_of_idle_modules(model: nn.Module, runs: Sequence[Run]) -> list[str]:
    """A note that names the modules with parameters that no run has reached, the outermost ones, if there are any."""
    executed = {path for recorded in runs for path in recorded.executed}
    idle = [
        f"{path} ({type(module).__name__})"
        for path, module in model.named_modules()
        if path not in executed
        and path.rpartition(".")[0] in executed
        and not isinstance(module, _NEVER_RUN)
        and any(True for _ in module.parameters())
    ]
    if not idle:
        return []
    shown = ", ".join(idle[:5]) + (", ..." if len(idle) > 5 else "")
    return [
        f"Not run by the example inputs, so not looked at: {shown}. Attention in there stays softmax; add an input "
        "that reaches it."
    ]


def _selected(path: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    wanted = include is None or any(fnmatch.fnmatchcase(path, pattern) for pattern in include)
    return wanted and not any(fnmatch.fnmatchcase(path, pattern) for pattern in exclude or ())


def _records(sites: Sites, chosen: Sequence[str]) -> list[SiteRecord]:
    records = []
    for path, plan in sites.owners.items():
        status, reason = ("swappable", "") if path in chosen else ("left", "excluded")
        for site in plan.sites:
            records.append(SiteRecord(path, site.kind, site.heads, site.head_dim, site.mask, status, reason))
    for left in sites.left:
        records.append(SiteRecord(left.path, left.kind, None, None, "", "left", left.reason))
    return records


def _why_none(model: nn.Module, report: Report, include: Sequence[str] | None, exclude: Sequence[str] | None) -> str:
    if any(site.reason == "excluded" for site in report.sites):
        return f"include={include} and exclude={exclude} leave no attention of {type(model).__name__} to swap."
    reasons = "; ".join(dict.fromkeys(f"{s.path or '(the model)'}: {s.reason}" for s in report.sites[:5]))
    return f"no softmax attention was found in {type(model).__name__}" + (f" ({reasons})." if reasons else ".")


# Other paths through the same code, that a user may switch to after the conversion.


def _variants(model: nn.Module) -> Iterator[tuple[str, Callable[[nn.Module], None]]]:
    implementation = _attn_implementation(model)
    if implementation in ("sdpa", "eager"):
        other = "eager" if implementation == "sdpa" else "sdpa"
        yield f"attn_implementation={other!r}", lambda clone: clone.set_attn_implementation(other)
    if any(isinstance(getattr(module, "fused_attn", None), bool) for module in model.modules()):
        yield "fused_attn toggled", _toggle_fused_attn


def _toggle_fused_attn(clone: nn.Module) -> None:
    for module in clone.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = not module.fused_attn


def _attn_implementation(model: nn.Module) -> str | None:
    """The attention implementation of a transformers model; None for any other."""
    if not hasattr(model, "set_attn_implementation"):
        return None
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


class _ReachableAttention:
    """Sets what a transformers model runs inside one opaque op (flash, flex) to sdpa; back again, unless it is kept.

    ``before`` holds the implementations that were changed, by module path.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: dict[str, str] = {}
        self.kept = False

    def __enter__(self) -> _ReachableAttention:
        for path, module in self.model.named_modules():
            implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if implementation not in (None, "sdpa", "eager"):
                self.before[path] = implementation
        # A config also sets its parts': all are read before the first is changed.
        _set_attn_implementations(self.model, dict.fromkeys(self.before, "sdpa"))
        return self

    def keep(self) -> None:
        self.kept = True

    def __exit__(self, *error: object) -> None:
        if not self.kept:
            _set_attn_implementations(self.model, self.before)


def _set_attn_implementations(model: nn.Module, implementations: Mapping[str, str]) -> None:
    """Past the checks of the model's own method: flash attention need not be installed to be put back."""
    for path, implementation in implementations.items():
        # Not the property _attn_implementation, which sets the parts' as well.
        model.get_submodule(path).config._attn_implementation_internal = implementation
