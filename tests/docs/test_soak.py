"""docs/explanation/soak.md: made from what pytest says of a run."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from scripts import soak

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


def made(folder: Path) -> str:
    """The page of a real run of four small tests, one of which fails and one of which can't run."""
    (folder / "test_small.py").write_text(SMALL)
    junit = folder / "junit.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--junitxml={junit}",
        "-o",
        "junit_family=xunit1",
        "test_small.py",
    ]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1
    when = datetime(2026, 3, 1, tzinfo=UTC)
    return soak.page(soak.rows(junit), when=when, seconds=125.0, what="commit `abc`", where="2 cores")


def test_the_page_adds_up_what_the_cases_of_a_test_counted_and_hides_no_failure(tmp_path: Path) -> None:
    page = made(tmp_path)
    assert "| when | 2026-03-01, 2:05 min |" in page
    assert "| result | 3 tests passed, 1 failed, 1 were not run |" in page
    assert "| `test_small.py::test_counts` | 50 kills, 30 most MiB | 0:00 | held |" in page
    assert "| `test_small.py::test_falls` | 1 cases | 0:00 | **1 of 1 failed** |" in page
    assert "test_is_short" not in page
    assert "what they need: `test_small.py::test_lacks_something`." in page
