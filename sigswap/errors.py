"""Every exception that sigswap raises. A leaf module: it imports nothing of sigswap's.

Each message names the module path or the argument at fault and says what to do about it.
"""

from __future__ import annotations


class SigswapError(Exception):
    """Base class of all of sigswap's errors."""


class ArgumentError(SigswapError, ValueError):
    """An argument of a sigswap function is of the wrong type, shape, dtype, device or value."""


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


class CalibrationError(SigswapError, RuntimeError):
    """A model could not be calibrated or distilled on the batches. A failed calibration leaves it as it was."""


class CheckpointError(SigswapError, RuntimeError):
    """A directory could not be saved to or loaded from."""


class BenchmarkError(SigswapError, RuntimeError):
    """The benchmark cannot run on this machine, or sigswap's own op raised or was wrong in it."""
