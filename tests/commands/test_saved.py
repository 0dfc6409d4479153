"""The commands on directories that sigswap saved, and how all of them end after Ctrl-C."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sigswap
from sigswap.commands.cli import app

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = "the cat saw a dog and ran from it then sat down by one old door where sun had not shone".split()
IDS = torch.arange(1, 13).view(2, 6) % 19 + 1


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A converted decoder, the tokenizer beside it; and the original in "original"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", *WORDS])}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, pad_token_id=0, **SMALL)).eval()
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    sigswap.convert(model, sigswap.SigmoidConfig(query_bias=True))
    sigswap.save(model, tmp_path / "saved", processor=tokenizer, remote_code=True)
    (tmp_path / "text.txt").write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(20)))
    return tmp_path / "saved"


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def test_report(saved: Path) -> None:
    result = run("report", saved, "--json")
    assert result.exit_code == 0, result.output
    assert [site["status"] for site in json.loads(result.stdout)["sites"]] == ["swapped"]
    assert run("report", saved.parent).exit_code == 1
    assert "self_attn" in run("report", saved, "--html", saved.parent / "page.html").stdout
    assert "model.layers.0.self_attn" in (saved.parent / "page.html").read_text()


def test_calibrate(saved: Path) -> None:
    again = saved.parent / "again"
    result = run("calibrate", saved, "--out", again, "--data", saved.parent / "text.txt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["calibration"]["heads"]
    assert (again / "tokenizer.json").is_file() and (again / "modeling_sigswap.py").is_file()
    ours, before = sigswap.load(again), sigswap.load(saved)
    softmax = out(transformers.AutoModelForCausalLM.from_pretrained(saved.parent / "original"))
    assert (out(ours) - softmax).square().sum() < (out(before) - softmax).square().sum()
    assert run("calibrate", saved, "--out", again, "--data", "none").exit_code == 1  # not empty
    assert "7 lookups" in run("report", again).stdout  # what the calibration saw


def test_distill(saved: Path) -> None:
    trained, text = saved.parent / "trained", saved.parent / "text.txt"
    options = ("--steps", 2, "--layerwise-steps", 1, "--length", 16, "--json")
    result = run("distill", saved, saved.parent / "original", "--out", trained, "--data", text,
                 *options, "--picture", saved.parent / "losses.svg")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [len(losses) for losses in (json.loads(result.stdout)[key] for key in ("layerwise", "end_to_end"))] == [1, 2]
    assert not torch.equal(out(sigswap.load(trained)), out(sigswap.load(saved)))
    assert (trained / "modeling_sigswap.py").is_file() and "<svg" in (saved.parent / "losses.svg").read_text()
    capless = run("distill", saved, saved.parent / "original", "--out", trained, "--force", "--data", text,
                  *options, "--lift-row-cap", 1)  # fmt: skip
    assert capless.exit_code == 1 and "cap" in capless.stderr  # no row of it is capped
    for wrong in (("--train", "some"), ("--lr", "-1"), ("--lift-row-cap", "nan")):
        refused = run("distill", "no-such-directory", "original", "--out", saved, "--data", text, *options, *wrong)
        assert refused.exit_code == 2 and f"{wrong[0]} must be" in refused.stderr


def test_revert(saved: Path) -> None:
    plain = saved.parent / "plain"
    result = run("revert", saved, "--out", plain)
    assert result.exit_code == 0 and "from_pretrained" in result.stdout, result.output
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    assert not sigswap.is_converted(model)
    assert torch.equal(out(model), out(transformers.AutoModelForCausalLM.from_pretrained(saved.parent / "original")))
    assert (plain / "tokenizer.json").is_file()


def test_revert_in_place_of_a_model_by_a_factory(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    load_model = pytest.importorskip("safetensors.torch").load_model
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    image = torch.randn(1, 3, *model.patch_embed.img_size)
    with torch.no_grad():
        before = model(image)
    sigswap.save(sigswap.convert(model), tmp_path / "vit")
    result = run("revert", tmp_path / "vit", "--out", tmp_path / "vit", "--force")
    assert result.exit_code == 0 and "load_model" in result.stdout, result.output
    assert [path.name for path in (tmp_path / "vit").iterdir()] == ["model.safetensors"]
    other: nn.Module = timm.create_model("test_vit", num_classes=3).eval()
    load_model(other, tmp_path / "vit" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(other(image), before)


@pytest.mark.parametrize("at", ["sigswap.load", "sigswap.calibrate", "sigswap.saving.checkpoint.save"])
def test_interrupted(at: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(at, interrupt)
    before = sorted(path.name for path in saved.parent.iterdir())
    result = run("calibrate", saved, "--out", saved.parent / "again", "--data", "none")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Interrupted." and "Traceback" not in result.output
    assert sorted(path.name for path in saved.parent.iterdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send to a process")
def test_ctrl_c(saved: Path) -> None:
    """Of a real process, while it trains."""
    program = "from sigswap.commands.cli import main; main()"
    state = saved.parent / "state"
    arguments = ("distill", saved, saved.parent / "original", "--out", saved.parent / "new", "--steps", "1000000")
    options = ("--data", saved.parent / "text.txt", "--length", "16", "--resume", state)
    command = [sys.executable, "-c", program, *map(str, (*arguments, *options))]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}, preexec_fn=heard
    )
    try:
        for _ in range(600):  # it has taken its first hundred steps then
            if state.exists() or process.poll() is not None:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "Interrupted." and "Traceback" not in stderr
    assert stdout == "" and not (saved.parent / "new").exists()
