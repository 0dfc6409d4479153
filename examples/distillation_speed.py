"""Tokens per second of a distillation, beside those of plain training of the same model.

    pip install -e '.[demo]'
    python examples/distillation_speed.py                # one CUDA GPU; some minutes, mostly of compiling
    python examples/distillation_speed.py --small        # a CPU, a tiny model, nothing compiled: to see that it runs

The model is a Llama of SmolLM2-135M's shape with random weights, on 16 sequences of 512 tokens a step, under bfloat16
autocast: trained as it is, eager and compiled, and distilled, eager and compiled, from itself. Each is timed from the
step after which nothing is compiled any more. Prints a row each; with --json FILE writes them, too.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import LlamaConfig, LlamaForCausalLM

import sigswap


@dataclasses.dataclass(frozen=True)
class Setting:
    device: str
    config: dict[str, Any]
    batch: int
    length: int
    steps: tuple[int, int]
    """Between which time is taken."""

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**self.config)).to(self.device).eval()

    def batches(self, count: int, rows: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(10, self.config["vocab_size"], (count, rows, self.length), generator=generator)
        return [{"input_ids": each} for each in ids.to(self.device)]

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


FULL = Setting(
    "cuda",
    {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    16, 512, (24, 64),
)  # fmt: skip
SMALL = Setting(
    "cpu",
    {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    },
    2, 32, (2, 4),
)  # fmt: skip


def train(setting: Setting, compiled: bool) -> None:
    """Plain training."""
    student = setting.model().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(setting.device, torch.bfloat16):
            logits = student(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    step: Callable[[Tensor], Tensor] = torch.compile(loss_of) if compiled else loss_of
    given = setting.batches(16, setting.batch)
    for number in range(setting.steps[1] + 1):
        step(given[number % len(given)]["input_ids"]).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def distill(setting: Setting, compiled: bool) -> None:
    teacher = setting.model()
    student = sigswap.convert(copy.deepcopy(teacher))
    sigswap.calibrate(student, setting.batches(2, 1), max_length=setting.length)
    given, steps = setting.batches(16, setting.batch), setting.steps[1] + 1
    sigswap.distill(student, teacher, given, steps=steps, autocast=torch.bfloat16, compile=compiled, progress=False)


def tokens_per_second(run: Callable[[Setting, bool], None], setting: Setting, compiled: bool) -> float:
    """By the optimizer's steps, which both kinds of run have."""
    taken, times = 0, []

    def count(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken in setting.steps:
            setting.synchronize()
            times.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(count)
    try:
        run(setting, compiled)
    finally:
        hook.remove()
        torch.compiler.reset()
    first, last = setting.steps
    return (last - first) * setting.batch * setting.length / (times[1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    setting = SMALL if given.small else FULL
    rows = {}
    for name, run in (("training", train), ("distillation", distill)):
        for compiled in (False,) if given.small else (False, True):
            title = f"{name}, compiled" if compiled else name
            rows[title] = tokens_per_second(run, setting, compiled)
            print(f"{title:24s} {rows[title]:9,.0f} tokens per second", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
