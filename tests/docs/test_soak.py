"""docs/explanation/soak.md: made from what pytest says of a run, of tests that are still there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from scripts import soak
from tests.docs.test_durability import REFERENCE, functions_of

SMALL = """
import pytest

@pytest.mark.parametrize("case", [20, 30])
def test_counts(case, record_property):
    record_property("kills", case)
    record_property("most MiB", case)

def test_falls():
    assert False

def test_is_short():
    pass

def test_lacks_something():
    pytest.skip("no such program")
"""


def run(folder: Path, *arguments: str) -> list[soak.Row]:
    """The rows of a real run of four small tests, one of which fails and one of which can't run."""
    tests = folder / "tests"
    tests.mkdir(exist_ok=True)
    (tests / "test_small.py").write_text(SMALL)
    junit = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "-o", "junit_family=xunit1", *arguments]
    done = subprocess.run([*command, "tests"], cwd=folder, capture_output=True, check=False)
    assert done.returncode in (0, 1), done.stdout
    return soak.rows(junit)


def test_the_page_adds_up_what_the_cases_of_a_test_counted_and_hides_no_failure(tmp_path: Path) -> None:
    page = soak.page("", run(tmp_path), "today")
    assert "| `tests/test_small.py::test_counts` | 50 kills, at most 30 MiB | 0:00 | held | today |" in page
    assert "| `tests/test_small.py::test_falls` | 1 case | 0:00 | **1 of 1 failed** | today |" in page
    assert "test_is_short" not in page
    assert "test_lacks_something" not in page


def test_a_run_of_a_part_leaves_the_rows_of_the_others_as_they_were(tmp_path: Path) -> None:
    before = soak.page("", run(tmp_path), "yesterday")
    after = soak.page(before, run(tmp_path, "-k", "counts"), "today")
    assert after == before.replace("held | yesterday", "held | today")


def test_the_page_kept_here_is_of_runs_in_which_all_held_and_its_tests_are_there() -> None:
    page = soak.PAGE.read_text()
    assert page == soak.page(page, [], "")
    lines = [line for line in page.splitlines() if soak.ROW.fullmatch(line)]
    assert len(lines) > 5
    for line in lines:
        ((path, name),) = REFERENCE.findall(line)
        assert name in functions_of(path), f"{path} has no {name}"
        assert re.search(r"\| \d+:\d\d \| held \| \d{4}-\d\d-\d\d, [0-9a-f]{7,}, Python ", line), line
