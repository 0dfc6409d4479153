"""Sequences that need looking back: what is in them, of which tokens they are, and that distillation needs them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoders import VOCABULARY, ShiftedDecoder, text, trained_to_copy
from made_once import made_once
from torch import Tensor, nn
from zoo import BY_NAME, hf, randomise

import sigswap
from sigswap.errors import ArgumentError, CalibrationError
from sigswap.training import language, lookups
from sigswap.training.lesson import Lesson
from sigswap.training.lookups import Lookups
from sigswap.training.mixing import Mixer, mixer_for

transformers = pytest.importorskip("transformers")
IDS = torch.arange(1000, 1500)
LENGTH = 64
QUERY_BIAS = sigswap.SigmoidConfig(query_bias=True, first_token=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# What the sequences hold


@pytest.mark.parametrize("kind", list(lookups.MIXED_KINDS))
@pytest.mark.parametrize("length", [8, 31, 64, 512])
def test_sequences_are_made_of_the_vocabulary_and_repeat_by_seed(kind: str, length: int) -> None:
    mix = Lookups(kinds=[kind], seed=3)
    made = mix.sequences(5, length, IDS, step=7)
    assert made.shape == (5, length) and made.dtype == torch.int64
    assert bool(torch.isin(made, IDS).all())
    assert torch.equal(made, mix.sequences(5, length, IDS, step=7))
    for other in (mix.sequences(5, length, IDS, step=8), Lookups(kinds=[kind]).sequences(5, length, IDS, step=7)):
        assert not torch.equal(made, other)


def period_of(row: Tensor) -> int:
    return next(p for p in range(1, len(row) + 1) if torch.equal(row[p:], row[:-p]))


def test_repeats_have_a_period() -> None:
    periods = [period_of(row) for row in Lookups(kinds=["repeats"]).sequences(200, 512, IDS, 0)]
    assert min(periods) >= 32 and max(periods) <= 256 and len(set(periods)) > 50


def test_edits_are_repeats_with_few_changes() -> None:
    for row in Lookups(kinds=["edits"]).sequences(20, 512, IDS, 0):
        followed = {(a, b) for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True)}
        again = sum(
            (a, b) in set(zip(row[:i].tolist(), row[1 : i + 1].tolist(), strict=True))
            for i, (a, b) in enumerate(zip(row[256:-1].tolist(), row[257:].tolist(), strict=True), 256)
        )
        assert 0.5 * 255 < again < 255 and len(followed) > 32  # many of the second half's pairs were there, not all


def test_lists_give_a_key_the_same_value_each_time() -> None:
    for row in Lookups(kinds=["lists"]).sequences(20, 512, IDS, 0):
        values: dict[int, int] = {}
        for key, value in row.view(-1, 2).tolist():
            assert values.setdefault(key, value) == value
        assert 16 <= len(values) <= 128 and not set(values) & set(values.values())
        assert period_of(row) == len(row)  # another order each time


def test_kinds_take_turns() -> None:
    made = Lookups(kinds=["repeats", "lists"]).sequences(10, 256, IDS, 0)
    repeats = [period_of(row) <= 128 for row in made]
    assert repeats in ([True, False] * 5, [False, True] * 5)


@pytest.mark.parametrize("length", [16, 33, 100, 512, 4096])
def test_probes_can_be_answered_from_what_is_before(length: int) -> None:
    """An answer is what followed the same token before; a key is nowhere else. In copying, it is half a probe back."""
    probe = lookups.copying(3, length, IDS, generator())
    half = probe.ids.shape[1] // 2
    assert probe.ids.shape[1] <= min(length, 400) and torch.equal(probe.ids[:, :half], probe.ids[:, half:])
    assert probe.asked.tolist() == list(range(half + 1, 2 * half))
    found = [lookups.associative_recall(3, length, IDS, generator())]
    for distance in lookups.distances(length):
        found.append(lookups.recall_at(distance, 3, length, IDS, generator()))
        assert found[-1].distance == distance
    assert len(found) > 1
    for probe in found:
        assert probe.ids.shape[1] <= length
        back = []
        for row in probe.ids.tolist():
            for place in probe.asked.tolist():
                keys = [i for i, token in enumerate(row[: place - 1]) if token == row[place - 1]]
                assert len(keys) == 1 and row[keys[0] + 1] == row[place]
                back.append(place - 1 - keys[0])
        if probe.distance is not None:
            assert sum(back) / len(back) == pytest.approx(probe.distance)
    assert lookups.distances(8192)[-1] == 8160 and lookups.distances(8192)[0] == 64


def test_arguments_of_lookups() -> None:
    for wrong in (
        {"share": 1.0},
        {"share": -0.1},
        {"share": "a"},
        {"kinds": ["text"]},
        {"kinds": "edits"},
        {"kinds": []},
    ):
        with pytest.raises(ArgumentError, match="lookups"):
            Lookups(**wrong)
    assert Lookups.of(True) == Lookups() and not Lookups.of(False).share and Lookups.of(0.5).share == 0.5


# Of which tokens


class Tokenizer:
    """As transformers' are: ids with a gap at 40 to 49, two special ones, and one that the model does not know."""

    all_special_ids = (0, 1)

    def get_vocab(self) -> dict[str, int]:
        return {f"token {index}": index for index in [*range(40), *range(50, 62)]}


def test_vocabulary() -> None:
    model = hf("LlamaForCausalLM")
    size = model.config.vocab_size
    assert size == 61
    special = {model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id}
    assert language.vocabulary(model).tolist() == sorted(set(range(size)) - special)
    model.generation_config.eos_token_id = [2, 20]
    assert language.vocabulary(model).tolist() == sorted(set(range(size)) - special - {2, 20})
    assert language.vocabulary(model, Tokenizer()).tolist() == [*range(2, 40), *range(50, 61)]
    assert language.vocabulary(model, [30, *range(5, 25), 30]).tolist() == [*range(5, 25), 30]
    assert language.vocabulary(ShiftedDecoder()).tolist() == list(range(VOCABULARY))
    for wrong, message in ((range(70), "outside of 0 to 60"), ("abc", "tokenizer or token ids"), (range(9), "too few")):
        with pytest.raises(ArgumentError, match=message):
            language.vocabulary(model, wrong)


def test_what_is_a_language_model() -> None:
    ids = torch.arange(24).view(2, 12) + 3
    call = ((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    llama = randomise(hf("LlamaForCausalLM")).eval()
    assert language.read_language(llama, call) == language.TextInputs("input_ids")
    assert language.read_language(ShiftedDecoder().eval(), ((ids,), {})) == language.TextInputs(None)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=61, **sizes))
    for model, reason in ((masked, "sees later tokens"), (llama.model, "no logits over its vocabulary")):
        assert reason in language.read_language(randomise(model).eval(), call)
    assert "beside token ids" in language.read_language(
        llama, ((), {**call[1], "pixel_values": torch.zeros(2, 3, 8, 8)})
    )
    vit = BY_NAME["vit"]
    assert "no token ids" in language.read_language(vit.build().eval(), ((vit.make_inputs(),), {}))


# Mixed into batches


def test_mixer_replaces_a_share_of_the_rows() -> None:
    mixer = Mixer(Lookups(), language.TextInputs("input_ids"), IDS)
    for step, count in enumerate((4, 1, 1, 1, 1, 3, 5)):
        ids = torch.arange(count * 40).view(count, 40)
        mask = torch.ones_like(ids)
        mask[:, :9] = 0
        given = {"input_ids": ids, "attention_mask": mask, "labels": ids, "position_ids": (mask.cumsum(1) - 1).clamp(0)}
        kept = {name: x.clone() for name, x in given.items()}
        args, new = mixer(((), given), step)
        assert all(torch.equal(given[name], x) for name, x in kept.items())  # the user's tensors are not written to
        mixed = (new["input_ids"] != ids).any(1)
        assert bool(torch.isin(new["input_ids"][mixed], IDS).all()) and args == ()
        assert bool(new["attention_mask"][mixed].all()) and torch.equal(new["labels"][mixed], new["input_ids"][mixed])
        assert (new["position_ids"][mixed] == torch.arange(40)).all()
        assert all(torch.equal(new[name][~mixed], x[~mixed]) for name, x in kept.items())
    assert (mixer.sequences, mixer.mixed) == (16, 4) and "4 of 16 sequences" in str(mixer)
    short = ((), {"input_ids": torch.zeros(4, 7, dtype=torch.long)})
    assert mixer(short, 9) is short


def test_never_for_what_is_no_language_model() -> None:
    for name in ("vit", "bert", "t5"):
        entry = BY_NAME[name]
        original = entry.build()
        inputs = entry.make_inputs()
        model = sigswap.convert(copy.deepcopy(original), example_inputs=inputs)
        report = sigswap.distill(model, original, [inputs], steps=1, progress=False)
        assert report.lookups.startswith("no lookups mixed in (") and report.lookups in str(report)
        with pytest.raises(ArgumentError, match="lookups can be given for language models only"):
            sigswap.distill(model, original, [inputs], steps=1, lookups=0.25, progress=False)


def test_vocabulary_too_small_for_lookups() -> None:
    model, call = ShiftedDecoder(vocabulary=8).eval(), ((torch.arange(8).view(1, 8),), {})
    assert "too few" in str(mixer_for(True, None, model, call))
    with pytest.raises(ArgumentError, match="too few"):
        mixer_for(0.25, None, model, call)


# What they do


@pytest.fixture(scope="module")
def teacher() -> ShiftedDecoder:
    return trained_to_copy(LENGTH)


def texts(count: int, seed: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": text(16, LENGTH, seed + index)} for index in range(count)]


def converted(original: nn.Module) -> nn.Module:
    model = sigswap.convert(copy.deepcopy(original), QUERY_BIAS, example_inputs=texts(1, 0)[0])
    sigswap.calibrate(model, texts(4, 1000), progress=False)
    return model


def test_lookups_are_lost_without_the_mix_and_kept_with_it(teacher: ShiftedDecoder) -> None:
    """Text alone, in which nothing repeats, does not keep what looking back needs from decaying; loss is as good."""
    lost, kept = (converted(teacher) for _ in range(2))
    found = {}
    for name, model, share in (("lost", lost, False), ("kept", kept, True)):
        report = sigswap.distill(
            model, teacher, texts(4, 1000), steps=150, lr=3e-2, sigmoid_lr=1e-2, weight_decay=0.3, lookups=share,
            progress=False,
        )  # fmt: skip
        assert ("of 2400 sequences" in report.lookups) == share
        found[name] = sigswap.compare(model, teacher, texts(2, 2000), progress=False)
    for name in ("copying", "associative recall"):
        assert found["kept"][name].original > 0.85
        assert found["kept"][name].converted > 0.7
        assert found["lost"][name].converted < 0.2
    assert min(far.converted for far in found["kept"].by_distance) > 0.7
    assert max(far.converted for far in found["lost"].by_distance) < 0.2
    for comparison in found.values():
        assert comparison["loss"].converted < comparison["loss"].original + 0.15


def test_layerwise_stage_sees_lookups(teacher: ShiftedDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    layerwise = Lesson.layerwise

    def noting(self: Any, call: Any, index: int, weight: float) -> Tensor:
        seen.append(call[1]["input_ids"])
        return layerwise(self, call, index, weight)

    monkeypatch.setattr(Lesson, "layerwise", noting)
    model = converted(teacher)
    report = sigswap.distill(model, teacher, texts(1, 0), steps=0, layerwise_steps=2, progress=False)
    assert len(seen) == 2 and all(int((ids != texts(1, 0)[0]["input_ids"]).any(1).sum()) == 4 for ids in seen)
    assert "8 of 32 sequences" in report.lookups


# What a decoder is seen on beside the batches


def seen_by(model: Any, batches: list[Any], **options: Any) -> tuple[list[Tensor], Any]:
    """The token ids of the first pass of a calibration, and its report."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    report = sigswap.calibrate(model, batches, refine=0, progress=False, **options)
    hook.remove()
    tried, passes = 2, 2  # whether it is a decoder is tried first
    assert (len(seen) - tried) % passes == 0
    each = (len(seen) - tried) // passes
    first, second = seen[tried : tried + each], seen[tried + each :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return first, report


@made_once
def swapped(**config: Any) -> Any:
    return sigswap.convert(randomise(hf("LlamaForCausalLM", **config)).eval(), QUERY_BIAS)


def lines(count: int, rows: int = 3, length: int = 20) -> list[dict[str, Tensor]]:
    """Rows of one token each, so that they are told from lookups."""
    return [
        {"input_ids": torch.full((rows, length), 3 + index), "labels": torch.zeros(rows, length, dtype=torch.int64)}
        for index in range(count)
    ]


def test_calibration_sees_lookups_beside_the_batches() -> None:
    seen, report = seen_by(swapped(), lines(4), tokens=range(20, 50))
    given = [ids for ids in seen if bool((ids == ids[0, 0]).all())]
    made = torch.cat([ids for ids in seen if not bool((ids == ids[0, 0]).all())])
    assert torch.equal(torch.cat(given), torch.cat([batch["input_ids"] for batch in lines(4)]))
    assert made.shape == (4, 20) and int(made.min()) >= 20  # a quarter of 16
    assert len({tuple(row) for row in made.tolist()}) == 4
    assert report.batches == 4 and any(
        "4 lookups (repeats and edits of random tokens)" in line for line in report.notes
    )
    seen, report = seen_by(swapped(), lines(4), lookups=False)
    assert len(seen) == 4 and not any("lookups" in line for line in report.notes)
    seen, _ = seen_by(swapped(), lines(1, rows=1), lookups=Lookups(share=0.5, kinds=["lists"]))
    assert [len(ids) for ids in seen] == [1, 1]


def test_calibration_of_other_models_sees_no_lookups() -> None:
    for name in ("bert", "vit"):
        entry = BY_NAME[name]
        inputs = entry.make_inputs()
        model = sigswap.convert(entry.build(), example_inputs=inputs)
        report = sigswap.calibrate(model, [inputs], refine=0, progress=False)
        assert not report.notes
        for wrong in ({"lookups": 0.5}, {"max_length": 16}):
            with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} can be given for language models only"):
                sigswap.calibrate(model, [inputs], progress=False, **wrong)


def test_calibration_reaches_all_positions_up_to_max_length() -> None:
    ids = torch.randint(3, 61, (10, 20), generator=generator())
    mask = torch.ones_like(ids)
    mask[4, 15:] = 0
    batches = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(4), mask.split(4), strict=True)]
    seen, report = seen_by(swapped(), batches, max_length=60)
    text_ = ids[mask.bool()]
    long = [x for x in seen if x.shape[1] == 60]
    assert torch.equal(torch.cat(long[:3]), text_[:180].view(3, 60)) and long[3].shape == (1, 60)  # the last: lookups
    assert any("3 sequences of 60 tokens" in line for line in report.notes)
    assert report.lengths[-1].most == 60 and max(record.most for record in report.lengths) == 60
    assert {record.least for record in report.lengths} == {1, 2, 4, 8, 16, 32}
    model = swapped()
    seen, report = seen_by(model, batches[:1], max_length=64, lookups=False)
    assert [x.shape for x in seen] == [(4, 20), (1, 64)]
    seen, _ = seen_by(model, batches[1:2], max_length=64, lookups=False)
    assert [x.shape for x in seen] == [(4, 20), (1, 64)]
    seen, _ = seen_by(model, batches[2:], max_length=64, lookups=False)
    assert [x.shape for x in seen] == [(2, 20), (1, 40)]  # there are no more
    for wrong in (65, 1, "long", True):
        with pytest.raises(ArgumentError, match="max_length"):
            sigswap.calibrate(model, batches, max_length=wrong, progress=False)
    too_long = [{"input_ids": torch.zeros(1, 65, dtype=torch.int64)}]
    with pytest.raises(ArgumentError, match="positions for 64"):
        sigswap.calibrate(model, too_long, progress=False)


# Batches of other lengths


def test_batches_are_cut_into_sequences_of_the_lengths_given() -> None:
    mixer = Mixer(None, language.TextInputs("input_ids"), None, lengths=[8, 30, 100])
    ids = torch.arange(3, 83).view(4, 20)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids, "use_cache": False}
    shapes = set()
    for step in range(30):
        args, new = mixer.cut(((), given), step)
        cut = new.pop("input_ids")
        assert args == () and new == {"use_cache": False}
        assert torch.equal(cut.flatten(), ids[mask.bool()][: cut.numel()])
        shapes.add(tuple(cut.shape))
    assert shapes == {(9, 8), (2, 30), (1, 73)}
    assert torch.equal(mixer.cut(((), given), 7)[1]["input_ids"], mixer.cut(((), given), 7)[1]["input_ids"])


def test_distillation_at_several_lengths() -> None:
    original = randomise(hf("LlamaForCausalLM"), gain=0.7).eval()
    model = sigswap.convert(copy.deepcopy(original), QUERY_BIAS)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    batches = [{"input_ids": torch.randint(3, 61, (8, 16), generator=generator(i))} for i in range(3)]
    report = sigswap.distill(model, original, batches, steps=8, lengths=[16, 64], progress=False)
    assert set(seen) == {(8, 16), (2, 64)} and len(seen) == 8 and " of " in report.lookups
    for wrong in ([], [1], [65], "16", [16.0], 16):
        with pytest.raises(ArgumentError, match="lengths"):
            sigswap.distill(model, original, batches, steps=1, lengths=wrong, progress=False)
    entry = BY_NAME["vit"]
    vit = sigswap.convert(entry.build(), example_inputs=entry.make_inputs())
    with pytest.raises(ArgumentError, match="lengths can be given for language models only: the batches hold no token"):
        sigswap.distill(vit, entry.build(), [entry.make_inputs()], steps=1, lengths=[16], progress=False)


# Bad input: a clear error, and nothing lost


def test_another_vocabulary_and_too_long_sequences() -> None:
    original = randomise(hf("LlamaForCausalLM")).eval()
    model = sigswap.convert(copy.deepcopy(original))
    other = copy.deepcopy(original)
    other.resize_token_embeddings(77)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(16).view(1, 16) + 3
    long = torch.zeros(1, model.config.max_position_embeddings + 1, dtype=torch.long)
    for use in (
        lambda teacher, ids: sigswap.distill(model, teacher, [{"input_ids": ids}], steps=2, progress=False),
        lambda teacher, ids: sigswap.compare(model, teacher, [{"input_ids": ids}], progress=False),
    ):
        with pytest.raises(CalibrationError, match="77 channels where the model gives 61: it is of another vocabulary"):
            use(other, ids)
        with pytest.raises(ArgumentError, match=f"positions for {model.config.max_position_embeddings}"):
            use(original, long)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
