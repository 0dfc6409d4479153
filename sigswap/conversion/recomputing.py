"""As what a module runs when a checkpoint computes its forward again: as it did at first.

``torch.utils.checkpoint`` calls a forward a second time in backward, where other switches can hold: when the
``with sigswap.softmax(model)`` is over, or when backward runs in another thread, as on a GPU it always does, which has
no part in the context of the first. So what ran as softmax inside a checkpoint is noted with it.

A checkpoint is known by Python's frames: of its forward and of its second call they hold the same object, which lives
as long as the checkpoint does. PyTorch has no public name for it.

Not so in compiled code, which has no frames: it follows the context of the second call.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch.utils import checkpoint

from sigswap.conversion.switches import Names, Switch

_NOTE = "_sigswap_as_softmax"
"""Of a checkpoint's object: the names of the switches of what ran as softmax in it."""


def runs_as_softmax(switch: Switch, switched: Names | None) -> bool:
    """Whether the module with this ``switch`` is to run as softmax now; ``switched``: what is in this context."""
    here = switched is not None and switch.is_in(switched)
    if torch.compiler.is_compiling():
        return here
    in_backward = torch._C._current_graph_task_id() != -1
    if not here and not in_backward:
        return False
    around: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            first, again = _checkpoint_of(frame)
            if again is not None:
                here = switch.name in getattr(again, _NOTE, ())
                break
            if first is not None:
                around.append(first)
        frame = frame.f_back
    if here:
        for each in around:
            setattr(each, _NOTE, {*getattr(each, _NOTE, ()), switch.name})
    return here


def _checkpoint_of(frame: FrameType) -> tuple[Any, Any]:
    """The object of the checkpoint whose function ``frame`` calls, for the first time or again; None: it is none."""
    name, values = frame.f_code.co_name, frame.f_locals
    if name == "forward":  # of CheckpointFunction, the reentrant one
        return values.get("ctx"), None
    if name == "backward":
        return None, values.get("ctx")
    if name == "unpack_hook":
        return None, values.get("frame")
    generator = getattr(values.get("gen"), "gi_frame", None)
    return (None if generator is None else generator.f_locals.get("new_frame")), None
