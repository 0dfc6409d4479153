#!/usr/bin/env bash
# OpenVINO converts and compiles an exported model with grouped queries, and fails when it runs; traced, it is right.
#
# Versions:  openvino 2026.4.1, torch 2.13.0, numpy 2.4.6; CPU, float32.
# Guess:     convert_model gives the same from torch.export's program, the newer way, as from a traced module; what it
#            does not know it refuses there, as it does an op without a translation.
# Behaviour: scaled_dot_product_attention(enable_gqa=True) with 4 heads of queries and 2 of keys: of an exported program
#            the flag is dropped, and one ScaledDotProductAttention with 2 heads beside 4 is left. It is converted and
#            compiled, and the first inference raises RuntimeError about a MatMul. A traced module, and the exported
#            program after run_decompositions(), come out right; so does one head of keys, which broadcasts.
# Seen:      4 heads on 2: traced right; exported: converted, compiled, then RuntimeError; decomposed right
#            4 heads on 1: traced right; exported: right; decomposed right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.13.0 numpy==2.4.6 openvino==2026.4.1 packaging==26.4
cat >"$folder/grouped.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import openvino
import torch
import torch.nn.functional as F


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


core = openvino.Core()


def outcome(model, inputs, **example) -> str:
    right = Attention()(*inputs)
    compiled = core.compile_model(openvino.convert_model(model, **example), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    try:
        out = torch.from_numpy(compiled([each.numpy() for each in inputs])[0].copy())
    except RuntimeError:
        return "converted, compiled, then RuntimeError"
    return "right" if out.shape == right.shape and torch.allclose(out, right, atol=1e-4) else "wrong"


torch.manual_seed(0)
print(f"openvino {openvino.__version__}, torch {torch.__version__}")
seen = {}
for heads in (2, 1):
    inputs = torch.randn(2, 4, 5, 16), torch.randn(2, heads, 7, 16), torch.randn(2, heads, 7, 16)
    program = torch.export.export(Attention(), inputs)
    seen[heads] = (
        outcome(Attention(), inputs, example_input=inputs),
        outcome(program, inputs),
        outcome(program.run_decompositions(), inputs),
    )
    print("4 heads on {}: traced {}; exported: {}; decomposed {}".format(heads, *seen[heads]))
assert seen[2] == ("right", "converted, compiled, then RuntimeError", "right"), "changed: look at it again"
assert seen[1] == ("right", "right", "right"), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/grouped.py"
