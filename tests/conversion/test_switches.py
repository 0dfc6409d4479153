"""The switch back to softmax is of a thread's or a task's own, in eager and in compiled code."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sigswap
from sigswap.conversion import mode

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Case:
    """A converted model, and its two outputs for X, which the unconverted one and a copy of it give."""

    def __init__(self, layers: int = 3) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*[Attention() for _ in range(layers)]).eval()
        self.softmax = model(X).detach()
        self.model = sigswap.convert(model, example_inputs=X)
        self.sigmoid = copy.deepcopy(self.model)(X).detach()
        assert not torch.allclose(self.softmax, self.sigmoid)

    def gives(self, run: Callable[[Tensor], Tensor] | None = None) -> str:
        with torch.no_grad():
            y = (run or self.model)(X)
        named = {"softmax": self.softmax, "sigmoid": self.sigmoid}
        return next((name for name, expected in named.items() if torch.allclose(y, expected, atol=1e-6)), "a mixture")


@pytest.fixture
def case() -> Case:
    return Case()


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_switch_is_of_one_thread(case: Case) -> None:
    with sigswap.softmax(case.model):
        assert case.gives() == "softmax"
        assert in_thread(case.gives) == "sigmoid"
    assert case.gives() == "sigmoid"


def test_uses_may_be_nested_and_overlap(case: Case) -> None:
    other = Case()
    first, second, third = (contextlib.ExitStack() for _ in range(3))
    first.enter_context(sigswap.softmax(case.model))
    second.enter_context(sigswap.softmax(other.model))
    third.enter_context(sigswap.softmax(case.model))
    first.close()
    assert case.gives() == other.gives() == "softmax"
    third.close()
    assert (case.gives(), other.gives()) == ("sigmoid", "softmax")
    second.close()
    assert other.gives() == "sigmoid"


def test_a_part_is_switched_alone(case: Case) -> None:
    layers = list(case.model)
    with torch.no_grad():
        with sigswap.softmax(layers[0]):
            y = case.model(X)
            assert torch.equal(layers[2](X), copy.deepcopy(layers[2])(X))
        z = layers[0](X)
        with sigswap.softmax(case.model):
            z = layers[0](X)
        assert torch.equal(y, layers[2](layers[1](z)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_switch_of_its_own(case: Case, copied: Callable[[nn.Module], nn.Module]) -> None:
    with sigswap.softmax(case.model):
        other = copied(case.model)
        assert case.gives(other) == "sigmoid"
    with sigswap.softmax(other):
        assert (case.gives(), case.gives(other)) == ("sigmoid", "softmax")


def test_tasks_do_not_see_one_another(case: Case) -> None:
    async def switched() -> list[str]:
        found = []
        for _ in range(5):
            with sigswap.softmax(case.model):
                await asyncio.sleep(0)
                found.append(case.gives())
                await asyncio.sleep(0)
        return found

    async def plain() -> list[str]:
        found = []
        for _ in range(10):
            found.append(case.gives())
            await asyncio.sleep(0)
        return found

    async def both() -> tuple[list[str], list[str], list[str]]:
        return await asyncio.gather(switched(), plain(), switched())

    first, second, third = asyncio.run(both())
    assert set(first) == set(third) == {"softmax"} and set(second) == {"sigmoid"}


def passes_in_threads(case: Case, number: int) -> set[str]:
    """What ``number`` passes in eight threads give, while a ninth switches on and off, and runs as well."""
    done = threading.Event()
    found: set[str] = set()

    def switching() -> None:
        while not done.is_set():
            with sigswap.softmax(case.model):
                found.add(f"inside: {case.gives()}")

    thread = threading.Thread(target=switching)
    thread.start()
    with ThreadPoolExecutor(8) as pool:
        found.update(pool.map(lambda _: case.gives(), range(number)))
    done.set()
    thread.join()
    return found


def test_passes_in_other_threads_are_never_a_mixture(case: Case) -> None:
    assert passes_in_threads(case, 1000) == {"sigmoid", "inside: softmax"}


@pytest.mark.parametrize("guarded", [True, False])
def test_compiled_code_follows_the_context(case: Case, guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if guarded and not mode.CONTEXTS_ARE_GUARDED:
        pytest.skip("needs torch 2.14, whose Dynamo guards on context variables")
    monkeypatch.setattr(mode, "CONTEXTS_ARE_GUARDED", guarded)
    counter = CompileCounter()
    compiled = torch.compile(case.model, backend=counter, fullgraph=True)
    for _ in range(2):
        assert case.gives(compiled) == "sigmoid"
        with sigswap.softmax(case.model):
            assert case.gives(compiled) == "softmax"
            other = in_thread(lambda: case.gives(compiled))
            assert other == ("sigmoid" if guarded else "softmax")
    assert counter.frame_count == 2  # compiled once more for softmax, and never again


def test_layers_that_are_compiled_each_for_itself_share_code() -> None:
    case = Case(layers=10)
    counter = CompileCounter()
    for layer in case.model:
        layer.compile(backend=counter)
    for _ in range(2):
        assert case.gives() == "sigmoid"
        with sigswap.softmax(case.model):
            assert case.gives() == "softmax"
    assert counter.frame_count == 2


def test_export_takes_what_the_context_has(case: Case) -> None:
    for strict in (True, False):
        with sigswap.softmax(case.model):
            program = torch.export.export(case.model, (X,), strict=strict)
        assert case.gives(program.module()) == "softmax"


def test_two_models_are_converted_in_two_threads() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(*[Attention() for _ in range(2)]).eval() for _ in range(8)]
    copies = [sigswap.convert(copy.deepcopy(model), example_inputs=X) for model in models]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: sigswap.convert(model, example_inputs=X), models))
    assert all(torch.equal(a(X), b(X)) for a, b in zip(models, copies, strict=True))


def _in_process(model: nn.Module, connection: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        own = model(X)
        with sigswap.softmax(model):
            connection.send((own.numpy(), model(X).numpy()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_converted_model_works_in_other_processes(case: Case, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    with sigswap.softmax(case.model):
        process = context.Process(target=_in_process, args=(case.model, theirs))
        process.start()
    assert ours.poll(120)
    own, switched = (torch.as_tensor(y) for y in ours.recv())
    process.join(60)
    # A fork has the context of the thread that made it; what is sent elsewhere has not.
    assert torch.allclose(own, case.softmax if method == "fork" else case.sigmoid, atol=1e-6)
    assert torch.allclose(switched, case.softmax, atol=1e-6)
