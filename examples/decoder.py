"""A language model after the swap: trained on the standard library's source with softmax, converted, fine-tuned.

    python examples/decoder.py                 # one CUDA GPU: under eight minutes on an H100
    python examples/decoder.py --small         # a CPU setting: some minutes on two cores, too small to show much

A quarter of the training sequences are recall documents: pairs of a random key and value, then the same keys in another
order, whose values the model must look up. Loss alone hides failures of retrieval, so accuracy on those values stands
beside the validation loss. Compared are softmax; sigmoid by conversion, with the paper's bias and calibrated, after
fine-tuning for 5% of the training's steps on cross entropy and the KL divergence from the softmax model; the calibrated
one after 15%; softmax trained on for as long as either; and sigmoid from scratch by the paper's recipe.
Prints each row when it is there and a table at the end, and saves the loss curves as a plot to --out.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sigswap

PAIR = 6  # bytes of "ab=cd;"
VALUE = slice(3, 5)
RECALL_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Setting:
    hidden: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    lr: float
    evaluated: int
    """Batches of source, and of recall documents, that an evaluation takes."""


FULL = Setting(hidden=384, layers=6, heads=6, context=512, batch=16, steps=8000, lr=1e-3, evaluated=16)
SMALL = Setting(hidden=64, layers=2, heads=2, context=96, batch=16, steps=400, lr=3e-3, evaluated=4)


class Data:
    """Bytes of the standard library's source, split by file, and recall documents."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        files = [f for f in files if not {"site-packages", "test", "tests", "idlelib"} & set(f.parts)]
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for index, file in enumerate(files):
            parts[index % 20 == 0].append(file.read_bytes())
        self.training, self.validation = (
            torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).to(device) for part in parts
        )

    def source(self, text: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """[count, context] token ids."""
        length = self.setting.context
        starts = torch.randint(0, len(text) - length, (count, 1), generator=generator).to(self.device)
        return text[starts + torch.arange(length, device=self.device)].long()

    def recall(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, context]: pairs "ab=cd;" of different keys, then the same pairs in another order, then blanks."""
        pairs = self.setting.context // PAIR // 2
        letters = torch.arange(ord("a"), ord("z") + 1)
        keys = torch.stack([torch.randperm(26 * 26, generator=generator)[:pairs] for _ in range(count)])
        values = torch.randint(0, 26, (count, pairs, 2), generator=generator)
        first = torch.empty(count, pairs, PAIR, dtype=torch.long)
        first[..., 0], first[..., 1] = letters[keys // 26], letters[keys % 26]
        first[..., 2], first[..., 5] = ord("="), ord(";")
        first[..., VALUE] = letters[values]
        order = torch.rand(count, pairs, generator=generator).argsort(-1)
        second = first.gather(1, order.unsqueeze(-1).expand_as(first))
        document = torch.cat([first, second], 1).flatten(1)
        return F.pad(document, (0, self.setting.context - document.shape[1]), value=ord(" ")).to(self.device)

    def batch(self, generator: torch.Generator) -> Tensor:
        """[batch, context]: source and recall documents."""
        recall = round(RECALL_SHARE * self.setting.batch)
        source = self.source(self.training, self.setting.batch - recall, generator)
        return torch.cat([source, self.recall(recall, generator)])


def build(setting: Setting) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=setting.hidden, intermediate_size=3 * setting.hidden, use_cache=False,
        num_hidden_layers=setting.layers, num_attention_heads=setting.heads, num_key_value_heads=setting.heads,
        max_position_embeddings=setting.context, bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def compiled(model: LlamaForCausalLM) -> Any:
    """On a GPU. Converted models' attention is lowered to the kernel."""
    if model.device.type == "cpu":
        return model
    return torch.compile(model, backend="sigswap" if sigswap.is_converted(model) else "inductor")


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return model(input_ids=ids).logits.float()


def next_token_loss(predicted: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(predicted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def divergence(predicted: Tensor, truth: Tensor) -> Tensor:
    """KL divergence from the teacher's distribution of the next token, the mean over the tokens."""
    predicted, truth = (y.flatten(0, 1).log_softmax(-1) for y in (predicted, truth))
    return F.kl_div(predicted, truth, reduction="batchmean", log_target=True)


@torch.no_grad()
def evaluate(model: Any, data: Data) -> tuple[float, float]:
    """Validation loss on source, in nats per byte, and the share of values recalled (both bytes right)."""
    generator = torch.Generator().manual_seed(10_000)
    model.eval()
    losses, right = [], []
    pairs = data.setting.context // PAIR // 2
    for _ in range(data.setting.evaluated):
        ids = data.source(data.validation, data.setting.batch, generator)
        losses.append(next_token_loss(logits(model, ids), ids).item())
        ids = data.recall(data.setting.batch, generator)
        guess = F.pad(logits(model, ids).argmax(-1)[:, :-1], (1, 0))
        asked = (guess == ids)[:, : 2 * pairs * PAIR].unflatten(1, (2, pairs, PAIR))[:, 1]
        right.append(asked[..., VALUE].all(-1).double().mean().item())
    return sum(losses) / len(losses), sum(right) / len(right)


def train(
    model: Any,
    data: Data,
    steps: int,
    lr: float,
    seed: int,
    curve: list[tuple[int, float]],
    tuning: bool = False,
    teacher: Any = None,
) -> float:
    """AdamW, warm-up over a twentieth of the steps, cosine down to a tenth. Returns the seconds it took.

    Tuning goes down linearly to 0, with param_groups' ten times the rate for sigmoid's parameters. A teacher's
    divergence is added to the cross entropy; the curve has the cross entropy alone.
    """
    generator = torch.Generator().manual_seed(seed)
    groups: Any = model.parameters()
    if sigswap.is_converted(model):
        groups = sigswap.param_groups(model, lr, weight_decay=0.1, sigmoid_lr=None if tuning else lr)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=data.device.type == "cuda")
    warmup = max(1, round(steps / 20))

    def factor(step: int) -> float:
        linear = (steps - step) / max(1, steps - warmup)
        cosine = 0.55 + 0.45 * math.cos(math.pi * min(1, step / steps))
        return min((step + 1) / warmup, linear if tuning else cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    student, guide = compiled(model), None if teacher is None else compiled(teacher.eval())
    started = time.perf_counter()
    for step in range(steps):
        ids = data.batch(generator)
        predicted = logits(student, ids)
        loss = entropy = next_token_loss(predicted, ids)
        if guide is not None:
            with torch.no_grad():
                truth = logits(guide, ids)
            loss = entropy + divergence(predicted, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 100) == 0:
            curve.append((step, entropy.item()))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the CPU setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps; fine-tuning takes 5%% and 15%% of them")
    parser.add_argument("--batch", type=int, help="sequences per step, 16 by default")
    parser.add_argument("--out", type=Path, default=Path("decoder-out"), help="directory for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setting = SMALL if options.small else FULL
    given = {name: getattr(options, name) for name in ("steps", "batch") if getattr(options, name)}
    setting = dataclasses.replace(setting, **given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    torch.manual_seed(options.seed)
    data = Data(setting, device)
    table = Table("", "steps", "loss before tuning", "recall before", "loss", "recall", "seconds")
    training: dict[str, list[tuple[int, float]]] = {}
    tuning: dict[str, list[tuple[int, float]]] = {}

    def row(name: str, steps: int, before: tuple[float, float] | None, model: Any, seconds: float) -> None:
        loss, recall = evaluate(model, data)
        first = ("", "") if before is None else (f"{before[0]:.4f}", f"{before[1]:.1%}")
        table.add_row(name, str(steps), *first, f"{loss:.4f}", f"{recall:.1%}", f"{seconds:.0f}")
        was = "" if before is None else f" from loss {first[0]}, recall {first[1]}"
        console.print(f"{name}, {steps} steps{was}: loss {loss:.4f}, recall {recall:.1%}, {seconds:.0f} s")

    original = build(setting).to(device)
    scratch = copy.deepcopy(original)
    name = "softmax, trained"
    seconds = train(original, data, setting.steps, setting.lr, options.seed, training.setdefault(name, []))
    row(name, setting.steps, None, original, seconds)

    generator = torch.Generator().manual_seed(options.seed + 1)
    calibration = [{"input_ids": data.batch(generator)[:: max(1, setting.batch // 16)]} for _ in range(4)]
    paper = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(bias=setting.context, learn_bias=False))
    calibrated = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(query_bias=True, first_token=False))
    report = sigswap.calibrate(calibrated, calibration, lookups=False)
    console.print(report)
    report.save(options.out / "heads.png")

    # Softmax has nothing to repair: no teacher, and a tenth of the peak rate, which did better than three tenths.
    for name, start, parts, lr, teacher in (
        ("softmax, trained on", original, 1, 0.1, None),
        ("sigmoid, converted, the paper's bias", paper, 1, 0.5, original),
        ("sigmoid, converted, calibrated", calibrated, 1, 0.5, original),
        ("softmax, trained on, 15% of the steps", original, 3, 0.1, None),
        ("sigmoid, converted, calibrated, 15% of the steps", calibrated, 3, 0.5, original),
    ):
        model = copy.deepcopy(start)
        before = evaluate(model, data)
        steps, curve = parts * setting.steps // 20, tuning.setdefault(name, [])
        seconds = train(model, data, steps, lr * setting.lr, options.seed + 2, curve, tuning=True, teacher=teacher)
        row(name, steps, before, model, seconds)

    name = "sigmoid, from scratch, the paper's recipe"
    sigswap.convert(scratch, sigswap.SigmoidConfig.from_scratch(n=setting.context))
    seconds = train(scratch, data, setting.steps, setting.lr, options.seed, training.setdefault(name, []))
    row(name, setting.steps, None, scratch, seconds)

    console.print(table)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = {"training": training, "fine-tuning": tuning}
    for axis, (title, curves) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel("training loss, nats per byte")
        axis.legend()
    figure.savefig(options.out / "decoder.png", dpi=150)
    console.print(f"Pictures are in {options.out}.")


if __name__ == "__main__":
    main()
