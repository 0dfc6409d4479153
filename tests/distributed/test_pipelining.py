"""Stages of a converted model on several ranks (torch.distributed.pipelining) equal one process."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn

import sigswap

ROWS, TOKENS, WIDTH, PARTS = 4, 6, 16, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def check_pipeline() -> list[str]:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    x, target = torch.randn(2, ROWS, TOKENS, WIDTH)
    fields = {"learn_bias": True, "query_bias": True, "first_token": True, "row_cap": 0.5}
    model = nn.Sequential(*(Block() for _ in range(4)))
    sigswap.convert(model, sigswap.SigmoidConfig(**fields), example_inputs=(x,))
    expected = copy.deepcopy(model)
    output = expected(x)
    loss_of(output, target).backward()
    own = range(rank * 4 // size, (rank + 1) * 4 // size)
    mine = nn.Sequential(*(model[index] for index in own))
    stage = PipelineStage(mine, rank, size, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, PARTS, loss_fn=loss_of)
    losses: list[Tensor] = []
    found = schedule.step(x) if rank == 0 else schedule.step(target=target, losses=losses)
    if rank == size - 1:
        torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.stack(losses).mean(), loss_of(output, target))
    done = []
    for part, index in zip(mine, own, strict=True):
        for name, parameter in part.named_parameters():
            wanted = expected[index].get_parameter(name).grad
            assert parameter.grad is not None and wanted is not None
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-4, msg=f"{index}.{name}")
            done.append(f"{index}.{name}")
    return done


def test_stages() -> None:
    found = [name for names in on_ranks(2, check_pipeline) for name in names]
    assert len(set(found)) == len(found) > 4 * 8
