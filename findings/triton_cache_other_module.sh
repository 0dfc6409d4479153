#!/usr/bin/env bash
# Triton compiles no new kernel after a constant was edited in another module, if the kernel reads it as module.NAME.
#
# Versions:  triton 3.6.0 and 3.9.0 (each run here); compiled for compute capability 9.0, no GPU needed.
# Guess:     the cache on disk knows what a kernel depends on: its source, the functions it calls, and the global
#            constants it reads, which have to be tl.constexpr for that. So `from tiles import WIDTH` and `tiles.WIDTH`
#            are two spellings of one thing.
# Behaviour: a name is in the key of the cache with its value. An attribute of a module is compiled in as a constant,
#            too, and its value is in no key. After tiles.py was edited, a new process runs the kernel that was compiled
#            for the old value, until the cache is deleted or the kernel's own text changes: no error, no warning.
# Seen:      WIDTH 64: the kernel with WIDTH holds 64, the one with tiles.WIDTH 64
#            WIDTH 32: the kernel with WIDTH holds 32, the one with tiles.WIDTH 64; with another cache 32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat >"$folder/kernels.py" <<'PYTHON'
import re

import tiles
import triton
import triton.language as tl
from tiles import WIDTH
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def by_name(out):
    tl.store(out, WIDTH)


@triton.jit
def by_attribute(out):
    tl.store(out, tiles.WIDTH)


held = []
for kernel in (by_name, by_attribute):
    source = ASTSource(fn=kernel, signature={"out": "*i32"})
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    held += re.findall(r"arith.constant (\d+) : i32", text)
print(*held)
PYTHON
held() { # WIDTH, cache: what the two kernels hold, in a new process
    printf 'import triton.language as tl\n\nWIDTH = tl.constexpr(%s)\n' "$1" >"$folder/tiles.py"
    TRITON_DEFAULT_FP_FUSION=1 TRITON_CACHE_DIR="$folder/$2" "$folder/venv/bin/python" -B "$folder/kernels.py"
}
for version in 3.6.0 3.9.0; do
    "$folder/venv/bin/pip" --disable-pip-version-check install -q setuptools==84.2.1 "triton==$version"
    echo "triton $version"
    read -r name attribute <<<"$(held 64 "first-$version")"
    echo "WIDTH 64: the kernel with WIDTH holds $name, the one with tiles.WIDTH $attribute"
    seen="$name $attribute"
    read -r name attribute <<<"$(held 32 "first-$version")"
    read -r _ fresh <<<"$(held 32 "second-$version")"
    echo "WIDTH 32: the kernel with WIDTH holds $name, the one with tiles.WIDTH $attribute; with another cache $fresh"
    if [ "$seen $name $attribute $fresh" != "64 64 32 64 32" ]; then
        echo "changed: look at it again" >&2
        exit 1
    fi
done
