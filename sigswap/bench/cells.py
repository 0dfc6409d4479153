"""What ``sigswap bench`` measures: the suites and their cells, each of which is one problem."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any, Literal

import torch

SUITES = ("train", "short", "decode", "varlen", "host", "features", "models", "generation")
DEFAULT_SUITES = tuple(suite for suite in SUITES if suite not in ("features", "models", "generation"))
"""Those that run unless others are named: features compiles FlexAttention in each cell, and models and generation
compile each model several times, which takes many minutes."""

DISTRIBUTED = "distributed"
"""The suite of several processes (:mod:`sigswap.bench.distributed.run`), which runs by itself."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Setup = Literal["none", "compile", "tune"]
"""What a peer does on each new shape before it runs: nothing; seconds of compiling; a minute of trying kernels."""

SETUPS: tuple[Setup, ...] = ("none", "compile", "tune")
"""The shortest first."""

Mask = Literal["documents=1,1,N,N", "padding=B,1,N,N", "padding=B,1,1,N", "bias=1,H,N,N"]
"""A mask tensor and its shape: bool, where True is visible, but for bias, which is added to the scores and has a
gradient."""

Feature = Literal["softcap", "dropout", "window", "mask", "bias", "pages"]
"""What a cell needs of an implementation beyond causal masks and grouped heads."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem. Causal ones have as many queries as keys. Query and key are head_dim wide, value is value_dim wide.

    In the suite varlen ``lengths`` holds the sequences' lengths, and q_len and kv_len are the longest. ``setup``: the
    longest setup of a peer for which it runs here; those with a longer one are left out unless they are asked for.
    ``latent``: value is the first channels of key, in the same memory. ``page_size``: key and value lie in pages of so
    many keys, in random order, for who runs the cell.

    The others are for the suite features. ``window``: row i sees the keys from i - window on. ``dtype``: of ``DTYPES``,
    where it is not that of the run. ``by_blocks``: sigswap gets the mask as a BlockMask, as FlexAttention always does.
    """

    suite: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    causal: bool = False
    lengths: tuple[int, ...] = ()
    setup: Setup = "none"
    latent: bool = False
    page_size: int | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    window: int | None = None
    mask: Mask | None = None
    by_blocks: bool = False
    dtype: str | None = None

    @property
    def features(self) -> tuple[Feature, ...]:
        needed: dict[Feature, bool] = {
            "softcap": self.softcap is not None,
            "dropout": self.dropout_p > 0,
            "window": self.window is not None,
            "mask": self.mask is not None and self.mask != "bias=1,H,N,N",
            "bias": self.mask == "bias=1,H,N,N",
            "pages": self.page_size is not None,
        }
        return tuple(feature for feature, is_needed in needed.items() if is_needed)

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass: a decoding step has none."""
        return self.q_len == self.kv_len

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are visible, of one head, in the whole batch; padding is not counted.

        A window and a mask tensor are not taken into account: what they leave is not told in flops.
        """
        if self.lengths:
            return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        one = self.q_len * (self.q_len + 1) // 2 if self.causal else self.q_len * self.kv_len
        return self.batch * one

    @property
    def forward_flops(self) -> int:
        """Of the two matrix products, over visible pairs: two per multiplication and addition."""
        return 2 * self.pairs * self.heads * (self.head_dim + self.value_dim)

    @property
    def backward_flops(self) -> int:
        """Of the five matrix products: the scores again, the gradients of query and key, all head_dim wide, and the
        gradients of the probabilities and of value, value_dim wide."""
        return 2 * self.pairs * self.heads * (3 * self.head_dim + 2 * self.value_dim)

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Of key and value, in memory."""
        columns = self.head_dim + (0 if self.latent else self.value_dim)
        return self.batch * self.kv_heads * self.kv_len * columns * dtype.itemsize

    @property
    def label(self) -> str:
        if not self.trains:
            latent = f" latent D={self.head_dim}/{self.value_dim} H={self.heads}/{self.kv_heads}" if self.latent else ""
            pages = "" if self.page_size is None else f" pages of {self.page_size}"
            return f"B={self.batch} keys={self.kv_len}{latent}{pages}"
        shape = f"B={self.batch} N={self.kv_len}"
        if self.lengths:
            shape = f"{len(self.lengths)} x {min(self.lengths)}..{max(self.lengths)}"
        dims = f"{self.head_dim}" if self.value_dim == self.head_dim else f"{self.head_dim}/{self.value_dim}"
        heads = "" if self.kv_heads == self.heads else f" H={self.heads}/{self.kv_heads}"
        features = {
            "causal": self.causal,
            f"softcap={self.softcap}": self.softcap is not None,
            f"dropout={self.dropout_p}": self.dropout_p > 0,
            f"window={self.window}": self.window is not None,
            f"{self.mask}": self.mask is not None,
            "by blocks": self.by_blocks,
            f"{self.dtype}": self.dtype is not None,
        }
        return " ".join([f"{shape} D={dims}{heads}", *(text for text, has in features.items() if has)])


@dataclasses.dataclass(frozen=True)
class ModelCell:
    """One model on one batch, in the suite models.

    ``model``: a key of ``MODELS``. ``length``: of the sequences in tokens, of the images' sides in pixels. ``small``:
    the same architecture in a tiny size. ``without``: the peers that are left out unless they are asked for.
    """

    model: str
    batch: int
    length: int
    small: bool = False
    without: tuple[str, ...] = ()

    @property
    def suite(self) -> str:
        return "models"

    @property
    def label(self) -> str:
        return f"{'tiny ' if self.small else ''}{MODELS[self.model]} {self.batch} x {self.length}"


@dataclasses.dataclass(frozen=True)
class GenerationCell:
    """Decoding with a Llama of 1B and a static cache, in the suite generation.

    ``context``: the tokens that a step attends to, its own included. ``small``: the same architecture in a tiny size.
    ``without``: as in ModelCell.
    """

    batch: int
    context: int
    small: bool = False
    without: tuple[str, ...] = ()

    @property
    def suite(self) -> str:
        return "generation"

    @property
    def label(self) -> str:
        return f"{'tiny ' if self.small else ''}{MODELS['llama']} {self.batch} x {self.context}"


MODELS = {
    "block": "block",
    "vit": "ViT-B/16",
    "llama": "Llama-1B",
    "llama-no-mask": "Llama-1B no mask",
    "llama-right-padding": "Llama 4 layers right padding",
    "llama-left-padding": "Llama 4 layers left padding",
    "llama-packed": "Llama 4 layers packed documents",
    "gemma2": "Gemma-2 4 layers",
    "swin": "Swin-T",
    "t5": "T5-base",
    "t5-padding": "T5 4+4 layers padding",
    "whisper": "Whisper 4+4 layers",
}
"""The models' names in labels. Compiled, transformers' Llama hands a dense mask to ``scaled_dot_product_attention``,
which keeps FlashAttention from running; llama-no-mask is the same model with ``is_causal=True`` instead."""


def cells(suite: str, quick: bool = False) -> list[Cell] | list[ModelCell] | list[GenerationCell]:
    """The suite's cells; with ``quick`` as few as possible, and none with a peer that is slow to compile but one."""
    if suite == "models":
        return _small_models() if quick else _models()
    if suite == "generation":
        return [GenerationCell(2, 64, small=True)] if quick else _generation()
    return _QUICK[suite]() if quick else _FULL[suite]()


def _train_cell(
    head_dim: int, length: int, causal: bool, setup: Setup, *, value_dim: int | None = None, grouped: int = 1
) -> Cell:
    """16,384 tokens, with values of width 2048; ``grouped`` query heads share one head of key and value."""
    value_dim = value_dim or head_dim
    heads = 2048 // value_dim
    shape = (16384 // length, heads, heads // grouped, length, length, head_dim, value_dim)
    return Cell("train", *shape, causal, setup=setup)


def _train() -> list[Cell]:
    # FlexAttention in one length, and triton-sigmoid, which tries 49 kernels in each cell, in two cells.
    setups: dict[tuple[int, int, bool], Setup] = {
        (64, 4096, False): "tune",
        (64, 4096, True): "compile",
        (128, 4096, False): "compile",
        (128, 4096, True): "tune",
    }
    shapes = itertools.product((64, 128), (1024, 4096, 16384), (False, True))
    cells = [_train_cell(*shape, setups.get(shape, "none")) for shape in shapes]
    for causal in (False, True):
        cells += [
            _train_cell(96, 4096, causal, "none"),
            _train_cell(192, 4096, causal, "none", value_dim=128),  # DeepSeek's
            _train_cell(256, 4096, causal, "none"),
            _train_cell(64, 4096, causal, "none", grouped=4),
            _train_cell(128, 4096, causal, "none", grouped=4),
        ]
    return cells


def _short_cell(length: int, batch: int, setup: Setup) -> Cell:
    """The attention of a ViT-B, for images of 50, 197 or 577 patches and class token."""
    return Cell("short", batch, 12, 12, length, length, 64, 64, setup=setup)


def _short() -> list[Cell]:
    return [
        _short_cell(length, batch, "compile" if length == 197 else "none")
        for length, batch in ((50, 1024), (197, 256), (577, 128))
    ]


def _decode_cell(batch: int, keys: int, setup: Setup) -> Cell:
    return Cell("decode", batch, 32, 8, 1, keys, 128, 128, setup=setup)


def _decode() -> list[Cell]:
    return [
        _decode_cell(batch, keys, "compile" if keys == 8192 and batch in (1, 64) else "none")
        for batch in (1, 4, 16, 64)
        for keys in (1024, 8192, 32768, 131072)
        if batch * keys <= 2**21  # key and value take 8 GiB in bf16
    ] + [
        *(_latent_cell(batch, keys, heads) for heads in (16, 128) for batch, keys in ((1, 32768), (64, 8192))),
        *(dataclasses.replace(_decode_cell(64, 8192, "none"), page_size=page_size) for page_size in (16, 64, 256)),
        *(dataclasses.replace(_latent_cell(64, 8192, heads), page_size=64) for heads in (16, 128)),
    ]


def _latent_cell(batch: int, keys: int, heads: int) -> Cell:
    """DeepSeek's multi-head latent attention, absorbed: of V2-Lite, and of V3."""
    return Cell("decode", batch, heads, 1, 1, keys, 576, 512, latent=True)


def _varlen_cell(sequences: int, longest: int, head_dim: int, causal: bool, setup: Setup) -> Cell:
    """Some 35,000 tokens of width 2048. The lengths are random, and the same in each run."""
    draw = random.Random(longest)
    lengths = tuple(draw.randint(longest // 16, longest) for _ in range(sequences))
    heads, longest = 2048 // head_dim, max(lengths)
    return Cell(
        "varlen", sequences, heads, heads, longest, longest, head_dim, head_dim, causal, lengths=lengths, setup=setup
    )


def _varlen() -> list[Cell]:
    return [
        _varlen_cell(sequences, longest, head_dim, causal, "compile")
        for sequences, longest, head_dim in ((64, 1024, 64), (16, 4096, 128))
        for causal in (False, True)
    ]


def _host() -> list[Cell]:
    """So small that the GPU waits for the host."""
    return [Cell("host", 1, 12, 12, 64, 64, 64, 64), Cell("host", 1, 32, 8, 1, 1024, 128, 128)]


def _feature_cell(
    batch: int, length: int, head_dim: int, *, heads: int | None = None, grouped: int = 1, **features: Any
) -> Cell:
    """Of width 2048, unless the number of heads is given. ``features``: fields of the cell, by name."""
    heads = heads or 2048 // head_dim
    shape = (batch, heads, heads // grouped, length, length, head_dim, head_dim)
    return Cell("features", *shape, setup="compile", **features)


def _features() -> list[Cell]:
    """What real models add to the plain kernels."""
    return [
        _feature_cell(4, 4096, 128, grouped=2, causal=True, softcap=50.0),  # Gemma 2's
        _feature_cell(4, 4096, 256, grouped=2, causal=True, softcap=50.0),
        _feature_cell(16, 1024, 64, heads=16, dropout_p=0.1),
        _feature_cell(4, 1024, 64, heads=16, dtype="fp32"),
        _feature_cell(2, 8192, 128, mask="documents=1,1,N,N"),
        _feature_cell(2, 8192, 128, mask="documents=1,1,N,N", by_blocks=True),
        _feature_cell(2, 8192, 64, mask="documents=1,1,N,N", by_blocks=True),
        _feature_cell(16, 1024, 64, heads=16, mask="padding=B,1,N,N"),  # as transformers passes it
        _feature_cell(16, 1024, 64, heads=16, mask="padding=B,1,N,N", by_blocks=True),
        _feature_cell(16, 1024, 64, heads=16, mask="padding=B,1,1,N"),
        _packed_cell(64),
        _packed_cell(128),
        _feature_cell(1, 16384, 128, causal=True, window=1024),
        _feature_cell(2, 8192, 64, causal=True, window=512),
        _feature_cell(8, 1024, 64, heads=16, mask="bias=1,H,N,N"),
        *(
            Cell("features", batch, 32, 8, 1, keys, 128, 128, setup="compile")
            for batch, keys in ((1, 32768), (8, 32768), (64, 8192))
        ),
    ]


def _packed_cell(head_dim: int) -> Cell:
    """24 causal sequences of 256 to 2048 tokens, the same in each run."""
    draw = random.Random(24)
    lengths = tuple(draw.randint(256, 2048) for _ in range(24))
    return _feature_cell(24, max(lengths), head_dim, causal=True, lengths=lengths)


def _models() -> list[ModelCell]:
    # PyTorch's own choice is one of the backends that run anyway: the large models are not compiled once more for it.
    return [
        ModelCell("block", 4, 4096),
        ModelCell("vit", 256, 224),
        ModelCell("llama", 4, 2048, without=("flex",)),
        ModelCell("llama", 1, 8192, without=("sdpa", "flex")),
        ModelCell("llama-no-mask", 4, 2048, without=("sdpa",)),
        ModelCell("llama-no-mask", 1, 8192, without=("sdpa",)),
        ModelCell("llama-right-padding", 4, 2048, without=("sdpa",)),
        ModelCell("llama-left-padding", 4, 2048, without=("sdpa",)),
        ModelCell("llama-packed", 1, 8192, without=("sdpa",)),
        ModelCell("gemma2", 1, 8192),
        ModelCell("swin", 128, 224),
        ModelCell("t5", 16, 512, without=("cudnn", "efficient")),
        ModelCell("t5-padding", 16, 512),
        ModelCell("whisper", 16, 1500, without=("sdpa",)),
    ]


def _generation() -> list[GenerationCell]:
    return [GenerationCell(batch, context, without=("sdpa",)) for batch in (1, 32) for context in (2048, 16384)]


def _small_models() -> list[ModelCell]:
    """For a CPU, too."""
    return [
        ModelCell(model, 2, 56 if model in ("vit", "swin") else 32, small=True)  # 56: two of Swin's windows
        for model in MODELS
    ]


_FULL = {"train": _train, "short": _short, "decode": _decode, "varlen": _varlen, "host": _host, "features": _features}
_QUICK: dict[str, Callable[[], list[Cell]]] = {
    "train": lambda: [_train_cell(128, 4096, True, "compile")],
    "short": lambda: [_short_cell(197, 256, "none")],
    "decode": lambda: [_decode_cell(16, 8192, "none")],
    "varlen": lambda: [_varlen_cell(64, 1024, 64, True, "none")],
    "host": _host,
    "features": lambda: [_feature_cell(16, 1024, 64, heads=16, mask="padding=B,1,1,N")],
}


def phases(cell: Cell) -> tuple[str, ...]:
    """What is measured in a cell: "forward", "backward", "forward+backward" (their time) or "memory" (their peak)."""
    if not cell.trains:
        return ("forward",)
    if cell.suite in ("host", "features"):
        return "forward", "forward+backward"
    return ("forward", "backward", "memory") if cell.suite == "train" else ("forward", "backward")
