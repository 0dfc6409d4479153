"""A transformers model whose parameters were put behind others is not saved under names that nothing loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.utils import parametrizations, parametrize, prune

import sigswap
from sigswap.errors import CheckpointError
from sigswap.saving.reparametrized import check_names


def bert() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    return sigswap.convert(transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval())


WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "parametrize": (parametrizations.weight_norm, lambda x: parametrize.remove_parametrizations(x, "weight")),
    "prune": (lambda x: prune.l1_unstructured(x, "weight", 0.5), lambda x: prune.remove(x, "weight")),
    "weight_norm": (torch.nn.utils.weight_norm, torch.nn.utils.remove_weight_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_it_is_an_error_until_they_are_plain_again(way: str, tmp_path: Path) -> None:
    model, (put_on, take_off) = bert(), WAYS[way]
    state = torch.get_rng_state()
    query = model.encoder.layer[0].attention.self.query
    put_on(query)
    with pytest.raises(CheckpointError, match=r"self.query is parametrized or pruned: .*weight.*would not be loaded"):
        sigswap.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir()) and torch.equal(torch.get_rng_state(), state)
    take_off(query)
    sigswap.save(model, tmp_path / "m")
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.equal(sigswap.load(tmp_path / "m")(ids)[0], model(ids)[0])


def test_a_model_that_is_built_so_is_saved() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Wav2Vec2Config(**sizes, conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,))
    config.num_feat_extract_layers, config.num_conv_pos_embedding_groups, config.num_conv_pos_embeddings = 1, 2, 4
    model: Any = transformers.Wav2Vec2Model(config)
    assert any(parametrize.is_parametrized(module) for module in model.modules())
    check_names(model)
