"""Which form of the sigmoid a signature asks for, and which band."""

from __future__ import annotations

from typing import Any

import torch

from sigswap.kernels.host.forms import ACCURATE, CUBIC_TAIL, FAST, TAIL
from sigswap.kernels.host.problem import Band, Options, Packed, Problem


def test_forms_of_the_sigmoid_with_a_low_row_cap() -> None:
    """Never the fast one, which is inexact in rows of which all scores are low."""

    def forms(cap: float, keys: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[int, int]:
        query = torch.empty(1, 1, 4, 64, dtype=dtype, device="meta")
        key = torch.empty(1, 1, keys, 64, dtype=dtype, device="meta")
        bias = torch.empty(1, 1, 4, 1, dtype=dtype, device="meta") if options.pop("bias", False) else None
        signature = Problem(query, key, key, bias, None, None, Options(1.0, row_cap=cap, **options)).signature
        return signature.form(), signature.slow_form()

    window = {"window_left": 50, "is_causal": True, "bottom_right": True}
    assert forms(0.0, 2048) == (FAST, TAIL) == forms(0.1, 2048)
    assert forms(0.01, 2047) == (ACCURATE, ACCURATE) == forms(0.01, 4096, **window)
    assert forms(0.01, 2048) == (ACCURATE, TAIL) == forms(0.01, 2048, bias=True) == forms(0.01, 9999)
    assert forms(0.01, 2048, torch.float16) == (ACCURATE, CUBIC_TAIL)
    assert forms(0.01, 2048, torch.float32) == (ACCURATE, ACCURATE)


def test_bands_of_packed_sequences_are_no_wider_than_all_of_them() -> None:
    """Sums with them stay within int32, whatever was said to be the longest."""
    query = torch.empty(1, 1, 300, 64, device="meta")
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    for longest in (300, 2**31 - 1):
        options = Options(1.0, window_left=2**31 - 1, window_right=2**31 - 1)
        packed = Packed(cu, cu, longest, longest)
        signature = Problem(query, query, query, None, None, None, options, packed).signature
        assert signature.band() == Band(600, 600, True, True)
