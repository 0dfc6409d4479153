"""Swap softmax attention for sigmoid attention (arXiv 2409.04431) in models that people already have.

>>> model = sigswap.convert(model)                        # in place, before fine-tuning
>>> print(sigswap.report(model))                          # what was swapped, what not, and why
>>> out = torch.compile(model, backend="sigswap")(x)      # swaps unconverted models at compile time, too
>>> sigswap.save(model, "out/"); model = sigswap.load("out/")
"""

from sigswap import errors, transformers_hook
from sigswap.attention import sigmoid_attention, sigmoid_attention_varlen
from sigswap.checkpoint import load, save
from sigswap.config import SigmoidConfig
from sigswap.convert import convert, inspect, is_converted, report, revert
from sigswap.report import Report, SiteRecord

__version__ = "0.1.0"
transformers_hook.install()  # from_pretrained of a saved model works once sigswap is imported; imports nothing itself

__all__ = [
    "Report",
    "SigmoidConfig",
    "SiteRecord",
    "convert",
    "errors",
    "inspect",
    "is_converted",
    "load",
    "report",
    "revert",
    "save",
    "sigmoid_attention",
    "sigmoid_attention_varlen",
]
