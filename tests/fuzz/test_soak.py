"""A few rounds of ``python -m tests.fuzz --soak``, and that what grows is seen."""

from __future__ import annotations

import os

import pytest

from tests.fuzz import soak


@pytest.mark.slow
def test_nothing_grows() -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    assert soak.soak(0.0, say=lambda text: None) == []


def test_what_grows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(soak, "kinds", lambda: [None])
    monkeypatch.setattr(soak, "once", lambda kind, directory: opened.append(os.open(os.devnull, os.O_RDONLY)))
    try:
        [fault] = soak.soak(0.001, say=lambda text: None)
    finally:
        for each in opened:
            os.close(each)
    assert fault.startswith("files: ")
