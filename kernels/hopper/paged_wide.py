"""Latent attention to keys in pages on Hopper GPUs, in Gluon, for many query heads.

What :mod:`sigswap.kernels.triton.paged` does of heads about 576 wide whose value is key's first 512 channels, by
:mod:`sigswap.kernels.hopper.decode_wide_warps`: products of 64 rows, which limit it, are twice as fast.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from sigswap.kernels.hopper.common import Tiles
from sigswap.kernels.hopper.decode_wide_warps import HALF, KEYS, REST, ROWS, attend_kernel
from sigswap.kernels.host.forms import ACCURATE
from sigswap.kernels.host.launch import Launch, describable
from sigswap.kernels.host.layout import Layout, contiguous_layout, layout_of
from sigswap.kernels.host.problem import MAX_PLANS, WIDEST_HEAD_DIM, WIDEST_VALUE_DIM, Problem, Signature
from sigswap.kernels.host.results import empty_output
from sigswap.kernels.host.tiles import limits_of
from sigswap.kernels.triton.pages import band_of_longest, places_for
from sigswap.kernels.triton.split_keys import MIN_KEYS, Parts, parts_of, splits_for

FEW_HEADS = 32
"""Query heads per key head up to which :mod:`sigswap.kernels.triton.paged` is faster, as
:data:`sigswap.kernels.hopper.decode_wide.FEW_ROWS` says."""


def supports(problem: Problem) -> bool:
    """Whether value is key's first channels, in half precision, without soft cap, with more than a few query heads for
    each key head, and pages are whole tiles of keys."""
    signature, options = problem.signature, problem.options
    if problem.pages is None or options.softcap > 0.0 or signature.element_size != 2:
        return False
    _, _, page_size, dim = signature.key.shape
    if signature.value.shape[3] != WIDEST_VALUE_DIM or not WIDEST_VALUE_DIM < dim <= WIDEST_HEAD_DIM:
        return False
    if not problem.value_is_of_key or page_size == 0 or page_size % KEYS or not describable(signature.key):
        return False
    many = signature.heads > FEW_HEADS * signature.kv_heads
    return many and limits_of(signature.device).capability == 90


def forward(problem: Problem, *, splits: int | None = None) -> Tensor:
    """Deterministic. splits: over how many programs the keys are split."""
    pages = problem.pages
    assert pages is not None
    out = empty_output(problem.query, problem.value) if problem.out is None else problem.out
    if problem.signature.is_empty or problem.key.shape[0] == 0 or pages.table.numel() == 0:
        return out.zero_()
    problem = problem.readable()  # key and value are: descriptors hold them
    query, key = problem.query, problem.key
    # A generated token makes no new plan: for how many keys there are at most, it need not be exact.
    longest_k = -(-pages.longest_k // MIN_KEYS) * MIN_KEYS
    plan = _plan(problem.signature, layout_of(out), layout_of(pages.table), pages.longest_q, longest_k, splits)
    partial, partial_sums = plan.parts.empty(out, None)
    given = partial, partial_sums, problem.bias, pages.table, pages.lengths, pages.cu_q
    plan.launch(key, key, query, *given)
    plan.parts.sum(partial, partial_sums, out, None)
    return out


class _Plan(NamedTuple):
    launch: Launch
    parts: Parts


@functools.lru_cache(MAX_PLANS)
def _plan(
    signature: Signature, out: Layout, table: Layout, longest_q: int, longest_k: int, splits: int | None
) -> _Plan:
    pages, kv_heads, page_size, _ = signature.key.shape
    sequences, columns = table.shape
    most_keys, device = columns * page_size, signature.device
    band, longest_k = band_of_longest(signature, longest_q, longest_k, most_keys)
    places = places_for(signature, sequences, longest_q, ROWS)
    programs = places.total * kv_heads
    if splits is None:
        splits = splits_for(programs, longest_k, limits_of(device).multiprocessors)
    parts = parts_of(signature, out, splits, sums=False)
    # How many keys a sequence has is not known, and hence not whether the fast form is good enough.
    form = ACCURATE if signature.mixed_forms else signature.form()
    arguments = signature.arguments(q=signature.query, o=parts.target)
    arguments |= band | {"q_len": longest_q, "FORM": form, "BOTTOM_RIGHT": True, "PAGE": page_size}
    arguments |= {"pages": pages, "most_keys": most_keys, "stride_table": table.strides[0], "sequences": sequences}
    arguments |= parts.arguments | {"ALIKE": places.alike, "ALONE": places.of_longest <= 1}
    arguments |= {"tiles": places.of_longest if places.alike else places.total}
    halves, rest = Tiles(signature.key, KEYS, HALF), Tiles(signature.key, KEYS, REST)
    # Whether the lengths are aligned does not matter: no thread loads two of them at once.
    lengths, ends = contiguous_layout((sequences,)), contiguous_layout((sequences + 1,))
    written = parts.target, parts.target_sums
    tensors = (halves, rest, signature.query, *written, signature.bias, table, lengths, ends)
    launch = Launch(attend_kernel, programs * splits, device, tensors, arguments, num_warps=4)
    return _Plan(launch, parts)
