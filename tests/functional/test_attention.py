"""Sigmoid attention as functions: shapes, defaults, errors, and the properties that sigmoid attention must have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

from sigswap.errors import ArgumentError, SigswapError
from sigswap.functional import stand_ins
from sigswap.functional.attention import attend, probabilities, sigmoid_attention
from tests.support.oracle import sdpa


def naive(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Any = None) -> Tensor:
    """In float64 and with all scores. visible: bool, broadcasts to the scores."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    visible = visible.expand(scores.shape)
    if bias is None:
        bias = -visible.sum(-1, keepdim=True).clamp(min=1).double().log()
    return torch.where(visible, 1 / (1 + torch.exp(-(scores + bias))), 0.0) @ value


ALL = torch.ones((), dtype=torch.bool)


def assert_near(actual: Any, expected: Any) -> None:
    """Equal to float32's precision, whatever the dtype of the expected."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((5, 8), (7, 8), (7, 3)),
        ((2, 5, 8), (2, 7, 8), (2, 7, 3)),
        ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 3)),
        ((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 3)),
        ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 3)),
        ((1, 3, 5, 8), (2, 1, 7, 8), (2, 3, 7, 3)),
        ((2, 3, 5, 8), (7, 8), (3, 7, 3)),
        ((2, 1, 3, 5, 8), (1, 4, 1, 7, 8), (3, 7, 3)),
        ((2, 0, 5, 8), (2, 1, 7, 8), (2, 1, 7, 3)),
        ((0, 3, 5, 8), (1, 1, 7, 8), (3, 7, 3)),
    ],
)
def test_shapes_are_those_of_sdpa(query: tuple, key: tuple, value: tuple) -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in (query, key, value))
    out = sigmoid_attention(q, k, v)
    assert out.shape == (q @ k.mT @ v).shape
    assert_near(out, naive(q, k, v, ALL))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(naive(q, k, v, ALL).sum(), (q, k, v))
    assert_near(grads, expected)


@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 7), (3, 5, 7), (1, 1, 5, 7), (4, 1, 1, 7), (2, 1, 1, 1, 7), (2, 4, 3, 5, 7)]
)
def test_mask_shapes_and_their_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    batch = (2, 4) if len(shape) == 5 else (4,)
    query, key = torch.randn(*batch, 3, 5, 8), torch.randn(*batch, 3, 7, 8)
    visible = torch.rand(shape) > 0.3
    out = sigmoid_attention(query, key, key, attn_mask=visible)
    assert_near(out, naive(query, key, key, visible))
    for masked in (-torch.inf, torch.finfo(torch.float32).min, -1e4):
        additive = torch.zeros(shape).masked_fill(~visible, masked)
        torch.testing.assert_close(sigmoid_attention(query, key, key, attn_mask=additive), out)
    additive = torch.randn(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(sigmoid_attention(query, key, key, attn_mask=additive).sum(), additive)
    scores = query.double() @ key.double().mT / math.sqrt(8) + additive
    (expected,) = torch.autograd.grad((torch.sigmoid(scores - math.log(7)) @ key.double()).sum(), additive)
    assert_near(grad, expected)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (5, 1), (2, 1, 5, 1), (1, 3, 1, 1)])
def test_bias_tensors_replace_the_default_and_have_gradients(shape: tuple[int, ...]) -> None:
    query = torch.randn(2, 3, 5, 8)
    bias = torch.randn(shape, requires_grad=True)
    out = sigmoid_attention(query, query, query, bias=bias, is_causal=True)
    expected = naive(query, query, query, torch.ones(5, 5, dtype=torch.bool).tril(), bias.double())
    assert_near(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), bias)
    assert_near(grad, torch.autograd.grad(expected.sum(), bias)[0])


def test_bias_none_and_float() -> None:
    query = torch.randn(2, 3, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    out = sigmoid_attention(query, query, query, is_causal=True)
    assert_near(out, naive(query, query, query, causal))
    out = sigmoid_attention(query, query, query, is_causal=True, bias=-1.25)
    assert_near(out, naive(query, query, query, causal, -1.25))


def test_attend_adds_all_three_biases() -> None:
    query, bias = torch.randn(2, 3, 5, 8), torch.randn(3, 1, 1)
    out = attend(query, query, query, bias=bias, const_bias=0.5)
    assert_near(out, naive(query, query, query, ALL, bias.double() + 0.5 - math.log(5)))


@pytest.mark.parametrize(
    ("window", "left", "right"),
    [(2, 2, 2), ((1, 3), 1, 3), ((None, 1), 99, 1), ((2, -1), 2, 99), ((0, 0), 0, 0), (None, 99, 99)],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_windows(window: Any, left: int, right: int, is_causal: bool) -> None:
    query = torch.randn(1, 2, 9, 8)
    visible = torch.tensor([[-left <= j - i <= (0 if is_causal else right) for j in range(9)] for i in range(9)])
    out = sigmoid_attention(query, query, query, window=window, is_causal=is_causal)
    assert_near(out, naive(query, query, query, visible))


def test_grouped_query_heads() -> None:
    query, key = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8)
    out = sigmoid_attention(query, key, key, enable_gqa=True)
    repeated = key.repeat_interleave(3, 1)
    assert_near(out, naive(query, repeated, repeated, ALL))


def test_causal_bias_objects() -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    ones = torch.ones(3, 7, dtype=torch.bool)
    for mask, visible in ((causal_upper_left(3, 7), ones.tril()), (causal_lower_right(3, 7), ones.tril(4))):
        out = sigmoid_attention(query, key, key, attn_mask=mask)
        assert_near(out, naive(query, key, key, visible))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [-torch.inf, "min", -1e4, False])
def test_fully_masked_rows_are_zero_with_zero_gradients(dtype: torch.dtype, masked: Any) -> None:
    query, key = (torch.randn(2, 2, 4, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[1, :, 2] = False
    if masked is not False:
        fill = torch.finfo(dtype).min if masked == "min" else masked
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, fill).requires_grad_()
    out = sigmoid_attention(query, key, key, attn_mask=mask)
    assert (out[1, :, 2] == 0).all() and out.isfinite().all()
    inputs = [query, key] + ([mask] if mask.requires_grad else [])
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][1, :, 2] == 0).all()
    if mask.requires_grad:
        assert (grads[2][1, :, 2] == 0).all()


def test_keys_can_be_permuted() -> None:
    query, key, value = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (5, 9, 9))
    mask, order = torch.rand(2, 1, 5, 9) > 0.3, torch.randperm(9)
    torch.testing.assert_close(
        sigmoid_attention(query, key, value, attn_mask=mask),
        sigmoid_attention(query, key[:, :, order], value[:, :, order], attn_mask=mask[..., order]),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    query, key = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(1, 2, 6, 8, dtype=torch.float64)
    amount = (0, 0, 3, 0) if side == "left" else (0, 0, 0, 3)
    real = F.pad(torch.ones(6), amount[2:]).bool()
    padded_query, padded_key = (F.pad(t, amount, value=77.0) for t in (query, key))
    for is_causal in (False, True):
        mask = real.view(1, 1, 1, 9).expand(1, 1, 9, 9)
        if is_causal:
            mask = mask & torch.ones(9, 9, dtype=torch.bool).tril()
        out = sigmoid_attention(padded_query, padded_key, padded_key, attn_mask=mask)[:, :, real]
        torch.testing.assert_close(out, sigmoid_attention(query, key, key, is_causal=is_causal))


def test_causal_rows_do_not_see_the_future() -> None:
    query, key = torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300, 8)
    before = sigmoid_attention(query, key, key, is_causal=True)
    key[:, :, 270:] = torch.randn(1, 2, 30, 8) * 100
    after = sigmoid_attention(query, key, key, is_causal=True)
    assert torch.equal(before[:, :, :270], after[:, :, :270])
    assert not torch.equal(before[:, :, 270:], after[:, :, 270:])


def test_neighbours_in_a_batch_do_not_matter() -> None:
    query = torch.randn(3, 2, 9, 8)
    together = sigmoid_attention(query, query, query)
    for row in range(3):
        alone = query[row : row + 1]
        torch.testing.assert_close(together[row : row + 1], sigmoid_attention(alone, alone, alone))


def test_decoding_step_by_step_equals_one_causal_pass() -> None:
    query, key = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    for window in (None, (3, None)):
        full = sigmoid_attention(query, key, key, is_causal=True, window=window)
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            step = attend(
                query[:, :, start:stop],
                key[:, :, :stop],
                key[:, :, :stop],
                is_causal=True,
                bottom_right=True,
                window=window,
            )
            torch.testing.assert_close(step, full[:, :, start:stop])


def test_dropout_scales_and_follows_the_generator() -> None:
    query, value = torch.zeros(1, 1, 64, 4), torch.ones(1, 1, 500, 1)
    key = torch.zeros(1, 1, 500, 4)
    torch.manual_seed(5)
    first = sigmoid_attention(query, key, value, bias=0.0, dropout_p=0.3)
    second = sigmoid_attention(query, key, value, bias=0.0, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(first, sigmoid_attention(query, key, value, bias=0.0, dropout_p=0.3))
    assert not torch.equal(first, second)
    assert abs(first.mean() - 250) < 3  # its expectation; the standard deviation of the mean is 0.9
    assert torch.equal(sigmoid_attention(query, key, value, dropout_p=1.0), torch.zeros(1, 1, 64, 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_recomputes_the_same_dropout(compiled: bool) -> None:
    def function(query: Tensor) -> Tensor:
        return sigmoid_attention(query, query, query, dropout_p=0.5)

    def checkpointed(query: Tensor) -> Tensor:
        return checkpoint(function, query, use_reentrant=False)

    query = torch.randn(1, 2, 17, 8, requires_grad=True)
    if compiled:
        checkpointed = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    expected = function(query)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), query)
    torch.manual_seed(1)
    out = checkpointed(query)
    (grad,) = torch.autograd.grad(out.square().sum(), query)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_all_three_compile_in_one_graph(backend: str) -> None:
    def function(query: Tensor, key: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        out = sigmoid_attention(query, key, key, attn_mask=mask, enable_gqa=True, bias=-2.0)
        out = out + attend(query, key, key, bias=bias, is_causal=True, window=3, softcap=2.0, enable_gqa=True)
        scores = query @ key.repeat_interleave(2, 1).mT
        return out + probabilities(scores, bias=bias, dtype=torch.float32) @ key.repeat_interleave(2, 1)

    query, key = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 7, 8, requires_grad=True)
    bias, mask = torch.randn(4, 1, 1, requires_grad=True), torch.rand(2, 1, 1, 7) > 0.2
    expected = function(query, key, bias, mask)
    out = torch.compile(function, backend=backend, fullgraph=True)(query, key, bias, mask)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), (query, key, bias))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (query, key, bias)))


def test_lengths_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sigmoid_attention, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for length in (5, 9, 33):
        query, mask = torch.randn(2, 4, length, 8), torch.rand(1, 1, length, length) > 0.3
        out = compiled(query, query, query, attn_mask=mask, bias=-1.5)
        torch.testing.assert_close(out, sigmoid_attention(query, query, query, attn_mask=mask, bias=-1.5))
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(strict: bool) -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return sigmoid_attention(query, query, query, is_causal=True)

    length = torch.export.Dim("length", min=2, max=512)
    query = torch.randn(2, 3, 8, 4)
    program = torch.export.export(Attention(), (query,), dynamic_shapes=({2: length},), strict=strict)
    assert any(node.target is torch.ops.sigswap.sigmoid_attention.default for node in program.graph.nodes)
    longer = torch.randn(2, 3, 21, 4)
    torch.testing.assert_close(program.module()(longer), Attention()(longer))
    torch.testing.assert_close(program.run_decompositions().module()(longer), Attention()(longer))


def test_autocast_is_as_sdpas() -> None:
    query = torch.randn(1, 2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (f(query, query, query) for f in (sigmoid_attention, F.scaled_dot_product_attention))
        assert ours.dtype == theirs.dtype == torch.bfloat16
        half = query.bfloat16()
        assert probabilities(half).dtype == half.softmax(-1).dtype
        assert probabilities(half, dtype=torch.float32).dtype == torch.float32


def test_probabilities_cast_first() -> None:
    scores = torch.randn(4, 9).bfloat16()
    expected = torch.sigmoid(scores.double() - math.log(9))
    torch.testing.assert_close(probabilities(scores, dtype=torch.float64), expected)


QUERY = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": 1024}, "bias must be None, a float or a tensor"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"bias": torch.zeros(1, 1, 1, 1, 1)}, "bias .* more than query's 4"),
        ({"attn_mask": torch.zeros(3, 3), "is_causal": True}, "attn_mask .* is_causal"),
        ({"attn_mask": torch.zeros(5, 3)}, "attn_mask"),
        ({"softcap": 0.0}, "softcap"),
        ({"dropout_p": -0.1}, "dropout_p"),
        ({"dropout_p": 1.1}, "dropout_p"),
        ({"window": (1, 2, 3)}, "window"),
        ({"window": "all"}, "window"),
        ({"window": -2}, "window"),
        ({"query": torch.zeros(8)}, "query, key and value must be"),
        ({"query": torch.zeros(2, 8, 3, 8)}, "enable_gqa=True lets"),
        ({"query": torch.zeros(2, 6, 3, 8), "enable_gqa": True}, "6 heads, which is not a multiple"),
        ({"value": torch.zeros(2, 2, 3, 8), "enable_gqa": True}, "value has 2 heads"),
        ({"query": torch.zeros(3, 4, 3, 8)}, "broadcast in the dimensions before the heads"),
        ({"key": torch.zeros(2, 4, 3, 7)}, "key .* head_dim"),
        ({"key": QUERY.double()}, "key must have query's dtype"),
    ],
)
def test_argument_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        sigmoid_attention(**({"query": QUERY, "key": QUERY, "value": QUERY} | changes))


def test_forward_mode_raises() -> None:
    """It has no jvp; a tangent must not be lost without a word."""
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(SigswapError, match="forward-mode"):
        torch.func.jvp(lambda q: sigmoid_attention(q, q, q), (q,), (torch.ones_like(q),))


def test_keys_and_values_are_grouped_each_by_itself() -> None:
    """As torch's function does it: one head of keys for two of queries, and a value for each."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator).double() for heads in (4, 2, 4))
    F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    for k, v in ((key, value), (value, key)):
        got = stand_ins.scaled_dot_product_attention(query, k, v, enable_gqa=True)
        assert torch.allclose(got, sdpa(query, k, v, enable_gqa=True), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", [1.0]),
        ("key", None),
        ("value", "v"),
        ("attn_mask", [[True]]),
        ("scale", "1"),
        ("dropout_p", None),
        ("dropout_p", "0.1"),
        ("softcap", [3.0]),
        ("row_cap", "1"),
        ("scale", torch.ones(2)),
        ("dropout_p", torch.zeros(0)),
        ("softcap", torch.tensor(1j)),
    ],
)
def test_an_argument_of_another_type_is_named(name: str, value: object) -> None:
    x = torch.randn(1, 1, 3, 4)
    given: dict[str, Any] = {"query": x, "key": x, "value": x, name: value}
    with pytest.raises(ArgumentError, match=name):
        sigmoid_attention(given.pop("query"), given.pop("key"), given.pop("value"), **given)


EMPTY = {
    "nothing empty": (2, 2, 3, 4, 8, 8),
    "batch": (0, 2, 3, 4, 8, 8),
    "heads": (2, 0, 3, 4, 8, 8),
    "queries": (2, 2, 0, 4, 8, 8),
    "keys": (2, 2, 3, 0, 8, 8),
    "head_dim": (2, 2, 3, 4, 0, 8),
    "values": (2, 2, 3, 4, 8, 0),
    "channels": (2, 2, 3, 4, 0, 0),
}


@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": "bool"}, {"attn_mask": "float"}])
def test_empty_as_sdpa(what: str, options: dict[str, Any]) -> None:
    batch, heads, rows, keys, dim, value_dim = EMPTY[what]
    inputs = [
        torch.randn(batch, heads, length, width, requires_grad=True)
        for length, width in ((rows, dim), (keys, dim), (keys, value_dim))
    ]
    if "attn_mask" in options:
        dtype = torch.bool if options["attn_mask"] == "bool" else torch.float32
        options = {"attn_mask": torch.ones(rows, keys, dtype=dtype)}
    out = sigmoid_attention(*inputs, **options)
    softmax = F.scaled_dot_product_attention(*inputs, **options)
    assert (out.shape, out.dtype) == (softmax.shape, softmax.dtype)
    assert bool(out.any()) == bool(softmax.any())
    results = [torch.autograd.grad(each.sum(), inputs, allow_unused=True) for each in (out, softmax)]
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and bool(ours.any()) == (theirs is not None and bool(theirs.any()))


def test_no_channels_are_scores_of_0() -> None:
    query, key, value = torch.zeros(1, 2, 3, 0), torch.zeros(1, 2, 5, 0), torch.randn(1, 2, 5, 4)
    expected = value.sum(2, keepdim=True).expand(1, 2, 3, 4) / 6  # sigmoid(-ln 5)
    torch.testing.assert_close(sigmoid_attention(query, key, value), expected)


def test_a_key_that_is_not_finite_reaches_rows_that_see_it_alone() -> None:
    """The op, and a model's own softmax, as ``torch.softmax`` does where the mask is filled in; added, NaN stays."""
    query, key, value = (torch.randn(1, 1, n, 8) for n in (4, 6, 6))
    visible = torch.ones(4, 6, dtype=torch.bool)
    visible[:3, 2] = False
    poisoned = key.clone()
    poisoned[..., 2, :] = torch.nan
    added = torch.zeros(4, 6).masked_fill(~visible, -torch.inf)

    def by_hand(key: Tensor) -> Tensor:
        return probabilities((query @ key.mT * 8**-0.5).masked_fill(~visible, -torch.inf)) @ value

    for call in (
        lambda key: sigmoid_attention(query, key, value, attn_mask=visible),
        lambda key: sigmoid_attention(query, key, value, attn_mask=added),
        by_hand,
    ):
        out = call(poisoned)
        torch.testing.assert_close(out[:, :, :3], call(key)[:, :, :3])
        assert out[:, :, 3].isnan().all()
    assert probabilities(query @ poisoned.mT + added)[..., 2].isnan().all()
    assert torch.softmax(query @ poisoned.mT + added, -1).isnan().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.nested.nested_tensor([torch.randn(4, 6, 8)] * 2)),
        ("key", torch.randn(2, 4, 6, 8).to_sparse()),
        ("attn_mask", torch.eye(6).to_sparse()),
        ("bias", torch.ones(1, 4, 1, 1).to_sparse()),
        ("is_causal", "yes"),
        ("is_causal", None),
        ("enable_gqa", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Tensor) else repr(value),
)
def test_what_is_no_dense_tensor_or_no_switch(name: str, value: object) -> None:
    given = {name: torch.randn(2, 4, 6, 8) for name in ("query", "key", "value")}
    with pytest.raises(ArgumentError, match=f"^{name} must be"):
        sigmoid_attention(**{**given, name: value})  # type: ignore[arg-type]
