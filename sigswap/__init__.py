"""Swap softmax attention for sigmoid attention (arXiv 2409.04431) in models that people already have.

>>> model = sigswap.convert(model)                        # in place, before fine-tuning
>>> print(sigswap.report(model))                          # what was swapped, what not, and why
>>> out = torch.compile(model, backend="sigswap")(x)      # swaps unconverted models at compile time, too
>>> sigswap.save(model, "out/"); model = sigswap.load("out/")
"""

from typing import TYPE_CHECKING, Any

from sigswap import errors, transformers_hook
from sigswap.attention import sigmoid_attention, sigmoid_attention_varlen
from sigswap.calibrate import calibrate, rank_sites
from sigswap.calibration_report import CalibrationReport, HeadRecord, SiteRanking
from sigswap.checkpoint import load, save
from sigswap.config import SigmoidConfig
from sigswap.convert import convert, inspect, is_converted, report, revert, softmax
from sigswap.distill import DistillationReport, distill, param_groups
from sigswap.explain import CompiledSite, CompileReport, explain
from sigswap.regional import compile_attention
from sigswap.report import Report, SiteRecord

if TYPE_CHECKING:
    from sigswap.inductor import InductorLaunches, InductorLowering, enable_inductor_lowering

__version__ = "0.1.0"
transformers_hook.install()  # from_pretrained of a saved model works once sigswap is imported; imports nothing itself

__all__ = [
    "CalibrationReport",
    "CompileReport",
    "CompiledSite",
    "DistillationReport",
    "HeadRecord",
    "InductorLaunches",
    "InductorLowering",
    "Report",
    "SigmoidConfig",
    "SiteRanking",
    "SiteRecord",
    "calibrate",
    "compile_attention",
    "convert",
    "distill",
    "enable_inductor_lowering",
    "errors",
    "explain",
    "inspect",
    "is_converted",
    "load",
    "param_groups",
    "rank_sites",
    "report",
    "revert",
    "save",
    "sigmoid_attention",
    "sigmoid_attention_varlen",
    "softmax",
]


def __getattr__(name: str) -> Any:
    """The names of sigswap.inductor, on use: it imports inductor, which takes seconds."""
    if name not in ("InductorLaunches", "InductorLowering", "enable_inductor_lowering"):
        raise AttributeError(f"module 'sigswap' has no attribute {name!r}")
    from sigswap import inductor

    return getattr(inductor, name)
