"""A forward that runs is looked at, in whatever way it needs, and what it touched is as it was afterwards."""

from __future__ import annotations

import collections
import copy
import functools
import gc
import random
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import sigswap
from sigswap import errors
from sigswap.conversion.record import conversion_of
from sigswap.conversion.recording import Example, Recording
from sigswap.conversion.untouched import Untouched
from tests.support.oracle import sigmoid_of_scores


class Attention(nn.Module):
    """[B, N, 16], two heads, by hand; ``read`` gets the module and what it computed, and its result is returned."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor] = lambda self, y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.read = nn.Linear(16, 48), read
        self.probabilities: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1)
        self.register_buffer("four", torch.tensor([4.0]))
        self.eval()

    def heads(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.read(self, (self.probabilities(q @ k.mT) @ v).transpose(1, 2).flatten(2))


def example() -> Tensor:
    return torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))


def assert_converts(model: nn.Module, sites: int = 1) -> None:
    """Equal to the same model in float64, whose probabilities are the oracle's."""
    x, want = example(), copy.deepcopy(model).double()
    for module in want.modules():
        if isinstance(module, Attention):
            module.probabilities = sigmoid_of_scores
    with torch.no_grad():
        softmax, expected = model(x), want(x.double())
    sigswap.convert(model, example_inputs=x)
    assert sigswap.report(model).count("swapped") == sites
    with torch.no_grad():
        assert torch.allclose(model(x).double(), expected, rtol=1e-4, atol=1e-6)
        with sigswap.softmax(model):
            assert torch.equal(model(x), softmax)


def formatted(self: Attention, y: Tensor) -> Tensor:
    assert f"{(y > 0).sum()} of {y.numel():d} at {y.max():.3f}, {y[0, 0, :2].tolist()}, {y!r}"
    return y


def checked_type(self: Attention, y: Tensor) -> Tensor:
    assert type(y) == Tensor and type(self.qkv.weight) is nn.Parameter  # noqa: E721
    return y


def edited_weight(self: Attention, y: Tensor) -> Tensor:
    if y.sum() == 0:
        return y
    with torch.no_grad():
        self.qkv.weight.mul_(1.0).data.clamp_(-9, 9)
    return y


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "new_full": lambda self, y: y * y.new_full((16,), self.four[0]),
    "full": lambda self, y: y * torch.full((16,), self.four.max().item()),
    "fill": lambda self, y: y.masked_fill(y > 9, self.four[0]) + torch.zeros(16).fill_(self.four[0]),
    "arange": lambda self, y: y[:, torch.arange(self.four.max().long())],
    "view": lambda self, y: y.reshape(2, -1, self.four[0].long() * 4),
    "split": lambda self, y: torch.cat(y.split([int(self.four), 2], 1), 1),
    "range": lambda self, y: sum(y * i for i in range(self.four.int())),
    "list": lambda self, y: y * self.four.tolist()[0],
    "tensor_of_tensors": lambda self, y: y * torch.tensor([y.max()]),
    "as_tensor": lambda self, y: y * torch.as_tensor(y.abs().mean().item()),
    "numpy": lambda self, y: y * float(y.detach().numpy().max()),
    "from_numpy": lambda self, y: y + torch.from_numpy(np.exp(-(y.detach().numpy() ** 2))),
    "array": lambda self, y: y * float(np.asarray(self.four)[0]),
    "format": formatted,
    "index": lambda self, y: y[:, (y > 0).sum() * 0 :],
    "mask": lambda self, y: y[y > -9].view(2, 6, 16),
    "nonzero": lambda self, y: y[:, (y.abs().sum((0, 2)) > -1).nonzero().squeeze(1)],
    "unique": lambda self, y: y + torch.unique(self.four).numel(),
    "compare": lambda self, y: y if y.max() > y.min() and self.four in (4.0, 5.0) else -y,
    "equal": lambda self, y: y if torch.equal(y, y) and torch.allclose(y, y) else -y,
    "module_to": lambda self, y: self.qkv.to(y.device).double().float() and y,
    "dlpack": lambda self, y: y + 0 * torch.from_dlpack(y.detach()),
    "type": checked_type,
    "edit": edited_weight,
    "compiled": lambda self, y: torch.compile(torch.sin, backend="eager")(y) * self.four.item(),
    "nested": lambda self, y: torch.nested.nested_tensor(list(y)).to_padded_tensor(0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
def test_whatever_reads_a_value(name: str) -> None:
    assert_converts(Attention(READS[name]))


class Sequence(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_the_data_goes_on_past_what_no_op_shows() -> None:
    """What comes out of numpy or vmap, or is written into a tensor, is data: the next attention's keys depend on it."""

    def through_numpy(self: Attention, y: Tensor) -> Tensor:
        return torch.from_numpy(y.detach().numpy() * 2)

    def written(self: Attention, y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        for i in range(2):
            out[i] = y[i]
        return out

    def mapped(self: Attention, y: Tensor) -> Tensor:
        return torch.vmap(lambda row: row.sin())(y)

    assert_converts(Sequence(*map(Attention, (through_numpy, written, mapped)), Attention()), sites=4)


def test_keys_written_into_a_buffer() -> None:
    class Cached(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.zeros(2, 2, 9, 8))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            n = int(self.four) + 2
            self.keys[:, :, :n] = k
            return (self.probabilities(q @ self.keys[:, :, :n].mT) @ v).transpose(1, 2).flatten(2)

    model = Cached()
    sigswap.inspect(model, example_inputs=example())
    assert not model.keys.any()
    assert_converts(model)


def test_weights_that_are_no_parameters_any_more_are_a_router() -> None:
    table = torch.randn(6, 16)

    class Router(Attention):
        def forward(self, x: Tensor) -> Tensor:
            experts = self.qkv.weight[:6]
            weights = [x @ experts.data.T, x @ table.to(x).T, x @ torch.from_numpy(experts.detach().numpy()).T]
            return super().forward(x + sum((w.softmax(-1) @ experts for w in weights), torch.zeros(1)))

    assert_converts(Router())


# As it is: what works only in the model itself.


def test_hooks_that_the_forward_relies_on() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.seen = Attention(), []
            self.attention.register_forward_hook(lambda module, inputs, output: self.seen.append(output))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.clear()
            return self.attention(x) + self.seen[0]

    model = Model().eval().train()
    model(example())
    before = [*model.seen]
    hooks = {path: dict(module._forward_hooks) for path, module in model.named_modules()}
    sigswap.convert(model, example_inputs=example())
    assert len(model.seen) == 1 and model.seen[0] is before[0]
    assert all(dict(model.get_submodule(path)._forward_hooks) == own for path, own in hooks.items())
    assert all(module.training for path, module in model.named_modules() if "sigswap" not in path)
    assert len(conversion_of(model).owners) == 1


def test_a_model_that_cannot_be_copied() -> None:
    model = Attention(lambda self, y: y)
    model.lock = threading.Lock()  # type: ignore[assignment]
    sigswap.convert(model, example_inputs=example())
    assert sigswap.report(model).count("swapped") == 1


# Nothing stays behind.

CACHE: dict[Any, Any] = {}
LAST: Tensor | None = None
ORDER: list[Tensor] = []


@functools.lru_cache
def remembered(length: int) -> Tensor:
    return torch.arange(float(length))[:, None]


class Store:
    table: Tensor | None = None
    own: dict[int, Tensor] = collections.OrderedDict()  # noqa: RUF012


def in_a_global_dict(n: int) -> Tensor:
    return CACHE.setdefault(n, {"table": [torch.arange(float(n))[:, None]]})["table"][0]


def in_a_global(n: int) -> Tensor:
    global LAST
    if LAST is None or LAST.shape[0] != n:
        LAST = torch.arange(float(n))[:, None]
    return LAST


def in_a_list(n: int) -> Tensor:
    if not ORDER:
        ORDER.append(torch.arange(float(n))[:, None])
    return ORDER[0]


def in_a_class(n: int) -> Tensor:
    if Store.table is None:
        Store.table = Store.own[n] = torch.arange(float(n))[:, None]
    return Store.own[n]


def in_a_function(n: int) -> Tensor:
    if not hasattr(in_a_function, "table"):
        in_a_function.table = torch.arange(float(n))[:, None]  # type: ignore[attr-defined]
    return in_a_function.table  # type: ignore[attr-defined, no-any-return]


def in_a_default(n: int, cache: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return cache.setdefault(n, torch.arange(float(n))[:, None])


def _closure() -> Callable[[int], Tensor]:
    table: Tensor | None = None

    def in_a_closure(n: int) -> Tensor:
        nonlocal table
        table = torch.arange(float(n))[:, None] if table is None else table
        return table

    return in_a_closure


CACHES = [in_a_global_dict, in_a_global, in_a_list, in_a_class, in_a_function, in_a_default, _closure(), remembered]


def fakes() -> list[Any]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is FakeTensor]


@pytest.mark.slow
@pytest.mark.usefixtures("thawed")
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.__name__)
def test_caches_of_the_models_code(cache: Callable[[int], Tensor], values: bool) -> None:
    def read(self: Attention, y: Tensor) -> Tensor:
        return y + cache(y.shape[1]) * (self.four.item() if values else 4)

    model, x = Attention(read), example()
    before = fakes()  # of other tests, in this process
    sigswap.inspect(model, example_inputs=x)
    assert not [each for each in fakes() if not any(each is other for other in before)]
    assert not CACHE and LAST is None and not ORDER and Store.table is None and not Store.own
    assert type(model(x)) is Tensor
    kept = cache(6)
    assert_converts(model)
    assert cache(6) is kept
    CACHE.clear(), ORDER.clear(), Store.own.clear()
    globals()["LAST"] = Store.table = None


def test_a_cached_method() -> None:
    """The key is its module, of which the run has a copy."""

    class Layer(nn.Linear):
        @functools.lru_cache  # noqa: B019
        def twice(self) -> int:
            return 2

    class Cached(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = Layer(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.qkv.twice()  # type: ignore[operator]

    assert_converts(Cached())


def test_a_cache_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another package's code, say: a dict's entry is taken out, an attribute is told of."""
    other = type(sys)("another_package")
    exec("cache = {}\nclass Box: pass\nbox = Box()", vars(other))
    monkeypatch.setitem(sys.modules, "another_package", other)

    def into_a_dict(self: Attention, y: Tensor) -> Tensor:
        hidden = sys.modules["another_package"].cache
        return y + hidden.setdefault(y.shape[1], torch.arange(float(y.shape[1]))[:, None])

    def into_an_attribute(self: Attention, y: Tensor) -> Tensor:
        sys.modules["another_package"].box.table = y * 2
        return y

    other.cache["mine"] = 1
    assert_converts(Attention(into_a_dict))
    assert list(other.cache) == ["mine", 6] and type(other.cache[6]) is Tensor
    with pytest.raises(errors.ConversionError, match=r"still held by"):
        sigswap.convert(Attention(into_an_attribute), example_inputs=example())
    del other.box.table


def test_random_numbers_go_on() -> None:
    def draws(self: Attention, y: Tensor) -> Tensor:
        return y * (torch.rand(()).item() + random.random() + np.random.rand())

    model = Attention(draws)
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]
    sigswap.inspect(model, example_inputs=example())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()


def test_buffers_and_inputs_are_as_before() -> None:
    class Counting(Attention):
        def forward(self, x: Tensor) -> Tensor:
            self.four += 1
            self.count = getattr(self, "count", 0) + self.four.item()
            return super().forward(x.add_(1.0))

    model, x = Counting(), example()
    model.lock = threading.Lock()  # type: ignore[assignment]  # so that it runs itself
    version, names = model.four._version, set(vars(model))
    sigswap.inspect(model, example_inputs=x)
    assert model.four.item() == 4 and model.four._version == version
    assert set(vars(model)) == names and torch.equal(x, example())


def test_a_plain_run_leaves_the_grad_mode() -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            Recording(Attention(lambda self, y: y)).plainly(Example(((example(),), {})))
            assert torch.is_grad_enabled() == enabled


# Whose fault it is.


def test_the_inputs_are_blamed_only_if_the_plain_forward_fails() -> None:
    def fails(self: Attention, y: Tensor) -> Tensor:
        raise KeyError("of the model's own")

    with pytest.raises(errors.ExampleInputsError, match=r"KeyError: .of the model's own") as caught:
        sigswap.convert(Attention(fails), example_inputs=example())
    assert caught.value.__cause__ is not None
    assert traceback.extract_tb(caught.value.__cause__.__traceback__)[-1].name == "fails"

    def is_watched(self: Attention, y: Tensor) -> Tensor:
        assert torch.overrides._len_torch_function_stack() == 0, "not under a mode"
        return y

    with pytest.raises(errors.ConversionError, match=r"but not while it is watched.*not under a mode") as other:
        sigswap.convert(Attention(is_watched), example_inputs=example())
    assert not isinstance(other.value, errors.ExampleInputsError)


def test_a_way_that_failed_is_not_tried_again() -> None:
    recording = Recording(Attention(READS["numpy"]))
    first = recording.run(Example(((example(),), {})))
    assert first.way == "copy" and recording.ways == ["copy", "itself"]
    assert recording.run(Example(((example(),), {}))).way == "copy"


# What it costs.


@pytest.mark.parametrize(("name", "most"), [("nothing", 0), ("numpy", 2)])
def test_forwards_of_the_models_own_tensors(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None where fake tensors do; else one to look and one to check. The process is noted once."""
    runs = tmp_path / "runs"  # a list would be put back to what it was
    runs.touch()

    def counted(self: Attention, y: Tensor) -> Tensor:
        if not isinstance(y, FakeTensor):
            with runs.open("a") as file:
                file.write("forward\n")
        return READS.get(name, lambda self, y: y)(self, y)

    made: list[object] = []
    note = Untouched._note
    monkeypatch.setattr(Untouched, "_note", lambda self, *arguments: (made.append(self), note(self, *arguments))[1])
    sigswap.convert(Attention(counted), example_inputs=example())
    assert len(runs.read_text().splitlines()) == most and len(made) == 1


def test_the_model_is_changed_when_nothing_can_refuse_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention()
    seen: list[bool] = []
    monkeypatch.setattr(
        Recording,
        "check",
        lambda self, example, form, check=Recording.check: (
            seen.append(sigswap.is_converted(model)),
            check(self, example, form),
        )[1],
    )
    sigswap.convert(model, example_inputs=example())
    assert seen == [False] and sigswap.is_converted(model)


# What was accepted runs.


def test_what_would_fail_on_its_own_inputs_is_refused() -> None:
    class Sliced(Attention):
        """By slices of batch x heads."""

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.flatten(0, 1) for t in self.heads(x))
            out = torch.empty_like(q)
            for i in range(q.shape[0]):
                out[i : i + 1] = self.probabilities(q[i : i + 1] @ k[i : i + 1].mT) @ v[i : i + 1]
            return out

    class Cached(Attention):
        """One product more when it runs first."""

        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.einsum("i,j->ij", torch.arange(6.0), torch.ones(8)).cos()
            q, k, v = self.heads(x)
            return (self.probabilities((q * self.table) @ (k * self.table).mT) @ v).transpose(1, 2).flatten(2)

    model = Sliced()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(errors.ConversionError, match="its example inputs would fail then"):
        sigswap.convert(model, example_inputs=example())
    assert not sigswap.is_converted(model)
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds
    cached = sigswap.convert(Cached(), sigswap.SigmoidConfig(query_bias=True), example_inputs=example())
    assert "table" not in vars(cached)
    assert_converts(Cached())


# Models of transformers that only run on real tensors, or as they are.

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_mixture_of_experts(dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config).eval().to(dtype)
    ids = torch.randint(0, 97, (1, 8))
    before = model(ids).logits
    sigswap.convert(model)
    assert sigswap.report(model).count("swapped") == 2
    with sigswap.softmax(model):
        assert torch.equal(model(ids).logits, before)


def test_hidden_states_that_were_asked_for_before() -> None:
    """transformers installs hooks for them, which the copy keeps."""
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = transformers.BertModel(transformers.BertConfig(**SMALL))

        def forward(self, ids: Tensor) -> Tensor:
            return torch.stack(self.encoder(ids, output_hidden_states=True).hidden_states).mean(0)

    model, ids = Model().eval(), torch.randint(0, 97, (2, 6))
    model(ids)
    assert Recording(model).run(Example(((ids,), {}))).way == "fake"
    sigswap.convert(model, example_inputs=ids)
    assert sigswap.report(model).count("swapped") == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_mixture_of_experts_is_run_on_fake_tensors(dtype: torch.dtype) -> None:
    """In its own dtype: neither copies of its weights nor a run on them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().to(dtype)
    sigswap.convert(model, example_inputs={"input_ids": torch.arange(8)[None]})
    assert not any("fake tensors" in note for note in sigswap.report(model).notes)
