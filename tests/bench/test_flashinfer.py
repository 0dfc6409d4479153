"""FlashInfer as a peer, whose package needs a GPU: modules in its place that have the package's parameters."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sigswap.bench.cells import Cell
from sigswap.bench.inputs import Inputs, make_inputs
from sigswap.bench.peers import find_peer
from sigswap.errors import BenchmarkError

DECODE = Cell("decode", 3, 4, 2, 1, 50, 16, 16)  # pages of 2, the largest part of 64 that divides 50
DECODE_64 = Cell("decode", 2, 8, 2, 1, 192, 16, 16)
PAGED = Cell("decode", 3, 4, 2, 1, 48, 16, 16, page_size=8)
FEATURES = dataclasses.replace(DECODE, suite="features")
LATENT = Cell("decode", 2, 4, 1, 1, 50, 576, 512, latent=True)
LATENT_PAGED = Cell("decode", 3, 4, 1, 1, 48, 576, 512, latent=True, page_size=16)


@dataclasses.dataclass
class Seen:
    """What the package was called with."""

    layouts: list[str] = dataclasses.field(default_factory=list)
    plans: int = 0
    runs: int = 0
    page_sizes: list[int] = dataclasses.field(default_factory=list)
    caches: list[Tensor] = dataclasses.field(default_factory=list)


def softmax(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Of query [heads, dim], key [keys, kv_heads, dim] and value [keys, kv_heads, value_dim], in float64."""
    group = query.shape[0] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = torch.einsum("hd,nhd->hn", query.double(), key) * scale
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), value)


def is_int32(*tensors: Tensor) -> bool:
    return all(tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous() for tensor in tensors)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The calls of both wrappers. Their parameters are those of flashinfer-python 0.7.4, and so is what they demand."""
    found = Seen()

    class Decode:
        def __init__(
            self,
            float_workspace_buffer: Tensor,
            kv_layout: str = "NHD",
            use_cuda_graph: bool = False,
            use_tensor_cores: bool = False,
            paged_kv_indptr_buffer: Tensor | None = None,
            paged_kv_indices_buffer: Tensor | None = None,
            paged_kv_last_page_len_buffer: Tensor | None = None,
            backend: str = "auto",
        ) -> None:
            assert is_workspace(float_workspace_buffer) and backend == "auto" and not use_cuda_graph
            assert kv_layout in ("NHD", "HND")
            self.layout, self.on_tensor_cores = kv_layout, use_tensor_cores
            found.layouts.append(kv_layout)

        def plan(
            self,
            indptr: Tensor,
            indices: Tensor,
            last_page_len: Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim: int,
            page_size: int,
            *,
            q_data_type: str | torch.dtype = "float16",
            kv_data_type: str | torch.dtype | None = None,
            sm_scale: float | None = None,
        ) -> None:
            assert is_int32(indptr, indices, last_page_len)
            self.pages = [indices[start:end].tolist() for start, end in itertools.pairwise(indptr.tolist())]
            self.last, self.page_size, self.scale = last_page_len.tolist(), page_size, sm_scale or head_dim**-0.5
            self.heads, self.dtypes = (num_qo_heads, num_kv_heads, head_dim), (q_data_type, kv_data_type or q_data_type)
            assert self.on_tensor_cores == (num_qo_heads // num_kv_heads >= 4)
            found.plans += 1
            found.page_sizes.append(page_size)

        def run(
            self,
            q: Tensor,
            paged_kv_cache: tuple[Tensor, Tensor],
            *args: Any,
            out: Tensor | None = None,
            return_lse: bool = False,
        ) -> Tensor:
            key, value = paged_kv_cache
            assert q.is_contiguous() and q.shape == (len(self.pages), self.heads[0], self.heads[2])
            assert (q.dtype, key.dtype, value.dtype) == (*self.dtypes, self.dtypes[1])
            # Of tensors with other strides it compiles another kernel, and vectors of 16 bytes have to be in rows.
            assert key.stride() == value.stride() and key.stride(-1) == 1
            found.runs += 1
            found.caches += [key, value]
            if self.layout == "HND":
                key, value = key.transpose(1, 2), value.transpose(1, 2)
            assert key.shape[1:] == value.shape[1:] == (self.page_size, *self.heads[1:])
            rows = [
                softmax(row, *(self.sequence(cache, number) for cache in (key, value)), self.scale)
                for number, row in enumerate(q)
            ]
            return torch.stack(rows).to(q.dtype)

        def sequence(self, cache: Tensor, number: int) -> Tensor:
            """[keys, heads, head_dim]."""
            whole = torch.cat([cache[page] for page in self.pages[number]])
            return whole[: len(whole) - self.page_size + self.last[number]]

    class Metadata:
        @classmethod
        def csr(cls, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor) -> Metadata:
            assert is_int32(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
            made = cls()
            made.rows, made.starts, made.indices, made.lengths = qo_indptr, kv_indptr, kv_indices, kv_len_arr
            return made

        rows: Tensor
        starts: Tensor
        indices: Tensor
        lengths: Tensor

    class Latent:
        def __init__(
            self,
            float_workspace_buffer: Tensor,
            use_cuda_graph: bool = False,
            qo_indptr: Tensor | None = None,
            kv_indptr: Tensor | None = None,
            kv_indices: Tensor | None = None,
            kv_len_arr: Tensor | None = None,
            backend: str = "auto",
        ) -> None:
            assert is_workspace(float_workspace_buffer) and backend == "auto" and not use_cuda_graph

        def plan(
            self,
            *,
            metadata: Metadata,
            num_heads: int,
            head_dim_ckv: int,
            head_dim_kpe: int,
            page_size: int,
            causal: bool,
            sm_scale: float,
            q_data_type: torch.dtype,
            kv_data_type: torch.dtype,
            query_layout: str = "packed",
            kv_cache_layout: str = "packed",
        ) -> None:
            assert not causal and query_layout == kv_cache_layout == "packed"
            batch = len(metadata.lengths)
            assert metadata.rows.tolist() == list(range(batch + 1))
            counts = metadata.starts[1:] - metadata.starts[:-1]
            assert counts.tolist() == [-(-length // page_size) for length in metadata.lengths.tolist()]
            self.metadata, self.page_size, self.scale = metadata, page_size, sm_scale
            self.shape, self.dtypes = (batch, num_heads, head_dim_ckv + head_dim_kpe), (q_data_type, kv_data_type)
            self.value_dim = head_dim_ckv
            assert head_dim_ckv % 128 == head_dim_kpe % 64 == 0
            found.plans += 1
            found.page_sizes.append(page_size)

        def run(
            self, *, query: Tensor, kv_cache: Tensor, out: Tensor | None = None, return_lse: bool = False
        ) -> Tensor:
            assert query.shape == self.shape and (query.dtype, kv_cache.dtype) == self.dtypes
            assert kv_cache.shape[1:] == (self.page_size, self.shape[-1]) and kv_cache.stride(-1) == 1
            found.runs += 1
            found.caches.append(kv_cache)
            rows = []
            for number, row in enumerate(query):
                start, end = self.metadata.starts[number : number + 2].tolist()
                pages = torch.cat([kv_cache[page] for page in self.metadata.indices[start:end].tolist()])
                key = pages[: int(self.metadata.lengths[number]), None]
                rows.append(softmax(row, key, key[..., : self.value_dim], self.scale))
            return torch.stack(rows).to(query.dtype)

    install(monkeypatch, "flashinfer")
    install(monkeypatch, "flashinfer.decode", BatchDecodeWithPagedKVCacheWrapper=Decode)
    install(monkeypatch, "flashinfer.mla", BatchMLAPagedAttentionWrapper=Latent, MLAPlanMetadata=Metadata)
    return found


def is_workspace(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.numel() == 128 * 2**20 and not tensor[::4096].any()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Callable[..., Any]) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def truth(cell: Cell, inputs: Inputs) -> Tensor:
    """[batch, heads, 1, value_dim]."""
    query, key, value = inputs.qkv
    rows = [
        softmax(query[number, :, 0], key[number].transpose(0, 1), value[number].transpose(0, 1), cell.head_dim**-0.5)
        for number in range(cell.batch)
    ]
    return torch.stack(rows)[:, :, None]


@pytest.mark.parametrize(
    ("cell", "layout", "page_size"),
    [
        (DECODE, "HND", 2),
        (DECODE_64, "HND", 64),
        (FEATURES, "HND", 2),
        (PAGED, "NHD", 8),
        (LATENT, None, 2),
        (LATENT_PAGED, None, 16),
    ],
    ids=lambda value: value.label if isinstance(value, Cell) else None,
)
def test_flashinfer_computes_softmax_attention(cell: Cell, layout: str | None, page_size: int, seen: Seen) -> None:
    inputs = make_inputs(cell, torch.bfloat16, "cpu")
    implementation = find_peer("flashinfer").implementation(cell, inputs)
    assert (seen.plans, seen.runs) == (1, 0)
    for count in (1, 2):
        out = implementation.forward()
        assert (seen.plans, seen.runs) == (1, count)  # planning is not timed
    assert out.shape == (cell.batch, cell.heads, 1, cell.value_dim) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), truth(cell, inputs), rtol=1e-2, atol=1e-2)
    assert seen.layouts == ([] if layout is None else [layout]) and seen.page_sizes == [page_size]
    if cell.page_size is None:  # the same memory: nothing is copied
        memory = {tensor.untyped_storage().data_ptr() for tensor in (inputs.key, inputs.value)}
        assert {cache.untyped_storage().data_ptr() for cache in seen.caches} == memory


@pytest.mark.parametrize(
    ("cell", "dtype", "reason"),
    [
        (Cell("features", 1, 2, 2, 8, 8, 64, 64), torch.bfloat16, "one query on cached keys"),
        (DECODE, torch.float32, "float16 or bfloat16"),
        (Cell("decode", 1, 2, 2, 1, 8, 128, 64), torch.bfloat16, "head_dim 128 with values of 64"),
        (Cell("decode", 1, 4, 2, 1, 8, 576, 512, latent=True), torch.bfloat16, "one head of keys"),
    ],
)
def test_flashinfer_says_which_cells_it_does_not_take(cell: Cell, dtype: torch.dtype, reason: str, seen: Seen) -> None:
    with pytest.raises(BenchmarkError, match=reason):
        find_peer("flashinfer").implementation(cell, make_inputs(cell, dtype, "cpu"))
    assert seen.plans == 0
