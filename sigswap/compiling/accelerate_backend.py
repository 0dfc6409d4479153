"""accelerate knows the backend "sigswap" of torch.compile, and so does transformers' TrainingArguments.

accelerate has an enumeration of backends, beside Dynamo's own registry. Set up when its module is imported.
"""

from __future__ import annotations

from types import ModuleType

from sigswap.when_imported import WhenImported

_NAME = "SIGSWAP"  # accelerate writes it in capitals, and gives it to torch.compile in small letters


def install() -> None:
    """At once if accelerate is imported, else when it will be."""
    _waiting.install()


def _set_up(module: ModuleType) -> None:
    backends = getattr(module, "DynamoBackend", None)
    known = getattr(backends, "_value2member_map_", None)
    if backends is None or known is None or _NAME in known or not issubclass(backends, str):
        return
    member = str.__new__(backends, _NAME)
    member._name_, member._value_ = _NAME, _NAME
    known[_NAME] = member


_waiting = WhenImported("accelerate.utils.dataclasses", _set_up)
