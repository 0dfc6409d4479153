"""A model with the first key's score in its bias: packed sequences, windows, export, copies, what is saved."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from first_token import first_token_oracle
from graphs import Graphs
from torch import Tensor, nn

import sigswap
from sigswap.conversion.state import OwnerState
from sigswap.errors import ConfigError

HEADS, HEAD_DIM = 2, 4
DIM = HEADS * HEAD_DIM
KINDS = pytest.mark.parametrize("kind", ["sdpa", "explicit", "mha"])


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.kind = kind

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """``visible`` [M, N]."""
        if self.kind == "mha":
            return self.mha(x, x, x, attn_mask=~visible, need_weights=False)[0]
        q, k, v = heads(self, x)
        if self.kind == "explicit":
            attended = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~visible, -math.inf).softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.mha.out_proj(attended.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention = Attention(kind)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        return self.attention(x, visible)


def heads(attention: Attention, x: Tensor) -> list[Tensor]:
    qkv = F.linear(x, attention.mha.in_proj_weight, attention.mha.in_proj_bias)
    return [t.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for t in qkv.chunk(3, -1)]


def owner(model: nn.Module) -> OwnerState:
    return next(module for module in model.modules() if isinstance(module, OwnerState))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def converted(kind: str, **config: object) -> Model:
    torch.manual_seed(0)
    model = Model(kind).double()
    example = (torch.randn(2, 6, DIM, dtype=torch.float64), causal(6))
    settings: dict[str, object] = {"first_token": True, "query_bias": kind != "mha"} | config
    sigswap.convert(model, sigswap.SigmoidConfig(**settings), example_inputs=example)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def expected(model: Model, x: Tensor, visible: Tensor) -> Tensor:
    q, k, v = heads(model.attention, x)
    found = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if ".sigswap." in name}
    rest = found["bias"][:, None]
    if "query_weight" in found:
        rest = rest + torch.einsum("bhmd,hd->bhm", q, found["query_weight"])
    p = first_token_oracle(q @ k.mT * HEAD_DIM**-0.5, visible, found["length_share"], rest, found["offset"])
    return model.attention.mha.out_proj((p @ v).transpose(1, 2).flatten(2))


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("mask", ["causal", "window", "packed", "holes"])
def test_equals_the_definition(kind: str, mask: str) -> None:
    model, x = converted(kind), torch.randn(2, 9, DIM, dtype=torch.float64)
    visible = causal(9)
    if mask == "window":
        visible = visible.triu(-2)
    elif mask == "packed":
        visible[4:, :4] = False
    elif mask == "holes":
        visible[3:, 0] = visible[5, 1] = False
    torch.testing.assert_close(model(x, visible), expected(model, x, visible))


@KINDS
def test_packed_sequences_are_what_each_is_alone(kind: str) -> None:
    model, x = converted(kind), torch.randn(1, 9, DIM, dtype=torch.float64)
    visible = causal(9)
    visible[4:, :4] = False
    alone = torch.cat([model(x[:, :4], causal(4)), model(x[:, 4:], causal(5))], 1)
    torch.testing.assert_close(model(x, visible), alone)


@pytest.mark.slow
@KINDS
def test_export_and_full_graph(kind: str) -> None:
    model, x = converted(kind), torch.randn(2, 6, DIM, dtype=torch.float64)
    truth = expected(model, x, causal(6))
    exported = torch.export.export(model.eval(), (x, causal(6)))
    torch.testing.assert_close(exported.module()(x, causal(6)), truth)
    graphs = Graphs()
    compiled = graphs.compile(model)
    torch.testing.assert_close(compiled(x, causal(6)), truth)
    assert len(graphs.calls) == 1 and graphs.unfused == 0
    (out,) = torch.autograd.grad(compiled(x, causal(6)).sum(), [owner(model).site(0).length_share])
    (eager,) = torch.autograd.grad(truth.sum(), [owner(model).site(0).length_share])
    torch.testing.assert_close(out, eager)


@pytest.mark.slow
@KINDS
def test_copies_and_reverting(kind: str) -> None:
    model, x = converted(kind), torch.randn(2, 6, DIM, dtype=torch.float64)
    truth = model(x, causal(6))
    assert torch.equal(copy.deepcopy(model)(x, causal(6)), truth)
    stream = io.BytesIO()
    pickle.dump(owner(model), stream)
    site = pickle.loads(stream.getvalue()).site(0)
    assert torch.equal(site.length_share, owner(model).site(0).length_share)
    sigswap.revert(model)
    assert not [name for name in model.state_dict() if "sigswap" in name]


def test_a_pickle_from_before_has_none() -> None:
    model = converted("sdpa", first_token=False)
    site = owner(model).site(0)
    state = site.__getstate__()
    for name in ("length_share", "offset"):  # as they were not there
        state.pop(name)
    old = type(site).__new__(type(site))
    old.__setstate__(state)
    assert old.length_share is None and old.offset is None
    assert old.sdpa_bias(torch.randn(1, HEADS, 3, HEAD_DIM, dtype=torch.float64))["first_token"] is None


def test_config() -> None:
    config = sigswap.SigmoidConfig(overrides={"layer.0.*": {"first_token": True}})
    assert config.for_path("layer.0.attention").first_token and not config.for_path("layer.1.attention").first_token
    assert sigswap.SigmoidConfig.from_dict(config.to_dict()) == config
    former = {name: value for name, value in sigswap.SigmoidConfig().to_dict().items() if name != "first_token"}
    assert sigswap.SigmoidConfig.from_dict(former) == sigswap.SigmoidConfig()
    with pytest.raises(ConfigError, match="first_token"):
        sigswap.SigmoidConfig(first_token=1)  # type: ignore[arg-type]
