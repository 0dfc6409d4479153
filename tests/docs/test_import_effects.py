"""What importing sigswap changes outside of itself is what docs/design.md says, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SNAPSHOT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, torch._dynamo, torch._inductor.config
from torch.library import Library
{before}

def everything():
    "Each attribute of each module that is not sigswap's, and of each class in it, by identity."
    found = {{}}
    for name, module in list(sys.modules.items()):
        if module is None or name == "__main__" or name.split(".")[0] == "sigswap":
            continue
        for attribute, value in list(vars(module).items()):
            found[f"{{name}}.{{attribute}}"] = value
            if isinstance(value, type) and value.__module__ == name:
                for method, function in list(vars(value).items()):
                    found[f"{{name}}.{{attribute}}.{{method}}"] = function
    return found

before, modules, finders = everything(), set(sys.modules), list(sys.meta_path)
import sigswap
changed = sorted(name for name, value in everything().items() if name in before and value is not before[name])
print(json.dumps({{
    "changed": changed,
    "packages": sorted({{name.partition(".")[0] for name in set(sys.modules) - modules}}),
    "finders": [finder.target for finder in sys.meta_path if finder not in finders],
    "ops": sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sigswap::")),
}}))
"""

OPS = [
    f"sigswap::sigmoid_{name}{suffix}"
    for name in ("attention", "attention_varlen", "attention_blocks")
    for suffix in ("", "_sums", "_backward")
]


def snapshot(before: str) -> dict[str, list[str]]:
    """What a fresh process finds that has run ``before`` first."""
    program = SNAPSHOT.format(before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_import_alone() -> None:
    found = snapshot("import rich.console, rich.table, safetensors.torch, html")
    assert found["changed"] == []
    assert found["finders"] == [
        "transformers.modeling_utils",
        "peft.peft_model",
        "transformers.trainer",
        "accelerate.utils.dataclasses",
        "torch.utils.flop_counter",
    ]
    others = [
        "sigswap::sigmoid_attention_paged",
        "sigswap::sigmoid_probs",
        "sigswap::first_token_bias",
        "sigswap::mask_blocks",
    ]
    assert sorted(found["ops"]) == sorted([*OPS, *others])
    assert "transformers" not in found["packages"]


def test_import_after_transformers() -> None:
    pytest.importorskip("transformers")
    found = snapshot("import rich.console, rich.table, transformers.modeling_utils, transformers.quantizers.auto")
    model = "transformers.modeling_utils.PreTrainedModel"
    methods = ("_from_config", "from_pretrained", "push_to_hub", "save_pretrained")
    quantizer = "transformers.quantizers.auto.AutoHfQuantizer.merge_quantization_configs"
    assert found["changed"] == [*(f"{model}.{method}" for method in methods), quantizer]
    assert found["finders"] == ["peft.peft_model", "transformers.trainer", "torch.utils.flop_counter"]


def test_import_after_peft() -> None:
    pytest.importorskip("peft")
    found = snapshot("import rich.console, rich.table, transformers.modeling_utils, transformers.quantizers.auto, peft")
    config, model, tuner = (
        "peft.config.PeftConfigMixin",
        "peft.peft_model.PeftModel",
        "peft.tuners.tuners_utils.BaseTuner",
    )
    assert [name for name in found["changed"] if name.startswith("peft.")] == [
        f"{config}.from_peft_type",
        f"{config}.save_pretrained",
        f"{model}.__init__",
        f"{model}.add_adapter",
        f"{model}.save_pretrained",
        f"{tuner}.inject_adapter",
    ]
    assert found["finders"] == ["transformers.trainer", "torch.utils.flop_counter"]


HEAVY = ("matplotlib", "rich", "sympy", "timm", "torch._dynamo", "torch._inductor", "transformers", "triton")
"""What takes tenths of seconds to import, and is not needed before something is called."""


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import sigswap\n"
        f"print([name for name in {HEAVY} if name in sys.modules and name not in before])\n"
        "from torch.utils.flop_counter import flop_registry  # later: the formulas are entered then\n"
        "assert torch.ops.sigswap.sigmoid_attention in flop_registry"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr
