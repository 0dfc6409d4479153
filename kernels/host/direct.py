"""Launches of a compiled kernel past the part of Triton's launcher that is in Python.

That part makes a tensor map of each tensor descriptor, looks whether the kernel wants scratch memory, and then calls a
function in C, which asks the driver about each pointer. A tensor map depends on nothing but an address and what a plan
knows, so that the map is kept by address: of a tensor that has come to lie there it is the same. Pointers are handed
over as numbers, about which nobody asks.

What the function in C takes is known of the versions of Triton in :data:`_LAUNCHERS`; of others Triton launches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import triton
from torch import Tensor

MAX_MAPS = 4096
"""Tensor maps that are kept, half a kilobyte each, for all kernels together."""

Direct = Callable[[int, Sequence[Tensor | None]], None]
"""``launch(stream, tensors)``"""

Describe = Callable[[Tensor], Any]
"""Makes a tensor descriptor."""


def direct_launch(
    compiled: Any, grid: tuple[int, int, int], described: Sequence[Describe | None], rest: tuple[Any, ...]
) -> Direct | None:
    """None: it takes Triton's launcher to launch the kernel, for the version is another one, or the kernel needs more
    than its arguments.

    Args:
        compiled: Triton's compiled kernel.
        grid: Of programs.
        described: For each tensor that the kernel takes first how it is described, or None.
        rest: The arguments behind the tensors.
    """
    launcher = _LAUNCHERS.get(".".join(triton.__version__.split(".")[:2]))
    if launcher is None:
        return None
    from triton.backends.nvidia import driver

    run = compiled.run
    if type(run) is not driver.CudaLauncher or run.global_scratch_size or run.profile_scratch_size:
        return None
    if getattr(run, "gsan_enabled", False):
        return None
    in_c = run.launch
    metas = list(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    if any(described):
        if len(metas) != sum(each is not None for each in described) or None in metas:
            return None  # descriptors are taken apart into pointers
        in_c = inspect.getclosurevars(in_c).nonlocals.get("launcher")
        if in_c is None:
            return None
    return launcher(in_c, compiled, grid, _arguments_of(described, metas), rest)


def _arguments_of(
    described: Sequence[Describe | None], metas: list[Any]
) -> Callable[[Sequence[Tensor | None]], list[Any]]:
    """What the function in C takes for tensors."""
    if not any(described):
        return lambda tensors: [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    remaining = iter(metas)
    places = [None if describe is None else _Maps(describe, next(remaining)) for describe in described]

    def arguments(tensors: Sequence[Tensor | None]) -> list[Any]:
        found: list[Any] = []
        for tensor, maps in zip(tensors, places, strict=True):
            address = None if tensor is None else tensor.data_ptr()
            if maps is None:
                found.append(address)
            else:
                found += _maps.get((maps, address)) or maps.add(address, tensor)
        return found

    return arguments


class _Maps:
    """Of the tensors that are one argument of a kernel."""

    def __init__(self, describe: Describe, meta: Any) -> None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        self._describe, self._make = describe, make_tensordesc_arg
        parameters = inspect.signature(make_tensordesc_arg).parameters
        self._beside = meta, *[None] * (len(parameters) - 2)  # Triton 3.8 has a third one, without a use for it

    def add(self, address: int | None, tensor: Tensor | None) -> list[Any]:
        assert tensor is not None, "there is nothing to describe"
        made: list[Any] = self._make(self._describe(tensor), *self._beside)
        if len(_maps) >= MAX_MAPS:
            _maps.clear()
        _maps[self, address] = made
        return made


_maps: dict[tuple[_Maps, int | None], list[Any]] = {}
"""A tensor map, shape and strides. They hold no tensor."""


def _of_3_6(in_c: Any, compiled: Any, grid: Any, arguments_of: Callable[..., list[Any]], rest: Any) -> Direct:
    run, function = compiled.run, compiled.function
    x, y, z = grid
    scratch = hooks = None, None
    fixed = run.launch_cooperative_grid, run.launch_pdl, *scratch, compiled.packed_metadata, None, *hooks

    def launch(stream: int, tensors: Sequence[Tensor | None]) -> None:
        in_c(x, y, z, stream, function, *fixed, *arguments_of(tensors), *rest)

    return launch


def _of_3_8(in_c: Any, compiled: Any, grid: Any, arguments_of: Callable[..., list[Any]], rest: Any) -> Direct:
    run, function = compiled.run, compiled.function
    x, y, z = grid
    scratch = hooks = None, None
    before = run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata, None, *hooks, *scratch
    fixed = *before, run.arg_annotations, run.kernel_signature

    def launch(stream: int, tensors: Sequence[Tensor | None]) -> None:
        in_c(x, y, z, stream, function, *fixed, (*arguments_of(tensors), *rest))

    return launch


_LAUNCHERS: dict[str, Callable[..., Direct]] = {"3.6": _of_3_6, "3.8": _of_3_8}
