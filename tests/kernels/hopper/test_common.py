"""The assembly of the soft cap and of the sigmoid computes what it says; here, line by line in NumPy. test_flash.py has
a GPU's. And which caps the kernels take."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import pytest
import torch

from sigswap.kernels.host.problem import Options, Problem

pytest.importorskip("triton")
try:
    from sigswap.kernels.hopper.common import (
        BY_KEY,
        BY_ROW,
        SCALE,
        SINGLE_ASSEMBLY,
        exact_assembly,
        soft_cap_assembly,
        tail_assembly,
        takes_soft_cap,
    )
except (ImportError, AttributeError) as error:
    pytest.skip(f"this Triton has no Gluon, or another one: {error}", allow_module_level=True)

F32 = np.float32
LANES = 32


def run(assembly: str, operands: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """The registers after the lines of PTX; each is an array of a warp's lanes."""
    registers = {f"${at}": value for at, value in operands.items()}

    def read(name: str) -> np.ndarray:
        if name.startswith(("0f", "0x")):
            return np.full(LANES, struct.unpack(">f", bytes.fromhex(name[2:]))[0], F32)
        return registers[name]

    text = re.sub(r"\.reg [^;]*;", "", assembly.strip("{} "))
    lines = [line.strip() for line in re.sub(r"(LARGE|DONE):", r"\1:;", text).split(";") if line.strip()]
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.endswith(":"):
            continue
        if "bra" in line:
            condition, _, label = line.rpartition("bra ")
            if not condition or read(condition.strip()[1:]).any():
                at = lines.index(f"{label}:")
            continue
        name, _, rest = line.partition(" ")
        target, *sources = (each.strip() for each in rest.split(","))
        values = [read(each) for each in sources if each != "0xffffffff"]
        with np.errstate(all="ignore"):
            registers[target] = OPERATIONS[name](*values)
    return registers


OPERATIONS = {
    "mul.f32": lambda a, b: a * b,
    "add.f32": lambda a, b: a + b,
    "abs.f32": np.abs,
    "neg.f32": np.negative,
    "max.f32": np.fmax,
    "min.NaN.f32": np.minimum,
    "min.u32": lambda a, b: np.minimum(a.view(np.uint32), b.view(np.uint32)).view(F32),
    "setp.lt.u32": lambda a, b: a.view(np.uint32) < b.view(np.uint32),
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(F32),
    "ex2.approx.ftz.f32": np.exp2,
    "rcp.approx.ftz.f32": np.reciprocal,
    "setp.gt.f32": np.greater,
    "setp.lt.f32": np.less,
    "setp.gtu.f32": lambda a, b: ~(a <= b),
    "or.pred": np.logical_or,
    "vote.sync.any.pred": lambda a: np.full(LANES, a.any()),
    "cvt.rn.f16x2.f32": lambda high, low: np.stack([low, high]).astype(np.float16),
}


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("kind", ["small", "large", "one large"])
@pytest.mark.parametrize("scale", [0.0884 / 50, -0.0625 / 30, 0.0625 / 1000, 1.0, 5000.0, 1e-20])
@pytest.mark.parametrize("factor", [25.0, 72.0])
def test_soft_cap_assembly(slope: bool, kind: str, scale: float, factor: float) -> None:
    draw = np.random.default_rng(0)
    pack = 8
    u = draw.uniform(-1, 1, (pack, LANES)) * (6 if kind == "large" else 1)
    u[0, 0] = 0
    if kind == "one large":
        u[5, 7] = -3
    s, bias = (u / scale).astype(F32), draw.normal(0, 3, (pack, LANES)).astype(F32)
    found = of_tile(s, bias, scale, factor, slope)
    tanh = np.tanh(s.astype(np.float64) * float(F32(scale)))
    # Of the exponential's form the error is absolute.
    assert (np.abs(found[0] - (factor * tanh + bias)) <= factor * (8e-6 * np.abs(tanh) + 5e-7) + 1e-6).all()
    if slope:
        assert (np.abs(found[1] - (1 - tanh**2)) <= 6e-4 * (1 - tanh**2) + 2e-5).all()


def test_soft_cap_assembly_keeps_nan_and_infinity() -> None:
    for numbers, expected in (([np.nan], np.nan), ([np.inf], 50.0), ([-np.inf], -50.0), ([np.nan, np.inf], np.nan)):
        s = np.ones((8, LANES), F32)
        s[3, : len(numbers)] = numbers
        found, _ = of_tile(s, np.zeros_like(s), 0.01, 50.0, False)
        assert np.array_equal(found[3, 0], F32(expected), equal_nan=True)
        rest = np.delete(found, 3, 0)
        assert np.allclose(rest, 50 * np.tanh(0.01), rtol=1e-5)


@pytest.mark.parametrize(
    ("scale", "cap", "taken"), [(0.1, 30.0, True), (0.1, 1e5, False), (-0.1, 1e4, False), (100.0, 1e5, True)]
)
def test_caps_far_above_all_scores_are_left_to_others(scale: float, cap: float, taken: bool) -> None:
    """The error of the exponential's form is one of the cap."""
    rows = torch.empty(1, 1, 256, 64, dtype=torch.bfloat16)
    assert takes_soft_cap(Problem(rows, rows, rows, None, None, None, Options(scale, softcap=cap))) == taken


def of_tile(s: np.ndarray, bias: np.ndarray, scale: float, factor: float, slope: bool) -> tuple[np.ndarray, ...]:
    pack = len(s)
    others = pack // 2 if slope else 0
    inputs = [*s, *bias, *[np.full(LANES, scale, F32)] * pack, *[np.full(LANES, factor, F32)] * pack]
    after = run(soft_cap_assembly(pack, slope=slope), {pack + others + at: value for at, value in enumerate(inputs)})
    found = np.stack([after[f"${at}"] for at in range(pack)])
    slopes = np.concatenate([after[f"${pack + at}"] for at in range(others)]) if slope else found
    return found, slopes


def sigmoid_of(assembly: str, y: np.ndarray) -> np.ndarray:
    """y: [elements, lanes]."""
    pack = len(y)
    registers = run(assembly, {pack + i: each for i, each in enumerate(y)})
    return np.stack([registers[f"${i}"] for i in range(pack)])


@pytest.mark.parametrize("sharing", [BY_ROW, BY_KEY])
@pytest.mark.parametrize(("pack", "cubic"), [(32, False), (32, True), (8, False), (8, True)])
@pytest.mark.parametrize("kind", ["small", "large", "one large", "huge"])
def test_tail_assembly(sharing: tuple[tuple[int, ...], ...], pack: int, cubic: bool, kind: str) -> None:
    y = np.random.default_rng(0).uniform(-40, -5.0001, (pack, LANES)).astype(F32)
    y[1, 2] = -np.inf
    if kind == "one large":
        y[5, 7] = 3
    elif kind != "small":
        y[:, 9] = np.linspace(-50, 20 if kind == "large" else 2000, pack)
    found = sigmoid_of(tail_assembly(pack, sharing, cubic=cubic), y)
    exact = 1 / (1 + np.exp2(-y.astype(np.float64)))
    allowed = np.exp2((3 if cubic else 2) * y.astype(np.float64)) if kind == "small" else 0
    assert (np.abs(found - exact) <= (allowed + 1e-6) * exact).all()
    assert found[1, 2] == 0


@pytest.mark.parametrize("kind", ["small", "large"])
def test_scaled_tail_assembly(kind: str) -> None:
    """Off by 5e-4 of itself at most, and by less where it is small; exact where one of the warp's is large."""
    y = np.random.default_rng(0).uniform(-40, -5.0001, (32, LANES)).astype(F32)
    y[1, 2] = -np.inf
    if kind == "large":
        y[5, 7] = 3
    found = sigmoid_of(tail_assembly(32, BY_ROW, scaled=True), y) / SCALE
    exact = 1 / (1 + np.exp2(-y.astype(np.float64)))
    allowed = np.minimum(0.016 * exact, 5.5e-4) if kind == "small" else 0
    assert (np.abs(found - exact) <= (allowed + 1e-6) * exact).all()
    assert found[1, 2] == 0


@pytest.mark.parametrize("sharing", [BY_ROW, BY_KEY])
@pytest.mark.parametrize("scaled", [False, True])
def test_exact_assembly(sharing: tuple[tuple[int, ...], ...], scaled: bool) -> None:
    y = np.random.default_rng(0).uniform(-100, 100, (8, LANES)).astype(F32)
    y[:, 0] = [-np.inf, np.inf, 0, -126, 129, 3e38, -3e38, 30]
    found = sigmoid_of(exact_assembly(8, sharing, scaled=scaled), y) / (SCALE if scaled else 1)
    exact = 1 / (1 + np.exp2(-np.clip(y.astype(np.float64), -1000, 1000)))
    assert (np.abs(found - exact) <= 1e-6 * exact + 2e-38).all()
    assert found[0, 0] == 0


def test_the_assembly_of_single_scores() -> None:
    y = np.linspace(-160, 160, LANES, dtype=F32)
    y[:3] = np.nan, np.inf, -np.inf
    found = sigmoid_of(SINGLE_ASSEMBLY, y[None])[0]
    assert np.isnan(found[0]) and found[1] == 1 and found[2] == 0
    expected = 1 / (1 + np.exp2(-y[3:].astype(np.float64)))
    assert (np.abs(found[3:] - expected) <= 1e-6 * expected + 1e-38).all()


@pytest.mark.parametrize("assembly", [tail_assembly, exact_assembly])
@pytest.mark.parametrize("sharing", [BY_ROW, BY_KEY])
@pytest.mark.parametrize("broken", range(8))
def test_a_score_that_is_nan_spoils_no_other_row(
    assembly: Any, sharing: tuple[tuple[int, ...], ...], broken: int
) -> None:
    """Of a product's tile a thread has pairs of columns, each in two rows that are 8 apart."""
    y = np.full((8, LANES), -3, F32)
    y[broken] = np.nan
    found = np.isnan(sigmoid_of(assembly(8, sharing), y)).any(1)
    of_row = [i // 2 % 2 if sharing == BY_ROW else (i % 2, i // 4) for i in range(8)]
    assert found[broken]
    assert all(of_row[i] == of_row[broken] for i in range(8) if found[i])
