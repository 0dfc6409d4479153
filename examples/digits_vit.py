"""A vision transformer after the swap: trained on scikit-learn's digits with softmax, converted, fine-tuned.

    python examples/digits_vit.py            # about a minute on two CPU cores
    python examples/digits_vit.py --seeds 3

After the training the softmax model is converted, once with the paper's bias and once calibrated, and all three are
fine-tuned for the same number of steps on the same batches. Prints the accuracies, and saves them as a plot to --out.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sigswap

BATCH = 64


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images [N, 1, 8, 8] and labels [N]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    split = train_test_split(images, labels, test_size=0.3, random_state=seed, stratify=labels)
    return split[0], split[2], split[1], split[3]


def build() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.0
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float, seed: int) -> None:
    """AdamW, one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    groups = sigswap.param_groups(model, lr) if sigswap.is_converted(model) else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, cycle_momentum=False)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model.eval()(images).argmax(-1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000, help="training steps with softmax")
    parser.add_argument("--tuning-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("digits-out"), help="directory for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config = sigswap.SigmoidConfig(query_bias=True)
    names = ("softmax", "sigmoid, the paper's bias", "sigmoid, calibrated without data", "sigmoid, calibrated")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        images, labels, test_images, test_labels = data(seed)
        trained = build()
        train(trained, images, labels, options.steps, 2e-3, seed)
        example = images[:2]
        models = {name: copy.deepcopy(trained) for name in names}
        for name in names[1:]:
            sigswap.convert(models[name], config, example_inputs=example)
        models[names[2]].default_cfg = {"input_size": (1, 8, 8)}
        sigswap.calibrate(models[names[2]], seed=seed)
        report = sigswap.calibrate(models[names[3]], list(images.split(BATCH)))
        for name, model in models.items():
            before = accuracy(model, test_images, test_labels)
            train(model, images, labels, options.tuning_steps, 2e-4, seed + 1)
            results[name].append((before, accuracy(model, test_images, test_labels)))

    table = Table("", "accuracy before tuning", f"after {options.tuning_steps} steps", title="mean over the seeds")
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for name, pairs in results.items():
        means = torch.tensor(pairs).mean(0).tolist()
        table.add_row(name, *(f"{mean:.2%}" for mean in means))
        axis.plot(["before tuning", "after"], means, "o-", label=name)
    Console().print(table)
    Console().print(report)
    axis.set_ylabel("test accuracy")
    axis.legend()
    figure.savefig(options.out / "digits.png", dpi=150)
    report.save(options.out / "heads.png")
    print(f"Pictures are in {options.out}.")


if __name__ == "__main__":
    main()
