#!/usr/bin/env bash
# Triton's interpreter multiplies the bit patterns of bfloat16 as integers.
#
# Versions:  triton 3.6.0 and 3.9.0 (each run here), torch 2.13.0, numpy 2.4.6; no GPU.
# Guess:     TRITON_INTERPRET=1 runs a kernel in NumPy, so its tl.dot of bfloat16 is right within rounding.
# Behaviour: NumPy has no bfloat16, so the interpreter holds it as uint16, and tl.dot multiplies these integers.
#            float16 and float32 are right. No error, no warning: a kernel that is right on a GPU is wrong by a factor of
#            1e9, and one tested in the interpreter in float16 alone was never tested in bfloat16.
# Seen:      float16 relative error 1.9e-07; bfloat16 2.4e+09; bfloat16 equals the product of the uint16 views: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.13.0 numpy==2.4.6
cat >"$folder/dot.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, N: tl.constexpr):
    row = tl.arange(0, N)
    place = row[:, None] * N + row[None, :]
    tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place)))


def error(dtype: torch.dtype) -> tuple[float, bool]:
    torch.manual_seed(0)
    a, b = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype)
    c = torch.empty(32, 32)
    product[(1,)](a, b, c, 32)
    right = a.double() @ b.double()
    bits = a.view(torch.int16).to(torch.int64) & 0xFFFF, b.view(torch.int16).to(torch.int64) & 0xFFFF
    of_bits = dtype == torch.bfloat16 and torch.allclose(c.double(), (bits[0] @ bits[1]).double(), rtol=1e-5)
    return ((c - right).abs().max() / right.abs().max()).item(), of_bits


half, brain = error(torch.float16), error(torch.bfloat16)
print(f"triton {triton.__version__}: float16 relative error {half[0]:.1e}; bfloat16 {brain[0]:.1e};", end=" ")
print(f"bfloat16 equals the product of the uint16 views: {brain[1]}")
assert half[0] < 1e-6 and brain[0] > 1e6 and brain[1], "changed: look at it again"
PYTHON
for version in 3.6.0 3.9.0; do
    $pip --no-deps "triton==$version"
    TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/dot.py"
done
