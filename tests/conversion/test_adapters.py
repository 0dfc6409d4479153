"""Every tuner of peft that wraps linear layers, on a model before and after it is converted: in one table.

The oracle is a model that was never converted, with the same adapter, in float64, whose attention is written here.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sigswap
from sigswap import SigmoidConfig
from sigswap.errors import ExampleInputsError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

DIM, HEADS = 32, 4
TARGETS = ["q_proj", "k_proj", "v_proj"]
IDS = torch.randint(1, 97, (2, 7), generator=torch.Generator().manual_seed(2))

TUNERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "LORA with DoRA": {"r": 2, "use_dora": True},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 10},
    "FROD": {},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 2},
    "HRA": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 2},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PEANUT": {"r": 2},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 8},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
}
UNMERGEABLE = ("BEFT", "LILY")  # by peft itself, or on layers without a bias
OTHERS = {
    "no linear layers": ("LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW"),
    "prompts": ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"),
    "need more than a config, and have tests of their own": ("POLY", "XLORA"),
}


def oracle(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float = 1.0, **others: Any
) -> tuple[Tensor, None]:
    """Causal sigmoid attention by the definition (docs/design.md), in float64: [B, H, N, D] to [B, N, H, D]."""
    q, k, v = query.double(), key.double(), value.double()
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    c, w = (tensor.double() for tensor in module.oracle)
    row = c.view(-1, 1, 1) + (q * w[:, None]).sum(-1, keepdim=True) - visible.sum(-1, keepdim=True).log()
    p = torch.sigmoid(q @ k.mT * scaling + row) * visible
    return (p @ v).transpose(1, 2).to(query.dtype), None


transformers.AttentionInterface.register("sigswap_oracle", oracle)
transformers.AttentionMaskInterface.register("sigswap_oracle", lambda *args, **kwargs: None)


def llama(attention: str = "eager") -> Any:
    """It computes its own scores, so that query_bias acts on a product."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=DIM,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def biases() -> tuple[Tensor, Tensor]:
    """c_h and w_h of the attention."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(HEADS, generator=generator), torch.randn(HEADS, DIM // HEADS, generator=generator)


def converted(model: Any) -> Any:
    """``model`` converted, with those biases."""
    sigswap.convert(model, SigmoidConfig(query_bias=True), example_inputs={"input_ids": IDS})
    site = model.model.layers[0].self_attn.sigswap.get_submodule("0")
    with torch.no_grad():
        for parameter, values in zip((site.bias, site.query_weight), biases(), strict=True):
            parameter.copy_(values)
    return model


@functools.cache
def _converted_llama() -> Any:
    return converted(llama())


def converted_llama() -> Any:
    return copy.deepcopy(_converted_llama())


def oracle_llama() -> Any:
    """The same weights, and attention as the definition has it."""
    model = llama("sigswap_oracle")
    model.model.layers[0].self_attn.oracle = biases()
    return model


def adapted(model: Any, tuner: str, **changes: Any) -> Any:
    """``model`` with an adapter whose parameters are away from where they start, the same ones each time."""
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[tuner.split(" ")[0]]]
    torch.manual_seed(2)
    result = peft.get_peft_model(model, config(target_modules=TARGETS, **TUNERS.get(tuner, {}), **changes)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if parameter.requires_grad and ".sigswap." not in name and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return result


def logits(model: Any, **others: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS, **others).logits
    return result


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_every_tuner_is_in_the_table() -> None:
    named = {name.split(" ")[0] for name in TUNERS}.union(*OTHERS.values())
    assert named == {kind.name for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}


OFTEN = ("LORA", "ADALORA", "LOKR", "OFT", "VERA", "SHIRA")
each_tuner = pytest.mark.parametrize(
    "tuner", [tuner if tuner in OFTEN else pytest.param(tuner, marks=pytest.mark.slow) for tuner in TUNERS]
)


@pytest.mark.slow
@each_tuner
def test_a_tuner(tuner: str, tmp_path: Path) -> None:
    """Put on after the conversion and before it, saved and loaded, merged, and taken off."""
    expected = logits(adapted(oracle_llama(), tuner))
    plain = logits(converted_llama())
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max(), "the adapter does nothing"

    later = adapted(converted_llama(), tuner)
    close(logits(later), expected)
    before = adapted(llama(), tuner)
    converted(before.get_base_model())
    close(logits(before), expected)

    later.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(converted_llama(), tmp_path).eval()), expected)
    with later.disable_adapter():
        close(logits(later), plain)
    if tuner not in UNMERGEABLE:
        close(logits(copy.deepcopy(later).merge_and_unload()), expected, 1e-3)
    close(logits(later.unload()), plain)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_tuner_compiled(tuner: str) -> None:
    model = adapted(converted_llama(), tuner)
    close(logits(torch.compile(model, backend="aot_eager")), logits(model))


@pytest.mark.parametrize("tuner", ["LORA", "ADALORA"])
def test_a_tuner_in_training(tuner: str) -> None:
    """The gradients of the adapter are those that the oracle has."""
    ours, theirs = adapted(converted_llama(), tuner), adapted(oracle_llama(), tuner)
    for model in (ours, theirs):
        model(input_ids=IDS).logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert gradients
    for name, gradient in gradients.items():
        close(ours.get_parameter(name).grad, gradient, 1e-3)


def test_generation_beside_an_adapter() -> None:
    """With a cache, as without one."""
    model = adapted(converted_llama(), "ADALORA")
    longer = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        for step in range(IDS.shape[1], longer.shape[1]):
            predicted = model(input_ids=longer[:, :step], use_cache=False).logits[:, -1].argmax(-1)
            assert torch.equal(predicted, longer[:, step])


TASKS = torch.tensor([0, 2])  # of each row of IDS


def with_tasks(model: Any) -> Any:
    """``model`` with POLY, which mixes its adapters by the task of each row, if peft knows the type of the model."""
    return adapted(model, "POLY", r=2, n_tasks=3, n_skills=2, task_type="CAUSAL_LM")


def test_poly(tmp_path: Path) -> None:
    """peft POLY: put on after `convert`, `task_ids`, saved, loaded, `generate`, taken off"""
    expected, plain = logits(with_tasks(oracle_llama()), task_ids=TASKS), logits(converted_llama())
    assert (logits(with_tasks(oracle_llama()), task_ids=TASKS.flip(0)) - expected).abs().max() > 1e-4
    model = with_tasks(converted_llama())
    close(logits(model, task_ids=TASKS), expected)
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(converted_llama(), tmp_path).eval(), task_ids=TASKS), expected)
    longer = model.generate(input_ids=IDS, task_ids=TASKS, max_new_tokens=4, do_sample=False)
    theirs = with_tasks(oracle_llama()).generate(
        input_ids=IDS, task_ids=TASKS, max_new_tokens=4, do_sample=False, use_cache=False
    )
    assert torch.equal(longer, theirs)
    close(logits(model.unload()), plain)


def test_poly_before_the_conversion() -> None:
    """peft POLY: put on before `convert`: error, its layers need `task_ids`, which the model inside gets none of"""
    model = with_tasks(llama())
    with pytest.raises(ExampleInputsError, match="task_ids should not be None"):
        sigswap.convert(model, SigmoidConfig(query_bias=True), example_inputs={"input_ids": IDS, "task_ids": TASKS})
    assert not sigswap.is_converted(model)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """LoRA adapters of the softmax model, saved, for X-LoRA to mix."""
    root = tmp_path_factory.mktemp("experts")
    for name in ("0", "1"):
        model, config = llama(), peft.LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", lora_alpha=4)
        config.init_lora_weights = False  # the adapters do something
        torch.manual_seed(int(name) + 5)
        peft.get_peft_model(model, config).save_pretrained(root / name)
    return {name: str(root / name) for name in ("0", "1")}


def mixed(model: Any, experts: dict[str, str]) -> Any:
    """``model`` with X-LoRA, whose classifier mixes ``experts`` by what a first pass of the model itself gives."""
    model.config.use_cache = False
    torch.manual_seed(2)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=DIM, xlora_depth=1, adapters=experts)
    result = peft.get_peft_model(model, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in result.base_model.internal_xlora_classifier.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return result


def test_xlora(experts: dict[str, str], tmp_path: Path) -> None:
    """peft XLORA: put on before and after `convert`, saved, loaded, `generate`, gradients"""
    theirs = mixed(oracle_llama(), experts)
    expected = logits(theirs)
    assert (logits(converted_llama()) - expected).abs().max() > 0.1 * expected.abs().max()
    later, before = mixed(converted_llama(), experts), mixed(llama(), experts)
    converted(before.get_base_model())
    for model in (later, before):
        close(logits(model), expected)
        close(logits(model), expected)  # the first pass leaves the model as it was
    tokens = [each.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for each in (later, theirs)]
    assert torch.equal(*tokens)
    for model in (later, theirs):
        model(input_ids=IDS).logits.square().mean().backward()
    gradients = [list(each.base_model.internal_xlora_classifier.parameters()) for each in (later, theirs)]
    for ours, other in zip(*gradients, strict=True):
        close(ours.grad, other.grad, 1e-3)

    later.save_pretrained(tmp_path)
    base = converted_llama()
    base.config.use_cache = False
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    # peft 0.21 does not save the classifier: findings/peft_xlora_classifier.sh
    known = later.base_model.internal_xlora_classifier.state_dict()
    loaded.base_model.internal_xlora_classifier.load_state_dict(known)
    close(logits(loaded), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["POLY", "XLORA"])
def test_a_mixture_compiled(tuner: str, experts: dict[str, str]) -> None:
    model = with_tasks(converted_llama()) if tuner == "POLY" else mixed(converted_llama(), experts)
    others = {"task_ids": TASKS} if tuner == "POLY" else {}
    close(logits(torch.compile(model, backend="aot_eager"), **others), logits(model, **others))
