"""The pages' tables are tables, and that of the errors has all of them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from sigswap import errors

ROOT = Path(__file__).parents[2]
PAGES = [page for folder in ("", "docs", "findings", "passes") for page in sorted((ROOT / folder).glob("*.md"))]


def columns(line: str) -> int:
    """How many cells a row has; a ``|`` in one is written with a backslash."""
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_row_has_a_line_of_its_own(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.search(r"\|[ \t]*\|[ \t]*---", text), "a table's rows were put into one line"
    for is_row, lines in itertools.groupby(text.splitlines(), lambda line: line.lstrip().startswith("|")):
        if is_row:
            head, dashes, *rows = lines
            assert re.fullmatch(r"\s*\|( ?:?-+:? ?\|)+", dashes), f"{page.name}: {head}"
            assert {columns(line) for line in (dashes, *rows)} == {columns(head)}, f"{page.name}: {head}"


def test_the_guide_names_every_error() -> None:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = text[text.index("## Errors") :]
    for name, each in vars(errors).items():
        if isinstance(each, type) and issubclass(each, errors.SigswapError):
            assert f"`{name}`" in table or name == "SigswapError", name
