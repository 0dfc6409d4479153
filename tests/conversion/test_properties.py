"""What sigmoid attention must keep, on real model classes: padding, causality, full masks, permutations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import BY_NAME, Entry, FairseqMoEAttention, hf, randomise, tokens

import sigswap

SDPA_EAGER = pytest.mark.parametrize("attention", ["sdpa", "eager"])
DECODERS = pytest.mark.parametrize("name", ["LlamaModel", "GPT2Model"])
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
FIRST_TOKEN = pytest.mark.parametrize("first_token", [False, True], ids=["", "first_token"])


def converted(name: str, attention: str, first_token: bool = False, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(hf(name, attention, **config)).eval()
    sigswap.convert(model, sigswap.SigmoidConfig(first_token=first_token, query_bias=first_token))
    if first_token:
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "sigswap" in parameter_name.split("."):
                    parameter.copy_(torch.randn(parameter.shape))
    return model


def forward(model: nn.Module, compiled: bool = False) -> Callable[..., Any]:
    return torch.compile(model, backend="aot_eager") if compiled else model


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def ids(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return tokens(batch, length)


# ----------------------------------------------------------------------------------------------- padding


@pytest.mark.slow
@FIRST_TOKEN
@SDPA_EAGER
@DECODERS
@COMPILED
@torch.no_grad()
def test_left_padding(name: str, attention: str, compiled: bool, first_token: bool) -> None:
    if compiled and name == "GPT2Model":
        pytest.skip("one compiled decoder is enough")
    model = converted(name, attention, first_token)
    run = forward(model, compiled)
    text = ids(7)
    plain = model(input_ids=text, position_ids=torch.arange(7)[None]).last_hidden_state
    for pad in (1, 6):
        padded = torch.cat([ids(pad, seed=9), text], 1)  # what is in the padding must not matter
        mask = torch.tensor([[0] * pad + [1] * 7])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = run(input_ids=padded, attention_mask=mask, position_ids=positions).last_hidden_state
        assert not out.isnan().any()
        assert close(out[:, pad:], plain)


@pytest.mark.slow
@FIRST_TOKEN
@SDPA_EAGER
@pytest.mark.parametrize("name", ["BertModel", "T5Model"])
@COMPILED
@torch.no_grad()
def test_right_padding(name: str, attention: str, compiled: bool, first_token: bool) -> None:
    if compiled and name == "T5Model":
        pytest.skip("one compiled encoder is enough")
    model = converted(name, attention, first_token)
    more = {"decoder_input_ids": ids(5, seed=4)} if name == "T5Model" else {}
    run = forward(model, compiled)
    text = ids(7)
    plain = model(input_ids=text, attention_mask=torch.ones(1, 7, dtype=torch.long), **more)
    for pad in (1, 6):
        padded = torch.cat([text, ids(pad, seed=9)], 1)
        mask = torch.tensor([[1] * 7 + [0] * pad])
        out = run(input_ids=padded, attention_mask=mask, **more)
        if name == "T5Model":
            assert close(out.encoder_last_hidden_state[:, :7], plain.encoder_last_hidden_state)
            assert close(out.last_hidden_state, plain.last_hidden_state)  # through the cross-attention
        else:
            assert close(out.last_hidden_state[:, :7], plain.last_hidden_state)


@torch.no_grad()
def test_padding_of_torch_encoder() -> None:
    entry = BY_NAME["torch_encoder"]
    inputs = entry.make_inputs()
    model = sigswap.convert(entry.build(), example_inputs=inputs)
    src = inputs["src"]
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[:, 6:] = True
    plain = model(src[:, :6])
    assert close(model(src, src_key_padding_mask=mask)[:, :6], plain)
    garbage = src.clone()
    garbage[:, 6:] = 100.0
    assert close(model(garbage, src_key_padding_mask=mask)[:, :6], plain)


# --------------------------------------------------------------------------------------------- causality


@pytest.mark.slow
@FIRST_TOKEN
@SDPA_EAGER
@pytest.mark.parametrize("name", ["LlamaModel", "GPT2Model", "T5Model"])
@torch.no_grad()
def test_causality(name: str, attention: str, first_token: bool) -> None:
    model = converted(name, attention, first_token)
    text, changed = ids(9), ids(9)
    changed[:, 5:] = ids(4, seed=7)
    assert not torch.equal(text, changed)

    def run(text: Tensor) -> Tensor:
        if name == "T5Model":
            return model(input_ids=ids(6, seed=3), decoder_input_ids=text).last_hidden_state
        return model(input_ids=text).last_hidden_state

    before, after = run(text), run(changed)
    assert close(after[:, :5], before[:, :5], 1e-6)
    assert not close(after[:, 5:], before[:, 5:], 1e-2)
    assert close(run(text[:, :5]), before[:, :5], 1e-5)  # nor does it matter that there are later tokens


@FIRST_TOKEN
@torch.no_grad()
def test_gradient_does_not_reach_the_future(first_token: bool) -> None:
    model = converted("LlamaModel", "sdpa", first_token)
    with torch.enable_grad():
        embeddings = torch.randn(1, 8, 32, requires_grad=True)
        model(inputs_embeds=embeddings).last_hidden_state[:, 4].sum().backward()
    assert (embeddings.grad[:, 5:] == 0).all()
    assert (embeddings.grad[:, :5] != 0).any(-1).all()


# -------------------------------------------------------------------------------------- fully masked rows


def _input_of(module: nn.Module, seen: list[Tensor]) -> None:
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def _no_nan_gradients(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.slow
@FIRST_TOKEN
@SDPA_EAGER
@pytest.mark.parametrize("train", [False, True])
def test_padded_queries_of_a_decoder_attend_to_nothing(attention: str, train: bool, first_token: bool) -> None:
    """Left padding: the first rows of the causal mask see no key at all."""
    model = converted("LlamaModel", attention, first_token).train(train)
    seen: list[Tensor] = []
    for layer in model.layers:
        _input_of(layer.self_attn.o_proj, seen)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    out = model(input_ids=ids(6, 2), attention_mask=mask).last_hidden_state
    assert len(seen) == 2
    for attended in seen:
        assert (attended[0, :3] == 0).all()
        assert (attended[0, 3:] != 0).any() and (attended[1] != 0).any()
    out.sum().backward()
    _no_nan_gradients(model)


@pytest.mark.slow
@FIRST_TOKEN
@SDPA_EAGER
def test_encoder_row_without_any_key(attention: str, first_token: bool) -> None:
    model = converted("BertModel", attention, first_token)
    seen: list[Tensor] = []
    for layer in model.encoder.layer:
        _input_of(layer.attention.output.dense, seen)
    mask = torch.tensor([[0] * 6, [1] * 6])
    out = model(input_ids=ids(6, 2), attention_mask=mask).last_hidden_state
    assert len(seen) == 2
    for attended in seen:
        assert (attended[0] == 0).all()
        assert (attended[1] != 0).any()
    assert not out.isnan().any()
    out.sum().backward()
    _no_nan_gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_multihead_attention_row_without_any_key(need_weights: bool, grad: bool, kind: str) -> None:
    torch.manual_seed(0)
    model = randomise(nn.MultiheadAttention(16, 2, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [False] * 5])
    if kind == "float":
        mask = torch.zeros(2, 5).masked_fill(mask, float("-inf"))
    sigswap.convert(model, example_inputs={"query": x, "key": x, "value": x, "key_padding_mask": mask})
    with torch.set_grad_enabled(grad):
        out, weights = model(x, x, x, key_padding_mask=mask, need_weights=need_weights)
    assert torch.allclose(out[0], model.out_proj.bias.expand(5, -1), atol=0, rtol=0)
    if need_weights:
        assert (weights[0] == 0).all() and (weights[1] > 0).all()
    if grad:
        out.sum().backward()
        _no_nan_gradients(model)


def test_handwritten_row_without_any_key() -> None:
    torch.manual_seed(0)
    model = randomise(FairseqMoEAttention()).eval()
    x = torch.randn(5, 2, 32)
    padding = torch.tensor([[True, True, False, False, False], [False] * 5])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)  # with the padding, rows 0 and 1 see nothing
    sigswap.convert(model, example_inputs=(x, padding, causal))
    seen: list[Tensor] = []
    _input_of(model.out_proj, seen)
    model(x, padding, causal).sum().backward()
    assert (seen[0][:2, 0] == 0).all()
    assert (seen[0][2:, 0] != 0).any(-1).all() and (seen[0][:, 1] != 0).any(-1).all()
    _no_nan_gradients(model)


# ------------------------------------------------------------------------------------------ permutations


@pytest.mark.slow
@FIRST_TOKEN
@SDPA_EAGER
@torch.no_grad()
def test_permuted_tokens_of_bert(attention: str, first_token: bool) -> None:
    model = converted("BertModel", attention, first_token)
    model.embeddings.position_embeddings.weight.zero_()
    text, order = ids(8), torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    if first_token:  # the first key is not one of many there
        order = torch.tensor([0, 3, 7, 5, 1, 2, 6, 4])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    plain = model(input_ids=text, attention_mask=mask).last_hidden_state
    permuted = model(input_ids=text[:, order], attention_mask=mask[:, order]).last_hidden_state
    assert close(permuted, plain[:, order])


@torch.no_grad()
def test_permuted_patches_of_vit() -> None:
    entry = BY_NAME["vit"]
    for variant in entry.variants:
        (image,) = entry.make_inputs(variant)
        model = sigswap.convert(entry.build(variant), example_inputs=(image,))
        model.pos_embed.zero_()
        flipped = image.unflatten(2, (4, 8)).flip(2).flatten(2, 3)  # the order of the rows of patches
        assert close(model(flipped), model(image))


@torch.no_grad()
def test_permuted_memory_of_cross_attention() -> None:
    for name in ("torch_decoder", "encoder_decoder"):
        entry: Entry = BY_NAME[name]
        inputs = entry.make_inputs()
        model = sigswap.convert(entry.build(), example_inputs=inputs)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
        if isinstance(inputs, dict):
            permuted: Any = dict(inputs)
            permuted["memory"] = inputs["memory"][:, order]
            permuted["memory_key_padding_mask"] = inputs["memory_key_padding_mask"][:, order]
            assert close(model(**permuted), model(**inputs))
        else:
            source, target, mask = inputs
            assert close(model(source[:, order], target, mask[:, order]), model(source, target, mask))


# ------------------------------------------------------------------------------------------------- batch


@pytest.mark.slow
@FIRST_TOKEN
@SDPA_EAGER
@pytest.mark.parametrize("name", ["LlamaModel", "BertModel", "GPT2Model", "T5Model"])
@torch.no_grad()
def test_batch_neighbours(name: str, attention: str, first_token: bool) -> None:
    """A row's output does not depend on the other rows, nor on their padding."""
    model = converted(name, attention, first_token)
    text = ids(7, 3)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :] = 0

    def run(rows: slice) -> Tensor:
        inputs = {"input_ids": text[rows], "attention_mask": mask[rows]}
        if name == "T5Model":
            inputs["decoder_input_ids"] = text[rows, :5]
        return model(**inputs).last_hidden_state

    batch = run(slice(None))
    assert not batch.isnan().any()
    for i in range(3):
        assert close(batch[i : i + 1], run(slice(i, i + 1)))


@torch.no_grad()
def test_batch_neighbours_of_vit() -> None:
    entry = BY_NAME["vit"]
    (image,) = entry.make_inputs()
    model = sigswap.convert(entry.build(), example_inputs=(image,))
    assert close(model(image)[:1], model(image[:1]))
    neighbour = image.clone()
    neighbour[1] = 50.0
    assert close(model(neighbour)[:1], model(image)[:1])


# ------------------------------------------------------------------------------ other shapes than the example's


@SDPA_EAGER
@torch.no_grad()
def test_other_lengths_than_the_examples(attention: str) -> None:
    """The conversion saw one length and one batch size; every other one must work, and a single key too."""
    model = converted("BertModel", attention)
    whole = model(input_ids=ids(1), attention_mask=torch.ones(1, 1, dtype=torch.long)).last_hidden_state
    assert whole.shape == (1, 1, 32)
    for batch, length in ((1, 2), (5, 33)):
        text = ids(length, batch)
        out = model(input_ids=text).last_hidden_state
        assert close(out, model(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state)
