"""The README.md of a saved transformers model, and what push_to_hub uploads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_once import made_once

import sigswap
from sigswap.saving.model_card import model_card

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
IDS = torch.arange(1, 13).view(2, 6)


@made_once
def model() -> Any:
    torch.manual_seed(0)
    plain = transformers.BertModel(transformers.BertConfig(**SMALL, num_hidden_layers=3, pad_token_id=0))
    return sigswap.convert(plain.eval(), sigswap.SigmoidConfig(query_bias=True), exclude=["encoder.layer.2.*"])


def test_the_card_says_what_was_swapped_and_how_to_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = model()
    each.config._name_or_path = "somebody/bert-tiny"
    sigswap.calibrate(each, [{"input_ids": IDS}], progress=False)
    sigswap.save(each, tmp_path)
    card = (tmp_path / "README.md").read_text()
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert data.tags == ["sigswap", "sigmoid-attention"] and data.library_name == "transformers"
    assert data.base_model == "somebody/bert-tiny"
    assert "| `encoder.layer.{0..1}.attention.self (2x)` | 2 | 8 | boolean | swapped |" in card
    assert re.search(r"encoder.layer.2.*left \| \S+", card)  # with the reason
    assert "query_bias=True" in card and "Calibrated" in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(code.replace("THIS REPOSITORY OR DIRECTORY", str(tmp_path)), made)
    assert torch.equal(made["model"](input_ids=IDS)[0], each(input_ids=IDS)[0])


def test_a_card_of_the_users_own_stays(tmp_path: Path) -> None:
    each = model()
    sigswap.save(each, tmp_path)
    assert "query_bias=True" in (tmp_path / "README.md").read_text()
    assert "base_model" not in (tmp_path / "README.md").read_text()  # it was made from a config
    sigswap.set_row_cap(each, 0.5)
    sigswap.save(each, tmp_path)  # sigswap's own is written anew
    assert "row_cap=0.5" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    sigswap.save(each, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_class_that_transformers_does_not_have(tmp_path: Path) -> None:
    class Mine(transformers.BertModel):  # type: ignore[misc, name-defined]
        pass

    torch.manual_seed(0)
    each = sigswap.convert(Mine(transformers.BertConfig(**SMALL, num_hidden_layers=1, pad_token_id=0)).eval())
    each.config._name_or_path = None
    card = model_card(each)
    assert "from transformers import" not in card and "sigswap.load(" in card


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: what would be uploaded loads as sigmoid attention, and is tagged."""
    from huggingface_hub.errors import EntryNotFoundError

    def missing(*args: Any, **kwargs: Any) -> None:
        raise EntryNotFoundError("no card")

    def upload(self: Any, folder: str, *args: Any, **kwargs: Any) -> str:
        shutil.copytree(folder, tmp_path / "uploaded")
        return "done"

    api = SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id="somebody/bert-tiny"))
    utils = transformers.utils.hub
    if hasattr(utils, "hf_api"):
        monkeypatch.setattr(utils, "hf_api", lambda: api)
    else:  # before 5.20 or so
        monkeypatch.setattr(utils, "create_repo", api.create_repo)
    monkeypatch.setattr(utils.ModelCard, "load", missing)
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    each = model()
    assert each.push_to_hub("bert-tiny", tags=["mine"]) == "done"
    assert set(hub.ModelCard((tmp_path / "uploaded" / "README.md").read_text()).data.tags) == {
        *("mine", "sigswap", "sigmoid-attention")
    }
    loaded = transformers.BertModel.from_pretrained(tmp_path / "uploaded")
    assert sigswap.is_converted(loaded)
    assert torch.equal(loaded(input_ids=IDS)[0], each(input_ids=IDS)[0])
    plain = sigswap.revert(each)
    shutil.rmtree(tmp_path / "uploaded")
    plain.push_to_hub("bert-tiny")
    assert not hub.ModelCard((tmp_path / "uploaded" / "README.md").read_text()).data.tags
