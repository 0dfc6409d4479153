#!/usr/bin/env bash
# The sum of a nested tensor that was made by torch.nested.narrow counts what was cut away.
#
# Versions:  torch 2.14.1, numpy 2.4.6; CPU, float32, layout torch.jagged.
# Guess:     a nested tensor is its rows, so that x.sum() is the sum over these, and contiguous() changes no result.
# Behaviour: narrow gives a view: the whole padded buffer with starts and lengths. sum() and mean() over everything are
#            those of the buffer, padding included, and their gradient reaches the padding. numel() counts the rows
#            alone, so that sum() / numel() is no mean either. sum(1), which needs the rows' bounds, raises. After
#            contiguous() the numbers are right, but then backward raises. So a loss over the valid tokens of a padded
#            batch takes in the others, and nothing is said.
# Seen:      every valid number is 1, every other one 100; 36 are valid, in 9 positions
#            narrowed: sum 3636.0, mean 50.5, numel 36, positions with a gradient 18, sum(1) raises
#            contiguous: sum 36.0, mean 1.0, numel 36, positions with a gradient raises, sum(1) right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6
cat >"$folder/narrowed.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")  # that nested tensors are a prototype
import torch

starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 4])
valid = torch.zeros(3, 6, dtype=torch.bool)
for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
    valid[row, start : start + length] = True
padded = torch.where(valid, 1.0, 100.0)[..., None].expand(3, 6, 4).contiguous().requires_grad_()


def totals(contiguous: bool) -> tuple[float, float, int, str, str]:
    rows = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    if contiguous:
        rows = rows.contiguous()
    try:
        (gradient,) = torch.autograd.grad(rows.sum(), padded)
        reached = str(int((gradient != 0).any(-1).sum()))
    except RuntimeError:
        reached = "raises"
    try:
        by_row = "right" if torch.equal(rows.sum(1)[:, 0], lengths.float()) else "wrong"
    except (RuntimeError, NotImplementedError):
        by_row = "raises"
    return rows.sum().item(), rows.mean().item(), rows.numel(), reached, by_row


print(f"torch {torch.__version__}; every valid number is 1, every other one 100; 36 are valid, in 9 positions")
seen = {"narrowed": totals(False), "contiguous": totals(True)}
for name, (total, mean, numel, reached, by_row) in seen.items():
    print(f"{name}: sum {total}, mean {mean}, numel {numel}, positions with a gradient {reached}, sum(1) {by_row}")
assert seen["contiguous"] == (36.0, 1.0, 36, "raises", "right"), "changed: look at it again"
assert seen["narrowed"] == (3636.0, 50.5, 36, "18", "raises"), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/narrowed.py"
