"""Puts a conversion onto a model, and takes it off again.

An owner becomes an instance of a subclass of its class (:mod:`sigswap.conversion.mode`) and gets the child ``sigswap``;
a torch.nn encoder that holds owners loses its fused inference path, which would bypass them.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import glob
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from sigswap.config import SigmoidConfig
from sigswap.conversion import accelerate_hooks
from sigswap.conversion.implementations import set_implementations
from sigswap.conversion.mode import base_class, swapped_class
from sigswap.conversion.record import RECORD, Conversion, conversion_of, converted_part, owners_of, set_fitted_length
from sigswap.conversion.replaced import watch_for_exchanges
from sigswap.conversion.state import OwnerPlan, OwnerState, decided_models
from sigswap.conversion.switches import Group, Switch
from sigswap.conversion.wrappers import check_undistributed
from sigswap.errors import AlreadyConvertedError, ConfigError, ConversionError, Hint
from sigswap.transaction import Note, Transaction, entries

_TERMS = ("query_weight", "length_share", "offset")  # those that a config can leave open
_FAST_PATH_BEFORE = "_sigswap_fast_path"  # the attribute of a torch.nn encoder (layer) that holds what was switched off
# What torch.nn.TransformerEncoder and TransformerEncoderLayer ask before they take the fused inference path, which
# never calls the attention module in them.
_FAST_PATH = {"use_nested_tensor": False, "activation_relu_or_gelu": 0}


def apply_conversion(model: nn.Module, conversion: Conversion) -> nn.Module:
    """:func:`convert_within` a transaction of its own. Returns the model."""
    with Transaction() as undo, undo:
        convert_within(undo.on_failure, model, conversion)
    return model


def convert_within(note: Note, model: nn.Module, conversion: Conversion) -> None:
    """Installs ``conversion`` on an unconverted ``model`` of the architecture it was made for, in place.

    New parameters take dtype and device from their owner (also meta, unless accelerate brings its weights for each
    call). Raises ConversionError if a module is missing or cannot be converted. ``note``: when it is undone.
    """
    states: dict[str, OwnerState] = {}
    for plan in conversion.owners:
        owner = _owner(model, plan.path)
        states[plan.path] = _made(model, plan, conversion.config.for_path(plan.path))
    group = Group(len(states))
    for state in states.values():
        state.switch = Switch(group)
    set_fitted_length(states.values(), conversion.fitted_length)
    guarded = [_owner(model, path) for path in conversion.guarded]
    unused = [pattern for pattern in conversion.config.overrides if not fnmatch.filter(states, pattern)]
    if unused:
        raise ConversionError(f"config.overrides names {unused}, which match no converted module of {sorted(states)}.")
    watch_for_exchanges()
    for path, state in states.items():
        owner = model.get_submodule(path)
        note(f"the class of {path or 'the model'}", accelerate_hooks.class_of(owner))
        try:
            owner.add_module("sigswap", state.train(owner.training))
            accelerate_hooks.set_class(owner, swapped_class(type(owner)))
        except Exception as error:
            raise ConversionError(f"{type(owner).__name__} cannot be converted: {error}") from error
    for module in guarded:
        note("the fused inference path", entries(vars(module), _FAST_PATH_BEFORE, *_FAST_PATH))
        _switch_off_fast_path(module)
    _decided(model, note)
    model.__dict__[RECORD] = conversion


def _decided(model: nn.Module, note: Note) -> None:
    """Notes what the model's record is, and whether it has been decided on; from now on it has."""
    note("the record of the conversion", entries(vars(model), RECORD))
    note(
        "what was decided",
        functools.partial(decided_models.add if model in decided_models else decided_models.discard, model),
    )
    decided_models.add(model)


def open_terms(note: Note, model: nn.Module) -> list[str]:
    """Gives the attentions of a converted ``model`` the terms that its config leaves open, as the config is then, too;
    returns the paths of those modules. ``note``: when it is undone.

    Where w_h cannot be (:class:`sigswap.conversion.state.SiteState`), there is the first key's term alone. The
    parameters that are there stay the same objects.
    """
    conversion, states = conversion_of(model), owners_of(model)
    chosen = {path: _with_open_terms(model, conversion, state) for path, state in states.items()}
    note("the record of the conversion", entries(vars(model), RECORD))
    for path, made in chosen.items():
        if made is None:
            continue
        keep_terms(note, states[path])
        for site, new in zip(states[path].sites(), made.sites(), strict=True):
            for name in _TERMS:
                if getattr(site, name) is None and getattr(new, name) is not None:
                    setattr(site, name, getattr(new, name))
            site.acts_on_product = new.acts_on_product
        states[path].intercepts_products = made.intercepts_products
    model.__dict__[RECORD] = dataclasses.replace(conversion, config=_closed(conversion.config, chosen))
    return [path for path, made in chosen.items() if made is not None]


def keep_terms(note: Note, state: OwnerState) -> None:
    """Notes which terms the attentions of a module have."""
    note("the terms", entries(vars(state), "intercepts_products"))
    for site in state.sites():
        note("the terms", entries(vars(site), "acts_on_product", *_TERMS))
        note("the terms", entries(site._parameters, *_TERMS))


def _with_open_terms(model: nn.Module, conversion: Conversion, state: OwnerState) -> OwnerState | None:
    """A state like ``state`` with the terms that are open and possible; None if there are none."""
    plan = state.plan
    config = conversion.config.for_path(plan.path)
    names = config.open_fields()
    every: dict[str, Any] = dict.fromkeys(names, True)
    for fields in (every, {name: name != "query_bias" for name in names}):
        if not any(fields.values()):
            continue
        tried = dataclasses.replace(config, **fields)
        try:
            return _made(model, plan, tried)
        except ConfigError:
            continue
    return None


def _made(model: nn.Module, plan: OwnerPlan, config: SigmoidConfig) -> OwnerState:
    # What is made inside of inference mode can never be trained, and inside of a FakeTensorMode it has no numbers.
    is_fake = any(isinstance(each, FakeTensor) for each in model.parameters())
    with torch.inference_mode(False), nullcontext() if is_fake else unset_fake_temporarily():
        return OwnerState(plan, config, *_dtype_and_device(model, plan.path))


def _closed(config: SigmoidConfig, chosen: Mapping[str, OwnerState | None]) -> SigmoidConfig:
    """``config`` with what the modules have ``chosen`` of the fields that it left open."""
    found = {}
    for path, made in chosen.items():
        names = config.for_path(path).open_fields()
        sites = [] if made is None else made.sites()
        has = {
            "query_bias": any(site.query_weight is not None for site in sites),
            "first_token": any(site.length_share is not None for site in sites),
        }
        found[path] = {name: has[name] for name in names}
    common: dict[str, Any] = {
        name: any(fields.get(name, False) for fields in found.values()) for name in config.open_fields()
    }
    closed = dataclasses.replace(config, **common)
    overrides = {pattern: dict(fields) for pattern, fields in closed.overrides.items()}
    for path, fields in found.items():
        other = {name: value for name, value in fields.items() if getattr(closed.for_path(path), name) != value}
        if other:
            pattern = glob.escape(path)
            overrides[pattern] = {**overrides.get(pattern, {}), **other}
    return dataclasses.replace(closed, overrides=overrides)


@contextmanager
def installed(model: nn.Module, conversion: Conversion) -> Iterator[None]:
    """Within it ``model`` is converted, as :func:`apply_conversion` does it; afterwards it is as it was."""
    with Transaction() as undo, undo:
        convert_within(undo.afterwards, model, conversion)
        yield


def revert(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert`, in place: the original model, bit for bit. Raises NotConvertedError.

    The parameters under ``*.sigswap.*`` are gone; base parameters keep whatever training made of them. What
    :func:`sigswap.compile_attention` has compiled is eager again. What ``torch.compile(backend="sigswap")`` compiled
    stays so, and swaps, as it does in any model that is not converted.
    """
    whole, model = model, converted_part(model)
    conversion = conversion_of(model)
    check_undistributed(whole, "be reverted")
    bases = [(path, module, base_class(module)) for path, module in model.named_modules()]
    converted = [(path, module, base) for path, module, base in bases if base is not None]
    for path, module, _ in converted:
        _check_revertible(path or "the model", module)
    with Transaction() as undo, undo:
        note = undo.on_failure
        for path, module, base in converted:
            note(f"the class of {path or 'the model'}", accelerate_hooks.class_of(module))
            note("what was compiled", entries(vars(module), "_compiled_call_impl"))
            state = module._modules.pop("sigswap", None)
            if isinstance(state, OwnerState) and state.compiled:
                module._compiled_call_impl = None
            accelerate_hooks.set_class(module, base)
        for module in model.modules():
            if _FAST_PATH_BEFORE in vars(module):
                note("the fused inference path", entries(vars(module), _FAST_PATH_BEFORE, *_FAST_PATH))
                module.__dict__.update(module.__dict__.pop(_FAST_PATH_BEFORE))
        _decided(model, note)
        del model.__dict__[RECORD]
        set_implementations(model, conversion.attn_implementations, note)
    return whole


def _check_revertible(where: str, module: nn.Module) -> None:
    if "_sigswap_base" not in vars(type(module)):
        raise ConversionError(
            f"{where}: its class was changed after the conversion (by FSDP or a parametrization).",
            hint=Hint("Undo that first."),
        )
    if accelerate_hooks.forward_is_replaced(module) and not accelerate_hooks.is_unhooked(module):
        raise ConversionError(
            f"{where}: its forward was replaced on the instance after the conversion.",
            hint=Hint("Delete that attribute first."),
        )
    if not isinstance(vars(module).get("_modules", {}).get("sigswap"), OwnerState | None):
        raise ConversionError(f"{type(module).__name__}: its child sigswap is not sigswap's; revert is not possible.")


def _switch_off_fast_path(module: nn.Module) -> None:
    before = {name: vars(module)[name] for name in _FAST_PATH if name in vars(module)}
    module.__dict__[_FAST_PATH_BEFORE] = before
    module.__dict__.update({name: _FAST_PATH[name] for name in before})


def _owner(model: nn.Module, path: str) -> nn.Module:
    try:
        owner = model.get_submodule(path)
    except AttributeError as error:
        raise ConversionError(f"{type(model).__name__} has no module {path!r}, which was converted.") from error
    where = path or "the model"
    if accelerate_hooks.forward_is_replaced(owner):
        raise ConversionError(
            f"{where}: its forward is replaced on the instance, which would bypass the swap.",
            hint=Hint("Convert the model first, or delete that attribute."),
        )
    if any(accelerate_hooks.offloads_inner_modules(module) for module in _inside_out(model, path)):
        raise ConversionError(
            f"{where}: accelerate offloads its weights together with those of the modules in it "
            "(preload_module_classes), of which sigswap's parameters would be missing.",
            hint=Hint("Convert the model before it is dispatched."),
        )
    if isinstance(owner._modules.get("sigswap"), OwnerState):
        raise AlreadyConvertedError(
            f"{where} is converted already.", hint=Hint("A factory has to build a new, unconverted model in each call.")
        )
    if hasattr(owner, "sigswap"):
        raise ConversionError(
            f"{where} has an attribute named sigswap, which the conversion needs.", hint=Hint("Rename it.")
        )
    if isinstance(owner, torch.jit.ScriptModule):
        raise ConversionError(f"{where} is scripted.", hint=Hint("Convert the model before torch.jit.script."))
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
