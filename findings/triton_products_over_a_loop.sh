#!/usr/bin/env bash
# A matrix product on Hopper that is left running at the end of a loop's body, and read in the next turn while another
# one runs, makes ptxas wait for each product of the kernel by itself.
#
# Versions:  triton 3.6.0 and 3.8.0 (each run here, with the ptxas and nvdisasm in it); compiled for sm_90a, no GPU.
# Guess:     wgmma.wait_group N waits until at most the N latest groups are under way (PTX ISA), so results of an older
#            one may be read after it, in whichever turn of the loop it began. Gluon's warpgroup_mma_wait(N) is that.
# Behaviour: ptxas does not follow counts over the end of a loop's body: what was begun in the turn before it takes for
#            still running after a wait for 1 group, and serializes all products of the kernel, those before and behind
#            the loop, too. The counts are right, as are results. Only ptxas -v says so (C7514), which Triton does not
#            show. Where nothing is left running at the end of the body, the same count is understood.
# Seen:      left running: serialized; 12 matrix instructions, of which 12 are waited for
#            nothing left running: not serialized; 12 matrix instructions, of which 3 are waited for
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
cat >"$folder/compiled.py" <<'PYTHON'
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia import hopper

FOLDER = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@gluon.jit
def products(x, out, turns, LEFT_RUNNING: gl.constexpr):
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    multiplied: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    row = gl.arange(0, 64, gl.SliceLayout(1, loaded))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, loaded))[None, :]
    tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], swizzled)
    tile.store(gl.load(x + row * 64 + column))
    hopper.fence_async_shared()
    zeros = gl.zeros([64, 64], gl.float32, multiplied)
    total = zeros
    second = hopper.warpgroup_mma(tile, tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    for _ in range(turns):
        first = hopper.warpgroup_mma(tile, tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        total += gl.exp2(hopper.warpgroup_mma_wait(1, deps=[second]))
        second = hopper.warpgroup_mma(tile, tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        total += gl.exp2(hopper.warpgroup_mma_wait(1 if LEFT_RUNNING else 0, deps=[first]))
    total += hopper.warpgroup_mma_wait(0, deps=[second])
    row = gl.arange(0, 64, gl.SliceLayout(1, multiplied))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, multiplied))[None, :]
    gl.store(out + row * 64 + column, total)


def compiled(left_running: bool) -> tuple[bool, int, int]:
    """Whether ptxas says that it serialized products; matrix instructions; and how many of them a wait follows."""
    types = {"x": "*bf16", "out": "*fp32", "turns": "i32", "LEFT_RUNNING": "constexpr"}
    source = GluonASTSource(products, types, {(3,): left_running})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert re.findall(r"wait_group\.sync\.aligned (\d)", text) == ["1", "1" if left_running else "0", "0"]
    (FOLDER / "kernel.ptx").write_text(text)
    command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", FOLDER / "kernel.ptx", "-o", FOLDER / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    command = [TOOLS / "nvdisasm", "-c", FOLDER / "kernel.cubin"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    instructions = [line for line in lines if "HGMMA" in line]
    return "C7514" in said, len(instructions), sum("gsb0" in line for line in instructions)


print(f"triton {triton.__version__}")
running, nothing = compiled(True), compiled(False)
for name, (serialized, count, waited) in (("left running", running), ("nothing left running", nothing)):
    state = "serialized" if serialized else "not serialized"
    print(f"{name}: {state}; {count} matrix instructions, of which {waited} are waited for")
assert running[0] and running[2] > nothing[2], "changed: look at it again"
assert not nothing[0], "changed: look at it again"
PYTHON
export TRITON_CACHE_DIR="$folder/cache"
for version in 3.6.0 3.8.0; do
    $pip --no-deps "triton==$version"
    "$folder/venv/bin/python" "$folder/compiled.py"
done
