#!/usr/bin/env bash
# (n - 4) // 2 in a Triton kernel rounds towards zero, but towards minus infinity if n happens to be 1.
#
# Versions:  triton 3.6.0 and 3.9.0 (each run here), torch 2.13.0, numpy 2.4.6 (both for the interpreter only);
#            compiled for compute capability 9.0, no GPU needed.
# Guess:     Triton's semantics are C's for // and %, and Python's where all inputs are scalars, by which its page means
#            literals and what is marked tl.constexpr. n is a plain argument, so C's hold for each n; and an argument of
#            1 is specialised for speed, which changes no result.
# Behaviour: a plain argument that is 1 becomes a constexpr, as a stride of 1 does. What is computed from it and from
#            literals is then computed in Python, by Python's // and %. So (n - 4) // 2 is the floor of -1.5 for n = 1
#            and the whole part of -0.5 for n = 3, in one launch after another. With do_not_specialize, and in the
#            interpreter, n = 1 is as all others. Nothing is said.
# Seen:      a launch takes 1 as constexpr, 3 as i32; n = 1: constant -2, constant 1; n = 3: divsi, remsi (which round
#            towards zero)
#            interpreter, n = 1: -1, -1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.13.0 numpy==2.4.6
cat >"$folder/kernel.py" <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def halve(out, n):
    tl.store(out, (n - 4) // 2)
    tl.store(out + 1, (n - 4) % 2)
PYTHON
cat >"$folder/compiled.py" <<'PYTHON'
import re

import triton
from kernel import halve
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource


def stored(n: int) -> tuple[str, str, str]:
    """What a launch takes n as, and what the two stores of the kernel for it are given."""
    taken_as = native_specialize_impl(CUDABackend, n, False, True, True)[0]
    constants = {"n": n} if taken_as == "constexpr" else {}
    source = ASTSource(fn=halve, signature={"out": "*i32", "n": taken_as}, constexprs=constants)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    given = dict(re.findall(r"(%\S+) = arith\.(constant -?\d+|\w+)", text))
    first, second = (given[name] for name in re.findall(r"tt\.store %\S+, (%\S+) :", text))
    return taken_as, first, second


print(f"triton {triton.__version__}")
one, three = stored(1), stored(3)
print(f"a launch takes 1 as {one[0]}, 3 as {three[0]}; n = 1: {one[1]}, {one[2]}; n = 3: {three[1]}, {three[2]}")
assert one == ("constexpr", "constant -2", "constant 1"), "changed: look at it again"
assert three == ("i32", "divsi", "remsi"), "changed: look at it again"
PYTHON
cat >"$folder/interpreted.py" <<'PYTHON'
import torch
from kernel import halve

out = torch.zeros(2, dtype=torch.int32)
halve[(1,)](out, 1)
print("interpreter, n = 1: {}, {}".format(*out.tolist()))
assert out.tolist() == [-1, -1], "changed: look at it again"
PYTHON
export TRITON_CACHE_DIR="$folder/cache" TRITON_DEFAULT_FP_FUSION=1
for version in 3.6.0 3.9.0; do
    $pip --no-deps "triton==$version"
    "$folder/venv/bin/python" "$folder/compiled.py"
    TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/interpreted.py"
done
