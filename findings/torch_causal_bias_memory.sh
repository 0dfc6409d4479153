#!/usr/bin/env bash
# The mask that causal_lower_right returns prints as the mask, and holds uninitialised numbers of another shape.
#
# Versions:  torch 2.14.1, numpy 2.4.6; CPU.
# Guess:     torch.nn.attention.bias.causal_lower_right(3, 5) is a bool tensor [3, 5], for it prints as one; and a mask
#            of other sizes than query and key have is an error, as every attn_mask of a wrong shape is.
# Behaviour: it is an uninitialised float tensor [2, 3, 5]: the constructor hands the arguments of its own on to that of
#            torch.Tensor, where the variant, an enum of integers, is a size. Only repr and scaled_dot_product_attention
#            know better. What reads the tensor itself (tolist, comparisons, numel) gets that memory. And a mask of the
#            variant that begins at the top left is used without a look at its sizes: 9 by 50 for 3 rows and 5 keys.
# Seen:      prints as [[True, True, True, False, False], ...: True; shape [2, 3, 5], torch.float32, 30 numbers;
#            attention is right: True; causal_upper_left(9, 50) for 3 rows and 5 keys is taken: True, a bool mask of
#            those sizes raises RuntimeError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6
cat >"$folder/mask.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as attention

torch.manual_seed(0)
query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
whole = torch.ones(3, 5, dtype=torch.bool)
mask = causal_lower_right(3, 5)
prints = "[ True,  True,  True, False, False]" in repr(mask)
form = list(mask.shape), str(mask.dtype), mask.numel()
right = torch.allclose(attention(query, key, value, mask), attention(query, key, value, whole.tril(2)), atol=1e-6)
first = attention(query, key, value, causal_upper_left(9, 50))
taken = torch.allclose(first, attention(query, key, value, whole.tril()), atol=1e-6)
try:
    attention(query, key, value, torch.ones(9, 50, dtype=torch.bool).tril())
    of_bool = "is taken"
except RuntimeError:
    of_bool = "raises RuntimeError"
print(f"prints as [[True, True, True, False, False], ...: {prints}; shape {form[0]}, {form[1]},", end=" ")
print(f"{form[2]} numbers; attention is right: {right}; causal_upper_left(9, 50) for 3 rows and 5 keys is", end=" ")
print(f"taken: {taken}, a bool mask of those sizes {of_bool}")
seen = prints, *form, right, taken, of_bool
assert seen == (True, [2, 3, 5], "torch.float32", 30, True, True, "raises RuntimeError"), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/mask.py"
