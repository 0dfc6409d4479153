"""The row bias that takes the first visible key's score as it is, against a loop over the rows in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from first_token import first_token_oracle
from torch import Tensor

from sigswap.errors import ArgumentError
from sigswap.functional.attention import FirstToken, attend, probabilities
from sigswap.kernels.op.first_token import first_token_bias

B, H, HK, M, N, D = 2, 4, 2, 5, 7, 8


def tensors(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, share [1, H, 1, 1], rest [B, H, M, 1], in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, H, M, D), (B, HK, N, D), (B, HK, N, D), (1, H, 1, 1), (B, H, M, 1))
    q, k, v, share, rest = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return 2 * q, 2 * k, v, share, rest


def oracle(
    q: Tensor, k: Tensor, visible: Tensor, share: Tensor, rest: Tensor, added: Tensor | float = 0.0, cap: float = 0.0
) -> Tensor:
    scores = q @ k.repeat_interleave(H // HK, 1).mT / math.sqrt(D)
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return first_token_oracle(scores + added, visible, share.flatten(), rest.squeeze(-1))


def band(left: int, right: int, offset: int) -> Tensor:
    row, column = torch.arange(M)[:, None] + offset, torch.arange(N)
    visible = torch.ones(M, N, dtype=torch.bool)
    if left >= 0:
        visible &= column >= row - left
    if right >= 0:
        visible &= column <= row + right
    return visible


MASKS = {
    "none": None,
    "padding": (B, 1, 1, N),
    "rows": (1, 1, M, N),
    "heads": (B, H, M, N),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (2, 0), (1, 1), (-1, 2)])
@pytest.mark.parametrize("bottom_right", [False, True])
def test_attention(mask: str, additive: bool, left: int, right: int, bottom_right: bool) -> None:
    if additive and mask == "none":
        pytest.skip("there is no mask")
    q, k, v, share, rest = tensors()
    visible = band(left, right, N - M if bottom_right else 0).expand(B, H, M, N)
    attn_mask, added = None, torch.zeros(())
    shape = MASKS[mask]
    if shape is not None:
        seen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
        seen[0, ..., -1, :] = False  # rows that see nothing
        visible = visible & seen
        attn_mask = seen
        if additive:
            added = torch.randn(shape, dtype=torch.float64)
            attn_mask = added.masked_fill(~seen, -math.inf)
    out = attend(
        q,
        k,
        v,
        attn_mask=attn_mask,
        is_causal=False,
        bottom_right=bottom_right,
        window=(left, right),
        enable_gqa=True,
        first_token=FirstToken(share, rest),
    )
    expected = oracle(q, k, visible, share, rest, added) @ v.repeat_interleave(H // HK, 1)
    torch.testing.assert_close(out, expected)


def test_causal_with_softcap_and_offset() -> None:
    q, k, v, share, rest = tensors()
    offset = torch.randn(1, H, 1, 1, dtype=torch.float64)
    out = attend(
        q, k, v, is_causal=True, softcap=1.5, enable_gqa=True, bias=offset, first_token=FirstToken(share, rest)
    )
    scores = 1.5 * torch.tanh(q @ k.repeat_interleave(2, 1).mT / math.sqrt(D) / 1.5)
    p = first_token_oracle(scores, band(-1, 0, 0), share.flatten(), rest.squeeze(-1), offset.flatten())
    torch.testing.assert_close(out, p @ v.repeat_interleave(2, 1))


def test_a_bfloat16_mask_is_compared_in_float32() -> None:
    """As the op does, so that both see the same keys: -4992 is bfloat16's neighbour of -5000."""
    q, k, v, share, rest = tensors()
    q, k = q * 0, k * 0
    mask = torch.zeros(B, 1, M, N, dtype=torch.float64)
    mask[..., 0] = -4992.0
    mask[..., 1] = -1e4
    out = attend(q, k, v, attn_mask=mask.bfloat16(), enable_gqa=True, first_token=FirstToken(share, rest))
    visible = torch.arange(N) != 1
    p = oracle(q, k, visible.expand(B, H, M, N), share, rest, mask.masked_fill(~visible, 0.0))
    torch.testing.assert_close(out, p @ v.repeat_interleave(H // HK, 1))


@pytest.mark.parametrize("dim", [-1, 1])
def test_probabilities(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, H, M, N, generator=generator, dtype=torch.float64)
    visible = torch.rand(B, H, M, N, generator=generator) < 0.5
    visible[0, 0, 2] = False
    share, rest = torch.rand(H, 1, 1, generator=generator), torch.randn(B, H, M, 1, generator=generator)
    expected = first_token_oracle(scores, visible, share.flatten(), rest.squeeze(-1), constant=-1.5)
    masked = scores.masked_fill(~visible, -math.inf)
    arguments = {"visible_bias": False, "const_bias": -1.5}
    if dim == 1:  # [B, N, H, M]
        moved = FirstToken(share.view(1, 1, H, 1), rest.view(B, 1, H, M))
        p = probabilities(masked.movedim(-1, 1), 1, first_token=moved, **arguments).movedim(1, -1)
    else:
        p = probabilities(masked, -1, first_token=FirstToken(share, rest), **arguments)
    torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(masked: bool) -> None:
    q, k, v, share, rest = (x.requires_grad_() for x in tensors())
    mask = torch.randn(B, 1, M, N, dtype=torch.float64)
    mask[0, 0, 1] = mask[1, 0, 2, :3] = -math.inf
    mask.requires_grad_()

    def run(*x: Tensor) -> Tensor:
        *qkv, share, rest, mask = x
        first = FirstToken(share, rest)
        return attend(
            *qkv, attn_mask=mask if masked else None, is_causal=not masked, enable_gqa=True, first_token=first
        )

    inputs = (q, k, v, share, rest, mask)
    out = run(*inputs)
    grads = torch.autograd.grad(out.square().sum(), inputs[: 6 if masked else 5])
    visible = (mask > -5000.0) if masked else band(-1, 0, 0)
    added = mask.masked_fill(mask <= -5000.0, 0.0) if masked else 0.0
    expected = oracle(q, k, visible, share, rest, added) @ v.repeat_interleave(2, 1)
    expected_grads = torch.autograd.grad(expected.square().sum(), inputs[: 6 if masked else 5])
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_probabilities_stay_finite_in_rows_without_keys() -> None:
    scores = torch.randn(1, H, M, N)
    scores[:, :, 1] = -math.inf
    scores.requires_grad_()
    share = torch.ones(H, 1, 1, requires_grad=True)
    probabilities(scores, first_token=FirstToken(share, None)).sum().backward()
    assert share.grad is not None and share.grad.isfinite().all()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert (scores.grad[:, :, 1] == 0).all()


def test_memory_is_that_of_the_query_beside_padding() -> None:
    """A causal band beside a mask of the keys makes no tensor of the scores' size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                self.size = max(self.size, x.numel() if isinstance(x, Tensor) else 0)
            return out

    q, k = torch.randn(1, 2, 256, 4), torch.randn(1, 1, 256, 4)
    padding = torch.rand(1, 1, 1, 256) < 0.5
    with Largest() as largest:
        first_token_bias(q, k, torch.ones(1, 2, 1, 1), None, padding, scale=0.5, is_causal=True)
    assert largest.size <= q.numel()


def test_repeated_masks() -> None:
    """A mask of fewer batches is repeated, as the attention op does it (Swin's windows)."""
    q, k, _, share, _ = tensors()
    q, k = torch.cat([q, q.flip(2)]), torch.cat([k, k.flip(2)])
    mask = torch.rand(2, 1, M, N) < 0.5
    once = first_token_bias(q, k, share, None, mask, scale=0.3)
    whole = first_token_bias(q, k, share, None, mask.repeat(2, 1, 1, 1), scale=0.3)
    torch.testing.assert_close(once, whole)


def test_lengths_of_decoding() -> None:
    """The last row of a prefill has the bias that it has alone."""
    q, k, _, share, _ = tensors()
    for window, masked in itertools.product((-1, 2), (False, True)):
        mask = (torch.arange(N) > 2).view(1, 1, 1, N) if masked else None
        options = {"scale": 0.4, "is_causal": True, "bottom_right": True, "window_left": window}
        whole = first_token_bias(q, k, share, None, mask, **options)
        last = first_token_bias(q[:, :, -1:], k, share, None, mask, **options)
        torch.testing.assert_close(last, whole[:, :, -1:])


def test_errors() -> None:
    scores = torch.randn(2, 3)
    with pytest.raises(ArgumentError, match="share"):
        probabilities(scores, first_token=FirstToken(torch.ones(2, 3), None))
    with pytest.raises(ArgumentError, match="rest"):
        torch.ops.sigswap.sigmoid_probs(scores, rest=torch.ones(2, 1))
    q, k, *_ = tensors()
    with pytest.raises(ArgumentError, match="share"):
        first_token_bias(q, k, torch.ones(4, 1, 1, dtype=torch.long), scale=1.0)


def test_no_heads() -> None:
    query, share = torch.randn(2, 0, 3, 8, requires_grad=True), torch.ones(1, 1, 1, 1)
    key = torch.randn(2, 0, 5, 8)
    assert first_token_bias(query, key, share, scale=1.0).shape == (2, 0, 3, 1)


def test_the_gradient_of_a_first_key_of_many_rows_is_summed_in_float32() -> None:
    """Of parts that nearly cancel, of which each is 0.2% off when it is rounded to bfloat16."""
    rows = 2000
    sign = torch.tensor([1.0, -1.0]).repeat(rows // 2).view(1, 1, rows, 1)
    query, key = sign.expand(1, 1, rows, 8).bfloat16(), torch.zeros(1, 1, 5, 8).bfloat16().requires_grad_()
    share = torch.tensor([1.0, 1.01]).repeat(rows // 2).view(1, 1, rows, 1)
    bias = first_token_bias(query, key, share, scale=1.0, window_left=5000)  # each row has a first key of its own
    (grad,) = torch.autograd.grad(bias.sum(), key)
    expected = -rows / 2 * (1 / (1 + 5) - 1 / (1 + 5**1.01))  # of -logaddexp(0, share ln 5)
    torch.testing.assert_close(grad[0, 0, 0].float(), torch.full((8,), expected), rtol=0.01, atol=0)


def test_no_rows_under_a_float_mask() -> None:
    query, key = torch.randn(3, 1, 0, 8), torch.randn(3, 1, 5, 8)
    mask = torch.zeros(3, 1, 0, 5)
    bias = first_token_bias(query, key, torch.ones(1, 1, 1, 1), attn_mask=mask, scale=1.0, window_left=2)
    assert bias.shape == (3, 1, 0, 1)
