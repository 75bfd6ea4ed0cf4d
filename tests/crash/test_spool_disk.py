"""A disk that fills up: refused and counted, no SIGBUS, no exception out of log(), and on again when there is room.

Pattern: a tmpfs of a few megabytes, or a limit on file sizes, under a writer in a process of its own. Limit: a minute a
test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.spool.pens import TEXT, drain

CHILD = """
import pathlib, sys, time
from tests.unit.spool.pens import TEXT, end, pen, until
from tracelet.errors import SpoolFull
from tracelet.guard import guard
folder, mapped, ballast = pathlib.Path(sys.argv[1]), sys.argv[2] == "True", pathlib.Path(sys.argv[3])
writer = pen(folder, slots_per_segment=2048, mapped=mapped)
writer.log("a", 0.0, 0)
writer.frame(TEXT, b"first", 1)
i = 0
while writer.counts().refused < 1000:
    i += 1
    writer.log("a", i / 2, i)
    assert i < 3_000_000
try:
    writer.frame(TEXT, bytes(1_000_000), 1)
except SpoolFull:
    pass
else:
    raise SystemExit("a frame had room where a point had none")
if ballast.exists():
    ballast.unlink()
    refused = writer.counts().refused
    def back():
        before = writer.counts().points
        writer.log("b", 1.0, 1)
        return writer.counts().points > before
    until(back)
    writer.frame(TEXT, b"again", 1)
end(writer)
counts = writer.counts()
assert guard.counts["write a point"] >= 1, guard.counts
print(counts.points, counts.refused)
"""


def run(folder: Path, mapped: bool, ballast: Path) -> tuple[int, int]:
    command = [sys.executable, "-c", CHILD, str(folder), str(mapped), str(ballast)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "points are not recorded" in done.stderr
    assert done.stderr.count("points are not recorded") == 1  # once a minute
    points, refused = map(int, done.stdout.split())
    return points, refused


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root with CAP_SYS_ADMIN")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "appended"])
def test_a_full_disk_refuses_and_takes_up_again_when_there_is_room(small_disk: Path, mapped: bool) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_200_000))
    points, refused = run(small_disk / "run", mapped, ballast)
    assert refused >= 1000
    (story,) = drain(small_disk / "run", dead=True).values()
    assert len(story.points) == points
    logged = [i for name, _, i in story.points if name == "a"]
    assert logged == list(range(len(logged)))
    assert ("b", 1.0, 1) in story.points
    assert [payload for kind, payload in story.frames if kind == TEXT] == [b"first", b"again"]
    assert not story.damaged
    assert story.ended


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "appended"])
def test_a_limit_on_file_sizes_refuses(tmp_path: Path, mapped: bool) -> None:
    # A segment of 2048 slots has 69,632 bytes: it can't be allocated, or grows until it meets the limit.
    folder = tmp_path / "run"
    script = CHILD.replace('writer.log("a", 0.0, 0)\nwriter.frame(TEXT, b"first", 1)\n', "")
    script = script.replace("end(writer)\n", "")
    command = [
        "prlimit",
        "--fsize=60000",
        sys.executable,
        "-c",
        script,
        str(folder),
        str(mapped),
        str(tmp_path / "none"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    points, refused = map(int, done.stdout.split())
    assert refused >= 1000
    assert (points > 0) != mapped
    assert sum(len(story.points) for story in drain(folder, dead=True).values()) == points


FRAMES = """
import pathlib, sys
from tests.unit.spool.pens import TEXT, end, pen
writer = pen(pathlib.Path(sys.argv[1]), slots_per_segment=128, mapped=sys.argv[2] == "True")
for i in range(30):
    writer.frame(TEXT, bytes([i]) * 100_000, 1)
end(writer)
"""


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "appended"])
def test_frames_that_meet_a_limit_on_file_sizes_go_on_in_another_file(tmp_path: Path, mapped: bool) -> None:
    folder = tmp_path / "run"
    command = ["prlimit", "--fsize=1000000", sys.executable, "-c", FRAMES, str(folder), str(mapped)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (story,) = drain(folder).values()
    assert [payload[0] for kind, payload in story.frames if kind == TEXT] == list(range(30))
    assert len(list(folder.glob("*.frames"))) == 4
    assert not story.damaged
    assert story.ended
