"""Whatever command a message, a page or an example tells a person to type can be typed."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from tracelet.cli.main import COMMANDS, parser

ROOT = Path(__file__).parents[2]
SOURCES = [*(ROOT / "tracelet").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def options(name: str) -> set[str]:
    return {option for action in commands()[name]._actions for option in action.option_strings}


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_line_that_is_named_exists(path: Path) -> None:
    for words in re.findall(
        r"(?:`|: |\$ |^)tracelet ((?:runs|show|ship|prune|doctor|gateway)[^`\n]*)", path.read_text(), re.M
    ):
        name = words.split()[0].strip("\"'.,;:)")
        for option in re.findall(r"(?<=\s)--[a-z-]+", words):
            assert option in options(name), f"{path}: tracelet {words}"


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_the_examples_of_a_command_can_be_parsed(module: object) -> None:
    examples: str = module.EXAMPLES  # type: ignore[attr-defined]
    assert examples
    for line in examples.splitlines():
        words = shlex.split(line.partition(" | ")[0])
        while "=" in words[0]:
            words.pop(0)
        assert words[0] == "tracelet"
        parser().parse_args(words[1:])


def test_every_command_says_what_it_does_and_every_option_what_it_is_for() -> None:
    for name, command in commands().items():
        assert command.description, name
        for action in command._actions:
            assert action.help, f"tracelet {name} {action.dest}"
