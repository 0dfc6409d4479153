#!/usr/bin/env bash
# onnxruntime's transformer optimizer drops a model's own scale of attention, be it 1 / head_dim or learned.
#
# Versions:  onnxruntime 1.32.0, torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, numpy 2.4.6; CPU, float32.
# Guess:     optimizer.optimize_model(model_type="bert") changes how a model is computed, not what: it fuses attention
#            where it is what the fused op computes, and otherwise leaves it, or hands `scale`, which that op has, on.
# Behaviour: it looks for a Div between the product and the softmax, and not at what is divided by: the Attention node
#            has no scale, so that it divides by the root of head_dim. A model that divides by head_dim (muP), by a
#            learned temperature, or by one per head, gets other numbers, and nothing is said. `* (1 / 8)` in place of
#            `/ 8` is not matched, and right. So is the session with its own optimizations alone, at their highest
#            level.
# Seen:      / root of head_dim: fused True, right; / head_dim: fused True, wrong; / temperature: fused True, wrong;
#            / temperature per head: fused True, wrong; * (1 / head_dim): fused False, right; the session alone right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
$pip onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat >"$folder/scale.py" <<'PYTHON'
import logging
import sys
import warnings

import numpy as np
import onnxruntime
import torch
from onnxruntime.transformers import optimizer
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
heads, width = 4, 8
tokens = torch.randn(2, 6, heads * width)


class Block(nn.Module):
    def __init__(self, scaled):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = (nn.LayerNorm(heads * width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(heads * width, heads * width) for _ in range(4))
        for each in self.query, self.key:
            nn.init.normal_(each.weight)
        self.temperature = nn.Parameter(torch.tensor(5.0))
        self.per_head = nn.Parameter(torch.linspace(1, 8, heads)[:, None, None])
        self.scaled = scaled

    def forward(self, tokens):
        tokens = self.before(tokens)
        parts = self.query(tokens), self.key(tokens), self.value(tokens)
        query, key, value = (part.unflatten(-1, (heads, width)).transpose(1, 2) for part in parts)
        weights = self.scaled(self, query @ key.transpose(-1, -2)).softmax(-1)
        return self.after(self.out((weights @ value).transpose(1, 2).flatten(2)) + tokens)


def outcome(scaled):
    """Whether the optimizer fuses, and whether the model is right with and without the optimizer."""
    model, file = Block(scaled).eval(), sys.argv[1] + "/model.onnx"
    torch.onnx.export(model, (tokens,), file, dynamo=True, input_names=["tokens"], verbose=False)
    optimized = optimizer.optimize_model(file, model_type="bert", num_heads=heads, hidden_size=heads * width)
    nodes = [node.op_type for node in optimized.model.graph.node]
    right = [np.allclose(run(each), model(tokens).detach(), atol=1e-4) for each in (file, optimized)]
    return "Attention" in nodes, *right


def run(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    model = model if isinstance(model, str) else model.model.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"tokens": tokens.numpy()})[0]


seen = {
    "/ root of head_dim": outcome(lambda block, scores: scores / width**0.5),
    "/ head_dim": outcome(lambda block, scores: scores / width),
    "/ temperature": outcome(lambda block, scores: scores / block.temperature),
    "/ temperature per head": outcome(lambda block, scores: scores / block.per_head),
    "* (1 / head_dim)": outcome(lambda block, scores: scores * (1 / width)),
}
for name, (fused, _, right) in seen.items():
    print(f"{name}: fused {fused}, {'right' if right else 'wrong'}", end="; ")
alone = all(right for _, right, _ in seen.values())
print(f"the session alone {'right' if alone else 'wrong'}")
fused_wrong = (True, True, False)
expected = [(True, True, True), fused_wrong, fused_wrong, fused_wrong, (False, True, True)]
assert list(seen.values()) == expected, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/scale.py" "$folder"
