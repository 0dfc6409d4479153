"""Convert, calibrate, train, save, load and revert in a loop, as a program does that runs for days: nothing grows."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sigswap
from tests.fuzz.loading import HERE, IDS, build

WARM_UP = 0.25
"""The part of the time after which what there is is what there should be at the end."""
MEGABYTE = 1 << 20
MOST_MORE = {"resident": 24 * MEGABYTE, "files": 0, "threads": 0, "temporary files": 0, "tensors": 0}
"""What may be there more at the end than after the warm-up."""


class Kind(NamedTuple):
    """A model, its loss, and what it is saved with."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    inputs: Callable[[], object]
    factory: str | None


def kinds() -> list[Kind]:
    import timm
    import transformers

    def llama() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    def vit() -> nn.Module:
        return timm.create_model("test_vit", num_classes=5)

    images = torch.randn(2, 3, 160, 160)
    return [
        Kind(build, lambda m: m(IDS).logsumexp(-1).mean(), lambda: IDS, f"{HERE}:build"),
        Kind(llama, lambda m: m(IDS, labels=IDS).loss, lambda: {"input_ids": IDS}, None),
        Kind(vit, lambda m: m(images).square().mean(), lambda: images, None),
    ]


def once(kind: Kind, directory: Path) -> None:
    """One round. Raises AssertionError for what is not right in it."""
    model = kind.build().train()
    names = list(model.state_dict())
    sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True), example_inputs=kind.inputs())
    sigswap.calibrate(model, [kind.inputs()], progress=False, lookups=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = kind.loss(model)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads), "a loss or a gradient is not finite"
        optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = kind.loss(model)
        sigswap.save(model, directory, factory=kind.factory)
        loaded = sigswap.load(directory, allow_code=kind.factory is not None)
        for what, other in (
            ("what was loaded", loaded),
            ("a copy", copy.deepcopy(model)),
            ("a pickle", pickle.loads(pickle.dumps(model))),
        ):
            assert torch.equal(kind.loss(other), trained), f"{what} gives another loss"
        with sigswap.softmax(model):
            softmax = kind.loss(model)
        sigswap.revert(model)
        assert torch.equal(kind.loss(model), softmax), "revert is not the softmax model"
    assert list(model.state_dict()) == names, "revert leaves other names"


def measured() -> dict[str, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "tensors": sum(issubclass(type(each), Tensor) for each in gc.get_objects()),
    }


def soak(minutes: float, say: Callable[[str], None] = print) -> list[str]:
    """What has grown or gone wrong in that time; empty: nothing."""
    start, rounds = time.monotonic(), 0
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        temporary, tempfile.tempdir = tempfile.tempdir, name  # that others' files are not counted
        try:
            models, before, told, warm = kinds(), None, start, 0
            while (now := time.monotonic()) < start + 60 * minutes or before is None or rounds < warm + 2:
                for number, kind in enumerate(models):
                    try:
                        once(kind, Path(name, f"model {number}"))
                    except Exception as error:
                        faults.append(f"round {rounds}, model {number}: {type(error).__name__}: {error}")
                rounds += 1
                if before is None and now > start + 60 * minutes * WARM_UP and rounds >= 2:
                    before, warm = measured(), rounds
                    say(f"after {rounds} rounds: {before}")
                if now > told + 60:
                    say(f"{rounds} rounds: {measured()}")
                    told = now
            after = measured()
        finally:
            tempfile.tempdir = temporary
    say(f"after {rounds} rounds: {after}")
    faults += [
        f"{what}: {after[what]}, and {before[what]} after the warm-up"
        for what, most in MOST_MORE.items()
        if after[what] > before[what] + most
    ]
    return faults
