"""What the direct launch hands to Triton's function in C is what Triton's own launcher hands to it, with pointers as
numbers. Without a GPU: a function in Python stands for that in C."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.nvidia import driver

from sigswap.kernels.host import direct, launch
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.host.recording import recorded_by

NAMES = ("first", "second", "third", "length", "scale", "BLOCK")
REST = {"length": 7, "scale": 0.5, "BLOCK": 16}
DEVICE = torch.device("cuda:0")
META = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [1, 1, 8, 16], "fp4_padded": False}

KNOWN = ".".join(triton.__version__.split(".")[:2]) in direct._LAUNCHERS
known_only = pytest.mark.skipif(not KNOWN, reason="this Triton's launcher is not known")


class Compiled:
    """A compiled kernel with Triton's real launcher, whose function in C only takes notes."""

    function, packed_metadata = 99, (4, 1, 1024)

    def __init__(self, run: Any, metas: list[Any]) -> None:
        self.run, self.metadata = run, types.SimpleNamespace(tensordesc_meta=metas)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        hooks = "metadata", "enter", "exit"
        return lambda *arguments: self.run(*grid, 5, self.function, self.packed_metadata, *hooks, *arguments)


class Triton:
    """Notes: what came to C, and the tensor maps that were made."""

    def __init__(self) -> None:
        self.launched: list[list[Any]] = []
        self.maps: list[tuple[Any, ...]] = []

    def in_c(self, *arguments: Any) -> None:
        *given, last = arguments
        self.launched.append([*given, *last] if isinstance(last, (tuple, list)) else [*given, last])

    def fill(self, address: int, *others: Any) -> tuple[Any, ...]:
        self.maps.append(("map", address, *[tuple(o) if isinstance(o, (tuple, list)) else o for o in others]))
        return self.maps[-1]


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Triton:
    """Triton 3.6 compiles a function in C for each signature, later ones have one for all."""
    notes = Triton()
    utils = types.SimpleNamespace(
        launch=notes.in_c,
        build_signature_metadata=tuple,
        fill_tma_descriptor=notes.fill,
        fill_tma_descriptor_tiled=notes.fill,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", types.SimpleNamespace(utils=utils))
    monkeypatch.setattr(driver, "compile_module_from_src", lambda *args, **names: utils, raising=False)
    monkeypatch.setattr(driver, "library_dirs", lambda: [])
    monkeypatch.setattr(driver, "PyKernelArg", lambda **names: names["type"], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    direct._maps.clear()
    return notes


def compiled(kinds: tuple[str, str, str], metas: list[Any] | None = None, **changes: int) -> Compiled:
    """kinds: Triton's types of the tensors."""
    types_ = dict(zip(NAMES, (*kinds, "i32", "fp32", "constexpr"), strict=True))
    function = types.SimpleNamespace(arg_names=list(NAMES))
    source = types.SimpleNamespace(constants={(5,): 16}, signature=types_, fn=function)
    described = sum(kind.startswith("tensordesc") for kind in kinds)
    metas = [META] * described if metas is None else metas
    metadata = {
        "tensordesc_meta": metas,
        "num_ctas": 1,
        "global_scratch_size": 0,
        "global_scratch_align": 1,
        "profile_scratch_size": 0,
        "profile_scratch_align": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": True,
    } | changes
    return Compiled(driver.CudaLauncher(source, types.SimpleNamespace(**metadata)), metas)


def launch_of(made: Compiled, *tensors: Any, describe: bool = False) -> launch.Launch:
    """That has compiled its kernel, and launches from the next call on as always. describe: all that are tensors."""

    class Kernel:
        arg_names = NAMES

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
            return lambda *arguments, **options: made

    layouts = [None if tensor is None else layout_of(tensor) for tensor in tensors]
    given = [launch.by_rows(each, 8) if describe and each is not None else each for each in layouts]
    run = launch.Launch(Kernel(), 3, DEVICE, tuple(given), REST, num_warps=4)
    run(*tensors)
    return run


def by_triton(notes: Triton, made: Compiled, *arguments: Any) -> list[Any]:
    """What comes to C where Triton launches, with tensors as addresses."""
    made.run(3, 1, 1, 1000, made.function, made.packed_metadata, None, None, None, *arguments, *REST.values())
    return [each.data_ptr() if isinstance(each, Tensor) else each for each in notes.launched.pop()]


@known_only
def test_tensors_come_to_c_as_triton_hands_them_over(notes: Triton) -> None:
    tensors = torch.zeros(4), None, torch.zeros(8)
    made = compiled(("*fp32", "constexpr", "*fp32"))
    run = launch_of(made, *tensors)
    expected = by_triton(notes, made, *tensors)
    assert tensors[0].data_ptr() in expected
    run(*tensors)
    assert notes.launched.pop() == expected and not notes.launched


DESCRIBED = "tensordesc<bf16[1,1,8,16]>"


@known_only
def test_descriptors_come_to_c_as_triton_expands_them(notes: Triton) -> None:
    tensors = torch.zeros(2, 3, 40, 16).bfloat16(), torch.zeros(2, 40, 3, 16).bfloat16().transpose(1, 2), None
    made = compiled((DESCRIBED, DESCRIBED, "constexpr"))
    run = launch_of(made, *tensors, describe=True)
    described = [launch.by_rows(layout_of(tensor), 8).descriptor(tensor) for tensor in tensors[:2]]
    expected = by_triton(notes, made, *described, None)
    for _ in range(2):
        run(*tensors)
        assert notes.launched.pop() == expected
    assert [each for each in expected if isinstance(each, tuple) and each[0] == "map"] == notes.maps[:2]
    assert len(notes.maps) == 4  # two by Triton, and two that are kept


@known_only
def test_a_map_is_of_the_address_and_the_layout_of_the_plan(notes: Triton) -> None:
    memory = torch.zeros(2 * 3 * 40 * 16 + 64).bfloat16()

    def at(start: int, shape: tuple[int, ...] = (2, 3, 40, 16)) -> Tensor:
        """A tensor of its own, which is gone when the next one comes."""
        size = shape[0] * shape[1] * shape[2] * shape[3]
        return memory[start : start + size].view(shape)

    whole, shorter = ((2, 3, 40, 16), (2, 3, 20, 16))
    of_whole = launch_of(compiled((DESCRIBED, "constexpr", "constexpr")), at(0), None, None, describe=True)
    of_shorter = launch_of(compiled((DESCRIBED, "constexpr", "constexpr")), at(0, shorter), None, None, describe=True)
    for start, run, shape in (
        (0, of_whole, whole),
        (0, of_shorter, shorter),
        (64, of_whole, whole),
        (0, of_whole, whole),
        (0, of_shorter, shorter),
    ):
        run(at(start, shape), None, None)
        (found,) = (each for each in notes.launched.pop() if isinstance(each, tuple) and each[0] == "map")
        assert found[1] == at(start).data_ptr() and shape in found
    assert len(notes.maps) == 3


@known_only
def test_maps_are_bounded_and_keep_no_tensor(notes: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_MAPS", 3)
    tensors = [torch.zeros(1, 1, 8, 16).bfloat16() for _ in range(10)]
    run = launch_of(compiled((DESCRIBED, "constexpr", "constexpr")), tensors[0], None, None, describe=True)
    for tensor in tensors:
        run(tensor, None, None)
        assert tensor.data_ptr() in [each[1] for each in notes.launched.pop() if isinstance(each, tuple)]
        assert 1 <= len(direct._maps) <= 3
    kept = [weakref.ref(tensor) for tensor in tensors]
    del tensors, tensor
    assert not any(reference() is not None for reference in kept)


@known_only
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_with_hooks_triton_gets_descriptors(notes: Triton, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.zeros(1, 1, 8, 16).bfloat16()
    run = launch_of(compiled((DESCRIBED, "constexpr", "constexpr")), tensor, None, None, describe=True)
    notes.launched.clear()
    monkeypatch.setattr(triton.knobs.runtime, hook, lambda metadata: None)
    run(tensor, None, None)
    assert "enter" in notes.launched[0] and not direct._maps
    monkeypatch.undo()


def test_recorded_launches_take_tensors(notes: Triton) -> None:
    tensor, records = torch.zeros(1, 1, 8, 16).bfloat16(), []
    run = launch_of(compiled((DESCRIBED, "constexpr", "constexpr")), tensor, None, None, describe=True)
    notes.launched.clear()
    with recorded_by(lambda *record: records.append(record), descriptors=True):
        run(tensor, None, None)
    assert records[0][2] == (tensor, None, None, *REST.values()) and not notes.launched


@pytest.mark.parametrize(
    "changes",
    [{"global_scratch_size": 128}, {"profile_scratch_size": 128}, {"version": "3.7.1"}, {"version": "4.0.0"}],
)
def test_what_is_not_known_is_launched_by_triton(
    notes: Triton, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dict(changes)
    tensors = torch.zeros(1, 1, 8, 16).bfloat16(), None, None
    monkeypatch.setattr(triton, "__version__", changes.pop("version", triton.__version__))
    made = compiled((DESCRIBED, "constexpr", "constexpr"), **changes)
    calls: list[tuple[Any, ...]] = []
    made.__class__ = type("Noted", (Compiled,), {"__getitem__": lambda *_: lambda *arguments: None})
    run = launch_of(made, *tensors, describe=True)
    made.run = lambda *arguments: calls.append(arguments)
    run(*tensors)
    ((*before, descriptor, _, _, length, scale, block),) = calls
    assert before == [3, 1, 1, 1000, 99, (4, 1, 1024), None, None, None]
    assert descriptor.base is tensors[0] and (length, scale, block) == (7, 0.5, 16)


def test_descriptors_without_maps_are_left_to_triton(notes: Triton) -> None:
    tensor = torch.zeros(1, 1, 8, 16).bfloat16()
    describe = launch.by_rows(layout_of(tensor), 8).descriptor
    described, rest = (describe, None, None), tuple(REST.values())
    for metas in ([], [None]):
        made = compiled((DESCRIBED, "constexpr", "constexpr"))
        made.metadata = types.SimpleNamespace(tensordesc_meta=metas)
        assert direct.direct_launch(made, (3, 1, 1), described, rest) is None
    if KNOWN:
        assert direct.direct_launch(compiled((DESCRIBED, "constexpr", "constexpr")), (3, 1, 1), described, rest)
