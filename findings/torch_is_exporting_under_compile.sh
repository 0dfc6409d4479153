#!/usr/bin/env bash
# torch.compiler.is_exporting() is True in code that torch.compile compiles.
#
# Versions:  torch 2.11.0, numpy 2.4.6; CPU.
# Guess:     its documentation says "we are under exporting": a branch for torch.export is not taken by torch.compile.
# Behaviour: where Dynamo traces the call it writes True, whoever asked for the trace; without Dynamo it is False. So a
#            library that keeps a fast path out of exported programs keeps it out of compiled code, too, and no test on
#            eager code sees it. torch.compiler._is_exporting_flag, traced as an attribute, is right in all of them.
# Seen:      eager: False; torch.compile: True; torch.export: True; the flag: False, False, True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.11.0 numpy==2.4.6
cat >"$folder/exporting.py" <<'PYTHON'
import torch


class Says(torch.nn.Module):
    def forward(self, x):
        return x + torch.compiler.is_exporting(), x + torch.compiler._is_exporting_flag


model, zero = Says(), torch.zeros(1)
runs = {
    "eager": model,
    "torch.compile": torch.compile(model, backend="eager", fullgraph=True),
    "torch.export": torch.export.export(Says(), (zero,), strict=True).module(),
}
found = {name: tuple(bool(number) for number in run(zero)) for name, run in runs.items()}
for name, (function, flag) in found.items():
    print(f"{name}: is_exporting() is {function}, the flag is {flag}")
assert found == {"eager": (False, False), "torch.compile": (True, False), "torch.export": (True, True)}, "changed"
PYTHON
"$folder/venv/bin/python" "$folder/exporting.py"
