"""A model that is spread over ranks already is converted: as if it had been converted before, and in one process."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import spread
import torch
from ranks import on_ranks
from spread import (
    alone,
    assert_near,
    batches,
    by_heads,
    by_two_axes,
    distilled,
    fully,
    in_copies,
    own,
    values,
)
from torch import nn

import sigswap
from sigswap.distributed.shards import groups_of, put
from sigswap.errors import ConversionError, SigswapError

transformers = pytest.importorskip("transformers")

CONFIG = sigswap.SigmoidConfig(
    learn_bias=True, query_bias=True, first_token=True, row_cap=0.5, qk_norm="rms", layer_scale=0.5
)


def llama(**sizes: Any) -> Any:
    return spread.llama(**{"num_hidden_layers": 1, **sizes})


@functools.cache
def converted(**sizes: Any) -> Any:
    return with_values(sigswap.convert(llama(**sizes), CONFIG))


def run_before(model: Any) -> Any:
    """Whose parameters fully_shard has brought together, and reduced, once."""
    model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.mean().backward()
    model.zero_grad()
    return model


def with_values(model: Any) -> Any:
    """Of sigswap's parameters, which tell the heads apart."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".sigswap." in name:
            put(parameter, 1.0 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def trained(model: nn.Module, given: list[Any]) -> None:
    """The loss counts each sequence alike, and the rule has no state."""
    for batch in given:
        model(input_ids=batch["input_ids"]).logits.square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None


def check_equal(model: Any, expected: Any, shared_by: int, what: str) -> None:
    given = batches(2, padded=False)
    mine = own(given, shared_by) if shared_by else given
    with torch.no_grad():
        whole, found = (each(input_ids=given[0]["input_ids"]).logits for each in (expected, model))
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4, msg=lambda text: f"{what}: {text}")
    before = values(expected)
    trained(expected, given)
    trained(model, mine)
    ours, theirs = values(model), values(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{what}: {n}: {text}"
        )
        assert ".sigswap." not in name or not torch.equal(value, before[name])


WAYS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "by heads": (by_heads, 0, {}),
    "by heads, fewer key heads": (by_heads, 0, {"num_key_value_heads": 2}),
    "fully, after a run": (lambda model: run_before(fully(model)), 1, {}),
}
OF_FOUR: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "by two axes": (by_two_axes, 2, {}),
    "in copies": (in_copies, 1, {}),
}


def check_ways(ways: dict[str, tuple[Any, int, dict[str, Any]]]) -> None:
    for what, (way, shared_by, sizes) in ways.items():
        model = sigswap.convert(way(llama(**sizes)), CONFIG)
        assert hasattr(model.get_parameter("model.layers.0.self_attn.sigswap.0.bias"), "to_local"), what
        assert torch.equal(values(model)["model.layers.0.self_attn.sigswap.0.bias"], torch.zeros(4)), what
        check_equal(with_values(model), copy.deepcopy(converted(**sizes)), shared_by, what)


def check_on_meta() -> None:
    expected = copy.deepcopy(converted())
    with torch.device("meta"):
        model = fully(llama())
    model = sigswap.convert(model, CONFIG).to_empty(device="cpu")
    for name, buffer in expected.named_buffers():
        model.get_buffer(name).copy_(buffer)
    for name, parameter in model.named_parameters():
        put(parameter, expected.get_parameter(name))
    check_equal(model, expected, 1, "on meta")


def check_plan_of_transformers(folder: str) -> None:
    size = torch.distributed.get_world_size()
    how = transformers.DistributedConfig(tp_plan="auto", tp_size=size)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=how)
    model = with_values(sigswap.convert(model, CONFIG))
    assert model.model.layers[0].self_attn.sigswap.get_parameter("0.bias").to_local().shape[0] == 4 // size
    expected = copy.deepcopy(converted())
    check_equal(model, expected, 0, "a plan of transformers")
    given, group = batches(4), alone()
    sigswap.calibrate(model, given, progress=False)
    sigswap.calibrate(expected, given, progress=False, group=group)
    assert_near(values(model), values(expected), "calibrated", atol=2e-4)
    for name, value in values(expected).items():  # so that rounding does not add up
        put(model.get_parameter(name), value)
    distilled(model, None, given, train="sigmoid")
    distilled(expected, None, given, train="sigmoid", group=group)
    assert_near(values(model), values(expected), "distilled")
    sigswap.save(model, f"{folder} converted")
    again = sigswap.load(f"{folder} converted")
    for name, value in values(model).items():
        assert torch.equal(again.get_parameter(name), value), name
    for fields in ({"fsdp_size": size}, {"tp_plan": "auto", "tp_size": size}):
        how = transformers.DistributedConfig(**fields)
        other = transformers.AutoModelForCausalLM.from_pretrained(f"{folder} converted", distributed_config=how)
        for name, value in values(other).items():
            assert torch.equal(again.get_parameter(name), value), name


def check_refusals() -> None:
    rank = torch.distributed.get_rank()
    shapes = [tuple(parameter.shape) for parameter in llama().parameters()]

    def refused(model: Any, message: str, kind: Any = ConversionError, **fields: Any) -> None:
        groups = [group.fsdp_params[:] for module in model.modules() for group in groups_of(module)]
        kept = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(kind, match=message):
            sigswap.convert(model, sigswap.SigmoidConfig(**{"learn_bias": True, **fields}))
        assert {name: type(module) for name, module in model.named_modules()} == kept
        assert [group.fsdp_params for module in model.modules() for group in groups_of(module)] == groups
        assert [tuple(parameter.shape) for parameter in model.parameters()] == shapes

    for way in (fully, by_heads):
        refused(way(llama()), "another config than", layer_scale=0.5 + rank)
        refused(
            way(llama()),
            "rank 1 \\(" if rank == 0 else "match no",
            SigswapError,
            overrides={"nowhere": {}} if rank else {},
        )
    with pytest.raises(ConversionError, match="3 heads cannot be divided evenly among 2 ranks"):
        sigswap.convert(by_heads(llama(hidden_size=24, num_attention_heads=3, num_key_value_heads=3)), CONFIG)


def check(folder: str) -> None:
    check_refusals()
    check_ways(WAYS)
    check_on_meta()
    if hasattr(transformers, "DistributedConfig"):
        check_plan_of_transformers(folder)


def test_converted_when_it_is_spread(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    on_ranks(2, check, str(tmp_path / "model"))


@pytest.mark.slow
def test_converted_when_it_is_spread_over_four_ranks() -> None:
    on_ranks(4, check_ways, OF_FOUR)
