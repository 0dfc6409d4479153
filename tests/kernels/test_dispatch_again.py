"""What a problem that is known already launches is what the same problem launches when it is new. On any machine: the
launches are recorded, for an H100 that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sigswap.kernels import dispatch
from sigswap.kernels.hopper import backward
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.host.problem import Options, Problem
from sigswap.kernels.host.recording import recorded_by
from sigswap.kernels.triton import decode
from tests.support.h100 import pretended

SHAPES = {
    "one block": (2, 4, 4, 64, 64, 64),
    "some blocks": (2, 4, 4, 300, 280, 64),
    "grouped": (1, 4, 2, 70, 200, 32),
    "one row": (2, 4, 4, 1, 700, 64),
    "one row of many heads": (2, 160, 160, 1, 600, 32),
    "some rows of groups": (1, 8, 2, 3, 1500, 128),
    "long": (2, 16, 16, 1024, 1024, 64),
    "long and wide": (1, 16, 16, 1024, 1024, 128),
    "longer and wide": (1, 4, 4, 2048, 2048, 128),
    "long and narrow": (2, 16, 16, 1024, 1024, 32),
    "no rows": (2, 4, 4, 0, 64, 64),
}
OPTIONS = {
    "plain": Options(0.125),
    "causal": Options(0.125, is_causal=True),
    "a window": Options(0.125, window_left=100, window_right=0),
    "a soft cap": Options(0.125, softcap=4.0),
}
CAPPED = {"a row cap": Options(0.125, row_cap=0.5)}


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with pretended():
        yield


def tensors(name: str, seed: int, requires_grad: bool = False) -> list[Tensor]:
    batch, heads, kv_heads, rows, keys, dim = SHAPES[name]
    torch.manual_seed(seed)
    shapes = (batch, rows, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, dim)
    return [torch.randn(shape).bfloat16().transpose(1, 2) for shape in shapes]


def launches(run: Any, given: list[Tensor]) -> tuple[Any, list[Any]]:
    """The results, and what was launched: given tensors by their number, others by how they lie."""
    records: list[Any] = []

    def named(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        numbers = [index for index, tensor in enumerate(given) if tensor is argument]
        return ("given", *numbers) if numbers else ("new", layout_of(argument), argument.device)

    def record(kernel: Any, grid: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        records.append((kernel, grid, [named(argument) for argument in arguments], options))

    with recorded_by(record, descriptors=True):
        results = run(*given)
    return results, records


@pytest.mark.parametrize("options", OPTIONS | CAPPED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_forward_again_launches_the_same(shape: str, options: str) -> None:
    chosen = (OPTIONS | CAPPED)[options]

    def anew(*given: Tensor) -> Tensor:
        return dispatch.forward(Problem(*given, None, None, None, chosen))

    again = dispatch.forward_again(Problem(*tensors(shape, 0), None, None, None, chosen))
    for seed in (1, 2):
        given = tensors(shape, seed)
        (out, expected), (right, right_launches) = launches(again, given), launches(anew, given)
        assert expected == right_launches and (expected or out.numel() == 0)
        assert layout_of(out) == layout_of(right) and not any(out is each for each in given)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, True)])
def test_a_backward_again_launches_the_same(shape: str, options: str, needed: tuple[bool, ...]) -> None:
    chosen = OPTIONS[options]
    mask = *needed, False, False

    def problem(grad_out: Tensor, *given: Tensor) -> Problem:
        return Problem(*given, None, None, None, chosen, grad_out=grad_out, output_mask=mask)

    def given(seed: int) -> list[Tensor]:
        inputs = tensors(shape, seed)
        return [torch.ones_like(inputs[0]), *inputs]

    again = dispatch.backward_again(problem(*given(0)))
    for seed in (1, 2):
        inputs = given(seed)
        (grads, expected) = launches(again, inputs)
        right, right_launches = launches(lambda *each: dispatch.backward(problem(*each)), inputs)
        assert expected == right_launches and (expected or 0 in inputs[0].shape)
        assert [grad is not None for grad in grads] == list(mask) == [grad is not None for grad in right]
        pairs = zip(grads, right, strict=True)
        assert all(grad is None or layout_of(grad) == layout_of(other) for grad, other in pairs)


@pytest.mark.parametrize(
    ("shape", "number"), [("one row", 2), ("some rows of groups", 2), ("one row of many heads", 1)]
)
def test_decoding_goes_by_its_plan(shape: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by the choice of a kernel, for parts of the keys and their sum, and for all keys at once."""
    again = dispatch.forward_again(Problem(*tensors(shape, 0), None, None, None, Options(0.125)))
    monkeypatch.setattr(dispatch, "forward", None)
    (_, launched) = launches(again, tensors(shape, 1))
    assert len(launched) == number and launched[0][0] is decode._decode_kernel


@pytest.mark.parametrize("shape", ["long", "long and wide", "longer and wide"])
@pytest.mark.parametrize("options", ["plain", "causal"])
def test_long_backwards_go_by_their_plan(shape: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sums of dQ in a ring, and of all rows, which a second kernel puts in order."""
    inputs = tensors(shape, 0)
    problem = Problem(*inputs, None, None, None, OPTIONS[options], grad_out=inputs[0])
    problem.output_mask = True, True, True, False, False
    again = dispatch.backward_again(problem)
    monkeypatch.setattr(backward, "backward", None)
    (grads, launched) = launches(again, [inputs[0], *inputs])
    assert [each[0] is backward._kernel for each in launched] == (
        [True, False] if shape == "longer and wide" else [True]
    )
    assert [grad is None for grad in grads] == [False, False, False, True, True]


@pytest.mark.parametrize("strided", ["an input", "the output's gradient", "rows"])
def test_what_kernels_cannot_read_is_copied_again(strided: str) -> None:
    """And what they cannot write to is written elsewhere."""

    def given(seed: int) -> list[Tensor]:
        inputs = tensors("one block", seed)
        inputs = [torch.ones_like(inputs[0]), *inputs]
        place = 0 if strided == "the output's gradient" else 1
        if strided == "rows":
            inputs[3] = inputs[3][..., :12]
            inputs[0] = inputs[0][..., :12]
        else:
            inputs[place] = inputs[place].transpose(2, 3).contiguous().transpose(2, 3)
        return inputs

    def problem(grad_out: Tensor, *tensors: Tensor) -> Problem:
        mask = True, True, True, False, False
        return Problem(*tensors, None, None, None, Options(0.1), grad_out=grad_out, output_mask=mask)

    forward_again = dispatch.forward_again(Problem(*given(0)[1:], None, None, None, Options(0.1)))
    again = dispatch.backward_again(problem(*given(0)))
    inputs = given(1)
    new = launches(lambda *each: dispatch.forward(Problem(*each, None, None, None, Options(0.1))), inputs[1:])
    assert launches(forward_again, inputs[1:])[1] == new[1]
    assert launches(again, inputs)[1] == launches(lambda *each: dispatch.backward(problem(*each)), inputs)[1]


def test_the_device_of_the_tensors_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []

    class On:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.append(torch.device("meta"))

    given = tensors("one block", 1)
    again = dispatch.forward_again(Problem(*given, None, None, None, Options(0.1)))
    mask = True, True, True, False, False
    with_grad_out = Problem(*given, None, None, None, Options(0.1), grad_out=given[0], output_mask=mask)
    backward_again = dispatch.backward_again(with_grad_out)
    monkeypatch.setattr(dispatch, "_on", On)
    for run, inputs in ((again, given), (backward_again, [given[0], *given])):
        current.clear()
        launches(lambda *each, run=run: run(*each), inputs)
        assert current == [torch.device("cpu"), torch.device("meta")]
