#!/usr/bin/env bash
# A sum over a tile that a loop also multiplies makes ptxas wait for each matrix product on Hopper by itself; the same sum
# as one more product, with ones, does not, but with Triton 3.6 only from 16 columns of ones on, not with eight.
#
# Versions:  triton 3.6.0 and 3.8.0 (each run here, with the ptxas in it); compiled for sm_90a, no GPU.
# Guess:     A sum of 64 x 128 numbers costs some additions beside 4 million multiply-adds of the product: a few percent.
#            If it is made a product, eight columns are the fewest that the instruction takes (PTX ISA), and the cheapest.
# Behaviour: with tl.sum in the loop ptxas serializes all products of it (C7515), which Triton does not show: a kernel of
#            this kind took 1.4 times as long on an H200. As a product with eight columns Triton 3.6 makes code of which
#            ptxas says the same; with 16 it does not. Triton 3.8 may have eight.
# Seen:      triton 3.6.0: no sum: in flight; tl.sum: serialized; 8 columns: serialized; 16 columns: in flight
#            triton 3.8.0: no sum: in flight; tl.sum: serialized; 8 columns: in flight; 16 columns: in flight
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
cat >"$folder/compiled.py" <<'PYTHON'
import subprocess
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FOLDER = Path(__file__).parent
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@triton.jit
def product(weights, table, out, sums_out, length, SUM: tl.constexpr, COLUMNS: tl.constexpr):
    """out = the transpose of weights times table, [128, 256], and, if SUM, the sums of weights over its length."""
    acc = tl.zeros((128, 256), tl.float32)
    sums = tl.zeros((128, COLUMNS), tl.float32) if COLUMNS else tl.zeros((128,), tl.float32)
    for start in range(0, length, 64):
        part = weights.load([start, 0])
        acc = tl.dot(part.T, table.load([start, 0]), acc)
        if SUM:
            if COLUMNS:
                sums = tl.dot(part.T, tl.full((64, COLUMNS), 1.0, tl.bfloat16), sums)
            else:
                sums += tl.sum(part.to(tl.float32), 0)
    row = tl.arange(0, 128)
    tl.store(out + row[:, None] * 256 + tl.arange(0, 256)[None, :], acc)
    if SUM:
        tl.store(sums_out + row, tl.max(sums, 1) if COLUMNS else sums)


def state(SUM: bool, columns: int) -> str:
    types = {"weights": "tensordesc<bf16[64,128]>", "table": "tensordesc<bf16[64,256]>", "out": "*fp32"}
    types |= {"sums_out": "*fp32", "length": "i32", "SUM": "constexpr", "COLUMNS": "constexpr"}
    source = ASTSource(product, types, {(5,): SUM, (6,): columns}, {(2,): [["tt.divisibility", 16]]})
    options = {"num_warps": 8, "num_stages": 4}
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "wgmma.mma_async" in text
    (FOLDER / "kernel.ptx").write_text(text)
    command = [PTXAS, "-v", "--gpu-name=sm_90a", FOLDER / "kernel.ptx", "-o", FOLDER / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "serialized" if "C7515" in said else "in flight" if "serialized" not in said else said


names = {"no sum": (False, 0), "tl.sum": (True, 0), "8 columns": (True, 8), "16 columns": (True, 16)}
seen = {name: state(*arguments) for name, arguments in names.items()}
print(f"triton {triton.__version__}: " + "; ".join(f"{name}: {each}" for name, each in seen.items()))
eight = "serialized" if triton.__version__ == "3.6.0" else "in flight"
expected = ["in flight", "serialized", eight, "in flight"]
assert list(seen.values()) == expected, "changed: look at it again"
PYTHON
export TRITON_CACHE_DIR="$folder/cache"
for version in 3.6.0 3.8.0; do
    $pip --no-deps "triton==$version"
    "$folder/venv/bin/python" "$folder/compiled.py"
done
