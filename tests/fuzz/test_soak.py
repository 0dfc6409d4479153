"""A few rounds of ``python -m tests.fuzz --soak``, and that what grows is seen."""

from __future__ import annotations

import os

import pytest

from tests.fuzz import soak


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(3))
def test_nothing_grows(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    kinds = soak.kinds()
    assert len(kinds) == 3
    monkeypatch.setattr(soak, "kinds", lambda: [kinds[kind]])
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
