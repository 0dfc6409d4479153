"""``convert`` and ``inspect``: find the softmax attentions of a model, plan them, install the plan, calibrate it;
``compare``: open the original, and measure.

They are above the rooms that they compose, so that conversion need not know training, which builds on it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from sigswap.config import SigmoidConfig
from sigswap.conversion.example_inputs import resolve_examples
from sigswap.conversion.implementations import Reachable, reachable
from sigswap.conversion.install import convert_within, installed
from sigswap.conversion.keeping import thread_state
from sigswap.conversion.record import Conversion, check_unconverted
from sigswap.conversion.recording import LOOKING, Recording
from sigswap.conversion.search import search, selected
from sigswap.conversion.untouched import random_state
from sigswap.conversion.user_runs import forget_calls
from sigswap.conversion.wrappers import check_uncompiled, check_undistributed, check_unreduced, unwrapped
from sigswap.distributed.adding import holders, spread_added
from sigswap.distributed.shards import reshard
from sigswap.errors import (
    ArgumentError,
    ConversionError,
    Hint,
    NoAttentionError,
    UnswappableSiteError,
    check_flag,
)
from sigswap.report import Report
from sigswap.saving import sources
from sigswap.saving.checkpoint import is_saved, load
from sigswap.training.calibrate import calibrate
from sigswap.training.compare import compare_models
from sigswap.training.comparison_report import Comparison
from sigswap.transaction import Transaction


def convert(
    model: nn.Module,
    config: SigmoidConfig | None = None,
    *,
    example_inputs: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    strict: bool = True,
    calibrate_with: Any = None,
) -> nn.Module:
    """Swaps the softmax attentions of ``model`` for sigmoid attention, in place, and returns the same object.

    The sites are found by one run on fake tensors (no memory or compute of the model's size; a model on the meta
    device works as well). Every module that owns a site gets a child ``sigswap`` with the new parameters
    (``<owner>.sigswap.*`` in state_dict); the base parameters keep their names. From then on the model computes
    ``sigmoid(score + b)`` there, in eager, under any compile backend and in export (:class:`SigmoidConfig`: what b is).

    Where the model is spread over processes already, by ``fully_shard`` or by tensor parallelism, all that hold parts
    of it call this, and the new parameters are spread as those beside them are, per head where the heads are divided.

    Args:
        model: the model; it may be on any device, also meta, or on several by accelerate (``device_map``).
        config: what becomes of each site; ``SigmoidConfig()`` by default.
        example_inputs: what the model is run on to find its sites: a tensor, a tuple of positional arguments, a dict of
            keyword arguments, or a list of those, one for each path through the code that is to be converted; or, for
            a model of which only parts can be run, a dict from the path of such a module to its inputs. By default what
            was run of the model inside :func:`sigswap.watch`, or else what it knows of itself (transformers, timm).
        include: glob patterns of module paths; only the attention modules that match one are swapped.
        exclude: glob patterns of module paths that stay as they are.
        strict: an attention that cannot be swapped is an error; otherwise it stays softmax and the report says why.
        calibrate_with: batches for :func:`sigswap.calibrate`, which is then run on the converted model.

    Raises:
        NoAttentionError: there is nothing to swap.
        UnswappableSiteError: ``strict``, and an attention cannot be swapped.
        AlreadyConvertedError: the model is converted already.
        ExampleInputsError: no inputs are known, or the model's forward fails on them.
        ConfigError: the config cannot be applied to a site.
        ConversionError: the model is compiled or scripted, or a module cannot be converted; or, of a model that is
            spread over processes, the ranks convert it in other ways than one another, it does not run on fake tensors,
            its heads cannot be divided evenly, or it is inside DistributedDataParallel.
        CalibrationError, ArgumentError: as sigswap.calibrate raises them.

    Whatever is raised, the model is as it was.

    Source: arXiv 2409.04431, with the bias ``-ln(n)`` per row (its section 3) over the visible keys.
    """
    config = SigmoidConfig() if config is None else config
    if not isinstance(config, SigmoidConfig):
        raise ArgumentError(f"{{argument}} must be a SigmoidConfig, not a {type(config).__name__}.", argument="config")
    check_flag("strict", strict)
    too_high = config.saturated_bias()
    if too_high is not None:
        warnings.warn(
            f"bias={too_high!r} is a float, and added to every score as it is, so that each visible key has the weight "
            f"1. If -ln of a number of keys is meant, pass an int, bias={too_high:.0f}.",
            stacklevel=2,
        )
    _check_convertible(model)
    check_undistributed(model, "be converted", in_parts=True)
    check_unreduced(model, "be converted")
    whole, model = model, unwrapped(model)
    reshard(model)
    ranks = holders(model)
    with Transaction() as undo, undo:
        thread_state(undo.on_failure)
        undo.on_failure("the random state", random_state())
        LOOKING.take(undo.afterwards)
        recording = Recording(model)
        undo.on_failure("what the model's code keeps", recording.untouched.put_back)
        with ranks.all_or_none():
            conversion, change = _planned(recording, config, example_inputs, include, exclude, strict)
        ranks.check_same(config=config, attentions=conversion.owners)
        with ranks.all_or_none():
            convert_within(undo.on_failure, model, conversion)
            spread_added(undo.on_failure, model)
        change.install(model, undo.on_failure)
        if calibrate_with is not None:
            calibrate(model, calibrate_with)
        forget_calls(undo, model)
    return whole


def _planned(
    recording: Recording,
    config: SigmoidConfig,
    example_inputs: Any,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    strict: bool,
) -> tuple[Conversion, Reachable]:
    """What is to be installed on the recording's model, and the change of its attention implementation. Raises as
    :func:`convert` does; the model is not changed, and runs take other forms of it.
    """
    model = recording.model
    examples = resolve_examples(model, example_inputs)
    change = reachable(recording, examples)
    sites, report = search(recording, examples, change, include, exclude)
    stuck = [left for left in sites.left if left.attention and selected(left.path, include, exclude)]
    if stuck and strict:
        raise UnswappableSiteError(
            f"{len(stuck)} softmax attention(s) of {type(model).__name__} cannot be swapped: "
            + "; ".join(f"{left.path or '(the model)'}: {left.reason}" for left in stuck[:5])
            + ("; ..." if len(stuck) > 5 else "")
            + ".",
            hint=Hint(
                "Pass {strict} to leave them as softmax, or {exclude} to say which.",
                {"strict": "False", "exclude": "[...]"},
            ),
        )
    if not sites.owners:
        raise _nothing_to_swap(model, report, include, exclude)
    swapped = [dataclasses.replace(r, status="swapped") if r.status == "swappable" else r for r in report.sites]
    conversion = Conversion(
        config,
        tuple(sites.owners.values()),
        tuple(sorted(sites.guarded)),
        Report(swapped, report.notes),
        change.before,
    )
    for example in examples:
        recording.check(example, functools.partial(installed, conversion=conversion))
    return conversion, change


def inspect(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Report:
    """The dry run of :func:`convert`: what would be swapped, what not, and why. The model is not changed.

    Raises ExampleInputsError, AlreadyConvertedError or ConversionError as convert does; finding nothing is no error.
    """
    _check_convertible(model)
    model = unwrapped(model)
    with Transaction() as undo, undo:
        LOOKING.take(undo.afterwards)
        thread_state(undo.on_failure)
        undo.on_failure("the random state", random_state())
        recording = Recording(model)
        undo.on_failure("what the model's code keeps", recording.untouched.put_back)
        examples = resolve_examples(model, example_inputs)
        return search(recording, examples, reachable(recording, examples), include, exclude)[1]


def compare(
    model: nn.Module,
    original: nn.Module | str | os.PathLike[str] | None = None,
    batches: Any = None,
    *,
    tokens: Any = None,
    max_length: int | None = None,
    sequences: int = 16,
    seed: int = 0,
    progress: bool = True,
    allow_code: bool = False,
) -> Comparison:
    """What the swap did to a converted ``model``: its figures beside those of its softmax ``original``.

    For language models (decoders whose logits are over their vocabulary): the loss on the batches, overall and by the
    number of tokens before; the Kullback-Leibler divergence from the original and how often the most likely token
    agrees; and lookups, which loss does not show, on sequences of random tokens: copying (200 tokens, and the same
    again: the share of the second half that is predicted), associative recall (up to 32 pairs of a key and a value, of
    four tokens each, then the keys in another order: the share of the values that is), and recall at distances of up to
    the model's context length. None of the last two is among what :func:`sigswap.distill` mixes in by default.

    For models with other logits: agreement, divergence, and accuracy if the batches have ``labels``. For all else: the
    cosine of the embeddings (the mean over the tokens that ``attention_mask`` does not hide) and the share of each
    one's five nearest neighbours that are kept. For all: by converted module, the error of its output, and the sums of
    its rows, which softmax makes 1 and sigmoid does not.

    Both models run in eval mode, without gradients and compiled code, a batch at a time. Memory is two models and
    their outputs on a batch; of a long sequence of lookups only the logits that are asked, if the model can do that.

    Args:
        model: converted; it is not changed.
        original: the model before the conversion, or a converted copy, which then runs as softmax; or where it is: a
            directory or hub id of transformers, one that sigswap.save wrote, ``timm:NAME`` or ``module:function``.
            ``None``: ``model`` itself with the swap switched off, which is the original until its weights are trained.
            peft's adapters are off in it as well, and so is what was trained beside them (``modules_to_save``).
        batches: as for :func:`sigswap.calibrate`; some that neither a calibration nor a training has seen. ``None``:
            inputs made from what the model knows of itself.
        tokens: of language models, what lookups are made of: the tokenizer, or token ids; as for distill.
        max_length: the longest context of lookups; ``None``: the model's. On a CPU thousands of tokens take minutes.
        sequences: of each kind of lookup; fewer, but two at least, where that would be more than 131,072 tokens.
        seed: of the lookups, and of inputs that are made.
        progress: shows a progress bar on standard error, if that is a terminal.
        allow_code: if ``original`` is a directory that sigswap.save wrote: as for :func:`sigswap.load`.

    Raises:
        NotConvertedError: ``model`` is not converted.
        ArgumentError: an argument is not as above, ``original`` is another model, a model is on the meta device, or a
            sequence is longer than the model's positions.
        CalibrationError: a model fails on a batch, or the two give outputs of different shapes.
    """
    check_flag("allow_code", allow_code)
    if isinstance(original, str | os.PathLike):
        original = _opened(os.fspath(original), allow_code)
    elif original is not None and not isinstance(original, nn.Module):
        raise ArgumentError(
            f"{{argument}} must be a model or where one is saved, not a {type(original).__name__}.", argument="original"
        )
    return compare_models(
        model,
        original,
        batches,
        tokens=tokens,
        max_length=max_length,
        sequences=sequences,
        seed=seed,
        progress=progress,
    )


def _opened(source: str, allow_code: bool) -> nn.Module:
    """The model that ``source`` names. Raises as sigswap.load and sigswap.saving.sources do."""
    if is_saved(source):
        return load(source, allow_code=allow_code)
    if sources.is_factory(source):
        return sources.build(source, {}, pretrained=source.startswith("timm:"))
    return sources.from_transformers(source)


def _check_convertible(model: nn.Module) -> None:
    check_unconverted(model, "to convert it in another way")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):  # a run, which gives it a shape, cannot be taken back
            raise ConversionError(f"{name} has no shape yet.", hint=Hint("Run the model once before it is converted."))
    check_uncompiled(model)


def _nothing_to_swap(
    model: nn.Module, report: Report, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> NoAttentionError:
    name = type(model).__name__
    if any(site.reason == "excluded" for site in report.sites):
        return NoAttentionError(
            f"no attention of {name} is to be swapped.",
            hint=Hint("{include} and {exclude} leave none of it.", {"include": str(include), "exclude": str(exclude)}),
        )
    reasons = "; ".join(dict.fromkeys(f"{s.path or '(the model)'}: {s.reason}" for s in report.sites[:5]))
    return NoAttentionError(f"no softmax attention was found in {name}" + (f" ({reasons})." if reasons else "."))
