"""The Python file beside a saved transformers model, by which transformers loads it where sigswap is not installed.

transformers runs it if ``trust_remote_code=True`` says so: ``auto_map`` in config.json names, by auto class, the
classes in it. The file is :mod:`sigswap.saving.modeling_sigswap`, which uses nothing of sigswap's, with those classes
at its end. sigswap itself neither runs nor reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sigswap.conversion.head_axis import SDPA_HEADS
from sigswap.conversion.record import conversion_of
from sigswap.conversion.state import OwnerPlan
from sigswap.distributed.shards import original_name
from sigswap.errors import CheckpointError, Hint
from sigswap.optional import require
from sigswap.saving import marks

FILE = f"{marks.CODE}.py"
_LEAVE_OUT = Hint("Leave it out: whoever loads the model then needs sigswap.")


def is_in(directory: Path) -> bool:
    """Whether the model in ``directory`` was saved with that file."""
    return marks.is_own_code(marks.read_config(directory).get("auto_map"))


def check(model: Any) -> None:
    """Raises CheckpointError if the file cannot compute what a converted transformers ``model`` does."""
    name = original_name(model)
    if auto_class(model) is None:
        raise CheckpointError(f"{{argument}}: no auto class of transformers makes a {name}.", **_OF_ARGUMENT)
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError("{argument}: the model is quantized.", **_OF_ARGUMENT)
    for plan in conversion_of(model).owners:
        config = getattr(model.get_submodule(plan.path), "config", model.config)
        reason = _why_not(plan, getattr(config, "_attn_implementation", None))
        if reason is not None:
            raise CheckpointError(
                f"{{argument}}: {plan.path or 'the model'} {reason}; the file holds attention by one call of "
                "F.scaled_dot_product_attention.",
                **_OF_ARGUMENT,
            )


_OF_ARGUMENT: Any = {"argument": "remote_code", "hint": _LEAVE_OUT}


def _why_not(plan: OwnerPlan, implementation: str | None) -> str | None:
    if implementation != "sdpa":
        return f"has the attention implementation {implementation!r}"
    if len(plan.sites) != 1:
        return f"attends {len(plan.sites)} times"
    turns = [turns for by_place in [plan.places.get("sdpa", {})] for turns in by_place.values()]
    if not turns:
        return "attends by another function, or computes its scores itself"
    site = plan.sites[0]
    if any(each.sites != (0,) for each in turns) or (site.heads > 1 and site.sdpa_head_axis != SDPA_HEADS):
        return "has scores in a layout of its own"
    return None


def write(directory: Path, model: Any) -> None:
    """Puts the file into ``directory``, where ``model`` was saved, and its classes into the config.json there."""
    names = _classes(model)
    code = Path(__file__).with_name(FILE).read_text(encoding="utf-8")
    classes = "".join(
        f"\n\nclass {name}(SigmoidAttention, transformers.{name}):\n    pass\n"
        for name in dict.fromkeys(names.values())
    )
    (directory / FILE).write_text(f"{code}\n\nimport transformers\n{classes}", encoding="utf-8")
    path, config = directory / "config.json", marks.read_config(directory)
    config["auto_map"] = {auto: f"{marks.CODE}.{name}" for auto, name in names.items()}
    config["attn_implementation"] = marks.ATTENTION_OR_CODE
    config["transformers_weights"] = marks.NO_SUCH_WEIGHTS_OR_CODE
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def auto_class(model: Any) -> str | None:
    """The auto class that makes models of the class of ``model``; None if there is none."""
    name = original_name(model)
    return next((auto for auto, each in _classes(model).items() if each == name), None)


def _classes(model: Any) -> dict[str, str]:
    """By auto class, the class that it makes of the config of ``model``."""
    transformers = require("transformers", "hf")
    from transformers.models.auto import modeling_auto

    config, found = type(model.config), dict[str, str]()
    for auto in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        if not auto.startswith("AutoModel") or mapping is None or config not in mapping:
            continue
        made = mapping[config]
        choice = [*made] if isinstance(made, list | tuple) else [made]
        choice.sort(key=lambda each: each.__name__ != original_name(model))
        name = choice[0].__name__
        if issubclass(config, choice[0].config_class) and getattr(transformers, name, None) is choice[0]:
            found[auto] = name
    return found
