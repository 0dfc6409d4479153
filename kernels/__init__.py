"""The attention kernels: the registered ops (:mod:`sigswap.kernels.op.dense`) and what implements them.

:mod:`sigswap.kernels.reference` defines the result on every device, in plain PyTorch.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """On use: from the root of a clone, transformers takes this folder for its package ``kernels`` and imports it."""
    if name == "MASKED_SCORE":
        from sigswap.masked import MASKED_SCORE

        return MASKED_SCORE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
