"""Tensor parallelism: a converted model on several ranks equals one process, in outputs and gradients."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

import sigswap
from sigswap.errors import ConversionError, NotConvertedError, UnknownCallError
from sigswap.kernels.op import dense

transformers = pytest.importorskip("transformers")

HEADS, HEAD_DIM, TOKENS = 4, 8, 7
CONFIGS = {
    "query_bias": {"learn_bias": True, "query_bias": True},
    "first_token": {"learn_bias": True, "query_bias": True, "first_token": True, "row_cap": 0.5},
    "qk_norm": {"learn_bias": True, "qk_norm": "rms"},
}
WAYS: list[tuple[str, tuple[Any, ...]]] = [
    ("query_bias", (HEADS,)),
    ("first_token", (2,)),
    ("qk_norm", (2,)),
    ("first_token", (HEADS, "eager")),
    ("qk_norm", (HEADS, "eager")),
]
"""What a model is converted with, its key heads, and its implementation of attention."""


def llama(key_heads: int = HEADS, attention: str = "sdpa", heads: int = HEADS) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=heads * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def converted(kind: str, *shape: Any) -> Any:
    """With parameters that tell the heads apart."""
    model = sigswap.convert(llama(*shape), sigswap.SigmoidConfig(**CONFIGS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(1, 32, (2, tokens), generator=torch.Generator().manual_seed(1))


def parallelized(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    styles = {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh, styles)
    return model


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(ids()).logits
    logits.square().mean().backward()
    return logits.detach(), {name: whole(each.grad) for name, each in model.named_parameters() if each.grad is not None}


def assert_equal(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=2e-5, rtol=2e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            ours[1][name], gradient, atol=2e-5, rtol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_hand_written() -> list[str]:
    done, size = [], torch.distributed.get_world_size()
    for kind, shape in WAYS:
        model = converted(kind, *shape)
        expected = results(copy.deepcopy(model))
        sharded = sigswap.shard_heads(parallelized(model))
        assert sharded is model
        names = [name for name, each in model.named_parameters() if ".sigswap." in name]
        shards = {model.get_parameter(name).to_local().shape[0] for name in names}
        assert shards <= {HEADS // size, shape[0] // size}
        assert_equal(results(model), expected)
        assert_equal(results(sigswap.shard_heads(model)), expected)  # what is sharded stays
        done.append(f"{kind} {shape}")
    return done


def check_refusals() -> None:
    model = converted("query_bias")
    before = results(copy.deepcopy(model))
    assert_equal(results(sigswap.shard_heads(model)), before)  # not parallel: nothing to do
    with pytest.raises(UnknownCallError, match="shard_heads"):
        parallelized(model)(ids())
    model = converted("qk_norm", 1)
    for layer in model.model.layers:  # one key head stays whole
        assert layer.self_attn.sigswap
    names = {name: type(each) for name, each in model.named_parameters()}
    with pytest.raises(ConversionError, match="1 heads cannot be divided evenly among 2 ranks"):
        sigswap.shard_heads(parallelized(model))
    assert all(type(each) is names[name] for name, each in model.named_parameters() if ".sigswap." in name)
    with pytest.raises(NotConvertedError):
        sigswap.shard_heads(nn.Linear(2, 2))


def check() -> list[str]:
    check_refusals()
    return check_hand_written()


def test_a_hand_written_plan_and_what_cannot_be_sharded() -> None:
    assert len(on_ranks(2, check)[0]) == len(WAYS)


def check_plan_of_transformers(directory: str, kind: str) -> None:
    size = torch.distributed.get_world_size()

    def loaded(**fields: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, distributed_config=transformers.DistributedConfig(**fields)
        )

    model = loaded(tp_plan="auto", tp_size=size)
    assert all(hasattr(each, "to_local") for name, each in model.named_parameters() if ".sigswap." in name)
    expected = sigswap.load(directory)
    assert_equal(results(model), results(expected))
    with torch.no_grad():  # another path of transformers'
        torch.testing.assert_close(model(ids()).logits, expected(ids()).logits, atol=2e-5, rtol=2e-5)
        ours, theirs = (each.generate(ids(), max_new_tokens=4, do_sample=False) for each in (model, expected))
    assert torch.equal(ours, theirs)
    models = [model]
    if "fsdp_size" in {field.name for field in dataclasses.fields(transformers.DistributedConfig)}:
        models.append(loaded(fsdp_size=size))  # in which each rank reads its parts alone
        assert all(hasattr(each, "to_local") for each in models[1].parameters())
    with pytest.raises(ConversionError, match="3 heads cannot be divided evenly among 2 ranks"):
        uneven = transformers.DistributedConfig(tp_plan="auto", tp_size=size)
        transformers.AutoModelForCausalLM.from_pretrained(f"{directory} of 3 heads", distributed_config=uneven)
    for index, each in enumerate(models):
        sigswap.save(each, f"{directory} {index}")
        again = sigswap.load(f"{directory} {index}")
        for name, value in expected.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.skipif(not hasattr(transformers, "DistributedConfig"), reason="an older transformers shards otherwise")
@pytest.mark.parametrize("kind", ["first_token"])
def test_a_plan_of_transformers(tmp_path: Path, kind: str) -> None:
    sigswap.save(converted(kind), tmp_path / "model")
    sigswap.save(sigswap.convert(llama(3, heads=3)), tmp_path / "model of 3 heads")
    on_ranks(2, check_plan_of_transformers, str(tmp_path / "model"), kind)


def check_dropout() -> list[Any]:
    """Ranks that are seeded alike drop other probabilities of their heads."""
    model = sigswap.convert(llama(), sigswap.SigmoidConfig(learn_bias=True))
    model = sigswap.shard_heads(parallelized(model)).train()
    drawn: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "is_plain", lambda *tensors: drawn.append(tensors[5]) or False)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(5)
        model(ids())
    assert len(drawn) == 2
    return [int(each) for each in drawn]


def test_ranks_drop_other_probabilities() -> None:
    first, second = on_ranks(2, check_dropout)
    assert len({*first, *second}) == 4
    assert (second[0] - first[0]) == (second[1] - first[1])  # the number of the rank, not another random state
