"""The README.md beside a transformers model that was saved: what was swapped, how it was fitted, how to load it."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from sigswap.config import SigmoidConfig
from sigswap.conversion.record import conversion_of, report
from sigswap.distributed.shards import original_name
from sigswap.optional import require
from sigswap.report import folded
from sigswap.saving import remote_code
from sigswap.version import __version__

FILE = "README.md"
TAGS = ("sigswap", "sigmoid-attention")
MARK = "<!-- Written by sigswap.save. Without this line the file is yours, and stays as it is. -->"
_WITHOUT_SIGSWAP = """
Or without the package sigswap, by the Python file beside it, which you should read before you trust it. It computes the
same in plain PyTorch, more slowly:

```python
from transformers import AUTO_CLASS

model = AUTO_CLASS.from_pretrained("THIS REPOSITORY OR DIRECTORY", trust_remote_code=True)
```
"""
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def may_write(target: Path) -> bool:
    """Whether ``target`` has no model card of somebody else's."""
    path = target / FILE
    try:
        return not path.exists() or MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def model_card(model: Any, *, with_code: bool = False) -> str:
    """Markdown, with the metadata that the hub reads, of a converted transformers ``model``.

    ``with_code``: beside it is the file by which it is loaded without sigswap, too.
    """
    conversion, found = conversion_of(model), report(model)
    name = model.config._name_or_path or ""
    is_hubs = bool(_REPOSITORY.fullmatch(name)) and not os.path.exists(name)
    head = ["library_name: transformers", "tags:", *(f"- {tag}" for tag in TAGS)]
    if is_hubs:
        head += [f"base_model: {name}"]
    rows = [
        f"| `{path or 'the model'}` | {_number(site.heads)} | {_number(site.head_dim)} | {site.mask} | {site.status} |"
        f" {_cell(site.reason)} |"
        for path, site in folded(found.sites)
    ]
    class_name = original_name(model)
    is_transformers = hasattr(require("transformers", "hf"), class_name)  # else it is code of the user's
    how = f"{class_name}.from_pretrained" if is_transformers else "sigswap.load"
    imported = f"\nfrom transformers import {class_name}" if is_transformers else ""
    changed = {
        field.name: getattr(conversion.config, field.name)
        for field in dataclasses.fields(SigmoidConfig)
        if getattr(conversion.config, field.name) != getattr(SigmoidConfig(), field.name) and field.name != "overrides"
    }
    settings = ", ".join(f"`{key}={value!r}`" for key, value in changed.items()) or "the defaults"
    without = ""
    if with_code:
        without = _WITHOUT_SIGSWAP.replace("AUTO_CLASS", str(remote_code.auto_class(model)))
    origin = f" of `{name}`" if is_hubs else ""
    notes = "\n".join(f"- {_cell(note)}" for note in found.notes) or "- It was not calibrated."
    return f"""---
{chr(10).join(head)}
---

{MARK}

# {class_name} with sigmoid attention

In this conversion{origin} sigmoid attention ([arXiv 2409.04431](https://arxiv.org/abs/2409.04431)) takes the
place of softmax attention. It was made with sigswap {__version__}; `SigmoidConfig`: {settings}.

## Load it

```python
import sigswap  # first: transformers alone does not know sigmoid attention, and refuses to load it{imported}

model = {how}("THIS REPOSITORY OR DIRECTORY")
```
{without}
Weights are named as in the original; what was added is under `<module>.sigswap.*`. `sigswap.revert(model)` takes it
out again.

## What was swapped

| module | heads | head_dim | mask | status | reason |
|---|---|---|---|---|---|
{chr(10).join(rows)}

{notes}

How far it is from the original: `sigswap compare DIRECTORY ORIGINAL --text FILE`.
"""


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
