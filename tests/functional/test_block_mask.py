"""sigswap.BlockMask: made of tensors, functions and FlexAttention's, and attended under."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.nn.attention.flex_attention import create_block_mask

import sigswap
from sigswap import BlockMask
from sigswap.errors import ArgumentError, ContextParallelError
from sigswap.kernels.host import blocks

ROWS, KEYS = 300, 270
NUMBER = torch.arange(ROWS) // 90


def documents(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (NUMBER[q_idx] == NUMBER[kv_idx]) & (q_idx >= kv_idx)


def by_head(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx - kv_idx).abs() <= 20 * (h + 1) + 100 * b


def dense(function: Any, batch: int = 1, heads: int = 1) -> Tensor:
    sizes = (batch, heads, ROWS, KEYS)
    shapes = [[size if dim == at else 1 for dim in range(4)] for at, size in enumerate(sizes)]
    places = [torch.arange(size).view(shape) for size, shape in zip(sizes, shapes, strict=True)]
    found: Tensor = function(*places)
    return found.expand(sizes)


def draw(**options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (4, ROWS), (options.pop("kv_heads", 4), KEYS), (options.pop("value_heads", 4), KEYS)
    return [torch.randn(2, h, n, 16, dtype=torch.float64, generator=generator) for h, n in shapes]


def test_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []
    monkeypatch.setattr(blocks, "MAX_CHUNK", 1)
    tiles = blocks._tiles
    monkeypatch.setattr(blocks, "_tiles", lambda chunk: largest.append(chunk.numel()) or tiles(chunk))
    assert torch.equal(BlockMask.from_function(documents, None, None, ROWS, KEYS).dense(), dense(documents))
    assert torch.equal(BlockMask.from_function(by_head, 2, 3, ROWS, KEYS).dense(), dense(by_head, 2, 3))
    assert max(largest) <= 2 * 3 * 128 * KEYS  # a block of rows at a time


def test_of_a_mask() -> None:
    mask = dense(by_head, 2, 3)
    assert torch.equal(BlockMask.from_mask(mask).dense(), mask)
    assert BlockMask.from_mask(mask[0]).shape == (1, 3, ROWS, KEYS)
    assert BlockMask.from_mask(mask[0, 0]).shape == (1, 1, ROWS, KEYS)
    expanded = BlockMask.from_mask(dense(documents).expand(5, 7, -1, -1))
    assert expanded.shape == (1, 1, ROWS, KEYS) and torch.equal(expanded.dense(), dense(documents))
    assert torch.equal(expanded.visible, dense(documents).sum(-1).int())


@pytest.mark.parametrize("size", [128, 64, (128, 32)], ids=str)
def test_of_flex_attentions(size: Any) -> None:
    of_flex = create_block_mask(by_head, 2, 3, ROWS, KEYS, device="cpu", BLOCK_SIZE=size)
    assert torch.equal(BlockMask.from_flex(of_flex).dense(), dense(by_head, 2, 3))
    of_flex = create_block_mask(documents, None, None, ROWS, KEYS, device="cpu", BLOCK_SIZE=size)
    assert torch.equal(BlockMask.from_flex(of_flex).dense(), dense(documents))


def test_of_flex_attentions_lists() -> None:
    """Blocks that are in no list are empty, and full ones full, whatever the function says."""
    counts, indices = torch.tensor([[[1, 0]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    fulls = torch.tensor([[[0, 1]]], dtype=torch.int32)
    of_flex = FlexBlockMask.from_kv_blocks(
        counts, indices, fulls, indices, BLOCK_SIZE=128, mask_mod=documents, seq_lengths=(256, 256)
    )
    wanted = torch.zeros(256, 256, dtype=torch.bool)
    wanted[:128, 128:] = dense(documents)[0, 0, :128, 128:256]
    wanted[128:, :128] = True
    assert torch.equal(BlockMask.from_flex(of_flex).dense()[0, 0], wanted)
    without = FlexBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, mask_mod=documents, seq_lengths=(256, 256))
    wanted[128:] = False
    assert torch.equal(BlockMask.from_flex(without).dense()[0, 0], wanted)


@pytest.mark.parametrize("behind", [-1, 7, 1 << 20])
def test_of_flex_attentions_lists_with_any_numbers_behind_their_ends(behind: int) -> None:
    """FlexAttention does not look at them."""
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, behind], [0, 1]]]], dtype=torch.int32)
    of_flex = FlexBlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, mask_mod=lambda b, h, i, j: i >= j)
    assert torch.equal(BlockMask.from_flex(of_flex).dense()[0, 0], torch.ones(256, 256, dtype=torch.bool).tril())


@pytest.mark.parametrize("options", [{}, {"bias": -2.0}, {"row_cap": 0.5}, {"softcap": 2.0, "scale": 0.4}], ids=str)
def test_attention_is_that_under_the_mask(options: dict[str, Any]) -> None:
    mask, block_mask = dense(by_head, 2, 4), BlockMask.from_function(by_head, 2, 4, ROWS, KEYS)
    query, key, value = draw()
    out = sigswap.sigmoid_attention(query, key, value, block_mask=block_mask, **options)
    scores = query @ key.mT * options.get("scale", 0.25)
    if "softcap" in options:
        scores = 2.0 * (scores / 2.0).tanh()
    scores = scores + options.get("bias", -mask.sum(-1, keepdim=True).clamp(min=1).double().log())
    probs = torch.where(mask, scores.sigmoid(), 0.0)
    if "row_cap" in options:
        probs = probs / probs.sum(-1, keepdim=True).clamp(min=0.5)
    torch.testing.assert_close(out, probs @ value)


def test_one_that_evaluation_made_is_trained_with() -> None:
    with torch.inference_mode():
        made = BlockMask.from_function(documents, None, None, ROWS, KEYS)
    query, key, value = (x.requires_grad_() for x in draw())
    out = sigswap.sigmoid_attention(query, key, value, block_mask=made)
    seen = dense(documents)
    scores = query @ key.mT / 4 - seen.sum(-1, keepdim=True).clamp(min=1).double().log()
    expected = torch.autograd.grad(((scores.sigmoid() * seen) @ value).sum(), (query, key, value))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (query, key, value)), expected)


def test_leading_dimensions_grouped_heads_and_dropout() -> None:
    query, key, value = draw(kv_heads=2, value_heads=2)
    block_mask, mask = BlockMask.from_function(documents, None, None, ROWS, KEYS), dense(documents)
    for given in ((query, key, value), (query[0], key[0], value[0]), (query[:, None], key[:, None], value[:, None])):
        out = sigswap.sigmoid_attention(*given, block_mask=block_mask, enable_gqa=True)
        torch.testing.assert_close(out, sigswap.sigmoid_attention(*given, attn_mask=mask[0, 0], enable_gqa=True))
    results = []
    for keyword in ({"block_mask": block_mask}, {"attn_mask": mask[0, 0]}):
        torch.manual_seed(4)
        results.append(sigswap.sigmoid_attention(query, key, value, enable_gqa=True, dropout_p=0.3, **keyword))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("policy", ["MUST_SAVE", "PREFER_SAVE", "MUST_RECOMPUTE", "PREFER_RECOMPUTE"])
@pytest.mark.parametrize("saved", ["sigswap", ""], ids=["attention", "all"])
def test_dropout_in_selective_checkpoints(saved: str, policy: str) -> None:
    """saved: in the names of the ops that the policy is of. The mask of an attention with dropout is made of blocks."""
    block_mask = BlockMask.from_function(documents, None, None, ROWS, ROWS)

    def attend(query: Tensor) -> Tensor:
        return sigswap.sigmoid_attention(query, query, query, block_mask=block_mask, dropout_p=0.3).sin()

    def policy_of(context: Any, op: Any, *inputs: Any, **keywords: Any) -> checkpoints.CheckpointPolicy:
        return checkpoints.CheckpointPolicy[policy if saved in str(op) else "PREFER_RECOMPUTE"]

    contexts = functools.partial(checkpoints.create_selective_checkpoint_contexts, policy_of)
    query = torch.randn(1, 2, ROWS, 8, requires_grad=True)
    grads = []
    for run in (attend, lambda query: checkpoints.checkpoint(attend, query, use_reentrant=False, context_fn=contexts)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(run(query).sum(), query)[0])
    torch.testing.assert_close(grads[1], grads[0])


def test_compiled() -> None:
    block_mask = BlockMask.from_function(documents, None, None, ROWS, KEYS)
    tensors = [each.requires_grad_() for each in draw()]

    def run(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask) -> Tensor:
        return sigswap.sigmoid_attention(query, key, value, block_mask=block_mask).square().sum()

    found = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors, block_mask), tensors)
    for each, right in zip(found, torch.autograd.grad(run(*tensors, block_mask), tensors), strict=True):
        torch.testing.assert_close(each, right)


def test_what_it_says_of_itself() -> None:
    block_mask = BlockMask.from_function(documents, None, None, ROWS, KEYS)
    assert repr(block_mask) == "BlockMask(shape=(1, 1, 300, 270), blocks=3 x 3, device='cpu')"
    assert math.isclose(block_mask.sparsity(), 4 / 9)
    assert block_mask.to("cpu") is block_mask
    moved = block_mask.to("meta")
    assert moved.device.type == "meta" and moved.shape == block_mask.shape and block_mask.device.type == "cpu"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BlockMask.from_mask(torch.zeros(3, 3)), "must be a bool tensor, not torch.float32"),
        (lambda: BlockMask.from_mask([[True]]), "must be a bool tensor, not list"),  # type: ignore[arg-type]
        (lambda: BlockMask.from_mask(torch.ones(3, dtype=torch.bool)), r"not \[3\]"),
        (lambda: BlockMask.from_mask(torch.ones(0, 3, dtype=torch.bool)), "must be positive integers"),
        (lambda: BlockMask.from_mask(torch.ones(3, 3, dtype=torch.bool, device="meta")), "the meta device has not"),
        (lambda: BlockMask.from_function(documents, None, None, 0, 3), "must be positive integers"),
        (lambda: BlockMask.from_function(documents, None, None, 3.0, 3), "must be positive integers"),  # type: ignore[arg-type]
        (lambda: BlockMask.from_function(None, None, None, 3, 3), "must be a function"),  # type: ignore[arg-type]
        (lambda: BlockMask.from_function(lambda b, h, i, j: i - j, None, None, 3, 3), "must return a bool tensor"),
        (lambda: BlockMask.from_function(lambda b, h, i, j: True, None, None, 3, 3), "must return a bool tensor"),
        (lambda: BlockMask.from_function(lambda b, h, i, j: (i > j)[None], 2, None, 3, 3), r"one bool for each.*\[1\]"),
        (lambda: BlockMask.from_flex(torch.ones(3)), "must be FlexAttention's BlockMask"),
    ],
)
def test_what_makes_none(make: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        make()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attn_mask": torch.ones(ROWS, KEYS, dtype=torch.bool)}, "together with attn_mask"),
        ({"is_causal": True}, "together with is_causal=True"),
        ({"window": 3}, "together with window"),
        ({"block_mask": torch.ones(3)}, "not a torch.Tensor"),
        (
            {"block_mask": BlockMask.from_function(documents, None, None, ROWS, KEYS - 1)},
            r"block_mask \[1, 1, 300, 269\] must be",
        ),
        (
            {"block_mask": BlockMask.from_function(documents, 3, None, ROWS, KEYS)},
            r"block_mask \[3, 1, 300, 270\] must be",
        ),
        ({"block_mask": BlockMask.from_function(documents, None, 2, ROWS, KEYS)}, r"must be \[2, 4, 300, 270\]"),
        (
            {"block_mask": BlockMask.from_function(documents, None, None, ROWS, KEYS).to("meta")},
            "on query's device cpu",
        ),
    ],
)
def test_what_it_does_not_go_with(options: dict[str, Any], said: str) -> None:
    block_mask = BlockMask.from_function(documents, None, None, ROWS, KEYS)
    with pytest.raises(ArgumentError, match=said):
        sigswap.sigmoid_attention(*draw(), **{"block_mask": block_mask, **options})


def test_not_under_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    from sigswap.sequence.active import active

    monkeypatch.setattr(active, "attention", lambda inputs, options: inputs.query)
    with pytest.raises(ContextParallelError, match="block_mask cannot run"):
        sigswap.sigmoid_attention(*draw(), block_mask=BlockMask.from_function(documents, None, None, ROWS, KEYS))
