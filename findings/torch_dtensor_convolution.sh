#!/usr/bin/env bash
# A convolution of a DTensor that is sharded by height gives one rank's part, and calls it the whole.
#
# Versions:  torch 2.14.1, numpy 2.4.6; CPU, two processes with gloo, float32.
# Guess:     a DTensor is right under any placement: an op without a rule for one gathers first, or raises
#            NotImplementedError.
# Behaviour: conv2d has rules for a sharded batch, and for a sharded width in a few cases, of which padding by half the
#            kernel is none here. Otherwise each rank convolves what it has, with zeros at the cut, and the result
#            is marked Replicate: its shape is that of the part, its numbers differ by rank, and full_tensor() says
#            nothing. Where input and weight are both sharded by channels, as in a row-wise parallel layer, each
#            rank's summand is marked Replicate too, in place of Partial, and even the shape is right.
# Seen:      sharded by batch: right
#            sharded by height: one rank's part, marked Replicate
#            sharded by width: one rank's part, marked Replicate
#            sharded by channels of both: right shape, other numbers, marked Replicate
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6
cat >"$folder/convolution.py" <<'PYTHON'
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

CASES = {  # of the image [batch, channels, height, width] and of the weight [out, in, height, width]
    "batch": (Shard(0), Replicate()),
    "height": (Shard(2), Replicate()),
    "width": (Shard(3), Replicate()),
    "channels of both": (Shard(1), Shard(1)),
}
RIGHT, PART, SUMMAND = "right", "one rank's part, marked Replicate", "right shape, other numbers, marked Replicate"


def outcome(mesh, image, weight, placements) -> str:
    right = F.conv2d(image, weight, padding=1)
    shards = (distribute_tensor(each, mesh, [place]) for each, place in zip((image, weight), placements, strict=True))
    out = F.conv2d(*shards, padding=1)
    whole = out.full_tensor()
    if whole.shape == right.shape and torch.allclose(whole, right, atol=1e-5):
        return RIGHT
    if out.placements != (Replicate(),):
        return "wrong in another way"
    return SUMMAND if whole.shape == right.shape else PART


def work(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    image, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    seen = {name: outcome(mesh, image, weight, placements) for name, placements in CASES.items()}
    dist.destroy_process_group()
    if rank == 0:
        print(f"torch {torch.__version__}")
        for name, each in seen.items():
            print(f"sharded by {name}: {each}")
    assert list(seen.values()) == [RIGHT, PART, PART, SUMMAND], "changed: look at it again"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(f"{folder}/store",), nprocs=2)
PYTHON
"$folder/venv/bin/python" "$folder/convolution.py"
