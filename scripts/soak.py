"""Runs the crash, damage and fuzz tests at full length, and writes down what they did: docs/explanation/soak.md.

`make soak` is this. With arguments (`make soak ARGS='-k volume'`) it is only those tests, and no page.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "soak.md"
FOLDERS = ("tests/crash", "tests/property", "tests/fuzz")
LONG_S = 20.0  # a test that takes less, and counts nothing, has no row of its own


@dataclass
class Row:
    """What one test function did, over all of its cases."""

    path: str
    name: str
    cases: int = 0
    seconds: float = 0.0
    failed: int = 0
    skipped: int = 0
    counted: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, case: ElementTree.Element) -> None:
        """One case, as pytest's JUnit file has it. What it recorded is added up; of `most ...` the largest stands."""
        self.cases += 1
        self.seconds += float(case.get("time", "0"))
        self.failed += case.find("failure") is not None or case.find("error") is not None
        self.skipped += case.find("skipped") is not None
        for one in case.iterfind("properties/property"):
            name, value = str(one.get("name")), int(str(one.get("value")))
            self.counted[name] = (
                max(self.counted[name], value) if name.startswith("most ") else self.counted[name] + value
            )

    @property
    def result(self) -> str:
        """In a word, for the table."""
        if self.failed:
            return f"**{self.failed} of {self.cases} failed**"
        return "not run" if self.skipped == self.cases else "held"


def rows(junit: Path) -> list[Row]:
    """A row for each test function of a run, in the order in which they ran."""
    found: dict[tuple[str, str], Row] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        path = f"{str(case.get('classname')).replace('.', '/')}.py"
        name = str(case.get("name")).partition("[")[0]
        found.setdefault((path, name), Row(path, name)).add(case)
    return list(found.values())


def minutes(seconds: float) -> str:
    """`4:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def page(found: list[Row], *, when: datetime, seconds: float, what: str, where: str) -> str:
    """The page, from what has run."""
    return "\n".join(_lines(found, when, seconds, what, where)) + "\n"


def _lines(found: list[Row], when: datetime, seconds: float, what: str, where: str) -> Iterator[str]:
    failed = sum(row.failed for row in found)
    cases, skipped = sum(row.cases for row in found), sum(row.skipped for row in found)
    yield "# The last long run"
    yield ""
    yield "The tests behind [What survives what](durability.md) that can go on for longer, at full length. This page is"
    yield "what the command made of its last run:"
    yield ""
    yield "```sh"
    yield "make soak"
    yield "```"
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| when | {when:%Y-%m-%d}, {minutes(seconds)} min |"
    yield f"| what | {what} |"
    yield f"| where | {where} |"
    yield f"| result | {cases - failed - skipped} tests passed, {failed} failed, {skipped} were not run |"
    yield ""
    yield f"Tests that counted something or took {LONG_S:.0f} s and more (cases added up):"
    yield ""
    yield "| test | what it did | min | result |"
    yield "|---|---|---|---|"
    for row in found:
        if row.failed or (not row.skipped and (row.counted or row.seconds >= LONG_S)):
            did = ", ".join(f"{value:,} {name}" for name, value in row.counted.items()) or f"{row.cases} cases"
            yield f"| `{row.path}::{row.name}` | {did} | {minutes(row.seconds)} | {row.result} |"
    unrun = [row for row in found if row.skipped]
    if unrun:
        yield ""
        yield (
            "Not run, because the machine lacks what they need: "
            + ", ".join(f"`{r.path}::{r.name}`" for r in unrun)
            + "."
        )


def version() -> str:
    """The commit that ran, and what stands beside it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    commit = done.stdout.strip() or "(no git)"
    return f"commit `{commit}`, Python {platform.python_version()}"


def machine() -> str:
    """Cores, memory and kernel."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.release().split('-')[0]}"


def main(arguments: list[str]) -> int:
    """Run, show what runs, write the page; pytest's exit code."""
    with tempfile.TemporaryDirectory() as place:
        junit = Path(place) / "junit.xml"
        words = arguments or FOLDERS
        began, when = time.monotonic(), datetime.now(UTC)
        command = [sys.executable, "-m", "pytest", "-v", f"--junitxml={junit}", "-o", "junit_family=xunit1", *words]
        code = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRACELET_SOAK": "1"}, check=False).returncode
        if arguments or not junit.exists():
            return code
        made = page(rows(junit), when=when, seconds=time.monotonic() - began, what=version(), where=machine())
        PAGE.write_text(made)
        print(f"{PAGE.relative_to(ROOT)} says what this was.")
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
