"""Data parallelism: a converted model that is trained by several ranks equals one that one process trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spread
import torch
from ranks import on_ranks
from torch import Tensor, nn

import sigswap

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

BATCH, STEPS = 4, 3


def converted() -> Any:
    model = spread.llama(num_key_value_heads=2, initializer_range=0.02).train()
    fields = {"learn_bias": True, "query_bias": True, "layer_scale": 0.5}
    return sigswap.convert(model, sigswap.SigmoidConfig(**fields))


def trained(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The parameters after some steps of a rule that has no state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    whole = {
        name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in model.named_parameters()
    }
    return {name.removeprefix("module."): each.detach() for name, each in whole.items()}


def replicated(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Any) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_in_checkpoints(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable()
    return sharded(model)


def accelerated(model: Any) -> nn.Module:
    made: nn.Module = accelerate.Accelerator(cpu=True).prepare(model)
    assert isinstance(made, nn.parallel.DistributedDataParallel)
    return made


WAYS: list[Callable[[Any], nn.Module]] = [replicated, sharded, sharded_in_checkpoints, accelerated]


def check_training() -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ids = torch.randint(1, 31, (BATCH, 9), generator=torch.Generator().manual_seed(1))
    model = converted()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    expected = trained(copy.deepcopy(model), ids)
    for way in WAYS:
        found = trained(way(copy.deepcopy(model)), ids[rank * BATCH // size : (rank + 1) * BATCH // size])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=f"{way.__name__}: {name}")
            assert not torch.equal(found[name], before[name]), f"{way.__name__}: {name} did not move"


def check_trainer(folder: str) -> dict[str, Any]:
    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, max_steps=2, per_device_train_batch_size=1, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 31, (8, 9), generator=generator)]
    model = converted()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.AdamW(sigswap.param_groups(model, 1e-2))
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    trainer.save_model()
    torch.distributed.barrier()
    found = sigswap.load(folder)
    for name, value in model.named_parameters():
        assert torch.equal(found.get_parameter(name), value) and not torch.equal(value, before[name]), name
    return {name: value.tolist() for name, value in model.named_parameters()}


def context_trainer() -> Any:
    """As the page on many processes has it."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    code = page[page.index("import torch.distributed as dist\nimport torch.nn.functional") :]
    found: dict[str, Any] = {}
    exec(code[: code.index("```")], found)
    return found["ContextTrainer"]


def check_context_trainer(folder: str) -> None:
    """Equals one process that takes the same steps."""
    seen: list[Tensor] = []

    class Trainer(context_trainer()):  # type: ignore[misc]
        def _prepare_inputs(self, inputs: Any) -> Any:
            seen.append(inputs["input_ids"].clone())
            return super()._prepare_inputs(inputs)

    arguments = transformers.TrainingArguments(
        folder, use_cpu=True, max_steps=2, per_device_train_batch_size=1, max_grad_norm=0.0, report_to=[],
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 31, (8, 8), generator=generator)]
    model = converted()
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5)
    for ids in seen:
        torch.distributed.broadcast(ids, 0)
        optimizer.zero_grad()
        expected(ids, labels=ids).loss.backward()
        optimizer.step()
    assert len(seen) == 2
    for name, value in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, atol=1e-5, rtol=1e-4, msg=name)


def check(folder: str) -> dict[str, Any]:
    check_training()
    check_context_trainer(folder)
    return check_trainer(folder)


def test_training(tmp_path: Path) -> None:
    first, second = on_ranks(2, check, str(tmp_path / "out"))
    assert first == second
