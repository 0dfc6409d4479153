"""Functions run in several processes that talk by gloo, as torchrun starts them."""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.multiprocessing

LIMIT = 240
"""Seconds after which ranks that do not answer are given up."""

ENDED = "it ended without an answer"


PRELOADED = ["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint", "pytest"]
PRELOADED += ["sigswap", "sigswap.training.distill", "transformers.models.llama.modeling_llama", "accelerate"]

TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]


def device() -> torch.device:
    """Where this rank's tensors are."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


def on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, lost: int | None = None, backend: str = "gloo"
) -> list[Any]:
    """What ``function(*arguments)`` returns in each of ``size`` processes, which are one process group. It is a
    function at the top of a module. An error in one of them is a failure here, with its traceback.

    ``backend``: with "nccl" each has a GPU. ``lost``: the rank that is to end on its way, by os._exit say; None stands
    for what it returns.
    """
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    # By processes that have imported all of this already; but not where there are GPUs, which must not be known before.
    context = torch.multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    torch.multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(
                target=_run,
                args=(rank, size, sender, f"{folder}/store", backend, function, arguments),
                daemon=True,
            )
            for rank, (_, sender) in enumerate(ends)
        ]
        for process in processes:
            process.start()
        try:
            for _, sender in ends:
                sender.close()
            answers = [_answer(receiver, rank) for rank, (receiver, _) in enumerate(ends)]
        finally:
            for process in processes:
                process.kill()
                process.join()
    if lost is not None:
        assert answers[lost] == (False, ENDED), "the rank did not end"
        answers[lost] = (True, None)
    failed = [f"rank {rank}:\n{what}" for rank, (done, what) in enumerate(answers) if not done]
    assert not failed, "\n".join(failed)
    return [what for _, what in answers]


def _answer(receiver: Connection, rank: int) -> tuple[bool, Any]:
    try:
        return receiver.recv() if receiver.poll(LIMIT) else (False, f"no answer within {LIMIT} s")
    except EOFError:
        return False, ENDED


def _run(
    rank: int, size: int, sender: Connection, store: str, backend: str, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before: no collection and no conversion goes through it
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        sender.send((True, function(*arguments)))
        torch.distributed.barrier()
    except BaseException:
        sender.send((False, traceback.format_exc()))
