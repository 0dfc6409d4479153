#!/usr/bin/env bash
# A DTensor sharding rule that looks at a bool argument is asked once: the next call with the other value is wrong.
#
# Versions:  torch 2.14.1; two gloo processes, CPU, float32.
# Guess:     a rule that torch.distributed.tensor.experimental.register_sharding registers gets all arguments of the op,
#            so what it answers holds for these arguments.
# Behaviour: answers are kept by the inputs' shapes and placements, and by those positional arguments that come at or
#            after the first int of the schema. An op without an int argument is kept by its tensors alone: bools, floats
#            and lists do not count. The second call runs by the first one's answer, on each rank's part, without
#            an error, and its numbers are wrong. The order of the two calls decides which one that is. With an int
#            argument before the bool both are right.
# Seen:      bool alone: first call right True, second call right False
#            after an int: first call right True, second call right True
#            (x / x.sum(axis) of [4, 4], sharded along axis 0; the bool says which axis)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
cat >"$folder/shards.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding


@torch.library.custom_op("finding::share", mutates_args=())
def share(x: torch.Tensor, of_columns: bool) -> torch.Tensor:
    return x / x.sum(0 if of_columns else 1, keepdim=True)


@torch.library.custom_op("finding::share_after_int", mutates_args=())
def share_after_int(x: torch.Tensor, unused: int, of_columns: bool) -> torch.Tensor:
    return x / x.sum(0 if of_columns else 1, keepdim=True)


for op in (share, share_after_int):
    op.register_fake(lambda x, *rest: torch.empty_like(x))


def acceptable(of_columns, others):
    """The axis that is summed over has to be whole."""
    axis = 1 if of_columns else 0
    nones = [None] * others
    return [([Replicate()], [Replicate(), *nones]), ([Shard(axis)], [Shard(axis), *nones])]


@register_sharding(torch.ops.finding.share.default)
def rule(x, of_columns):
    return acceptable(of_columns, 1)


@register_sharding(torch.ops.finding.share_after_int.default)
def rule_after_int(x, unused, of_columns):
    return acceptable(of_columns, 2)


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(1.0, 17.0).view(4, 4)
x = distribute_tensor(whole, mesh, [Shard(0)])


def is_right(op, *flags):
    return torch.equal(op(x, *flags).full_tensor(), op(whole, *flags))


alone = [is_right(torch.ops.finding.share, of_columns) for of_columns in (False, True)]
after = [is_right(torch.ops.finding.share_after_int, 0, of_columns) for of_columns in (False, True)]
if dist.get_rank() == 0:
    print("bool alone: first call right {}, second call right {}".format(*alone))
    print("after an int: first call right {}, second call right {}".format(*after))
dist.destroy_process_group()
assert alone == [True, False] and after == [True, True], "changed: look at it again"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/shards.py"
