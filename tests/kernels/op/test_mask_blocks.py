"""The plan of a mask tensor: found once, again when the mask has changed, and gone with it."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sigswap.errors import ArgumentError
from sigswap.kernels.host.blocks import Blocks, dense_mask
from sigswap.kernels.op import mask_blocks
from sigswap.kernels.op.blocks import sigmoid_attention_blocks
from sigswap.kernels.op.mask_blocks import blocks_of_mask, pays


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that were looked at."""
    seen: list[Tensor] = []
    found = mask_blocks._found

    def look(mask: Tensor) -> Blocks:
        seen.append(mask.clone())
        return found(mask)

    monkeypatch.setattr(mask_blocks, "_found", look)
    return seen


def a_mask() -> Tensor:
    return torch.rand(2, 1, 150, 140) > 0.5


def assert_right(mask: Tensor) -> None:
    assert torch.equal(dense_mask(blocks_of_mask(mask), *mask.shape[2:]).expand_as(mask), mask)


def test_once_for_all_who_share_it(looks: list[Tensor]) -> None:
    mask = a_mask()
    assert blocks_of_mask(mask) is blocks_of_mask(mask)
    assert blocks_of_mask(mask.expand(2, 5, -1, -1)) is blocks_of_mask(mask)
    assert blocks_of_mask(mask[:, :, :, :]) is blocks_of_mask(mask)  # views come and go
    assert len(looks) == 1 and looks[0].shape == (2, 1, 150, 140)
    assert_right(mask)


def test_again_when_it_has_changed(looks: list[Tensor]) -> None:
    mask = a_mask()
    assert_right(mask)
    mask.logical_not_()
    assert_right(mask)
    mask[:, :, 4] = True
    assert_right(mask)
    mask[0].unsqueeze(0).zero_()  # by a view
    assert_right(mask)
    assert len(looks) == 4


def test_other_parts_of_one_tensor(looks: list[Tensor]) -> None:
    whole = torch.rand(2, 1, 150, 300) > 0.5
    for _ in range(2):
        assert_right(whole[..., :140])
        assert_right(whole[..., 140:280])
        assert_right(whole[1:, ..., :140])
        assert_right(whole.mT)


def test_it_goes_with_the_mask() -> None:
    mask = a_mask()
    held = weakref.ref(blocks_of_mask(mask).rows)
    assert held() is not None
    del mask
    gc.collect()
    assert held() is None


def test_inference_tensors_do_not_say_when_they_change(looks: list[Tensor]) -> None:
    with torch.inference_mode():
        mask = a_mask()
        assert_right(mask)
        mask.logical_not_()
        assert_right(mask)
    assert len(looks) == 2


def test_blocks_that_evaluation_found_are_trained_with() -> None:
    mask, query = a_mask()[..., :140, :], torch.randn(2, 1, 140, 8, requires_grad=True)
    with torch.inference_mode():
        blocks_of_mask(mask)
    out = sigmoid_attention_blocks(query, query, query, None, blocks_of_mask(mask), scale=0.3)
    (grad,) = torch.autograd.grad(out.sum(), query)
    same = query.detach().double().requires_grad_()
    probs = torch.sigmoid(0.3 * same @ same.mT - mask.sum(-1, keepdim=True).clamp(min=1).log()) * mask
    (expected,) = torch.autograd.grad((probs @ same).sum(), same)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["make_fx", "make_fx before dispatch", "torch.jit.trace"])
def test_a_program_that_is_written_down_finds_the_blocks_of_other_masks(by: str) -> None:
    def visible(mask: Tensor) -> Tensor:
        return blocks_of_mask(mask).visible + 0

    mask, other = a_mask(), a_mask()
    visible(mask)  # which remembers them
    if by == "torch.jit.trace":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.jit.trace(visible, (mask,), check_trace=False)
    else:
        program = make_fx(visible, pre_dispatch=by.endswith("dispatch"))(mask)
    assert torch.equal(program(other), other.sum(-1, dtype=torch.int32))


def test_no_gpu_no_plan() -> None:
    query = torch.randn(1, 16, 2048, 8, device="meta")
    mask = torch.ones(1, 1, 2048, 2048, dtype=torch.bool, device="meta")
    assert not pays(query, query, query, mask)


def test_op() -> None:
    torch.library.opcheck(torch.ops.sigswap.mask_blocks.default, (a_mask(),))
    compiled = torch.compile(lambda mask: blocks_of_mask(mask), fullgraph=True, backend="aot_eager")
    mask = a_mask()
    assert torch.equal(dense_mask(compiled(mask), 150, 140), mask)
    for wrong in (mask.float(), mask[0], mask[:, :, :0]):
        with pytest.raises(ArgumentError, match="mask must be bool"):
            torch.ops.sigswap.mask_blocks(wrong)


def test_vmap() -> None:
    masks = torch.rand(3, 1, 1, 150, 140) > 0.5
    found = torch.vmap(torch.ops.sigswap.mask_blocks.default)(masks)
    for index, mask in enumerate(masks):
        assert torch.equal(dense_mask(Blocks(*(each[index] for each in found)), 150, 140), mask)


def test_compiled_code_is_not_exported_code() -> None:
    class Tells(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if mask_blocks._is_exporting() else x

    zero = torch.zeros(1)
    for _ in range(2):
        assert torch.compile(Tells(), backend="eager", fullgraph=True)(zero) == 0
        for strict in (True, False):
            assert torch.export.export(Tells(), (zero,), strict=strict).module()(zero) == 1
    assert Tells()(zero) == 0
