#!/usr/bin/env bash
# transformers' continuous batching takes num_beams=3 and decodes greedily, without a word.
#
# Versions:  transformers 5.24.0, torch 2.14.1, numpy 2.4.6; CPU, attention by sdpa.
# Guess:     generate_batch takes the GenerationConfig that generate takes, so it gives the same tokens, or says what it
#            does not do: of a repetition penalty it logs that it is dropped.
# Behaviour: num_beams is not looked at. The tokens are those of greedy decoding, nothing is raised, and no warning or
#            log line speaks of beams.
# Seen:      greedy: batch equals generate True; 3 beams: batch equals generate False, batch equals greedy True;
#            beams in warnings and logs: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
$pip transformers==5.24.0 accelerate==1.15.0 psutil==7.2.2
cat >"$folder/beams.py" <<'PYTHON'
import contextlib
import io
import logging
import warnings

said = io.StringIO()
logging.basicConfig(stream=said)
warnings.showwarning = lambda message, *_: said.write(str(message))
with contextlib.redirect_stderr(said):
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.3, **sizes)).eval()
    model.set_attn_implementation("sdpa")
    prompts = [torch.randint(1, 49, (length,)).tolist() for length in (5, 9)]

    def both(beams: int) -> tuple[list[list[int]], list[list[int]]]:
        """The new tokens by generate, a prompt at a time, and by generate_batch."""
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "eos_token_id": 49, "pad_token_id": 0}
        config = GenerationConfig(do_sample=False, num_beams=beams, **options)
        ids = [model.generate(torch.tensor([each]), generation_config=config)[0, len(each) :] for each in prompts]
        results = model.generate_batch(prompts, generation_config=config).values()
        return [each.tolist() for each in ids], [each.generated_tokens for each in results]

    greedy, beams = both(1), both(3)
seen = greedy[1] == greedy[0], beams[1] == beams[0], beams[1] == greedy[1], "beam" in said.getvalue().lower()
print(f"greedy: batch equals generate {seen[0]}; 3 beams: batch equals generate {seen[1]}, batch equals", end=" ")
print(f"greedy {seen[2]}; beams in warnings and logs: {seen[3]}")
assert seen == (True, False, True, False), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/beams.py"
