"""What a saved directory says is checked before anything is built, and an error names the field."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from sigswap.errors import CheckpointError
from sigswap.saving import schema

WRITTEN = Path(__file__).parents[1] / "support" / "version_0_1"
SAVED = json.loads((WRITTEN / "saved" / "sigswap.json").read_text())


def plans() -> list[dict[str, Any]]:
    return [saved for _, saved in pickle.loads((WRITTEN / "plans.pickle").read_bytes()).values()]


def test_what_was_saved_is_right() -> None:
    for saved in [SAVED["conversion"], *json.loads(json.dumps(plans()))]:
        assert schema.conversion_from(saved, "conversion").owners
    schema.CONFIG_FILE(SAVED, "sigswap.json")


def a_plan() -> dict[str, Any]:
    """Of a site that computes its own scores."""
    owner = {
        "path": "attn",
        "sites": [
            {
                "kind": "softmax",
                "heads": 4,
                "key_heads": 2,
                "head_dim": 8,
                "head_axis": -3,
                "merged": False,
                "outer": False,
                "sdpa_head_axis": -3,
                "sdpa_merged": False,
                "sdpa_outer": False,
                "mask": "none",
                "product": {
                    "query_arg": 0,
                    "key_arg": 1,
                    "query": {"dim_axis": -1, "scale": 0.5, "head_axis": -3, "merged": False, "outer": False},
                    "key": {"dim_axis": -2, "scale": 1.0, "head_axis": -3, "merged": False, "outer": False},
                    "rows_in_order": True,
                },
                "row_axis": -2,
                "scores": [4, -1],
            }
        ],
        "calls": {},
        "repeats": {},
        "channel_axis": -1,
        "channels": 32,
        "totals": {},
        "may_skip": False,
        "place": [],
        "places": {
            "softmax": {"a.py:3": {"sites": [0], "counts": [1]}},
            "product": {"a.py:2": {"sites": [0], "counts": [1]}, "a.py:4": {"sites": [-1], "counts": [1]}},
        },
    }
    data = {**copy.deepcopy(SAVED["conversion"]), "owners": [owner]}
    return {**data, "config": {**data["config"], "query_bias": True}}


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [], "021"])
def test_an_order_of_axes_is_one(order: Any) -> None:
    data = a_plan()
    product = data["owners"][0]["sites"][0]["product"]
    product |= {"rows_in_order": False, "row_order": [0, 2, 1]}
    assert schema.conversion_from(data, "conversion").owners[0].sites[0].product.row_order == (0, 2, 1)
    product["row_order"] = order
    with pytest.raises(CheckpointError, match="row_order"):
        schema.conversion_from(data, "conversion")


def test_a_product_needs_no_call_where_nothing_acts_on_it() -> None:
    data = a_plan()
    data["config"] |= {"query_bias": False, "qk_norm": None}
    del data["owners"][0]["places"]["product"]
    assert schema.conversion_from(data, "conversion").owners[0].sites[0].product is not None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("owners.0.sites.0.heads", 0, r"conversion\.owners\[0\]\.sites\[0\]\.heads must be an integer from 1"),
        ("owners.0.sites.0.heads", 2**70, r"sites\[0\]\.heads must be"),
        ("owners.0.sites.0.heads", 3, "must be a multiple of key_heads, 2, not 3"),
        ("owners.0.sites.0.heads", True, r"\.heads must be an integer"),
        ("owners.0.places", {}, r"owners\[0\]\.places must name the calls of its sites, which calls does not, not {}"),
        ("owners.0.sites.0.head_axis", -1, r"head_axis must be an axis of scores of 4 axes other than -1"),
        ("owners.0.sites.0.head_axis", -5, r"head_axis must be"),
        ("owners.0.sites.0.row_axis", -3, r"row_axis must be another axis than head_axis"),
        ("owners.0.sites.0.sdpa_head_axis", -1, "before those of the rows"),
        ("owners.0.sites.0.scores", [4], "list of 2 to 2 items"),
        ("owners.0.sites.0.scores", [2, -3], r"must be"),
        ("owners.0.sites.0.product.query.scale", 0.0, r"query\.scale must be a number other than 0"),
        ("owners.0.sites.0.product.query.scale", float("nan"), r"query\.scale must be a finite number"),
        ("owners.0.sites.0.product.query.scale", 10**400, r"query\.scale must be a finite number"),
        ("owners.0.sites.0.product.key_arg", 0, "must be another argument than query_arg"),
        ("owners.0.sites.0.product.key.head_axis", -2, "must be another axis than dim_axis"),
        ("owners.0.sites.0.kind", "gelu", "must be one of 'softmax'"),
        ("owners.0.sites.0.more", 1, r"fields \['more'\], which this version does not know"),
        ("owners.0.sites.0", None, r"sites\[0\] must be an object, not None"),
        ("owners.0.places.softmax.a.py:3.sites", [1], r"sites\[0\] must be an integer from -1 to 0, not 1"),
        ("owners.0.places.softmax.a.py:3.sites", [0, -1], "as many turns"),
        ("owners.0.places.gelu", {}, "must be one of"),
        ("owners.0.calls", {"softmax": 0}, "name families of calls"),
        ("owners.0.places.softmax", {}, r"owners\[0\]\.sites\[0\]: no call in places or calls is the attention's"),
        ("owners.0.places.softmax.a.py:3.sites", [-1], r"sites\[0\]: no call in places or calls is the attention's"),
        ("owners.0.places.product.a.py:2.sites", [-1], r"sites\[0\]: no call in places or calls is its product's"),
        ("owners.0.path", ["attn"], r"path must be a string"),
        ("owners.0.channel_axis", -2, "channel_axis must be one of -1, -3"),
        ("owners", [], "owners must be a list of 1"),
        ("config.layer_scale", float("inf"), r"config\.layer_scale must be a finite number"),
        ("config.overrides", {"*": {"bias": "seen"}}, r"overrides\['\*'\]\.bias must be"),
        ("config.qk_norm", ["rms"], "qk_norm must be one of"),
        ("config.row_cap", 1e-320, "row_cap must be a positive number"),
        ("report.sites.0.status", "lost", "status must be"),
        ("fitted_length", 0, "fitted_length must be"),
    ],
)
def test_a_field_that_is_wrong_is_named(place: str, value: Any, message: str) -> None:
    data = a_plan()
    schema.conversion_from(data, "conversion")
    *path, last = place.replace("a.py", "a@py").split(".")
    holder: Any = data
    for step in path:
        step = step.replace("@", ".")
        holder = holder[int(step)] if isinstance(holder, list) else holder[step]
    if isinstance(holder, list):
        holder[int(last)] = value
    else:
        holder[last] = value
    with pytest.raises(CheckpointError, match=message):
        schema.conversion_from(data, "conversion")


def test_two_owners_of_one_name() -> None:
    data = a_plan()
    data["owners"] *= 2
    with pytest.raises(CheckpointError, match="must name each module once"):
        schema.conversion_from(data, "conversion")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ud800"],
)
def test_text_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CheckpointError, match=r"x\.json is not"):
        schema.read_json(tmp_path / "x.json")


def test_checksums_are_of_values() -> None:
    one, other = {"a": {"x": 1.5, "y": [1, 2]}}, json.loads('{ "a": {"y": [1,2], "x": 1.50} }')
    schema.check_checksums(one, schema.checksums(other), "f")
    with pytest.raises(CheckpointError, match=r'f: a: not what was saved.*remove "checksums"'):
        schema.check_checksums({"a": {"x": 1.5, "y": [2, 1]}}, schema.checksums(one), "f")
    schema.check_checksums(one, None, "f")
