"""Swap softmax attention for sigmoid attention (arXiv 2409.04431) in models that people already have.

>>> model = sigswap.convert(model)                        # in place, before fine-tuning
>>> print(sigswap.report(model))                          # what was swapped, what not, and why
>>> out = torch.compile(model, backend="sigswap")(x)      # swaps unconverted models at compile time, too
>>> sigswap.save(model, "out/"); model = sigswap.load("out/")
"""

from typing import TYPE_CHECKING

from sigswap import errors, former_names
from sigswap.api import compare, convert, inspect
from sigswap.compiling import accelerate_backend
from sigswap.compiling.explain import CompiledSite, CompileReport, explain
from sigswap.compiling.regional import compile_attention
from sigswap.config import SigmoidConfig
from sigswap.conversion.install import revert
from sigswap.conversion.record import is_converted, report, set_row_cap
from sigswap.conversion.softmax import softmax
from sigswap.conversion.user_runs import watch
from sigswap.distributed.context import ContextParallel, context_parallel
from sigswap.distributed.heads import shard_heads
from sigswap.functional.attention import sigmoid_attention, sigmoid_attention_varlen
from sigswap.functional.block_mask import BlockMask
from sigswap.functional.paged import sigmoid_attention_paged
from sigswap.kernels.op import flops
from sigswap.kernels.op.decompositions import decompositions
from sigswap.report import Report, SiteRecord
from sigswap.saving import peft_hook, transformers_hook
from sigswap.saving.checkpoint import load, save
from sigswap.saving.replacing import recover
from sigswap.training import trainer_hook
from sigswap.training.calibrate import calibrate, rank_sites
from sigswap.training.calibration_report import CalibrationReport, HeadRecord, SiteRanking
from sigswap.training.comparison_report import Comparison, DistanceMeasure, LayerMeasure, Measure, PositionMeasure
from sigswap.training.distill import distill, param_groups
from sigswap.training.distillation_report import DistillationReport
from sigswap.training.lightning_hook import lightning_callback
from sigswap.training.lookups import Lookups
from sigswap.training.trainer_hook import calibration_callback
from sigswap.training.weight_decay import exempt_from_decay
from sigswap.version import __version__ as __version__
from sigswap.when_imported import WhenImported

former_names.keep()
WhenImported("torch.utils.flop_counter", flops.register).install()  # PyTorch's FLOP counter counts the ops
accelerate_backend.install()  # torch_compile_backend="sigswap" of Trainer's arguments
trainer_hook.install()  # Trainer's weight decay leaves sigswap's parameters alone
peft_hook.install()  # as does putting an adapter onto the wrong model
transformers_hook.install()  # from_pretrained of a saved model works once sigswap is imported; imports nothing itself

__all__ = [
    "BlockMask",
    "CalibrationReport",
    "Comparison",
    "CompileReport",
    "CompiledSite",
    "ContextParallel",
    "DistanceMeasure",
    "DistillationReport",
    "HeadRecord",
    "InductorLaunches",
    "InductorLowering",
    "LayerMeasure",
    "Lookups",
    "Measure",
    "PositionMeasure",
    "Report",
    "SigmoidConfig",
    "SiteRanking",
    "SiteRecord",
    "calibrate",
    "calibration_callback",
    "compare",
    "compile_attention",
    "context_parallel",
    "convert",
    "decompositions",
    "distill",
    "enable_inductor_lowering",
    "errors",
    "exempt_from_decay",
    "explain",
    "inspect",
    "is_converted",
    "lightning_callback",
    "load",
    "param_groups",
    "rank_sites",
    "recover",
    "report",
    "revert",
    "save",
    "set_row_cap",
    "shard_heads",
    "sigmoid_attention",
    "sigmoid_attention_paged",
    "sigmoid_attention_varlen",
    "softmax",
    "watch",
]

if TYPE_CHECKING:
    from sigswap.compiling.inductor import InductorLaunches, InductorLowering, enable_inductor_lowering
else:

    def __getattr__(name: str) -> object:
        """The names of sigswap.compiling.inductor, on use: it imports inductor, which takes seconds."""
        if name not in ("InductorLaunches", "InductorLowering", "enable_inductor_lowering"):
            raise AttributeError(f"module 'sigswap' has no attribute {name!r}")
        from sigswap.compiling import inductor

        return getattr(inductor, name)
