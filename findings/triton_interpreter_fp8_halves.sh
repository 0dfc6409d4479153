#!/usr/bin/env bash
# Triton's interpreter converts 1.99 to float8 as 1.0: what rounds up to a power of two may come out halved.
#
# Versions:  triton 3.6.0 and 3.9.0 (each run here), torch 2.14.1, numpy 2.4.6; no GPU.
# Guess:     with TRITON_INTERPRET=1, x.to(tl.float8e5) is off by half a step at most: it rounds to nearest, as PyTorch
#            and the compiled kernel do.
# Behaviour: the interpreter rounds the significand by itself, and joins it to the exponent by "or" in place of a sum. A
#            carry out of the significand is lost where the exponent's last bit is 1 already (1 to 2, 4 to 8, 1/4 to 1/2
#            ...): 1.99 becomes 1.0, not 2.0, and 7.9 becomes 4.0, not 8.0. Between 2 and 4 all is well, so a test on a
#            few round numbers sees nothing. The other way, the codes of infinity and NaN are read as finite numbers.
#            Nothing is said: a quantizing kernel looks wrong by a factor of two where it is right.
# Seen:      float8_e5m2: 1.99 -> 1.0 (PyTorch 2.0), 3.99 -> 4.0 (4.0), 7.9 -> 4.0 (8.0); halved 4.8% of normal ones
#            float8_e4m3fn: 1.99 -> 1.0 (PyTorch 2.0), 3.99 -> 4.0 (4.0), 7.9 -> 4.0 (8.0); halved 2.6% of normal ones
#            float8_e5m2's inf and nan are read as 65536.0 and 114688.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
cat >"$folder/halves.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(source, target, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


def converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    convert[(1,)](source, target, source.numel())
    return target


print(f"triton {triton.__version__}")
torch.manual_seed(0)
normal = torch.randn(4096)
few = torch.tensor([1.99, 3.99, 7.9, 1.0])
for dtype, least in ((torch.float8_e5m2, 0.04), (torch.float8_e4m3fn, 0.02)):
    here, right = converted(few, dtype).float().tolist(), few.to(dtype).float().tolist()
    rounded = normal.to(dtype).float()
    halved = (converted(normal, dtype).float() * 2 == rounded).logical_and(rounded != 0).float().mean()
    print(
        f"{str(dtype).removeprefix('torch.')}: 1.99 -> {here[0]} (PyTorch {right[0]}), 3.99 -> {here[1]} ({right[1]}), "
        f"7.9 -> {here[2]} ({right[2]}); halved {halved:.1%} of normal ones"
    )
    assert here == [1.0, 4.0, 4.0, 1.0] and right == [2.0, 4.0, 8.0, 1.0], "changed: look at it again"
    assert least < halved < 0.06, "changed: look at it again"
special = torch.tensor([float("inf"), float("nan")]).to(torch.float8_e5m2)
read = converted(special, torch.float32)
print("float8_e5m2's inf and nan are read as {} and {}".format(*read.tolist()))
assert read.isfinite().all() and not special.float().isfinite().any(), "changed: look at it again"
PYTHON
for version in 3.6.0 3.9.0; do
    $pip --no-deps "triton==$version"
    TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/halves.py"
done
