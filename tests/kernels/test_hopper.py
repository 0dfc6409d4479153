"""The Gluon kernels for Hopper GPUs compile, as they must to be fast; here, without a GPU. test_flash.py runs them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import h100
import pytest
import torch
import triton

try:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.kernels import dispatch, hopper_bwd, hopper_bwd_wide, hopper_fwd, launch
from sigswap.kernels.reference import Options
from sigswap.kernels.triton_common import ACCURATE, AUTO, CUBIC_TAIL, FAST, TAIL

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
    **constants: Any,
) -> None:
    """The kernel compiles for a Hopper GPU, and ptxas leaves its matrix products asynchronous.

    rows: of a tile of each described tensor, [1, 1, rows, width]; or its rows and columns; dS has no other dimensions.
        Of the other tensors those are given that are not among the constants.
    described_bias: whether the bias comes by tiles of 64 rows, too.
    spilled: bytes of registers that may be.
    """
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    of_rows = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    tiles = {name: n if isinstance(n, tuple) else (n, width) for name, n in rows.items()}
    types = {name: f"tensordesc<{dtype}[1,1,{n},{columns}],{shared!r}>" for name, (n, columns) in tiles.items()}
    if "ds" in tiles:
        of_ds = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        types["ds"] = f"tensordesc<{dtype}[{tiles['ds'][0]},{tiles['ds'][1]}],{of_ds!r}>"
    types |= dict.fromkeys(("sums", "parts", "bias", "floor"), "*fp32") | {"scale": "fp32", "const_bias": "fp32"}
    if described_bias:
        types["bias"] = f"tensordesc<fp32[1,64],{of_rows!r}>"
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


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("dtype", "band", "form", "grouped", "bias"),
    [
        ("bf16", "none", FAST, False, None),
        ("bf16", "causal", TAIL, False, None),
        ("bf16", "causal", AUTO, True, "heads"),
        ("fp16", "window", ACCURATE, False, "heads"),
        ("fp16", "causal", CUBIC_TAIL, False, None),
        ("bf16", "none", FAST, False, "rows"),
        ("bf16", "causal", AUTO, True, "rows"),
        ("bf16", "window", AUTO, False, "given rows"),  # without gradient
        ("fp16", "window", ACCURATE, False, "rows"),
        ("fp16", "none", CUBIC_TAIL, True, "rows"),
    ],
)
def test_the_backward_compiles_with_its_products_in_flight(
    dim: int, dtype: str, band: str, form: int, grouped: bool, bias: str | None, tmp_path: Path
) -> None:
    by_row = bias in ("rows", "given rows")
    constants = features(dtype, band, form, bottom_right=grouped) | {
        "DIM": dim,
        "BANDED": band != "none",
        "BIAS_ROWS": by_row,
        "SUMS": bias == "heads",
        "ROW_SUMS": bias == "rows",
        "GROUPED": grouped,
    }
    constants |= {"VISIBLE": False} if by_row else {}
    absent: dict[str, Any] = {} if bias else {"bias": None}
    absent |= {} if bias == "heads" else {"parts": None}
    absent |= {} if by_row and form == AUTO else {"floor": None}
    rows = {"q": 64, "k": 128, "v": 128, "do": 64, "dk": 64, "dv": 64}
    spilled = 160 if by_row else 128
    assert_products_in_flight(
        hopper_bwd._kernel, rows, dim, dtype, spilled, tmp_path, described_bias=by_row, **constants, **absent
    )


@pytest.mark.parametrize(("dim", "value_dim"), [(256, 256), (192, 128)])
@pytest.mark.parametrize(
    ("dtype", "band", "form", "grouped", "bias", "stored"),
    [
        ("bf16", "none", FAST, False, None, True),
        ("bf16", "causal", TAIL, False, None, True),
        ("bf16", "causal", AUTO, True, "heads", True),
        ("fp16", "window", ACCURATE, False, "heads", True),
        ("bf16", "causal", AUTO, True, "rows", True),
        ("fp16", "none", CUBIC_TAIL, True, "rows", True),
        ("bf16", "none", FAST, False, None, False),
        ("bf16", "causal", AUTO, True, "heads", False),
        ("bf16", "causal", AUTO, True, "rows", False),
    ],
)
def test_the_backward_of_wide_heads_compiles_with_its_products_in_flight(
    dim: int,
    value_dim: int,
    dtype: str,
    band: str,
    form: int,
    grouped: bool,
    bias: str | None,
    stored: bool,
    tmp_path: Path,
) -> None:
    """stored: whether dS goes through memory, or dQ is added up."""
    by_row = bias == "rows"
    constants = features(dtype, band, form, bottom_right=grouped) | {
        "BANDED": band != "none",
        "BIAS_ROWS": by_row,
        "SUMS": bias == "heads",
        "ROW_SUMS": by_row and not stored,
        "GROUPED": grouped,
        "STAGES": 2 if dim == 256 else 3,
    }
    constants |= {"VISIBLE": False} if by_row else {}
    absent: dict[str, Any] = {} if bias else {"bias": None}
    absent |= {} if bias == "heads" else {"parts": None}
    absent |= {} if by_row and form == AUTO else {"floor": None}
    absent |= {"sums": None} if stored else {"ds": None}
    tiles: dict[str, int | tuple[int, int]] = {"ds": (64, 64)} if stored else {}
    for name in ("q", "k", "v", "do", "dk", "dv"):
        wide, rest = hopper_bwd_wide._columns(dim if name in ("q", "k", "dk") else value_dim)
        tiles[name] = 64, wide
        if rest:
            tiles[f"{name}_rest"] = 64, rest
        else:
            absent[f"{name}_rest"] = None
    spilled = 0 if stored or dim < 256 else 64
    assert_products_in_flight(
        hopper_bwd_wide._kernel, tiles, 0, dtype, spilled, tmp_path, described_bias=by_row, **constants, **absent
    )


@pytest.mark.parametrize("dim", [192, 256])
@pytest.mark.parametrize("banded", [False, True])
def test_the_product_of_ds_and_keys_is_in_flight(dim: int, banded: bool, tmp_path: Path) -> None:
    kernel = hopper_bwd_wide._queries_kernel
    constants: dict[str, Any] = {"HEAD_DIM": dim, "DIM": dim, "HAS_LEFT": banded, "HAS_RIGHT": banded}
    constants |= {"BOTTOM_RIGHT": False, "ROW_SUMS": False, "UNIT": 8, "WIDE": False, "db": None}
    wide, rest = hopper_bwd_wide._columns(dim)
    types = {"ds": "tensordesc<bf16[64,128]>", "k": f"tensordesc<bf16[1,1,64,{wide}]>", "dq": "*bf16", "scale": "fp32"}
    if rest:
        types["k_rest"] = f"tensordesc<bf16[1,1,64,{rest}]>"
    else:
        constants["k_rest"] = None
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={(at,): constants[name] for at, name in enumerate(names) if name in constants},
        attrs={(names.index("dq"),): [["tt.divisibility", 16]]},
    )
    assert_compiles(source, hopper_bwd_wide.MULTIPLY_OPTIONS, 0, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "band", "form", "bias"),
    [
        ("bf16", "none", FAST, None),
        ("bf16", "causal", TAIL, "heads"),
        ("bf16", "causal", AUTO, "rows"),
        ("fp16", "window", ACCURATE, None),
        ("fp16", "causal", CUBIC_TAIL, "heads"),
    ],
)
def test_the_forward_compiles_with_its_products_in_flight(
    dtype: str, band: str, form: int, bias: str | None, tmp_path: Path
) -> None:
    constants = features(dtype, band, form, bottom_right=False) | {"BIAS_ROWS": bias == "rows"}
    absent: dict[str, Any] = {} if bias else {"bias": None}
    rows = {"q": 64, "k": 128, "v": 128, "out": 64}
    assert_products_in_flight(hopper_fwd._kernel, rows, 128, dtype, 0, tmp_path, **constants, **absent)


def features(dtype: str, band: str, form: int, *, bottom_right: bool) -> dict[str, Any]:
    """The constants that both kernels have."""
    return {
        "VISIBLE": True,
        "HAS_LEFT": band == "window",
        "HAS_RIGHT": band != "none",
        "BOTTOM_RIGHT": bottom_right,
        "P_SCALE": 1024.0 if dtype == "fp16" else 1.0,
        "FORM": form if form in (FAST, AUTO) else ACCURATE,
        "SLOW": form if form in (ACCURATE, CUBIC_TAIL) else TAIL,
    }


@pytest.mark.parametrize("index", range(40))
def test_what_is_known_of_a_band_without_building_it(index: int) -> None:
    """How many keys all rows see together, whether each program of the backward has a key that some row sees, and each
    item of the forward a row that sees some: by counting."""
    draw = random.Random(index)
    q_len, kv_len = draw.choice((1, 60, 128, 300, 700)), draw.choice((1, 60, 128, 129, 300, 700))
    options = Options(
        scale=1.0,
        is_causal=draw.random() < 0.5,
        bottom_right=draw.random() < 0.5,
        window_left=draw.choice((-1, 0, 50, 200)),
        window_right=draw.choice((-1, 0, 50)),
    )
    query, key = torch.empty(1, 1, q_len, 64), torch.empty(1, 1, kv_len, 64)
    signature = launch.signature_of(query, key, key, None, None, options)
    shift, left, right = options.band(q_len, kv_len)
    row, column = torch.arange(q_len)[:, None] + shift, torch.arange(kv_len)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left is not None:
        visible &= column >= row - left
    if right is not None:
        visible &= column <= row + right
    assert hopper_bwd._visible_keys(signature) == int(visible.sum())
    seen = [bool(block.any()) for block in visible.split(hopper_bwd.KEYS, 1)]
    assert hopper_bwd._sees_every_block(signature) == all(seen)
    seen = [bool(block.any()) for block in visible.split(hopper_bwd_wide.KEYS, 1)]
    assert hopper_bwd_wide._sees_every_block(signature) == all(seen)
    seeing = [bool(item.any()) for item in visible.split(hopper_fwd.ROWS, 0)]
    assert hopper_fwd._sees_in_every_item(signature) == all(seeing)


def wide_suits(length: int = 4096, dim: int = 256, value_dim: int | None = None, **more: Any) -> bool:
    """Whether the backward of wide heads suits tensors that are on no GPU: two sequences of four heads, each of which
    two query heads share."""
    dtype = more.get("dtype", torch.bfloat16)
    query, key = (torch.empty(2, heads, length, dim, dtype=dtype, device="meta") for heads in (8, 4))
    value, grad_out = (torch.empty(2, n, length, value_dim or dim, dtype=dtype, device="meta") for n in (4, 8))
    needed = more.get("needed", [True, True, True, False, False])
    options = Options(dim**-0.5, **more.get("options", {}))
    tensors = grad_out, query, key, value, more.get("bias"), more.get("mask")
    return hopper_bwd_wide.suits(*tensors, needed, options)


def test_which_wide_heads_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)
    with h100.pretended():
        assert wide_suits() and wide_suits(dim=192, value_dim=128) and wide_suits(dim=136) and wide_suits(length=1024)
        assert wide_suits(dim=128, value_dim=256) and wide_suits(dtype=torch.float16)
        assert wide_suits(options={"is_causal": True}) and wide_suits(options={"window_left": 300, "window_right": 0})
        assert wide_suits(bias=torch.empty(1, 8, 4096, 1)) and wide_suits(bias=torch.empty(1, 8, 1, 1))
        assert not wide_suits(dim=128) and not wide_suits(dim=100, value_dim=100) and not wide_suits(dim=196)
        assert not wide_suits(dim=192, value_dim=64) and not wide_suits(dtype=torch.float32)
        assert not wide_suits(length=255) and not wide_suits(options={"is_causal": True, "window_left": 200})
        assert not wide_suits(options={"dropout_p": 0.1}) and not wide_suits(options={"softcap": 1.0})
        assert not wide_suits(mask=torch.ones(2, 1, 1, 4096, dtype=torch.bool))
        assert not wide_suits(needed=[True, True, False, False, False])


def test_determinism_of_wide_heads_is_a_matter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """dQ that is added up in no fixed order differs between runs; dS of one key head is let through memory up to a
    limit."""
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: 0)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with h100.pretended():
        assert wide_suits(length=8192) and not wide_suits(length=16384)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        assert wide_suits(length=16384)


@pytest.mark.parametrize("index", range(40))
def test_ds_goes_through_memory_by_as_many_heads_as_it_may_take(index: int) -> None:
    draw = random.Random(index)
    batch, kv_heads, group = draw.choice((1, 3, 16)), draw.choice((1, 4, 5)), draw.choice((1, 2, 8))
    q_len, kv_len = draw.choice((300, 1024, 5000, 16384)), draw.choice((300, 1024, 5000, 16384))
    query = torch.empty(batch, kv_heads * group, q_len, 256, dtype=torch.bfloat16, device="meta")
    key = torch.empty(batch, kv_heads, kv_len, 256, dtype=torch.bfloat16, device="meta")
    signature = launch.Signature(
        *(launch.contiguous_layout(tensor.shape, torch.bfloat16) for tensor in (query, key, key)),
        None, None, Options(1.0), torch.device("cpu"), "auto", False, None, True,
    )  # fmt: skip
    own = group * -(-q_len // 128) * 128 * -(-kv_len // 64) * 64 * 2
    at_once = hopper_bwd_wide._units_at_once(signature)
    if own > hopper_bwd_wide.MOST_BYTES:
        assert at_once == 0
    else:
        assert 1 <= at_once <= batch * kv_heads
        assert at_once == 1 or at_once * own <= hopper_bwd_wide.STORED_BYTES
        launches = -(-batch * kv_heads // at_once)
        fewest = -(-batch * kv_heads // max(1, hopper_bwd_wide.STORED_BYTES // own))
        assert launches == fewest


def test_another_gluon_leaves_the_other_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "sigswap.kernels.hopper_bwd", None)
    monkeypatch.delattr("sigswap.kernels.hopper_bwd")
    dispatch._device_kernels.cache_clear()
    try:
        kernels = dispatch._device_kernels(0)
    finally:
        dispatch._device_kernels.cache_clear()
    assert kernels is not None and kernels.hopper_fwd is None and kernels.hopper_bwd is None
    assert "this Triton's Gluon differs" in caplog.text
