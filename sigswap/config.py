"""What a conversion does to each site: the bias policy and the optional parts of the paper's recipe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from sigswap.errors import ConfigError

_OVERRIDABLE = ("bias", "learn_bias", "query_bias", "first_token", "qk_norm", "layer_scale", "hybrid_norm", "row_cap")
_SATURATED = 16.0  # sigmoid(16) is 1 in float32, but for the last bit
OPEN = ("query_bias", "first_token")
"""The fields that may be None: left to a calibration, which knows what the model is."""
_NEWER: dict[str, Any] = {"first_token": False, "row_cap": None}
"""The fields that version 0.1 does not know, by what leaves the attention as it was there."""


@dataclasses.dataclass(frozen=True)
class SigmoidConfig:
    """How a softmax attention becomes ``sigmoid(score + b)``, with ``b = b0 + c_h + w_h . q``.

    With ``first_token`` it is ``b = d_h - logaddexp(s_first, -(a_h b0 + c_h + w_h . q))``.

    ``SigmoidConfig()`` is for a pretrained model; :meth:`from_scratch` is the recipe of the paper
    (arXiv 2409.04431) for a model that is trained anew.

    Attributes:
        bias: ``b0``. ``"visible"``: ``-ln(n_i)``, where ``n_i`` is the number of keys visible to row i;
            an ``int`` n: ``-ln(n)`` for every row (the paper's: n is the training length);
            a ``float``: that very number for every row. So ``128`` is -4.85, and ``128.0`` is 128.
        learn_bias: adds ``c_h``, one trainable number per head, 0 at first.
        query_bias: adds ``w_h . q_i``, one trainable vector [head_dim] per head, 0 at first. ``None``: not for now;
            :func:`sigswap.calibrate` adds it to a decoder, unless ``bias`` is a number or ``learn_bias`` is off.
        first_token: takes the score ``s_first`` of the first key that a row sees as it is, with scale, soft cap and
            additive mask, so that ``b0``, ``c_h`` and ``w_h`` stand for the rest of the row. Adds ``a_h``, one
            trainable number per head, 1 at first, and ``d_h``, likewise, 0 at first. For decoders: their first token
            gets much of the attention. The first key is that of the row: beside padding the first that is no padding,
            in packed sequences each one's own, and in a window that has moved on the oldest one in it. ``None``: as
            for ``query_bias``.
        qk_norm: ``"rms"`` or ``"layer"`` normalises query and key over head_dim, with trainable weights
            [heads, head_dim], before their product. ``None``: no norm.
        layer_scale: multiplies the attention module's output by a trainable vector [channels] that
            starts at this value (1.0 leaves a pretrained model as it is; the paper's is 1e-4).
        hybrid_norm: puts a LayerNorm on the attention module's output (the paper's hybrid-norm).
        row_cap: a number C divides each row of probabilities by ``max(C, their sum)``, so that no row of a
            pretrained model sums to more than 1, at any length. ``None``: the paper's sigmoid, without a cap.
        overrides: per module path: ``{glob pattern: {field: value}}``; of several patterns that match
            a path, later ones win.
    """

    bias: Literal["visible"] | int | float = "visible"
    learn_bias: bool = True
    query_bias: bool | None = None
    first_token: bool | None = None
    qk_norm: Literal["rms", "layer"] | None = None
    layer_scale: float | None = None
    hybrid_norm: bool = False
    row_cap: float | None = None
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_bias(self.bias)
        for name in ("learn_bias", "query_bias", "first_token", "hybrid_norm"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name not in OPEN):
                raise ConfigError(f"{{argument}} must be True or False, not {getattr(self, name)!r}.", argument=name)
        if self.qk_norm not in (None, "rms", "layer"):
            raise ConfigError(
                f"{{argument}} must be 'rms' or 'layer' where it is given, not {self.qk_norm!r}.", argument="qk_norm"
            )
        scale = self.layer_scale
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if scale is not None and not (is_number and math.isfinite(scale)):
            raise ConfigError(
                f"{{argument}} must be a finite number where it is given, not {scale!r}.", argument="layer_scale"
            )
        check_row_cap(self.row_cap)
        if not isinstance(self.overrides, Mapping):
            raise ConfigError(
                f"{{argument}} must be a mapping of path pattern to fields, not {self.overrides!r}.",
                argument="overrides",
            )
        for pattern, fields in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(fields, Mapping):
                raise ConfigError(
                    f"{{argument}}[{pattern!r}]: {fields!r} must be a mapping of field to value, by a string that is "
                    "a pattern.",
                    argument="overrides",
                )
            unknown = sorted(set(fields) - set(_OVERRIDABLE))
            if unknown:
                raise ConfigError(
                    f"{{argument}}[{pattern!r}] names {unknown}; the fields are {list(_OVERRIDABLE)}.",
                    argument="overrides",
                )
            SigmoidConfig(**fields)  # checks the values

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # Pickles of version 0.1 lack the newer fields, and leave nothing open.
        vars(self).update({**_NEWER, **state})

    @classmethod
    def from_scratch(cls, n: int, **changes: Any) -> SigmoidConfig:
        """The paper's recipe for training from scratch at sequence length ``n`` (arXiv 2409.04431, section 5).

        ``b = -ln(n)`` in every row, also under a causal mask, QK-norm, and LayerScale from 1e-4.
        ``changes`` replace single fields.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"{{argument}} must be the training length, a positive int, not {n!r}.", argument="n")
        recipe: dict[str, Any] = {
            "bias": n,
            "learn_bias": False,
            "query_bias": False,
            "first_token": False,
            "qk_norm": "layer",
            "layer_scale": 1e-4,
        }
        return cls(**{**recipe, **changes})

    def for_path(self, path: str) -> SigmoidConfig:
        """This config with the overrides that match the module ``path`` applied, and none left over."""
        fields = self.fields()
        for pattern, changes in self.overrides.items():
            if fnmatchcase(path, pattern):
                fields.update(changes)
        return SigmoidConfig(**fields)

    def saturated_bias(self) -> float | None:
        """A bias that is so high that each visible key has the weight 1: a number of keys that was meant, perhaps."""
        biases = [self.bias, *(fields["bias"] for fields in self.overrides.values() if "bias" in fields)]
        return next((bias for bias in biases if isinstance(bias, float) and bias > _SATURATED), None)

    def open_fields(self) -> list[str]:
        """Those that are left to a calibration. A bias that is a number, or not learned, is a recipe of the user's."""
        if self.bias != "visible" or not self.learn_bias:
            return []
        return [name for name in OPEN if getattr(self, name) is None]

    def fields(self) -> dict[str, Any]:
        """All fields but ``overrides``, by name."""
        return {name: getattr(self, name) for name in _OVERRIDABLE}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold; :meth:`from_dict` reads it back, and so does version 0.1, unless a field is
        used that it does not have, or ``first_token`` is left open beside a ``query_bias`` that is not.

        Fields that are left open are left out, but for that one: version 0.1 writes ``query_bias``, and means that
        there is no ``first_token``.
        """
        fields = {name: value for name, value in self.fields().items() if name not in _NEWER or value != _NEWER[name]}
        beside = self.query_bias is not None
        fields = {
            name: value
            for name, value in fields.items()
            if name not in OPEN or value is not None or (name == "first_token" and beside)
        }
        return {**fields, "overrides": {pattern: dict(changes) for pattern, changes in self.overrides.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SigmoidConfig:
        """The config that :meth:`to_dict` wrote. Raises ConfigError on a field that does not exist."""
        unknown = sorted(set(data) - {*_OVERRIDABLE, "overrides"})
        if unknown:
            raise ConfigError(f"unknown fields {unknown}; the fields are {[*_OVERRIDABLE, 'overrides']}.")
        closed = {"first_token": False} if "query_bias" in data else {}
        return cls(**{**closed, **data})


def check_row_cap(row_cap: Any) -> None:
    """Raises ConfigError unless it is None or a positive finite number."""
    is_number = isinstance(row_cap, int | float) and not isinstance(row_cap, bool)
    if row_cap is not None and not (is_number and 0.0 < row_cap < math.inf):
        raise ConfigError(
            f"{{argument}} must be a positive finite number where it is given, not {row_cap!r}.", argument="row_cap"
        )


def _check_bias(bias: object) -> None:
    if bias == "visible":
        return
    if isinstance(bias, int) and not isinstance(bias, bool):
        if bias < 1:
            raise ConfigError(
                f"{{argument}}={bias}: an int is a number of keys, and must be at least 1.", argument="bias"
            )
    elif not isinstance(bias, float) or not math.isfinite(bias):
        raise ConfigError(
            f"{{argument}} must be 'visible', a positive int or a finite float, not {bias!r}.", argument="bias"
        )
