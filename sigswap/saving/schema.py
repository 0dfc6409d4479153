"""What a saved directory's JSON may say, checked as a whole before anything is built.

Each value has a type and a range; what belongs together has to fit: a call names a site that there is, axes are those
of tensors that there can be, and query heads are a multiple of key heads. What cannot be seen to be wrong, one axis in
place of another one, say, is told by checksums that the save wrote beside it. They guard against damage; whoever writes
a directory can write them, too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sigswap.config import SigmoidConfig
from sigswap.conversion.record import Conversion
from sigswap.conversion.state import NOT_ATTENTION
from sigswap.errors import CheckpointError, ConfigError, Hint
from sigswap.saving import unloadable
from sigswap.saving.quantized import METHODS

FORMAT = 1
"""The version of the format; a later one that this one cannot read has another number."""
MOST_BYTES = 1 << 26
"""Of a JSON file. Those of the largest models have about 2^20."""
MOST_AXES, MOST = 16, 2**40
LARGEST = 3.0e38  # of a float32

Check = Callable[[Any, str], None]
"""Raises CheckpointError, about the field that is named, unless the value is as it has to be."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without repeated names, NaN and infinities. Raises CheckpointError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path} has more than {MOST_BYTES} bytes.")
        data = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_no_number, object_pairs_hook=_without_repetition
        )
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return data


def check_format(entry: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError if ``entry`` was not written in a format that this version reads."""
    found = entry.get("format")
    if isinstance(found, bool) or found != FORMAT:
        raise CheckpointError(
            f"{where}: sigswap's format {found!r} is not the one that this version reads ({FORMAT}); "
            f"it was written by sigswap {entry.get('sigswap_version', 'of an unknown version')}."
        )


def conversion_from(data: Any, where: str) -> Conversion:
    """The conversion that ``data``, the field ``where``, describes. Raises CheckpointError."""
    _CONVERSION(data, where)
    paths = [owner["path"] for owner in data["owners"]]
    if len(set(paths)) < len(paths):
        _wrong(f"{where}.owners", "name each module once", paths)
    try:
        conversion = Conversion.from_dict(data)
        products = [_acts_on_products(conversion.config.for_path(path)) for path in paths]
    except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    for index, (owner, acts) in enumerate(zip(data["owners"], products, strict=True)):
        _check_calls(owner, acts, f"{where}.owners[{index}]")
    return conversion


def checksums(fields: Mapping[str, Any]) -> dict[str, str]:
    """A checksum of each field: of its value, whatever the layout of the JSON and the order of its names."""
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
        for name, value in fields.items()
    }


def check_checksums(fields: Mapping[str, Any], written: Any, where: str, name: str = "checksums") -> None:
    """Raises CheckpointError if one of ``fields`` is not what it was when the checksums were ``written``, as ``name``.

    ``written`` None: an earlier version saved the directory, or somebody has removed them.
    """
    if written is None:
        return
    mapping(text)(written, f"{where}: {name}")
    now = checksums(fields)
    changed = sorted(field for field in {*now, *written} if now.get(field) != written.get(field))
    if changed:
        raise CheckpointError(
            f"{where}: {', '.join(changed[:5])}{' and more' if len(changed) > 5 else ''}: not what was saved.",
            hint=Hint(f'If you changed it on purpose, remove "{name}" from the file.'),
        )


# Checks


def text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        _wrong(where, "be a string", value)


def boolean(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _wrong(where, "be true or false", value)


def integer(low: int, high: int = MOST) -> Check:
    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            _wrong(where, f"be an integer from {low} to {high}", value)

    return check


def number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        _wrong(where, "be a finite number", value)


def factor(value: Any, where: str) -> None:
    number(value, where)
    if not abs(value) > 1 / LARGEST:
        _wrong(where, "be a number other than 0", value)


def one_of(*values: Any) -> Check:
    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(each) and value == each for each in values):
            _wrong(where, f"be one of {', '.join(map(repr, values))}", value)

    return check


def optional(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def array(check: Check, low: int = 0, high: int = MOST) -> Check:
    def checked(value: Any, where: str) -> None:
        if not isinstance(value, list) or not low <= len(value) <= high:
            _wrong(where, "be a list" if high == MOST and not low else f"be a list of {low} to {high} items", value)
        for index, item in enumerate(value):
            check(item, f"{where}[{index}]")

    return checked


def mapping(check: Check) -> Check:
    def checked(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _wrong(where, "be an object", value)
        for name, item in value.items():
            check(item, f"{where}[{name!r}]")

    return checked


def record(required: Mapping[str, Check], others: Mapping[str, Check] | None = None, *, open: bool = False) -> Check:
    """An object with the ``required`` fields and maybe ``others``; ``open``: and maybe some that nobody knows."""
    known = {**required, **(others or {})}

    def checked(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _wrong(where, "be an object", value)
        missing = [name for name in required if name not in value]
        if missing:
            raise CheckpointError(f"{where} lacks {missing}.")
        unknown = sorted(set(value) - set(known))
        if unknown and not open:
            raise CheckpointError(f"{where} has the fields {unknown}, which this version does not know.")
        for name, check in known.items():
            if name in value:
                check(value[name], f"{where}.{name}")

    return checked


def _wrong(where: str, what: str, value: Any) -> NoReturn:
    shown = repr(value)
    raise CheckpointError(f"{where} must {what}, not {shown if len(shown) < 80 else shown[:77] + '...'}.")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _without_repetition(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


# The plan


_axis = integer(-MOST_AXES, -1)
_FAMILIES = ("softmax", "log_softmax", "sdpa", "flex", "mha", "product", "shift", "exp", "division")
_AXES = {"head_axis": optional(_axis), "merged": boolean, "outer": boolean}
_FACTOR = record({"dim_axis": _axis, "scale": factor, **_AXES})


def _product(value: Any, where: str) -> None:
    _PRODUCT(value, where)
    if value["query_arg"] == value["key_arg"]:
        _wrong(f"{where}.key_arg", "be another argument than query_arg", value["key_arg"])
    for name in ("query", "key"):
        if value[name]["head_axis"] == value[name]["dim_axis"]:
            _wrong(f"{where}.{name}.head_axis", "be another axis than dim_axis", value[name]["head_axis"])
    order = value.get("row_order")
    if order is not None and (value["rows_in_order"] or sorted(order) != list(range(len(order)))):
        _wrong(f"{where}.row_order", "be the numbers of the query's axes, out of order", order)


_PRODUCT = record(
    {"query_arg": integer(0, 1), "key_arg": integer(0, 1), "query": _FACTOR, "key": _FACTOR, "rows_in_order": boolean},
    {"row_order": array(integer(0, MOST_AXES), 1, MOST_AXES)},
)


def _site(value: Any, where: str) -> None:
    _SITE(value, where)
    if value["heads"] % value["key_heads"]:
        _wrong(f"{where}.heads", f"be a multiple of key_heads, {value['key_heads']}", value["heads"])
    last = -2 if value["sdpa_merged"] else -3  # heads may be merged with the rows
    if value["sdpa_head_axis"] is not None and value["sdpa_head_axis"] > last:
        _wrong(f"{where}.sdpa_head_axis", "be an axis before those of the rows and head_dim", value["sdpa_head_axis"])
    if value["kind"] != "softmax" or value.get("scores") is None:
        return
    rank, key_axis = value["scores"]
    for name in ("head_axis", "row_axis"):
        axis = value[name]
        if axis is not None and (axis < -rank or axis == key_axis):
            _wrong(f"{where}.{name}", f"be an axis of scores of {rank} axes other than {key_axis}", axis)
    if key_axis < -rank:
        _wrong(f"{where}.scores", "be a number of axes and one of them", value["scores"])
    if value["row_axis"] is not None and value["row_axis"] == value["head_axis"] and not value["merged"]:
        _wrong(f"{where}.row_axis", "be another axis than head_axis", value["row_axis"])


_SITE = record(
    {
        "kind": one_of("softmax", "sdpa", "multi_head_attention"),
        "heads": integer(1),
        "key_heads": integer(1),
        "head_dim": optional(integer(1)),
        "mask": text,
        "product": optional(_product),
        "row_axis": optional(_axis),
        **_AXES,
        **{f"sdpa_{name}": check for name, check in _AXES.items() if name != "head_axis"},
        "sdpa_head_axis": optional(_axis),
    },
    {
        "scores": lambda value, where: _scores(value, where),
        "extra": array(integer(0), 2, 2),
        "weighted": boolean,
    },
)


def _scores(value: Any, where: str) -> None:
    array(integer(-MOST_AXES, MOST_AXES), 2, 2)(value, where)
    integer(1, MOST_AXES)(value[0], f"{where}[0]")
    _axis(value[1], f"{where}[1]")


def _owner(value: Any, where: str) -> None:
    _OWNER(value, where)
    index = integer(NOT_ATTENTION, len(value["sites"]) - 1)
    for field in ("calls", "repeats"):
        for name, site in value[field].items():
            family, _, position = name.partition(":")
            if family not in _FAMILIES or (field == "calls" and not position.isdecimal()):
                _wrong(f"{where}.{field}", "name families of calls, and their positions", name)
            index(site, f"{where}.{field}[{name!r}]")
    if value["sites"] and not any(value.get(field) for field in ("calls", "repeats", "places")):
        _wrong(f"{where}.places", "name the calls of its sites, which calls does not", value.get("places"))
    for field in ("totals", "places"):
        for family in value.get(field, {}):
            one_of(*_FAMILIES)(family, f"{where}.{field}")
    for family, places in value.get("places", {}).items():
        for name, turns in places.items():
            place = f"{where}.places[{family!r}][{name!r}]"
            array(index, 1)(turns["sites"], f"{place}.sites")
            if len(turns["sites"]) > 1 and len(turns["sites"]) != max(turns["counts"]):
                _wrong(f"{place}.sites", "have as many turns as the most of counts", turns["sites"])


def _acts_on_products(config: SigmoidConfig) -> bool:
    return bool(config.query_bias) or config.qk_norm is not None


def _check_calls(owner: Mapping[str, Any], acts_on_products: bool, where: str) -> None:
    """Each site must have a call that is its attention, and, where that is needed, one that is its product."""
    named: dict[str, set[int]] = {}
    for field in ("calls", "repeats"):
        for name, site in owner[field].items():
            named.setdefault(name.partition(":")[0], set()).add(site)
    for family, places in owner.get("places", {}).items():
        named.setdefault(family, set()).update(*(turns["sites"] for turns in places.values()))
    attended = set().union(*(sites for family, sites in named.items() if family not in ("product", "shift")))
    for index, site in enumerate(owner["sites"]):
        if index not in attended:
            raise CheckpointError(f"{where}.sites[{index}]: no call in places or calls is the attention's.")
        if acts_on_products and site["product"] is not None and index not in named.get("product", ()):
            raise CheckpointError(f"{where}.sites[{index}]: no call in places or calls is its product's.")


_OWNER = record(
    {
        "path": text,
        "sites": array(_site),
        "calls": mapping(integer(NOT_ATTENTION)),
        "repeats": mapping(integer(NOT_ATTENTION)),
        "channel_axis": one_of(-1, -3),  # -3: of images
        "channels": optional(integer(1)),
        "totals": mapping(array(integer(0), 1)),
        "may_skip": boolean,
        "place": array(lambda value, where: _line(value, where)),
    },
    {"places": mapping(mapping(record({"sites": array(integer(NOT_ATTENTION), 1), "counts": array(integer(0), 1)})))},
)


def _line(value: Any, where: str) -> None:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        _wrong(where, "be a file and a line", value)
    integer(0)(value[1], f"{where}[1]")


def _bias(value: Any, where: str) -> None:
    if isinstance(value, str):
        one_of("visible")(value, where)
    elif isinstance(value, int):
        integer(1)(value, where)
    else:
        number(value, where)


def _positive(value: Any, where: str) -> None:
    number(value, where)
    if value <= 0 or not math.isfinite(1 / value):
        _wrong(where, "be a positive number", value)


_FIELDS: dict[str, Check] = {
    "bias": _bias,
    "learn_bias": boolean,
    "query_bias": optional(boolean),
    "first_token": optional(boolean),
    "qk_norm": optional(one_of("rms", "layer")),
    "layer_scale": optional(number),
    "hybrid_norm": boolean,
    "row_cap": optional(_positive),
}
_CONVERSION = record(
    {
        "config": record({}, {**_FIELDS, "overrides": mapping(record({}, _FIELDS))}),
        "owners": array(_owner, 1),
        "guarded": array(text),
        "report": record(
            {
                "sites": array(
                    record(
                        {
                            "path": text,
                            "kind": text,
                            "heads": optional(integer(0)),
                            "head_dim": optional(integer(0)),
                            "mask": text,
                            "status": one_of("swapped", "swappable", "left"),
                            "reason": text,
                        }
                    )
                ),
                "notes": array(text),
            }
        ),
        "attn_implementations": mapping(text),
    },
    {"fitted_length": optional(integer(1))},
)

# A file sigswap.json, and the entry of a transformers config.json

CONFIG_FILE = record(
    {
        "format": integer(FORMAT, FORMAT),
        "factory": text,
        "factory_kwargs": mapping(lambda value, where: None),
        "attributes": mapping(mapping(lambda value, where: _plain(value, where))),
        "aliases": mapping(text),
        "unsaved_buffers": mapping(text),
        "conversion": lambda value, where: None,  # by conversion_from
    },
    {
        "sigswap_version": text,
        "checksums": mapping(text),
        "tensors": text,
        "made_buffers": mapping(record({"shape": array(integer(0)), "dtype": text})),
    },
)
MARKS = record(
    {
        "format": integer(FORMAT, FORMAT),
        "attn_implementation": mapping(optional(text)),
        "conversion": lambda value, where: None,
    },
    {
        "sigswap_version": text,
        "checksums": mapping(text),
        "config_checksums": mapping(text),
        "weights": mapping(text),
        "quantized": record({"quant_method": one_of(*METHODS)}, open=True),
        unloadable.COPIED: array(text),
        unloadable.REPARAMETRIZED: array(text),
    },
    open=True,  # transformers may add to it
)


def _plain(value: Any, where: str) -> None:
    if not isinstance(value, bool | str | None):
        number(value, where)
