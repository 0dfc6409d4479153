"""The models of ``sigswap bench`` that are transformers': their shapes, with random weights, and batches.

The large ones are cut: a third to a quarter of the layers, which compile in less time, with as much of the vocabulary,
so that each part keeps about the share of the work that it has in the whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sigswap.bench.cells import GenerationCell, ModelCell
from sigswap.bench.subject import FLEX, MASKED_PEERS, SDPA, TAKE_NO_MASK, ModelPeer, Subject, set_attention
from sigswap.optional import require

DOCUMENTS = (1536, 256, 2048, 640, 1024, 1792, 896)
"""Lengths of packed documents, in tokens, of 8,192; of other numbers of tokens the same parts."""


# Llama.


def llama(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """Of 1B. Where the cell's model is llama-no-mask, as transformers runs it with FlashAttention, without a mask."""
    model = _llama(dtype, cell.small, layers=16, vocab=32000, longest=cell.length)
    tokens = torch.randint(model.config.vocab_size, (cell.batch, cell.length))
    subject = _on_tokens(model, tokens, SDPA | FLEX)
    if cell.model == "llama-no-mask":
        subject.peers, subject.counting = SDPA, tuple(SDPA)
        subject.after_conversion = _leave_out_mask  # convert sets the implementation to sdpa
        _leave_out_mask(model)
    return subject


def padded_llama(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """A quarter of :func:`llama`, on sequences of a quarter to the whole length, padded on the side of its name."""
    model = _llama(dtype, cell.small, layers=4, vocab=8000, longest=cell.length)
    tokens = torch.randint(model.config.vocab_size, (cell.batch, cell.length))
    mask = padding(cell.batch, cell.length, left=cell.model == "llama-left-padding")
    subject = _on_tokens(model, tokens, MASKED_PEERS, {"attention_mask": mask})
    subject.training_inputs["labels"] = tokens.masked_fill(mask == 0, -100)
    subject.output = lambda returned: returned.logits[mask.bool()]
    subject.reasons = TAKE_NO_MASK
    return subject


def packed_llama(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """A quarter of :func:`llama`, on packed documents: transformers tells them by positions that begin again."""
    model = _llama(dtype, cell.small, layers=4, vocab=8000, longest=cell.length)
    tokens = torch.randint(model.config.vocab_size, (cell.batch, cell.length))
    ends = [end * cell.length // sum(DOCUMENTS) for end in itertools.accumulate(DOCUMENTS, initial=0)]
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(ends)])
    subject = _on_tokens(model, tokens, MASKED_PEERS, {"position_ids": positions.expand(cell.batch, -1).contiguous()})
    subject.reasons = TAKE_NO_MASK
    return subject


def decoding_llama(cell: GenerationCell, dtype: torch.dtype) -> Any:
    """The model of the suite generation: :func:`llama`'s."""
    return _llama(dtype, cell.small, layers=16, vocab=32000, longest=cell.context).eval()


def _llama(dtype: torch.dtype, small: bool, *, layers: int, vocab: int, longest: int) -> Any:
    transformers = require("transformers", "hf")
    config = transformers.LlamaConfig(
        hidden_size=64 if small else 2048,
        num_hidden_layers=1 if small else layers,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8,
        head_dim=16 if small else 64,
        intermediate_size=128 if small else 8192,
        vocab_size=128 if small else vocab,
        max_position_embeddings=longest,
    )
    return _causal(config, dtype, "sdpa")


def _leave_out_mask(model: Any) -> None:
    """Transformers makes no mask for an attention implementation that it has no mask function for."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
    model.set_attn_implementation("sdpa_without_mask")


# Gemma 2.


def gemma2(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """4 of the 26 layers of 2B: a soft cap, a window in every other layer, 8 heads over 4 of 256."""
    transformers, small = require("transformers", "hf"), cell.small
    config = transformers.Gemma2Config(
        hidden_size=64 if small else 2304,
        num_hidden_layers=2 if small else 4,
        num_attention_heads=4 if small else 8,
        num_key_value_heads=2 if small else 4,
        head_dim=16 if small else 256,
        query_pre_attn_scalar=16 if small else 256,
        intermediate_size=128 if small else 9216,
        vocab_size=128 if small else 39424,
        sliding_window=cell.length // 2,
        max_position_embeddings=cell.length,
    )
    model = _causal(config, dtype, "eager")
    tokens = torch.randint(config.vocab_size, (cell.batch, cell.length))
    peers = FLEX | {"unfused": ModelPeer(prepare=functools.partial(set_attention, implementation="eager"))}
    subject = _on_tokens(model, tokens, peers)
    subject.reasons = dict.fromkeys(SDPA, "scaled_dot_product_attention has no soft cap.")
    return subject


# Encoders with decoders.


def t5(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """T5-base, or, where the cell's model is t5-padding, a third of it on sequences of unequal lengths.

    Without dropout, so that each run computes the same.
    """
    transformers, padded = require("transformers", "hf"), cell.model == "t5-padding"
    config = transformers.T5Config(
        d_model=64 if cell.small else 768,
        d_kv=16 if cell.small else 64,
        d_ff=128 if cell.small else 3072,
        num_layers=1 if cell.small else 4 if padded else 12,
        num_heads=4 if cell.small else 12,
        vocab_size=128 if cell.small else 10752 if padded else 32128,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    source, target = torch.randint(1, config.vocab_size, (2, cell.batch, cell.length))
    use_sdpa = functools.partial(set_attention, implementation="sdpa")
    peers = {"unfused": ModelPeer(prepare=functools.partial(set_attention, implementation="eager"))}
    peers |= {name: peer._replace(prepare=use_sdpa) for name, peer in SDPA.items() if name != "fa2"}
    subject = Subject(
        model,
        inputs={"input_ids": source, "decoder_input_ids": target, "use_cache": False},
        training_inputs={"input_ids": source, "labels": target, "use_cache": False},
        output=lambda returned: returned.logits,
        backward=lambda returned: returned.loss.backward(),
        peers=peers,
        counting=tuple(peers),
        # It reads score_mod's tensor at the sequence's own number, and T5's bias has one sequence.
        reasons={
            **TAKE_NO_MASK,
            "flex": "transformers' FlexAttention takes no position bias that all sequences share.",
        },
    )
    if padded:
        masks = {
            "attention_mask": padding(cell.batch, cell.length),
            "decoder_attention_mask": (seen := padding(cell.batch, cell.length).flip(0)),
        }
        subject.inputs |= masks
        subject.training_inputs |= masks | {"labels": target.masked_fill(seen == 0, -100)}
        subject.output = lambda returned: returned.logits[seen.bool()]
    return subject


def whisper(cell: ModelCell, dtype: torch.dtype) -> Subject:
    """A third of Whisper-small: the cell's length of positions of sound, and up to 448 tokens that attend to them."""
    transformers, small = require("transformers", "hf"), cell.small
    config = transformers.WhisperConfig(
        d_model=64 if small else 768,
        encoder_layers=1 if small else 4,
        decoder_layers=1 if small else 4,
        encoder_attention_heads=4 if small else 12,
        decoder_attention_heads=4 if small else 12,
        encoder_ffn_dim=128 if small else 3072,
        decoder_ffn_dim=128 if small else 3072,
        vocab_size=128 if small else 17288,
        max_source_positions=cell.length,
        max_target_positions=448,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.AutoModelForSpeechSeq2Seq.from_config(config, dtype=dtype, attn_implementation="sdpa")
    sound = torch.randn(cell.batch, config.num_mel_bins, 2 * cell.length, dtype=dtype)  # two frames per position
    target = torch.randint(3, config.vocab_size, (cell.batch, min(448, cell.length)))
    return Subject(
        model,
        inputs={"input_features": sound, "decoder_input_ids": target, "use_cache": False},
        training_inputs={"input_features": sound, "labels": target, "use_cache": False},
        output=lambda returned: returned.logits,
        backward=lambda returned: returned.loss.backward(),
        peers=SDPA | FLEX,
        counting=(*SDPA, *FLEX),
        # In training mode some versions toss a coin for each layer, even if none is ever left out: a graph break each.
        stays_in_eval=True,
    )


# Parts of the above.


def padding(batch: int, length: int, left: bool = False) -> Tensor:
    """A tokenizer's mask, int64 [batch, length]: 1 for tokens, whose numbers go up evenly from a quarter of length."""
    at = torch.arange(length).flip(0) if left else torch.arange(length)
    tokens = torch.linspace(max(1, length // 4), length, batch).long()
    return (at < tokens[:, None]).long()


def _causal(config: Any, dtype: torch.dtype, implementation: str) -> Any:
    transformers = require("transformers", "hf")
    # Not .to(dtype), which would round the frequencies of the rotary embeddings.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)


def _on_tokens(
    model: Any, tokens: Tensor, peers: Mapping[str, ModelPeer], more: Mapping[str, Tensor] | None = None
) -> Subject:
    """A language model; ``more``: inputs beside the tokens."""
    inputs = {"input_ids": tokens, "use_cache": False, **(more or {})}
    return Subject(
        model,
        inputs=inputs,
        training_inputs={**inputs, "labels": tokens},
        output=lambda returned: returned.logits,
        backward=lambda returned: returned.loss.backward(),
        peers=peers,
        counting=tuple(peers),
    )
