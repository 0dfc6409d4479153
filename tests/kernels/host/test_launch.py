"""The host side of the kernels: what may share a plan and what may not, where gradients are written, and how a compiled
kernel is launched. On any machine, for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sigswap.kernels import settings
from sigswap.kernels.host.problem import Options

pytest.importorskip("triton")

from sigswap.kernels.host import launch
from sigswap.kernels.host.forms import ACCURATE, AUTO, CUBIC_TAIL, EXACT_TANH, FAST, NO_TANH, SHORT_TANH, TAIL
from sigswap.kernels.host.layout import layout_of
from sigswap.kernels.host.problem import FEW_SCORES, Packed, Problem, Signature, _signature
from sigswap.kernels.host.recording import recorded_by
from sigswap.kernels.host.results import gradients_for, hand_over, maker_of

OPTIONS = Options(0.25)
OTHER_OPTIONS = Options(0.5, -1.0, False, True, True, 3, 4, 2.0, 0.5, 1.0)


def heads_tensor(length: int = 8, dim: int = 16, dtype: torch.dtype = torch.float16, heads: int = 2) -> Tensor:
    return torch.randn(2, length, heads, dim).to(dtype).transpose(1, 2)


def misaligned(tensor: Tensor) -> Tensor:
    """Of the same shape, strides and values, not at a multiple of 16 bytes."""
    numbers = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize + 1, dtype=tensor.dtype)
    assert numbers.data_ptr() % 16 == 0
    return numbers[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def base() -> dict[str, Any]:
    """New tensors each time."""
    return {
        "query": heads_tensor(),
        "key": heads_tensor(),
        "value": heads_tensor(),
        "bias": torch.zeros(1, 2, 1, 1),
        "attn_mask": torch.zeros(2, 1, 8, 8),
        "seed": None,
        "options": OPTIONS,
        "packed": None,
    }


TENSORS = "query", "key", "value", "bias", "attn_mask"
ENDS = torch.tensor([0, 8], dtype=torch.int32)

ONE_CHANGE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no bias": lambda b: {"bias": None},
    "no mask": lambda b: {"attn_mask": None},
    "a bool mask": lambda b: {"attn_mask": b["attn_mask"].bool()},
    "a bias per row": lambda b: {"bias": torch.zeros(1, 2, 8, 1)},
    "an expanded bias": lambda b: {"bias": torch.zeros(1, 1, 1, 1).expand(1, 2, 1, 1)},
    "an expanded mask": lambda b: {"attn_mask": torch.zeros(1, 1, 8, 8).expand(2, 1, 8, 8)},
    "another dtype": lambda b: {name: b[name].bfloat16() for name in ("query", "key", "value")},
    "another dtype of key": lambda b: {"key": b["key"].bfloat16()},
    "another dtype of value": lambda b: {"value": b["value"].bfloat16()},
    "a device": lambda b: {name: b[name].to("meta") for name in TENSORS},
    "fewer query heads": lambda b: {"query": heads_tensor(heads=1)},
    "fewer heads": lambda b: {name: heads_tensor(heads=1) for name in ("key", "value")},
    "more keys": lambda b: {name: heads_tensor(length=9) for name in ("key", "value")},
    "another value dim": lambda b: {"value": heads_tensor(dim=8)},
    "packed": lambda b: {"packed": Packed(ENDS, ENDS, 8, 8)},
} | {
    f"{field}": lambda b, field=field: {"options": OPTIONS._replace(**{field: getattr(OTHER_OPTIONS, field)})}
    for field in Options._fields
} | {
    f"{name} {what}": lambda b, name=name, change=change: {name: change(b[name])}
    for name in TENSORS
    for what, change in {"misaligned": misaligned, "strided": lambda t: torch.stack([t, t], -1)[..., 0]}.items()
}  # fmt: skip


def signature(arguments: dict[str, Any]) -> Signature:
    return Problem(**arguments).signature


@pytest.mark.parametrize("what", ONE_CHANGE)
def test_what_differs_in_one_thing_shares_no_signature(what: str) -> None:
    first = signature(base())
    arguments = base()
    arguments |= ONE_CHANGE[what](arguments)
    assert signature(arguments) is not first
    assert signature(base()) is first


def test_packed_lengths_differ() -> None:
    packed = [Packed(ENDS, ENDS, *longest) for longest in ((8, 8), (9, 8), (8, 9))]
    packed.append(Packed(torch.tensor([0, 4, 8]), torch.tensor([0, 4, 8]), 8, 8))
    assert len({signature(base() | {"packed": each}) for each in packed}) == 4


def test_settings_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    first = signature(base())
    monkeypatch.setattr(settings, "sigmoid_form", "accurate")
    assert signature(base()) is not first
    monkeypatch.undo()
    assert signature(base()) is first


@pytest.fixture
def restored_precision() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize(("dtype", "differs"), [(torch.float32, True), (torch.float16, False)])
def test_the_precision_of_products_counts_in_float32(
    dtype: torch.dtype, differs: bool, restored_precision: None
) -> None:
    arguments = base() | {name: heads_tensor(dtype=dtype) for name in ("query", "key", "value")}
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    first = signature(arguments)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert (signature(arguments) is not first) == differs
    assert signature(arguments).allow_tf32 == differs


def test_forgotten_signatures_come_back_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    first = signature(base())
    _signature.cache_clear()
    again = signature(base())
    assert again is not first and vars(again).items() >= {"options": OPTIONS, "query": first.query}.items()


# Gradients.


def gradients(inputs: tuple[Tensor | None, ...], mask: list[bool]) -> tuple[Any, Any, Any]:
    return gradients_for(Problem(*inputs, None, OPTIONS, output_mask=tuple(mask)))


def test_gradients_are_new_and_laid_out_as_their_inputs() -> None:
    for mask in ([True] * 5, [True, False, True, True, False], [False, True, False, False, True], [True] * 5):
        for _ in range(2):  # then from what is known
            inputs = tuple(base()[name] for name in TENSORS)
            grads, written, layouts = gradients(inputs, mask)
            assert [grad is not None for grad in grads] == mask
            for each, grad, new, layout in zip(inputs, grads, written, layouts, strict=True):
                assert new is grad
                if grad is not None:
                    assert layout == layout_of(grad) and grad.dtype == each.dtype
                    assert grad.stride() == torch.empty_like(each).stride() and grad.data_ptr() != each.data_ptr()


def test_gradients_with_a_strided_last_dimension_are_written_elsewhere() -> None:
    for _ in range(2):
        inputs = tuple(base()[name] for name in TENSORS)
        inputs = (inputs[0].transpose(2, 3).contiguous().transpose(2, 3), *inputs[1:])
        grads, written, layouts = gradients(inputs, [True] * 5)
        assert written[0] is not grads[0] and written[1:] == grads[1:]
        assert grads[0].stride() == inputs[0].stride() and written[0].stride(3) == 1
        assert layouts == tuple(layout_of(new) for new in written)
        written[0].fill_(3.0)
        hand_over(grads, written)
        assert (grads[0] == 3.0).all()


def test_gradients_that_exist_are_taken_as_they_are() -> None:
    inputs = tuple(base()[name] for name in TENSORS)
    gradients(inputs, [True] * 5)
    given = (
        misaligned(torch.empty_like(inputs[0])),
        None,
        torch.empty(inputs[2].shape, dtype=torch.float16),
        None,
        None,
    )
    needed = True, False, True, False, False
    grads, written, layouts = gradients_for(Problem(*inputs, None, OPTIONS, output_mask=needed, grads=given))
    assert grads is given and list(written) == list(given)
    assert layouts == tuple(None if grad is None else layout_of(grad) for grad in given)


@pytest.mark.parametrize("by_inductor", [True, False])
def test_new_tensors_have_their_layout(by_inductor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_inductor:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu", raising=False)
    like = torch.empty_like(heads_tensor())
    make = maker_of(layout_of(like), like.device)
    first, second = make(), make()
    assert layout_of(first) == layout_of(second) == layout_of(like) and first.device == like.device
    assert first.data_ptr() != second.data_ptr() and not first._is_view()
    with torch.inference_mode():
        assert make().is_inference()


# Launches.


class Compiled:
    """Stands for Triton's compiled kernel."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append(("by Triton", grid, arguments))

    def run(self, *arguments: Any) -> None:
        self.calls.append(("directly", arguments))


class Kernel:
    """Stands for Triton's jitted kernel."""

    arg_names = ("tensor", "length", "BLOCK")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
        def compile(*arguments: Any, **options: int) -> Compiled:
            self.calls.append(("compiled", grid, arguments, options))
            return Compiled(self.calls)

        return compile


def launch_of(kernel: Kernel, tensor: Tensor, block: int = 16, device: str = "cuda:1", warps: int = 4) -> launch.Launch:
    arguments = {"length": 7, "BLOCK": block, "unknown": 0}
    return launch.Launch(kernel, 3, torch.device(device), (layout_of(tensor),), arguments, num_warps=warps)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The current stream of each device."""
    current = {0: 100, 1: 101}
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current[index], raising=False)
    return current


def test_a_compiled_kernel_runs_on_the_current_stream_of_its_device(streams: dict[int, int]) -> None:
    kernel, tensor = Kernel(), torch.zeros(4)
    run = launch_of(kernel, tensor)
    run(tensor)
    assert kernel.calls.pop() == ("compiled", (3, 1, 1), (tensor, 7, 16), {"num_warps": 4})
    for stream in (101, 202):
        streams[1] = stream
        run(tensor)
        hooks = None, None, None
        expected = "directly", (3, 1, 1, stream, "function", "metadata", *hooks, tensor, 7, 16)
        assert kernel.calls == [expected]
        kernel.calls.clear()


def test_hooks_are_told_by_triton(streams: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    kernel, tensor = Kernel(), torch.zeros(4)
    run = launch_of(kernel, tensor)
    run(tensor)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, name, lambda metadata: None)
            kernel.calls.clear()
            run(tensor)
            assert kernel.calls == [("by Triton", (3, 1, 1), (tensor, 7, 16))]
        chain = getattr(knobs.runtime, name)
        chain.add(print)
        try:
            kernel.calls.clear()
            run(tensor)
            assert kernel.calls == [("by Triton", (3, 1, 1), (tensor, 7, 16))]
        finally:
            chain.remove(print)
    kernel.calls.clear()
    run(tensor)
    assert kernel.calls[0][0] == "directly"


def test_what_triton_compiles_anew_shares_no_compiled_kernel(streams: dict[int, int]) -> None:
    kernel, tensor = Kernel(), torch.zeros(5)

    def is_compiled(**changes: Any) -> bool:
        """By its first launch."""
        kernel.calls.clear()
        launch_of(kernel, changes.pop("tensor", tensor), **changes)(tensor)
        return kernel.calls[0][0] == "compiled"

    assert is_compiled()
    assert not is_compiled()
    assert is_compiled(block=32)
    assert is_compiled(warps=8)
    assert is_compiled(device="cuda:0")
    assert is_compiled(tensor=tensor.half())
    assert is_compiled(tensor=tensor[1:])  # not aligned
    assert not is_compiled()


def test_recorded_launches_do_not_run(streams: dict[int, int]) -> None:
    kernel, tensor = Kernel(), torch.zeros(4)
    run, records = launch_of(kernel, tensor), []
    with recorded_by(lambda *record: records.append(record), descriptors=True):
        run(tensor)
    assert records == [(kernel, (3, 1, 1), (tensor, 7, 16), {"num_warps": 4})]
    assert not kernel.calls


# Tensor descriptors.


@pytest.mark.parametrize(("batch", "pays"), [(1, False), (8, True)])
def test_descriptors_are_for_many_scores(batch: int, pays: bool) -> None:
    query = torch.empty(batch, 8, 512, 64, device="meta", dtype=torch.float16)
    assert (query.shape[0] * 8 * 512 * 512 >= FEW_SCORES) == pays
    arguments = base() | {"query": query, "key": query, "value": query, "bias": None, "attn_mask": None}
    assert signature(arguments).tma(512) == pays
    with recorded_by(lambda *record: None, descriptors=False):
        assert not signature(arguments).tma(512)
    assert signature(arguments).tma(512) == pays


@pytest.mark.parametrize(
    ("dtype", "keys", "const_bias", "biased", "forms"),
    [
        (torch.bfloat16, 1000, 0.0, False, (FAST, TAIL)),
        (torch.bfloat16, 9000, 0.0, False, (ACCURATE, TAIL)),
        (torch.bfloat16, 9000, 0.0, True, (AUTO, TAIL)),
        (torch.float16, 1000, 0.0, False, (ACCURATE, ACCURATE)),
        (torch.float16, 1000, -2.0, True, (ACCURATE, CUBIC_TAIL)),
        (torch.float16, 9000, 0.0, False, (ACCURATE, CUBIC_TAIL)),
        (torch.float32, 9000, 0.0, False, (ACCURATE, ACCURATE)),
    ],
)
def test_forms_of_the_sigmoid_by_dtype_and_bias(
    dtype: torch.dtype, keys: int, const_bias: float, biased: bool, forms: tuple[int, int]
) -> None:
    query, key = torch.empty(1, 1, 64, 16, dtype=dtype), torch.empty(1, 1, keys, 16, dtype=dtype)
    bias = torch.empty(1, 1, 1, 1) if biased else None
    options = Options(0.25, const_bias)
    arguments = Problem(query, key, key, bias, None, None, options).signature.arguments()
    assert (arguments["FORM"], arguments["SLOW"]) == forms
    softcapped = Problem(query, key, key, bias, None, None, options._replace(softcap=1.0)).signature.arguments()
    assert (softcapped["FORM"], softcapped["SLOW"]) == forms
    assert softcapped["SOFTCAP"] == (EXACT_TANH if dtype == torch.float32 else SHORT_TANH)
    mask = torch.empty(1, 1, 64, keys, dtype=torch.bool)
    masked = Problem(query, key, key, bias, mask, None, options).signature.arguments()
    assert (masked["FORM"], masked["SLOW"], masked["SOFTCAP"]) == (ACCURATE, ACCURATE, NO_TANH)
