"""An H100 that need not be there, for what compilers make for it.

Triton's front end and inductor need to know a GPU's properties, and no more, to generate their source text. What they
generate runs on a CPU in Triton's interpreter, in a process of its own: ``python tests/support/h100.py <folder>``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._triton
from torch import Tensor

_PROPERTIES = types.SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Triton compiles for an H100, and sigswap's op runs its kernels wherever its tensors are."""
    import triton
    from triton.backends.compiler import GPUTarget

    from sigswap.kernels import dispatch

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def usable(names: tuple[str, ...], device: int) -> list[tuple[str, Any]]:
        return [(name, dispatch._module(name)) for name in names]

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver()))
        stack.enter_context(mock.patch.object(dispatch, "_usable", usable))
        stack.enter_context(mock.patch.object(dispatch, "_on", lambda device: contextlib.nullcontext()))
        yield


@contextlib.contextmanager
def _pretended_to_inductor() -> Iterator[None]:
    from torch._dynamo.device_interface import CudaInterface

    answers = {
        (CudaInterface, "is_available"): lambda: True,
        (CudaInterface, "is_bf16_supported"): lambda including_emulation=False: True,
        (CudaInterface, "get_device_properties"): lambda device=None: _PROPERTIES,
        (CudaInterface, "get_compute_capability"): lambda device=None: 90,
        (CudaInterface.Worker, "get_device_properties"): lambda device=None: _PROPERTIES,
        (torch.cuda, "get_device_properties"): lambda device=None: _PROPERTIES,
        (torch.cuda, "current_device"): lambda: 0,
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), answer in answers.items():
            stack.enter_context(mock.patch.object(owner, name, staticmethod(answer)))
        # What PyTorch has found out before, and finds out here, is remembered.
        stack.callback(_forget_gpus)
        _forget_gpus()
        yield


def _forget_gpus() -> None:
    for known in vars(torch.utils._triton).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()


class _Generated(BaseException):
    """Carries inductor's source text past everything that would compile and load it."""


def generated(function: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> str:
    """What inductor generates for the function, compiled with ``backend="sigswap"``.

    shapes: of its arguments on the GPU, [B, H, N, D], which are stored as [B, N, H, D].
    options: inductor's.
    """
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    def grab(code: str) -> None:
        raise _Generated(code)

    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(pretended())
            stack.enter_context(_pretended_to_inductor())
        stack.enter_context(mock.patch.object(GraphLowering, "save_output_code", staticmethod(grab)))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1))
        stack.enter_context(FakeTensorMode())
        inputs = [torch.empty(b, n, h, d, dtype=dtype, device="cuda").transpose(1, 2) for b, h, n, d in shapes]
        try:
            torch.compile(function, backend="sigswap", fullgraph=True, options={"inner_options": options})(*inputs)
        except _Generated as result:
            return str(result.args[0])
    raise AssertionError("inductor generated no code")


def run_generated(code: str, inputs: list[Tensor], folder: Path) -> Tensor:
    """The first result of the code that was generated, on a CPU."""
    (folder / "code.py").write_text(code)
    torch.save(inputs, folder / "inputs.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt")


def _main(folder: Path) -> None:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    def autotune(configs: Any, inductor_meta: Any, triton_meta: dict[str, Any], **others: Any) -> Any:
        """The launcher of a kernel whose constants have names in upper case, as sigswap's."""
        constants = triton_meta["constants"] | {"ASM": False}  # the interpreter has no assembly

        def launcher(kernel: Any) -> Any:
            names = [name for name in kernel.arg_names if not name.isupper()]

            def run(*arguments: Any, stream: Any) -> None:
                given = dict(zip(names, arguments, strict=False))
                kernel[arguments[len(names) :]](**(given | constants))

            return types.SimpleNamespace(run=run)

        return launcher

    def load(compiler: Any, name: str, source: str, device_str: str) -> Any:
        path = folder / f"{name}.py"  # the interpreter reads a kernel's source
        path.write_text(source)
        return _module(path).__dict__[name]

    triton_helpers.set_driver_to_gpu = lambda: None
    triton_heuristics.user_autotune = autotune
    AsyncCompile.triton = load
    torch._C._dynamo.guards._empty_strided_cuda = _unwritten
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.cuda._DeviceGuard = lambda device: contextlib.nullcontext()
    torch.cuda.set_device = lambda device: None
    result = _module(folder / "code.py").call(torch.load(folder / "inputs.pt"))
    torch.save(result[0], folder / "result.pt")


def _unwritten(size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, strides, dtype=dtype).fill_(float("nan"))


def _module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
