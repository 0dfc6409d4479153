"""Parts of a model that no inputs of its own reach: given by path, or seen while its user runs it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sigswap
from sigswap import errors
from sigswap.conversion.example_inputs import resolve_examples
from tests.support.oracle import sigmoid_of_scores


class Attention(nn.Module):
    """[B, N, 16], two heads; ``cache``: a list of keys and values of the calls before."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.probabilities: Any = lambda scores: scores.softmax(-1)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if cache is not None:
            k, v = cache.extended(k, v)
        return (self.probabilities(q @ k.mT) @ v).transpose(1, 2).flatten(2)


class Cache:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = self.kept or [k[:, :, :0], v[:, :, :0]]
        self.kept = [torch.cat([old, new], 2) for old, new in zip(before, (k, v), strict=True)]
        return self.kept[0], self.kept[1]


class Dual(nn.Module):
    """Two encoders, and no forward over both that example inputs could be made for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(3, 16), Attention(), nn.Linear(16, 8))
        self.text = nn.ModuleDict({"embed": nn.Embedding(9, 16), "attention": Attention()})
        self.unused = Attention()
        self.eval()

    def encode_text(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        return self.text["attention"](self.text["embed"](ids), cache=cache)

    def forward(self, loader: Any) -> Tensor:
        return torch.stack([F.normalize(self.image(x).mean(1)) @ self.encode_text(ids).mT for x, ids in loader])


IMAGES, IDS = torch.randn(2, 5, 3), torch.arange(8).view(2, 4)


def assert_equals_the_oracle(model: Dual, original: Dual) -> None:
    for module in original.modules():
        if isinstance(module, Attention):
            module.probabilities = sigmoid_of_scores
    with torch.no_grad():
        assert torch.allclose(model.image(IMAGES), original.image(IMAGES), atol=1e-6)
        assert torch.allclose(model.encode_text(IDS), original.encode_text(IDS), atol=1e-6)


def test_inputs_by_path() -> None:
    model = Dual()
    original = copy.deepcopy(model)
    cached: dict[str, Any] = {"x": torch.randn(1, 1, 16), "cache": Cache()}
    inputs = {"image": IMAGES, "text.attention": [torch.randn(2, 4, 16), cached]}
    report = sigswap.inspect(model, example_inputs=inputs)
    assert "looked at: unused (Attention)." in " ".join(report.notes)
    sigswap.convert(model, example_inputs=inputs)
    assert sigswap.report(model).count("swapped") == 2
    assert_equals_the_oracle(model, original)
    assert cached["cache"].kept == []  # what is given stays as it is


def test_paths_are_told_from_keyword_arguments() -> None:
    with pytest.raises(errors.ExampleInputsError, match=r"names \['text.attend'\], which are no modules of Dual"):
        sigswap.convert(Dual(), example_inputs={"image": IMAGES, "text.attend": IMAGES})
    with pytest.raises(errors.ExampleInputsError, match=r"failed on the example inputs of image \(RuntimeError"):
        sigswap.convert(Dual(), example_inputs={"image": IDS})

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.x(x)

    class Open(Named):
        def forward(self, **inputs: Tensor) -> Tensor:  # type: ignore[override]
            return self.x(inputs["x"])

    for cls in (Named, Open):
        inputs = {"x": torch.randn(2, 5, 16)}
        assert [example.path for example in resolve_examples(cls(), inputs)] == [""]
        assert sigswap.report(sigswap.convert(cls(), example_inputs=inputs)).count("swapped") == 1
    whole = sigswap.convert(Named(), example_inputs={"": torch.randn(2, 5, 16), "x": torch.randn(1, 2, 16)})
    assert sigswap.report(whole).count("swapped") == 1


def test_what_is_run_inside_watch_is_converted() -> None:
    model = Dual()
    original = copy.deepcopy(model)
    cache = Cache()
    with sigswap.watch(model) as calls:
        model.image(IMAGES)
        model.encode_text(IDS, cache).sum().backward()  # with a history
        for i in range(3):
            model.encode_text(IDS[:, i : i + 1], cache)
    assert cache.kept[0].shape[2] == 7
    # Once each: the images, ids, attention; one id, attention to a cache.
    assert [call.path for call in calls] == ["image", *["text.embed", "text.attention"] * 2]
    assert calls[2].inputs[1]["cache"].kept == [] and calls[4].inputs[1]["cache"].kept[0].shape[2] == 4
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert hooks == []

    other = sigswap.convert(Dual(), example_inputs=calls)
    sigswap.convert(model)
    assert cache.kept[0].shape[2] == 7 and type(cache.kept[0]) is Tensor
    for each in (model, other):
        assert [site.path for site in sigswap.report(each).sites] == ["image.1", "text.attention"]
        assert_equals_the_oracle(each, copy.deepcopy(original))
    sigswap.revert(model)
    with pytest.raises(errors.ExampleInputsError, match="does not say what its inputs look like"):
        sigswap.convert(model)  # what was seen is used once


def test_watch_says_what_is_wrong() -> None:
    model = Dual()
    nothing = pytest.raises(errors.ExampleInputsError, match=r"no module of Dual was called inside sigswap.watch")
    with nothing, sigswap.watch(model):
        pass
    with pytest.raises(ZeroDivisionError), sigswap.watch(model):
        model.image(IMAGES)
        raise ZeroDivisionError
    with pytest.raises(errors.ExampleInputsError, match="does not say what its inputs look like"):
        sigswap.convert(model)
    sigswap.convert(model, example_inputs={"image": IMAGES})
    with pytest.raises(errors.AlreadyConvertedError), sigswap.watch(model):
        pass
    with pytest.raises(errors.ArgumentError, match="not a function"), sigswap.watch(lambda: 0):  # type: ignore[arg-type]
        pass


def test_generate_inside_watch() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 61, (2, 5))
    with sigswap.watch(model):
        before = model.generate(ids, max_new_tokens=4, do_sample=False)
    sigswap.convert(model)
    assert sigswap.report(model).count("swapped") == 2
    with sigswap.softmax(model):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), before)
    cached = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
