#!/usr/bin/env bash
# x-transformers generates other tokens with its cache than without, if tokens are shifted or forgotten.
#
# Versions:  x-transformers 2.31.10, torch 2.14.1, numpy 2.4.6; CPU, float32, greedy.
# Guess:     cache_kv=True, the default of generate, saves work and changes no token; a network that has no use of a
#            cache says so (can_cache_kv, which is False for selective attention), and generate goes without.
# Behaviour: with a cache a layer sees the last token alone. shift_tokens=1, which gives a layer half of the channels of
#            the token before, shifts zeros in; attn_data_dependent_alibi (the Forgetting Transformer) sums its gates
#            over the one token, which makes the bias 0 for all keys: nothing is forgotten. can_cache_kv is True for
#            both, and nothing is said. Training, and cache_kv=False, are right.
# Seen:      relative difference of the last token's logits by the cache, and tokens of 24 that differ in generate:
#            neither: 3.1e-07, 0; shift_tokens: 0.57, 19; forgetting: 0.64, 16; selective: no cache, 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
$pip x-transformers==2.31.10
cat >"$folder/cache.py" <<'PYTHON'
import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper


def network(options):
    torch.manual_seed(0)
    layers = Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **options)
    model = TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # in place of training
    return model


@torch.no_grad()
def by_the_cache(model):
    """The relative difference of the last token's logits, of a cache of all tokens before it and of none."""
    _, cache = model(prompt[:, :-1], return_intermediates=True)
    cached, full = model(prompt, cache=cache)[:, -1], model(prompt)[:, -1]
    return ((cached - full).abs().max() / full.abs().max()).item()


prompt = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
seen = {}
for name, options in {
    "neither": {},
    "shift_tokens": {"shift_tokens": 1},
    "forgetting": {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_kwargs": {"bias_init": 0.0}},
    "selective": {"attn_selective": True},
}.items():
    model = network(options)
    generator = AutoregressiveWrapper(model)
    usual, right = (generator.generate(prompt, 12, temperature=0.0, **each) for each in ({}, {"cache_kv": False}))
    seen[name] = by_the_cache(model) if model.can_cache_kv else None, int((usual != right).sum())
    apart, tokens = seen[name]
    print(f"{name}: {'no cache' if apart is None else f'{apart:.2g}'}, {tokens}")
assert seen["neither"][0] < 1e-5 and seen["neither"][1] == 0, "changed: look at it again"
assert seen["selective"] == (None, 0), "changed: look at it again"
for name in ("shift_tokens", "forgetting"):
    assert seen[name][0] > 0.05 and seen[name][1] > 0, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/cache.py"
