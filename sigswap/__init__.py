"""Swap softmax attention for sigmoid attention (arXiv 2409.04431) in models that people already have.

>>> model = sigswap.convert(model)                        # in place, before fine-tuning
>>> print(sigswap.report(model))                          # what was swapped, what not, and why
>>> out = torch.compile(model, backend="sigswap")(x)      # swaps unconverted models at compile time, too
>>> sigswap.save(model, "out/"); model = sigswap.load("out/")
"""

from sigswap import errors
from sigswap.attention import sigmoid_attention
from sigswap.config import SigmoidConfig
from sigswap.convert import convert, inspect, is_converted, report, revert
from sigswap.report import Report, SiteRecord

__version__ = "0.1.0"
__all__ = [
    "Report",
    "SigmoidConfig",
    "SiteRecord",
    "convert",
    "errors",
    "inspect",
    "is_converted",
    "report",
    "revert",
    "sigmoid_attention",
]
