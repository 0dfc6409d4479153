"""The Gluon kernels for Hopper GPUs compile, as they must to be fast; here, without a GPU. test_flash.py runs them."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

try:
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
except ImportError as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

from sigswap.kernels import dispatch
from sigswap.kernels.hopper import backward as hopper_bwd
from sigswap.kernels.hopper import backward_common
from sigswap.kernels.hopper import forward as hopper_fwd
from sigswap.kernels.host.forms import ACCURATE, AUTO, CUBIC_TAIL, FAST, TAIL
from sigswap.kernels.host.problem import Options, Problem

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def assert_products_in_flight(
    kernel: Any,
    rows: dict[str, int],
    width: int,
    dtype: str,
    spilled: int,
    folder: Path,
    *,
    described_bias: bool = False,
    **constants: Any,
) -> None:
    """The kernel compiles for a Hopper GPU, and ptxas leaves its matrix products asynchronous.

    rows: of a tile of each described tensor. Of the other tensors those are given that are not among the constants.
    described_bias: whether the bias comes by tiles of 64 rows, too.
    spilled: bytes of registers that may be.
    """
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    of_rows = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    types = {name: f"tensordesc<{dtype}[1,1,{n},{width}],{shared!r}>" for name, n in rows.items()}
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
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
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
    signature = Problem(query, key, key, None, None, None, options).signature
    shift, left, right = options.band(q_len, kv_len)
    row, column = torch.arange(q_len)[:, None] + shift, torch.arange(kv_len)
    visible = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left is not None:
        visible &= column >= row - left
    if right is not None:
        visible &= column <= row + right
    assert backward_common.visible_keys(signature) == int(visible.sum())
    seen = [bool(block.any()) for block in visible.split(hopper_bwd.KEYS, 1)]
    assert backward_common.sees_every_block(signature, hopper_bwd.KEYS) == all(seen)
    seeing = [bool(item.any()) for item in visible.split(hopper_fwd.ROWS, 0)]
    assert hopper_fwd._sees_in_every_item(signature) == all(seeing)


def test_another_gluon_leaves_the_other_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    caches = dispatch._usable, dispatch._obstacle, dispatch._say_once
    for cache in caches:
        cache.cache_clear()
    try:
        assert [name for name, _ in dispatch._usable(dispatch.BACKWARD, 0)] == list(dispatch.BACKWARD)
        for name in ("forward", "backward"):
            monkeypatch.setitem(sys.modules, f"sigswap.kernels.hopper.{name}", None)
            monkeypatch.delattr(f"sigswap.kernels.hopper.{name}")
        dispatch._usable.cache_clear()
        for names in (dispatch.FORWARD, dispatch.BACKWARD):
            others = [name for name in names if not name.startswith("hopper.")]
            assert [name for name, _ in dispatch._usable(names, 0)] == others
    finally:
        for cache in caches:
            cache.cache_clear()
    assert "this Triton's Gluon differs" in caplog.text
