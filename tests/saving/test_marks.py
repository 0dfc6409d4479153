"""What is written into a transformers config."""

from __future__ import annotations

from pathlib import Path

import pytest

from sigswap.saving.marks import marked_config, read_marks

transformers = pytest.importorskip("transformers")


def test_each_config_that_is_saved_meanwhile_is_marked(tmp_path: Path) -> None:
    """transformers saves a second one with the whole of a model that is spread, which is what it uploads."""
    config = transformers.BertConfig()
    before = dict(vars(config))
    with marked_config(config, {"quant_method": "sigswap"}):
        for name in ("parts", "whole"):
            config.save_pretrained(tmp_path / name)
            assert read_marks(tmp_path / name) is not None, name
            assert "to_json_file" not in (tmp_path / name / "config.json").read_text()
    config.save_pretrained(tmp_path / "after")
    assert read_marks(tmp_path / "after") is None and vars(config) == before
