#!/usr/bin/env bash
# transformers' DeepSeek-V3 multiplies its whole cache by kv_b_proj again for each token that it generates.
#
# Versions:  transformers 5.24.0, torch 2.14.1, numpy 2.4.6; CPU.
# Guess:     with a KV cache a new token passes each linear layer once, and only attention itself grows with the length;
#            latent attention caches either keys and values, or the latents and multiplies queries instead (absorbed).
# Behaviour: it caches the latents, and expands all of them to keys and values of every head in each forward. A step's
#            work on the projection grows with the length, and is nearly all of the step, where attention's is 2%.
#            The cache's "values" are the rotary part of the keys.
# Seen:      a step after 1 / 1000 / 2000 tokens: kv_b_proj 131072 / 65601536 / 131137536 FLOPs (tokens so far times
#            65536: True), attention's products 2560 / 1281280 / 2561280; cached: keys [1, 1, 2001, 64], values
#            [1, 1, 2001, 16], v_head_dim 32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6 transformers==5.24.0
cat >"$folder/step.py" <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1}
heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 32, "kv_lora_rank": 64}
heads |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
config = DeepseekV3Config(vocab_size=100, **sizes, **heads, **experts)
model = DeepseekV3ForCausalLM(config).eval()
tokens = torch.randint(0, 100, (1, 2000))
projection, products = [], []
for length in (1, 1000, 2000):
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(tokens[:, :length], past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, :1], past_key_values=cache)
    counts = counter.get_flop_counts()
    [attention] = [path for path in counts if path.endswith("self_attn")]
    projection.append(sum(counts[f"{attention}.kv_b_proj"].values()))
    products.append(sum(each for op, each in counts[attention].items() if op is not torch.ops.aten.mm))
each = 2 * model.model.layers[0].self_attn.kv_b_proj.weight.numel()
grows = projection == [each * (length + 1) for length in (1, 1000, 2000)]
keys, values = (list(tensor.shape) for tensor in (cache.layers[0].keys, cache.layers[0].values))
print(f"a step after 1 / 1000 / 2000 tokens: kv_b_proj {' / '.join(map(str, projection))} FLOPs (tokens so", end=" ")
print(f"far times {each}: {grows}), attention's products {' / '.join(map(str, products))}; cached: keys", end=" ")
print(f"{keys}, values {values}, v_head_dim {config.v_head_dim}")
assert grows and products[2] < 0.03 * projection[2], "changed: look at it again"
assert (keys, values) == ([1, 1, 2001, 64], [1, 1, 2001, 16]), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/step.py"
