#!/usr/bin/env bash
# The length that a StaticCache says it has goes on counting in the variable that it was put in.
#
# Versions:  transformers 5.24.0, torch 2.14.1, numpy 2.4.6; CPU.
# Guess:     get_seq_length() is a number, with any cache; so after `before = cache.get_seq_length()` and some
#            speculative tokens `cache.crop(before - cache.get_seq_length())` takes these back.
# Behaviour: a StaticCache returns the tensor that it counts in, and each forward adds to it in place. `before` has
#            grown, the difference is 0, and nothing is taken back: no error, no warning. With a DynamicCache it works.
# Seen:      DynamicCache: before 8, then 8; cropped to 8. StaticCache: before 8, then 11; cropped to 11;
#            before is the same object as the length now: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6 transformers==5.24.0
cat >"$folder/length.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()
tokens = torch.randint(0, 100, (1, 8))


def lengths(cache) -> tuple[int, int, int, bool]:
    """Before three more tokens; the same variable after them; the cache's after it was to forget them."""
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        before = cache.get_seq_length()
        first = int(before)
        model(tokens[:, :3], past_key_values=cache)
    now = int(before)
    cache.crop(before - cache.get_seq_length())
    same = isinstance(before, torch.Tensor) and before is cache.get_seq_length()
    return first, now, int(cache.get_seq_length()), same


dynamic = lengths(DynamicCache(config=model.config))
static = lengths(StaticCache(config=model.config, max_cache_len=32))
for name, (first, now, cropped, _) in (("DynamicCache", dynamic), ("StaticCache", static)):
    print(f"{name}: before {first}, then {now}; cropped to {cropped}", end=". " if name == "DynamicCache" else "; ")
print(f"before is the same object as the length now: {static[3]}")
assert (dynamic, static) == ((8, 8, 8, False), (8, 11, 11, True)), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/length.py"
