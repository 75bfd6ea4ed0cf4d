"""Processes killed between making a file and naming it: the next shipper deletes what is left, and no living one's.

Pattern: a real program, or a real shipper, kills (or stops) itself in the rename of one kind of file; then the real
`tracelet ship`. Limit: 60 s a process.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.test_disk_full import delivered
from tests.programs import said, started, written
from tests.shipping import until
from tracelet.spool import store
from tracelet.spool.leftovers import UNBORN_S

AT_RENAME = """
import os, re, signal, sys
def rename(before, after, rename=os.rename):
    if re.fullmatch(sys.argv[1], os.path.basename(before)):
        os.kill(os.getpid(), int(sys.argv[2]))
    rename(before, after)
os.rename = rename
"""
TRAIN = (
    AT_RENAME
    + """
import tracelet
exp = tracelet.start_logging(exp_name="left", project="p", run_id="left", backend=tracelet.File(sys.argv[3]))
for i in range(int(sys.argv[4])):
    exp.log_metric("loss", float(i), iteration=i)
print("logged", flush=True)
if sys.argv[5:] == ["wait"]:
    sys.stdin.readline()
exp.stop()
"""
)
SHIP = (
    AT_RENAME
    + """
import threading
import tracelet.spool.cursor as cursor
from tracelet.shipper.process import main
cursor._COMPACT_AT, cursor._COMPACT_RATIO = 1, 0
sys.exit(main(sys.argv[3:]))
"""
)
NEVER = "nothing"


@pytest.fixture
def folder(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACELET_SHIPPER", "off")
    return store.run_folder(clean_environment, "left")


def train(tmp_path: Path, at: str, points: int, number: int = signal.SIGKILL) -> int:
    words = [
        sys.executable,
        str(written(tmp_path, TRAIN)),
        at,
        str(int(number)),
        str(tmp_path / "out.jsonl"),
        str(points),
    ]
    return subprocess.run(words, cwd=tmp_path, timeout=60, check=False, stdout=subprocess.DEVNULL).returncode


def shipped(folder: Path) -> None:
    """By the real command, which leaves with 0."""
    words = [sys.executable, "-m", "tracelet", "ship", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def aged(folder: Path) -> None:
    """Make what is hidden a little older than what a writer may need to be born."""
    then = time.time() - UNBORN_S - 1
    for name in hidden(folder):
        os.utime(folder / name, (then, then))


@pytest.mark.parametrize(
    ("at", "points"),
    [
        (r"\.manifest\.json\..*", 0),
        (r"\.manifest\.copy\.json\..*", 0),
        (r"\.[0-9a-f]{16}\.lock", 0),
    ],
)
def test_what_a_program_was_killed_over_goes_and_nothing_else(
    tmp_path: Path, folder: Path, at: str, points: int
) -> None:
    assert train(tmp_path, NEVER, 70_000) == 0
    for _ in range(3):
        assert train(tmp_path, at, 100) == -signal.SIGKILL
    left = hidden(folder)
    assert len(left) == 3
    assert all(re.fullmatch(at, name) for name in left)
    aged(folder)
    shipped(folder)
    assert hidden(folder) == []
    # Of the dead starts, whose calls never returned, nothing is left that a reader could find.
    (writer,) = [path.name[:16] for path in folder.glob("????????????????.lock")]
    assert {path.name[:16] for path in folder.rglob("*.points")} == {writer}
    arrived = delivered(tmp_path / "out.jsonl")
    assert len(arrived) == len(set(arrived)) == 70_000


@pytest.mark.parametrize(
    "at",
    [
        r"\.lease\.json\..*",
        r"\.[0-9a-f]{16}-\d{6}\.seal\..*",
        r"\.spare-\d\.points\..*",
        r"\.journal-file-[0-9a-f]{8}\.\d+",
        r"\.journal-file-[0-9a-f]{8}\.copy\..*",
    ],
)
def test_what_a_shipper_was_killed_over_goes_and_everything_arrives_once(tmp_path: Path, folder: Path, at: str) -> None:
    with training(tmp_path, 70_000) as program:
        script = written(tmp_path, SHIP, "ship.py")
        words = [sys.executable, str(script), at, str(int(signal.SIGKILL)), str(folder)]
        for _ in range(2):
            killed = subprocess.run(
                words, cwd=tmp_path, timeout=60, check=False, stdin=subprocess.DEVNULL, capture_output=True
            )
            assert killed.returncode == -signal.SIGKILL, killed.stderr
        left = hidden(folder)
        assert left
        assert all(re.fullmatch(at, name) for name in left)
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.close()
        assert program.wait(60) == 0
    shipped(folder)
    assert hidden(folder) == []
    arrived = delivered(tmp_path / "out.jsonl")
    assert len(arrived) == len(set(arrived)) == 70_000


@contextmanager
def training(tmp_path: Path, points: int) -> Iterator[subprocess.Popen[str]]:
    """A program that has logged, and waits for a line."""
    with started(tmp_path, TRAIN, NEVER, "9", tmp_path / "out.jsonl", points, "wait") as program:
        assert said(program) == "logged"
        yield program


def test_a_writer_that_is_stopped_before_it_appears_loses_nothing_to_a_shipper(tmp_path: Path, folder: Path) -> None:
    assert train(tmp_path, NEVER, 100) == 0
    with started(tmp_path, TRAIN, r"\.[0-9a-f]{16}\.lock", int(signal.SIGSTOP), tmp_path / "out.jsonl", 200) as program:
        stat = Path(f"/proc/{program.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 60)
        (lock,) = hidden(folder)
        aged(folder)
        subprocess.run([sys.executable, "-m", "tracelet", "ship", str(folder)], timeout=60, check=False)
        assert hidden(folder) == [lock]
        program.send_signal(signal.SIGCONT)
        assert program.wait(60) == 0
    shipped(folder)
    assert hidden(folder) == []
    arrived = delivered(tmp_path / "out.jsonl")
    assert len(arrived) == 300
