"""Greedy decoding by a converted language model, with a cache, is decoding without one by an explicit loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import count_attention_softmax, sigmoid_oracle
from torch import Tensor, nn
from zoo import hf, randomise

import sigswap

NEW = 8
PROMPTS = ([5, 9, 11, 40, 7, 21, 33], [13, 8, 30], [50, 4, 4, 17, 29])
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])
CACHE = pytest.mark.parametrize("cache", ["dynamic", "static"])
FIRST_TOKEN = pytest.mark.parametrize("first_token", [False, True], ids=["", "first_token"])
OWNERS = ("LlamaAttention", "GPT2Attention", "T5Attention")


def build(name: str, attention: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(hf(name, attention, **config)).eval()
    # No early stop, so that every row makes NEW tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def converted(name: str, attention: str, first_token: bool = False, **fields: Any) -> nn.Module:
    """With another learned bias in every head: a cache's code may lay the heads out in another way."""
    config = sigswap.SigmoidConfig(first_token=first_token, query_bias=first_token)
    model = sigswap.convert(build(name, attention, **fields), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sigswap" in parameter_name.split("."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def padded(left: bool) -> dict[str, Tensor]:
    """The prompts in one batch."""
    longest = max(map(len, PROMPTS))
    ids, mask = [], []
    for prompt in PROMPTS:
        pad = [0] * (longest - len(prompt))
        ids.append(pad + prompt if left else prompt + pad)
        mask.append([0] * len(pad) + [1] * len(prompt) if left else [1] * len(prompt) + [0] * len(pad))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def decode_without_cache(model: nn.Module, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Greedy decoding of one prompt without padding: the whole sequence is run again for every token."""
    ids, logits = list(prompt), []
    for _ in range(NEW):
        last = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits.append(last)
        ids.append(int(last.argmax()))
    return ids[len(prompt) :], torch.stack(logits)


@torch.no_grad()
def decode_t5_without_cache(model: nn.Module, prompt: list[int]) -> tuple[list[int], Tensor]:
    ids, logits = [0], []
    for _ in range(NEW):
        last = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids]), use_cache=False).logits[
            0, -1
        ]
        logits.append(last)
        ids.append(int(last.argmax()))
    return ids[1:], torch.stack(logits)


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[list[list[int]], Tensor]:
    """The new tokens of each row, and their logits [batch, step, vocabulary]."""
    lengths: list[int] = []  # of the pieces that the model was run on
    embeddings = (model.get_decoder() if model.config.is_encoder_decoder else model).get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[-1]))
    out = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    hook.remove()
    assert lengths[-1] == 1, "the cache was not used"
    return out.sequences[:, -NEW:].tolist(), torch.stack(out.logits, dim=1)


def assert_same(
    got: tuple[list[list[int]], Tensor], expected: list[tuple[list[int], Tensor]], tolerance: float = 1e-5
) -> None:
    for row, (tokens, logits) in enumerate(expected):
        # Before the tokens: equal tokens with wrong logits would be luck.
        error = float((got[1][row] - logits).abs().max() / logits.abs().max())
        assert error <= tolerance, f"row {row}: logits off by {error:.2g}"
        assert got[0][row] == tokens


@pytest.mark.slow
@FIRST_TOKEN
@ATTENTION
@CACHE
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_decoder(name: str, attention: str, cache: str, first_token: bool) -> None:
    model = converted(name, attention, first_token)
    expected = [decode_without_cache(model, prompt) for prompt in PROMPTS]
    options = {"cache_implementation": "static"} if cache == "static" else {}
    assert_same(generate(model, padded(left=True), **options), expected)
    # A second call: nothing of the first, such as its cache or its plan, may linger.
    assert_same(generate(model, padded(left=True), **options), expected)


@pytest.mark.slow
@FIRST_TOKEN
@ATTENTION
@CACHE
def test_t5(attention: str, cache: str, first_token: bool) -> None:
    model = converted("T5ForConditionalGeneration", attention, first_token)
    expected = [decode_t5_without_cache(model, prompt) for prompt in PROMPTS]
    options = {"cache_implementation": "static"} if cache == "static" else {}
    assert_same(generate(model, padded(left=False), **options), expected)


@pytest.mark.slow
@ATTENTION
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_equals_the_oracle(name: str, attention: str) -> None:
    """The explicit loop itself is right: it is what the original decodes under the oracle."""
    decode = decode_t5_without_cache if name.startswith("T5") else decode_without_cache
    original = build(name, attention)
    with sigmoid_oracle(OWNERS):
        expected = [decode(original, prompt) for prompt in PROMPTS]
    softmax = [decode(original, prompt)[0] for prompt in PROMPTS]
    assert softmax != [tokens for tokens, _ in expected], "the test can't tell sigmoid from softmax"
    model = sigswap.convert(build(name, attention))
    assert_same(generate(model, padded(left=not name.startswith("T5"))), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_no_softmax_while_generating(name: str) -> None:
    model = converted(name, "sdpa")
    inputs = padded(left=not name.startswith("T5"))
    assert count_attention_softmax(lambda: generate(model, inputs)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_beam_search(name: str) -> None:
    """Beams reorder the cache between steps."""
    model = converted(name, "sdpa")
    inputs = padded(left=not name.startswith("T5"))
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    assert torch.equal(
        model.generate(**inputs, **options, use_cache=True),
        model.generate(**inputs, **options, use_cache=False),
    )


@pytest.mark.slow
@FIRST_TOKEN
@ATTENTION
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks(attention: str, cache: str, first_token: bool) -> None:
    """Prefill in pieces of several tokens equals one full forward (the mask is aligned bottom right)."""
    from transformers import DynamicCache, StaticCache

    model = converted("LlamaForCausalLM", attention, first_token)
    ids = torch.tensor([PROMPTS[0] + PROMPTS[2]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
        start, pieces = 0, []
        for length in (5, 4, 1, 2):
            piece = ids[:, start : start + length]
            out = model(
                input_ids=piece,
                past_key_values=past,
                use_cache=True,
                cache_position=torch.arange(start, start + length),
            )
            pieces.append(out.logits)
            start += length
    assert start == ids.shape[1]
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.slow
@FIRST_TOKEN
def test_compiled_decoding(first_token: bool) -> None:
    """A static cache with a compiled forward, which is how generation is made fast."""
    model = converted("LlamaForCausalLM", "sdpa", first_token, num_hidden_layers=1)
    expected = [decode_without_cache(model, prompt) for prompt in PROMPTS]
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert_same(generate(model, padded(left=True), cache_implementation="static"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_norms_and_biases_of_grouped_queries(attention: str) -> None:
    """A cached step packs the queries that share a key head; norms, c_h and w_h still reach their own heads."""
    model = build("LlamaForCausalLM", attention)
    config = sigswap.SigmoidConfig(qk_norm="rms", query_bias=True)
    sigswap.convert(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sigswap" in name.split("."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    ids = torch.randint(3, 60, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
        cache = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)
