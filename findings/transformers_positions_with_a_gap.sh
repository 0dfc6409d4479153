#!/usr/bin/env bash
# Position ids with a gap cut a sequence in two in transformers, but only without a cache and without a mask.
#
# Versions:  transformers 5.24.0, torch 2.14.1; a Llama from a config, CPU, float32, eager and sdpa.
# Guess:     position_ids say where tokens are, for the rotary embedding; which tokens see which is the mask's matter. And
#            use_cache changes what is returned beside the logits, not the logits.
# Behaviour: without a mask and without a cache, positions that do not go up by one are taken for packed documents: no
#            token after the gap sees one before it. use_cache=True, or an attention_mask of ones, and all see all that
#            came before. So the same tokens and positions give other logits with use_cache=False, as training has it;
#            positions with a gap are what a rank of context parallelism has, or a prompt of which tokens were left out.
# Seen:      eager: tokens after the gap that see the first one: bare 0 of 4, mask of ones 4 of 4, cache 4 of 4
#            sdpa: tokens after the gap that see the first one: bare 0 of 4, mask of ones 4 of 4, cache 4 of 4
#            (positions 0 to 3 and 12 to 15; sees: its logits change when the first token does)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 transformers==5.24.0 numpy==2.4.6
cat >"$folder/gap.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(64, (1, 8))
other = ids.clone()
other[0, 0] = (other[0, 0] + 1) % 64
positions = torch.tensor([[0, 1, 2, 3, 12, 13, 14, 15]])


@torch.no_grad()
def seeing(**options):
    first, second = (model(x, position_ids=positions, **options).logits for x in (ids, other))
    return int(((first - second).abs().amax(-1) > 1e-6)[0, 4:].sum())


for implementation in ("eager", "sdpa"):
    model.set_attn_implementation(implementation)
    counts = (
        seeing(use_cache=False),
        seeing(use_cache=False, attention_mask=torch.ones_like(ids)),
        seeing(use_cache=True),
    )
    what = "tokens after the gap that see the first one"
    print("{}: {}: bare {} of 4, mask of ones {} of 4, cache {} of 4".format(implementation, what, *counts))
    assert counts == (0, 4, 4), "changed: look at it again"
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/gap.py"
