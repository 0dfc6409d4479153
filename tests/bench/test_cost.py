"""The model of cost: what it predicts follows from its numbers. (That its bytes are those counted: test_traffic.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from sigswap.bench.distributed.cost import Attention, Machine, predict, predictions, table


def test_flops_are_those_of_the_visible_half() -> None:
    attention = Attention(tokens=64, ranks=4, heads=8, kv_heads=2, head_dim=16)
    assert 4 * attention.forward_flops == 4 * 8 * 16 * 64 * 64 / 2


def test_the_form_is_that_of_context_parallel() -> None:
    assert Attention(8192, 4, 8, 8, 64).form == "all_to_all"
    assert Attention(8192, 2, 8, 8, 64).form == "ring"  # 4,096 rows
    assert Attention(8192, 4, 8, 2, 64).form == "ring"  # whose keys are few
    assert Attention(8192, 16, 8, 8, 64).form == "ring"  # which do not divide the heads


def test_a_long_sequence_hides_what_is_sent() -> None:
    machine = Machine()
    shares = [predict(Attention(tokens, 8, 32, 8, 128), machine).share for tokens in (2**14, 2**17, 2**20)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.01
    alone = predict(Attention(8192, 1, 32, 8, 128), machine)
    assert alone.exposed == 0
    halved = predict(Attention(8192, 2, 32, 8, 128), machine)
    assert halved.compute == pytest.approx(alone.compute / 2)
    slow = predict(Attention(8192, 2, 32, 8, 128), Machine(near=1e6))  # as if nothing were computed meanwhile
    bytes_ = Attention(8192, 2, 32, 8, 128).block
    assert slow.exposed == pytest.approx(4 * bytes_ / 1e6, rel=0.01)


def test_the_table() -> None:
    lines = table(predictions()).splitlines()
    assert len(lines) == 2 + 9
    assert table(predictions()) in (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    assert lines[2].startswith("| 8,192 | 8 | ring |") and lines[-1].startswith("| 1,048,576 | 1,024 |")
