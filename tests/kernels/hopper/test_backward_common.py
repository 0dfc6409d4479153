"""How the Gluon backwards get numbers of rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sigswap.kernels.hopper import backward_common
from sigswap.kernels.host.problem import Options, Problem


@pytest.mark.parametrize("rows", [4, 6])
@pytest.mark.parametrize("form", ["contiguous", "by rows", "unaligned"])
def test_delta_is_copied_only_where_descriptors_do_not_take_it(rows: int, form: str) -> None:
    query = torch.zeros(2, 3, rows, 64).bfloat16()
    delta = torch.arange(6.0 * rows + 1)[1 if form == "unaligned" else 0 :][: 6 * rows].view(2, 3, rows, 1)
    if form == "by rows":
        delta = delta.transpose(1, 2).contiguous().transpose(1, 2)
    problem = Problem(query, query, query, None, None, None, Options(1.0), row_delta=delta)
    layout, described = backward_common.deltas_for(problem.signature)
    read = backward_common.Deltas(layout, lambda tensor: tensor)(problem)
    assert torch.equal(read, delta[..., 0])
    assert (read.data_ptr() == delta.data_ptr()) == (form == "contiguous" and rows == 4)
    assert read.data_ptr() % 16 == 0 and read.stride() == layout.strides
    assert described.shape == (6, rows) and described.strides == ((rows + 3) // 4 * 4, 1)
