"""scripts/system_packages.sh: what it has installed is what the tests start."""

from __future__ import annotations

import re

from tests.crash.disks import PACKAGES
from tests.stack.harness import REPOSITORY

ASKED = re.compile(r'system_program\("([\w.-]+)"\)')


def test_every_program_that_a_test_starts_is_among_those_that_are_looked_for() -> None:
    script = (REPOSITORY / "scripts" / "system_packages.sh").read_text()
    wanted = dict(line.split() for line in script.split('wanted="')[1].split('"')[0].split("\n") if line)
    asked = {name for path in (REPOSITORY / "tests").rglob("*.py") for name in ASKED.findall(path.read_text())}
    assert {"sshd", "unshare"} <= asked
    assert asked <= set(wanted)
    assert PACKAGES.items() <= wanted.items()
