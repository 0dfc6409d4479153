#!/usr/bin/env bash
# One short input changes what a BigBird of transformers computes for all long ones after it, until it is loaded anew.
#
# Versions:  transformers 5.24.0, torch 2.13.0, numpy 2.4.6; CPU, float32.
# Guess:     where an input is too short for sparse blocks, that input gets full attention; a forward in eval mode, under
#            no_grad, leaves the model as it is.
# Behaviour: the forward puts new modules into the place of its attention modules (with the same weights), for good: long
#            inputs get full attention from then on, with its quadratic cost, hooks on the old modules are gone, and
#            config.attention_type, which is what is saved, still says block_sparse.
# Seen:      same long input, before and after a short one: largest change 0.0 without the short one, 2.6 with it; hook
#            called 1 time, then 0 times; config.attention_type block_sparse; the model's own original_full
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.13.0 numpy==2.4.6
$pip transformers==5.24.0
cat >"$folder/short.py" <<'PYTHON'
import logging

import torch
from transformers import BigBirdConfig, BigBirdModel

logging.disable(logging.WARNING)
torch.manual_seed(0)
config = BigBirdConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=128, attention_type="block_sparse", block_size=4, num_random_blocks=1,
    initializer_range=0.5,
)
model = BigBirdModel(config).eval()
calls = []
model.encoder.layer[0].attention.self.register_forward_hook(lambda *_: calls.append(None))


@torch.no_grad()
def run(length):
    before = len(calls)
    ids = torch.arange(length)[None] % config.vocab_size
    return model(input_ids=ids).last_hidden_state, len(calls) - before


first, called = run(64)
again, _ = run(64)
run(16)
after, called_after = run(64)
unchanged, changed = (float((x - first).abs().max()) for x in (again, after))
print(
    f"largest change {unchanged} without the short one, {changed:.2g} with it; hook called {called} time, then "
    f"{called_after} times; config.attention_type {model.config.attention_type}; the model's own {model.attention_type}"
)
assert unchanged == 0 and changed > 1e-3 and (called, called_after) == (1, 0), "changed: look at it again"
assert (model.config.attention_type, model.attention_type) == ("block_sparse", "original_full"), "look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/short.py"
