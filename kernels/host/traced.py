"""An attention op as a graph of its Triton launches, for a compiler that launches Triton kernels by itself.

Called through the dispatcher, an op costs tens of microseconds of the host's time before its first launch. Inductor
knows Triton kernels (``torch.library.wrap_triton``): it allocates for them and launches them as its own. What runs is
worked out here by running the implementation on fake tensors, so it is the same as in eager.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.fx
import triton
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap as wrap
from torch.fx.experimental.proxy_tensor import make_fx

from sigswap.kernels import dispatch, reference
from sigswap.kernels.host.problem import Options, Problem, problem_of
from sigswap.kernels.host.recording import recorded_by
from sigswap.kernels.host.results import empty_row_sums
from sigswap.kernels.op.registration import as_results
from sigswap.kernels.triton.row_biases import count_kernel

FEW_SCORES = 1 << 26
"""An op on fewer scores takes the GPU less time than its call takes the host. So its launches are made visible even
where the GPU would be some percent faster with tensor descriptors and a limit on registers."""


class NotVisible(Exception):
    """The op has to stay as it is; says why."""


Kind = Literal["forward", "sums", "backward"]
"""Of ``sigswap::sigmoid_attention``, ``sigmoid_attention_sums`` and ``sigmoid_attention_backward``."""


def launches(kind: Kind, inputs: Sequence[Any], options: Options) -> torch.fx.GraphModule:
    """A graph of what the op does, functional, with one placeholder for each of the inputs that is a tensor.

    Args:
        kind: Which op.
        inputs: The op's, all of them, tensors fake, with sizes and strides that are numbers.

    Raises:
        NotVisible: A launch takes what ``wrap_triton`` does not pass on when it is traced (tensor descriptors, a limit
            on registers, Gluon) and the op has many scores, or it does not run Triton kernels.
    """
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    query, key = inputs[1:3] if kind == "backward" else inputs[:2]
    if not isinstance(count_kernel, triton.JITFunction):
        raise NotVisible("Triton's interpreter runs it")
    few = math.prod(query.shape[:3]) * key.shape[2] < FEW_SCORES

    def run(*given: Tensor) -> Any:
        remaining = iter(given)
        arguments = [next(remaining) if isinstance(each, Tensor) else each for each in inputs]
        if kind != "backward":
            row_sums = empty_row_sums(arguments[0]) if kind == "sums" else None
            problem = problem_of(arguments, options, row_sums=row_sums)
            _expect_kernels(dispatch.FORWARD, problem)
            out = dispatch.forward(problem)
            return out if row_sums is None else (out, row_sums)
        problem = problem_of(arguments, options, backward=True)
        _expect_kernels(dispatch.BACKWARD, problem)
        return as_results(problem.query, dispatch.backward(problem))

    _remember_what_is_written()
    with recorded_by(functools.partial(_launch, few), descriptors=not few):
        return make_fx(torch.func.functionalize(run))(*tensors)


def _expect_kernels(names: tuple[str, ...], problem: Problem) -> None:
    if dispatch.chosen(names, problem) is reference:
        raise NotVisible("it runs in plain PyTorch")


def _launch(
    few: bool, kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], options: dict[str, int]
) -> None:
    if kernel.is_gluon():
        raise NotVisible("it is written in Gluon")
    if dict(zip(kernel.arg_names, arguments, strict=True)).get("TMA", False):
        raise NotVisible("it loads by tensor descriptors")
    if "maxnreg" in options and not few:
        raise NotVisible("it limits registers")
    kept = tuple((name, value) for name, value in options.items() if name != "maxnreg")
    torch.library.wrap_triton(_with_options(kernel, kept))[grid](*arguments)


@functools.cache
def _remember_what_is_written() -> None:
    """Makes PyTorch find out once per kernel and arguments which of its arguments a kernel writes.

    It does so by running Triton's front end, 0.1 s, and does it three times for each launch; a model has hundreds, of a
    few kinds. This only saves time: where PyTorch has no such function, it takes as long as it takes.
    """
    name = next((n for n in ("identify_mutated_tensors", "identify_accessed_tensors") if hasattr(wrap, n)), None)
    if name is None:
        return
    identify = getattr(wrap, name)
    known: dict[Any, Any] = {}

    @functools.wraps(identify)
    def remembered(kernel: Any, arguments: dict[str, Any], descriptors: Any) -> Any:
        function = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
        if descriptors or not (function.__module__ or "").startswith("sigswap."):
            return identify(kernel, arguments, descriptors)
        # Tensors are fake ones, or inductor's.
        kinds = ((k, str(v.dtype) if hasattr(v, "dtype") else repr(v)) for k, v in arguments.items())
        key = function, tuple(kinds)
        if key not in known:
            known[key] = identify(kernel, arguments, descriptors)
        return known[key]

    setattr(wrap, name, remembered)


@functools.cache
def _with_options(kernel: Any, options: tuple[tuple[str, int], ...]) -> Any:
    """One object per kernel and options: PyTorch keeps each kernel that it ever traced."""
    return triton.autotune(configs=[triton.Config({}, **dict(options))], key=[])(kernel) if options else kernel
