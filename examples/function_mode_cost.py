"""What conversion costs per attention module in eager, besides the attention itself: the function mode's overhead.

A converted module runs its forward under a TorchFunctionMode, which sees each torch call in it. This times one
timm ViT attention as it is, and converted with the sigmoid op replaced by the very sdpa call that it took the place
of, so that only the mode's own cost is left. One thread, CPU, process time, the best of several rounds.

    python examples/function_mode_cost.py
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import sigswap


def microseconds(function: Callable[[], Any], rounds: int = 20, calls: int = 50) -> float:
    """Process time of one call, the best round's mean."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            function()
        best = min(best, (time.process_time() - start) / calls * 1e6)
    return best


def only_sdpa(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, **sigmoid: Any) -> Tensor:
    """Stands in for the sigmoid op: the original call."""
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)


def main() -> None:
    torch.set_num_threads(1)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=1, num_heads=3, img_size=32).eval()
    attention = model.blocks[0].attn
    converted = sigswap.convert(copy.deepcopy(model)).blocks[0].attn
    x = torch.randn(1, 5, 48)
    with torch.no_grad():
        plain = microseconds(lambda: attention(x))
        with patch("sigswap.conversion.mode.scaled_dot_product_attention", only_sdpa):
            moded = microseconds(lambda: converted(x))
        whole = microseconds(lambda: converted(x))
    print(f"attention module as it is        {plain:7.1f} us")
    print(f"under the mode, with the same op {moded:7.1f} us: the mode costs {moded - plain:.1f} us")
    print(f"converted (reference sigmoid op) {whole:7.1f} us")


if __name__ == "__main__":
    main()
