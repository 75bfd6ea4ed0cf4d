"""kill -9 at any moment: every point whose call had returned is read back.

Pattern: the child counts its returned calls in a mapped page that outlives it, and is killed at a random moment.
Limit: a minute a kill.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.spool.pens import ENDED, Story, drain, until
from tracelet.spool.lease import is_alive
from tracelet.spool.reader import SpoolReader

# The child tells how many of its calls have returned through a mapped page of its own, which outlives it as the
# spool's do; a pipe would slow it down to the pace of its reader.
CHILD = """
import mmap, os, pathlib, struct, sys, threading
from tests.unit.spool.pens import TEXT, pen
folder, page, mapped, forked = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4] == "True"
fd = os.open(page, os.O_RDWR)
shared = mmap.mmap(fd, 4096)
writer = pen(folder, slots_per_segment=512, mapped=mapped)
writer.log("a", 0.0, 0)
if forked and os.fork() == 0:
    writer.after_fork_in_child()
    writer.log("worker", 1.0, 1)
    struct.pack_into("<Q", shared, 64, 1)
    while True:
        threading.Event().wait(1)
log, told = writer.log, memoryview(shared).cast("Q")  # pack_into would write zeros first: a death may come between
i = 0
while True:
    i += 1
    log("a", i / 2, i)
    if i % 100 == 0:
        writer.frame(TEXT, b"%d" % i, 1)
        log(f"name {i}", 0.0, i)
    told[0] = i
"""


def killed(folder: Path, *, mapped: bool, after_s: float, forked: bool = False) -> tuple[int, Story, int]:
    page = folder / "page"
    page.write_bytes(bytes(4096))
    spool = folder / "spool"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(spool), str(page), str(mapped), str(forked)])
    worker = 0
    try:
        with open(page, "r+b") as file, mmap.mmap(file.fileno(), 4096) as shared:

            def acknowledged() -> int:
                return int(struct.unpack_from("Q", shared)[0])

            until(lambda: acknowledged() > 10 and (not forked or bool(shared[64])))
            if forked:
                worker = int(subprocess.check_output(["pgrep", "-P", str(child.pid)]).split()[0])
            time.sleep(after_s)  # not a wait for something: the moment of death is the test's input
            child.kill()
            child.wait()
            count = acknowledged()
    finally:
        child.kill()
        child.wait()
    reader = SpoolReader(spool)
    first = next(one for one in reader.writers() if b"first" in dict(reader.scan_frames(one)).values())
    assert not is_alive(spool, first)
    return count, drain(spool, dead=True)[first], worker


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "appended"])
@pytest.mark.parametrize("attempt", range(10))
def test_every_acknowledged_point_outlives_a_kill(tmp_path: Path, attempt: int, mapped: bool) -> None:
    after_s = random.Random(f"{attempt} {mapped}").uniform(0, 0.12)
    count, story, _ = killed(tmp_path, mapped=mapped, after_s=after_s)
    logged = [(value, i) for name, value, i in story.points if name == "a"]
    assert logged == [(i / 2, i) for i in range(len(logged))]  # nothing but what was logged, in order, without a gap
    assert count + 1 <= len(logged) <= count + 2
    assert not story.damaged
    assert not story.ended
    assert ENDED not in dict(story.frames)
    texts = [payload for kind, payload in story.frames if kind == 4]
    assert texts == [b"%d" % i for i in range(100, 100 * len(texts) + 1, 100)]
    assert len(texts) >= count // 100


def test_a_worker_that_lives_on_hides_no_death(tmp_path: Path) -> None:
    _, story, worker = killed(tmp_path, mapped=True, after_s=0.02, forked=True)
    try:
        assert story.role == "first"
        reader = SpoolReader(tmp_path / "spool")
        (other,) = (one for one in reader.writers() if b"child" in dict(reader.scan_frames(one)).values())
        assert is_alive(tmp_path / "spool", other)
    finally:
        os.kill(worker, 9)
    until(lambda: not is_alive(tmp_path / "spool", other))
    assert drain(tmp_path / "spool", dead=True)[other].points == [("worker", 1.0, 1)]


EXIT = """
import atexit, pathlib, sys, threading
from tests.unit.spool.pens import end, pen
writer = pen(pathlib.Path(sys.argv[1]), slots_per_segment=512)
log = writer.log
def work():
    i = 0
    while True:
        i += 1
        log("thread", 1.0, i)
threading.Thread(target=work, daemon=True).start()
atexit.register(lambda: log("late", 1.0, 1))
for i in range(20_000):
    log("a", 1.0, i)
"""


def test_an_exit_without_an_end_is_silent_and_keeps_everything(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", EXIT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (story,) = drain(tmp_path, dead=True).values()
    assert [i for name, _, i in story.points if name == "a"] == list(range(20_000))
    assert ("late", 1.0, 1) in story.points
    assert not story.ended
