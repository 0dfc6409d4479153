#!/usr/bin/env bash
# The padding mask of every encoder, [B, 1, 1, N], exports to ONNX's Attention and then does not run in onnxruntime.
#
# Versions:  torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0; CPU, opsets 23 and 24.
# Guess:     scaled_dot_product_attention becomes one Attention node, whose specification says that attn_mask is
#            broadcast to (batch, heads, query length, key length); so the masks that PyTorch broadcasts work.
# Behaviour: export succeeds, the checker and onnx's own reference evaluator are content, and onnxruntime fails when the
#            node runs: it wants the mask's last but one dimension to be the query's length. The same mask expanded
#            to [B, 1, N, N] is right, as is opset 18, where attention is written out in matrix products.
# Seen:      opset 18 equal; opset 23 reference equal, onnxruntime fails; opset 24 reference equal, onnxruntime fails;
#            expanded: opset 23 onnxruntime equal, opset 24 onnxruntime equal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
$pip onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cat >"$folder/mask.py" <<'PYTHON'
import io
import logging
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
onnxruntime.set_default_logger_severity(4)


class Attention(nn.Module):
    def forward(self, query, key, value, mask):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


torch.manual_seed(0)
query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
padding = torch.arange(6) < torch.tensor([6, 4])[:, None]
padding = padding[:, None, None, :]
expected = Attention()(query, key, value, padding).numpy()


def outcome(run, names, arguments):
    try:
        [out] = run(None, dict(zip(names, arguments, strict=True)))
    except Exception:
        return "fails"
    return "equal" if np.allclose(out, expected, atol=1e-5) else "differs"


def outcomes(mask, opset):
    arguments = (query, key, value, mask)
    program = torch.onnx.export(Attention(), arguments, dynamo=True, opset_version=opset, verbose=False)
    file = io.BytesIO()
    program.save(file)
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model, full_check=True)
    nodes = [node.op_type for node in model.graph.node]
    assert ("Attention" in nodes) == (opset >= 23), f"changed: {nodes}"
    names = [each.name for each in model.graph.input]
    arrays = [each.numpy() for each in arguments]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    reference = ReferenceEvaluator(model) if opset >= 23 else session
    return outcome(reference.run, names, arrays), outcome(session.run, names, arrays)


seen = {opset: outcomes(padding, opset) for opset in (18, 23, 24)}
expanded = {opset: outcomes(padding.expand(-1, -1, 6, -1).contiguous(), opset)[1] for opset in (23, 24)}
print(f"opset 18 {seen[18][1]};", "; ".join(
    f"opset {opset} reference {seen[opset][0]}, onnxruntime {seen[opset][1]}" for opset in (23, 24)
) + ";", "expanded:", ", ".join(f"opset {opset} onnxruntime {how}" for opset, how in expanded.items()))
assert seen == {18: ("equal", "equal"), 23: ("equal", "fails"), 24: ("equal", "fails")}, "changed: look at it again"
assert expanded == {23: "equal", 24: "equal"}, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/mask.py"
