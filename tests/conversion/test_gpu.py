"""Converted models on a CUDA GPU: as on the CPU, compiled and not, in half precision, and with linear memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from torch import Tensor, nn

import sigswap

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TEXT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}


def llama(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = T.LlamaConfig(**TEXT, num_key_value_heads=2, vocab_size=99)
    config._attn_implementation = implementation
    ids = torch.randint(3, 99, (2, 33))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return T.LlamaForCausalLM(config).eval(), {"input_ids": ids, "attention_mask": mask}


def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_the_cpu(implementation: str) -> None:
    model, inputs = llama(implementation)
    expected = sigswap.convert(model)(**inputs).logits
    model = model.cuda()
    torch.testing.assert_close(model(**moved(inputs)).logits.cpu(), expected, rtol=1e-4, atol=1e-5)
    sigswap.convert(sigswap.revert(model))  # discovery on a model that is on the GPU
    torch.testing.assert_close(model(**moved(inputs)).logits.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("backend", ["inductor", "sigswap"])
def test_compiled_training_step(implementation: str, backend: str) -> None:
    model, inputs = llama(implementation)
    converted = sigswap.convert(copy.deepcopy(model)).cuda()
    loss = converted(**moved(inputs), labels=inputs["input_ids"].cuda()).loss
    loss.backward()
    compiled_model = (copy.deepcopy(converted) if backend == "inductor" else model).cuda()
    compiled_model.zero_grad()
    compiled = torch.compile(compiled_model, backend=backend)
    compiled_loss = compiled(**moved(inputs), labels=inputs["input_ids"].cuda()).loss
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-4, atol=1e-5)
    grads = dict(converted.named_parameters())
    for name, parameter in compiled_model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-3, atol=1e-5)


def test_compiled_training_with_cuda_graphs() -> None:
    model, inputs = llama("sdpa")
    model = sigswap.convert(model).cuda()
    compiled = torch.compile(copy.deepcopy(model), mode="reduce-overhead", fullgraph=True)
    for step in range(4):  # warm-up, recording and replays, on other inputs
        batch = moved(inputs)
        batch["input_ids"] = (batch["input_ids"] + step) % 90 + 3
        torch.compiler.cudagraph_mark_step_begin()
        losses = [each(**batch, labels=batch["input_ids"]).loss for each in (model, compiled)]
        torch.testing.assert_close(losses[1].clone(), losses[0], rtol=1e-4, atol=1e-5)
        for loss in losses:
            loss.backward()
        for expected, parameter in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-5)
        for each in (model, compiled):
            each.zero_grad()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing(compiled: bool) -> None:
    model, inputs = llama("sdpa")
    model = sigswap.convert(model).cuda().train()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = torch.compile(model) if compiled else model
        step(**moved(inputs), labels=inputs["input_ids"].cuda()).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model, inputs = llama("sdpa")
    model = sigswap.convert(model).cuda()
    exact = model(**moved(inputs)).logits
    with torch.autocast("cuda", dtype=dtype):
        logits = model(**moved(inputs)).logits
    assert (logits.float() - exact).norm() / exact.norm() < 3e-2


def test_generate() -> None:
    model, inputs = llama("sdpa")
    model = sigswap.convert(model).cuda()
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**moved(inputs), **arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**moved(inputs), **arguments, use_cache=False))


def test_memory_is_linear_in_the_length() -> None:
    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 2, length, 64, device="cuda", requires_grad=True) for _ in range(3))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sigswap.sigmoid_attention(q, k, v, is_causal=True).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(4096)
    assert peak(32768) < 16 * peak(4096)  # 64 times if it were quadratic


def test_sdpa_arguments() -> None:
    q, k, v = torch.randn(2, 4, 65, 32), torch.randn(2, 2, 70, 32), torch.randn(2, 2, 70, 32)
    mask = torch.randn(2, 1, 65, 70).masked_fill(torch.rand(2, 1, 65, 70) < 0.2, -torch.inf)

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask.to(q.device), scale=0.2, enable_gqa=True)

    model = sigswap.convert(Attend(), example_inputs=(q, k, v))
    expected = model(q, k, v)
    torch.testing.assert_close(model.cuda()(q.cuda(), k.cuda(), v.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
