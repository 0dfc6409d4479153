"""The coverage as a page of the documentation, and as JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.coverage.check import Row

KINDS = {"timm": "timm", "transformers": "transformers", "torchvision": "torchvision"}
OUTSIDE = ("not built", "does not run")
"""What is no claim about sigswap: the model's own code fails, with these rules, without sigswap."""
UNKNOWN = ("not installed",)
GOOD = ("right", "none")
LIGHT = 2.5
"""Seconds, within which a check ends that the test suite may draw."""

HEADER = """# Coverage

Written by `python -m tests.coverage`, with {versions}.
Each model is built small with random weights, run, and converted under `strict`; then these are compared:

- outputs and the gradients of all parameters with an oracle that shares no code with sigswap's passes
  (`tests/coverage/oracle.py`): to {close:g} of the largest value in float32, and where that fails to {close_64:g} in
  float64,
- greedy decoding with a cache with the oracle's without one, where the model generates and its own two agree,
- the model inside `sigswap.softmax`, and after `revert`, with the original bit for bit,
- a saved and loaded copy, bit for bit.

`right`: all of that holds. `none`: the model has no softmax attention, and convert says so. `refused`: an error with a
reason. `missed`: the error says that there is no attention. `wrong`, `false swap`, `fails`: converted, and not right.
`not built`, `does not run`: without sigswap, by the rules of this program, the model cannot be built small or its plain
forward fails; these are no part of the denominators, all else is, also what was `too slow` or `died`.

| of | models | build and run | with attention | right | none, and none swapped | not right |
|---|---|---|---|---|---|---|
"""


def write(rows: Sequence[Row], names: Sequence[str], folder: Path) -> None:
    """Writes coverage.md and coverage.json. ``names``: all cases, of which some may not have been checked."""
    from tests.coverage.check import CLOSE, CLOSE_64

    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "timm", "torchvision")
    )
    text = HEADER.format(versions=versions, close=CLOSE, close_64=CLOSE_64)
    groups = {kind: [row for row in rows if kind_of(row.name) == kind] for kind in (*KINDS.values(), "third-party")}
    for kind, group in groups.items():
        total = sum(kind_of(name) == kind for name in names)
        text += _line(kind, group, total)
    commits = Counter(row.commit or "earlier ones" for row in rows)
    text += (
        "\nChecked at commit " + ", ".join(f"{commit}: {number}" for commit, number in commits.most_common()) + ".\n"
    )
    missing = len(names) - len(rows)
    if missing:
        text += f"\n{missing} of {len(names)} models were not checked yet.\n"
    for kind, group in groups.items():
        text += f"\n## {kind}\n\n"
        counts = Counter(row.verdict for row in group)
        text += ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common()) + ".\n"
        others = [row for row in group if row.verdict not in GOOD]
        if others:
            text += "\n| model | verdict | reason |\n|---|---|---|\n"
            text += "".join(f"| {row.name} | {row.verdict} | {_cell(row.reason)} |\n" for row in others)
        for verdict, words in (("right", "Right"), ("none", "No attention")):
            good = [row for row in group if row.verdict == verdict]
            if good:
                text += f"\n{words}: " + _wrapped(", ".join(_short(row) for row in good)) + ".\n"
    (folder / "coverage.md").write_text(text, encoding="utf-8")
    data = {"versions": versions, "models": list(names), "rows": [dataclasses.asdict(row) for row in rows]}
    for row in data["rows"]:
        row["light"] = row["seconds"] < LIGHT
        for name in ("seconds", "convert_seconds", "forward_seconds"):
            row.pop(name)  # another machine's, another day's
    (folder / "coverage.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def kind_of(name: str) -> str:
    return KINDS.get(name.partition("/")[0], "third-party")


def figures(rows: Sequence[Row]) -> dict[str, int]:
    """The numbers of a kind: denominators and what is right."""
    run = [row for row in rows if row.verdict not in (*OUTSIDE, *UNKNOWN)]
    none = sum(row.verdict == "none" for row in run)
    right = sum(row.verdict == "right" for row in run)
    return {"run": len(run), "attention": len(run) - none, "right": right, "none": none, "bad": len(run) - right - none}


def _line(kind: str, group: Sequence[Row], total: int) -> str:
    f = figures(group)
    share = f" ({100 * f['right'] / f['attention']:.1f}%)" if f["attention"] else ""
    return f"| {kind} | {total} | {f['run']} | {f['attention']} | {f['right']}{share} | {f['none']} | {f['bad']} |\n"


def _short(row: Row) -> str:
    name = row.name if kind_of(row.name) == "third-party" else row.name.partition("/")[2]
    return f"{name} ({row.attentions})" if row.attentions else name


def _cell(text: str) -> str:
    text = re.sub(r"\(/[^)]*/([^/)]*)\)", r"(\1)", text)  # no folders of one machine
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")[:300]


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text.replace("_", "\\_"), 118, break_long_words=False, break_on_hyphens=False))
