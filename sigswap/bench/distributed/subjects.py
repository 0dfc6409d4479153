"""What is run in the cells of the suite distributed: a step, forward and backward, with each kind of attention."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sigswap.api import convert
from sigswap.bench.distributed import softmax_ring
from sigswap.bench.distributed.cells import Cell
from sigswap.bench.peers.sdpa import BACKENDS
from sigswap.distributed.context import context_parallel
from sigswap.distributed.heads import shard_heads
from sigswap.errors import BenchmarkError
from sigswap.functional.attention import sigmoid_attention
from sigswap.optional import require
from sigswap.sequence.layout import Layout

TOLERANCE = 2e-2
"""The relative error above which a result is wrong."""


class Way(NamedTuple):
    """One kind of attention in a cell.

    Attributes:
        step: Forward and backward; a collective call.
        context: What to enter for it; a collective call, too.
        alone: The same work by one process, without the others; None: there is none.
        check: Raises BenchmarkError if the result is wrong; a collective call.
    """

    step: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    alone: Callable[[], object] | None = None
    check: Callable[[], None] = lambda: None


def ways(cell: Cell, mesh: DeviceMesh, dtype: torch.dtype) -> dict[str, Callable[[], Way]]:
    """By name, what makes each way; sigswap's first, and then softmax attention by its backends."""
    if cell.parallel == "context":
        return _context(cell, mesh, dtype)
    names = ("fa2", "cudnn") if mesh.device_type == "cuda" else ("sdpa",)
    softmax = functools.cache(lambda: _models(cell, mesh, dtype, converted=False))
    sigmoid = functools.cache(lambda: _models(cell, mesh, dtype, converted=True))
    made: dict[str, Callable[[], Way]] = {"sigswap": lambda: _way(cell, mesh, *sigmoid(), nullcontext)}
    for name in names:
        made[name] = functools.partial(lambda backend: _way(cell, mesh, *softmax(), backend), BACKENDS[name])
    return made


# Models.


def _models(cell: Cell, mesh: DeviceMesh, dtype: torch.dtype, *, converted: bool) -> tuple[Any, Any]:
    """The model whole, and spread."""
    transformers = require("transformers", "hf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=cell.heads * cell.head_dim,
        num_hidden_layers=cell.layers,
        num_attention_heads=cell.heads,
        num_key_value_heads=cell.kv_heads,
        head_dim=cell.head_dim,
        intermediate_size=cell.intermediate,
        vocab_size=cell.vocabulary,
        max_position_embeddings=cell.length,
        pad_token_id=0,
    )
    with torch.device(_device(mesh)):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if converted:
        convert(model)
    spread = copy.deepcopy(model)
    if cell.parallel == "data":
        return model, _sharded(spread, mesh)
    return model, _divided(spread, mesh, converted)


def _sharded(model: Any, mesh: DeviceMesh) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _divided(model: Any, mesh: DeviceMesh, converted: bool) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns = [*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj"]
    rows = ["self_attn.o_proj", "mlp.down_proj"]
    for layer in model.model.layers:
        styles: dict[str, Any] = {name: ColwiseParallel() for name in columns}
        styles |= {name: RowwiseParallel() for name in rows}
        parallelize_module(layer, mesh, styles)
    return shard_heads(model) if converted else model


def _way(cell: Cell, mesh: DeviceMesh, whole: Any, spread: Any, context: Callable[[], Any]) -> Way:
    generator = torch.Generator().manual_seed(mesh.get_local_rank() if cell.parallel == "data" else 0)
    ids = torch.randint(1, cell.vocabulary, (1, cell.length), generator=generator).to(_device(mesh))
    alone = functools.partial(_train, whole, ids) if cell.parallel == "data" else None
    return Way(functools.partial(_train, spread, ids), context, alone, lambda: _check_losses(whole, spread, ids))


def _train(model: nn.Module, ids: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def _check_losses(whole: Any, spread: Any, ids: Tensor) -> None:
    expected, found = (float(model(input_ids=ids, labels=ids, use_cache=False).loss) for model in (whole, spread))
    if not abs(found - expected) <= TOLERANCE * abs(expected):
        raise BenchmarkError(f"the loss of the model on all ranks is {found}, that of one process {expected}.")


# Attention alone.


def _context(cell: Cell, mesh: DeviceMesh, dtype: torch.dtype) -> dict[str, Callable[[], Way]]:
    tensors = functools.cache(lambda: _part(cell, mesh, dtype))
    made: dict[str, Callable[[], Way]] = {"sigswap ring": lambda: _own(cell, mesh, tensors(), "ring")}
    if cell.kv_heads % mesh.size() == 0:
        made["sigswap all_to_all"] = lambda: _own(cell, mesh, tensors(), "all_to_all")
    if mesh.device_type != "cuda":
        made["softmax ring"] = lambda: Way(
            _step(functools.partial(softmax_ring.causal_attention_on_cpu, mesh=mesh), tensors())
        )
        return made
    for backend in softmax_ring.BACKENDS:
        for rotation in softmax_ring.ROTATIONS:
            context = functools.partial(softmax_ring.of_context_parallel, mesh, backend, rotation)
            made[f"{backend} {rotation}"] = functools.partial(
                lambda context: Way(_step(softmax_ring.causal_attention, tensors()), context), context
            )
    return made


def _part(cell: Cell, mesh: DeviceMesh, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and the gradient of the output, of this rank, stored as models store them: [B, N, H, D]."""
    device, length = _device(mesh), cell.length // mesh.size()
    generator = torch.Generator(device).manual_seed(1 + mesh.get_local_rank())
    sizes = (cell.heads, cell.kv_heads, cell.kv_heads, cell.heads)
    made = [
        torch.randn(1, length, heads, cell.head_dim, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        for heads in sizes
    ]
    return [each.requires_grad_() for each in made[:3]] + made[3:]


def _step(attention: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    *qkv, grad = tensors

    def step() -> list[Tensor]:
        out = attention(*qkv)
        return [out.detach(), *torch.autograd.grad(out, qkv, grad)]

    return step


def _own(cell: Cell, mesh: DeviceMesh, tensors: list[Tensor], form: Any) -> Way:
    attention = functools.partial(sigmoid_attention, is_causal=True, enable_gqa=cell.heads != cell.kv_heads)
    step = _step(attention, tensors)
    context = functools.partial(context_parallel, mesh, form=form)
    return Way(step, context, check=lambda: _check_attention(cell, mesh, tensors, step()))


def _check_attention(cell: Cell, mesh: DeviceMesh, tensors: list[Tensor], found: list[Tensor]) -> None:
    """The first head's output and gradients of some positions, computed from the whole sequence in float64."""
    layout = Layout(cell.length // mesh.size(), mesh.size(), True)
    query, key, value, grad = (_whole(each[0, 0].detach(), mesh, layout) for each in tensors)
    group = cell.heads // cell.kv_heads
    scale, device = cell.head_dim**-0.5, query.device
    chunks = layout.chunks(mesh.get_local_rank())
    for chunk in chunks:
        for position in {chunk.start, (chunk.start + chunk.stop) // 2, chunk.stop - 1}:
            at = chunk.at + position - chunk.start
            keys, values = key[: position + 1].double(), value[: position + 1].double()
            p = torch.sigmoid(keys @ query[position].double() * scale - torch.tensor(position + 1.0).log())
            slope = p * (1 - p) * (values @ grad[position].double())
            _compare("output", found[0][0, 0, at], p @ values)
            _compare("gradient of query", found[1][0, 0, at], scale * (slope @ keys))
            if group > 1:
                continue  # then the key's gradient is of several heads
            later = torch.arange(position, cell.length, device=device)
            p = torch.sigmoid(query[position:].double() @ key[position].double() * scale - (later + 1).double().log())
            gradients = grad[position:].double()
            slope = p * (1 - p) * (gradients @ value[position].double())
            _compare("gradient of key", found[2][0, 0, at], scale * (slope @ query[position:].double()))
            _compare("gradient of value", found[3][0, 0, at], p @ gradients)


def _compare(name: str, found: Tensor, expected: Tensor) -> None:
    error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-12))
    if not error <= TOLERANCE:
        raise BenchmarkError(f"the {name} is wrong: its relative error is {error:.3g}.")


def _whole(part: Tensor, mesh: DeviceMesh, layout: Layout) -> Tensor:
    """[N, D] of all ranks' [M, D], in the sequence's order."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(layout.ranks)]
    dist.all_gather(parts, part, group=mesh.get_group())
    whole = part.new_empty((layout.total, part.shape[1]))
    for rank, theirs in enumerate(parts):
        for start, stop, at in layout.chunks(rank):
            whole[start:stop] = theirs[at : at + stop - start]
    return whole


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def entered(way: Way) -> ExitStack:
    """With its context open."""
    stack = ExitStack()
    stack.enter_context(way.context())
    return stack
