"""Every public name, setting, command and error is documented, and the pages name none that doesn't exist."""

from __future__ import annotations

import argparse
import doctest
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tracelet
from tests.docs.page import blocks_of
from tracelet import errors
from tracelet.cli.main import EXIT_CODES, parser
from tracelet.core.experiment import Experiment, ExperimentConfig
from tracelet.gateway.options import is_known
from tracelet.settings import READ_ELSEWHERE, SETTINGS

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT): path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
REFERENCE = "\n".join(text for path, text in PAGES.items() if "reference" in path.parts)
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "tracelet").rglob("*.py")
    if path.name != "__main__.py"
)


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices)


@pytest.mark.parametrize("name", tracelet.__all__)
def test_every_public_name_stands_in_the_reference(name: str) -> None:
    if name == "__version__":
        return
    home = tracelet._HOME[name]
    directives = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
    assert f"tracelet.{home}.{name}" in directives or f"tracelet.{home}" in directives


@pytest.mark.parametrize("cls", [Experiment, ExperimentConfig])
def test_every_public_method_has_a_docstring(cls: type) -> None:
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(member), f"{cls.__name__}.{name}"


def test_what_pages_take_from_the_code_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "reference_pages.py"), "--check"], cwd=ROOT, check=False
    )
    assert done.returncode == 0, "run scripts/reference_pages.py"


def test_no_page_names_a_setting_that_does_not_exist() -> None:
    known = {setting.env for setting in SETTINGS} | READ_ELSEWHERE
    for path, text in PAGES.items():
        unknown = set(re.findall(r"\bTRACELET_[A-Z_]+\b", text)) - known - {"TRACELET_GATEWAY_"}
        unknown = {name for name in unknown if not is_known(name)}
        assert not unknown, f"{path}: {unknown}"


def test_no_module_but_settings_knows_a_variable_that_is_not_in_the_table() -> None:
    known = {setting.env for setting in SETTINGS} | READ_ELSEWHERE
    for path in (ROOT / "tracelet").rglob("*.py"):
        unknown = set(re.findall(r"\bTRACELET_[A-Z][A-Z_]*[A-Z]\b", path.read_text())) - known - {"TRACELET_GATEWAY"}
        unknown = {name for name in unknown if not is_known(name)}
        assert not unknown, f"{path}: {unknown}"


def test_every_command_and_every_option_stands_in_the_reference() -> None:
    page = PAGES[Path("docs/reference/commands.md")]
    for name, command in commands().items():
        assert f"## tracelet {name}" in page
        for option in (option for action in command._actions for option in action.option_strings):
            assert option in page, f"tracelet {name} {option}"
    for code in EXIT_CODES:
        assert f"| {code} |" in page


def test_no_page_names_a_command_that_does_not_exist() -> None:
    for path, text in PAGES.items():
        shell = "\n".join(block.code for block in blocks_of(text) if block.language in {"bash", "console"})
        named = re.findall(r"^(?:\$ )?tracelet ([a-z]+)", shell, re.MULTILINE) + re.findall(r"`tracelet ([a-z]+)", text)
        assert set(named) <= set(commands()), path


def test_every_error_stands_in_the_reference() -> None:
    page = PAGES[Path("docs/reference/errors.md")]
    for name in errors.__all__:
        assert name in page
        assert inspect.getdoc(getattr(errors, name))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    names: dict[str, object] = {}
    if name in {"tracelet.core.experiment", "tracelet.core.run", "tracelet.core.delivery"}:
        (tmp_path / "model.bin").write_bytes(os.urandom(16))
        names["exp"] = Experiment("docstrings", project="docs", backend="file").start()
    # Not doctest.testmod: it would skip what `__wrapped__` hides, and share one namespace with the module.
    failed = 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=names):
        failed += runner.run(test).failed
    tracelet.stop_logging()
    experiment = names.get("exp")
    if isinstance(experiment, Experiment):
        experiment.stop()
    assert failed == 0
