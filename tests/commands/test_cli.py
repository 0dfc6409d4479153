"""The command line: tables, JSON, exit codes, and no traceback on a user's mistake."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import sigswap
from sigswap.commands.cli import app
from sigswap.saving import sources

HERE = "sigswap_cli_factories"
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_built = itertools.count(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value).squeeze(1)


class Summed(Attention):
    """Scores that are a sum of products, as query_bias cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return (query @ key.mT + key @ query.mT).softmax(-1) @ value


class Renormalised(Attention):
    """Probabilities that are normalised again, which would undo a sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        p = (query @ key.mT).softmax(-1) ** 2
        return p / p.sum(-1, keepdim=True) @ value


class NoAttention(nn.Linear):
    pass


def build() -> nn.Module:
    return Attention()


def build_seeded() -> nn.Module:
    torch.manual_seed(0)
    return Attention()


def build_without_attention() -> nn.Module:
    return NoAttention(8, 8)


def build_summed() -> nn.Module:
    return Summed()


def build_renormalised() -> nn.Module:
    return Renormalised()


def build_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def build_unregistered() -> nn.Module:
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "sigswap-unregistered"

    class Unregistered(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.attention = Attention()
            self.post_init()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x)

    return Unregistered(Config())


def build_another_each_time() -> nn.Module:
    model = Attention()
    model.register_buffer("built", torch.zeros(next(_built)))
    return model


def inputs() -> Tensor:
    return torch.randn(2, 5, 8)


def wrong_inputs() -> Tensor:
    return torch.randn(2, 5, 7)


def no_inputs() -> None:
    return None


def empty_inputs() -> list[Tensor]:
    return []


def fail() -> nn.Module:
    raise RuntimeError("broken [bold]on purpose[/bold]")


@pytest.fixture(autouse=True)
def _factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def small_llama(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return model


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == f"sigswap {sigswap.__version__}"
    result = run("--help")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("inspect", "convert", "demo", "MODEL"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """By the protocol of the script that --install-completion puts into the shell's configuration."""
    for words, position, answer in (("sigswap ca", 1, "calibrate"), ("sigswap distill x --pic", 3, "--picture")):
        asked = {"COMP_WORDS": words, "COMP_CWORD": str(position), "_TYPER_COMPLETE_ARGS": words}
        env = {**asked, "_SIGSWAP_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        result = CliRunner().invoke(app, [], env=env, prog_name="sigswap")
        assert result.exit_code == 0 and answer in result.stdout and "--json" not in result.stdout
    assert "--install-completion" in run("--help").stdout


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, "--picture") for command in ("convert", "calibrate", "distill", "compare", "bench", "demo")]
    + [(command, "--html") for command in ("inspect", "report")],
)
def test_a_command_with_a_report_can_draw_it(command: str, option: str) -> None:
    """What has figures as a picture, what is a table as a page; and where that cannot be is told at once."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert option in [name for parameter in commands[command].params for name in parameter.opts]


def test_transformers_directory(tmp_path: Path) -> None:
    small_llama(tmp_path / "in")
    result = run("inspect", tmp_path / "in")
    assert result.exit_code == 0, result.output
    assert "model.layers.{0..2}.self_attn" in result.stdout and "swappable" in result.stdout
    options = ("--bias", "128", "--query-bias", "--remote-code")
    result = run("convert", tmp_path / "in", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "modeling_sigswap.py").exists()
    assert "swapped" in result.stdout and "sigswap.load" in result.stdout
    assert (tmp_path / "out" / "tokenizer.json").exists()
    model = sigswap.load(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert any(name.endswith("sigswap.0.query_weight") for name in model.state_dict())
    assert "swapped" in run("inspect", tmp_path / "out", "--html", tmp_path / "page.html").stdout
    assert "model.layers.2.self_attn" in (tmp_path / "page.html").read_text()
    assert "suffix must be .html" in run("inspect", tmp_path / "out", "--html", tmp_path / "page.png").stderr


def test_json_is_the_whole_of_stdout(tmp_path: Path) -> None:
    small_llama(tmp_path / "in")
    found = json.loads(run("inspect", tmp_path / "in", "--json").stdout)
    assert [site["status"] for site in found["sites"]] == ["swappable"] * 3
    done = json.loads(run("convert", tmp_path / "in", "--out", tmp_path / "out", "--json", "--exclude", "*.1.*").stdout)
    assert done["out"] == str(tmp_path / "out")
    assert sorted(site["status"] for site in done["sites"]) == ["left", "swapped", "swapped"]
    error = json.loads(run("inspect", tmp_path / "nothing", "--json").stdout)
    assert error["error"]["type"] == "ArgumentError" and "hint" not in error["error"]
    error = json.loads(run("inspect", f"{HERE}:build", "--json").stdout)["error"]
    assert error["message"] == "Attention does not say what its inputs look like."
    assert error["hint"].startswith("Pass --example MODULE:FUNCTION, a function that returns inputs: a tensor, ")


def word_llama(directory: Path) -> None:
    """A small Llama with a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {f"w{index}": index for index in range(48)} | {"[UNK]": 48, "</s>": 49}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, max_position_embeddings=64))
    model.save_pretrained(directory)
    fast.save_pretrained(directory)


def test_compare(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    word_llama(tmp_path / "m y")
    done = run("convert", tmp_path / "m y", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"sigswap compare {tmp_path / 'out'} '{tmp_path / 'm y'}' --text FILE\n" in done.stdout
    text = "\n".join(" ".join(f"w{(3 * i + j * j) % 48}" for j in range(10)) for i in range(40))
    (tmp_path / "text.txt").write_text(text)
    options = ("--text", tmp_path / "text.txt", "--length", 32, "--samples", 5, "--json", tmp_path / "figures.json")
    result = run("compare", tmp_path / "out", tmp_path / "m y", *options, "--picture", tmp_path / "picture.png")
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in ("original (softmax)", "copying", "tokens back", "loss with 0 to 15"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m y")
    ids = torch.tensor(tokenizer(text)["input_ids"][: 5 * 32]).view(5, 32)
    model = sigswap.load(tmp_path / "out")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m y")
    expected = sigswap.compare(model, original, [{"input_ids": ids}], tokens=tokenizer, progress=False)
    assert figures == expected.to_dict()
    # Without text, and without a tokenizer.
    for file in [*(tmp_path / "m y").glob("tokenizer*"), *(tmp_path / "out").glob("tokenizer*")]:
        file.unlink()
    result = run("compare", tmp_path / "out", tmp_path / "m y", "--max-length", 32)
    assert result.exit_code == 0 and "the model wrote itself" in result.stdout and "copying" in result.stdout
    result = run("compare", tmp_path / "out", tmp_path / "m y", "--text", tmp_path / "text.txt")
    assert result.exit_code == 1 and "has no tokenizer" in " ".join(result.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in", "in"), "holds no model that sigswap saved."),
        (("in", "out"), "holds no model that sigswap saved. The converted model comes first, then its original."),
        (("out", "nothing"), "nothing: not a directory or hub id"),
        (("out", "in", "--text", "no.txt"), "--text: there is no no.txt"),
        (
            ("out", "in", "--text", "short.txt", "--length", "8"),
            "short.txt has 3 tokens, fewer than a block of --length",
        ),
        (("out", "in", "--text", "short.txt", "--length", "65"), "--length 65: LlamaForCausalLM has positions for 64"),
        (("out", "in", "--json", "no/figures.json"), "there is no directory no"),
        (("out", "in", "--picture", "picture.txt"), "suffix must be .png"),
    ],
)
def test_compare_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    word_llama(Path("in"))
    run("convert", "in", "--out", "out")
    Path("short.txt").write_text("w1 w2 w3")
    result = run("compare", *arguments)
    assert result.exit_code == 1 and message in " ".join(result.stderr.split()), result.stderr


def test_compare_of_other_models(tmp_path: Path) -> None:
    example = ("--example", f"{HERE}:inputs")
    assert run("convert", f"{HERE}:build_seeded", *example, "--out", tmp_path / "out").exit_code == 0
    result = run("compare", tmp_path / "out", f"{HERE}:build_seeded", *example, "--allow-code")
    assert result.exit_code == 0 and "cosine similarity" in result.stdout, result.output


def test_row_cap(tmp_path: Path) -> None:
    small_llama(tmp_path / "in")
    assert run("convert", tmp_path / "in", "--out", tmp_path / "out", "--row-cap", "0.5").exit_code == 0
    assert sigswap.report(sigswap.load(tmp_path / "out")).notes[-1] == "Row cap: 0.5 (3 attentions)."
    failed = run("convert", tmp_path / "in", "--out", tmp_path / "other", "--row-cap", "0")
    assert failed.exit_code == 2 and "--row-cap must be a positive finite number where it is given" in failed.stderr


def test_a_warning_is_one_line_without_the_code_that_it_came_from(tmp_path: Path) -> None:
    done = run("convert", f"{HERE}:build", "--example", f"{HERE}:inputs", "--out", tmp_path / "out", "--bias", "128.0")
    (line,) = [line for line in done.stderr.splitlines() if "128.0" in line]
    assert done.exit_code == 0 and line.startswith("Warning: bias=128.0 is a float") and "cli.py" not in done.stderr


def test_a_decoder_that_is_calibrated(tmp_path: Path) -> None:
    word_llama(tmp_path / "in")
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{(i + 7 * j) % 48}" for j in range(20)) for i in range(9)))
    options = ("--calibrate", tmp_path / "text.txt", "--out")
    for flags, names in (
        ((), {"bias", "query_weight", "length_share", "offset"}),
        (("--no-first-token",), {"bias", "query_weight"}),
    ):
        out = tmp_path / f"out{len(flags)}"
        result = run("convert", tmp_path / "in", *options, out, *flags)
        assert result.exit_code == 0, result.output
        state = sigswap.load(out).state_dict()
        assert {name.rpartition(".")[2] for name in state if ".sigswap." in name} == names
        said = " ".join(result.stdout.split())
        assert ("row cap 0.01" in said) == (not flags) and said.count("error of a head's output") == 1


def test_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    assert "blocks.{0..5}.attn" in run("inspect", "timm:test_vit").stdout
    done = run("convert", "timm:test_vit", "--out", tmp_path, "--layer-scale", "1.0")
    assert done.exit_code == 0 and "Its weights are random: --pretrained" in done.stdout
    assert any(name.endswith("layer_scale") for name in sigswap.load(tmp_path).state_dict())


def test_own_function(tmp_path: Path) -> None:
    result = run("inspect", f"{HERE}:build")
    assert result.exit_code == 1 and "--example" in result.stderr
    example = ("--example", f"{HERE}:inputs")
    assert "swappable" in run("inspect", f"{HERE}:build", *example).stdout
    done = run("convert", f"{HERE}:build", "--out", tmp_path, *example)
    assert done.exit_code == 0 and "allow_code=True" in done.stdout and "--allow-code" in done.stdout
    assert sigswap.is_converted(sigswap.load(tmp_path, allow_code=True))


def test_the_code_that_a_directory_names_runs_only_if_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = ("--example", f"{HERE}:inputs")
    assert run("convert", f"{HERE}:build", "--out", tmp_path / "out", *example).exit_code == 0
    calls: list[str] = []
    monkeypatch.setattr(sources, "resolve", lambda spec: calls.append(spec))
    assert "1 swapped" in run("inspect", tmp_path / "out").stdout
    for command in (("inspect", tmp_path / "out", "--compile"), ("compare", tmp_path / "out", tmp_path / "out")):
        result = run(*command)
        assert result.exit_code == 1 and "--allow-code" in result.stderr, result.output
    result = run("convert", tmp_path / "out", "--out", tmp_path / "again")
    assert result.exit_code == 1 and "converted already" in result.stderr
    assert calls == []


def test_recover(tmp_path: Path) -> None:
    assert "nothing to recover" in run("recover", tmp_path / "m").stdout
    work = tmp_path / ".m.saving-00000000"
    (work / "new").mkdir(parents=True)
    (work / "lock").write_text("")
    result = run("recover", tmp_path / "m")
    assert result.exit_code == 0 and "is removed" in result.stdout and not work.exists()


def test_own_function_that_returns_a_transformers_model(tmp_path: Path) -> None:
    assert run("convert", f"{HERE}:build_llama", "--out", tmp_path).exit_code == 0
    assert type(sigswap.load(tmp_path)).__name__ == "LlamaForCausalLM"


def test_a_transformers_model_whose_class_is_not_registered_is_loaded_by_that_class(tmp_path: Path) -> None:
    result = run("convert", f"{HERE}:build_unregistered", "--example", f"{HERE}:inputs", "--out", tmp_path)
    assert result.exit_code == 0 and "Unregistered.from_pretrained(" in result.stdout
    assert sigswap.is_converted(type(build_unregistered()).from_pretrained(tmp_path))


def test_a_directory_that_is_not_empty_needs_force(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ("convert", f"{HERE}:build", "--example", f"{HERE}:inputs", "--out", tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1 and "--force" in result.stderr
    assert run(*arguments, "--force").exit_code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("answer", "message"),
    [("no such model", "the hub has no such model"), ("no connection", "the hub cannot be reached (ConnectionError)")],
)
def test_a_mistyped_name_is_asked_for_once(answer: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    asked = []

    def metadata(url: str, **options: Any) -> None:
        asked.append((url, options["timeout"]))
        if answer == "no such model":
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    result = run("inspect", "nobody/no-such-model")
    assert result.exit_code == 1 and "nobody/no-such-model" in result.stderr and message in result.stderr
    [(url, timeout)] = asked
    assert url.endswith("nobody/no-such-model/resolve/main/config.json") and timeout <= 5
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in run("inspect", "nobody/no-such-model").stderr and len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "/no/such/directory"), 1, "not a directory or hub id"),
        (("inspect", "a/path/of/three"), 1, "there is no such directory"),
        (("convert", f"{HERE}:build", "--out", "x", "--max-length", "8"), 2, "--calibrate"),
        (("inspect", "timm:no_such_model"), 1, "no_such_model"),
        (("inspect", "no_such_module:build"), 1, "no module 'no_such_module'"),
        (("inspect", f"{HERE}:nothing"), 1, "has no 'nothing'"),
        (("inspect", f"{HERE}:inputs"), 1, "not a torch.nn.Module"),
        (("inspect", f"{HERE}:fail"), 1, "broken [bold]on purpose[/bold]"),
        (("inspect", f"{HERE}:build_without_attention", "--example", f"{HERE}:inputs"), 1, "no softmax attention"),
        (("convert", f"{HERE}:build_without_attention", "--example", f"{HERE}:inputs", "--out", "x"), 1, "no softmax"),
        (("convert", f"{HERE}:build", "--out", "x", "--qk-norm", "other"), 2, "--qk-norm must be 'rms' or"),
        (("convert", f"{HERE}:build", "--out", "x", "--row-cap", "-1"), 2, "--row-cap must be a positive"),
        (("convert", f"{HERE}:build", "--out", "x", "--layer-scale", "inf"), 2, "--layer-scale must"),
        (("convert", f"{HERE}:build", "--out", "x", "--bias", "-3"), 2, "--bias=-3: an int is a number of keys"),
        (("convert", f"{HERE}:build", "--out", "x", "--bias", "other"), 2, "--bias must be 'visible'"),
        (
            ("convert", f"{HERE}:build", "--example", f"{HERE}:inputs", "--out", "x", "--remote-code"),
            1,
            "--remote-code is for transformers models only",
        ),
        (("convert", f"{HERE}:build"), 2, "--out"),
        (("convert", f"{HERE}:build", "--out", "x", "--pretrained"), 2, "timm:NAME"),
        (("no-such-command",), 2, "no-such-command"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("inspect", "build"), "Pass --example MODULE:FUNCTION"),
        (("inspect", "build", "--compile"), "Pass --example MODULE:FUNCTION"),
        (("inspect", "build", "--example", f"{HERE}:empty_inputs"), "What --example returns is an empty list"),
        (("inspect", "build", "--example", f"{HERE}:wrong_inputs"), "Pass --example MODULE:FUNCTION"),
        (("inspect", "build", "--example", f"{HERE}:wrong_inputs", "--compile"), "Pass --example MODULE:FUNCTION"),
        (("inspect", "build", "--example", f"{HERE}:no_inputs"), "no_inputs' returned None"),
        (("inspect", "build", "--example", f"{HERE}:HERE"), "HERE' is a str"),
        (("inspect", "build", "--example", f"{HERE}:inputs", "--include", "x"), "--include: 'x'"),
        (("convert", "build", "--exclude", "*"), "--include GLOB and --exclude GLOB leave none"),
        (("convert", "build_renormalised"), "Pass --no-strict to leave them as softmax, or --exclude GLOB"),
        (("convert", "build_summed", "--query-bias"), "--query-bias needs"),
        (
            ("convert", "build_summed", "--query-bias"),
            "Leave it out, or switch it off for this module with overrides, in Python",
        ),
        (
            ("convert", "build_another_each_time"),
            "build_another_each_time' builds another model than this one: built is of shape",
        ),
        (("convert", "build", "--no-learn-bias", "--calibrate", "none"), "Convert with --learn-bias, or --query-bias"),
        (("convert", "build", "--calibrate", "none"), "Pass a file to --calibrate"),
    ],
)
def test_errors_name_options(tmp_path: Path, arguments: tuple[str, ...], option: str) -> None:
    """Not the arguments of the functions that the command calls."""
    command, model, *others = arguments
    if command == "convert":
        others += ["--out", str(tmp_path / "out"), "--example", f"{HERE}:inputs"]
    result = run(command, f"{HERE}:{model}", *others)
    message = " ".join(result.stderr.split())
    assert result.exit_code == 1 and option in message, message
    for name in ("example_inputs", "strict=", "exclude=", "factory=", "learn_bias", "query_bias", "overrides="):
        assert name not in message


def test_errors_about_batches_name_the_option_of_the_command(tmp_path: Path) -> None:
    """``--data`` of calibrate and ``--example`` of compare, neither of which has ``--calibrate``."""
    run("convert", f"{HERE}:build", "--out", tmp_path / "out", "--example", f"{HERE}:inputs")
    calls = {
        "Pass a file to --data,": ("calibrate", tmp_path / "out", "--out", tmp_path / "again", "--data", "none"),
        "Pass --example MODULE:FUNCTION,": ("compare", tmp_path / "out", f"{HERE}:build"),
    }
    for hint, call in calls.items():
        result = run(*call, "--allow-code")
        message = " ".join(result.stderr.split())
        assert result.exit_code == 1 and hint in message, message
        assert "--calibrate" not in message


def test_a_converted_directory_is_not_converted_again(tmp_path: Path) -> None:
    example = ("--example", f"{HERE}:inputs")
    run("convert", f"{HERE}:build", "--out", tmp_path / "out", *example)
    result = run("convert", tmp_path / "out", "--out", tmp_path / "again", *example)
    assert result.exit_code == 1 and "convert the original" in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = run("inspect", f"{HERE}:fail", "--debug")
    assert isinstance(result.exception, RuntimeError)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run("inspect", "timm:test_vit")
    assert result.exit_code == 1 and "pip install 'sigswap[vision]'" in result.stderr


def test_installed_command(tmp_path: Path) -> None:
    """From a shell, with a function in a file of the current directory."""
    (tmp_path / "mymodels.py").write_text(Path(__file__).read_text())
    command = [sys.executable, "-c", "from sigswap.commands.cli import main; main()"]
    result = subprocess.run(
        [*command, "inspect", "mymodels:build", "--example", "mymodels:inputs", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sites"][0]["status"] == "swappable"
