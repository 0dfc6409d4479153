"""Whether the Gluon kernels for Hopper GPUs compile as they must to be fast, without a GPU; and problems for them that
take no memory."""

from __future__ import annotations

import re
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sigswap.kernels.hopper import backward as hopper_bwd
from sigswap.kernels.hopper import forward as hopper_fwd
from sigswap.kernels.hopper import forward_items
from sigswap.kernels.host.forms import ACCURATE, AUTO, CUBIC_TAIL, FAST, NO_TANH, SHORT_TANH, TAIL
from sigswap.kernels.host.launch import Launch
from sigswap.kernels.host.problem import Options, Problem

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def assert_products_in_flight(
    kernel: Any,
    rows: dict[str, int | tuple[int, int]],
    width: int,
    dtype: str,
    spilled: int,
    folder: Path,
    *,
    described_bias: bool = False,
    packed: bool = False,
    pointers: dict[str, str] | None = None,
    **constants: Any,
) -> None:
    """The kernel compiles for a Hopper GPU, and ptxas leaves its matrix products asynchronous.

    rows: of a tile of each described tensor, [1, 1, rows, width]; or its rows and columns; dS has no other dimensions.
        Of the other tensors those are given that are not among the constants.
    described_bias: whether the bias comes by tiles of 64 rows, too.
    packed: whether tiles are of packed sequences.
    pointers: the types of other tensors.
    spilled: bytes of registers that may be.
    """
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5 if packed else 4)
    of_rows = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    tiles = {name: n if isinstance(n, tuple) else (n, width) for name, n in rows.items()}
    ones = "1,1,1" if packed else "1,1"
    types = {name: f"tensordesc<{dtype}[{ones},{n},{columns}],{shared!r}>" for name, (n, columns) in tiles.items()}
    if "ds" in tiles:
        of_ds = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        types["ds"] = f"tensordesc<{dtype}[{tiles['ds'][0]},{tiles['ds'][1]}],{of_ds!r}>"
    types |= dict.fromkeys(("sums", "parts", "bias", "floor", "sum_out"), "*fp32")
    types |= dict.fromkeys(("scale", "const_bias", "row_cap", "softcap"), "fp32")
    of_dq = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=4)
    types |= {"dq": f"tensordesc<{dtype}[1,1,16,16],{of_dq!r}>", "chunks": f"tensordesc<fp32[4,256],{of_rows!r}>"}
    types["delta"] = f"tensordesc<fp32[1,64],{of_rows!r}>"
    if described_bias:
        types["bias"] = f"tensordesc<fp32[1,64],{of_rows!r}>"
    types |= {"plan": "*i32"} if packed else {}
    types |= pointers or {}
    constants |= {} if packed or "plan" not in kernel.arg_names else {"plan": None}
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = GluonASTSource(
        kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(at,): constants[name] for at, name in zip(count(), names) if name in constants},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if types.get(name, "")[:1] == "*"},
    )
    assert_compiles(source, {"num_warps": 4}, spilled, folder)


def assert_compiles(source: Any, options: dict[str, int], spilled: int, folder: Path) -> None:
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= 232448
    # ptxas says where it waits for each product before the next (C7510 to C7514), for one reason or another.
    (folder / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [PTXAS, "-v", "--gpu-name=sm_90a", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in said, said
    (stores,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(stores) <= spilled


def source_of(launch: Launch) -> ASTSource:
    """What Triton compiles for a launch, without a GPU."""
    names = launch._kernel.arg_names
    split = len(names) - len(launch._rest)
    tensors, rest = zip(names[:split], launch._key[2], strict=True), zip(names[split:], launch._rest, strict=True)
    kinds = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
    types = {name: "constexpr" if key is None else kinds[key[0]] for name, key in tensors}
    constants: dict[str, Any] = {name: None for name, kind in types.items() if kind == "constexpr"}
    for name, value in rest:
        types[name] = "constexpr" if name.isupper() else "fp32" if isinstance(value, float) else "i32"
        constants |= {name: value} if name.isupper() else {}
    return ASTSource(
        launch._kernel,
        signature=types,
        constexprs={(at,): constants[name] for at, name in enumerate(names) if name in constants},
        attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if types[name].startswith("*")},
    )


def assert_backward_products_in_flight(
    dim: int,
    dtype: str,
    band: str,
    form: int,
    grouped: bool,
    bias: str | None,
    folder: Path,
    *,
    capped: bool = False,
    packed: bool = False,
    softcapped: bool = False,
) -> None:
    by_row = bias in ("rows", "given rows")
    constants = features(dtype, band, form, bottom_right=grouped) | {
        "DIM": dim,
        "APART": dim == 64,
        "BANDED": band != "none",
        "BIAS_ROWS": by_row,
        "SUMS": bias == "heads",
        "ROW_SUMS": bias == "rows",
        "GROUPED": grouped,
        "DELTA": capped,
        "SOFTCAP": SHORT_TANH if softcapped else NO_TANH,
    }
    constants |= {"VISIBLE": False} if by_row else {}
    absent: dict[str, Any] = {} if bias else {"bias": None}
    absent |= {} if bias == "heads" else {"parts": None}
    absent |= {} if by_row and form == AUTO else {"floor": None}
    absent |= {} if capped else {"delta": None}
    has_ring = not packed and band != "window" and not softcapped and bias != "rows"
    absent |= {} if has_ring else {"dq": None, "chunks": None}
    rows: dict[str, int | tuple[int, int]] = {"q": 64, "k": 128, "v": 128, "do": 64, "dk": 64, "dv": 64}
    spilled = 32 if dim == 64 else 72 if dim == 96 else 256 if bias else 128
    width = 64 if dim == 64 else 128
    assert_products_in_flight(
        hopper_bwd._kernel,
        rows,
        width,
        dtype,
        spilled,
        folder,
        described_bias=by_row,
        packed=packed,
        **constants,
        **absent,
    )


def assert_forward_products_in_flight(
    dims: tuple[int, int],
    tile: forward_items.Tile,
    dtype: str,
    band: str,
    form: int,
    bias: str | None,
    spilled: int,
    folder: Path,
    *,
    capped: bool = False,
    sums: bool = False,
    packed: bool = False,
    softcapped: bool = False,
) -> None:
    """dims: head_dim, and value's. sums: whether those of rows are asked for."""
    constants = features(dtype, band, form, bottom_right=False) | {"BIAS_ROWS": bias == "rows", "CAP": capped}
    constants["SOFTCAP"] = SHORT_TANH if softcapped else NO_TANH
    constants |= tile.arguments(*dims)
    absent: dict[str, Any] = {} if bias else {"bias": None}
    absent |= {} if sums else {"sum_out": None}
    tiles: dict[str, int | tuple[int, int]] = {"q": (64, tile.part), "k": (tile.keys, tile.part)}
    tiles |= {"v": (tile.keys, tile.v_part), "out": (64, tile.stored)}
    more = constants | absent
    assert_products_in_flight(hopper_fwd._kernel, tiles, 0, dtype, spilled, folder, packed=packed, **more)


def features(dtype: str, band: str, form: int, *, bottom_right: bool) -> dict[str, Any]:
    """The constants that all these kernels have."""
    return {
        "VISIBLE": True,
        "HAS_LEFT": band == "window",
        "HAS_RIGHT": band != "none",
        "BOTTOM_RIGHT": bottom_right,
        "P_SCALE": 1024.0 if dtype == "fp16" else 1.0,
        "FORM": form if form in (FAST, AUTO) else ACCURATE,
        "SLOW": form if form in (ACCURATE, CUBIC_TAIL) else TAIL,
    }


def problem_on_no_gpu(length: int = 4096, dim: int = 256, value_dim: int | None = None, **more: Any) -> Problem:
    """Of two sequences of four heads, each of which two query heads share; for :func:`no_memory`."""
    dtype = more.get("dtype", torch.bfloat16)
    query, key = (torch.empty(2, heads, length, dim, dtype=dtype, device="meta") for heads in (8, 4))
    value, grad_out = (torch.empty(2, n, length, value_dim or dim, dtype=dtype, device="meta") for n in (4, 8))
    options = Options(dim**-0.5, **more.get("options", {}))
    needed = more.get("needed", (True, True, True, False, False))
    mask = more.get("mask")
    return Problem(query, key, value, more.get("bias"), mask, None, options, grad_out=grad_out, output_mask=needed)
