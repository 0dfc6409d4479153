"""The suite generation of ``sigswap bench``: tokens per second of a compiled language model with a static cache.

A cell is a Llama of 1B and a cache of transformers' that is full but for the tokens that are decoded, with random keys
and values: how long a step takes does not depend on what they are. The step is compiled once for each way of computing
softmax attention (the peers), and a converted copy with sigswap's backend, with CUDA graphs unless another mode is
given. All share the cache. The converted model's step is first compared with the same without compiling. Then all
decode the same number of tokens in turns, each token the likeliest one after the token before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sigswap.bench import transformers_models
from sigswap.bench.cells import DTYPES, GenerationCell
from sigswap.bench.results import Row
from sigswap.bench.subject import MASKED_PEERS, TAKE_NO_MASK, Subject
from sigswap.bench.timing import in_turns, repeated_ms
from sigswap.bench.versions import Version, absent, check_output, forward, make, several, warmed_up
from sigswap.errors import SigswapError
from sigswap.optional import require

MODE = "reduce-overhead"
"""Of torch.compile, unless another is given: a step has many small kernels."""

TOKENS = 32
"""How many tokens of each sequence a timed call decodes."""

ROUNDS = 8
"""How many turns each implementation has."""


def measure(
    cell: GenerationCell,
    dtype: str,
    peers: Sequence[str],
    left_out: Sequence[str] = (),
    *,
    device: str = "cuda",
    inner: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
) -> list[Row]:
    """The cell's one row: milliseconds of a step, of all sequences.

    Only errors that leave the GPU unusable are raised; others become reasons.

    Args:
        cell: The batch and the context.
        dtype: Of weights, activations and cache; of ``DTYPES``.
        peers: Of the suite's.
        left_out: Those of the peers that are not measured, as they were not asked for.
        device: "cuda" or, for small cells, "cpu".
        inner: The compiler, as in :func:`sigswap.bench.models.measure`.
        mode: Of torch.compile, with inductor; None: ``MODE``.
    """
    names = ("sigswap", *peers)
    try:
        subject = build(cell, DTYPES[dtype], device)
    except SigswapError as error:  # a package is missing
        return [Row(cell, dtype, "decode", {}, dict.fromkeys(names, str(error)), unavailable=True)]
    refused = absent(subject, peers, left_out)
    with several(len(names)):
        versions = make(names, subject, inner, mode or MODE, refused)
        calls = warmed_up(versions, refused, _warmed_up)
        contexts = {name: version.context for name, version in versions.items()}
        times = in_turns(repeated_ms, calls, contexts, refused, ROUNDS)
    return [Row(cell, dtype, "decode", {name: time / TOKENS for name, time in times.items()}, refused)]


def build(cell: GenerationCell, dtype: torch.dtype, device: str) -> Subject:
    """The cell's model, its cache and a token of each sequence, the same in each run.

    Raises:
        SigswapError: transformers is not installed.
    """
    transformers = require("transformers", "hf")
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers_models.decoding_llama(cell, dtype)
        config = model.config
        cache = transformers.StaticCache(config=config, max_cache_len=cell.context)
        cache.early_initialization(cell.batch, config.num_key_value_heads, config.head_dim, dtype, torch.device(device))
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        token = torch.randint(config.vocab_size, (cell.batch, 1))
        prompt = torch.randint(config.vocab_size, (1, 8))
    return Subject(
        model,
        inputs={"input_ids": token, "past_key_values": cache, "use_cache": True},
        training_inputs={},
        output=lambda returned: returned.logits,
        backward=lambda returned: None,
        peers=MASKED_PEERS,
        counting=tuple(MASKED_PEERS),
        reasons=TAKE_NO_MASK,
        examples=[{"input_ids": prompt, "use_cache": False}],
    )


def _warmed_up(version: Version) -> Callable[[], object]:
    """The call to measure, after it has compiled and tuned, and its result was checked."""
    subject, compiled = version.subject, version.compiled
    truth = None
    if version.checked:
        rewind(subject)
        truth = subject.output(forward(subject, subject.model))
    rewind(subject)
    check_output(subject.output(forward(subject, compiled)), truth)
    call = functools.partial(decode, subject, compiled)
    call()
    return call


def decode(subject: Subject, compiled: Callable[..., Any]) -> Tensor:
    """Decodes the last ``TOKENS`` tokens of the context: int64 [batch, TOKENS]."""
    rewind(subject)
    token, tokens = subject.inputs["input_ids"], []
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = subject.output(compiled(**{**subject.inputs, "input_ids": token}))
        token = logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, 1)


def rewind(subject: Subject) -> None:
    """Makes the cache hold the context but for its last ``TOKENS`` tokens, as if it had never held more."""
    cache = subject.inputs["past_key_values"]
    for layer in cache.layers:
        layer.cumulative_length.fill_(layer.max_cache_len - TOKENS)
