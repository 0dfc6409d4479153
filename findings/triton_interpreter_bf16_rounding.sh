#!/usr/bin/env bash
# Triton's interpreter cuts float32 off to bfloat16, where the language rounds to nearest, even if asked to round.
#
# Versions:  triton 3.6.0 and 3.9.0 (each run here), torch 2.14.1, numpy 2.4.6; no GPU.
# Guess:     TRITON_INTERPRET=1 has no arithmetic in bfloat16, so that one computes in float32 and casts; the cast
#            rounds to nearest even, tl.cast's default and PyTorch's.
# Behaviour: the cast drops the lower 16 bits: it rounds towards zero, with fp_downcast_rounding="rtne", too. Half of
#            all numbers are off by one step, all of them towards zero, so that errors do not average out: means, norms
#            and sums of what is stored shrink by 0.3%. The largest float32 stays finite, and a NaN whose payload lies
#            in the lower bits becomes infinity. Casts to float16 round to nearest.
# Seen:      default: not as PyTorch 50.0%, mean relative error -2.8e-03 (PyTorch's 4.9e-06)
#            rtne: not as PyTorch 50.0%, mean relative error -2.8e-03 (PyTorch's 4.9e-06)
#            both equal to the upper 16 bits: True; float16 as PyTorch: True; nan with a low payload -> inf
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
cat >"$folder/rounding.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(source, target, rounding: tl.constexpr, N: tl.constexpr):
    place = tl.arange(0, N)
    numbers = tl.load(source + place)
    tl.store(target + place, tl.cast(numbers, target.dtype.element_ty, fp_downcast_rounding=rounding))


def converted(source: torch.Tensor, dtype: torch.dtype, rounding: str | None) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    convert[(1,)](source, target, rounding, source.numel())
    return target


def error(numbers: torch.Tensor) -> float:
    return ((numbers.double() - normal.double()) / normal.double()).mean().item()


print(f"triton {triton.__version__}")
torch.manual_seed(0)
normal = torch.randn(4096)
right = normal.to(torch.bfloat16)
upper = (normal.view(torch.int32) >> 16 << 16).view(torch.float32)
cut = True
for rounding in (None, "rtne"):
    stored = converted(normal, torch.bfloat16, rounding)
    cut = cut and torch.equal(stored.float(), upper)
    other = (stored != right).float().mean()
    print(
        f"{rounding or 'default'}: not as PyTorch {other:.1%}, mean relative error {error(stored):.1e} "
        f"(PyTorch's {error(right):.1e})"
    )
    assert 0.4 < other < 0.6 and error(stored) < -2e-3 and abs(error(right)) < 1e-4, "changed: look at it again"
half = torch.equal(converted(normal, torch.float16, None), normal.to(torch.float16))
nan = torch.tensor([0x7F800001, 0], dtype=torch.int32).view(torch.float32)
special = converted(nan, torch.bfloat16, None)[0].item()
print(f"both equal to the upper 16 bits: {cut}; float16 as PyTorch: {half}; nan with a low payload -> {special}")
assert nan[0].isnan() and cut and half and special == float("inf"), "changed: look at it again"
PYTHON
for version in 3.6.0 3.9.0; do
    $pip --no-deps "triton==$version"
    TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/rounding.py"
done
