"""The registered ops: schemas, argument checks, fake implementations, autograd, autocast and dispatch.

Three ops, all of them pure functions (``torch.ops.sigswap`` holds them):

- ``sigmoid_attention``: query, key and value to the output, without the scores in memory.
- ``sigmoid_attention_backward``: its gradients. It has no derivative of its own; asking for one is an error.
- ``sigmoid_probs``: for models that compute their own scores: scores to probabilities. A composite op: one
  node in a graph of Dynamo's, and decomposed below autograd, so that inductor fuses it.

Every device runs :mod:`sigswap.kernels.reference`, but for CUDA, which runs :mod:`sigswap.kernels.dispatch`: Triton
kernels. They are imported at the first call; this module imports no Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sigswap.errors import ArgumentError, SigswapError
from sigswap.kernels import MASKED_SCORE, reference

_OPTIONS = (
    "float scale, float const_bias=0.0, bool visible_bias=True, bool is_causal=False, bool bottom_right=False, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, float dropout_p=0.0"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? bias=None, Tensor? attn_mask=None, Tensor? seed=None"
_AUTOCAST_DEVICES = ("CPU", "CUDA", "XPU", "MPS")

_library = torch.library.Library("sigswap", "DEF")
_library.define(f"sigmoid_attention({_INPUTS}, *, {_OPTIONS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "sigmoid_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    f"Tensor? attn_mask, Tensor? seed, bool[5] output_mask, *, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "sigmoid_probs(Tensor scores, Tensor? bias=None, int dim=-1, bool visible_bias=True, float const_bias=0.0) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sigmoid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    scale: float,
    const_bias: float = 0.0,
    visible_bias: bool = True,
    is_causal: bool = False,
    bottom_right: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Sigmoid attention; :mod:`sigswap.kernels.reference` has the formulas.

    Under autocast query, key and value are cast to its dtype, as those of softmax attention are.

    Args:
        query: [B, H, M, D], any strides, as all inputs.
        key: [B, Hk, N, D]; query head h uses key head h // (H / Hk).
        value: [B, Hk, N, Dv].
        bias: Row bias, floating point, [B|1, H|1, M|1, 1]; has a gradient.
        attn_mask: [B|1, H|1, M|1, N|1]. Bool: True is visible. Floating point: added to the scores, and
            values at or below ``MASKED_SCORE`` are masked; has a gradient.
        seed: int64, one element; dropout draws from it. Needed if dropout_p > 0, else ignored.
        scale: Multiplies the scores.
        const_bias: Added to the bias of every row.
        visible_bias: Adds -ln(visible keys) to the bias of each row.
        is_causal: Row i sees key j only if j <= i, or if ``bottom_right`` j <= i + N - M.
        bottom_right: Aligns the causal mask and the window so that the last row is at the last key.
        window_left: Row i sees key j only if j >= i - window_left (i + N - M if bottom_right); -1: no limit.
        window_right: Row i sees key j only if j <= i + window_right, likewise; -1: no limit.
        softcap: If positive, scores become softcap * tanh(scores / softcap), before masks and bias.
        dropout_p: The probability that an attention probability is dropped, in [0, 1].

    Returns:
        [B, H, M, Dv] of query's dtype, stored as [B, M, H, Dv]. Rows that see no key are 0.

    Raises:
        ArgumentError: A shape, dtype, device or value is not as above.
    """
    return torch.ops.sigswap.sigmoid_attention.default(
        query,
        key,
        value,
        bias,
        attn_mask,
        seed,
        scale=scale,
        const_bias=const_bias,
        visible_bias=visible_bias,
        is_causal=is_causal,
        bottom_right=bottom_right,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        dropout_p=dropout_p,
    )


def sigmoid_probs(
    scores: Tensor,
    bias: Tensor | None = None,
    dim: int = -1,
    visible_bias: bool = True,
    const_bias: float = 0.0,
) -> Tensor:
    """Attention probabilities from scores that a model computed and masked: the counterpart of softmax.

    ``p = sigmoid(score + const_bias - [ln n] + bias)``, exactly 0 where a score is masked (at or below
    ``MASKED_SCORE``); n is the number of scores along ``dim`` that are not, at least 1. NaN stays NaN.
    Half precision is computed in float32. Under autocast on CUDA the result is float32, as softmax's is.

    Args:
        scores: Floating point, any shape.
        bias: Broadcasts to scores, with size 1 in ``dim``; has a gradient.
        dim: The dimension of the keys.
        visible_bias: Adds -ln n.
        const_bias: Added to every score.

    Returns:
        Of scores' shape and dtype.
    """
    return torch.ops.sigswap.sigmoid_probs.default(scores, bias, dim, visible_bias, const_bias)


# Checks. On shapes, dtypes, devices and plain numbers alone: no tensor's values are read.


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: reference.Options,
) -> None:
    """Raises ArgumentError unless the arguments of sigmoid_attention are as its docstring says."""
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise ArgumentError(
            "query, key and value must be [batch, heads, length, head_dim], "
            f"not {_shape(query)}, {_shape(key)} and {_shape(value)}."
        )
    batch, heads, q_len, head_dim = query.shape
    _, kv_heads, kv_len, _ = key.shape
    dtype, device = query.dtype, query.device
    if not dtype.is_floating_point:
        raise ArgumentError(f"query must be floating point, not {dtype}.")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise ArgumentError(f"{name} must have query's dtype {dtype}, not {tensor.dtype}.")
        if tensor.device != device:
            raise ArgumentError(f"{name} must be on query's device {device}, not {tensor.device}.")
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ArgumentError(f"key {_shape(key)} must have the batch size and the head_dim of query {_shape(query)}.")
    if value.shape[0] != batch or value.shape[1] != kv_heads or value.shape[2] != kv_len:
        raise ArgumentError(f"value {_shape(value)} must have the batch size, heads and length of key {_shape(key)}.")
    if head_dim == 0:
        raise ArgumentError(f"query {_shape(query)} has head_dim 0.")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise ArgumentError(
            f"query has {heads} heads, which is not a multiple of the {kv_heads} heads of key and value."
        )
    if bias is not None:
        _check_broadcast("bias", bias, (batch, heads, q_len, 1), device)
        if not bias.dtype.is_floating_point:
            raise ArgumentError(f"bias must be floating point, not {bias.dtype}.")
    if attn_mask is not None:
        _check_broadcast("attn_mask", attn_mask, (batch, heads, q_len, kv_len), device)
        if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
            raise ArgumentError(f"attn_mask must be bool or floating point, not {attn_mask.dtype}.")
    if options.window_left < -1 or options.window_right < -1:
        window = options.window_left, options.window_right
        raise ArgumentError(f"window {window} must hold numbers >= 0, or -1: no limit.")
    if not options.softcap >= 0.0:
        raise ArgumentError(f"softcap must be positive, or 0 for none, not {options.softcap}.")
    if not 0.0 <= options.dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p must be in [0, 1], not {options.dropout_p}.")
    if options.dropout_p > 0.0:
        if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ArgumentError("seed must be an int64 tensor of one element, since dropout_p > 0.")
        if seed.device != device:
            raise ArgumentError(f"seed must be on query's device {device}, not {seed.device}.")


def _check_broadcast(name: str, tensor: Tensor, full: tuple[int, ...], device: torch.device) -> None:
    if tensor.dim() != 4 or any(size != 1 and size != whole for size, whole in zip(tensor.shape, full, strict=True)):
        raise ArgumentError(f"{name} {_shape(tensor)} must broadcast to {list(full)} (1 in a dimension: for all).")
    if tensor.device != device:
        raise ArgumentError(f"{name} must be on query's device {device}, not {tensor.device}.")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


# Implementations. Interceptions of sigswap's TorchFunctionMode, which may be active around them, are off inside.


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    options = reference.Options(**keywords)
    _check(query, key, value, bias, attn_mask, seed, options)
    with torch._C.DisableTorchFunction():
        return reference.forward(query, key, value, bias, attn_mask, seed, options)


def _forward_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    from sigswap.kernels import dispatch

    options = reference.Options(**keywords)
    _check(query, key, value, bias, attn_mask, seed, options)
    with torch._C.DisableTorchFunction():
        return dispatch.forward(query, key, value, bias, attn_mask, seed, options)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    _check(query, key, value, bias, attn_mask, seed, reference.Options(**keywords))
    return reference.empty_output(query, value)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output_mask: list[bool],
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = reference.Options(**keywords)
    with torch._C.DisableTorchFunction():
        return reference.backward(grad_out, query, key, value, bias, attn_mask, seed, output_mask, options)


def _backward_cuda(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output_mask: list[bool],
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sigswap.kernels import dispatch

    options = reference.Options(**keywords)
    with torch._C.DisableTorchFunction():
        return dispatch.backward(grad_out, query, key, value, bias, attn_mask, seed, output_mask, options)


def _backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    output_mask: list[bool],
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.empty_gradients(query, key, value, bias, attn_mask, output_mask)


def _probs(
    scores: Tensor,
    bias: Tensor | None = None,
    dim: int = -1,
    visible_bias: bool = True,
    const_bias: float = 0.0,
) -> Tensor:
    if not scores.dtype.is_floating_point:
        raise ArgumentError(f"scores must be floating point, not {scores.dtype}.")
    if not -scores.dim() <= dim < scores.dim():
        raise ArgumentError(f"dim must be a dimension of scores {_shape(scores)}, not {dim}.")
    if bias is not None:
        _check_score_bias(bias, scores, dim)
    with torch._C.DisableTorchFunction():
        masked = scores <= MASKED_SCORE
        exact = scores if scores.dtype == torch.float64 else scores.float()
        # Autograd saves the bool mask for this line and p for the sigmoid; nothing else of scores' size.
        exact = exact.masked_fill(masked, -torch.inf)
        row_bias: float | Tensor = const_bias
        if visible_bias:
            visible = masked.logical_not().sum(dim, keepdim=True)
            row_bias = row_bias - visible.clamp(min=1).to(exact.dtype).log()
        if bias is not None:
            row_bias = row_bias + bias.to(exact.dtype)
        return (exact + row_bias).sigmoid().to(scores.dtype)


def _check_score_bias(bias: Tensor, scores: Tensor, dim: int) -> None:
    if not bias.dtype.is_floating_point:
        raise ArgumentError(f"bias must be floating point, not {bias.dtype}.")
    if bias.device != scores.device and bias.dim() > 0:
        raise ArgumentError(f"bias must be on the device of scores {scores.device}, not {bias.device}.")
    full = list(scores.shape)
    full[dim] = 1
    sizes = bias.shape
    fits = len(sizes) <= len(full) and all(
        size == 1 or size == whole for size, whole in zip(reversed(sizes), reversed(full), strict=False)
    )
    if not fits:
        raise ArgumentError(f"bias {_shape(bias)} must broadcast to {full}: scores, with size 1 in dim {dim}.")


# Autograd. Written out rather than by torch.library.register_autograd, which takes longer per call.

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, keywords: dict[str, Any], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.keywords = keywords
        return _below_autograd(torch.ops.sigswap.sigmoid_attention.default, keyset, tensors, keywords)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, attn_mask, seed = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:7]
        results = torch.ops.sigswap.sigmoid_attention_backward.default(
            grads[0], query, key, value, bias, attn_mask, seed, needed, **ctx.keywords
        )
        kept = (grad if need else None for grad, need in zip(results, needed, strict=True))
        return None, None, *kept, None


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, keywords: dict[str, Any], *arguments: Any) -> _Outputs:
        op = torch.ops.sigswap.sigmoid_attention_backward.default
        return _below_autograd(op, keyset, arguments, keywords)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise SigswapError("sigmoid_attention has no second derivative. Compute its first without create_graph.")


def _below_autograd(op: Any, keyset: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **keywords)


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


def _forward_autograd(
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    tensors = query, key, value, bias, attn_mask, seed
    if forward_ad._current_level >= 0 and any(_has_tangent(tensor) for tensor in tensors):
        raise SigswapError("sigmoid_attention has no forward-mode derivative (jvp). Use backward mode (grad, vjp).")
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        return _Attention.apply(keyset, keywords, *tensors)
    return _below_autograd(torch.ops.sigswap.sigmoid_attention.default, keyset, tensors, keywords)


def _backward_autograd(keyset: Any, *arguments: Any, **keywords: Any) -> _Outputs:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return _AttentionBackward.apply(keyset, keywords, *arguments)
    op = torch.ops.sigswap.sigmoid_attention_backward.default
    return _below_autograd(op, keyset, arguments, keywords)


# Autocast: as softmax attention's, for the op itself, so that it holds in graphs, too.


def _register_autocast(device: str) -> None:
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def attention(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None, **keywords: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        inputs = (
            tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            for tensor in (query, key, value)
        )
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.sigswap.sigmoid_attention.default(*inputs, *others, **keywords)

    def attention_backward(*arguments: Any, **keywords: Any) -> _Outputs:
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.sigswap.sigmoid_attention_backward.default(*arguments, **keywords)

    def probs(scores: Tensor, *others: Any) -> Tensor:
        # CPU's autocast leaves softmax alone, too.
        if device != "CPU" and scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.sigswap.sigmoid_probs.default(scores, *others)

    _library.impl("sigmoid_attention", attention, f"Autocast{device}")
    _library.impl("sigmoid_attention_backward", attention_backward, f"Autocast{device}")
    _library.impl("sigmoid_probs", probs, f"Autocast{device}")


_library.impl("sigmoid_attention", _forward, "CompositeExplicitAutograd")
_library.impl("sigmoid_attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("sigmoid_probs", _probs, "CompositeImplicitAutograd")
_library.impl("sigmoid_attention", _forward_cuda, "CUDA")
_library.impl("sigmoid_attention_backward", _backward_cuda, "CUDA")
torch.library.register_fake("sigswap::sigmoid_attention", _forward_fake, lib=_library)
torch.library.register_fake("sigswap::sigmoid_attention_backward", _backward_fake, lib=_library)
_library.impl("sigmoid_attention", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("sigmoid_attention_backward", _backward_autograd, "Autograd", with_keyset=True)
for _device in _AUTOCAST_DEVICES:
    _register_autocast(_device)
