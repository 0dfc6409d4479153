#!/usr/bin/env bash
# torch.compile hides every key whose mask is 2: it reads `mask == 0` is hidden as `mask == 1` is visible.
#
# Versions:  torch 2.14.1, numpy 2.4.6; CPU, float32, needs a C++ compiler.
# Guess:     compiled code computes what eager code does. `mask == 0` marks padding in a mask of segment numbers (1 for
#            the first document of a row, 2 for the second), of weights, or of counts, as it does in one of 0 and 1.
# Behaviour: without gradients inductor's pattern matcher finds DistilBERT's attention by masked_fill(mask == 0, -inf),
#            and puts scaled_dot_product_attention in its place with the mask `mask == 1`. That is the same for 0 and 1
#            alone: the keys of all other numbers vanish. With gradients it does not match here. So a model trains right
#            and evaluates wrong, and nothing is said. A bool mask in place of `mask == 0` is not matched, and right.
# Seen:      mask of 0 and 1: compiled in inference right, in training right; with a bool right
#            mask of 0, 1 and 2: compiled in inference hides the keys of 2, in training right; with a bool right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6 setuptools
cat >"$folder/segments.py" <<'PYTHON'
import math

import torch


def attention(query, key, value, padding):
    """Of [batch, tokens, heads, channels], where no query sees the keys of padding [batch, tokens]."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    hidden = padding.view(padding.size(0), 1, 1, padding.size(1)).expand_as(scores)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value


def by_number(query, key, value, mask):
    return attention(query, key, value, mask == 0)


torch.manual_seed(0)
inputs = query, key, value = [torch.randn(2, 6, 4, 16) for _ in range(3)]
plain = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
segments = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 2, 2, 2]])


def compiled(function, mask, training):
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        return torch.compile(function)(query.clone().requires_grad_(training), key, value, mask)


def verdict(out, mask):
    right, fewer = (attention(*inputs, padding) for padding in (mask == 0, mask != 1))
    if torch.allclose(out, right, atol=1e-5):
        return "right"
    return "hides the keys of 2" if torch.allclose(out, fewer, atol=1e-5) else "is wrong in another way"


seen = {}
for name, mask in (("0 and 1", plain), ("0, 1 and 2", segments)):
    outs = compiled(by_number, mask, False), compiled(by_number, mask, True), compiled(attention, mask == 0, False)
    seen[name] = tuple(verdict(out, mask) for out in outs)
    print("mask of {}: compiled in inference {}, in training {}; with a bool {}".format(name, *seen[name]))
assert seen["0 and 1"] == ("right",) * 3, "changed: look at it again"
assert seen["0, 1 and 2"] == ("hides the keys of 2", "right", "right"), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/segments.py"
