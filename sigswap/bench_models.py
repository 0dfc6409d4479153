"""The suite models of ``sigswap bench``: whole compiled models with sigmoid attention, beside the same with softmax.

A cell is a model with random weights and a batch. It is compiled once for each way of computing its softmax attention
(the peers), then converted in place and compiled with ``backend="sigswap"``. Each has the device to itself: Dynamo's
code is forgotten in between, so there are no turns as in the other suites. The optimizer's step is left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.bench_cells import DTYPES, MODELS, ModelCell
from sigswap.bench_results import Row
from sigswap.bench_timing import free, launched_kernels, peak_mib, refusals, repeated_ms
from sigswap.convert import convert
from sigswap.errors import BenchmarkError, SigswapError
from sigswap.sources import require

PHASES = ("forward", "training step")
QUANTITIES = ("time", "memory", "kernels")
TOLERANCE = 0.1
"""The relative error (Frobenius) of a compiled model's output to the eager one's above which it is wrong: rounding
adds up over many layers, and a wrong mask or bias in each of them changes more."""

_Figures = dict[tuple[str, str], float]  # by phase and quantity


@dataclasses.dataclass
class Subject:
    """A model and what is run on it.

    Attributes:
        model: In eval mode or not: that is set for each phase.
        inputs: Keyword arguments of a forward pass.
        training_inputs: Keyword arguments of the forward pass of a training step.
        output: The tensor that a forward pass is for, from what the model returns.
        backward: The backward pass, from what the model returns.
        peers: What to enter, while compiling and running, for the model to compute its attention in that way.
        counting: The peers that may count as the model without sigswap; the fastest one does.
        after_conversion: Restores what convert has changed beyond the attention.
    """

    model: nn.Module
    inputs: dict[str, Any]
    training_inputs: dict[str, Any]
    output: Callable[[Any], Tensor]
    backward: Callable[[Any], object]
    peers: Mapping[str, Callable[[], AbstractContextManager[Any]]]
    counting: tuple[str, ...]
    after_conversion: Callable[[], object] = lambda: None

    @property
    def leaves(self) -> list[Tensor]:
        """What a training step computes the gradients of."""
        tensors = (*self.model.parameters(), *self.training_inputs.values())
        return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


def measure(
    cell: ModelCell,
    dtype: str,
    peers: Sequence[str],
    left_out: Sequence[str] = (),
    *,
    device: str = "cuda",
    inner: str = "inductor",
    mode: str | None = None,
) -> list[Row]:
    """The cell's rows, one for each of ``PHASES`` and of ``QUANTITIES``.

    Only errors that leave the GPU unusable are raised; others become reasons.

    Args:
        cell: The model and the batch.
        dtype: Of the weights and of the activations; of ``DTYPES``.
        peers: Of the suite's.
        left_out: Those of the peers that are not measured, as they were not asked for.
        device: "cuda" or, for small cells, "cpu", where there is the time only.
        inner: The compiler, of sigswap's model and of the others.
        mode: Of torch.compile, with inductor. If it has CUDA graphs, which keep their memory, none is measured.
    """
    names = ("sigswap", *peers)
    try:
        subject = build(cell, DTYPES[dtype], device)
    except SigswapError as error:  # a package is missing
        reasons = dict.fromkeys(names, str(error))
        return [
            Row(cell, dtype, phase, {}, reasons, quantity, unavailable=True)
            for phase in PHASES
            for quantity in QUANTITIES
        ]
    figures: dict[str, _Figures] = {name: {} for name in names}
    refused: dict[str, dict[str, str]] = {phase: {} for phase in PHASES}  # by phase, then by implementation
    for peer in peers:
        if peer not in subject.peers:
            reason = f"{MODELS[cell.model]} has no such attention."
        elif peer in left_out:
            reason = "The model is compiled once more for it; --peers runs it."
        else:
            with refusals(peer, refused["forward"]), subject.peers[peer]():
                compiled = torch.compile(subject.model, backend=inner, mode=mode)
                figures[peer] = _phases(peer, subject, compiled, refused)
            continue
        for phase in PHASES:
            refused[phase][peer] = reason
    with refusals("sigswap", refused["forward"]):
        convert(subject.model, example_inputs=[subject.inputs, subject.training_inputs])
        subject.after_conversion()
        subject.model.eval()
        truth = subject.output(_forward(subject, subject.model))
        options = {"inner": inner} if mode is None else None  # torch.compile takes one of the two
        compiled = torch.compile(subject.model, backend="sigswap", options=options, mode=mode)
        figures["sigswap"] = _phases("sigswap", subject, compiled, refused, truth)
    if keeps_memory(mode):
        for quantities in figures.values():
            for phase in PHASES:
                quantities.pop((phase, "memory"), None)
    for name, reason in refused["forward"].items():
        refused["training step"].setdefault(name, reason)
    return [
        _row(cell, dtype, phase, quantity, figures, refused[phase], subject.counting)
        for phase in PHASES
        for quantity in QUANTITIES
    ]


def keeps_memory(mode: str | None) -> bool:
    """Whether what is compiled in this mode keeps the memory of its activations between two calls."""
    return mode is not None and bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))


def _row(
    cell: ModelCell,
    dtype: str,
    phase: str,
    quantity: str,
    figures: Mapping[str, _Figures],
    refused: Mapping[str, str],
    counting: Sequence[str],
) -> Row:
    """``original`` is the fastest in this phase, in the rows of memory and kernels as well."""
    times = {name: figures[name][phase, "time"] for name in counting if (phase, "time") in figures.get(name, {})}
    original = min(times, key=times.__getitem__, default=None)
    measured = {name: found[phase, quantity] for name, found in figures.items() if (phase, quantity) in found}
    needed = "This needs a GPU, its profiler, and for memory a mode without CUDA graphs."
    absent = dict.fromkeys((name for name in figures if name not in {*measured, *refused}), needed)
    return Row(cell, dtype, phase, measured, {**refused, **absent}, quantity, original, unavailable=bool(absent))


# Measuring.


def _phases(
    name: str,
    subject: Subject,
    compiled: Callable[..., Any],
    refused: dict[str, dict[str, str]],
    truth: Tensor | None = None,
) -> _Figures:
    """The figures of a compiled model, up to the first phase that fails; the error goes into ``refused``."""
    figures: _Figures = {}
    with _fresh_compiler():
        for phase in PHASES:
            with refusals(name, refused[phase]):
                figures.update(_phase(phase, subject, compiled, truth))
            if name in refused[phase]:
                break
    return figures


def _phase(phase: str, subject: Subject, compiled: Callable[..., Any], truth: Tensor | None) -> _Figures:
    """``truth``: what a forward pass must compute, if that is known."""
    training = phase == "training step"
    subject.model.train(training)
    if training:  # these calls also compile and tune
        _check_gradients(subject, compiled)
    else:
        _check_output(subject.output(_forward(subject, compiled)), truth)
    call = functools.partial(_step if training else _forward, subject, compiled)
    for _ in range(2):
        call()
    figures = {(phase, "time"): repeated_ms(call)}
    if next(subject.model.parameters()).is_cuda:
        figures[phase, "memory"] = peak_mib(call)
        kernels = launched_kernels(call)
        if kernels:  # none: the profiler does not work on this machine
            figures[phase, "kernels"] = float(kernels)
    return figures


@torch.no_grad()
def _forward(subject: Subject, compiled: Callable[..., Any]) -> Any:
    return compiled(**subject.inputs)


def _step(subject: Subject, compiled: Callable[..., Any]) -> None:
    subject.backward(compiled(**subject.training_inputs))
    _drop_gradients(subject)


def _drop_gradients(subject: Subject) -> None:
    for leaf in subject.leaves:
        leaf.grad = None


def _check_gradients(subject: Subject, compiled: Callable[..., Any]) -> None:
    """Raises BenchmarkError unless a training step gives gradients, and all are finite."""
    try:
        subject.backward(compiled(**subject.training_inputs))
        grads = [leaf.grad for leaf in subject.leaves if leaf.grad is not None]
        if not grads or not all(grad.isfinite().all() for grad in grads):
            raise BenchmarkError("wrong result: not all gradients are finite, or there are none")
    finally:
        _drop_gradients(subject)


@torch.no_grad()
def _check_output(output: Tensor, truth: Tensor | None) -> None:
    """Raises BenchmarkError unless the output is finite and, but for rounding, the ``truth``, if that is known."""
    if not output.isfinite().all():
        raise BenchmarkError("wrong result: not all outputs are finite")
    if truth is not None:
        error = ((output.float() - truth.float()).norm() / truth.float().norm()).item()
        if not error <= TOLERANCE:
            raise BenchmarkError(f"wrong result: the relative error of the compiled model's output is {error:.2g}")


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Nothing that was compiled for another backend of ``scaled_dot_product_attention`` is used again.

    Neither Dynamo's guards nor the key of AOTAutograd's cache have to tell these backends apart. Inductor's own cache
    may stay on: its graphs have the backend's operator in them.
    """
    import torch._functorch.config

    free()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    free()


# Models.


def build(cell: ModelCell, dtype: torch.dtype, device: str) -> Subject:
    """The cell's model and batch; both are the same in each run.

    Raises:
        SigswapError: The package that has the model is not installed.
    """
    torch.manual_seed(0)
    with torch.device(device):
        return _BUILDERS[cell.model](cell, dtype)


class Block(nn.Module):
    """A pre-norm transformer block with QK-norm, rotary embeddings and LayerScale; causal."""

    cos: Tensor  # [length, head_dim / 2], as is sin
    sin: Tensor

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        head_dim = dim // heads
        self.head_dim = head_dim
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.attention_scale = nn.Parameter(torch.full((dim,), 0.1))
        self.mlp_norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        self.mlp_scale = nn.Parameter(torch.full((dim,), 0.1))
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(length), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [batch, length, dim], and so is the result."""
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, head_dim]
        query, key = self._rotate(self.query_norm(query)), self._rotate(self.key_norm(key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_scale * self.out(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp_scale * self.down(F.gelu(self.up(self.mlp_norm(x))))

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos, self.sin
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _block(cell: ModelCell, dtype: torch.dtype) -> Subject:
    dim, heads = (64, 2) if cell.small else (2048, 16)
    model = Block(dim, heads, cell.length).to(dtype)
    x, grad_out = (torch.randn(cell.batch, cell.length, dim, dtype=dtype) for _ in range(2))
    return Subject(
        model,
        inputs={"x": x},
        training_inputs={"x": x.clone().requires_grad_()},  # from the block before it
        output=lambda returned: returned,
        backward=lambda returned: returned.backward(grad_out),
        peers=_SDPA,
        counting=tuple(_SDPA),
    )


def _vit(cell: ModelCell, dtype: torch.dtype) -> Subject:
    small = {"img_size": cell.length, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = _timm("vit_base_patch16_224", small if cell.small else {})
    return _on_images(model.to(dtype), cell, dtype, _SDPA, tuple(_SDPA))


def _swin(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """Without stochastic depth, so that each run computes the same. What counts is timm's default, which is unfused."""
    sizes: dict[str, Any] = {"drop_path_rate": 0.0}
    if cell.small:
        sizes.update(img_size=cell.length, embed_dim=32, depths=(2,), num_heads=(2,), num_classes=10)
    model = _timm("swin_tiny_patch4_window7_224", sizes)
    owners = [module for module in model.modules() if hasattr(module, "fused_attn")]
    fused = owners[0].fused_attn
    peers = {"unfused": lambda: _fused(owners, False), "sdpa": lambda: _fused(owners, True)}
    return _on_images(model.to(dtype), cell, dtype, peers, ("sdpa" if fused else "unfused",))


def _timm(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    return require("timm", "vision").create_model(name, **sizes)


def _on_images(
    model: nn.Module,
    cell: ModelCell,
    dtype: torch.dtype,
    peers: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    counting: tuple[str, ...],
) -> Subject:
    """A classifier of images."""
    images = {"x": torch.randn(cell.batch, 3, cell.length, cell.length, dtype=dtype)}
    labels = torch.arange(cell.batch) % 10
    return Subject(
        model,
        inputs=images,
        training_inputs=images,
        output=lambda returned: returned,
        backward=lambda returned: F.cross_entropy(returned, labels).backward(),
        peers=peers,
        counting=counting,
    )


@contextmanager
def _fused(owners: Sequence[Any], fused: bool) -> Iterator[None]:
    """Tells timm's attention modules to use ``scaled_dot_product_attention``, or not to."""
    before = [owner.fused_attn for owner in owners]
    for owner in owners:
        owner.fused_attn = fused
    try:
        yield
    finally:
        for owner, was in zip(owners, before, strict=True):
            owner.fused_attn = was


def _llama(cell: ModelCell, dtype: torch.dtype) -> Subject:
    transformers = require("transformers", "hf")
    sizes = {
        "hidden_size": 64 if cell.small else 2048,
        "num_hidden_layers": 1 if cell.small else 16,
        "num_attention_heads": 4 if cell.small else 32,
        "num_key_value_heads": 2 if cell.small else 8,
        "head_dim": 16 if cell.small else 64,
        "intermediate_size": 128 if cell.small else 8192,
        "vocab_size": 128 if cell.small else 32000,
        "max_position_embeddings": cell.length,
    }
    config = transformers.LlamaConfig(**sizes)
    # Not .to(dtype), which would round the frequencies of the rotary embeddings.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    tokens = torch.randint(config.vocab_size, (cell.batch, cell.length))
    subject = Subject(
        model,
        inputs={"input_ids": tokens, "use_cache": False},
        training_inputs={"input_ids": tokens, "labels": tokens, "use_cache": False},
        output=lambda returned: returned.logits,
        backward=lambda returned: returned.loss.backward(),
        peers=_SDPA,
        counting=tuple(_SDPA),
    )
    if cell.model == "llama-no-mask":
        subject.after_conversion = lambda: _leave_out_mask(model)  # convert sets the implementation to sdpa
        subject.after_conversion()
    return subject


def _leave_out_mask(model: Any) -> None:
    """Transformers makes no mask for an attention implementation that it has no mask function for."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    model.set_attn_implementation("sdpa_without_mask")


def _t5(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """Without dropout, so that each run computes the same."""
    transformers = require("transformers", "hf")
    config = transformers.T5Config(
        d_model=64 if cell.small else 768,
        d_kv=16 if cell.small else 64,
        d_ff=128 if cell.small else 3072,
        num_layers=1 if cell.small else 12,
        num_heads=4 if cell.small else 12,
        vocab_size=128 if cell.small else 32128,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    source, target = torch.randint(1, config.vocab_size, (2, cell.batch, cell.length))
    peers = {"unfused": lambda: _attention(model, "eager"), "sdpa": lambda: _attention(model, "sdpa")}
    return Subject(
        model,
        inputs={"input_ids": source, "decoder_input_ids": target, "use_cache": False},
        training_inputs={"input_ids": source, "labels": target, "use_cache": False},
        output=lambda returned: returned.logits,
        backward=lambda returned: returned.loss.backward(),
        peers=peers,
        counting=tuple(peers),
    )


@contextmanager
def _attention(model: Any, implementation: str) -> Iterator[None]:
    """Sets the attention implementation of a transformers model, and of its parts, for a while."""
    parts = [part for part in model.modules() if hasattr(part, "set_attn_implementation")]
    before = [part.config._attn_implementation for part in parts]
    try:
        for part in parts:
            part.set_attn_implementation(implementation)
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.set_attn_implementation(own)


def _sdpa_backend(name: str) -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, name))


_SDPA: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "fa2": functools.partial(_sdpa_backend, "FLASH_ATTENTION"),
    "cudnn": functools.partial(_sdpa_backend, "CUDNN_ATTENTION"),
    "efficient": functools.partial(_sdpa_backend, "EFFICIENT_ATTENTION"),
    "sdpa": nullcontext,
}
_BUILDERS: dict[str, Callable[[ModelCell, torch.dtype], Subject]] = {
    "block": _block,
    "vit": _vit,
    "llama": _llama,
    "llama-no-mask": _llama,
    "swin": _swin,
    "t5": _t5,
}
