"""Runs the crash, damage and fuzz tests at full length, and writes down what they did: docs/explanation/soak.md.

`make soak` is this. `make soak ARGS='tests/crash -k volume'` runs only those tests; other rows stay as they are.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "soak.md"
FOLDERS = ("tests/crash", "tests/property", "tests/fuzz")
LONG_S = 20.0  # a test that takes less, and counts nothing, has no row of its own
HEAD = """\
# The last long runs

The tests behind [What survives what](durability.md) that can go on for longer, at full length. This page is what the
command made of them:

```sh
make soak
```

It takes some two hours on two cores. With a part of the tests, as in `make soak ARGS=tests/crash/test_kills.py`, it
makes their rows anew. A row stands for all cases of a test that counted something, or that took 20 s; shorter ones that
failed have a row, too. How long it took is in minutes.

"""
TABLE = "| test | what it did | min | result | when, and on what |\n|---|---|---|---|---|\n"
ROW = re.compile(r"\| `(tests/[\w/]+\.py::\w+)` \|.*")


@dataclass
class Row:
    """What one test function did, over all of its cases."""

    test: str
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
            if one.get("name") == "seed":  # for who runs a case that failed once more
                continue
            name, value = str(one.get("name")), int(str(one.get("value")))
            before = self.counted[name]
            self.counted[name] = max(before, value) if name.startswith("most ") else before + value

    @property
    def counts(self) -> bool:
        """Whether it is of those that this page is about."""
        return bool(self.failed or (self.skipped < self.cases and (self.counted or self.seconds >= LONG_S)))

    def line(self, made: str) -> str:
        """The row of the table."""
        did = ", ".join(
            f"at most {value:,} {name[5:]}" if name.startswith("most ") else f"{value:,} {name}"
            for name, value in self.counted.items()
        )
        did = did or ("1 case" if self.cases == 1 else f"{self.cases} cases")
        result = f"**{self.failed} of {self.cases} failed**" if self.failed else "held"
        minutes = f"{int(self.seconds) // 60}:{int(self.seconds) % 60:02}"
        return f"| `{self.test}` | {did} | {minutes} | {result} | {made} |"


def rows(junit: Path) -> list[Row]:
    """A row for each test function of a run, in the order in which they ran."""
    found: dict[str, Row] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = str(case.get("name")).partition("[")[0]
        test = f"{str(case.get('classname')).replace('.', '/')}.py::{name}"
        found.setdefault(test, Row(test)).add(case)
    return list(found.values())


def page(before: str, found: Iterable[Row], made: str) -> str:
    """The page as it was, with the rows of the tests that have run made anew."""
    lines = {match[1]: match[0] for match in map(ROW.fullmatch, before.splitlines()) if match}
    for row in found:
        lines.pop(row.test, None)
        if row.counts:
            lines[row.test] = row.line(made)
    return HEAD + TABLE + "".join(f"{lines[test]}\n" for test in sorted(lines))


def made_of(when: datetime) -> str:
    """The day, the commit, and the machine."""
    git = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    where = f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release().split('-')[0]}"
    return f"{when:%Y-%m-%d}, {done.stdout.strip() or 'no git'}, Python {platform.python_version()}, {where}"


def main(arguments: list[str]) -> int:
    """Run, show what runs, write the page; pytest's exit code."""
    with tempfile.TemporaryDirectory() as place:
        junit = Path(place) / "junit.xml"
        made = made_of(datetime.now(UTC))
        command = [sys.executable, "-m", "pytest", "-v", f"--junitxml={junit}"]
        done = subprocess.run(
            [*command, *(arguments or FOLDERS)], cwd=ROOT, env=os.environ | {"TRACELET_SOAK": "1"}, check=False
        )
        if junit.exists():
            before = PAGE.read_text() if PAGE.exists() else ""
            PAGE.write_text(page(before, rows(junit), made))
            print(f"{PAGE.relative_to(ROOT)} says what this was.")
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
