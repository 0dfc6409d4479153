"""``sigswap convert --calibrate``: text files, image directories, none at all, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from typer.testing import CliRunner
from zoo import hf, randomise

import sigswap
from sigswap.commands.batch_files import IMAGES, find_samples, make_batches
from sigswap.commands.cli import app
from sigswap.errors import ArgumentError

transformers = pytest.importorskip("transformers")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A directory with a small Llama and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = tmp_path / "llama"
    randomise(hf("LlamaForCausalLM")).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 2, "one": 3, "two": 4, "three": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        directory
    )
    return directory


def test_text(language_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three\n\n  \ntwo two one one\n" * 10)
    picture = tmp_path / "heads.html"
    result = run(
        *("convert", language_model, "--out", tmp_path / "out", "--query-bias"),
        *("--calibrate", text, "--samples", 18, "--picture", picture, "--json"),
    )
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)["calibration"]
    assert measured["batches"] == 2 and len(measured["heads"]) == 8
    assert picture.read_text().startswith("<!doctype html>")
    loaded = sigswap.load(tmp_path / "out")
    assert any(line.startswith("Calibrated: 2 batches") for line in sigswap.report(loaded).notes)

    expected = sigswap.load(tmp_path / "out")
    first = make_batches(expected, str(language_model), find_samples(text, 18))
    assert [len(batch["input_ids"]) for batch in first] == [16, 2]
    assert first[0]["input_ids"][:2].tolist() == [[3, 4, 5, 2], [4, 4, 3, 3]]
    assert first[0]["attention_mask"][:2].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    sigswap.calibrate(expected, first, progress=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(value, loaded.state_dict()[name])


def test_without_data(language_model: Path, tmp_path: Path) -> None:
    result = run("convert", language_model, "--out", tmp_path / "out", "--calibrate", "none")
    assert result.exit_code == 0, result.output
    assert "wrote itself" in " ".join(result.stdout.split())


def test_images(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    generator = numpy.random.default_rng(0)
    (tmp_path / "in" / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.jpg", "c.PNG"):
        pixels = generator.integers(0, 255, (40, 60, 3), dtype=numpy.uint8)
        image.fromarray(pixels).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    result = run("convert", "timm:test_vit", "--out", tmp_path / "out", "--calibrate", tmp_path / "in", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calibration"]["batches"] == 1
    model = sigswap.load(tmp_path / "out")
    (batch,) = make_batches(model, "timm:test_vit", find_samples(tmp_path / "in", 2))
    assert batch.shape[:2] == (2, 3)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "there is no"), (b"\n \n", "no line of text"), (b"\xff\xfe\x00", "neither UTF-8")]
)
def test_mistakes(language_model: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    result = run("convert", language_model, "--out", tmp_path / "out", "--calibrate", file)
    assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertModel", "GPT2LMHeadModel", "T5Model"])
def test_a_directory_without_a_tokenizer(name: str, tmp_path: Path) -> None:
    """transformers makes up an empty tokenizer, or fails: either is a clear error."""
    randomise(hf(name)).save_pretrained(tmp_path / "in")
    (tmp_path / "text.txt").write_text("one two three\n")
    result = run("convert", tmp_path / "in", "--out", tmp_path / "out", "--calibrate", tmp_path / "text.txt")
    assert result.exit_code == 1 and "--calibrate none" in result.stderr and "Error: --calibrate:" in result.stderr
    assert "tokenizer's files" in result.stderr and not (tmp_path / "out").exists()


def test_what_is_said_of_a_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    """Of transformers' reasons, five lines about how it might make one, none is the true one."""
    hf("LlamaForCausalLM").save_pretrained(tmp_path)
    hint = "Put the tokenizer's files into the model's directory, or do without data: --calibrate none."
    with pytest.raises(ArgumentError) as caught:
        make_batches(hf("LlamaForCausalLM"), str(tmp_path), ["one"])
    assert str(caught.value) == f"--calibrate: {tmp_path} has no tokenizer. {hint}"
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArgumentError, match="has a tokenizer that transformers cannot load") as caught:
        make_batches(hf("LlamaForCausalLM"), str(tmp_path), ["one"])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_bytes_needs_no_files(tmp_path: Path) -> None:
    hf("T5Model").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    (tmp_path / "text.txt").write_text("ab\n")
    (batch,) = make_batches(hf("T5Model"), str(tmp_path), find_samples(tmp_path / "text.txt", 1))
    assert batch["input_ids"].tolist() == [[100, 101, 1]]


def test_text_for_a_vision_model(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    (tmp_path / "text.txt").write_text("words\n")
    result = run("convert", "timm:test_vit", "--out", tmp_path / "out", "--calibrate", tmp_path / "text.txt")
    assert result.exit_code == 1 and "input_ids" in result.stderr
    with pytest.raises(ArgumentError, match="images are for"):
        pixels = numpy.zeros((4, 4, 3), dtype=numpy.uint8)
        pytest.importorskip("PIL.Image").fromarray(pixels).save(tmp_path / "image.png")
        make_batches(hf("LlamaForCausalLM"), "somewhere", find_samples(tmp_path / "image.png", 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibrate", "none", "--picture", "x.bmp"), "suffix must be .png"),
        (("--calibrate", "none", "--picture", "nowhere/x.png"), "no directory nowhere"),
        (("--calibrate", "nowhere.txt"), "--calibrate: there is no nowhere.txt"),
        (("--calibrate", "none", "--picture", "x.png", "--bias", "-3"), "--bias=-3"),
        (("--picture", "x.png"), "--picture is for a calibration"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sigswap.commands.cli.build", lambda *_, **__: pytest.fail("the model was loaded"))
    result = run("convert", "timm:test_vit", "--out", "out", *options)
    assert message in result.stderr
    assert result.exit_code == (2 if message.startswith(("--bias", "--picture is")) else 1)


def test_help_says_what_is_read_of_a_directory() -> None:
    text = " ".join(run("convert", "--help").stdout.replace("│", " ").split())
    assert all(suffix in text for suffix in IMAGES) and "UTF-8" in text and "and below" in text
