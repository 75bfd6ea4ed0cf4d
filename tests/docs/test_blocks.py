"""Every block of the README and the docs does what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docs.page import RUN, Block, blocks_of, is_setup
from tracelet.settings import resolve

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNER = Path(__file__).with_name("page.py")


def blocks() -> list[tuple[str, Block]]:
    return [(str(page.relative_to(ROOT)), block) for page in PAGES for block in blocks_of(page.read_text())]


def has_something_to_run(page: Path) -> bool:
    return any(block.language in RUN and block.not_run is None for block in blocks_of(page.read_text()))


@pytest.mark.parametrize("page", [*filter(has_something_to_run, PAGES)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_in_order_and_print_what_stands_there(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(page)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_block_that_is_not_run_says_why() -> None:
    for page, block in blocks():
        if block.not_run is not None:
            assert len(block.not_run) > 10, f"{page}:{block.line}"


def test_every_make_word_on_a_page_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, block in blocks():
        if block.language in {"bash", "console"}:
            for word in re.findall(r"(?:^|[$&;] )make ([a-z]+)", block.code, re.MULTILINE):
                assert word in targets, f"{page}:{block.line}: make {word}"


def test_no_page_tells_a_reader_to_install_somebody_elses_package() -> None:
    for page in PAGES:
        for words in re.findall(r"(?:pip install|uv add|uv pip install|pipx install) ([^\n`]+)", page.read_text()):
            names = re.findall(r"\btracelet\b(?!-otel)[^\s\"']*", words)
            assert not names, f"{page}: {words}"


def test_toml_blocks_are_settings_that_exist(tmp_path: Path) -> None:
    checked = 0
    for _, block in blocks():
        if block.language == "toml":
            (tmp_path / "pyproject.toml").write_text(block.code)
            resolve({}, {}, environ={}, cwd=tmp_path, argv=["train.py"])
            checked += "tracelet" in tomllib.loads(block.code).get("tool", {})
    assert checked


def test_setup_lines_are_known_ones() -> None:
    assert is_setup('pip install "tracelet-otel[mlflow]"')
    assert not is_setup("tracelet runs")
