#!/usr/bin/env bash
# FSDP2: an optimizer that is made after a forward pass never trains the outermost module's own parameters.
#
# Versions:  torch 2.14.1; two gloo processes, CPU, float32.
# Guess:     after fully_shard the parameters are DTensors for good, so an optimizer may be made at any time before the
#            first step: after a validation pass without gradients, say, or a forward that finds shapes.
# Behaviour: after a forward without a backward the module that fully_shard was applied to last keeps its parameters
#            whole (reshard_after_forward is False for it by default), and model.parameters() gives these: plain
#            Parameters. Backward and later steps work on the shards, so the optimizer has no gradient for what it holds,
#            and steps without an error or a warning. What inner modules hold is trained. model.reshard() before the
#            optimizer is made, and all is trained.
# Seen:      at once: inner trained True, outer trained True
#            after an evaluation: inner trained True, outer trained False
#            after an evaluation and reshard(): inner trained True, outer trained True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
cat >"$folder/train.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
inputs = torch.ones(2, 8)


def trained(evaluate, reshard):
    """Whether one step changes the inner layer's weight, and the outer one's, which the whole model holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = [layer.weight.full_tensor().detach().clone() for layer in model]
    if evaluate:
        with torch.no_grad():
            model(inputs)
    if reshard:
        model.reshard()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(inputs).square().sum().backward()
    optimizer.step()
    model.reshard()
    after = [layer.weight.full_tensor().detach() for layer in model]
    return [not torch.equal(old, new) for old, new in zip(before, after)]


found = [trained(False, False), trained(True, False), trained(True, True)]
if dist.get_rank() == 0:
    for name, each in zip(("at once", "after an evaluation", "after an evaluation and reshard()"), found):
        print("{}: inner trained {}, outer trained {}".format(name, *each))
dist.destroy_process_group()
assert found == [[True, True], [True, False], [True, True]], "changed: look at it again"
PYTHON
OMP_NUM_THREADS=1 "$folder/venv/bin/torchrun" --standalone --nproc-per-node 2 "$folder/train.py"
