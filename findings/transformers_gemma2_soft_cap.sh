#!/usr/bin/env bash
# In one release of transformers Gemma 2 runs without its attention's soft cap, unless it is told to be eager.
#
# Versions:  transformers 5.17.0 and 5.24.0, torch 2.13.0, numpy 2.4.6; CPU, float32.
# Guess:     a model computes what its config says with every attention implementation that it takes, or refuses it.
# Behaviour: in 5.17.0 the default is sdpa, for which scaled_dot_product_attention has no soft cap: scores are not capped,
#            without a word. In 5.24.0 the default is eager, and sdpa raises ValueError.
# Seen:      5.17.0: default sdpa; largest difference of its logits to eager with the config's cap 2.0, to eager without
#            one 1.7e-06. 5.24.0: default eager; sdpa raises ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.13.0 numpy==2.4.6
cat >"$folder/cap.py" <<'PYTHON'
import logging

import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

logging.disable(logging.WARNING)
sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": None,
}


@torch.no_grad()
def logits(implementation, cap):
    torch.manual_seed(0)
    config = Gemma2Config(**sizes, attn_logit_softcapping=cap, attn_implementation=implementation)
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8)  # so that scores are above the cap
    return model(torch.arange(1, 25)[None], use_cache=False).logits


default = Gemma2ForCausalLM(Gemma2Config(**sizes)).config._attn_implementation
if transformers.__version__ == "5.17.0":
    sdpa = logits("sdpa", 0.5)
    capped, uncapped = (float((sdpa - logits("eager", cap)).abs().max()) for cap in (0.5, None))
    print(
        f"5.17.0: default {default}; largest difference of its logits to eager with the config's cap {capped:.2g}, "
        f"to eager without one {uncapped:.2g}"
    )
    assert default == "sdpa" and capped > 0.1 and uncapped < 1e-4, "changed: look at it again"
else:
    try:
        logits("sdpa", 0.5)
        raised = "nothing"
    except ValueError:
        raised = "ValueError"
    print(f"5.24.0: default {default}; sdpa raises {raised}")
    assert (default, raised) == ("eager", "ValueError"), "changed: look at it again"
PYTHON
for version in 5.17.0 5.24.0; do
    $pip "transformers==$version"
    "$folder/venv/bin/python" "$folder/cap.py"
done
