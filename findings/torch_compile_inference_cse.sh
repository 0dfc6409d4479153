#!/usr/bin/env bash
# torch.compile runs an op that is called twice on the same tensor once with gradients, and twice without.
#
# Versions:  torch 2.13.0, numpy 2.4.6; CPU, with a C++ compiler for inductor.
# Guess:     a compiled model does at most as much work under torch.no_grad() as in training: two equal calls of an op
#            that mutates nothing become one in both, or in neither.
# Behaviour: equal nodes are merged where the graph is split into forward and backward, so only there. An inference graph
#            keeps both. What layers share (a mask's blocks, tables of positions) is worked out once per layer, unless
#            the model hands it on.
# Seen:      calls of the op in one run of the compiled function: 1 with gradients, 2 without
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.13.0 numpy==2.4.6
cat >"$folder/twice.py" <<'PYTHON'
import torch
from torch import Tensor

calls = []


@torch.library.custom_op("demo::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    calls.append(None)
    return 2 * x


double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, grad: 2 * grad)


def run(gradients):
    compiled = torch.compile(lambda x: double(x) * double(x))
    x = torch.randn(8, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        compiled(x)  # compiles
        calls.clear()
        compiled(x)
    torch._dynamo.reset()
    return len(calls)


with_gradients, without = run(True), run(False)
print(f"calls of the op in one run of the compiled function: {with_gradients} with gradients, {without} without")
assert (with_gradients, without) == (1, 2), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/twice.py"
