#!/usr/bin/env bash
# The RoPE scaling that a GGUF file states is read for one architecture only; the others are long-context models without it.
#
# Versions:  transformers 5.24.0, gguf 0.19.0, torch 2.14.1; CPU. The files hold the metadata that converters write for
#            Qwen2.5 with YaRN as its model card describes (factor 4 over 32,768 positions), for Gemma 3 from 4B up
#            (linear, factor 8 on full attention), and for a Llama with linear scaling; no tensors, for the config does
#            not depend on them.
# Guess:     <arch>.rope.scaling.type and .factor reach config.rope_parameters as <arch>.rope.freq_base does; what
#            can't be read is an error or a warning.
# Behaviour: rope.freq_base and context_length are read, rope.scaling.* is dropped without a word (gpt-oss alone has code
#            for it). The model says that it has 131,072 positions, and turns them at the speed of the unscaled model.
# Seen:      qwen2: rope_type default, 131072 positions; gemma3: rope_type default, 131072 positions;
#            llama: rope_type default, 131072 positions; warnings: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.14.1 numpy==2.4.6
$pip transformers==5.24.0 gguf==0.19.0
cat >"$folder/read.py" <<'PYTHON'
import logging
import sys
import warnings

import gguf
from transformers import AutoConfig

folder = sys.argv[1]
scalings = {
    "qwen2": (gguf.RopeScalingType.YARN, 4.0, 32768),
    "gemma3": (gguf.RopeScalingType.LINEAR, 8.0, None),
    "llama": (gguf.RopeScalingType.LINEAR, 8.0, None),
}
heard = []
listener = logging.Handler(logging.WARNING)
listener.emit = lambda record: heard.append(record.getMessage())
logging.getLogger("transformers").addHandler(listener)


def config_of(architecture):
    writer = gguf.GGUFWriter(f"{folder}/{architecture}.gguf", architecture)
    writer.add_context_length(131072)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(151936)
    writer.add_rope_freq_base(1e6)
    kind, factor, original = scalings[architecture]
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(factor)
    if original is not None:
        writer.add_rope_scaling_orig_ctx_len(original)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return AutoConfig.from_pretrained(folder, gguf_file=f"{architecture}.gguf")


seen = []
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for architecture in scalings:
        config = config_of(architecture)
        parameters = config.rope_parameters
        rope = parameters.get("full_attention", parameters)
        assert rope["rope_theta"] == 1e6, "changed: look at it again"
        seen.append((architecture, rope["rope_type"], config.max_position_embeddings))
about_rope = [each for each in heard + [str(each.message) for each in warned] if "rope" in each.lower()]
print("; ".join("{}: rope_type {}, {} positions".format(*each) for each in seen) + f"; warnings: {len(about_rope)}")
assert [each[1:] for each in seen] == [("default", 131072)] * 3, "changed: look at it again"
assert not about_rope, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/read.py" "$folder"
