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


# What the page of promises says of the long runs, and more than the usual ones come to: at least so much of it.
HEADLINES = {
    "tests/crash/test_kills.py::test_all_that_was_acknowledged_outlives_a_kill_at_a_random_moment": (200, "kills"),
    "tests/crash/test_network.py::test_a_line_that_fails_in_every_way_again_and_again_loses_nothing": (1_000, "faults"),
    "tests/crash/test_threads.py::test_16_threads_with_names_rolls_and_slow_values_lose_and_mix_nothing": (
        1_000_000,
        "points",
    ),
    "tests/crash/test_volume.py::test_points_without_a_destination_are_all_there_and_take_no_memory": (
        10_000_000,
        "points",
    ),
    # 100,000 names, twelve and two times four values of each.
    "tests/crash/test_volume.py::test_very_many_names_arrive_and_memory_stays_where_it_is": (1_200_000, "points"),
    "tests/crash/test_volume.py::test_very_many_names_are_all_at_an_otlp_receiver_and_in_mlflow_once": (
        800_000,
        "points",
    ),
    "tests/fuzz/test_decoders.py::test_atheris_finds_nothing_in_a_minute": (2, "cases"),
    "tests/property/test_damage.py::test_one_damaged_file_costs_no_more_than_what_stood_in_its_damage": (
        10_000,
        "damaged folders",
    ),
}


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
    for line in lines:
        ((path, name),) = REFERENCE.findall(line)
        assert name in functions_of(path), f"{path} has no {name}"
        assert re.search(r"\| \d+:\d\d \| held \| \d{4}-\d\d-\d\d, [0-9a-f]{7,}, Python ", line), line


def test_the_page_kept_here_has_what_is_promised_of_the_long_runs_at_full_length() -> None:
    rows = {match[1]: match[0] for match in map(soak.ROW.fullmatch, soak.PAGE.read_text().splitlines()) if match}
    for test, (least, what) in HEADLINES.items():
        assert test in rows, f"no long run of {test}"
        (count,) = re.findall(rf"(?<![\d,])([\d,]+) {what}\b", rows[test].split("|")[2])
        assert int(count.replace(",", "")) >= least, rows[test]
