"""Every exception that sigswap raises, and a warning. A leaf module: it imports nothing of sigswap's.

An error says what is wrong (``message``), which argument is at fault (``argument``) and what to do about it (``hint``).
``str(error)`` writes arguments as Python does; the command line writes the same data with the names of its options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

Spelling = Callable[[str, str], str]
"""Writes an argument for a reader, from its name and the value that it shall have, in Python's syntax; "" if none."""


def in_python(argument: str, value: str) -> str:
    """The :data:`Spelling` of ``str(error)``: ``strict=False``."""
    return f"{argument}={value}" if value else argument


@dataclasses.dataclass(frozen=True)
class Hint:
    """What to do about an error: a sentence in which ``{name}`` stands for an argument of the function that was called.

    ``values`` has the value to pass for each of these arguments, in Python's syntax; "" if the sentence describes it.

    >>> str(Hint("Pass {strict} to leave them as softmax.", {"strict": "False"}))
    'Pass strict=False to leave them as softmax.'
    """

    sentence: str
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def spelled(self, spelling: Spelling) -> str:
        """The sentence, with the arguments as ``spelling`` writes them."""
        text = self.sentence
        for name, value in self.values.items():
            text = text.replace(f"{{{name}}}", spelling(name, value))
        return text

    def __str__(self) -> str:
        return self.spelled(in_python)


class SigswapError(Exception):
    """Base class of all of sigswap's errors.

    Attributes:
        argument: the name of the argument at fault, or None. ``{argument}`` in the message stands for it.
        hint: what to do about it, or None if there is nothing to say.
    """

    def __init__(self, message: str, /, *, argument: str | None = None, hint: Hint | None = None) -> None:
        # BaseException.__new__ puts the message into args; Dynamo, which can raise errors, cannot trace super() here.
        self.argument = argument
        self.hint = hint

    @property
    def message(self) -> str:
        """What is wrong, without the hint."""
        return self.spelled(in_python)

    def spelled(self, spelling: Spelling) -> str:
        """The message, with the argument as ``spelling`` writes it."""
        text = str(self.args[0])
        return text if self.argument is None else text.replace("{argument}", spelling(self.argument, ""))

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message} {self.hint}"


class ArgumentError(SigswapError, ValueError):
    """An argument of a sigswap function is of the wrong type, shape, dtype, device or value."""


def check_flag(argument: str, value: object) -> None:
    """Raises ArgumentError unless ``value`` is True or False: a string such as "no" would count as True."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{{argument}} must be True or False, not {value!r}.", argument=argument)


class ConfigError(SigswapError, ValueError):
    """A :class:`sigswap.SigmoidConfig` holds a value that is not allowed, or cannot be applied to a site."""


class ConversionError(SigswapError, RuntimeError):
    """A model could not be converted. The model is as it was before the call."""


class ExampleInputsError(ConversionError):
    """The model could not be run on the example inputs, or none are known and none were given."""


class NoAttentionError(ConversionError):
    """No softmax attention was found (or none is left after ``include`` and ``exclude``)."""


class UnswappableSiteError(ConversionError):
    """A softmax attention was found that cannot be swapped, and ``strict`` is on."""


class AlreadyConvertedError(ConversionError):
    """The model is converted already."""


class NotConvertedError(SigswapError, RuntimeError):
    """The model is not converted."""


class UnknownCallError(SigswapError, RuntimeError):
    """A converted module made an attention call that was not seen when the model was converted."""


class ContextParallelError(SigswapError, RuntimeError):
    """An attention cannot run among ranks of which each has a part of the sequence. Nothing was sent for it."""


class CalibrationError(SigswapError, RuntimeError):
    """A model could not be calibrated or distilled on the batches. A failed calibration leaves it as it was."""


class CheckpointError(SigswapError, RuntimeError):
    """A directory could not be saved to or loaded from."""


class CheckpointWarning(UserWarning):
    """What ``save_pretrained`` of a converted model has saved cannot be loaded; the message says what to do.

    A warning, so that it does not end a Trainer that saves in mid-training. To have it raised before anything is
    written: ``warnings.simplefilter("error", sigswap.errors.CheckpointWarning)``.
    """


class UndoError(SigswapError, RuntimeError):
    """Something that a call changes for a while could not be put back; the message names it."""


class BenchmarkError(SigswapError, RuntimeError):
    """The benchmark cannot run on this machine, or sigswap's own op raised or was wrong in it."""
