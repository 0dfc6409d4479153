"""Damages of saved directories: each is refused with a CheckpointError, or loads and computes what was saved."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sigswap
from sigswap.errors import CheckpointError

HERE = __name__
IDS = torch.arange(20).view(2, 10) % 50
_NUMBERS = (0, 1, 2, 3, -1, -2, -3, -4, 7, 2**31, 10**12, 10**400, 0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"))
_OTHERS = (None, True, False, "", "x", "visible", [], {}, [0], [[]], {"a": 1}, "../x", "os:system", "\ud800")


class Case(NamedTuple):
    """A directory with what was saved in it, and the outputs of the model on its inputs."""

    directory: Path
    run: Callable[[nn.Module], Tensor]
    expected: Tensor


class Own(nn.Module):
    """By hand, with tied weights, heads that are as many as head_dim and rows, and a buffer that is not saved."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.eps = heads, 0.5
        self.embed = nn.Embedding(50, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.head = nn.Linear(dim, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(dim).float() / 7, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.table * self.eps
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        p = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(-1)
        return self.head((p @ value).transpose(1, 2).flatten(2))


def build(dim: int = 16, heads: int = 4) -> nn.Module:
    return Own(dim, heads)


def cases(folder: Path) -> Iterator[Case]:
    """A saved directory of each of the three kinds, and, where torchao is installed, of a quantized model."""
    config = sigswap.SigmoidConfig(query_bias=True, first_token=True, qk_norm="rms", layer_scale=0.5, row_cap=0.7)

    def case(name: str, model: nn.Module, run: Callable[[nn.Module], Tensor], **options: Any) -> Case:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
        sigswap.save(model.eval(), folder / name, **options)
        with torch.no_grad():
            return Case(folder / name, run, run(model))

    torch.manual_seed(0)
    own = build()
    own.eps = 0.25
    sigswap.convert(own.eval(), config, example_inputs=IDS[:, :4])
    yield case("own", own, lambda model: model(IDS[:, :4]), factory=f"{HERE}:build")
    import timm
    import transformers

    vit = timm.create_model("test_vit", num_classes=5)
    images = torch.randn(1, *vit.pretrained_cfg["input_size"])
    yield case("timm", sigswap.convert(vit.eval(), config), lambda model: model(images))
    llama = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(llama).eval()
    saved = case("transformers", sigswap.convert(model, config), lambda model: model(IDS).logits, max_shard_size="20KB")
    yield saved
    if importlib.util.find_spec("torchao") is not None:
        from torchao.quantization import Int8WeightOnlyConfig

        quantization = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        model = transformers.LlamaForCausalLM.from_pretrained(saved.directory, quantization_config=quantization)
        sigswap.save(model, folder / "quantized")
        with torch.no_grad():
            yield Case(folder / "quantized", saved.run, saved.run(model))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in JSON data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from places(item, (*path, name))


def mutated_json(data: Any, rng: random.Random) -> Any:
    """``data`` with a value that is other, gone, moved, doubled or renamed; of any depth alike."""
    by_depth: dict[int, list[tuple[Any, ...]]] = {}
    for path in places(data):
        if path:
            by_depth.setdefault(len(path), []).append(path)
    path = rng.choice(by_depth[rng.choice(list(by_depth))])
    holder = data
    for step in path[:-1]:
        holder = holder[step]
    last, value = path[-1], holder[path[-1]]
    kind = rng.randrange(6)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[last] = rng.choice([value + 1, value - 1, -value, value * 2, float(value), str(value)])
    elif kind == 2 and isinstance(holder, dict):
        holder[f"{last}x"] = holder.pop(last)
    elif kind == 3:
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    elif kind == 4 and isinstance(holder, list):
        holder.insert(last, value)
    else:
        holder[last] = rng.choice(_NUMBERS + _OTHERS)
    return data


def mutate(directory: Path, rng: random.Random) -> str:
    """Damages a file of ``directory``; says what it did."""
    path = rng.choice(sorted(directory.iterdir()))
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.8:
        changed = json.loads(data)
        for _ in range(rng.choice([1, 1, 1, 2])):
            changed = mutated_json(changed, rng)
        path.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
        return f"{path.name}: values"
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(mutated_json(json.loads(data[8 : 8 + length]), rng)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        return f"{path.name}: header"
    kind = rng.randrange(5)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 2:
        path.write_bytes(data + bytes(rng.randrange(1, 99)))
    elif kind == 3:
        # Of the values themselves there is no checksum.
        end = len(data) if path.suffix == ".json" else 8 + int.from_bytes(data[:8], "little")
        at = rng.randrange(end)
        path.write_bytes(data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :])
    else:
        path.write_text("[" * 10**5)
    return f"{path.name}: bytes, {kind}"


def without_checksums(directory: Path) -> None:
    """Makes ``directory`` one that version 0.1 could have written."""
    for name in ("sigswap.json", "config.json"):
        if (directory / name).is_file():
            data = json.loads((directory / name).read_text())
            for holder in (data, data.get("quantization_config", {})):
                for field in ("checksums", "config_checksums", "tensors", "weights"):
                    holder.pop(field, None)
            (directory / name).write_text(json.dumps(data))


def attempt(case: Case, seed: int, folder: Path, checksums: bool = True) -> str:
    """What comes of one damage: "refused", "same", or, of a fault, what is wrong."""
    directory = folder / "damaged"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(case.directory, directory)
    if not checksums:
        without_checksums(directory)
    what = mutate(directory, random.Random(seed))
    messages: list[Any]
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        try:
            model = sigswap.load(directory, allow_code=True)
        except CheckpointError:
            return "refused"
        except Exception as error:
            return f"raw error after {what}: {type(error).__name__}: {str(error)[:200]}"
        try:
            with torch.no_grad():
                got = case.run(model)
        except Exception as error:
            return f"loads and fails after {what}: {type(error).__name__}: {str(error)[:200]}"
    if got.shape == case.expected.shape and torch.equal(got, case.expected):
        return "same"
    return f"computes something else after {what}" + (" (with a message)" if messages else "")
