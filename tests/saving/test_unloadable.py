"""What a directory cannot say is not saved under names that nothing loads: an error, or in mid-training a warning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from made_once import made_once
from safetensors.torch import load_file
from torch.nn.utils import parametrizations, parametrize, prune

import sigswap
from sigswap.errors import CheckpointError, CheckpointWarning
from sigswap.saving.unloadable import check_names

IDS = torch.arange(8).view(1, 8)
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@made_once
def bert(kind: str = "BertModel", **config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(vocab_size=20, **SIZES)).eval()
    return sigswap.convert(model, sigswap.SigmoidConfig(**config))


def with_copied_layer(model: Any) -> Any:
    """Its config builds as many layers, so that all weights of the copy but sigswap's find their places."""
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))
    model.config.num_hidden_layers = len(model.encoder.layer)
    return model


WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "parametrize": (parametrizations.weight_norm, lambda x: parametrize.remove_parametrizations(x, "weight")),
    "prune": (lambda x: prune.l1_unstructured(x, "weight", 0.5), lambda x: prune.remove(x, "weight")),
    "weight_norm": (torch.nn.utils.weight_norm, torch.nn.utils.remove_weight_norm),
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@every_way
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
    with torch.no_grad():
        assert torch.equal(sigswap.load(tmp_path / "m")(IDS)[0], model(IDS)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@every_way
def test_save_pretrained_warns_of_them_and_their_directory_is_no_model(way: str, tmp_path: Path) -> None:
    """Without the mark, transformers would draw the weight at random."""
    model, (put_on, take_off) = bert(), WAYS[way]
    query = model.encoder.layer[0].attention.self.query
    put_on(query)
    with pytest.warns(CheckpointWarning, match=r"self\.query is parametrized or pruned\. Before the last save"):
        model.save_pretrained(tmp_path)
    for load in (transformers.BertModel.from_pretrained, transformers.AutoModel.from_pretrained, sigswap.load):
        with pytest.raises(CheckpointError, match=r"self\.query was parametrized or pruned.*from_config"):
            load(tmp_path)

    # What the error says.
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    again = transformers.AutoModel.from_config(config).eval()
    put_on(again.encoder.layer[0].attention.self.query)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])

    take_off(query)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path)(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("config", [{}, {"learn_bias": False, "query_bias": False}], ids=["c_h", "no parameters"])
def test_a_copy_of_a_converted_layer_is_not_loaded_as_softmax(config: dict[str, Any], tmp_path: Path) -> None:
    model = with_copied_layer(bert(**config))
    with pytest.raises(CheckpointError, match=r"layer\.1\.attention\.self is a converted module that was not there"):
        sigswap.save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    with pytest.warns(CheckpointWarning, match=r"layer\.1\.attention\.self is converted, but not there when"):
        model.save_pretrained(tmp_path)
    softmax_there = r"layer\.1\.attention\.self was a converted module.*as softmax"
    for load in (transformers.BertModel.from_pretrained, sigswap.load):
        with pytest.raises(CheckpointError, match=softmax_there):
            load(tmp_path)
    with pytest.raises(CheckpointError, match=softmax_there):
        transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))

    # What the error says.
    torch.manual_seed(1)
    sizes = {**SIZES, "num_hidden_layers": 2}
    again = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()
    again = sigswap.convert(again, sigswap.SigmoidConfig(**config))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])


def test_another_head_than_the_one_that_was_pruned_is_loaded(tmp_path: Path) -> None:
    model = bert("BertForMaskedLM")
    prune.l1_unstructured(model.cls.predictions.transform.dense, "weight", 0.5)
    with pytest.warns(CheckpointWarning, match=r"cls\.predictions\.transform\.dense is"):
        model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(transformers.BertModel.from_pretrained(tmp_path)(IDS)[0], model.bert(IDS)[0])
    prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5)
    with pytest.warns(CheckpointWarning, match=r"output\.dense, cls\.predictions\.transform\.dense are"):
        model.save_pretrained(tmp_path)
    for kind in (transformers.BertModel, transformers.BertForMaskedLM):
        with pytest.raises(CheckpointError, match=r"layer\.0\.output\.dense was"):
            kind.from_pretrained(tmp_path)


def test_a_warning_that_is_an_error_saves_nothing(tmp_path: Path) -> None:
    model = with_copied_layer(bert())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        with pytest.raises(CheckpointWarning):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_warning_is_of_the_line_that_saves(tmp_path: Path) -> None:
    model = with_copied_layer(bert())
    with pytest.warns(CheckpointWarning) as caught:
        model.save_pretrained(tmp_path)
    assert [warning.filename for warning in caught if warning.category is CheckpointWarning] == [__file__]


def test_a_trainer_saves_a_pruned_model_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(8)]

    def trained(steps: int, start: str | None = None) -> Any:
        model = bert("BertForMaskedLM")
        prune.l1_unstructured(model.bert.encoder.layer[0].attention.self.query, "weight", 0.5)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            use_cpu=True, report_to=[], disable_tqdm=True, seed=0, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        with pytest.warns(CheckpointWarning, match=r"self\.query is parametrized or pruned"):
            trainer.train(resume_from_checkpoint=start)
        return model

    whole = trained(4)
    resumed = trained(4, str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_model_that_is_built_so_is_saved() -> None:
    config = transformers.Wav2Vec2Config(**SIZES, conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,))
    config.num_feat_extract_layers, config.num_conv_pos_embedding_groups, config.num_conv_pos_embeddings = 1, 2, 4
    model: Any = transformers.Wav2Vec2Model(config)
    assert any(parametrize.is_parametrized(module) for module in model.modules())
    check_names(model)
