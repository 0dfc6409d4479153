"""Which kernel runs: a new one is a file and a word in a list of kernels/dispatch.py."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sigswap
from sigswap.kernels import dispatch, reference, triton
from sigswap.kernels.host.blocks import all_blocks_of
from sigswap.kernels.host.problem import Options, Problem, problem_of
from sigswap.kernels.op import blocks, registration, varlen

TOY = '''
"""Attention over one key: its probability times its value."""

import torch

calls = []


def supports(problem):
    return problem.signature.kv_len == 1 and not problem.signature.options.is_causal


def probability(problem):
    options = problem.options
    return torch.sigmoid(problem.query @ problem.key.mT * options.scale + options.const_bias)


def forward(problem):
    calls.append("forward")
    return probability(problem) * problem.value


def backward(problem):
    calls.append("backward")
    p, scale = probability(problem), problem.options.scale
    grad_score = p * (1 - p) * (problem.grad_out @ problem.value.mT)
    grads = (
        scale * grad_score @ problem.key,
        scale * grad_score.mT @ problem.query,
        p.mT @ problem.grad_out,
        None,
        None,
    )
    return tuple(grad if needed else None for grad, needed in zip(grads, problem.output_mask))
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The file of a kernel in kernels/triton/, and its word, first in both lists; the lists run on the CPU here."""
    (tmp_path / "toy_of_a_test.py").write_text(TOY)
    monkeypatch.setattr(triton, "__path__", [*triton.__path__, str(tmp_path)])
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(dispatch, name, ("triton.toy_of_a_test", "reference"))
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: None)
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(registration, "implementation_for", lambda is_cuda: dispatch)
    module = dispatch._module("triton.toy_of_a_test")
    yield module
    del sys.modules[module.__name__]


def test_a_new_kernel_is_a_file_and_a_word(toy: ModuleType) -> None:
    query = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 3, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = sigswap.sigmoid_attention(query, key, value)
    torch.testing.assert_close(out, torch.sigmoid((query * key).sum(-1, keepdim=True) / 2) * value)
    assert torch.autograd.gradcheck(sigswap.sigmoid_attention, (query, key, value))
    assert {*toy.calls} == {"forward", "backward"}


def test_a_problem_that_it_does_not_support_goes_to_the_next(toy: ModuleType) -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64, requires_grad=True).unbind()
    out = sigswap.sigmoid_attention(query, key, value)
    out.sum().backward(inputs=[query])
    expected = torch.sigmoid(query @ key.mT / 2 - torch.tensor(6.0, dtype=torch.float64).log()) @ value
    torch.testing.assert_close(out, expected)
    assert toy.calls == []


@pytest.mark.parametrize(
    ("dtype", "columns", "of", "expected"),
    [
        (torch.bfloat16, 5, 5, True),
        (torch.float16, 20, 20, True),
        (torch.bfloat16, 8, 9, True),  # whole units, in rows that are none
        (torch.bfloat16, 8, 8, False),
        (torch.bfloat16, 24, 32, False),
        (torch.bfloat16, 33, 33, False),
        (torch.float32, 5, 5, False),
    ],
)
def test_which_values_are_narrow(dtype: torch.dtype, columns: int, of: int, expected: bool) -> None:
    query = torch.randn(1, 2, 7, 16, dtype=dtype)
    value = torch.randn(1, 2, 7, of, dtype=dtype)[..., :columns]
    problem = problem_of((query, query, value, None, None, None), Options(0.25))
    assert problem.signature.has_narrow_value is expected


@pytest.mark.parametrize(
    ("odd", "columns", "expected"), [(17, 8, True), (33, 24, True), (17, 64, False), (24, 8, False)]
)
@pytest.mark.parametrize("which", ["query", "key"])
def test_whole_values_are_narrow_beside_rows_of_query_or_key_that_are_not(
    which: str, odd: int, columns: int, expected: bool
) -> None:
    """Strides come in units only where all operands allow it."""
    whole, slim = torch.randn(1, 2, 7, 40).half()[..., :odd], torch.randn(1, 2, 7, odd).half()
    value = torch.randn(1, 2, 7, columns).half()
    query, key = (slim, whole) if which == "query" else (whole, slim)
    problem = problem_of((query, key, value, None, None, None), Options(0.25))
    assert problem.signature.has_narrow_value is expected
    seen = problem_of((whole, whole, value, None, None, None), Options(0.25))
    assert not seen.signature.has_narrow_value


def test_narrow_values_get_more_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole units of 16 bytes; the output is what it is, and lies as it lies, without them."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 7, 17).half(), torch.randn(2, 2, 17, 9).half().mT
    value = torch.randn(2, 2, 9, 5).half()
    problem = problem_of((query, key, value, None, None, None), Options(0.25, const_bias=-2.0, visible_bias=False))
    seen = []

    def chosen(names: tuple[str, ...], problem: Problem) -> ModuleType:
        seen.append(problem)
        return reference

    monkeypatch.setattr(dispatch, "chosen", chosen)
    out = dispatch.with_wider_value(problem)
    assert seen[0].value.shape == (2, 2, 9, 8) and not seen[0].signature.has_narrow_value
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.25 - 2.0
    expected = torch.sigmoid(scores) @ value.double().repeat_interleave(2, 1)
    assert (out.double() - expected).norm() / expected.norm() < 2e-3
    assert out.shape == (2, 4, 7, 5) and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", ["dense", "sums", "blocks", "packed"])
def test_every_op_copies_narrow_values_beside_odd_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches a kernel as it is."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 7, 17).half(), torch.randn(1, 2, 7, 17).half(), torch.randn(1, 2, 7, 8).half()
    seen = []

    def chosen(names: tuple[str, ...], problem: Problem) -> ModuleType:
        seen.append(problem.signature.has_narrow_value)
        return reference

    monkeypatch.setattr(dispatch, "chosen", chosen)
    monkeypatch.setattr(dispatch, "_on", lambda device: contextlib.nullcontext())
    options = Options(0.25, const_bias=-2.0, visible_bias=False, row_cap=1.0 if kind == "sums" else 0.0)
    sums = torch.full((1, 2, 7, 1), torch.nan) if kind == "sums" else None
    if kind == "packed":
        rows = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        lengths = torch.tensor([0, 7], dtype=torch.int32)
        out = varlen._forward(dispatch.forward, (*rows, None, lengths, lengths, None, 7, 7), options, None)
        out = out.transpose(0, 1)[None]
    elif kind == "blocks":
        mask = all_blocks_of(torch.ones(1, 1, 7, 7, dtype=torch.bool))
        out = blocks._forward(dispatch.forward, (query, key, value, None, *mask), options, None)
    else:
        out = dispatch.forward(problem_of((query, key, value, None, None, None), options, row_sums=sums))
    assert seen == [False]
    p = torch.sigmoid(query.double() @ key.double().mT * 0.25 - 2.0)
    expected = p @ value.double()
    if sums is not None:
        torch.testing.assert_close(sums.double(), p.sum(-1, keepdim=True), rtol=1e-3, atol=1e-3)
        expected = expected / p.sum(-1, keepdim=True).clamp(min=1.0)
    torch.testing.assert_close(out.double(), expected, rtol=5e-3, atol=5e-3)
