"""docs/ecosystem.md says what the tests do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ecosystem_page", Path(__file__).with_name("page.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_tests() -> None:
    page = maker()
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python tests/ecosystem/page.py"


def test_each_row_names_a_test_and_an_outcome() -> None:
    page = maker()
    files = (page.WORKFLOWS, page.TRAINING, page.LIGHTNING, page.DEPLOYMENT, page.REMOTE, page.QUANTIZED)
    rows = [*(row for file in files for row in page.workflows(file)), *page.adapters(), *page.wrappers()]
    assert len(rows) > 200
    names = {
        f"{file}::{test.name}"
        for file in {row.test.partition("::")[0] for row in rows}
        for test in page.functions(file)
    }
    for row in rows:
        assert row.test.partition("[")[0] in names, row
        assert row.workflow and row.outcome.startswith(("equal", "seen through", "an error", "a warning")), row
