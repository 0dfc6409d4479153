#!/usr/bin/env bash
# A grouped matrix product (mixture of experts) runs in float32 and float16 on a CPU, and cannot be traced there.
#
# Versions:  torch 2.13.0; no GPU. 2.14.1 has the same with another text.
# Guess:     what runs in eager runs under torch.compile, torch.export and make_fx; at worst it falls back.
# Behaviour: F.grouped_mm's kernel takes float32, float16 and bfloat16 on a CPU. Its fake kernel, by which all tracing
#            goes, takes bfloat16 alone. So any mixture of experts that multiplies with it (transformers does by default)
#            trains in float32, and can be neither compiled nor exported in it.
# Seen:      float32: eager right, compiled TorchRuntimeError; float16: eager right, compiled TorchRuntimeError;
#            bfloat16: eager right, compiled right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.13.0 numpy==2.4.6
cat >"$folder/grouped.py" <<'PYTHON'
import logging

import torch
import torch.nn.functional as F

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
rows, experts = torch.randn(8, 16), torch.randn(2, 16, 32)
ends = torch.tensor([3, 8], dtype=torch.int32)


def outcome(function, dtype):
    try:
        out = function(rows.to(dtype), experts.to(dtype), offs=ends)
    except Exception as error:
        return type(error).__name__
    right = torch.cat([rows[:3] @ experts[0], rows[3:] @ experts[1]])
    return "right" if torch.allclose(out.float(), right, atol=0.2) else "wrong"


seen = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    name = str(dtype).removeprefix("torch.")
    torch._dynamo.reset()
    seen[name] = outcome(F.grouped_mm, dtype), outcome(torch.compile(F.grouped_mm, fullgraph=True, backend="eager"), dtype)
    print(f"torch {torch.__version__}: {name}: eager {seen[name][0]}, compiled {seen[name][1]}")
refused = ("right", "TorchRuntimeError")
assert seen == {"float32": refused, "float16": refused, "bfloat16": ("right", "right")}, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/grouped.py"
