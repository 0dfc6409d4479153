"""Every model of the zoo, converted, computes what the independent oracle computes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Graphs
from oracle import count_attention_softmax, sigmoid_oracle
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo import BY_NAME, CASES, ZOO, Entry, Inputs, call, case_id, randomise

import sigswap

Case = tuple[Entry, str]
TOLERANCE = 1e-5  # of a tensor's largest value
TOLERANCE_64 = 1e-10

# One attention implementation of each model is compiled after conversion, the other one by the backend.
FIRST = [case for case in CASES if case[1] == case[0].variants[0] or case[0].name == "mha"]
LAST = [case for case in CASES if case[1] == case[0].variants[-1] or case[0].name == "mha"]
all_cases = pytest.mark.parametrize("case", CASES, ids=case_id)


# --------------------------------------------------------------------------------------------- the oracle


@pytest.mark.slow
@all_cases
def test_oracle_is_not_softmax(case: Case) -> None:
    """The zoo can tell sigmoid from softmax, and the oracle swaps all of the attention and nothing else."""
    entry, variant = case
    model, inputs = entry.build(variant), entry.make_inputs(variant)
    with torch.no_grad():
        plain = outputs_of(call(model, inputs))
        assert count_attention_softmax(lambda: call(model, inputs)) == entry.softmax_calls + entry.others
        with sigmoid_oracle(entry.owners, entry.is_attention) as log:
            swapped = outputs_of(call(model, inputs))
        assert log.swapped == entry.softmax_calls
        assert log.left == entry.others
    for before, after in zip(plain, swapped, strict=True):
        assert (before - after).abs().max() > 0.05 * after.abs().max()


# ------------------------------------------------------------------------------------------------- eager


@pytest.mark.slow
@all_cases
def test_eager(case: Case) -> None:
    entry, variant = case
    model = convert(case)
    assert_equals_oracle(model, model, case)
    inputs = entry.make_inputs(variant)

    def forward() -> Any:
        return call(model, inputs)

    assert count_attention_softmax(forward) == entry.others
    for guard in (torch.no_grad(), torch.inference_mode()):  # where torch.nn's fast paths run
        with guard:
            assert count_attention_softmax(forward) == entry.others


@pytest.mark.slow
@all_cases
def test_no_grad(case: Case) -> None:
    """Without gradients torch.nn takes its fast paths, which may hold anything in padded rows."""
    entry, variant = case
    model = convert(case)
    with torch.no_grad():
        got = outputs_of(call(model, entry.make_inputs(variant)))
    for ours, theirs in zip(got, reference(case)[0], strict=True):
        valid = slice(None)
        if entry.name == "torch_encoder":
            valid = ~entry.make_inputs(variant)["src_key_padding_mask"]
        assert_close(ours[valid], theirs[valid], "output")


@pytest.mark.slow
@all_cases
def test_train_mode(case: Case) -> None:
    entry, variant = case
    model = convert(case).train()
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        torch.manual_seed(2)
    inputs = entry.make_inputs(variant)
    assert count_attention_softmax(lambda: call(model, inputs)) == entry.others


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[0].float64], ids=case_id)
def test_float64(case: Case) -> None:
    """In float64 rounding hides nothing: the conversion is the definition, not near it."""
    model = convert(case).double()
    assert_equals_oracle(model, model, case, torch.float64)


@pytest.mark.slow
@all_cases
def test_learned_bias(case: Case) -> None:
    """c_h is added to the scores of its own head, wherever the model has the heads, and is trained."""
    model = convert(case)
    set_numbers(model)
    assert_equals_oracle(model, model, case, learned=True, least_scale=least_scale_of(case))
    for name, parameter in model.named_parameters():
        # The last layer of the first stream has no part in the two-stream model's output.
        unused = case[0].name == "xlnet_two_stream" and parameter.grad is None
        if "sigswap" in name.split(".") and not unused:
            assert (parameter.grad != 0).all(), name


@pytest.mark.slow
@all_cases
def test_first_token(case: Case) -> None:
    """The first visible key's score as it is, and the numbers beside it, per head and trained."""
    model = convert(case, first_token=True)
    with torch.no_grad():
        inputs = case[0].make_inputs(case[1])
        with sigmoid_oracle(case[0].owners, case[0].is_attention, first_token=True):
            expected = outputs_of(call(case[0].build(case[1]), inputs))
        # LeViT keeps its biases from a run without gradients: the next one needs a model of its own.
        got = outputs_of(call(convert(case, first_token=True), inputs))
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs, "output as converted")
    set_numbers(model)
    assert_equals_oracle(model, model, case, learned=True, first_token=True, least_scale=least_scale_of(case))
    gradients = {n: p.grad for n, p in model.named_parameters() if n.endswith((".length_share", ".offset"))}
    assert len(gradients) == 2 * case[0].sites
    for name, gradient in gradients.items():
        unused = case[0].name == "xlnet_two_stream" and gradient is None
        # Where a row sees one key its ln is 0, and so is the share's part.
        assert unused or (gradient != 0).all(), name


@pytest.mark.slow
@all_cases
def test_report(case: Case) -> None:
    entry, _ = case
    model = convert(case)
    sites = sigswap.report(model).sites
    swapped = [site for site in sites if site.status == "swapped"]
    assert len(swapped) == entry.sites, sites
    modules = dict(model.named_modules(remove_duplicate=False))
    for site in swapped:
        assert any(c.__name__ in entry.owners for c in type(modules[site.path]).__mro__), site
        assert site.heads in (2, 3, 4), site
    for site in sites:
        assert site.status == "swapped" or site.reason, site


@pytest.mark.slow
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_inspect_changes_nothing(entry: Entry) -> None:
    model, inputs = entry.build(), entry.make_inputs()
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = outputs_of(call(model, inputs))
        report = sigswap.inspect(model, example_inputs=inputs)
        after = outputs_of(call(model, inputs))
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    paths = [site.path for site in report.sites]
    converted = sigswap.report(convert((entry, entry.variants[0]))).sites
    assert paths == [site.path for site in converted]


def test_other_softmaxes_get_a_reason() -> None:
    for name in ("fairseq_moe", "two_sites"):
        entry = BY_NAME[name]
        left = [s for s in sigswap.report(convert((entry, ""))).sites if s.status != "swapped"]
        assert len(left) == entry.others, name
        assert all(site.reason for site in left)


# ----------------------------------------------------------------------------------------------- dropout


def test_dropout_module_draws_the_same() -> None:
    """Where the model's own dropout runs on the probabilities, its random numbers do not change."""
    entry = BY_NAME["softcap"]
    inputs = entry.make_inputs()
    original, model = entry.build().train(), convert((entry, "")).train()
    torch.manual_seed(5)
    with sigmoid_oracle(entry.owners):
        expected = call(original, inputs)
    torch.manual_seed(5)
    assert_close(call(model, inputs), expected, "output")


class _SDPA(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        p = 0.3 if self.training else 0.0
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p)


@pytest.mark.parametrize("kind", ["sdpa", "mha", "mha_weights"])
def test_dropout_keeps_the_mean(kind: str) -> None:
    """Dropout inside SDPA and nn.MultiheadAttention acts on p in train mode, and not in eval mode."""
    torch.manual_seed(0)
    if kind == "sdpa":
        model: nn.Module = _SDPA()
        x = torch.randn(1, 2, 6, 8)
        inputs: Inputs = (x,)
        batch: Inputs = (x.expand(4000, -1, -1, -1),)
    else:
        model = randomise(nn.MultiheadAttention(16, 2, dropout=0.3, batch_first=True))
        x = torch.randn(1, 6, 16)
        weights = {"need_weights": kind == "mha_weights"}
        inputs = {"query": x, "key": x, "value": x, **weights}
        many = x.expand(4000, -1, -1)
        batch = {"query": many, "key": many, "value": many, **weights}
    with torch.no_grad():
        with sigmoid_oracle(("_SDPA", "MultiheadAttention")):
            expected = outputs_of(call(model.eval(), inputs))[0]
        sigswap.convert(model, example_inputs=inputs)
        assert_close(outputs_of(call(model.eval(), inputs))[0], expected, "eval output")
        samples = outputs_of(call(model.train(), batch))[0]
    error = samples.std(0) / len(samples) ** 0.5
    assert (samples.std(0) > 0).all()
    assert ((samples.mean(0) - expected[0]).abs() < 5 * error).all()


# ---------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FIRST if not case[0].inductor], ids=case_id)
def test_compiled_aot_eager(case: Case) -> None:
    entry, _ = case
    model = convert(case)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=entry.fullgraph)
    assert_equals_oracle(compiled, model, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FIRST if case[0].inductor], ids=case_id)
def test_compiled_inductor(case: Case) -> None:
    entry, _ = case
    model = convert(case)
    compiled = torch.compile(model, backend="inductor", fullgraph=entry.fullgraph)
    assert_equals_oracle(compiled, model, case)


# Where Dynamo breaks the graph inside torch.nn's own code (torch_decoder looks at the values of its mask) it runs the
# whole frame in eager, and no backend is ever called: docs/limits.md. torch_transformer says that it is causal.
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in LAST if case[0].name != "torch_decoder"], ids=case_id)
def test_backend_swaps_and_lowers_an_unconverted_model(case: Case) -> None:
    entry, variant = case
    model, graphs = entry.build(variant), Graphs()
    # In two_sites the gradient of pool.bias is what is left of a sum of much larger numbers: off by 6e-8.
    least_scale = 1e-2 if entry.name == "two_sites" else 1e-3
    assert_equals_oracle(graphs.compile(model, fullgraph=entry.fullgraph), model, case, least_scale=least_scale)
    assert not any("sigswap" in name for name in model.state_dict())
    if not entry.name.startswith(("torch_", "mha", "enc")):  # in these the op runs inside of torch.nn's function
        # XLNet's last layer computes a stream that nobody reads.
        unread = 1 if entry.name == "xlnet_two_stream" else 0
        assert len(graphs.calls) == (entry.calls or entry.sites) - unread
        assert not [node for node in graphs.nodes if "sigmoid_probs" in str(node.target)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in LAST if case[0].name != "torch_decoder"], ids=case_id)
def test_first_token_is_lowered(case: Case) -> None:
    entry, _ = case
    model, graphs = convert(case, first_token=True), Graphs()
    set_numbers(model)
    compiled = graphs.compile(model, fullgraph=entry.fullgraph)
    assert_equals_oracle(compiled, model, case, learned=True, first_token=True, least_scale=1e-2)
    # XLNet's last layer computes a stream that nobody reads, with a dropout, so that it is not removed.
    unread = 1 if entry.name == "xlnet_two_stream" else 0
    assert len(graphs.calls) == (entry.calls or entry.sites) - unread
    assert len([node for node in graphs.nodes if "sigmoid_probs" in str(node.target)]) == unread


# ----------------------------------------------------------------------------------------------- helpers


def convert(case: Case, first_token: bool = False) -> nn.Module:
    """A converted model of its own; each case is converted once per process, for the time that it takes."""
    return copy.deepcopy(_converted(case, first_token))


@functools.cache
def _converted(case: Case, first_token: bool = False) -> nn.Module:
    entry, variant = case
    model = entry.build(variant)
    config = sigswap.SigmoidConfig(first_token=first_token)
    assert sigswap.convert(model, config, example_inputs=entry.make_inputs(variant)) is model
    return model


def least_scale_of(case: Case) -> float:
    """Of a gradient, for :func:`assert_equals_oracle`; as in the test of the backend for the bias that is nearly 0."""
    return 1e-2 if case[0].name == "two_sites" else 1e-3


def set_numbers(model: nn.Module) -> None:
    """Another number for every head in all that a conversion has added."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sigswap" in name.split("."):
                parameter.copy_(head_bias(parameter.numel()).view(parameter.shape))


def outputs_of(out: Any) -> list[Tensor]:
    """The float tensors of an output."""
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def forward_backward(
    model: Callable[..., Any], module: nn.Module, inputs: Inputs
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs, and the gradients of the base parameters and of the float inputs, by name."""
    module.zero_grad()
    inputs, leaves = _with_gradients(inputs)
    outputs = outputs_of(call(model, inputs))
    generator = torch.Generator().manual_seed(3)
    loss = torch.zeros(())
    for out in outputs:
        # Every output counts, and none drowns the others.
        weight = torch.randn(out.shape, generator=generator).to(out.dtype)
        loss = loss + (out * weight).sum() / out.detach().abs().max()
    loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
        if "sigswap" not in name.split(".")
    }
    gradients |= {name: leaf.grad for name, leaf in leaves.items()}
    return [out.detach() for out in outputs], gradients


def _with_gradients(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """Float inputs as leaves; a tensor that is passed twice stays one tensor. Masks get no gradient."""
    leaves: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}

    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in name:
            return value
        if id(value) not in made:
            made[id(value)] = leaves[f"input {name}"] = value.detach().clone().requires_grad_()
        return made[id(value)]

    if isinstance(inputs, dict):
        return {name: leaf(name, value) for name, value in inputs.items()}, leaves
    return tuple(leaf(str(i), value) for i, value in enumerate(inputs)), leaves


def head_bias(heads: int) -> Tensor:
    """Another number for every head."""
    return torch.linspace(-1.0, 1.5, heads)


@functools.cache
def reference(
    case: Case, dtype: torch.dtype = torch.float32, learned: bool = False, first_token: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The oracle's outputs and gradients."""
    entry, variant = case
    model = entry.build(variant).to(dtype)
    with sigmoid_oracle(entry.owners, entry.is_attention, head_bias if learned else None, first_token):
        return forward_backward(model, model, _cast(entry.make_inputs(variant), dtype))


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def assert_equals_oracle(
    model: Callable[..., Any],
    module: nn.Module,
    case: Case,
    dtype: torch.dtype = torch.float32,
    learned: bool = False,
    first_token: bool = False,
    least_scale: float = 1e-3,
) -> None:
    """``model`` (``module``, or a compiled form of it) has the oracle's outputs and gradients.

    A gradient that is 0 but for rounding is measured by ``least_scale`` times the largest.
    """
    entry, variant = case
    tolerance = TOLERANCE if dtype == torch.float32 else TOLERANCE_64
    tolerance *= 3 if first_token else 1  # the rounding of an exponential and a logarithm more
    outputs, gradients = forward_backward(model, module, _cast(entry.make_inputs(variant), dtype))
    expected_outputs, expected_gradients = reference(case, dtype, learned, first_token)
    for i, (ours, theirs) in enumerate(zip(outputs, expected_outputs, strict=True)):
        assert_close(ours, theirs, f"output {i}", tolerance)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, theirs in expected_gradients.items():
        assert_close(gradients[name], theirs, f"gradient of {name}", tolerance, least_scale * largest)


def assert_close(
    ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE, least_scale: float = 0.0
) -> None:
    assert ours.shape == theirs.shape, what
    assert not ours.isnan().any(), f"{what} has NaN"
    scale = max(float(theirs.abs().max()), least_scale)
    error = float((ours - theirs).abs().max())
    assert error <= tolerance * scale, f"{what}: off by {error / scale:.2g} of its scale"
