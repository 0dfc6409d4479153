"""The commands in the shell blocks of the README, CONTRIBUTING and docs/ have the options that they are shown with."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from sigswap.commands.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^sigswap (\w+)(.*?)(?:  #.*)?$", re.MULTILINE)
EXAMPLE = re.compile(r"^python (examples/\w+\.py)(.*?)(?:  #.*)?$", re.MULTILINE)


def shown(pattern: re.Pattern[str]) -> list[tuple[str, list[str]]]:
    """What the pattern names in the pages' shell blocks, with the options beside it."""
    texts = (page.read_text(encoding="utf-8") for page in PAGES)
    blocks = "\n".join(block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    return [(name, re.findall(r"--[\w-]+", rest)) for name, rest in pattern.findall(blocks)]


def app_commands() -> set[str]:
    return {str(each.name or each.callback.__name__) for each in app.registered_commands if each.callback}


def test_commands_have_these_options() -> None:
    commands = shown(COMMAND)
    assert {command for command, _ in commands} == app_commands()
    for command, options in commands:
        done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        assert [option for option in options if option not in done.output] == [], command


def test_examples_have_these_options() -> None:
    examples = shown(EXAMPLE)
    assert {example for example, _ in examples} >= {
        f"examples/{name}.py" for name in ("minilm", "digits_vit", "decoder")
    }
    for example, options in examples:
        source = (ROOT / example).read_text(encoding="utf-8")
        assert [option for option in options if f'"{option}"' not in source] == [], example
