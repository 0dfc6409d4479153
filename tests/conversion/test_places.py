"""A call is addressed by the code that makes it: whatever else is called, before, between, within or later."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sigswap
from sigswap import SigmoidConfig, errors
from sigswap.conversion.install import apply_conversion
from sigswap.conversion.record import Conversion, conversion_of
from sigswap.conversion.state import OwnerState

HEADS, DIM = 2, 8
QUERY_BIAS = SigmoidConfig(query_bias=True)


def example(length: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(2, length, HEADS * DIM, generator=torch.Generator().manual_seed(seed))


def biases(state: OwnerState, site: int = 0) -> tuple[Tensor, Tensor]:
    """c_h and w_h of a site, in float64."""
    found = state.site(site)
    assert found.bias is not None and found.query_weight is not None
    return found.bias.detach().double(), found.query_weight.detach().double()


def sigmoid(scores: Tensor, q: Tensor, bias: tuple[Tensor, Tensor]) -> Tensor:
    """The definition (docs/design.md) for unmasked ``scores`` [B, H, M, N] of ``q`` [B, H, M, D]."""
    c, w = bias
    row = c.view(-1, 1, 1) + (q * w[:, None]).sum(-1, keepdim=True)
    return torch.sigmoid(scores + row - math.log(scores.shape[-1]))


class Owner(nn.Module):
    """[B, N, 16], two heads. ``p``: the probabilities, of scores, the query that made them, and the number of the site.

    It is softmax in the model, and what the definition says in the oracle.
    """

    sites = 1
    products = True  # whether query_bias can act

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(3))
        self.p: Callable[[Tensor, Tensor, int], Tensor] = lambda scores, q, site: scores.softmax(-1)
        self.eval()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (layer(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return q, k, v

    def merged(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(self.p(q @ k.mT, q, 0) @ v)


class MadeInForward(Owner):
    """As BLIP's text model: a torch.nn.Softmax that is no child, made for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.p = lambda scores, q, site: nn.Softmax(dim=-1)(scores)


class CachedTable(Owner):
    """As ESM-2: a product that is made when a length is met first."""

    length = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.length != x.shape[1]:
            self.length = x.shape[1]
            steps = torch.arange(self.length, dtype=x.dtype)
            self.table = torch.einsum("i,j->ij", steps, torch.ones(DIM, dtype=x.dtype)).cos()
        q, k, v = self.heads(x)
        q = q * self.table
        return self.merged(self.p(q @ (k * self.table).mT, q, 0) @ v)


class OnOneLine(Owner):
    """Three products on a line, of which one makes the scores."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged((q @ torch.eye(DIM, dtype=x.dtype)) * 0 + self.p(q @ k.mT, q, 0) @ v)


class InALoop(Owner):
    """A part of the rows after the other: as many turns as the length asks for."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        parts = []
        for rows in q.split(2, dim=2):
            parts.append(self.p(rows @ k.mT, rows, 0) @ v)
        return self.merged(torch.cat(parts, dim=2))


class InAComprehension(Owner):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(torch.cat([self.p(rows @ k.mT, rows, 0) @ v for rows in q.split(4, dim=2)], dim=2))


def shared(owner: Owner, q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
    """Called from several owners, and from several places of one."""
    return owner.p(torch.matmul(q, k.mT), q, site) @ v


class BothWays(Owner):
    """As LightGlue: one function for two attentions, of which the second may be left out."""

    sites = 2
    both = True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        first = shared(self, q, k, v, 0)
        if self.both:
            first = first + shared(self, k, q, v, 1)
        return self.merged(first)


class BothOnOneLine(Owner):
    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(shared(self, q, k, v, 0) + shared(self, k, q, v, 1))


class Recursive(Owner):
    """Each depth is an attention of its own."""

    sites = 2

    def deeper(self, q: Tensor, k: Tensor, v: Tensor, depth: int) -> Tensor:
        out = self.p(q @ k.mT, q, depth) @ v
        return out if depth == 1 else self.deeper(k, q, out, depth + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(self.deeper(*self.heads(x), 0))


class Routed(Owner):
    """A router's softmax before the attention, and one after it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.softmax(self.k(x), -1).amax(-1, keepdim=True)
        q, k, v = self.heads(x)
        return self.merged(self.p(q @ k.mT, q, 0) @ v) * torch.softmax(self.q(x), -1).amax(-1, keepdim=True)


class Scores(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bhid,bhjd->bhij", q, k)


class InAChild(Owner):
    """The product in a child that runs twice, once for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = Scores()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        gate = self.scores(v, v).mean(-1, keepdim=True)
        return self.merged(gate * (self.p(self.scores(q, k), q, 0) @ v))


class Alternating(Owner):
    """Products of one expression in turns: the scores, then the output."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = q
        for index, other in enumerate((k.mT, v)):
            out = torch.matmul(out, other)
            if index == 0:
                out = self.p(out, q, 0)
        return self.merged(out)


OWNERS = [
    Owner,
    MadeInForward,
    CachedTable,
    OnOneLine,
    InALoop,
    InAComprehension,
    BothWays,
    BothOnOneLine,
    Recursive,
    Routed,
    InAChild,
    Alternating,
]
each_owner = pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)


def converted(owner: type[Owner], config: SigmoidConfig = QUERY_BIAS, x: Tensor | None = None) -> Any:
    """A converted owner, whose biases are away from 0."""
    model = sigswap.convert(owner(), config, example_inputs=example() if x is None else x)
    assert isinstance(model.sigswap, OwnerState) and len(model.sigswap.sites()) == owner.sites
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.sigswap.parameters():
            parameter.normal_()
    return model


def oracle(model: Any, x: Tensor) -> Tensor:
    """What a converted owner must give, by the definition and in float64."""
    by_site = [biases(model.sigswap, site) for site in range(model.sites)]
    want = type(model).__mro__[1]().double()  # the class as it was
    want.load_state_dict({name: values for name, values in model.state_dict().items() if "sigswap" not in name})
    vars(want).update({"both": model.both} if hasattr(model, "both") else {})
    want.p = lambda scores, q, site: sigmoid(scores, q, by_site[site])
    with torch.no_grad():
        result: Tensor = want(x.double())
    return result


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.slow
@each_owner
def test_each_call_is_told_from_the_others(owner: type[Owner]) -> None:
    model = converted(owner)
    with torch.no_grad():
        for length in (6, 6, 9, 2, 1):  # a cache is filled, used, and filled anew
            close(model(example(length)), oracle(model, example(length)))


@pytest.mark.slow
@each_owner
@pytest.mark.parametrize("way", ["compiled", "dynamic", "export", "non-strict export"])
def test_compiled(owner: type[Owner], way: str) -> None:
    model = converted(owner)
    x = example()
    with torch.no_grad():
        expected = oracle(model, x)
        if "export" in way:
            program = torch.export.export(model, (x,), strict=way == "export")
            close(program.module()(x), expected)
            return
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=way == "dynamic")
        close(compiled(x), expected)
        close(compiled(example(9)), oracle(model, example(9)))


class Broken(Owner):
    """Graph breaks between the product and the softmax, and after it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT
        torch._dynamo.graph_break()
        p = self.p(scores, q, 0)
        torch._dynamo.graph_break()
        return self.merged(p @ v)


def broken(owner: Owner, q: Tensor, k: Tensor, v: Tensor, site: int) -> Tensor:
    scores = torch.matmul(q, k.mT)
    torch._dynamo.graph_break()
    return owner.p(scores, q, site) @ v


class BrokenBothWays(Owner):
    """Dynamo compiles ``broken`` for itself, once for both attentions."""

    sites = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        first = broken(self, q, k, v, 0)
        return self.merged(first + broken(self, k, q, v, 1))


class BrokenLoop(Owner):
    """Dynamo leaves such a loop to Python, and compiles what it calls: the mode, if it were let."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        parts = []
        for rows in q.split(2, dim=2):
            torch._dynamo.graph_break()
            parts.append(self.p(rows @ k.mT, rows, 0) @ v)
        return self.merged(torch.cat(parts, dim=2))


def test_below_graph_breaks() -> None:
    """One after the other, as each leaves compiled code that the next one must not take for its own."""
    for owner in (Broken, BrokenBothWays, BrokenLoop):
        model = converted(owner)
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            for length in (6, 6, 9):
                close(compiled(example(length)), oracle(model, example(length)))


@pytest.mark.slow
@each_owner
def test_what_is_saved_finds_the_calls_again(owner: type[Owner]) -> None:
    """As JSON, as a pickle and as a deepcopy."""
    model, x = converted(owner), example()
    stored = json.loads(json.dumps(conversion_of(model).to_dict()))
    assert Conversion.from_dict(stored) == conversion_of(model)
    loaded = apply_conversion(owner(), Conversion.from_dict(stored))
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for other in (loaded, copy.deepcopy(model)):
            close(other(x), oracle(model, x))


def test_a_part_of_the_calls_is_enough() -> None:
    """Two attentions of one function: the first is told apart also where the second does not run."""
    model, x = converted(BothWays), example()
    model.both = False
    with torch.no_grad():
        close(model(x), oracle(model, x))


def test_one_function_of_two_owners_and_an_owner_that_runs_twice() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = BothWays(), BothWays()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(self.other(self.one(x)))
            return out

    model, x = sigswap.convert(Two(), QUERY_BIAS, example_inputs=example()), example()
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "sigswap" in name):
            parameter.normal_()
        want = copy.deepcopy(model)
        inner = oracle(want.one, x)
        expected = oracle(want.one, oracle(want.other, inner).float())
        close(model(x), expected)
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)


def test_an_owner_within_an_owner() -> None:
    """The products of the inner one are not the outer one's."""

    class Outer(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Owner()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(self.inner(x))
            return self.merged(self.p(q @ k.mT, q, 0) @ v) + self.inner(x)

    model, x = converted(Outer), example()
    with torch.no_grad():
        for parameter in model.inner.sigswap.parameters():
            parameter.normal_()
        inner = biases(model.inner.sigswap)
        want = sigswap.revert(copy.deepcopy(model)).double()
        outer = biases(model.sigswap)
        want.p = lambda scores, q, site: sigmoid(scores, q, outer)
        want.inner.p = lambda scores, q, site: sigmoid(scores, q, inner)
        close(model(x), want(x.double()))
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want(x.double()))
    sigswap.calibrate(model, [x], progress=False)


# What is put on later.


class LowRank(nn.Module):
    """An adapter that multiplies matrices, and weighs them by a softmax of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.base, self.gate = base, nn.Linear(HEADS * DIM, 2)
        self.a, self.b = nn.Parameter(torch.randn(2, HEADS * DIM, 4)), nn.Parameter(torch.randn(2, 4, HEADS * DIM))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.gate(x), -1)
        low = torch.stack([x @ a @ b for a, b in zip(self.a, self.b, strict=True)], -1)
        out: Tensor = self.base(x) + (low * weights.unsqueeze(-2)).sum(-1)
        return out


def wrap(model: Owner) -> None:
    model.q, model.k = LowRank(model.q), LowRank(model.k)  # type: ignore[assignment]


def parametrized(model: Owner) -> None:
    class Added(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + weight @ weight.mT @ weight * weight.softmax(-1)

    parametrize.register_parametrization(model.q, "weight", Added())
    parametrizations.orthogonal(model.k)


def hooked(model: Owner) -> None:
    def multiply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output @ module.weight.softmax(-1)  # type: ignore[union-attr, operator]

    model.q.register_forward_hook(multiply)
    model.v.register_forward_pre_hook(lambda module, args: (args[0] @ module.weight,))


def forward_replaced(model: Owner) -> None:
    for layer in (model.q, model.k):
        layer.forward = lambda x, layer=layer: F.linear(x, layer.weight) @ layer.weight.softmax(-1)  # type: ignore


def methods_wrapped(model: Owner) -> None:
    """By a function that hands all on, around a method of the owner itself."""
    merged = model.merged

    def logged(*args: Any, **kwargs: Any) -> Tensor:
        return merged(*args, **kwargs) @ torch.ones(HEADS * DIM, dtype=args[0].dtype)[:, None]

    model.merged = logged  # type: ignore[method-assign]


def same_kind(model: Owner) -> None:
    """A whole attention of the owner's own class, which is not converted."""
    model.q = Owner()  # type: ignore[assignment]


ADAPTERS = [wrap, parametrized, hooked, forward_replaced, methods_wrapped, same_kind]
each_adapter = pytest.mark.parametrize("adapt", ADAPTERS, ids=lambda adapt: adapt.__name__)


@pytest.mark.slow
@each_owner
@each_adapter
def test_adapters(owner: type[Owner], adapt: Callable[[Owner], None]) -> None:
    """Before the conversion and after it, and by a plan that was made without: the same, and what they call stays."""
    x = example()
    later = converted(owner)
    adapt(later)
    # The oracle has the adapter on a model that was never converted.
    by_site = [biases(later.sigswap, site) for site in range(owner.sites)]
    want = owner().double()
    want.p = lambda scores, q, site: sigmoid(scores, q, by_site[site])
    adapt(want)
    want.double()
    with torch.no_grad():
        expected = want(x.double())
        close(later(x), expected)
        close(later(x), expected)
        planned = apply_conversion(owner(), conversion_of(converted(owner)))
        planned.sigswap.load_state_dict(later.sigswap.state_dict())
        adapt(planned)
        close(planned(x), expected)
        before = owner()
        adapt(before)
        if adapt in (same_kind, methods_wrapped):
            return  # found as an attention of its own; a replaced method is not what a copy calls
        sigswap.convert(before, QUERY_BIAS, example_inputs=x)
        before.sigswap.load_state_dict(later.sigswap.state_dict())  # type: ignore[union-attr]
        close(before(x), expected)


@pytest.mark.slow
@each_adapter
def test_adapters_compiled(adapt: Callable[[Owner], None]) -> None:
    model, x = converted(Owner), example()
    adapt(model)
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x).double())


def test_an_adapter_that_is_taken_off_again() -> None:
    model, x = converted(Owner), example()
    with torch.no_grad():
        want, layer = oracle(model, x), model.q
        wrap(model)
        assert (model(x) - want).abs().max() > 0.01
        model.q, model.k = layer, model.k.base
        close(model(x), want)


def test_the_gradients_of_an_adapter() -> None:
    model, x = converted(Owner), example()
    wrap(model)
    want = Owner().double()
    bias = biases(model.sigswap)
    want.p = lambda scores, q, site: sigmoid(scores, q, bias)
    wrap(want)
    want.double()
    model(x).square().sum().backward()
    want(x.double()).square().sum().backward()
    for name, parameter in want.named_parameters():
        ours = model.get_parameter(name).grad
        assert parameter.grad is not None and (ours - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max()


def test_calibration_beside_adapters() -> None:
    """What is fitted is the attention, whether its children multiply matrices or not."""
    plain, x = converted(CachedTable), [example(seed=seed) for seed in range(4)]
    wrapped = copy.deepcopy(plain)
    wrap(wrapped)
    for layer in (wrapped.q, wrapped.k):
        nn.init.zeros_(layer.b)
    for model in (plain, wrapped):
        sigswap.calibrate(model, x, progress=False)
    for name, parameter in plain.sigswap.named_parameters():
        torch.testing.assert_close(wrapped.sigswap.get_parameter(name), parameter)


# What must be an error.


def test_an_attention_in_a_child_that_takes_another_path() -> None:
    """The child's softmax is not the planned one; that there is one, and the planned ones are not all there, is."""

    class Normalise(nn.Module):
        other = False

        def forward(self, scores: Tensor) -> Tensor:
            if self.other:
                return F.softmax(scores, dim=-1)
            return scores.softmax(-1)

    class Outer(Owner):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Normalise(), Normalise()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            return self.merged(self.first(q @ k.mT) @ v + self.second(k @ q.mT) @ v)

    model, x = Outer(), example()
    sigswap.convert(model, example_inputs=x)
    model(x)
    model.second.other = True
    with pytest.raises(errors.UnknownCallError, match="without some"):
        model(x)
    model.first.other = True
    with pytest.raises(errors.UnknownCallError, match="without any"):
        model(x)


def test_the_owners_own_softmax_at_another_place() -> None:
    """Where it can be the one attention it is taken for that; where it cannot, or there are two, that is an error."""

    class Branches(Owner):
        path = "seen"

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            if self.path == "pooled":
                return (torch.softmax(v, 2) * v).sum(2, keepdim=True)
            if self.path == "unseen":
                return self.merged(F.softmax(torch.matmul(q, k.mT), dim=-1) @ v)
            out = self.merged(torch.softmax(q @ k.mT, dim=-1) @ v)
            return out if self.path == "seen" else out + self.merged(torch.softmax(k @ q.mT, dim=-1) @ v)

    x = example()
    model = sigswap.convert(Branches(), SigmoidConfig(learn_bias=False), example_inputs=x)
    want = model(x)
    model.path = "unseen"
    close(model(x), want)
    for path in ("pooled", "both"):
        model.path = path
        with pytest.raises(errors.UnknownCallError, match=r"another path.*example_inputs"):
            model(x)
    model = sigswap.convert(Branches(), QUERY_BIAS, example_inputs=x)
    model.path = "unseen"
    with pytest.raises(errors.UnknownCallError, match="product of query and key was not seen"):
        model(x)


def test_one_expression_that_is_two_things() -> None:
    """Refused: in one forward an attention, in the next a softmax over channels."""

    class Either(Owner):
        def forward(self, x: Tensor, pool: bool = False) -> Tensor:
            q, k, v = self.heads(x)
            weights = torch.softmax(v if pool else q @ k.mT, -1)
            return weights if pool else self.merged(weights @ v)

    x = example()
    with pytest.raises(errors.UnswappableSiteError, match="one expression"):
        sigswap.convert(Either(), example_inputs=[{"x": x}, {"x": x, "pool": True}])


def test_turns_that_cannot_be_told_apart() -> None:
    class Turns(Owner):
        turns = 2

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            factors = [(q, k.mT), (v, v.mT)] * self.turns
            products = [a @ b for a, b in factors]
            return self.merged(products[0].softmax(-1) @ v) + products[1].mean()

    model, x = sigswap.convert(Turns(), QUERY_BIAS, example_inputs=example()), example()
    model(x)
    model.turns = 1
    with pytest.raises(errors.UnknownCallError, match="2 product calls"):
        model(x)
    model.turns = 3
    with pytest.raises(errors.UnknownCallError, match="product call number 5"):
        model(x)


# Names.


def test_places_are_text_without_files_or_lines(tmp_path: Path) -> None:
    """What is saved finds its calls where the file has grown, and lies elsewhere."""
    source = (
        "import torch\n"
        "from torch import nn\n"
        "def scores(q, k):\n"
        "    return torch.matmul(q,\n"
        "        k.mT)\n"
        "class Attend(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.q = nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        ä = 'é'; return scores(self.q(x), x).softmax(-1) @ x\n"
    )
    grown = source.replace("def scores", "# one line more\n\ndef other():\n    pass\ndef scores").replace(
        "k.mT)", " k.mT)"
    )
    modules = []
    for name, text in (("one", source), ("two", grown)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / f"{name}.py"
        path.write_text(text)
        namespace: dict[str, Any] = {"__name__": name}
        exec(compile(text, str(path), "exec"), namespace)
        modules.append(namespace["Attend"])
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    model = sigswap.convert(modules[0](), QUERY_BIAS, example_inputs=x)
    with torch.no_grad():
        model.sigswap.site(0).query_weight.normal_()
    stored = json.loads(json.dumps(conversion_of(model).to_dict()))
    places = stored["owners"][0]["places"]
    assert list(places["softmax"]) == ["Attend.forward: scores(self.q(x), x).softmax(-1)"]
    assert "Attend.forward: scores(self.q(x), x) > scores: torch.matmul(q, k.mT)" in places["product"]
    assert str(tmp_path) not in json.dumps(stored)
    loaded = apply_conversion(modules[1](), Conversion.from_dict(stored))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))


def test_code_without_source() -> None:
    """Then a place is a line and a column."""
    namespace: dict[str, Any] = {"__name__": "nowhere"}
    exec(
        compile(
            "import torch\n"
            "class Attend(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.q = torch.nn.Linear(8, 8)\n"
            "    def forward(self, x):\n"
            "        return (self.q(x) @ x.mT).softmax(-1) @ x\n",
            "<no file>",
            "exec",
        ),
        namespace,
    )
    torch.manual_seed(0)
    model, x = namespace["Attend"](), torch.randn(2, 5, 8)
    q = model.q(x).detach().double()
    sigswap.convert(model, QUERY_BIAS, example_inputs=x)
    with torch.no_grad():
        model.sigswap.site(0).query_weight.normal_()
        row = (q * model.sigswap.site(0).query_weight[0].double()).sum(-1, keepdim=True)
        want = torch.sigmoid(q @ x.double().mT + row - math.log(5)) @ x.double()
        close(model(x), want)
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)


def test_a_plan_by_positions_still_counts() -> None:
    """What version 0.1 saved has no places. It runs as it did: also with what then came before the attention."""
    model, x = converted(Routed), example()
    stored = json.loads(json.dumps(conversion_of(model).to_dict()))
    (owner,) = stored["owners"]
    del owner["places"]
    del owner["sites"][0]["scores"]
    owner["calls"] = {"softmax:0": -1, "product:0": 0, "softmax:1": 0, "softmax:2": -1}
    owner["totals"] = {"softmax": [3], "sdpa": [0], "mha": [0]}
    loaded = apply_conversion(Routed(), Conversion.from_dict(stored))
    assert conversion_of(loaded).to_dict()["owners"][0].keys() == owner.keys()
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        close(loaded(x), oracle(model, x))
        close(torch.compile(loaded, backend="aot_eager", fullgraph=True)(x), oracle(model, x))
    with pytest.raises(errors.UnknownCallError, match="0 softmax calls"):
        loaded.sigswap.check_totals({})
    assert conversion_of(loaded) == pickle.loads(pickle.dumps(conversion_of(loaded)))
