"""Inductor fuses what follows the attention into its kernel, where it can: judged on the code that it generates for an
H100, which need not be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h100
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config

triton = pytest.importorskip("triton")

OPTION = "epilogue_fusion_user_defined_triton_kernel"

pytestmark = [
    pytest.mark.skipif(not hasattr(config, OPTION), reason=f"needs inductor's {OPTION}, of torch 2.13 and later"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of PyTorch with CUDA, though no GPU"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton's interpreter compiles nothing"),
]

EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "another dtype": lambda out: out.float() * 3,
    "several": lambda out: (out * 2 + 1).clamp(min=0.9) - 0.5,
}
B, H, M, N, D = 2, 3, 70, 45, 24
"""The last tile has rows, keys and elements out of range."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogue(name: str, tmp_path: Path) -> None:
    epilogue = EPILOGUES[name]
    shapes = (B, H, M, D), (B, H, N, D), (B, H, N, D)

    def code(**options: bool) -> str:
        return h100.generated(lambda *inputs: epilogue(attention(*inputs)), *shapes, dtype=torch.float16, **options)

    apart, fused = code(), code(**{OPTION: True})
    for each, kernels, buffers in ((apart, 2, 2), (fused, 1, 1)):
        assert each.count("async_compile.triton(") == kernels
        assert each.count("= empty_strided_cuda(") == buffers

    torch.manual_seed(0)
    inputs = [torch.randn(b, n, h, d).half().transpose(1, 2) for b, h, n, d in shapes]
    query, key, value = (each.double() for each in inputs)
    expected = epilogue(torch.sigmoid(query @ key.mT * D**-0.5 - torch.tensor(N).log()) @ value)
    result = h100.run_generated(fused, inputs, tmp_path)
    assert result.dtype == epilogue(inputs[0]).dtype
    assert result.stride() == (M * H * D, D, H * D, 1)
    torch.testing.assert_close(result.double(), expected.double(), rtol=2e-3, atol=2e-3)
