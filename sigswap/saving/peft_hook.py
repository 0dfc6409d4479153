"""peft: an adapter that was made for sigmoid attention says so, and is not put onto softmax attention.

The adapter_config.json of an adapter that was on a converted model has an entry "sigswap". peft ignores what it does
not know there, with a warning; with sigswap imported, putting such an adapter onto a model that is not converted is an
error. Set up when peft is imported, as :mod:`sigswap.saving.transformers_hook` is.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from sigswap import files
from sigswap.conversion.record import is_converted
from sigswap.errors import CheckpointError, Hint
from sigswap.transaction import Transaction
from sigswap.version import __version__
from sigswap.when_imported import WhenImported

MARK = "sigswap"  # of adapter_config.json
_MADE_FOR = "_sigswap_made_for"  # of a config that was read: its mark
_saving: contextvars.ContextVar[bool] = contextvars.ContextVar("sigswap_saving_adapters", default=False)


def _set_up(module: ModuleType) -> None:
    """Wraps peft's methods, once. A version in which that is not possible is left as it is."""
    try:
        _wrap(module)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"adapters of this version of peft do not tell sigmoid attention from softmax attention ({error}).",
            stacklevel=2,
        )


def install() -> None:
    """At once if peft is imported, else when it will be."""
    _waiting.install()


_waiting = WhenImported("peft.peft_model", _set_up)


@contextlib.contextmanager
def marked(model: object) -> Iterator[None]:
    """While it is open, configs of adapters that are saved are of ``model``, and say so if it is converted."""
    with Transaction() as undo, undo:
        undo.afterwards("whose adapters are saved", functools.partial(_saving.set, _saving.get()))
        _saving.set(isinstance(model, nn.Module) and is_converted(model))
        yield


def _wrap(peft_model: ModuleType) -> None:
    from peft.config import PeftConfigMixin
    from peft.tuners.tuners_utils import BaseTuner

    model_class = peft_model.PeftModel
    config_class: Any = PeftConfigMixin
    tuner_class: Any = BaseTuner
    save_model, save_config = model_class.save_pretrained, config_class.save_pretrained
    if hasattr(save_model, _MADE_FOR):
        return
    from_peft_type: Callable[..., Any] = config_class.from_peft_type.__func__
    init, add_adapter, inject = model_class.__init__, model_class.add_adapter, tuner_class.inject_adapter

    @functools.wraps(save_model)
    def marking_save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with marked(self):
            return save_model(self, *args, **kwargs)

    setattr(marking_save_pretrained, _MADE_FOR, True)

    @functools.wraps(save_config)
    def marked_save_pretrained(self: Any, save_directory: Any, **kwargs: Any) -> Any:
        result = save_config(self, save_directory, **kwargs)
        if _saving.get():
            path = os.path.join(save_directory, "adapter_config.json")
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            config[MARK] = {"sigswap_version": __version__}
            files.write_text(path, json.dumps(config, indent=2, sort_keys=True))
        return result

    @functools.wraps(from_peft_type)
    def reading_from_peft_type(cls: Any, **kwargs: Any) -> Any:
        mark = kwargs.pop(MARK, None)
        config = from_peft_type(cls, **kwargs)
        if mark is not None:
            vars(config)[_MADE_FOR] = mark
        return config

    @functools.wraps(init)
    def checking_init(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        _check(model, peft_config)
        init(self, model, peft_config, *args, **kwargs)

    @functools.wraps(add_adapter)
    def checking_add_adapter(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self, peft_config)
        return add_adapter(self, adapter_name, peft_config, *args, **kwargs)

    @functools.wraps(inject)
    def checking_inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        _check(model, self.peft_config[adapter_name])
        return inject(self, model, adapter_name, *args, **kwargs)

    model_class.save_pretrained = marking_save_pretrained
    model_class.__init__ = checking_init
    model_class.add_adapter = checking_add_adapter
    config_class.save_pretrained = marked_save_pretrained
    config_class.from_peft_type = classmethod(reading_from_peft_type)  # type: ignore[arg-type]
    tuner_class.inject_adapter = checking_inject_adapter


def _check(model: Any, config: Any) -> None:
    """Raises CheckpointError if an adapter was made for sigmoid attention, and ``model`` has none."""
    if _MADE_FOR in getattr(config, "__dict__", ()) and not is_converted(model):
        raise CheckpointError(
            f"this adapter ({config.peft_type.value}) was trained on a model with sigmoid attention, and "
            f"{type(model).__name__} has softmax attention.",
            hint=Hint("Put it onto the converted model: one that sigswap.load returns, or sigswap.convert."),
        )
