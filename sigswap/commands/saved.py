"""The commands on a directory that sigswap saved: ``report``, ``calibrate``, ``distill``, ``revert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sigswap.commands.shared import AllowCode, AsJson, Debug, build, failures, print_json, usage, working
from sigswap.errors import ArgumentError, Hint

Page = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as an .html page, too.")]
Saved = Annotated[Path, typer.Argument(metavar="DIR", help="A converted model that sigswap saved.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Directory to save to. With --force it may be the same.")]
Force = Annotated[bool, typer.Option("--force", help="Save to a directory that is not empty; other files there stay.")]
Samples = Annotated[int, typer.Option(min=1, help="At most so many blocks, lines or images.")]
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw what was measured: .png, .svg, .pdf or .html.")
]
Data = Annotated[
    Path,
    typer.Option(
        metavar="FILE|DIR",
        help="Text or images: a file, or the files in a directory and below. Text needs the tokenizer beside the "
        "model; for language models it is cut into blocks of --length tokens.",
    ),
]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a block of text, for language models.")]


def report(
    directory: Saved,
    page: Page = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what was converted in DIR, and its calibration. Builds nothing, and runs none of the model's code."""
    with failures(as_json, debug):
        from sigswap.saving.checkpoint import saved_conversion

        check_saved(directory)
        conversion = saved_conversion(directory)
        assert conversion is not None
        if page is not None:
            conversion.report.save(page)
        if as_json:
            print_json({"model": str(directory), **conversion.report.to_dict()})
        else:
            Console().print(conversion.report)


def calibrate(
    directory: Saved,
    out: Out,
    data: Annotated[
        str,
        typer.Option(metavar="FILE|DIR|none", help="Lines of text, or images, as for convert --calibrate."),
    ],
    samples: Samples = 64,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Language models: fit the bias for all positions up to this one, too."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What the tokenizer or the image transforms are taken from, if not DIR."),
    ] = None,
    picture: Picture = None,
    force: Force = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Calibrate the converted model in DIR, and save it."""
    with failures(as_json, debug, "calibrate"):
        check_saved(directory)
        check_empty(out, force)
        import sigswap
        from sigswap.commands.batch_files import find_samples, make_batches
        from sigswap.saving import remote_code
        from sigswap.saving.checkpoint import save
        from sigswap.training.pictures import check_picture

        if picture is not None:
            check_picture(picture)
        found = None if data == "none" else find_samples(Path(data), samples, "--data")
        with_code = remote_code.is_in(directory)
        with working(f"Loading {directory}"):
            model = sigswap.load(directory, allow_code=allow_code)
        batches = None if found is None else make_batches(model, original or _beside(directory), found, "--data")
        measured = sigswap.calibrate(model, batches, max_length=max_length)
        with working(f"Saving to {out}"):
            save(model, out, remote_code=with_code)
        if picture is not None:
            measured.save(picture)
        if as_json:
            print_json({"model": str(directory), "out": str(out), "calibration": measured.to_dict()})
        else:
            Console().print(measured)
            Console().print(f"Saved to {out}.", highlight=False, markup=False)


def distill(
    directory: Saved,
    original: Annotated[
        str,
        typer.Argument(metavar="ORIGINAL", help="The teacher: a directory, hub id, timm:NAME or module:function."),
    ],
    out: Out,
    data: Data,
    steps: Annotated[int, typer.Option(min=0, help="End-to-end steps.")],
    layerwise_steps: Annotated[int, typer.Option(min=0, help="Layer-wise steps, before those.")] = 0,
    train: Annotated[str, typer.Option(metavar="all|sigmoid", help="sigmoid: sigswap's parameters alone.")] = "all",
    lr: Annotated[float, typer.Option(help="The largest learning rate of the base parameters.")] = 1e-4,
    samples: Samples = 4096,
    length: Length = 512,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    lift_row_cap: Annotated[
        float | None,
        typer.Option(metavar="FLOAT", help="Raise the row caps to this in the first tenth of the steps; inf: to none."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the losses: .png, .svg, .pdf or .html.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the state is kept; a run that was interrupted goes on from it."),
    ] = None,
    force: Force = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train the converted model in DIR to compute what ORIGINAL computes, and save it.

    Calibrate it first. Ctrl-C leaves nothing but the file of --resume.
    """
    with failures(as_json, debug):
        import sigswap
        from sigswap.commands.batch_files import block_batches, find_samples, find_tokenizer, make_batches
        from sigswap.saving import remote_code
        from sigswap.saving.checkpoint import save
        from sigswap.saving.transformers_hook import is_transformers_model
        from sigswap.training.distill import check_choices
        from sigswap.training.pictures import check_picture

        with usage():
            check_choices(train, lr, lift_row_cap)
        check_saved(directory, original)
        check_empty(out, force)
        if picture is not None:
            check_picture(picture)
        found = find_samples(data, samples, "--data")
        with_code = remote_code.is_in(directory)
        with working(f"Loading {directory} and {original}"):
            model: Any = sigswap.load(directory, allow_code=allow_code)
            pretrained = original.startswith("timm:")
            teacher = build(original, weights=True, pretrained=pretrained, allow_code=allow_code)
        tokenizer, beside = None, original
        if is_transformers_model(model):
            tokenizer, beside = find_tokenizer(str(directory), original)
        if writes(model) and tokenizer is not None:
            batches = block_batches(model, tokenizer, data, samples, length, "--data")
        else:
            batches = make_batches(model, beside, found, "--data")
        measured = sigswap.distill(
            model, teacher, batches, steps=steps, layerwise_steps=layerwise_steps, train=train, lr=lr,  # type: ignore[arg-type]
            tokens=tokenizer, accumulate=accumulate, resume=resume, lift_row_cap=lift_row_cap,
        )  # fmt: skip
        with working(f"Saving to {out}"):
            save(model, out, remote_code=with_code)
        if picture is not None:
            measured.save(picture)
        if as_json:
            losses = {"layerwise": measured.layerwise, "end_to_end": measured.end_to_end}
            print_json({"model": str(directory), "out": str(out), **losses})
        else:
            Console().print(str(measured), highlight=False)
            Console().print(f"Saved to {out}.", highlight=False, markup=False)


def revert(
    directory: Saved,
    out: Out,
    force: Force = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take the conversion out of the model in DIR, and save it: softmax again, with the weights as they are now.

    A transformers model becomes a directory as any other; of other models the state_dict is saved.
    """
    with failures(as_json, debug):
        check_saved(directory)
        check_empty(out, force)
        import sigswap
        from sigswap.saving.checkpoint import WEIGHTS, save_plain
        from sigswap.saving.transformers_hook import is_transformers_model

        with working(f"Loading {directory}"):
            model = sigswap.load(directory, allow_code=allow_code)
        sigswap.revert(model)
        with working(f"Saving to {out}"):
            save_plain(model, out)
        if as_json:
            print_json({"model": str(directory), "out": str(out)})
        else:
            how = (
                f"{type(model).__name__}.from_pretrained({str(out)!r})"
                if is_transformers_model(model)
                else f"safetensors.torch.load_model(model, {str(out / WEIGHTS)!r})"
            )
            Console().print(f"Saved to {out}. Load it with {how}.", highlight=False, markup=False, soft_wrap=True)


def writes(model: Any) -> bool:
    """Whether a transformers model is a decoder that writes text."""
    return bool(hasattr(model, "can_generate") and model.can_generate() and not model.config.is_encoder_decoder)


def check_empty(out: Path, force: bool | None) -> None:
    """Raises ArgumentError if files in ``out`` could be replaced. ``force``: None if the command has no such option."""
    if out.is_dir() and any(out.iterdir()) and not force:
        hint = Hint("Choose another directory." if force is None else "Choose another directory, or pass --force.")
        raise ArgumentError(f"{out} is not empty.", hint=hint)


def check_saved(directory: Path, original: str | None = None) -> None:
    """Raises ArgumentError unless ``directory`` holds a converted model; ``original`` is what comes after it."""
    from sigswap.saving.checkpoint import is_saved

    swapped = original is not None and is_saved(original)
    hint = Hint("The converted model comes first, then its original.") if swapped else None
    if not directory.is_dir():
        raise ArgumentError(f"{directory} is not a directory.", hint=hint)
    if not is_saved(directory):
        raise ArgumentError(f"{directory} holds no model that sigswap saved.", hint=hint)


def _beside(directory: Path) -> str:
    """What the inputs are made with: of a timm model the name that its factory has."""
    config = directory / "sigswap.json"
    return str(json.loads(config.read_text(encoding="utf-8"))["factory"]) if config.is_file() else str(directory)
