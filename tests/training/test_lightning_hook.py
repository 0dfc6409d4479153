"""A LightningModule around a converted model: calibrated before it is trained, and not decayed.

Docstrings are rows of docs/ecosystem.md, which tests/ecosystem/page.py writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sigswap
from sigswap.errors import ArgumentError, NotConvertedError

lightning = pytest.importorskip("lightning.pytorch")

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return result


class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, scheduled: bool = False, convert: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.scheduled = Block(), scheduled
        if convert:
            sigswap.convert(self.model, sigswap.SigmoidConfig(query_bias=True), example_inputs=X)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return 0.0 * self.model(batch).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)
        if not self.scheduled:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


def fit(task: Task, callback: Any, folder: Path) -> None:
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", callbacks=[callback], default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(X, batch_size=2))


def test_lightning(tmp_path: Path) -> None:
    """Lightning's Trainer with `sigswap.lightning_callback(batches)`: calibrated, sigswap's parameters not decayed"""
    task, twin = Task(), Task()
    expected = sigswap.calibrate(twin.model, [X], progress=False)
    callback = sigswap.lightning_callback([X], progress=False)
    fit(task, callback, tmp_path)  # the gradients are 0: a step of decay alone
    assert callback.report.to_dict() == expected.to_dict()
    before = dict(twin.named_parameters())
    for name, parameter in task.named_parameters():
        kept = 1.0 if ".sigswap." in name else 0.95
        torch.testing.assert_close(parameter, before[name] * kept, rtol=1e-5, atol=1e-7)
    assert before["model.sigswap.0.bias"].abs().max() > 0.01


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="scheduler"):
        fit(Task(scheduled=True), sigswap.lightning_callback(), tmp_path)
    with pytest.raises(NotConvertedError, match="Task is not converted"):
        fit(Task(convert=False), sigswap.lightning_callback([X]), tmp_path)
    fit(Task(convert=False), sigswap.lightning_callback(), tmp_path)
