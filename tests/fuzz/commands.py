"""Random command lines: each ends with 0, 1 or 2 and without a traceback, and one that fails has written nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

import sigswap
from sigswap.commands.cli import app
from tests.fuzz.loading import HERE, IDS, build, mutate

NAMES = (
    "",
    " ",
    ".",
    "..",
    "/",
    "/dev/null",
    "x" * 300,
    "[red]x[/red]",
    "[/]",
    "é\u202e\n",
    "-",
    "--",
    "a:b",
    ":",
    "timm:",
)
NUMBERS = ("0", "1", "-1", "2", "3.5", "-1e9", "nan", "inf", "1e400", "x", "", "visible", "99999999999999999999")
RAW = "SIGSWAP_DEBUG=1 shows the traceback"
"""By which the command line marks an error that is not its own."""


def tiny(heads: int = 4) -> torch.nn.Module:
    """A factory without arguments that have to be given."""
    torch.manual_seed(0)
    return build(16, heads)


def example() -> torch.Tensor:
    return IDS[:, :4]


def fails() -> torch.nn.Module:
    raise RuntimeError("this factory [/] fails")


class World:
    """A folder with what command lines name, made once and copied for each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source, self.work = folder, folder / "source", folder / "work"
        self.source.mkdir()
        torch.manual_seed(0)
        model = sigswap.convert(build().eval(), example_inputs=example())
        sigswap.save(model, self.source / "saved", factory=f"{HERE}:build")
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        )  # fmt: skip
        llama = transformers.LlamaForCausalLM(config).eval()
        llama.save_pretrained(self.source / "llama")
        sigswap.save(sigswap.convert(llama), self.source / "converted llama")
        (self.source / "empty").mkdir()
        (self.source / "text.txt").write_text("A line.\nAnother one.\n\n")
        (self.source / "bytes").write_bytes(random.Random(0).randbytes(300))
        (self.source / "pictures").mkdir()
        (self.source / "pictures" / "x.png").write_bytes(b"no picture")
        (self.source / "[red]odd").mkdir()

    def fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.source, self.work)

    def state(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.work)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in sorted(self.work.rglob("*"))
        }


def drawn(rng: random.Random) -> list[str]:
    """A command line, half of it as it should be."""
    here = f"{__name__}:"
    models = (
        "saved",
        "llama",
        "converted llama",
        "timm:test_vit",
        "timm:nope",
        f"{here}tiny",
        f"{here}tiny",
        f"{here}fails",
    )
    places = (
        *models,
        "empty",
        "text.txt",
        "bytes",
        "pictures",
        "[red]odd",
        "not/there",
        "os:getcwd",
        "os:nope",
        "no.such:x",
    )

    odd = rng.choice((0.0, 0.1, 0.4))  # how much of it is as it should not be

    def model() -> str:
        return rng.choice(models) if rng.random() > odd else rng.choice((*places, *NAMES))

    def number(*good: str) -> str:
        return rng.choice(good) if rng.random() > odd else rng.choice(NUMBERS)

    def place(*good: str) -> str:
        return rng.choice(good) if rng.random() > odd else rng.choice((*places, *NAMES))

    def some(*options: list[str]) -> list[str]:
        return [word for option in options if rng.random() < 0.2 for word in option]

    command = rng.choice(
        ("inspect", "inspect", "convert", "convert", "convert", "compare", "recover", "bench", "other")
    )
    common = some(["--json"], ["--allow-code"], ["--include", place("*", "*", "layers.*")], ["--exclude", "x"])
    inputs = ["--example", f"{here}example"] if rng.random() > odd else some(["--example", place(f"{here}example")])
    if command == "inspect":
        return [command, model(), *inputs, *common]
    if command == "convert":
        out = ["--out", place("new", "new/inner", "empty", "[new]", "[/new]", "saved")] if rng.random() < 0.95 else []
        fitted = ["--calibrate", place("none", "text.txt", "pictures", "empty")]
        return [
            command, model(), *out, *inputs,
            *some(
                ["--bias", number("visible", "16", "-2.0")],
                ["--row-cap", number("0.5")],
                ["--layer-scale", number("1.0")],
                ["--qk-norm", place("rms", "layer")],
                ["--hybrid-norm"], ["--no-strict"], ["--force"], ["--query-bias"], ["--first-token"], ["--pretrained"],
                fitted, ["--samples", number("1", "3")],
                ["--picture", place("new.png", "new.html", "not/there.png", "x.nope")],
            ),
            *[word for word in common if word != "--allow-code"],
        ]  # fmt: skip
    if command == "compare":
        limits = ["--sequences", "1", "--length", "8", "--context", "8"] if rng.random() < 0.8 else []
        options = some(
            ["--samples", number("1")],
            ["--text", place("text.txt")],
            ["--seed", number("3")],
            ["--json", place("new.json")],
        )
        picture = some(["--picture", place("new.png")], ["--allow-code"])
        return [
            command,
            place("saved", "converted llama"),
            *([model()] if rng.random() < 0.9 else []),
            *limits,
            *options,
            *picture,
        ]
    if command == "recover":
        return [command, place("saved", "empty", "new"), *some(["--undo"], ["--json"])]
    if command == "bench":
        return [
            command,
            "--suite",
            rng.choice(("nope", "", "[/]")),
            *some(["--dtype", "x"], ["--json", place("new.json")]),
        ]
    words = ("--help", "--version", "nope", "inspect", "convert", "--json", "[/]", "-x", "--out")
    return rng.choices(words, k=rng.randrange(4))


def attempt(world: World, seed: int) -> tuple[str, str, bool]:
    """The command, what came of it, and whether that is a fault."""
    rng = random.Random(seed)
    world.fresh()
    if rng.random() < 0.2:
        mutate(world.work / rng.choice(("saved", "converted llama")), rng)
    arguments, before, origin = drawn(rng), world.state(), Path.cwd()
    command = (
        arguments[0] if arguments and arguments[0] in ("inspect", "convert", "compare", "recover", "bench") else "other"
    )
    os.chdir(world.work)
    try:
        result = CliRunner().invoke(app, arguments)
    finally:
        os.chdir(origin)
    problem = _problem(world, arguments, result, before)
    return (
        command,
        f"exit code {result.exit_code}" if problem is None else f"{problem} of {arguments}",
        problem is not None,
    )


def _problem(world: World, arguments: list[str], result: Any, before: dict[str, str]) -> str | None:
    if result.exit_code not in (0, 1, 2) or (
        result.exception is not None and not isinstance(result.exception, SystemExit)
    ):
        return f"{type(result.exception).__name__}: {result.exception}"
    text = result.stdout + result.stderr
    if "Traceback" in text:
        return f"a traceback: {text[-300:]}"
    if RAW in text and "fails" not in " ".join(arguments):
        return f"a raw error: {text[-300:]}"
    if result.exit_code != 0 and not text.strip():
        return "no word of why it failed"
    if (
        "--json" in arguments
        and "--" not in arguments
        and arguments[0] in ("inspect", "convert")
        and result.exit_code != 2
    ):
        try:
            json.loads(result.stdout)
        except ValueError:
            return f"no JSON: {result.stdout[:100]!r}"
    now = world.state()
    if result.exit_code != 0 and now != before:
        changed = {name for name in {*now, *before} if now.get(name) != before.get(name)}
        return f"it failed and wrote {sorted(changed)}: {text[-200:]}"
    hidden = [name for name in now if ".saving-" in name]
    return f"left behind: {hidden}" if hidden else None
