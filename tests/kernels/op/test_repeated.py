"""A call like an earlier one, which is not checked again, computes what it should, and takes no wrong argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import checkpoint as checkpoints

import sigswap
from sigswap.errors import ArgumentError, SigswapError
from sigswap.kernels import settings
from sigswap.kernels.op import registration, repeated

CUDA = torch.cuda.is_available()


def gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")(test))


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    repeated._known.clear()
    yield
    repeated._known.clear()


def all_known() -> list[repeated.Known]:
    return [known for each in repeated._known.values() for known in each]


def tensors(heads: int = 4, kv_heads: int = 4, rows: int = 7, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(heads + rows)
    shapes = (2, rows, heads, 16), (2, 9, kv_heads, 16), (2, 9, kv_heads, 8)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


def exact(
    query: Tensor, key: Tensor, value: Tensor, *, bias: float | None = None, scale: float | None = None
) -> Tensor:
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    row_bias = -torch.tensor(float(key.shape[2])).log().double() if bias is None else bias
    return torch.sigmoid(scores + row_bias) @ value


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert (out.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"scale": 0.4}, {"bias": -2.0}, {"bias": -1.0, "scale": 0.1}])
def test_the_second_call_is_known_and_has_its_own_numbers(options: dict[str, Any]) -> None:
    first, second = tensors(), [2 * tensor for tensor in tensors()]
    assert_near(sigswap.sigmoid_attention(*first, **options), exact(*first, **options))
    (known,) = all_known()
    assert_near(sigswap.sigmoid_attention(*second, **options), exact(*second, **options))
    assert all_known() == [known]


@pytest.mark.parametrize("float_type", [torch.float16, torch.bfloat16])
def test_gradients_of_known_calls(float_type: torch.dtype) -> None:
    def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(sigswap.sigmoid_attention(*leaves).square().sum(), leaves)

    inputs = tensors(dtype=float_type)
    with torch.inference_mode():  # what is known from there holds for training
        sigswap.sigmoid_attention(*[tensor.clone() for tensor in inputs])
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(exact(*leaves).square().sum(), leaves)
    for _ in range(2):
        for grad, right in zip(gradients(inputs), expected, strict=True):
            assert (grad.double() - right).norm() <= 2e-2 * right.norm()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"is_causal": 1}, "is_causal"),
        ({"enable_gqa": 0}, "enable_gqa"),
        ({"bias": 0}, "bias"),
        ({"softcap": -1.0}, "softcap"),
        ({"window": -3}, "window"),
        ({"row_cap": 0.0}, "row_cap"),
        ({"scale": torch.tensor(0.25, requires_grad=True)}, "scale"),
        ({"dropout_p": 1.5}, "dropout_p"),
    ],
)
def test_wrong_arguments_like_right_ones_are_refused(wrong: dict[str, Any], name: str) -> None:
    inputs = tensors()
    for right in ({"is_causal": True}, {"is_causal": False}, {"enable_gqa": False}, {"bias": 0.0}, {"scale": 0.25}):
        sigswap.sigmoid_attention(*inputs, **right)
    with pytest.raises(ArgumentError, match=name):
        sigswap.sigmoid_attention(*inputs, **wrong)


def test_tensors_unlike_known_ones_are_checked() -> None:
    query, key, value = tensors()
    sigswap.sigmoid_attention(query, key, value)
    for others in ((query.half(), key, value), (query, key[:, :, :5], value), (query, key.to("meta"), value)):
        with pytest.raises(ArgumentError):
            sigswap.sigmoid_attention(*others)
    query, key, value = tensors(kv_heads=2)
    sigswap.sigmoid_attention(query, key, value, enable_gqa=True)
    with pytest.raises(ArgumentError, match="enable_gqa"):
        sigswap.sigmoid_attention(query, key, value)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("other", [None, 1.0, "query"])
def test_what_is_no_tensor_is_refused(place: int, other: Any) -> None:
    inputs: list[Any] = list(tensors())
    sigswap.sigmoid_attention(*inputs)
    inputs[place] = other
    with pytest.raises(ArgumentError, match="must be a tensor"):
        sigswap.sigmoid_attention(*inputs)


def test_other_layouts_and_settings_are_other_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors()
    expected = exact(query, key, value)
    odd = torch.empty(query.numel() + 1, dtype=query.dtype)[1:].view(query.shape).copy_(query)
    for form in ("auto", "accurate"):
        monkeypatch.setattr(settings, "sigmoid_form", form)
        for each in (query, query.contiguous(), odd):
            assert_near(sigswap.sigmoid_attention(each, key, value), expected)
    # What does not start at a multiple of 16 bytes is none of the usual calls.
    assert len({known.signature for known in all_known()}) == len(all_known()) == 4


def test_what_is_none_of_the_usual_calls_is_not_kept() -> None:
    query, key, value = tensors()
    sigswap.sigmoid_attention(query, key, value, window=3)
    sigswap.sigmoid_attention(query, key, value, attn_mask=torch.ones(7, 9).bool())
    sigswap.sigmoid_attention(query[0], key[0], value[0])
    sigswap.sigmoid_attention(query.float(), key.float(), value.float())
    with torch.autocast("cpu", torch.bfloat16):
        sigswap.sigmoid_attention(query, key, value)
    torch.compile(sigswap.sigmoid_attention, backend="eager", fullgraph=True)(query, key, value)
    assert not repeated._known


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "MAX_PLANS", 3)
    for rows in range(1, 9):
        query, key, value = tensors(rows=rows)
        assert_near(sigswap.sigmoid_attention(query, key, value), exact(query, key, value))
    assert len(repeated._known) <= 3


def test_a_cache_that_grows_is_another_call_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And puts out what is known in the end, with what is the same all the time: that is known again then."""
    monkeypatch.setattr(repeated, "MAX_PLANS", 5)
    same, (query, *_) = tensors(), tensors(rows=1)
    whole = [torch.randn(2, 40, 4, size).bfloat16().transpose(1, 2) for size in (16, 8)]
    for keys in range(10, 40):
        assert_near(sigswap.sigmoid_attention(*same), exact(*same))
        key, value = (tensor[:, :, :keys] for tensor in whole)
        for _ in range(2):  # of two layers
            assert_near(sigswap.sigmoid_attention(query, key, value), exact(query, key, value))
        assert len(all_known()) <= 5
        assert {known.signature.kv_len for known in all_known()} >= {keys}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "unusual",
    [
        lambda t: torch.nested.nested_tensor(list(t)),
        lambda t: torch.nested.nested_tensor([each.transpose(0, 1) for each in t], layout=torch.jagged),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
    ],
)
def test_unusual_tensors_in_the_place_of_known_ones(place: int, unusual: Any) -> None:
    inputs = tensors()
    for _ in range(2):
        sigswap.sigmoid_attention(*inputs)
    others = list(inputs)
    others[place] = unusual(inputs[place])
    with pytest.raises(ArgumentError):
        sigswap.sigmoid_attention(*others)


@pytest.mark.parametrize("place", [None, 0, 1])
def test_one_tensor_in_several_places_is_known(place: int | None) -> None:
    """place: of what is a tensor of its own, such as a query of keys that are the values, too."""
    for _ in range(3):
        own, shared = (torch.randn_like(tensors()[1]).requires_grad_() for _ in range(2))
        given = [own if index == place else shared for index in range(3)]
        out = sigswap.sigmoid_attention(*given)
        out.sum().backward()
        exactly = {id(tensor): tensor.detach().double().requires_grad_() for tensor in given}
        expected = exact(*[exactly[id(tensor)] for tensor in given])
        expected.sum().backward()
        assert_near(out, expected)
        for tensor in given:
            assert_near(tensor.grad, exactly[id(tensor)].grad)
    (known,) = all_known()
    assert len(known._backwards) == 1


# Backwards of known calls.


def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
    """New ones, laid out as the inputs."""
    return [tensor.clone().requires_grad_() for tensor in inputs]


def assert_gradients(grads: tuple[Tensor, ...], inputs: list[Tensor], grad_out: Tensor) -> None:
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(exact(*leaves), leaves, grad_out.double())
    for grad, right in zip(grads, expected, strict=True):
        assert (grad.double() - right).norm() <= 2e-2 * right.norm()


def test_gradients_of_other_layouts_and_of_some_inputs() -> None:
    inputs = tensors()
    grad_out = torch.randn(2, 4, 7, 8).bfloat16()
    odd = torch.empty(grad_out.numel() + 1, dtype=grad_out.dtype)[1:].view(grad_out.shape).copy_(grad_out)
    strided = grad_out.transpose(2, 3).contiguous().transpose(2, 3)
    for _ in range(3):
        for given in (grad_out, strided, odd, torch.ones(()).bfloat16().expand(grad_out.shape)):
            leaves = leaves_of(inputs)
            grads = torch.autograd.grad(sigswap.sigmoid_attention(*leaves), leaves, given)
            assert_gradients(grads, inputs, given)
        leaves = leaves_of(inputs)
        (grad,) = torch.autograd.grad(sigswap.sigmoid_attention(*leaves), leaves[1], grad_out)
        whole = leaves_of(inputs)
        (_, expected, _) = torch.autograd.grad(sigswap.sigmoid_attention(*whole), whole, grad_out)
        assert torch.equal(grad, expected)
    assert all(1 < len(known._backwards) <= repeated.MAX_KINDS for known in all_known())


@pytest.mark.parametrize("other", ["contiguous", "an offset", "a subclass"])
def test_hooks_on_saved_tensors_may_put_others_in_their_place(other: str) -> None:
    class Own(torch.Tensor):
        pass

    def unpack(tensor: Tensor) -> Tensor:
        if other == "a subclass":
            return tensor.as_subclass(Own)
        if other == "contiguous":
            return tensor.contiguous()
        numbers = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return numbers[1:].view(tensor.shape).copy_(tensor)

    inputs, grad_out = tensors(), torch.randn(2, 4, 7, 8).bfloat16()
    for hooked in (False, True, False, True):
        leaves = leaves_of(inputs)
        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), unpack):
                out = sigswap.sigmoid_attention(*leaves)
        else:
            out = sigswap.sigmoid_attention(*leaves)
        assert_gradients(torch.autograd.grad(out, leaves, grad_out), inputs, grad_out)


def test_a_tensor_that_lies_elsewhere_after_the_forward() -> None:
    """By its ``data``, about which autograd does not know."""
    inputs, grad_out = tensors(), torch.randn(2, 4, 7, 8).bfloat16()
    for _ in range(2):
        leaves = leaves_of(inputs)
        out = sigswap.sigmoid_attention(*leaves)
        leaves[0].data = leaves[0].data.contiguous()
        assert_gradients(torch.autograd.grad(out, leaves, grad_out), inputs, grad_out)


@pytest.mark.parametrize("row_cap", [None, 0.5])
@pytest.mark.parametrize("moved", [0, 2, -1])
def test_a_saved_tensor_on_another_device_is_an_error(
    moved: int, row_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would read what lies elsewhere. Here meta stands for another device, whose tensors are plain."""
    for module in (repeated, registration):
        monkeypatch.setattr(module, "is_plain", lambda *_: True)
    inputs = tensors()
    for _ in range(3):
        leaves, saved = leaves_of(inputs), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor.detach()) or len(saved) - 1,
            lambda index, saved=saved: saved[index].to("meta") if index == moved % len(saved) else saved[index],
        ):
            out = sigswap.sigmoid_attention(*leaves, row_cap=row_cap)
        with pytest.raises(SigswapError, match="is on meta now, and the output's gradient is on cpu"):
            torch.autograd.grad(out, leaves, torch.ones_like(out))


@gpu
def test_a_parameter_that_left_the_gpu_before_backward_is_an_error(gpu_tensors: list[Tensor]) -> None:
    for _ in range(3):
        leaves = leaves_of(gpu_tensors)
        out = sigswap.sigmoid_attention(*leaves)
        leaves[0].data = leaves[0].data.cpu()
        with pytest.raises(SigswapError, match="is on cpu now, and the output's gradient is on cuda"):
            torch.autograd.grad(out, leaves[1:], torch.ones_like(out))
        assert_all_near(step(gpu_tensors), exact_step(gpu_tensors))


def test_selective_checkpoints_see_known_calls() -> None:
    seen: list[str] = []

    def policy(context: Any, op: Any, *inputs: Any, **keywords: Any) -> checkpoints.CheckpointPolicy:
        seen.append(str(op))
        return checkpoints.CheckpointPolicy.PREFER_RECOMPUTE

    leaves = leaves_of(tensors())
    for _ in range(3):
        sigswap.sigmoid_attention(*leaves)
        seen.clear()
        checkpoints.checkpoint(
            sigswap.sigmoid_attention,
            *leaves,
            use_reentrant=False,
            context_fn=lambda: checkpoints.create_selective_checkpoint_contexts(policy),
        )
        assert seen == ["sigswap.sigmoid_attention.default"]


def test_a_known_call_has_no_second_derivative_either() -> None:
    inputs = tensors()
    for _ in range(2):
        leaves = leaves_of(inputs)
        out = sigswap.sigmoid_attention(*leaves)
        first = torch.autograd.grad(out.float().sum(), leaves, create_graph=True)
        with pytest.raises(SigswapError, match="second derivative"):
            torch.autograd.grad(first[0].float().sum(), leaves)


def test_gradients_in_batches() -> None:
    """By vmap, whose tensors have no addresses."""
    inputs, grads_out = tensors(), torch.randn(3, 2, 4, 7, 8).bfloat16()
    for _ in range(2):
        leaves = leaves_of(inputs)
        out = sigswap.sigmoid_attention(*leaves)
        batches = torch.autograd.grad(out, leaves, grads_out, is_grads_batched=True)
        for index, grad_out in enumerate(grads_out):
            assert_gradients(tuple(batch[index] for batch in batches), inputs, grad_out)
    rows = torch.autograd.functional.jacobian(
        lambda query: sigswap.sigmoid_attention(query, *inputs[1:])[0, 0, 0], inputs[0], vectorize=True
    )
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.functional.jacobian(lambda query: exact(query, *leaves[1:])[0, 0, 0], leaves[0])
    assert_near(rows, expected)


def test_the_state_of_a_backward_is_a_part_of_what_is_known() -> None:
    inputs, grad_out = tensors(), torch.randn(2, 4, 7, 8).bfloat16()
    for deterministic in (False, False, True, False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            leaves = leaves_of(inputs)
            grads = torch.autograd.grad(sigswap.sigmoid_attention(*leaves), leaves, grad_out)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_gradients(grads, inputs, grad_out)
    (known,) = all_known()
    assert sorted(each.state[1] for each in known._backwards) == [False, True]


def test_under_transforms_and_autocast_known_calls_are_as_others() -> None:
    inputs = tensors()
    grad_out = torch.ones(2, 4, 7, 8).bfloat16()
    for _ in range(2):
        assert_near(sigswap.sigmoid_attention(*inputs), exact(*inputs))
        assert_near(torch.vmap(sigswap.sigmoid_attention)(*[t[None] for t in inputs])[0], exact(*inputs))
        grads = torch.func.grad(lambda *t: sigswap.sigmoid_attention(*t).sum(), argnums=(0, 1, 2))(*inputs)
        assert_gradients(grads, inputs, grad_out)
        with torch.autocast("cpu", torch.float16):
            assert sigswap.sigmoid_attention(*inputs).dtype == torch.float16
        with torch.inference_mode():
            assert sigswap.sigmoid_attention(*inputs).is_inference()
        functional = torch.func.functionalize(lambda *three: sigswap.sigmoid_attention(*three))
        graph = make_fx(functional, tracing_mode="symbolic")(*inputs)
        assert any("sigmoid_attention" in str(node.target) for node in graph.graph.nodes)
        assert_near(graph(*inputs), exact(*inputs))


# On a GPU.


@pytest.fixture
def gpu_tensors() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(2, 1024, 8, 64, device="cuda").bfloat16().transpose(1, 2) for _ in range(3)]


def step(inputs: list[Tensor], is_causal: bool = False) -> tuple[Tensor, ...]:
    """The output, and the gradients of its sum."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = sigswap.sigmoid_attention(*leaves, is_causal=is_causal)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def exact_step(inputs: list[Tensor], is_causal: bool = False) -> tuple[Tensor, ...]:
    query, key, value = leaves = [tensor.double().requires_grad_() for tensor in inputs]
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    seen = seen.tril() if is_causal else seen
    scores = query @ key.mT * query.shape[-1] ** -0.5 - seen.sum(-1, keepdim=True).double().log()
    out = torch.where(seen, scores.sigmoid(), 0.0) @ value
    return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))


def assert_all_near(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for each, right in zip(results, expected, strict=True):
        assert (each.double() - right).norm() <= 1e-2 * right.norm()


@gpu
@pytest.mark.parametrize("rows", [64, 1024])
@pytest.mark.parametrize("is_causal", [False, True])
def test_known_calls_on_a_gpu(rows: int, is_causal: bool, gpu_tensors: list[Tensor]) -> None:
    for scale in (1, 2, 0.5):  # the first is not known
        inputs = [(scale * tensor)[:, :, :rows] for tensor in gpu_tensors]
        assert_all_near(step(inputs, is_causal), exact_step(inputs, is_causal))
    assert all_known()


@gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_known_backwards_whose_sums_are_put_in_order_after(is_causal: bool) -> None:
    """Of longer, wider heads."""
    torch.manual_seed(4)
    inputs = [torch.randn(1, 2048, 4, 128, device="cuda").bfloat16().transpose(1, 2) for _ in range(3)]
    for scale in (1, 2, 0.5):
        given = [scale * tensor for tensor in inputs]
        assert_all_near(step(given, is_causal), exact_step(given, is_causal))


@gpu
@pytest.mark.parametrize("rows", [64, 1024])
def test_other_tensors_at_the_same_addresses(rows: int) -> None:
    """Tensor maps are kept by address: of what has come to lie there, and of other layouts."""
    memory = [torch.empty(2 * 1024 * 8 * 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for seed in range(3):
        for heads in (8, 4):
            torch.manual_seed(seed)
            shape = (2, rows, heads, 64)
            numbers = [each[: 2 * rows * heads * 64].view(shape).copy_(torch.randn(shape)) for each in memory]
            inputs = [each.transpose(1, 2) for each in numbers]
            assert_all_near(step(inputs), exact_step(inputs))


@gpu
@pytest.mark.parametrize("rows", [64, 1024])
def test_known_calls_in_a_cuda_graph_and_on_another_stream(rows: int, gpu_tensors: list[Tensor]) -> None:
    inputs = [tensor[:, :, :rows].clone() for tensor in gpu_tensors]
    for _ in range(2):
        sigswap.sigmoid_attention(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = sigswap.sigmoid_attention(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    assert_near(beside, exact_step(inputs)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sigswap.sigmoid_attention(*inputs)
    for tensor in inputs:
        tensor.neg_()
    inputs[0].mul_(0.5)
    graph.replay()
    assert_near(out, exact_step(inputs)[0])


@contextmanager
def heard() -> Iterator[list[str]]:
    """The names of the kernels that Triton's hook hears of inside."""
    from triton import knobs

    names: list[str] = []

    def hear(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    before = knobs.runtime.launch_enter_hook
    chained = hasattr(before, "add")
    if chained:
        before.add(hear)
    else:
        knobs.runtime.launch_enter_hook = hear
    try:
        yield names
    finally:
        if chained:
            before.remove(hear)
        else:
            knobs.runtime.launch_enter_hook = before


@gpu
@pytest.mark.parametrize("rows", [64, 1024])
def test_hooks_hear_of_known_calls(rows: int, gpu_tensors: list[Tensor]) -> None:
    inputs = [tensor[:, :, :rows] for tensor in gpu_tensors]
    for _ in range(2):
        step(inputs)
    with heard() as names:
        results = step(inputs)
    assert len(names) >= 2
    assert_all_near(results, exact_step(inputs))


# Decoding on a GPU, which is two launches: of parts of the keys, and of their sum.


def decoding(keys: int = 1500, batch: int = 2, heads: int = 8, rows: int = 1, dim: int = 64) -> list[Tensor]:
    """A new token, or some, against a cache of two key heads."""
    torch.manual_seed(keys + heads)
    shapes = (batch, heads, rows, dim), (batch, 2, keys, dim), (batch, 2, keys, dim)
    return [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]


def decoded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return sigswap.sigmoid_attention(query, key, value, enable_gqa=True)


def exactly_decoded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    return exact(query, *(tensor.repeat_interleave(group, 1) for tensor in (key, value)))


@gpu
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"rows": 5},
        {"dim": 128, "keys": 4096},
        {"dim": 40},
        {"batch": 300, "keys": 600},  # one part of the keys
    ],
)
def test_known_decoding(sizes: dict[str, int]) -> None:
    inputs = decoding(**sizes)
    for scale in (1, 2, 0.5):  # the first is not known
        given = [scale * tensor for tensor in inputs]
        assert_near(decoded(*given), exactly_decoded(*given))
        for tensor in given:  # in place
            tensor.neg_()
        given[0].neg_()
        assert_near(decoded(*given), exactly_decoded(*given))
    assert len(all_known()) == 1


@gpu
def test_known_decoding_under_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = decoding()
    leaves = [inputs[0].clone().requires_grad_(), *inputs[1:]]
    for form in ("auto", "accurate", "auto", "fast"):
        monkeypatch.setattr(settings, "sigmoid_form", form)
        with torch.inference_mode():
            assert_near(decoded(*[tensor.clone() for tensor in inputs]), exactly_decoded(*inputs))
        assert_near(decoded(*inputs), exactly_decoded(*inputs))
        out = decoded(*leaves)
        assert_near(out, exactly_decoded(*inputs))
        right = [inputs[0].double().requires_grad_(), *inputs[1:]]
        (expected,) = torch.autograd.grad(exactly_decoded(*right).sum(), right[0])
        assert_near(torch.autograd.grad(out.sum(), leaves[0])[0], expected)


@gpu
def test_known_decoding_on_another_stream_and_in_a_cuda_graph() -> None:
    inputs = decoding()
    for _ in range(2):
        decoded(*inputs)
    side, outs = torch.cuda.Stream(), []
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(20):  # parts of both streams are in the allocator's memory at the same time
        with torch.cuda.stream(side):
            outs.append(decoded(*inputs))
        outs.append(decoded(*inputs))
    torch.cuda.current_stream().wait_stream(side)
    for out in outs:
        assert torch.equal(out, outs[0])
    assert_near(outs[0], exactly_decoded(*inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decoded(*inputs)
    for scale in (-1.0, 0.5):
        for tensor in inputs:
            tensor.mul_(scale)
        graph.replay()
        assert_near(out, exactly_decoded(*inputs))


@gpu
@pytest.mark.parametrize("static", [True, False])
def test_decoding_with_a_cache_that_grows(static: bool) -> None:
    """static: in memory for all that is to come, of which each step sees more; else a new cache each time."""
    query, key, value = decoding(keys=1400)
    for keys in (*range(505, 530), *range(1020, 1030), 1400):  # 512: decoding's own kernel
        cache = [tensor[:, :, :keys] for tensor in (key, value)]
        cache = cache if static else [tensor.clone() for tensor in cache]
        for scale in (1, 2):
            assert_near(decoded(scale * query, *cache), exactly_decoded(scale * query, *cache))


@gpu
def test_decoding_with_a_cache_at_other_addresses() -> None:
    query, key, value = decoding()
    memory = torch.empty(2 * key.numel() + 64, device="cuda", dtype=key.dtype)
    for start in (0, 8, 1, 16, 4, 0, 3):  # in numbers of two bytes: some are no multiples of 16 bytes
        second = start + key.numel() + 8
        cache = [memory[at : at + key.numel()].view(key.shape) for at in (start, second)]
        cache[0].copy_(key)
        cache[1].copy_(value)
        assert_near(decoded(query, *cache), exactly_decoded(query, *cache))
    known = len(all_known())
    heads_last = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (key, value)]
    for _ in range(2):
        assert_near(decoded(query, *heads_last), exactly_decoded(query, *heads_last))
    assert len(all_known()) == known + 1


@gpu
def test_hooks_hear_of_both_launches_of_known_decoding() -> None:
    inputs = decoding()
    for _ in range(2):
        decoded(*inputs)
    with heard() as names:
        out = decoded(*inputs)
    assert names == ["_decode_kernel", "_add_kernel"]
    assert_near(out, exactly_decoded(*inputs))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_known_decoding_on_a_device_that_is_not_the_current_one() -> None:
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        inputs = [tensor.to(device) for tensor in decoding()]
        for _ in range(3):
            assert torch.cuda.current_device() == 0
            assert_near(decoded(*inputs), exactly_decoded(*inputs))
