#!/usr/bin/env bash
# transformers' MiniMax, in a batch: what a padded prompt generates is wrong from the second token on, without a word.
#
# Versions:  transformers 5.24.0, torch 2.14.1, numpy 2.4.6; CPU, float32, greedy, eager and sdpa.
# Guess:     a prompt that is padded on the left gives the tokens that it gives alone, as with other decoders there; the
#            cache changes no token.
# Behaviour: where the first layer is lightning attention, as by the paper, in which each eighth has softmax, the
#            cache's first layer stays empty, and get_seq_length() and the mask's sizes are read from that. So it says
#            0, and the mask of a step is one column: the batch's first, which is padding for the shorter prompts, and
#            hides every key of theirs. A batch without padding needs no mask, and is right; so is use_cache=False, and
#            a model whose first layer has softmax. Without position_ids every step is at position 0, and several tokens
#            at once raise.
# Seen:      (eager and sdpa, each) softmax first: cache says 7 of 7 tokens, padded row as alone: True, uncached True;
#            step without position_ids as in a full pass: True
#            lightning first: cache says 0 of 7 tokens, padded row as alone: False (first token True), uncached True;
#            step without position_ids as in a full pass: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q torch==2.14.1 numpy==2.4.6 transformers==5.24.0
cat >"$folder/padded.py" <<'PYTHON'
import logging
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

softmax, lightning = "full_attention", "linear_attention"
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
experts = {"num_local_experts": 2, "num_experts_per_tok": 1}


def model_with(layers, implementation):
    torch.manual_seed(0)
    config = MiniMaxConfig(vocab_size=64, num_hidden_layers=2, layer_types=layers, block_size=4, **sizes, **experts)
    config._attn_implementation = implementation
    model = MiniMaxForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def generated(model, tokens, mask, use_cache):
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=mask, use_cache=use_cache, **options)[:, -8:].tolist()


def outcomes(layers, implementation):
    model = model_with(layers, implementation)
    long, short = torch.randint(3, 64, (1, 12)), torch.randint(3, 64, (1, 7))
    batch = torch.cat([long, torch.nn.functional.pad(short, (5, 0))])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    alone = generated(model, short, torch.ones_like(short), True)[0]
    rows = {use_cache: generated(model, batch, mask, use_cache)[1] for use_cache in (True, False)}
    with torch.no_grad():
        first = model(short, use_cache=True)
        length = int(first.cache.get_seq_length())
        step = model(short[:, :1], cache=first.cache).logits[0, -1]
        full = model(torch.cat([short, short[:, :1]], 1), use_cache=False).logits[0, -1]
    return {
        "length": length,
        "cached": rows[True] == alone,
        "first": rows[True][0] == alone[0],
        "uncached": rows[False] == alone,
        "step": torch.allclose(step, full, atol=1e-4),
    }


for implementation in "eager", "sdpa":
    seen = {}
    for name, layers in (("softmax first", [softmax, lightning]), ("lightning first", [lightning, softmax])):
        seen[name] = each = outcomes(layers, implementation)
        token = "" if each["cached"] else f" (first token {each['first']})"
        print(
            f"{implementation}, {name}: cache says {each['length']} of 7 tokens, padded row as alone: {each['cached']}"
            f"{token}, uncached {each['uncached']}; step without position_ids as in a full pass: {each['step']}"
        )
    right = {"length": 7, "cached": True, "first": True, "uncached": True, "step": True}
    wrong = {"length": 0, "cached": False, "first": True, "uncached": True, "step": False}
    assert seen == {"softmax first": right, "lightning first": wrong}, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/padded.py"
