"""Comparisons: each figure against the definition in float64, models of which the answers are known, the pictures."""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import ShiftedAttention, ShiftedDecoder
from torch import Tensor, nn
from zoo import BY_NAME, hf, randomise

import sigswap
from sigswap.errors import ArgumentError, CalibrationError, NotConvertedError

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def converted(original: nn.Module, inputs: Any = None, config: sigswap.SigmoidConfig | None = None) -> Any:
    """A converted copy whose biases are away from 0."""
    model = sigswap.convert(copy.deepcopy(original), config, example_inputs=inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sigswap." in f".{name}":
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.5)
    return model


def texts(count: int = 3, length: int = 40, vocabulary: int = 61) -> list[dict[str, Tensor]]:
    """With padding, on the left in every second batch."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for index in range(count):
        ids = torch.randint(3, vocabulary, (4, length), generator=generator)
        mask = (torch.arange(length) < torch.tensor([[length], [length - 5], [7], [length - 1]])).long()
        batches.append({"input_ids": ids, "attention_mask": mask.flip(1) if index % 2 else mask})
    return batches


# Language models


def test_language_figures_against_their_definition() -> None:
    original = randomise(hf("LlamaForCausalLM"), gain=0.7).eval()
    model = converted(original)
    losses: dict[int, list[tuple[float, float]]] = {}
    divergence, agreed = [], []
    for batch in texts():
        with torch.no_grad():
            t, y = (each(**batch).logits.double().log_softmax(-1) for each in (original, model))
        for row in range(4):
            places = batch["attention_mask"][row].nonzero().flatten().tolist()
            for before, (here, following) in enumerate(itertools.pairwise(places), 1):
                token = batch["input_ids"][row, following]
                losses.setdefault(before, []).append((-float(t[row, here, token]), -float(y[row, here, token])))
                divergence.append(float((t[row, here].exp() * (t[row, here] - y[row, here])).sum()))
                agreed.append(bool(t[row, here].argmax() == y[row, here].argmax()))
    result = sigswap.compare(model, original, texts(), progress=False)
    assert (result.kind, result.batches) == ("language model", 3)

    def mean(pairs: list[tuple[float, float]]) -> list[float]:
        return [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]

    found = result["loss"]
    assert [found.original, found.converted] == pytest.approx(
        mean([pair for pairs in losses.values() for pair in pairs]), rel=1e-5
    )
    found = result["KL divergence from the original"]
    assert (found.original, found.converted) == (0.0, pytest.approx(sum(divergence) / len(divergence), rel=1e-4))
    found = result["most likely token agrees"]
    assert (found.original, found.converted) == (1.0, sum(agreed) / len(agreed))
    assert [(span.start, span.end) for span in result.by_position] == [(0, 16), (16, 32), (32, 64)]
    for span in result.by_position:
        pairs = [pair for before in range(span.start, span.end) for pair in losses.get(before, [])]
        assert span.tokens == len(pairs)
        assert [span.original, span.converted] == pytest.approx(mean(pairs), rel=1e-5)


class Ruled(nn.Module):
    """A decoder whose answers follow a rule; attention runs beside it, so that it can be converted."""

    def __init__(self, rule: Callable[[Tensor], Tensor], vocabulary: int = 1000) -> None:
        super().__init__()
        self.rule = rule
        self.embed = nn.Embedding(vocabulary, 16)
        self.attention = ShiftedAttention(16, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        answers = F.one_hot(self.rule(input_ids), self.embed.num_embeddings).float()
        return answers + 1e-9 * self.attention(self.embed(input_ids)).sum(-1, keepdim=True)


def half_back(ids: Tensor) -> Tensor:
    """Always says what stands half the sequence back."""
    length = ids.shape[1]
    following = torch.arange(1, length + 1) - length // 2
    return ids[:, following.clamp(min=0)] * (following >= 0)


def last_time(ids: Tensor, within: int = 10**9) -> Tensor:
    """Always says what followed the same token the last time, if that is not too far back."""
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril(-1)
    place = torch.where(same, torch.arange(ids.shape[1]), -1).amax(-1)
    near = (place >= 0) & (torch.arange(ids.shape[1]) - place <= within)
    return torch.where(near, ids.gather(1, (place + 1).clamp(max=ids.shape[1] - 1)), 0)


def silent(ids: Tensor) -> Tensor:
    return torch.zeros_like(ids)


def ask(rule: Callable[[Tensor], Tensor], original_rule: Callable[[Tensor], Tensor]) -> Any:
    original = Ruled(original_rule)
    batch = {"input_ids": torch.arange(512).view(1, 512)}
    model = sigswap.convert(copy.deepcopy(original), example_inputs=batch)
    model.rule = rule
    return sigswap.compare(model, original, [batch], progress=False)


def test_rows_without_two_tokens_do_not_count() -> None:
    """A text of one token, and a row of padding alone, in a batch with others: no token of theirs has one before."""
    original = randomise(hf("LlamaForCausalLM"), gain=0.7).eval()
    model = converted(original)
    (batch,) = texts(1)
    mask = batch["attention_mask"].clone()
    mask[1, 1:], mask[2] = 0, 0
    rows = torch.tensor([0, 3])
    with_them = sigswap.compare(model, original, [{**batch, "attention_mask": mask}], max_length=8, sequences=1)
    without = {"input_ids": batch["input_ids"][rows], "attention_mask": mask[rows]}
    alone = sigswap.compare(model, original, [without], max_length=8, sequences=1)
    assert [row.tokens for row in with_them.by_position] == [row.tokens for row in alone.by_position]
    for ours, theirs in zip(with_them.measures, alone.measures, strict=True):
        assert ours.converted == pytest.approx(theirs.converted, rel=1e-4), ours.name
    with pytest.raises(ArgumentError, match="no token with another one before it"):
        sigswap.compare(model, original, [{**batch, "attention_mask": torch.zeros_like(mask)}])
    with pytest.raises(CalibrationError, match="attention_mask of batch 0 hides every position"):
        sigswap.distill(model, original, [{**batch, "attention_mask": torch.zeros_like(mask)}], steps=1, lookups=False)


@pytest.mark.parametrize("form", [lambda y: {"y": y}, lambda y: (None, y), lambda y: [3, (y, None)]])
def test_modules_that_return_more_than_a_tensor(form: Callable[[Tensor], Any]) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Any:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return form(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    original, x = Attends().eval(), torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    model = converted(original, x)
    with torch.no_grad():
        values = original.qkv(x)[..., 32:].double()
        queries, keys = (part.double().unflatten(-1, (2, 8)) for part in original.qkv(x)[..., :32].chunk(2, -1))
        scores = torch.einsum("bihd,bjhd->bhij", queries, keys) * 8**-0.5
        bias = model.sigswap.site(0).bias.double().view(2, 1, 1)
        y, t = (
            torch.einsum("bhij,bjhd->bihd", p, values.unflatten(-1, (2, 8)))
            for p in (torch.sigmoid(scores - math.log(6) + bias), scores.softmax(-1))
        )
        error = float((y - t).square().sum() / t.square().sum())
    found = sigswap.compare(model, original, [x]).layers[0].error
    assert found == pytest.approx(error, rel=1e-4)
    report = sigswap.distill(model, original, [x], steps=1, layerwise_steps=1, lr=0.0)
    assert report.layerwise[0] == pytest.approx(error, rel=1e-4)


def test_a_model_that_always_copies() -> None:
    result = ask(half_back, silent)
    assert (result["copying"].original, result["copying"].converted) == (pytest.approx(0.0, abs=0.01), 1.0)
    assert result["associative recall"].converted < 0.1
    result = ask(silent, half_back)
    assert (result["copying"].original, result["copying"].converted) == (1.0, pytest.approx(0.0, abs=0.01))


def test_a_model_that_always_recalls_and_one_that_does_so_nearby() -> None:
    result = ask(lambda ids: last_time(ids, within=300), last_time)
    assert result["associative recall"].name == "associative recall, 32 pairs"
    assert result["associative recall"].original == 1.0 and 0.3 < result["associative recall"].converted < 0.9
    assert [(far.distance, far.original, far.converted) for far in result.by_distance] == [
        (64, 1.0, 1.0),
        (256, 1.0, 1.0),
        (480, 1.0, 0.0),
    ]
    assert 0.8 < result["copying"].original < 1.0  # some of its 200 random tokens are there twice


def test_context_length_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    original = randomise(hf("LlamaForCausalLM", max_position_embeddings=128)).eval()
    model = converted(original)
    asked = []
    for each in (model, original):
        each.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True)
    result = sigswap.compare(model, original, texts(1), tokens=range(20, 50), sequences=3, progress=False)
    assert result.by_distance[-1].distance == 96
    probes = [ids for ids in asked if ids.shape[1] not in (39, 40)]
    assert max(ids.shape[1] for ids in probes) == 128
    assert all(int(ids.min()) >= 20 and int(ids.max()) < 50 for ids in probes)
    assert all(ids.numel() <= 160 for ids in probes)  # no more at once than in the user's batches
    assert sigswap.compare(model, original, texts(1), max_length=64, progress=False).by_distance[-1].distance == 48
    comparing = importlib.import_module("sigswap.training.compare")
    monkeypatch.setattr(comparing, "MOST_ASKED", 3 * 48)
    few = sigswap.compare(model, original, texts(1), max_length=64, progress=False)
    assert (
        "recall at 16 tokens 72, recall at 48 tokens 24." in few.notes[-1]
    )  # of 2 pairs of 4 tokens, in 9 and in 3 sequences
    short = sigswap.compare(model, original, texts(1), max_length=8, progress=False)
    assert not short.by_distance and any("No lookups were asked: 8 tokens" in note for note in short.notes)


# Encoders and classifiers


def test_encoder_figures_against_their_definition() -> None:
    original = randomise(transformers.BertModel(transformers.BertConfig(vocab_size=61, **SIZES))).eval()
    model = converted(original)
    vectors, missing, energy = ([], []), 0.0, 0.0
    for batch in texts(4):
        mask = batch["attention_mask"].double().unsqueeze(-1)
        with torch.no_grad():
            t, y = (each(**batch).last_hidden_state.double() for each in (original, model))
        for kept, x in zip(vectors, (t, y), strict=True):
            kept.append((x * mask).sum(1) / mask.sum(1))
        missing += float(((y - t) * mask).square().sum())
        energy += float((t * mask).square().sum())
    truth, ours = (torch.cat(each) for each in vectors)
    result = sigswap.compare(model, original, texts(4), progress=False)
    assert result.kind == "encoder" and not result.by_position and not result.by_distance
    assert all(math.isclose(m.original, 0.0 if "error" in m.name else 1.0) for m in result.measures)
    cosine = float(torch.cosine_similarity(ours, truth).mean())
    assert result["cosine similarity"].converted == pytest.approx(cosine, rel=1e-5)
    assert result["squared error of the output"].converted == pytest.approx(missing / energy, rel=1e-5)
    kept = []
    for row in range(16):
        near = []
        for x in (truth, ours):
            similar = [(float(torch.cosine_similarity(x[row], x[i], dim=0)), i) for i in range(16) if i != row]
            near.append({i for _, i in sorted(similar)[-5:]})
        kept.append(len(near[0] & near[1]) / 5)
    assert result["nearest 5 neighbours kept"].converted == pytest.approx(sum(kept) / 16, abs=1e-9)


@pytest.mark.parametrize("labelled", [False, True])
def test_classifier_figures_against_their_definition(labelled: bool) -> None:
    config = transformers.BertConfig(vocab_size=61, num_labels=5, **SIZES)
    original = randomise(transformers.BertForSequenceClassification(config)).eval()
    model = converted(original)
    batches = texts(4)
    labels = torch.randint(0, 5, (4, 4), generator=torch.Generator().manual_seed(2))
    if labelled:
        batches = [{**batch, "labels": labels[index]} for index, batch in enumerate(batches)]
    with torch.no_grad():
        t, y = (torch.cat([each(**b).logits.double() for b in batches]) for each in (original, model))
    result = sigswap.compare(model, original, batches, progress=False)
    assert result.kind == "classifier"
    agreed = float((t.argmax(-1) == y.argmax(-1)).double().mean())
    assert result["most likely class agrees"].converted == agreed
    divergence = float((t.softmax(-1) * (t.log_softmax(-1) - y.log_softmax(-1))).sum(-1).mean())
    assert result["KL divergence from the original"].converted == pytest.approx(divergence, rel=1e-4)
    assert any(measure.name == "accuracy" for measure in result.measures) == labelled
    if labelled:
        right = [float((x.argmax(-1) == labels.flatten()).double().mean()) for x in (t, y)]
        assert [result["accuracy"].original, result["accuracy"].converted] == right


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("vit", "classifier"), ("t5", "encoder"), ("mha", "encoder")])
def test_other_models(name: str, kind: str) -> None:
    entry = BY_NAME[name]
    original, inputs = entry.build(), entry.make_inputs()
    model = sigswap.convert(copy.deepcopy(original), example_inputs=inputs)
    result = sigswap.compare(model, original, [inputs], progress=False)
    assert result.kind == kind and all(layer.error is not None for layer in result.layers)
    assert "converted (sigmoid)" in str(result)


@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("encoder-decoder", lambda: hf("T5ForConditionalGeneration")),
        ("token predictor", lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=61, **SIZES))),
    ],
)
def test_models_with_logits_over_their_vocabulary_choose_tokens(kind: str, build: Callable[[], nn.Module]) -> None:
    original = randomise(build()).eval()
    batch = texts(1)[0]
    if kind == "encoder-decoder":
        batch["decoder_input_ids"] = batch["input_ids"].flip(1)
    model = converted(original)
    result = sigswap.compare(model, original, [batch], progress=False)
    with torch.no_grad():
        chosen = [each(**batch).logits.argmax(-1)[batch["attention_mask"].bool()] for each in (original, model)]
    assert result.kind == kind
    assert result["most likely token agrees"].converted == float((chosen[0] == chosen[1]).double().mean())


# Layers


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("kind", ["sdpa", "softmax", "mha"])
def test_layers_against_their_definition(kind: str, cap: float | None) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

        def heads(self, x: Tensor) -> tuple[Tensor, ...]:
            parts = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias).chunk(3, -1)
            return tuple(part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "mha":
                return self.inner(x, x, x, need_weights=False)[0]
            q, k, v = self.heads(x)
            if kind == "sdpa":
                o = F.scaled_dot_product_attention(q, k, v)
            else:
                o = (q @ k.mT * 8**-0.5).softmax(dim=-1) @ v
            return self.inner.out_proj(o.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    original = nn.Sequential(Attention(), nn.Linear(16, 16)).double()
    batches = [torch.randn(3, 9, 16, dtype=torch.float64) * 3 for _ in range(2)]
    model = converted(original, batches[0], sigswap.SigmoidConfig(row_cap=cap))
    path = next(record.path for record in sigswap.report(model).sites)
    bias = model.get_submodule(path).sigswap.site(0).bias.view(-1, 1, 1)
    sums, missing, energy = [], 0.0, 0.0
    for x in batches:
        q, k, v = original[0].heads(x)
        scores = q @ k.mT * 8**-0.5
        p = torch.sigmoid(scores - math.log(9) + bias).detach()
        sums.append(p.sum(-1).flatten())
        if cap is not None:
            p = p / p.sum(-1, keepdim=True).clamp(min=cap)
        y, t = (original[0].inner.out_proj((a @ v).transpose(1, 2).flatten(2)) for a in (p, scores.softmax(-1)))
        y, t = y.detach(), t.detach()
        missing += float((y - t).square().sum())
        energy += float(t.square().sum())
    result = sigswap.compare(model, original, batches, progress=False)
    (layer,) = result.layers
    assert (layer.path, layer.row_cap) == (path, cap)
    assert layer.error == pytest.approx(missing / energy, rel=1e-6)
    assert layer.row_sum == pytest.approx(float(torch.cat(sums).mean()), rel=1e-6)
    assert layer.largest_row_sum == pytest.approx(float(torch.cat(sums).max()), rel=1e-6)


# The call, its report, and what it leaves behind


def test_a_small_error_is_not_shown_as_none() -> None:
    shown = str(sigswap.Comparison("encoder", 1, [sigswap.Measure("squared error", "", 0.0, 0.000123)]))
    assert "0.00012" in shown and "0.000 " in shown


def test_without_an_original_adapters_and_what_was_trained_beside_them_are_off() -> None:
    peft = pytest.importorskip("peft")
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=61, num_labels=4, **SIZES)
    ).eval()
    randomise(model)
    original = copy.deepcopy(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    sigswap.convert(adapted)
    with torch.no_grad():
        trained = adapted.base_model.model.classifier.modules_to_save["default"]
        trained.weight.copy_(-trained.weight)  # what the trained head says is the least likely to the original
        trained.bias.copy_(-trained.bias)
        batches = [{**batch, "labels": original(**batch).logits.argmax(-1)} for batch in texts()]
    result = sigswap.compare(adapted, None, batches)
    assert result["accuracy"].original == 1
    assert result["accuracy"].converted == 0
    assert any("modules_to_save" in note for note in result.notes)


def test_original_may_be_a_copy_a_directory_or_the_model_itself(tmp_path: Path) -> None:
    original = randomise(hf("LlamaForCausalLM")).eval()
    model = converted(original)
    original.save_pretrained(tmp_path / "original")
    sigswap.save(model, tmp_path / "model")
    expected = sigswap.compare(model, original, texts(1), progress=False)
    for given in (copy.deepcopy(model), tmp_path / "original", str(tmp_path / "model"), None):
        result = sigswap.compare(model, given, texts(1), progress=False)
        assert result.measures == expected.measures and result.by_distance == expected.by_distance
        assert result.layers == expected.layers
        assert any("swap switched off" in note for note in result.notes) == (given is None)
        assert not any("peft" in note for note in result.notes)  # for it has none of its adapters
    made = sigswap.compare(model, original, progress=False)
    assert made.kind == "language model" and any("the model wrote itself" in note for note in made.notes)


def test_nothing_is_changed() -> None:
    original = randomise(hf("LlamaForCausalLM")).train()
    model = converted(original).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    sigswap.compare(model, original, texts(1), progress=False)
    with pytest.raises(CalibrationError, match="batch 1"):
        sigswap.compare(model, original, [*texts(1), {"input_ids": torch.tensor([[10**6, 1]])}], progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    for each in (model, original):
        assert each.training and all(not module._forward_hooks for module in each.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all("observer" not in vars(module) and "softmax" not in vars(module) for module in model.modules())


def test_report_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    original = randomise(hf("LlamaForCausalLM")).eval()
    result = sigswap.compare(converted(original), original, texts(1), progress=False)
    data = json.loads(result.to_json())
    assert data == result.to_dict() and {"measures", "by_distance", "by_position", "layers"} <= set(data)
    text = str(result)
    for word in ("original (softmax)", "copying", "associative recall", "tokens back", "row sum", "loss with 0 to 15"):
        assert word in text
    for suffix in (".png", ".svg", ".html"):
        result.save(tmp_path / f"picture{suffix}")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "associative recall" in (tmp_path / "picture.html").read_text()
    with pytest.raises(ArgumentError, match="suffix"):
        result.save(tmp_path / "picture.txt")
    with pytest.raises(ArgumentError, match=r"'nothing' is no measure of this comparison; they are \['loss"):
        result["nothing"]


def test_wrong_arguments() -> None:
    original = randomise(hf("LlamaForCausalLM")).eval()
    model = converted(original)
    with pytest.raises(NotConvertedError):
        sigswap.compare(original, original, texts(1))
    with pytest.raises(ArgumentError, match=r"original has no module 'model\.layers"):
        sigswap.compare(model, original.model, texts(1))
    with pytest.raises(ArgumentError, match="original must be a model or where one is saved, not a int"):
        sigswap.compare(model, 3, texts(1))
    with pytest.raises(ArgumentError, match="not a directory or hub id"):
        sigswap.compare(model, "/no/such/place", texts(1))
    with pytest.raises(ArgumentError, match="batches is empty"):
        sigswap.compare(model, original, [])
    with pytest.raises(ArgumentError, match="sequences must be"):
        sigswap.compare(model, original, texts(1), sequences=0)
    with pytest.raises(ArgumentError, match="max_length must be"):
        sigswap.compare(model, original, texts(1), max_length=0)
    with pytest.raises(ArgumentError, match="tokens must be a tokenizer"):
        sigswap.compare(model, original, texts(1), tokens=3)
    for mixed in ([texts(1)[0]["input_ids"], *texts(1)], [*texts(1), texts(1)[0]["input_ids"]]):
        with pytest.raises(ArgumentError, match="batches must all hold their token ids"):
            sigswap.compare(model, original, mixed)
        with pytest.raises(ArgumentError, match="batches must all hold their token ids"):
            sigswap.distill(model, original, mixed, steps=2)
    plain = ShiftedDecoder()
    with pytest.raises(ArgumentError, match="does not say what its inputs look like"):
        sigswap.compare(sigswap.convert(plain, example_inputs=texts(1)[0]["input_ids"]))


def test_compiled_models_are_compared_as_they_are() -> None:
    original = randomise(hf("LlamaForCausalLM"), gain=0.7).eval()
    model = converted(original)
    expected = sigswap.compare(model, original, texts(1), max_length=16, progress=False)
    compiled = (torch.compile(each, backend="eager") for each in (model, original))
    assert sigswap.compare(*compiled, texts(1), max_length=16, progress=False) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["a", 1.0, True, None])
def test_a_seed_that_is_no_number(seed: Any) -> None:
    original = randomise(hf("LlamaForCausalLM")).eval()
    with pytest.raises(ArgumentError, match="seed must be a whole number"):
        sigswap.compare(converted(original), original, texts(1), seed=seed)


def test_a_model_whose_inputs_are_not_known() -> None:
    x = torch.randn(2, 6, 16)
    model = converted(nn.TransformerEncoderLayer(16, 2, batch_first=True), x)
    with pytest.raises(ArgumentError, match=r"does not say what its inputs look like, so none can be made for it\."):
        sigswap.compare(model)
