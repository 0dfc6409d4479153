"""What is checked of one model: that its conversion is right in everything, and if not, why.

The verdicts:

- ``right``: converted under strict; values and gradients are the oracle's, softmax inside ``sigswap.softmax`` and after
  ``revert`` is bit for bit what it was, generation and a saved copy agree;
- ``none``: it has no softmax attention, and sigswap says so;
- ``refused``: convert raises, with a reason; ``missed``: sigswap finds no attention where the oracle does;
- ``wrong``: converted, and something differs; ``false swap``: sigswap swaps what the oracle does not call attention;
- ``fails``: converted, and then it raises;
- ``not built``, ``does not run``: the model's own code, without sigswap (or its outputs tell nothing: sigmoid does not
  change them, or rounding does);
- ``too slow``, ``died``, ``not installed``: not known.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import logging
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import sigswap
from sigswap import errors
from sigswap.conversion.record import owners_of
from tests.coverage.oracle import Attention, attention_calls, sigmoid

CLOSE, CLOSE_64 = 1e-4, 1e-8
"""Of a tensor's largest value. What float32's rounding hides, or blows up, float64 decides."""
TELLING = 1e-3
"""Softmax and sigmoid differ at least by so much of the largest value, else the model does not tell them apart."""


@dataclasses.dataclass
class Built:
    """A model to check: ``make`` builds it anew (equal each time), ``inputs`` are the (args, kwargs) of a call of it.

    ``generate``: keyword arguments of ``model.generate``, None if it has none. ``factory``: for sigswap.save.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    generate: dict[str, Any] | None = None
    factory: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Row:
    """What came out for one model."""

    name: str
    verdict: str
    reason: str = ""
    attentions: int = 0
    error: float | None = None
    seconds: float = 0.0  # of its process
    convert_seconds: float = 0.0
    forward_seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)
    commit: str = ""  # of sigswap, at which it was checked; "": before that was noted


class _Found(Exception):
    """Ends a check: its verdict and the reason."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(verdict, reason)
        self.verdict, self.reason = verdict, reason


def check(name: str, build: Callable[[], Built]) -> Row:
    """The row of one model."""
    row, start = Row(name, "right"), time.process_time()
    try:
        _check(row, build)
    except _Found as found:
        row.verdict, row.reason = found.verdict, found.reason
    row.seconds = round(time.process_time() - start, 2)
    return row


def _check(row: Row, build: Callable[[], Built]) -> None:
    try:
        built = build()
        model = built.make()
    except ModuleNotFoundError as error:
        raise _Found("not installed", str(error)) from error
    except Exception as error:
        raise _Found("not built", _short(error)) from error
    args, kwargs = built.inputs

    def call(module: nn.Module, dtype: torch.dtype | None = None, scale: float = 1.0) -> Any:
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        given = copy.deepcopy((args, kwargs))
        given = given if dtype is None else _as_dtype(given, dtype, scale)
        return module(*given[0], **given[1])

    try:
        with torch.no_grad():
            before = tensors_of(call(model))
            start = time.process_time()
            again = tensors_of(call(model))
            row.forward_seconds = round(time.process_time() - start, 4)
    except Exception as error:
        raise _Found("does not run", _short(error)) from error
    if not before or not all(x.isfinite().any() for x in before if x.numel()):
        raise _Found("does not run", "its outputs are not finite" if before else "it gives no tensors")
    exact = _equal(before, again)

    original = model
    try:
        attention = attention_calls(original, lambda: call(original))
    except Exception as error:
        raise _Found("does not run", f"under the oracle: {_short(error)}") from error
    model = built.make()
    with torch.no_grad():
        before = tensors_of(call(model))
    names = list(model.state_dict())
    older = {id(x): x for x in _fakes()}  # another test's, say; held, so that no id is taken anew
    start = time.process_time()
    refusal = _convert(model, built)
    row.convert_seconds = round(time.process_time() - start, 2)
    left = [x for x in _fakes() if id(x) not in older]
    if left:  # unless nothing holds them but one another
        left.clear()
        gc.collect()
        left = [x for x in _fakes() if id(x) not in older]
    if left:
        raise _Found("wrong", f"{len(left)} fake tensors stay behind")
    if isinstance(refusal, errors.NoAttentionError) and not attention:
        raise _Found("none", str(refusal.message))
    if refusal is not None:
        kind = "missed" if isinstance(refusal, errors.NoAttentionError) else "refused"
        raise _Found(kind, f"{type(refusal).__name__}: {refusal.message}")
    row.attentions = sum(len(state.plan.sites) for state in owners_of(model).values())
    if not attention:
        raise _Found("false swap", f"{row.attentions} swapped, and the oracle has none")

    row.error = _compare(original, model, attention, call, before, exact)
    if built.generate is not None:
        _generates(original, model, attention, built, row)
    _softmax_again(model, call, before, exact)
    _saved(original, model, built, call, exact, row)
    sigswap.revert(model)
    with torch.no_grad():
        _same(tensors_of(call(model)), before, exact, "after revert")
    if list(model.state_dict()) != names:
        raise _Found("wrong", "after revert: other names in state_dict")


def _fakes() -> list[FakeTensor]:
    return [x for x in gc.get_objects() if type(x) is FakeTensor]


def _convert(model: nn.Module, built: Built) -> errors.SigswapError | None:
    args, kwargs = built.inputs
    example: Any = args if args else kwargs
    if args and kwargs:
        raise ValueError("a case passes its inputs by position or by keyword, not both")
    logging.disable(logging.CRITICAL)  # a handler that keeps records keeps an error's frames, and all that they hold
    try:
        sigswap.convert(model, example_inputs=example)
    except errors.SigswapError as error:
        return error
    except Exception as error:
        raise _Found("fails", f"in convert: {_short(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    return None


# Values and gradients.


def _compare(
    original: nn.Module, model: nn.Module, attention: Attention, call: Callable[..., Any], before: Any, exact: bool
) -> float:
    """The largest relative error of outputs and gradients. Raises _Found if it is too large."""
    try:
        with sigmoid(original, attention) as oracle:
            want, want_grads = _results(original, lambda: call(original))
    except Exception:
        try:
            _results(original, lambda: call(original))
        except Exception as error:
            raise _Found("does not run", f"its backward: {_short(error)}") from error
        raise
    try:
        got, grads = _results(model, lambda: call(model))
    except Exception as error:
        raise _Found("fails", _short(error)) from error
    if not oracle.swapped:
        raise _Found("wrong", "the oracle swapped nothing")
    shapes = [x.shape for x in want] == [x.shape for x in before]  # a model may choose a length by what it computes
    difference = _error(want, before) if shapes else 1.0
    if difference < TELLING:
        raise _Found("does not run", f"it does not tell: sigmoid changes its outputs by {difference:.1g} only")
    error, where = _largest(got, want, grads, want_grads)
    if error <= CLOSE:
        return error
    try:
        original_64, model_64 = _exact(original), _exact(model)
        with sigmoid(original_64, attention):
            want, want_grads = _results(original_64, lambda: call(original_64, torch.float64))
            near, near_grads = _results(original_64, lambda: call(original_64, torch.float64, 1 + 1e-13))
        got, grads = _results(model_64, lambda: call(model_64, torch.float64))
    except Exception:
        raise _Found("wrong", f"{where} differ by {error:.2g} (float32; in float64 it does not run)") from None
    error_64, where = _largest(got, want, grads, want_grads)
    if error_64 > CLOSE_64:
        jump, _ = _largest(near, want, near_grads, want_grads)
        if jump > 0.1 * error_64:
            raise _Found("does not run", f"it is not steady: inputs that differ by 1e-13 change it by {jump:.2g}")
        raise _Found("wrong", f"{where} differ by {error_64:.2g} (float64; {error:.2g} in float32)")
    return error_64


def _exact(model: Any) -> Any:
    """``model`` in float64."""
    model = copy.deepcopy(model).double()
    with contextlib.suppress(Exception):  # a grouped product has no float64
        model.set_experts_implementation("eager")
    return model


def _results(module: nn.Module, run: Callable[[], Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of a weighted sum of them, by parameter (those of sigswap's own left out)."""
    outputs = tensors_of(run())
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and "sigswap" not in n.split(".")}
    summed = []
    for x in outputs:
        if x.requires_grad:
            finite = x.masked_fill(~x.isfinite(), 0.0)
            summed.append((finite * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum())
    if not summed or not parameters:
        return [x.detach() for x in outputs], {}
    grads = torch.autograd.grad(
        torch.stack([x.double() for x in summed]).sum(), list(parameters.values()), allow_unused=True
    )
    return [x.detach() for x in outputs], {
        n: g for n, g in zip(parameters, grads, strict=True) if g is not None and not g.is_sparse
    }


def _largest(
    got: list[Tensor], want: list[Tensor], grads: dict[str, Tensor], want_grads: dict[str, Tensor]
) -> tuple[float, str]:
    if grads.keys() != want_grads.keys():
        raise _Found("wrong", f"other parameters have gradients: {sorted(grads.keys() ^ want_grads.keys())[:3]}")
    for name, grad in grads.items():
        if not grad.isfinite().all() and want_grads[name].isfinite().all():
            raise _Found("wrong", f"the gradient of {name} is not finite")
    error, where = _error(got, want), "outputs"
    scale = max((g.abs().max().item() for g in want_grads.values() if g.numel()), default=0.0)
    for name, grad in grads.items():
        other = _error([grad], [want_grads[name]], least=1e-3 * scale)
        if other > error:
            error, where = other, f"gradients ({name})"
    return error, where


def _error(got: list[Tensor], want: list[Tensor], least: float = 1e-9) -> float:
    """The largest difference, relative to the largest value of its tensor (``least`` at least)."""
    if [x.shape for x in got] != [x.shape for x in want]:
        raise _Found("wrong", "outputs of other shapes")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.numel() == 0:
            continue
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            raise _Found("wrong", "other values are not finite")
        a, b = a.double()[finite], b.double()[finite]
        if a.numel():
            worst = max(worst, (a - b).abs().max().item() / max(b.abs().max().item(), least))
    return worst


# Generation, switching off, saving.


def _generates(original: nn.Module, model: nn.Module, attention: Attention, built: Built, row: Row) -> None:
    """Greedy decoding with the cache gives the tokens that the oracle gives without one."""
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}

    def generate(module: Any, **changes: Any) -> Tensor:
        torch.manual_seed(0)
        output = module.generate(**copy.deepcopy(built.generate), **settings, **changes)
        return output if isinstance(output, Tensor) else output[0]

    try:
        with torch.no_grad():
            cached, uncached = generate(original), generate(original, use_cache=False)
    except Exception as error:
        row.notes.append(f"its own generate fails: {_short(error)}")
        return
    if not torch.equal(cached, uncached):
        row.notes.append("its own generate differs without a cache")
        return
    try:
        with torch.no_grad():
            got = generate(model)
    except Exception as error:
        raise _Found("fails", f"in generate: {_short(error)}") from error
    with torch.no_grad(), sigmoid(original, attention):
        want = generate(original, use_cache=False)
    if not torch.equal(got, want):
        raise _Found("wrong", "generate gives other tokens than the oracle without a cache")


def _softmax_again(model: nn.Module, call: Callable[..., Any], before: list[Tensor], exact: bool) -> None:
    try:
        with torch.no_grad(), sigswap.softmax(model):
            got = tensors_of(call(model))
    except Exception as error:
        raise _Found("fails", f"inside sigswap.softmax: {_short(error)}") from error
    _same(got, before, exact, "inside sigswap.softmax")


def _saved(
    original: nn.Module, model: nn.Module, built: Built, call: Callable[..., Any], exact: bool, row: Row
) -> None:
    with torch.no_grad():
        before = tensors_of(call(model))
    with tempfile.TemporaryDirectory() as directory:
        try:
            sigswap.save(model, Path(directory), **built.factory)
            loaded = sigswap.load(Path(directory), allow_code=True)
        except Exception as error:
            if not _survives(original, call):
                row.notes.append(f"its own save_pretrained loses weights, and so does sigswap's: {_short(error)}")
                return
            raise _Found("fails", f"in save or load: {_short(error)}") from error
    with torch.no_grad():
        after = tensors_of(call(loaded))
    if not _agree(after, before, exact) and not _survives(original, call):
        row.notes.append("its own save_pretrained leaves weights out, and so does sigswap's")
        return
    _same(after, before, exact, "saved and loaded")


def _survives(original: Any, call: Callable[..., Any]) -> bool:
    """Whether a transformers model that nobody converted is what it was after its own save and load."""
    if not hasattr(original, "save_pretrained"):
        return True
    with torch.no_grad():
        before = tensors_of(call(original))
    with tempfile.TemporaryDirectory() as directory:
        try:
            original.save_pretrained(directory)
            loaded = type(original).from_pretrained(directory).eval()
        except Exception:
            return False
    with torch.no_grad():
        after = tensors_of(call(loaded))
    return [x.shape for x in after] == [x.shape for x in before] and _error(after, before) <= CLOSE


def _same(got: list[Tensor], want: list[Tensor], exact: bool, when: str) -> None:
    if not _agree(got, want, exact):
        raise _Found("wrong", f"{when} it gives other values")


def _agree(got: list[Tensor], want: list[Tensor], exact: bool) -> bool:
    return _equal(got, want) if exact else _error(got, want) <= CLOSE


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    )


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of floating point numbers in what a model returns, whatever holds them."""
    return [x for x in _tensors(output, set()) if x.is_floating_point() and not x.is_nested]


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) in seen or isinstance(value, str | bytes | int | float | nn.Module | type | None):
        return
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        seen.add(id(value))
        for item in value:
            yield from _tensors(item, seen)
    elif dataclasses.is_dataclass(value):
        seen.add(id(value))
        for item in vars(value).values():
            yield from _tensors(item, seen)


def _as_dtype(value: Any, dtype: torch.dtype, scale: float) -> Any:
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda x: x.to(dtype) * scale if x.is_floating_point() else x, value)


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}{where}"


def _is_small_gate(name: str, parameter: Tensor) -> bool:
    """What starts so near 0 that nothing comes through: LayerScale, a gate."""
    first = parameter.flatten()[0]
    return bool((parameter == first).all() and first.abs() < 0.1) and not name.endswith("bias")


def randomised(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Draws the weights so that attention scores spread: with a library's own they are about 0, where softmax and
    sigmoids with a right and a wrong bias hardly differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if _is_small_gate(name, parameter):
                parameter.copy_(0.5 + 0.1 * noise)
            elif parameter.dim() >= 2 and min(parameter.shape[:2]) > 1 and "embed" not in name:
                fan_in = parameter.numel() / parameter.shape[0]
                parameter.copy_(gain * noise * fan_in**-0.5)
            elif parameter.dim() >= 2:
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1 and parameter.std(unbiased=False) < 1e-6 and name.endswith(("weight", "bias")):
                parameter.add_(0.1 * noise)  # a norm's weight, a bias
    return model.eval()
