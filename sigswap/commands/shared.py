"""What the commands share: their options, how a model is built, and how they end when something goes wrong."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from sigswap.errors import ArgumentError, ConfigError, SigswapError

if TYPE_CHECKING:
    from torch import nn

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""
errors = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, timm:NAME or module:function.")]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Only module paths that match. Can be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB", help="Not module paths that match. Can be repeated."),
]
Example = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="A function that returns inputs to run the model on, a tuple or a dict. Needed for a model that "
        "does not know any itself.",
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="timm: load the published weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Run code that a directory which sigswap saved names (its factory)."),
]
Debug = Annotated[bool, typer.Option("--debug", envvar="SIGSWAP_DEBUG", help="Show the traceback of an error.")]


def build(spec: str, *, weights: bool, pretrained: bool, allow_code: bool) -> nn.Module:
    import torch

    from sigswap.saving import sources
    from sigswap.saving.checkpoint import COMPANIONS, is_saved, load

    if pretrained and not spec.startswith("timm:"):
        raise typer.BadParameter("--pretrained is for timm:NAME.")
    if is_saved(spec):
        return load(spec, allow_code=allow_code)
    if spec.startswith("timm:"):
        if weights:
            return sources.build(spec, {}, pretrained=pretrained).eval()
        with torch.device("meta"):
            return sources.build(spec, {}).eval()
    if sources.is_factory(spec):
        return sources.build(spec, {})
    model = sources.from_transformers(spec, weights=weights)
    if weights and not os.path.isdir(spec):
        from huggingface_hub import snapshot_download

        snapshot_download(spec, allow_patterns=list(COMPANIONS))  # save copies them from the cache
    return model


def example_inputs(spec: str | None) -> Any:
    if spec is None:
        return None
    from sigswap.saving.sources import resolve

    function = resolve(spec)
    if not callable(function):
        raise ArgumentError(f"--example: {spec!r} is a {type(function).__name__}, and cannot be called.")
    inputs = function()
    if inputs is None:
        raise ArgumentError(f"--example: {spec!r} returned None, and not inputs.")
    return inputs


def print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


# The arguments of sigswap's functions that are written otherwise than --name: in a message, and in a hint.
_IN_MESSAGE = {"example_inputs": "What --example returns", "factory": "MODEL", "original": "ORIGINAL"}
_IN_HINT = {
    "batches": "a file to --calibrate, or batches to sigswap.calibrate in Python",
    "example_inputs": "--example MODULE:FUNCTION, a function that returns inputs",
    "exclude": "--exclude GLOB",
    "include": "--include GLOB",
    "overrides": "overrides, in Python",
}
# Batches have another option in these commands.
_BATCHES_IN_HINT = {
    "calibrate": "a file to --data, or batches to sigswap.calibrate in Python",
    "compare": _IN_HINT["example_inputs"],
}


def _in_message(argument: str, value: str) -> str:
    return _IN_MESSAGE.get(argument, _option(argument))


def _in_hint(argument: str, value: str, command: str | None) -> str:
    if argument == "batches":
        return _BATCHES_IN_HINT.get(command or "", _IN_HINT[argument])
    if value == "None" and argument not in _IN_HINT:
        return f"no {_option(argument)}"
    return _IN_HINT.get(argument, _option(f"no_{argument}" if value == "False" else argument))


def working(what: str) -> Status:
    """Shows what is being done, in which a name may hold anything."""
    return errors.status(Text(what))


@contextmanager
def usage() -> Iterator[None]:
    """Makes an error of what is done in it, which is to look at options alone, wrong usage, as what typer itself finds
    of options is."""
    try:
        yield
    except (ArgumentError, ConfigError) as error:
        hint = "" if error.hint is None else f" {error.hint.spelled(lambda name, _: _option(name))}"
        raise typer.BadParameter(error.spelled(_in_message) + hint) from None


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Sigswap's warnings as one line each, without the line of its code that they came from."""
    others, package = warnings.showwarning, Path(__file__).parents[1]

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **options: Any) -> None:
        if package in Path(filename).parents:
            errors.print("[bold yellow]Warning:[/] ", end="")
            errors.print(str(message), markup=False, soft_wrap=True)
        else:
            others(message, category, filename, *where, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


@contextmanager
def failures(as_json: bool, debug: bool, command: str | None = None) -> Iterator[None]:
    """Turns an exception into one line on standard error (and JSON, if asked for) and exit code 1; Ctrl-C into one and
    130. ``command`` is named where its options for the same argument differ from other commands'."""
    if not debug:  # PyTorch logs a traceback of what fails on fake tensors, before it is raised
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with _own_warnings():
            yield
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        errors.print(" ".join(["Interrupted.", *getattr(interrupt, "__notes__", ())]), markup=False, soft_wrap=True)
        if as_json:
            print_json({"error": {"type": "KeyboardInterrupt", "message": "Interrupted."}})
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        report = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, SigswapError):
            report["message"] = error.spelled(_in_message)
            if error.hint is not None:
                report["hint"] = error.hint.spelled(lambda argument, value: _in_hint(argument, value, command))
            text = " ".join([report["message"], report.get("hint", "")]).rstrip()
        elif isinstance(error, OSError) and error.filename is not None:
            text = report["message"] = f"{error.filename}: {error.strerror}."
        else:
            text = f"{report['type']}: {report['message']}\nSIGSWAP_DEBUG=1 shows the traceback."
        errors.print("[bold red]Error:[/] ", end="")
        errors.print(text, markup=False, soft_wrap=True)
        if as_json:
            print_json({"error": report})
        raise typer.Exit(1) from None
