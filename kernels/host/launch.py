"""Launches at little cost per call: a kernel with its grid and all arguments that its tensors' layouts determine.

:class:`Launch` holds the compiled kernel, past Triton's binder, which takes longer than the kernels of short sequences
run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sigswap.kernels.host.direct import Direct, direct_launch
from sigswap.kernels.host.layout import Layout, width
from sigswap.kernels.host.recording import recording


class Described:
    """How a kernel gets a tensor as a tensor descriptor."""

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.shape, self.strides, self.block, self.dtype = shape, strides, block, dtype
        self._kind: Any = TensorDescriptor
        self._checked: dict[str, Any] | None = None

    def descriptor(self, tensor: Tensor) -> Any:
        # Making one checks what is the same in all tensors of a layout. That takes as long as the launch.
        if self._checked is None:
            first = self.describe(tensor)
            self._kind, self._checked = type(first), vars(first) | {"base": None}  # no plan keeps a tensor
            return first
        descriptor: Any = object.__new__(self._kind)
        descriptor.__dict__.update(self._checked)
        descriptor.base = tensor
        return descriptor

    def describe(self, tensor: Tensor) -> Any:
        return TensorDescriptor(tensor, list(self.shape), list(self.strides), list(self.block))


def by_rows(layout: Layout, rows: int) -> Described:
    """A describable [B, H, N, D] tensor, in blocks of rows."""
    # The stride of a dimension of size 1 is never used, but must be valid.
    unit = 16 // layout.dtype.itemsize
    strides = [unit if size == 1 else s for size, s in zip(layout.shape[:3], layout.strides, strict=False)]
    return Described(tuple(layout.shape), (*strides, 1), (1, 1, rows, width(layout.shape[3])), layout.dtype)


def describable(layout: Layout) -> bool:
    """Whether a tensor descriptor can hold a [B, H, N, D] tensor as it lies in memory."""
    size = layout.dtype.itemsize
    if not layout.aligned or layout.strides[3] != 1 or layout.shape[3] * size < 16:
        return False
    # An expanded dimension has stride 0, which a descriptor does not take.
    return all(
        length == 1 or (stride > 0 and stride * size % 16 == 0 and stride * size < 1 << 40)
        for length, stride in zip(layout.shape[:3], layout.strides[:3], strict=True)
    )


class Launch:
    """A kernel with its grid and every argument but the tensors, which come first in its signature.

    Triton's launch hooks work. Its debugging switches (``knobs``) count when a kernel is compiled, at its first launch.

    tensors: their layouts; None: not given.
    arguments: the others by name; those that the kernel does not have are left out. UPPER-CASE ones are constants;
    ASM is whether the kernel may have inline assembly, which Triton's interpreter cannot run.
    """

    def __init__(
        self,
        kernel: Any,
        blocks: int,
        device: torch.device,
        tensors: tuple[Layout | Described | None, ...],
        arguments: dict[str, Any],
        **options: int,
    ) -> None:
        names = kernel.arg_names[len(tensors) :]
        arguments = arguments | {"ASM": isinstance(kernel, triton.JITFunction)}
        self._kernel = kernel
        self._grid = (blocks, 1, 1)
        self._describe = tuple([each.descriptor if isinstance(each, Described) else None for each in tensors])
        self._rest = tuple(arguments[name] for name in names)
        self._options = options
        # What Triton compiles another kernel for.
        self._key = (
            kernel,
            device,
            tuple(_tensor_key(tensor) for tensor in tensors),
            tuple(_scalar_key(name, value) for name, value in zip(names, self._rest, strict=True)),
            tuple(options.items()),
        )
        self._device = device.index
        self._compiled: Any = None
        self._direct: Direct | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        if recording.by is not None:
            recording.by.record(self._kernel, self._grid, (*tensors, *self._rest), self._options)
        elif self._compiled is None:
            self._launch_first(*tensors)
        elif _have_hooks():
            self._compiled[self._grid](*self._described(tensors), *self._rest)
        elif self._direct is not None:
            self._direct(torch._C._cuda_getCurrentRawStream(self._device), tensors)
        else:  # what Triton does where it is told to launch, without looking for the device and for hooks
            stream, compiled = torch._C._cuda_getCurrentRawStream(self._device), self._compiled
            beside = stream, compiled.function, compiled.packed_metadata, None, None, None
            compiled.run(*self._grid, *beside, *self._described(tensors), *self._rest)

    def _launch_first(self, *tensors: Tensor | None) -> None:
        """Compiles the kernel, unless it is. Triton's interpreter compiles nothing."""
        compiled, arguments = _compiled.get(self._key), (*self._described(tensors), *self._rest)
        if compiled is None:
            compiled = self._kernel[self._grid](*arguments, **self._options)
            if compiled is not None:
                _compiled[self._key] = compiled
        else:
            compiled[self._grid](*arguments)
        if compiled is not None:
            self._direct = direct_launch(compiled, self._grid, self._describe, self._rest)
        self._compiled = compiled

    def _described(self, tensors: tuple[Tensor | None, ...]) -> list[Any]:
        pairs = zip(tensors, self._describe, strict=True)
        return [tensor if by is None or tensor is None else by(tensor) for tensor, by in pairs]


def _have_hooks() -> bool:
    """Whether anyone is told of Triton's launches, such as a profiler."""
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # a chain of hooks, or one


_compiled: dict[Any, Any] = {}


def _tensor_key(tensor: Layout | Described | None) -> Any:
    if isinstance(tensor, Described):
        return tensor.dtype, tensor.block
    return None if tensor is None else (tensor.dtype, tensor.aligned)


def _scalar_key(name: str, value: Any) -> Any:
    if name.isupper() or not isinstance(value, int):
        return value if name.isupper() else None
    # Kernels have lengths and strides of their operands unspecialised; of the others 1 and multiples of 16 differ.
    return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31
