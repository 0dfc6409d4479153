"""A decoder on several processes: converted, calibrated, distilled and trained by all of them together, and saved.

    torchrun --nproc-per-node 2 examples/distributed.py                        # every rank has the whole model (DDP)
    torchrun --nproc-per-node 2 examples/distributed.py --parallel sharded     # and a shard of it (FSDP2)
    torchrun --nproc-per-node 2 examples/distributed.py --parallel tensor      # and some of its heads
    torchrun --nproc-per-node 2 examples/distributed.py --parallel context     # or all of it, for a part of each text

On GPUs by NCCL, else by gloo; on several nodes with torchrun's own options. The text is the standard library's source,
as bytes, of which every rank takes other parts (with tensor and context parallelism, the same).
"""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import sigswap

CONTEXT, BATCH = 128, 4


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def batches(count: int, part: int, device: torch.device) -> list[Tensor]:
    """``count`` batches [BATCH, CONTEXT] of a text; another ``part`` has others."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)[part * count * BATCH * CONTEXT :]
    tokens = torch.frombuffer(bytearray(text[: count * BATCH * CONTEXT]), dtype=torch.uint8)
    return list(tokens.long().view(count, BATCH, CONTEXT).to(device))


def spread(model: Any, parallel: str, device: torch.device) -> nn.Module:
    """``model`` on all ranks; if it is to be converted, it is."""
    if parallel in ("data", "context"):  # whose gradients are those of parts of the tokens, too
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if parallel == "sharded":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    styles = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    styles |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, styles)
    return sigswap.shard_heads(model) if sigswap.is_converted(model) else model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def loss_of_part(model: nn.Module, ids: Tensor, context: sigswap.ContextParallel) -> Tensor:
    """Of this rank's part of the tokens, so that the mean over the ranks is the mean over all tokens: the last token of
    each text has none to foretell."""
    part, labels = context.shard(ids), context.shard(F.pad(ids[:, 1:], (0, 1), value=-100))
    where = context.positions(ids.shape[1], ids.device)
    logits = model(input_ids=part, position_ids=where, attention_mask=torch.ones_like(part)).logits
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total * context.size / ids[:, 1:].numel()


def train(model: nn.Module, text: list[Tensor], parallel: str) -> list[float]:
    """The loss of each step, as the mean over the ranks."""
    # Not all parameters at once: under tensor parallelism some are DTensors and some are not.
    optimizer = torch.optim.AdamW(sigswap.param_groups(model, 1e-3, weight_decay=0.1), foreach=False)
    losses = []
    for ids in text:
        optimizer.zero_grad()
        if parallel == "context":
            with sigswap.context_parallel() as context:
                loss = loss_of_part(model, ids, context)
                loss.backward()
        else:
            loss = loss_of(model, ids)
            loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def save(model: nn.Module, parallel: str, directory: Path) -> None:
    """For any number of processes: ``from_pretrained`` and ``sigswap.load`` read it."""
    if parallel in ("sharded", "tensor") or dist.get_rank() == 0:  # what is in parts is saved by all ranks
        sigswap.save(model, directory)
    dist.barrier()


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=["data", "sharded", "tensor", "context"], default="data")
    parser.add_argument("--distill", type=int, default=10, help="steps before those of --steps")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("out/distributed"))
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group()
    rank = dist.get_rank()
    part = 0 if options.parallel in ("tensor", "context") else rank
    model = sigswap.convert(decoder().to(device), sigswap.SigmoidConfig(learn_bias=True))
    report = sigswap.calibrate(model, batches(4, rank, device), progress=False)  # the same on all ranks
    if rank == 0:
        print(report.summary())
    model = spread(model, options.parallel, device)  # now, for calibration has given the decoder new parameters
    if options.distill:  # by data parallelism, if not by tensor parallelism
        teacher = spread(decoder().to(device), options.parallel, device)
        text = batches(options.distill, 0 if options.parallel == "tensor" else rank, device)
        distilled = sigswap.distill(model, teacher, text, steps=options.distill, progress=False)
        if rank == 0:
            print(distilled)
    losses = train(model, batches(options.steps, part, device), options.parallel)
    if rank == 0:
        print(f"{options.parallel}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    save(model, options.parallel, options.out)
    return losses


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
