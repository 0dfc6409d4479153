"""Attention among ranks of which each has a part of the sequence: results and gradients, against one process in
float64; and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
from interruptions import interrupted, lines_of
from ranks import on_ranks
from spread import by_heads
from torch import Tensor

import sigswap
from sigswap.config import SigmoidConfig
from sigswap.distributed import context
from sigswap.errors import ArgumentError, ContextParallelError, SigswapError
from sigswap.functional.attention import FirstToken, attend, sigmoid_attention_varlen
from sigswap.functional.stand_ins import softmax
from sigswap.sequence.active import activated, active

BATCH, HEADS, TOKENS, DIM, WIDTH = 2, 4, 24, 8, 6
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8 + [7] * 11, [-1] * 3 + [4] * 8 + [5] * 10 + [-1] * 3])


class Case(NamedTuple):
    """``bias``: the shape of a given row bias. ``first``: first_token. ``window``: (left, right)."""

    key_heads: int = HEADS
    causal: bool = True
    bias: tuple[int, ...] | None = None
    cap: float | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    documents: bool = False
    first: bool = False
    visible: bool = True
    const: float = 0.0


CASES = [
    Case(),
    Case(causal=False),
    Case(causal=False, visible=False, const=-2.0),
    Case(key_heads=2, bias=(BATCH, HEADS, TOKENS, 1)),
    Case(key_heads=2, bias=(1, HEADS, 1, 1), cap=0.5, const=0.3),
    Case(causal=False, bias=(1, 1, TOKENS, 1), cap=1.0),
    Case(window=(4, 0)),
    Case(causal=False, window=(3, 5), key_heads=2, softcap=1.5),
    Case(documents=True),
    Case(documents=True, causal=False, cap=0.7, bias=(1, HEADS, 1, 1)),
    Case(first=True),
    Case(first=True, documents=True, key_heads=2, cap=0.5, softcap=2.0),
    Case(first=True, causal=False, visible=False, const=-1.0),
    Case(first=True, window=(4, 0), key_heads=2, cap=0.5),
    Case(first=True, window=(9, 3), causal=False, documents=True, softcap=2.0),
]


def oracle(case: Case, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, terms: list[Tensor]) -> Tensor:
    group = HEADS // case.key_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    position = torch.arange(TOKENS)
    seen = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool)
    if case.causal:
        seen = seen & (position <= position[:, None])
    if case.window is not None:
        left, right = case.window
        seen = seen & (position >= position[:, None] - left) & (position <= position[:, None] + right)
    if case.documents:
        numbers = DOCUMENTS[:, None]
        seen = seen & (numbers[..., None] == numbers[..., None, :]) & (numbers >= 0)[..., None]
    scores = query @ key.mT / math.sqrt(DIM)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    b0 = torch.full((BATCH, 1, TOKENS, 1), case.const, dtype=torch.float64)
    if case.visible:
        b0 = b0 - seen.sum(-1, keepdim=True).clamp(min=1).double().log()
    if case.first:
        first = seen.int().argmax(-1, keepdim=True).expand(BATCH, HEADS, TOKENS, 1)
        b0 = -torch.logaddexp(scores.gather(-1, first), -(terms[0] * b0 + terms[1]))
    scores = scores + b0 if bias is None else scores + b0 + bias
    p = torch.sigmoid(scores) * seen
    return p @ value / (p.sum(-1, keepdim=True).clamp(min=case.cap) if case.cap else 1.0)


def tensors(case: Case) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (BATCH, HEADS, TOKENS, DIM),
        (BATCH, case.key_heads, TOKENS, DIM),
        (BATCH, case.key_heads, TOKENS, WIDTH),
        case.bias,
        (1, HEADS, 1, 1) if case.first else None,
        (BATCH, HEADS, TOKENS, 1) if case.first else None,
    ]
    made = [None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [None if each is None else each.requires_grad_() for each in made]


def attention(case: Case, query: Tensor, key: Tensor, value: Tensor, bias: Any, *terms: Any) -> Tensor:
    return attend(
        query,
        key,
        value,
        bias=bias,
        visible_bias=case.visible,
        const_bias=case.const,
        is_causal=case.causal,
        softcap=case.softcap,
        window=case.window,
        enable_gqa=True,
        row_cap=case.cap,
        first_token=FirstToken(*terms) if case.first else None,
    )


def check_case(case: Case, form: Any) -> None:
    single = tensors(case)
    given = [each for each in single if each is not None]
    expected = oracle(case, *single[:4], [each for each in single[4:] if each is not None])  # type: ignore[arg-type]
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weight).sum(), given)
    with sigswap.context_parallel(documents=DOCUMENTS if case.documents else None, form=form) as context:

        def part(tensor: Tensor) -> Tensor:
            """What all positions share is whole."""
            return (tensor if tensor.shape[2] == 1 else context.shard(tensor, 2)).detach().requires_grad_()

        own = [None if each is None else part(each) for each in single]
        out = attention(case, *own)  # type: ignore[arg-type]
        found = torch.autograd.grad((out * context.shard(weight, 2)).sum(), [each for each in own if each is not None])
        torch.testing.assert_close(context.gather(out, 2), expected, msg=lambda text: f"{case} {form}: {text}")
        for mine, theirs in zip(found, gradients, strict=True):
            if theirs.shape[2] == 1:
                dist.all_reduce(mine)
            else:
                mine = context.gather(mine, 2)
            torch.testing.assert_close(mine, theirs, msg=lambda text: f"{case} {form}: {text}")


def check_attention(forms: list[str]) -> int:
    chosen = [
        (case, form)
        for case, form in itertools.product(CASES, forms)
        if form != "all_to_all" or case.key_heads % dist.get_world_size() == 0
    ]
    for case, form in chosen:
        check_case(case, form)
    return len(chosen)


def check_all_on_two() -> int:
    return check_attention(["ring", "all_to_all"])


def test_results_and_gradients() -> None:
    assert on_ranks(2, check_all_on_two)[0] == 2 * len(CASES)


def qkv(length: int = 4, heads: int = HEADS) -> list[Tensor]:
    return [torch.ones(1, heads, length, DIM) for _ in range(3)]


def refused(error: type[Exception], match: str, arguments: dict[str, Any], *inputs: Tensor, **options: Any) -> None:
    with pytest.raises(error, match=match), sigswap.context_parallel(**arguments):
        sigswap.sigmoid_attention(*inputs, **options)


def softmax_attention(query: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, query, query)


def check_refusals() -> None:
    rank = dist.get_rank()
    refused(ArgumentError, "dropout_p", {}, *qkv(), dropout_p=0.5)
    refused(ContextParallelError, "mask tensor.*causal=True", {}, *qkv(), attn_mask=torch.ones(4, 4, dtype=torch.bool))
    refused(ContextParallelError, "added to its scores", {"causal": True}, *qkv(), attn_mask=torch.zeros(4, 4))
    refused(ArgumentError, "without a cache", {}, qkv(4)[0], *qkv(8)[1:])
    refused(ArgumentError, "must be even", {}, *qkv(3))
    refused(ContextParallelError, "3 key heads.*among 2 ranks", {"form": "all_to_all"}, *qkv(heads=3))
    numbers = torch.arange(10) // torch.tensor([[2], [3]])
    refused(ArgumentError, "8 positions together, documents 10", {"documents": numbers}, *qkv())
    refused(ArgumentError, "2 rows, query 1", {"documents": numbers[:, :8]}, *qkv())
    refused(ArgumentError, "integers", {"documents": torch.zeros(10)}, *qkv())
    refused(ArgumentError, "form must be", {"form": "rings"}, *qkv())
    refused(ArgumentError, "mesh must be a DeviceMesh", {"mesh": 2}, *qkv())
    refused(ContextParallelError, "comes to another first attention", {}, *qkv(4 + 2 * rank))
    refused(ContextParallelError, "causal (True|False), here", {"causal": rank == 0}, *qkv())
    mask = torch.ones(4, 4, dtype=torch.bool) if rank == 1 else None
    refused(ContextParallelError, "has a mask tensor" if rank else "rank 1 .* has a mask", {}, *qkv(), attn_mask=mask)
    alone = [dist.new_group([each]) for each in range(dist.get_world_size())][rank]
    with sigswap.context_parallel(alone):
        out = sigswap.sigmoid_attention(*qkv(), is_causal=True)
    torch.testing.assert_close(out, sigswap.sigmoid_attention(*qkv(), is_causal=True))
    compiled = torch.compile(softmax_attention, backend="eager")
    model = converted(learn_bias=True).eval()
    ids, ones = torch.ones(1, 8, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    assert compiled(qkv()[0]).shape == (1, HEADS, 4, DIM)
    with sigswap.context_parallel() as context:
        for attention in (softmax_attention, compiled):
            with pytest.raises(Exception, match="scaled_dot_product_attention of what is not converted"):
                attention(qkv()[0])
        with pytest.raises(ContextParallelError, match="is not converted"), sigswap.softmax(model), torch.no_grad():
            model(ids)
        with pytest.raises(SigswapError, match="under context parallelism"):
            sigswap.calibrate(model, [ids], progress=False)
        with torch.no_grad():
            assert model(context.shard(ids), ones).logits.shape == (1, 4, 31)
        with pytest.raises(ContextParallelError, match="inside another"), sigswap.context_parallel():
            pass
        with pytest.raises(ContextParallelError, match="computes its scores itself"):
            softmax(torch.ones(2, 4, 4), -1)
        with pytest.raises(ContextParallelError, match="varlen"):
            ends = torch.tensor([0, 4], dtype=torch.int32)
            sigmoid_attention_varlen(*(x[0].transpose(0, 1) for x in qkv()), ends, ends, 4, 4)
        with pytest.raises(ContextParallelError, match="sigmoid_attention_paged"):
            query, key, value = (x.transpose(1, 2) for x in qkv())
            sigswap.sigmoid_attention_paged(query[0], key, value, ends[None, :1], ends[1:], ends, 4, 4)
        with pytest.raises(ArgumentError, match="multiple of 4"):
            context.shard(torch.ones(2, 6))
        assert sigswap.sigmoid_attention(*qkv()).shape == (1, HEADS, 4, DIM)  # none of these has left anything behind
    for form in ("ring", "all_to_all"):
        with sigswap.context_parallel(form=form) as context:  # type: ignore[arg-type]
            query, key, value = (each.requires_grad_() for each in qkv())
            first = torch.autograd.grad(
                sigswap.sigmoid_attention(query, key, value).square().sum(), query, create_graph=True
            )
            with pytest.raises(SigswapError, match="no second derivative"):
                torch.autograd.grad(first[0].sum() + query.sum(), query)
    assert sigswap.sigmoid_attention(*qkv(3)).shape == (1, HEADS, 3, DIM)  # it is off again


def test_what_cannot_run_is_an_error() -> None:
    on_ranks(2, check_refusals)


def test_without_a_process_group() -> None:
    with pytest.raises(ArgumentError, match="init_process_group"), sigswap.context_parallel():
        pass


def test_an_interruption_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any line that turns it on or off, and inside, where it leaves torch's overrides off."""

    def used() -> None:
        with activated(cast(Any, object())):
            pass

    for at in lines_of(used):
        came, raised = interrupted(used, at, KeyboardInterrupt())
        assert came and isinstance(raised, KeyboardInterrupt) and active.attention is None, at
    monkeypatch.setattr(context, "_group", lambda mesh: None)
    monkeypatch.setattr(context, "SequenceGroup", lambda group: None)
    with pytest.raises(KeyboardInterrupt), sigswap.context_parallel():
        torch._C._set_torch_function_state(torch._C._TorchFunctionState.ALL_DISABLED)
        raise KeyboardInterrupt
    assert torch._C._get_torch_function_state() == torch._C._TorchFunctionState.ENABLED
    assert torch._C._len_torch_function_stack() == 0 and active.attention is None


def converted(key_heads: int = 2, **fields: Any) -> Any:
    """A small Llama with parameters that tell heads apart."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model = sigswap.convert(model, SigmoidConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in name:
                parameter.add_(torch.randn_like(parameter))
    return model


LLAMAS: list[dict[str, Any]] = [
    {"learn_bias": True, "query_bias": True, "row_cap": 0.5},
    {"learn_bias": True, "query_bias": True, "first_token": True, "row_cap": 0.5, "qk_norm": "rms"},
]


def loss_of(model: Any, ids: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
    logits = model(input_ids=ids, **inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradients_of(model: Any, loss: Tensor) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def check_llamas() -> None:
    tokens = torch.randint(1, 31, (2, 17), generator=torch.Generator().manual_seed(1))
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    for fields, key_heads, cached, masked, form in [
        (LLAMAS[0], 2, True, False, "ring"),
        (LLAMAS[0], 2, False, True, "ring"),  # recomputed in checkpoints
        (LLAMAS[1], 2, True, True, "all_to_all"),
        (LLAMAS[1], 4, False, False, "ring"),  # the model takes rank 0's positions for two documents
    ]:
        model = converted(key_heads, **fields).train()
        expected_loss = loss_of(model, ids, labels)
        expected = gradients_of(model, expected_loss)
        if masked and not cached:
            model.gradient_checkpointing_enable()
        with sigswap.context_parallel(causal=None if masked else True, form=form) as context:  # type: ignore[arg-type]
            part = context.shard(ids)
            inputs = {"position_ids": context.positions(16), "use_cache": cached}
            if masked:
                inputs["attention_mask"] = torch.ones_like(part)
            loss = loss_of(model, part, context.shard(labels), **inputs)
            found = gradients_of(model, loss)
        mean = loss.detach() / context.size
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected_loss.detach())
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            dist.all_reduce(found[name])
            torch.testing.assert_close(
                found[name] / context.size,
                gradient,
                atol=2e-6,
                rtol=1e-4,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_a_converted_decoder() -> None:
    on_ranks(2, check_llamas)


def check_torchs_own() -> None:
    """``context_parallel`` patches scaled_dot_product_attention; the plan for a module hands it DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tokens = torch.randint(1, 31, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    ids, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    model = converted(**LLAMAS[1]).train()
    expected_loss = loss_of(model, ids, labels)
    expected = gradients_of(model, expected_loss)
    positions = torch.arange(TOKENS)[None]
    case = Case(key_heads=2, bias=(1, HEADS, 1, 1), cap=0.5)
    single = tensors(case)[:4]
    whole = oracle(case._replace(visible=False), *single, []).detach().clone()  # type: ignore[arg-type]
    query, key, value = (each.detach().clone() for each in single[:3] if each is not None)
    with context_parallel(
        mesh, buffers=[ids, labels, positions, query, key, value, whole], buffer_seq_dims=[1, 1, 1, 2, 2, 2, 2]
    ):
        loss = loss_of(model, ids, labels, position_ids=positions, attention_mask=torch.ones_like(ids))
        found = gradients_of(model, loss)
        parts = [DTensor.from_local(each, mesh, [Shard(2)]) for each in (query, key, value)]
        out = sigswap.sigmoid_attention(*parts, bias=single[3], is_causal=True, enable_gqa=True, row_cap=case.cap)
        torch.testing.assert_close(out.to_local(), whole)  # type: ignore[attr-defined]
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, expected_loss.detach())
    for name, gradient in expected.items():
        dist.all_reduce(found[name])
        found[name] /= dist.get_world_size()
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4)
    assert active.attention is None


def test_pytorchs_own_context_parallel() -> None:
    on_ranks(2, check_torchs_own)


def check_with_data_parallelism() -> None:
    """Two groups of two ranks: each has its own rows of the batch, and a part of their tokens; FSDP2 over all four."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    with pytest.raises(ArgumentError, match="must have one dimension, not 2"), sigswap.context_parallel(mesh):
        pass
    tokens = torch.randint(1, 31, (4, 17), generator=torch.Generator().manual_seed(1))
    model = converted(**LLAMAS[0]).train()
    expected = gradients_of(model, loss_of(model, tokens[:, :-1], tokens[:, 1:]))
    everyone = init_device_mesh("cpu", (4,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    own = tokens[2 * mesh.get_local_rank("data") :][:2]
    with sigswap.context_parallel(mesh["context"]) as context:
        part, labels = context.shard(own[:, :-1]), context.shard(own[:, 1:])
        inputs = {"position_ids": context.positions(16), "attention_mask": torch.ones_like(part)}
        found = gradients_of(model, loss_of(model, part, labels, **inputs))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].full_tensor(), gradient, atol=2e-6, rtol=1e-4)


def check_with_tensor_parallelism() -> None:
    """Two heads on each of two pairs of ranks, and a part of the tokens on each rank of a pair."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("heads", "context"))
    tokens = torch.randint(1, 31, (2, 17), generator=torch.Generator().manual_seed(1))
    model = converted(4, **LLAMAS[0]).train()
    expected = gradients_of(model, loss_of(model, tokens[:, :-1], tokens[:, 1:]))
    model = by_heads(model, mesh["heads"])
    for form in ("ring", "all_to_all"):
        with sigswap.context_parallel(mesh["context"], form=form) as context:  # type: ignore[arg-type]
            part, labels = context.shard(tokens[:, :-1]), context.shard(tokens[:, 1:])
            inputs = {"position_ids": context.positions(16), "attention_mask": torch.ones_like(part)}
            found = gradients_of(model, loss_of(model, part, labels, **inputs))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            mine = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
            dist.all_reduce(mine, group=mesh.get_group("context"))
            torch.testing.assert_close(
                mine / 2, gradient, atol=2e-6, rtol=1e-4, msg=lambda text, name=f"{form} {name}": f"{name}: {text}"
            )


def check_on_four() -> int:
    check_with_data_parallelism()
    check_with_tensor_parallelism()
    return check_attention(["ring", "all_to_all", "auto"])


@pytest.mark.slow
def test_four_ranks() -> None:
    assert on_ranks(4, check_on_four)[0] > 2 * len(CASES)
