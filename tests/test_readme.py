"""What the README tells a newcomer to type works."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from mor.cli import COMMANDS, main
from mor.train.config import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:^    .*\n)+", README, flags=re.MULTILINE)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]


def test_readme_opens_with_the_two_commands():
    commands = [line for line in LINES if line]
    assert commands[:2] == ["make demo", "make test"]
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("demo", "test", "setup"):
        assert re.search(rf"^{command}:", targets, flags=re.MULTILINE)


def test_files_that_the_readme_names_are_there():
    for name in re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (ROOT / name).exists(), name


TRAININGS = [path for path in ROOT.glob("recipes/*.toml") if not path.stem.startswith("uptrain")]


@pytest.mark.parametrize("recipe", sorted(TRAININGS), ids=lambda path: path.stem)
def test_recipes_load_and_open_with_their_purpose(recipe):
    load_recipe(recipe)
    assert recipe.read_text(encoding="utf-8").startswith("# ")


def test_the_commands_for_an_own_model_run(tmp_path, monkeypatch, capsys):
    """The block is run as written, on little text and for few steps."""
    texts = tmp_path / "TEXTS"
    texts.mkdir()
    for source in sorted((ROOT / "mor" / "model").glob("*.py")):
        (texts / source.name).write_text(source.read_text(encoding="utf-8") * 6, encoding="utf-8")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    shorter = {
        "prepare": "--vocab-size 400 --max-document-bytes 2000 --val-fraction 0.2"
        " --heldout-fraction 0.2",
        "train": "--train.budget-tokens 2048 --train.batch-tokens 1024 --train.context 128"
        " --train.eval-tokens 512",
        "eval": "--limit-tokens 512 --context 128",
        "generate": "--max-tokens 4",
        "chat": "--max-tokens 4",
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is a row?\n"))
    commands = [shlex.split(line)[1:] for line in LINES if line.startswith("mor ")]
    names = ["prepare", "plan", "train", "eval", "generate", "chat"]
    later = [command[0] for command in commands[len(names) :]]
    assert [command[0] for command in commands[: len(names)]] == names
    assert later == ["uptrain", "chat", "serve"]  # of a parent that is not here
    for command in commands[: len(names)]:
        assert command[0] in COMMANDS
        assert main([*command, *shlex.split(shorter.get(command[0], ""))]) == 0, command
    assert capsys.readouterr().out
