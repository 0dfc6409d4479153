"""What ``convert`` costs: its compute and its peak memory, beside those of one forward of the same model.

Of a vision transformer and a language model with random weights, each once as it is, which convert looks at on fake
tensors, and once with a forward that reads a value (so that it is run on real ones). Each figure is of a process of its
own: compute in seconds on one thread, and by how much its largest memory is above that of the model itself. (glibc is
told to give each tensor memory of its own, so that holes between tensors do not count.)

    python examples/convert_cost.py
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sigswap


class Reads(nn.Module):
    """A model whose forward looks at a value of what it has computed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        output = self.inner(x)
        values = output if isinstance(output, torch.Tensor) else output.logits
        assert float(values.detach().numpy().max()) > -1e30
        return output


def vision() -> tuple[nn.Module, torch.Tensor]:
    return timm.create_model("vit_base_patch16_224", depth=6).eval(), torch.randn(16, 3, 224, 224)


def language() -> tuple[nn.Module, torch.Tensor]:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16_000, **sizes)).eval()
    return model, torch.randint(0, 16_000, (8, 512))


def forward(model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        model(x)


def convert(model: nn.Module, x: torch.Tensor) -> None:
    sigswap.convert(model, example_inputs=x)


def measure(build: Callable[[], Any], reads: bool, run: Callable[..., None], results: Any) -> None:
    """In a process of its own: seconds of compute, and MiB above those of the model."""
    torch.set_num_threads(1)
    warm = timm.create_model("vit_tiny_patch16_224", depth=1).eval(), torch.randn(1, 3, 224, 224)
    for each in (forward, convert):  # so that what is imported on first use is not counted
        each(*warm)
    model, x = build()
    model = Reads(model) if reads else model
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    run(model, x)
    seconds = time.process_time() - start
    results.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    processes = multiprocessing.get_context("spawn")
    for build in (vision, language):
        for reads in (False, True):
            figures = []
            for run in (forward, convert):
                results = processes.SimpleQueue()
                process = processes.Process(target=measure, args=(build, reads, run, results))
                process.start()
                process.join()
                figures.append("{:6.2f} s, {:5.0f} MiB".format(*results.get()))
            name = f"{build.__name__}{', which reads a value' if reads else ''}"
            print(f"{name:32} forward {figures[0]}   convert {figures[1]}")


if __name__ == "__main__":
    main()
