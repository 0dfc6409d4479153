"""What ``sigswap bench`` measures: the suites, their peers, and the cells, each of which is one problem."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable

import torch

SUITES: dict[str, tuple[str, ...]] = {
    "train": ("fa2", "cudnn", "efficient", "flex", "triton-sigmoid"),
    "short": ("fa2", "cudnn", "efficient", "flex", "triton-sigmoid"),
    "decode": ("fa2", "cudnn", "efficient", "flex"),
    "varlen": ("fa2", "flex", "padded", "nested", "triton-sigmoid"),
    "host": ("sdpa",),
    "models": ("fa2", "cudnn", "efficient", "sdpa", "unfused"),
}
"""Each suite's peers. fa2, cudnn, efficient: that backend of ``scaled_dot_product_attention`` (fa2 in varlen:
``torch.nn.attention.varlen``); sdpa: the backend that PyTorch chooses; flex: FlexAttention, softmax, compiled (varlen:
one long sequence, and a block mask of its documents); padded: sdpa on padded sequences; nested: sdpa on jagged nested
tensors; triton-sigmoid: the package of that name, if it is installed; unfused: attention that the model computes by
hand, with matrix products and a softmax (then sdpa: the same model, told to use ``scaled_dot_product_attention``)."""

DEFAULT_SUITES = tuple(suite for suite in SUITES if suite != "models")
"""Those that run unless others are named: models compiles each model up to ten times, which takes many minutes."""

PEERS = tuple(dict.fromkeys(peer for peers in SUITES.values() for peer in peers))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One problem. Causal ones have as many queries as keys.

    In the suite varlen ``lengths`` holds the sequences' lengths, and q_len and kv_len are the longest.
    ``without``: the peers that are left out unless they are asked for, as they compile or tune for each shape.
    """

    suite: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    causal: bool = False
    lengths: tuple[int, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass: a decoding step has none."""
        return self.q_len == self.kv_len

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are visible, of one head, in the whole batch; padding is not counted."""
        if self.lengths:
            return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        one = self.q_len * (self.q_len + 1) // 2 if self.causal else self.q_len * self.kv_len
        return self.batch * one

    @property
    def forward_flops(self) -> int:
        """Of the two matrix products, over visible pairs. Backward's five products count 2.5 times as much."""
        return 4 * self.pairs * self.heads * self.head_dim

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Of key and value."""
        return 2 * self.batch * self.kv_heads * self.kv_len * self.head_dim * dtype.itemsize

    @property
    def label(self) -> str:
        mask = " causal" if self.causal else ""
        if self.lengths:
            return f"{len(self.lengths)} x {min(self.lengths)}..{max(self.lengths)} D={self.head_dim}{mask}"
        if not self.trains:
            return f"B={self.batch} keys={self.kv_len}"
        return f"B={self.batch} N={self.kv_len} D={self.head_dim}{mask}"


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


MODELS = {
    "block": "block",
    "vit": "ViT-B/16",
    "llama": "Llama-1B",
    "llama-no-mask": "Llama-1B no mask",
    "swin": "Swin-T",
    "t5": "T5-base",
}
"""The models' names in labels. Compiled, transformers' Llama hands a dense mask to ``scaled_dot_product_attention``,
which keeps FlashAttention from running; llama-no-mask is the same model with ``is_causal=True`` instead."""


def cells(suite: str, quick: bool = False) -> list[Cell] | list[ModelCell]:
    """The suite's cells; with ``quick`` as few as possible, and none with a peer that is slow to compile but one."""
    if suite == "models":
        return _small_models() if quick else _models()
    return _QUICK[suite]() if quick else _FULL[suite]()


def _train_cell(head_dim: int, length: int, causal: bool, without: tuple[str, ...]) -> Cell:
    """16,384 tokens of width 2048."""
    heads = 2048 // head_dim
    return Cell("train", 16384 // length, heads, heads, length, length, head_dim, causal, without=without)


def _train() -> list[Cell]:
    # FlexAttention in one length, and triton-sigmoid, which tries 49 kernels in each cell, in two cells.
    without: dict[tuple[int, int, bool], tuple[str, ...]] = {
        (64, 4096, False): (),
        (64, 4096, True): ("triton-sigmoid",),
        (128, 4096, False): ("triton-sigmoid",),
        (128, 4096, True): (),
    }
    shapes = itertools.product((64, 128), (1024, 4096, 16384), (False, True))
    return [_train_cell(*shape, without.get(shape, ("flex", "triton-sigmoid"))) for shape in shapes]


def _short_cell(length: int, batch: int, without: tuple[str, ...]) -> Cell:
    """The attention of a ViT-B, for images of 50, 197 or 577 patches and class token."""
    return Cell("short", batch, 12, 12, length, length, 64, without=without)


def _short() -> list[Cell]:
    return [
        _short_cell(length, batch, ("triton-sigmoid",) if length == 197 else ("flex", "triton-sigmoid"))
        for length, batch in ((50, 1024), (197, 256), (577, 128))
    ]


def _decode_cell(batch: int, keys: int, without: tuple[str, ...]) -> Cell:
    return Cell("decode", batch, 32, 8, 1, keys, 128, without=without)


def _decode() -> list[Cell]:
    return [
        _decode_cell(batch, keys, () if keys == 8192 and batch in (1, 64) else ("flex",))
        for batch in (1, 4, 16, 64)
        for keys in (1024, 8192, 32768, 131072)
        if batch * keys <= 2**21  # key and value take 8 GiB in bf16
    ]


def _varlen_cell(sequences: int, longest: int, head_dim: int, causal: bool, without: tuple[str, ...]) -> Cell:
    """Some 35,000 tokens of width 2048. The lengths are random, and the same in each run."""
    draw = random.Random(longest)
    lengths = tuple(draw.randint(longest // 16, longest) for _ in range(sequences))
    heads = 2048 // head_dim
    return Cell(
        "varlen", sequences, heads, heads, max(lengths), max(lengths), head_dim, causal, lengths, without=without
    )


def _varlen() -> list[Cell]:
    return [
        _varlen_cell(sequences, longest, head_dim, causal, ("triton-sigmoid",))
        for sequences, longest, head_dim in ((64, 1024, 64), (16, 4096, 128))
        for causal in (False, True)
    ]


def _host() -> list[Cell]:
    """So small that the GPU waits for the host."""
    return [Cell("host", 1, 12, 12, 64, 64, 64), Cell("host", 1, 32, 8, 1, 1024, 128)]


def _models() -> list[ModelCell]:
    # PyTorch's own choice is one of the backends that run anyway: the large models are not compiled once more for it.
    return [
        ModelCell("block", 4, 4096),
        ModelCell("vit", 256, 224),
        ModelCell("llama", 4, 2048),
        ModelCell("llama", 1, 8192, without=("sdpa",)),
        ModelCell("llama-no-mask", 4, 2048, without=("sdpa",)),
        ModelCell("llama-no-mask", 1, 8192, without=("sdpa",)),
        ModelCell("swin", 128, 224),
        ModelCell("t5", 16, 512),
    ]


def _small_models() -> list[ModelCell]:
    """For a CPU, too."""
    return [
        ModelCell(model, 2, 56 if model in ("vit", "swin") else 32, small=True)  # 56: two of Swin's windows
        for model in MODELS
    ]


_FULL = {"train": _train, "short": _short, "decode": _decode, "varlen": _varlen, "host": _host}
_QUICK: dict[str, Callable[[], list[Cell]]] = {
    "train": lambda: [_train_cell(128, 4096, True, ("triton-sigmoid",))],
    "short": lambda: [_short_cell(197, 256, ("flex", "triton-sigmoid"))],
    "decode": lambda: [_decode_cell(16, 8192, ("flex",))],
    "varlen": lambda: [_varlen_cell(64, 1024, 64, True, ("flex", "triton-sigmoid"))],
    "host": _host,
}


def phases(cell: Cell) -> tuple[str, ...]:
    """What is measured in a cell: "forward", "backward", "forward+backward" (their time) or "memory" (their peak)."""
    if not cell.trains:
        return ("forward",)
    if cell.suite == "host":
        return "forward", "forward+backward"
    return ("forward", "backward", "memory") if cell.suite == "train" else ("forward", "backward")
