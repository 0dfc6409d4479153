#!/usr/bin/env bash
# x-transformers has a sigmoid attention, and it is not the paper's: without a bias its rows grow with the length.
#
# Versions:  x-transformers 2.31.10, torch 2.13.0; CPU.
# Guess:     Attend(sigmoid=True) is the sigmoid attention of arXiv 2409.04431, whose bias -ln(n) keeps a row's sum
#            near 1, as softmax's is; so a model takes it in place of softmax at any length.
# Behaviour: it is sigmoid(score) without a bias. Every key of a random query gets about 1/2, so a row sums to n/2:
#            4 at 8 keys, 256 at 512, and an attention's output grows with the sequence. Nothing says so.
# Seen:      mean sum of a row at 8, 64, 512 keys: 4.0, 32.2, 256.1; softmax 1.0, 1.0, 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.13.0 numpy==2.4.6
$pip x-transformers==2.31.10
cat >"$folder/rows.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from x_transformers.attend import Attend

torch.manual_seed(0)
sums = {False: [], True: []}
for n in (8, 64, 512):
    query, key = torch.randn(2, 1, 2, n, 16).unbind(0)
    for sigmoid in sums:  # with values of 1 the output is the row's sum
        out, _ = Attend(sigmoid=sigmoid)(query, key, torch.ones(1, 2, n, 16))
        sums[sigmoid].append(out.mean().item())
rows, softmax = (", ".join(f"{each:.1f}" for each in sums[kind]) for kind in (True, False))
print(f"mean sum of a row at 8, 64, 512 keys: {rows}; softmax {softmax}")
assert softmax == "1.0, 1.0, 1.0" and sums[True][0] < 5 and sums[True][2] > 200, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/rows.py"
