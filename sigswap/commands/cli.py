"""The command line: ``sigswap inspect | convert | calibrate | distill | compare | ...``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sigswap import files
from sigswap.bench.cells import DISTRIBUTED, SUITES
from sigswap.bench.peers import described
from sigswap.commands import saved
from sigswap.commands.shared import (
    INTERRUPTED,
    AllowCode,
    AsJson,
    Debug,
    Example,
    Exclude,
    Include,
    Model,
    Pretrained,
    build,
    errors,
    example_inputs,
    failures,
    print_json,
    usage,
    working,
)
from sigswap.errors import AlreadyConvertedError, ArgumentError, BenchmarkError, Hint

if TYPE_CHECKING:
    from torch import nn

app = typer.Typer(
    name="sigswap",
    help="Swap softmax attention for sigmoid attention in PyTorch models that you already have.",
    epilog="MODEL is a transformers directory or hub id, timm:NAME, or module:function (a function that returns "
    "the model). Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The ``sigswap`` command."""
    if "" not in sys.path:  # module:function is looked up in the current directory too, as python -m does
        sys.path.insert(0, "")
    try:
        app()
    except KeyboardInterrupt:  # outside of a command
        errors.print("Interrupted.")
        sys.exit(INTERRUPTED)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"sigswap {version('sigswap')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: Model,
    include: Include = None,
    exclude: Exclude = None,
    example: Example = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Show what torch.compile(backend='sigswap') makes of each attention.")
    ] = False,
    page: saved.Page = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the softmax attention in MODEL, and what convert would do with it. Reads no weights.

    Of a directory that sigswap saved it shows what was converted, and builds nothing unless --compile is given.
    """
    with failures(as_json, debug):
        import sigswap
        from sigswap.report import check_page
        from sigswap.saving.checkpoint import saved_conversion

        if page is not None:
            check_page(page)
        conversion = None if compile else saved_conversion(model)
        if conversion is None:
            with working(f"Building {model}"):
                built = build(model, weights=False, pretrained=False, allow_code=allow_code)
        if compile:
            with working(f"Compiling {model}"):
                compiled = sigswap.explain(built, example_inputs(example))
            if page is not None:
                compiled.save(page)
            if as_json:
                print_json({"model": model, **compiled.to_dict()})
            else:
                Console().print(compiled)
            return
        if conversion is not None:
            report = conversion.report
        elif sigswap.is_converted(built):
            report = sigswap.report(built)
        else:
            with working(f"Looking for attention in {model}"):
                report = sigswap.inspect(
                    built, example_inputs=example_inputs(example), include=include, exclude=exclude
                )
        if page is not None:
            report.save(page)
        if as_json:
            print_json({"model": model, **report.to_dict()})
        else:
            Console().print(report)
        if not report.count("swappable") and not report.count("swapped"):
            errors.print("There is no softmax attention that can be swapped.")
            raise typer.Exit(1)


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory to save the converted model to.")],
    bias: Annotated[
        str,
        typer.Option(
            metavar="visible|INT|FLOAT",
            help="The bias of the scores. visible: -ln of the number of keys that the row sees; an integer n: "
            "-ln(n); a number with a point: that number.",
        ),
    ] = "visible",
    learn_bias: Annotated[
        bool, typer.Option("--learn-bias/--no-learn-bias", help="Add one trainable bias per head.")
    ] = True,
    query_bias: Annotated[
        bool | None,
        typer.Option(
            "--query-bias/--no-query-bias",
            help="Add a trainable bias that depends on the query. Default: if a decoder is calibrated.",
        ),
    ] = None,
    first_token: Annotated[
        bool | None,
        typer.Option(
            "--first-token/--no-first-token",
            help="Take the first key's score as it is in the bias. Default: if a decoder is calibrated.",
        ),
    ] = None,
    qk_norm: Annotated[str | None, typer.Option(metavar="rms|layer", help="Normalise queries and keys.")] = None,
    layer_scale: Annotated[
        float | None, typer.Option(metavar="FLOAT", help="Scale attention's output, from this value on.")
    ] = None,
    hybrid_norm: Annotated[bool, typer.Option("--hybrid-norm", help="Put a LayerNorm on attention's output.")] = False,
    row_cap: Annotated[
        float | None, typer.Option(metavar="FLOAT", help="Divide each row by the larger of this and its sum.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Fail if an attention cannot be swapped.")
    ] = True,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|none",
            help="Calibrate on this file, or on the files in this directory and below: on the images (.png, .jpg, "
            ".jpeg, .webp, .bmp) if there are any, else on the lines of UTF-8 text that are not blank. Text needs the "
            "tokenizer beside MODEL. none: without data.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="At most so many lines or images of --calibrate are used.")] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Language models: --calibrate fits the bias for all positions up to this one, too."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw what --calibrate measured: .png, .svg, .pdf or .html.")
    ] = None,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="transformers: add a Python file by which trust_remote_code=True loads the model without sigswap.",
        ),
    ] = False,
    pretrained: Pretrained = False,
    example: Example = None,
    force: Annotated[
        bool, typer.Option("--force", help="Save to a directory that is not empty; other files there stay.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Convert MODEL and save it."""
    settings: dict[str, Any] = {
        "bias": _parse_bias(bias),
        "learn_bias": learn_bias,
        "query_bias": query_bias,
        "first_token": first_token,
        "qk_norm": qk_norm,
        "layer_scale": layer_scale,
        "hybrid_norm": hybrid_norm,
        "row_cap": row_cap,
    }
    with failures(as_json, debug):
        import sigswap
        from sigswap.commands.batch_files import find_samples, make_batches
        from sigswap.saving.checkpoint import saved_conversion
        from sigswap.training.pictures import check_picture

        with usage():
            config = sigswap.SigmoidConfig(**settings)
            for option, value in (("--picture", picture), ("--max-length", max_length)):
                if value is not None and calibrate is None:
                    raise ArgumentError(f"{option} is for a calibration.", hint=Hint("Pass --calibrate as well."))
        saved.check_empty(out, force)
        if picture is not None:  # what can be told before the minutes of loading, converting and calibrating
            check_picture(picture)
        found = None if calibrate in (None, "none") else find_samples(Path(calibrate), samples)
        with working(f"Loading {model}"):
            is_saved = saved_conversion(model) is not None
            built = None if is_saved else build(model, weights=True, pretrained=pretrained, allow_code=False)
        if built is None or sigswap.is_converted(built):
            raise AlreadyConvertedError(
                f"{model} is converted already.", hint=Hint("To have it in another way, convert the original.")
            )
        with working(f"Converting {model}"):
            sigswap.convert(
                built,
                config,
                example_inputs=example_inputs(example),
                include=include,
                exclude=exclude,
                strict=strict,
            )
        if remote_code:
            _check_remote_code(built)  # before the minutes of calibrating
        calibration, shown = None, sigswap.report(built)  # without the calibration, which is shown by itself
        if calibrate is not None:
            batches = None if found is None else make_batches(built, model, found)
            calibration = sigswap.calibrate(built, batches, max_length=max_length)
            if picture is not None:
                calibration.save(picture)
        with working(f"Saving to {out}"):
            sigswap.save(built, out, factory=_factory(built, model), remote_code=remote_code)
        if as_json:
            measured = {} if calibration is None else {"calibration": calibration.to_dict()}
            print_json({"model": model, "out": str(out), **sigswap.report(built).to_dict(), **measured})
        else:
            console = Console()
            console.print(shown)
            if calibration is not None:
                console.print(calibration)
            code = _factory(built, model) is not None and not model.startswith("timm:")
            call = f"{_loader(built)}({str(out)!r}{', allow_code=True' if code else ''})"
            console.print(f"Saved to {out}. Load it with {call}.", highlight=False, markup=False)
            if model.startswith("timm:") and not pretrained:
                console.print("Its weights are random: --pretrained loads those that timm knows.", highlight=False)
                return
            paths = shlex.join([str(out), model])
            command = f"sigswap compare {paths}{_held_out(built, model)}{' --allow-code' if code else ''}"
            console.print(f"What the swap did to it: {command}", highlight=False, soft_wrap=True, markup=False)


for _command in (saved.report, saved.calibrate, saved.distill, saved.revert):
    app.command()(_command)


@app.command()
def compare(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A converted model that sigswap saved.")],
    original: Annotated[
        str,
        typer.Argument(metavar="ORIGINAL", help="The model before: a directory, hub id, timm:NAME or module:function."),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Compare on this text, or these images, with which it was not trained: a file, or the files in a "
            "directory and below. Without it inputs are made up.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="At most so many blocks, lines or images of --text.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a block of text, for language models.")] = 512,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="The longest context in which lookups are asked. Default: the model's."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of each kind of lookup.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the lookups, and of inputs that are made up.")] = 0,
    example: Example = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the figures: .png, .svg, .pdf or .html.")
    ] = None,
    allow_code: AllowCode = False,
    debug: Debug = False,
) -> None:
    """Compare the converted model in DIR with its softmax ORIGINAL.

    Language models: loss, divergence, and what loss does not show: copying and recall. Others: agreement, or
    embeddings. Each figure stands beside the original's.
    """
    with failures(False, debug, "compare"):
        import sigswap
        from sigswap.commands.batch_files import block_batches, find_samples, find_tokenizer, make_batches
        from sigswap.saving.transformers_hook import is_transformers_model
        from sigswap.training.pictures import check_picture

        for path in (json_file, picture):  # before the minutes of comparing
            if path is not None and not path.resolve().parent.is_dir():
                raise ArgumentError(f"{path} cannot be written: there is no directory {path.parent}.")
        if picture is not None:
            check_picture(picture)
        saved.check_saved(model, original)
        found = None if text is None else find_samples(text, samples, "--text")
        with working(f"Loading {model} and {original}"):
            converted = sigswap.load(model, allow_code=allow_code)
            timm = original.startswith("timm:")
            before = build(original, weights=True, pretrained=timm, allow_code=allow_code)
        tokenizer, beside = None, original
        if is_transformers_model(converted):
            tokenizer, beside = find_tokenizer(str(model), original)
        batches = None if example is None else [example_inputs(example)]
        if text is not None and found is not None:
            if saved.writes(converted) and tokenizer is not None:
                batches = block_batches(converted, tokenizer, text, samples, length)
            else:
                batches = make_batches(converted, beside, found, "--text")
        result = sigswap.compare(
            converted, before, batches, tokens=tokenizer, max_length=max_length, sequences=sequences, seed=seed
        )
        Console().print(result)
        if json_file is not None:
            files.write_text(json_file, result.to_json() + "\n")
        if picture is not None:
            result.save(picture)


@app.command()
def recover(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What the model was being saved to.")],
    undo: Annotated[
        bool, typer.Option("--undo", help="Put back the model that was there before, and drop the new one.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Bring DIR in order after a save to it was killed.

    If the new model was complete, DIR holds it then; if not, DIR holds what it held before. What else the save has
    left is removed.
    """
    with failures(False, debug):
        from sigswap.saving.replacing import recover as bring_in_order

        for done in bring_in_order(directory, undo=undo) or ["There is nothing to recover."]:
            Console().print(done, highlight=False, markup=False, soft_wrap=True)


@app.command()
def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="|".join((*SUITES, DISTRIBUTED)),
            help="Default: all but features, models, generation, distributed. Can be repeated.",
        ),
    ] = None,
    cell: Annotated[
        list[str] | None,
        typer.Option("--cell", metavar="GLOB", help="Only cells whose label matches, as 'ViT*'. Can be repeated."),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peers",
            metavar="NAME",
            help=f"Can be repeated. Default: all that are installed, but those that compile or tune for each shape in "
            f"some cells only, and sdpa in some large models. {described()}.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="bf16|fp16|fp32", help="Of all tensors.")] = "bf16",
    quick: Annotated[bool, typer.Option("--quick", help="The fewest cells.")] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="reduce-overhead|max-autotune",
            help="torch.compile's, in the suites models and generation; there it is reduce-overhead by default.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures, and the reasons for a '-'.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", "--picture", metavar="FILE.png", help="Draw the figures. Needs matplotlib."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="DIR",
            help="Of the suite distributed: how much of NCCL's time nothing else covers; writes traces there.",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure sigswap beside PyTorch's softmax attention, on a GPU.

    train: 16,384 tokens of width 2048, forward, backward and memory. short: a ViT's sequences. decode: one query per
    sequence on a cache. varlen: packed sequences. host: microseconds per call that the CPU takes. Each cell's results
    are checked before they are timed. 2.00x beside a peer's figure: it takes twice sigswap's time, or memory.

    features: soft cap, dropout, windows, masks, documents, packed sequences, float32 and decoding: milliseconds,
    forward and with backward. FlexAttention compiles in each cell, so it runs only if it is named.

    models: whole compiled models, a forward pass and a training step without the optimizer: milliseconds, peak memory
    beyond the weights, and kernels launched. It compiles each model several times, which takes many minutes, so it
    runs only if it is named; a model whose package (timm, transformers) is not installed is left out.

    generation: tokens per second of a Llama of 1B, compiled with CUDA graphs, on a static cache of 2,048 and 16,384
    tokens, for one sequence and 32. It runs only if it is named.

    distributed: in the processes that torchrun starts (torchrun --nproc-per-node 2 --no-python sigswap bench --suite
    distributed): a step of training under data (FSDP2), tensor and context parallelism, beside softmax attention under
    the same: time, bytes sent, exposed communication, memory. --quick has sizes for CPUs; --profile tells what of the
    communication overlaps with what.
    """
    with failures(False, debug):
        for path in (json_file, plot):  # before the minutes of measuring
            if path is not None and not path.resolve().parent.is_dir():
                raise ArgumentError(f"{path} cannot be written: there is no directory {path.parent}.")
        if suite is not None and DISTRIBUTED in suite:
            from sigswap.bench.distributed.run import choose, report

            refused = {"--suite": len(suite) > 1, "--peers": peers, "--mode": mode, "--plot": plot}
            given = [option for option, value in refused.items() if value]
            with usage():
                if given:
                    raise ArgumentError(f"the suite distributed runs by itself, without {', '.join(given)}.")
                choose(dtype, quick, cell)
            report(json_file, dtype=dtype, quick=quick, labels=cell, profile=profile, console=errors)
            return
        if profile is not None:
            raise typer.BadParameter("--profile is of the suite distributed alone.")
        from sigswap.bench import run as benchmark
        from sigswap.bench.results import check_plot

        with usage():
            benchmark.choose(suite, labels=cell, peers=peers, dtype=dtype, quick=quick, mode=mode)
        if plot is not None:
            check_plot(plot)
        result = benchmark.run(suite, labels=cell, peers=peers, dtype=dtype, quick=quick, mode=mode, console=errors)
        Console().print(result)
        if json_file is not None:
            files.write_text(json_file, json.dumps(result.to_dict(), indent=2) + "\n")
        if plot is not None:
            kind = plot.suffix[1:].lower()  # of a name that savefig does not see
            files.write_whole(plot, lambda new: result.figure().savefig(new, dpi=150, format=kind))
        if result.failures:
            raise BenchmarkError("sigswap failed, and has no figures there:\n" + "\n".join(result.failures))


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=0, help="Distillation steps.")] = 60,
    seed: Annotated[int, typer.Option(help="Chooses the sentences and their order.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the converted model in this directory.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the comparison: .png, .svg, .pdf or .html.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Convert the pretrained all-MiniLM-L6-v2, calibrate and distill it on real text, save it, load it, compare."""
    with failures(as_json, debug):
        from sigswap.commands.demo import run
        from sigswap.training.pictures import check_picture

        if out is not None:
            saved.check_empty(out, None)
        if picture is not None:
            check_picture(picture)
        result = run(steps=steps, seed=seed, out=out, console=errors)
        if picture is not None:
            result.comparison.save(picture)
        if as_json:
            print_json(result.to_dict())
        else:
            Console().print(result)


def _parse_bias(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text  # visible, or what SigmoidConfig refuses


def _check_remote_code(built: Any) -> None:
    from sigswap.saving.remote_code import check
    from sigswap.saving.transformers_hook import is_transformers_model

    if not is_transformers_model(built):
        raise ArgumentError("{argument} is for transformers models only.", argument="remote_code")
    check(built)


def _held_out(built: Any, spec: str) -> str:
    """The option of compare with which its figures say more: text that the model was not fitted to, or images."""
    taken = "pixel_values" if spec.startswith("timm:") else getattr(built, "main_input_name", "")
    return {"input_ids": " --text FILE", "pixel_values": " --text DIR"}.get(taken, "")


def _factory(built: nn.Module, spec: str) -> str | None:
    """What builds the model again when it is loaded; of a transformers model its config does."""
    from sigswap.saving.sources import is_factory
    from sigswap.saving.transformers_hook import is_transformers_model

    return spec if is_factory(spec) and not is_transformers_model(built) else None


def _loader(built: Any) -> str:
    """The function that loads what was saved. Transformers does not know all classes of its models by their config."""
    from sigswap.saving.transformers_hook import is_transformers_model

    if is_transformers_model(built):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if built.config.model_type not in set(CONFIG_MAPPING):
            return f"{type(built).__name__}.from_pretrained"
    return "sigswap.load"
