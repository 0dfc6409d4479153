"""Calibration batches from files: lines of text for a transformers model, images for a timm or transformers one."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigswap.errors import ArgumentError, Hint, SigswapError
from sigswap.optional import require
from sigswap.saving.checkpoint import source_directory

BATCH = 16
MAX_LENGTH = 512
BLOCK_TOKENS = 4096
"""Tokens in a batch of blocks."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_VOCABULARIES = ("tokenizer.*", "*vocab*", "*.model", "*.tiktoken", "tekken.json")


def find_samples(path: Path, count: int, option: str = "--calibrate") -> list[Any]:
    """At most ``count`` samples of ``path``: the paths of images, or lines of text as strings.

    A text file gives its lines that are not blank, an image file itself, and a directory its images, in it and below,
    in the order of their names, or, if there are none, the lines of its files. Reads no image yet.

    Raises ArgumentError, about the ``option`` of the command line, if there is nothing to read.
    """
    if not path.exists():
        raise ArgumentError(f"{option}: there is no {path}.")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    images = [file for file in files if file.suffix.lower() in IMAGES][:count]
    samples: list[Any] = [*images] if images else [*itertools.islice(_lines(files, option), count)]
    if not samples:
        raise ArgumentError(f"{option}: {path} holds no line of text and no image ({', '.join(IMAGES)}).")
    return samples


def make_batches(model: nn.Module, source: str, samples: list[Any], option: str = "--calibrate") -> list[Any]:
    """The ``samples`` as inputs of ``model``, which is that of the directory, hub id or timm name ``source``.

    Text needs the tokenizer beside the model, images its processor. Raises ArgumentError if it is not there, or the
    model's inputs are not of that kind.
    """
    make = _images if isinstance(samples[0], Path) else _text
    return [make(model, source, samples[start : start + BATCH], option) for start in range(0, len(samples), BATCH)]


def block_batches(model: Any, tokenizer: Any, path: Path, count: int, length: int, option: str = "--text") -> list[Any]:
    """The text in ``path`` (a file, or those in a directory and below) as at most ``count`` blocks of ``length`` tokens
    without padding, in batches of at most 4,096 tokens: what a language model is compared on.

    Raises ArgumentError if there is not enough text for one block, or the model has fewer positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or length
    if length > positions:
        raise ArgumentError(
            f"--length {length}: {type(model).__name__} has positions for {positions} tokens.",
            hint=Hint(f"Pass --length {positions}, or less."),
        )
    ids: list[int] = []
    lines = find_samples(path, count * length, option)  # a line has at least one token
    if isinstance(lines[0], Path):
        raise ArgumentError(f"{option}: {path} holds images.")
    for line in lines:
        ids += tokenizer(line + "\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= count * length:
            break
    blocks = len(ids) // length
    if not blocks:
        raise ArgumentError(f"{option}: {path} has {len(ids)} tokens, fewer than a block of --length {length}.")
    rows = torch.tensor(ids[: min(blocks, count) * length]).view(-1, length)
    return [{"input_ids": part} for part in torch.split(rows, max(1, BLOCK_TOKENS // length))]


def find_tokenizer(*sources: str) -> tuple[Any, str]:
    """The tokenizer beside the first of these models that has one, and that model; None and the last if none has."""
    for source in sources:
        try:
            return _tokenizer(source, "--text"), source
        except SigswapError:
            continue
    return None, sources[-1]


def _lines(files: list[Path], option: str) -> Iterator[str]:
    for file in files:
        try:
            with file.open(encoding="utf-8") as stream:
                yield from (line.strip() for line in stream if line.strip())
        except UnicodeDecodeError as error:
            raise ArgumentError(f"{option}: {file} is neither UTF-8 text nor an image: {error}") from None


def _text(model: Any, source: str, lines: list[str], option: str) -> Any:
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ArgumentError(
            f"{option}: text is for transformers models that take input_ids.",
            hint=Hint("For this one call sigswap.calibrate and sigswap.compare in Python, with batches of its inputs."),
        )
    tokenizer = _tokenizer(source, option)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH) or MAX_LENGTH)
    made = dict(tokenizer(lines, padding=True, truncation=True, max_length=longest, return_tensors="pt"))
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = made["input_ids"]
    return made


_WITHOUT = {"--calibrate": "--calibrate none", "--data": "--data none, where that can be", "--text": "no --text"}


def _tokenizer(source: str, option: str) -> Any:
    auto = require("transformers", "hf").AutoTokenizer
    hint = Hint(
        f"Put the tokenizer's files into the model's directory, or do without data: {_WITHOUT.get(option, option)}."
    )
    directory = source_directory(source)
    there = [file.name for file in directory.iterdir()] if directory is not None else []
    try:
        tokenizer = auto.from_pretrained(source)
    except Exception as error:  # OSError, ValueError, KeyError, ImportError, ...: each tokenizer has its own
        if directory is not None and not _any_matches(there, ("tokenizer*", *_VOCABULARIES)):
            raise ArgumentError(f"{option}: {source} has no tokenizer.", hint=hint) from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArgumentError(
            f"{option}: {source} has a tokenizer that transformers cannot load ({reason}).", hint=hint
        ) from error
    # Where the files are missing, transformers makes up a tokenizer that knows no words.
    kinds = getattr(tokenizer, "vocab_files_names", {})
    names = [name for kind, name in kinds.items() if kind != "merges_file" and "config" not in kind]
    # A tokenizer of bytes has none.
    if names and directory is not None and not _any_matches(there, (*names, *_VOCABULARIES)):
        raise ArgumentError(f"{option}: {source} has no vocabulary ({' or '.join(names)}).", hint=hint)
    return tokenizer


def _any_matches(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def _images(model: Any, source: str, files: list[Path], option: str) -> Any:
    pictures = [_picture(file, option) for file in files]
    if source.startswith("timm:"):
        import torch

        data = require("timm", "vision").data
        transform = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
        return torch.stack([transform(picture) for picture in pictures])
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ArgumentError(f"{option}: images are for timm models and transformers models that take pixel_values.")
    return dict(require("transformers", "hf").AutoImageProcessor.from_pretrained(source)(pictures, return_tensors="pt"))


def _picture(file: Path, option: str) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except Exception as error:  # of a damaged one whatever its format's reader raises
        raise ArgumentError(f"{option}: {file} is no image that can be read: {error}") from error
