"""Deaths and exit codes, with real processes: their locks, their pidfds, and what the kernel keeps of them."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shipping import until
from tracelet.shipper.deaths import Deaths, exit_code, lock_holder

HOLD = """
import sys, pathlib
from tracelet.spool.lease import WriterLock
lock = WriterLock(pathlib.Path(sys.argv[1]), sys.argv[2]); lock.appear()
print("held", flush=True)
sys.stdin.readline()
exec(sys.argv[3])
"""


@pytest.fixture
def holders() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def hold(folder: Path, writer: str, holders: list[subprocess.Popen[str]], then: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), writer, then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    holders.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def leave(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


W = "00000000000000aa"


def test_a_held_lock_names_its_process_and_a_free_one_nobody(tmp_path: Path, holders: list) -> None:
    process = hold(tmp_path, W, holders)
    assert lock_holder(tmp_path / f"{W}.lock") == process.pid
    process.kill()
    process.wait()
    assert lock_holder(tmp_path / f"{W}.lock") is None
    assert lock_holder(tmp_path / "missing.lock") is None


def test_a_kill_is_noticed_by_the_pidfd_before_the_lock_is_asked_again(tmp_path: Path, holders: list) -> None:
    deaths = Deaths(tmp_path, every_s=3600.0)
    process = hold(tmp_path, W, holders)
    assert not deaths.look(W)
    assert deaths.is_watched(W)
    process.send_signal(signal.SIGKILL)
    wake, other = os.pipe()
    deaths.wait(10.0, wake)  # returns at the death, not after ten seconds
    assert deaths.look(W)
    assert deaths.is_dead(W)
    assert deaths.was_seen_alive(W)
    process.wait()
    assert deaths.exit_code(W) == -signal.SIGKILL
    deaths.close()
    os.close(wake)
    os.close(other)


@pytest.mark.parametrize(("then", "expected"), [("", 0), ("raise SystemExit(3)", 3), ("1/0", 1)])
@pytest.mark.parametrize("reaped", [False, True])
def test_the_kernel_tells_the_exit_code(
    tmp_path: Path, holders: list, then: str, expected: int, reaped: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    process = hold(tmp_path, W, holders, then)
    pidfd = os.pidfd_open(process.pid)
    assert exit_code(pidfd, process.pid) is None  # alive
    leave(process)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000)
    if reaped:
        process.wait()
    assert exit_code(pidfd, process.pid) == expected
    os.close(pidfd)


def test_a_writer_that_let_its_lock_go_is_dead_although_its_process_lives(tmp_path: Path, holders: list) -> None:
    deaths = Deaths(tmp_path, every_s=0.0)
    process = hold(tmp_path, W, holders, "lock.release(); print('free', flush=True); sys.stdin.readline()")
    assert not deaths.look(W)
    leave(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "free\n"
    assert deaths.look(W)
    assert not deaths.is_gone(W)
    leave(process)
    until(lambda: deaths.is_gone(W))
    deaths.close()


def test_a_parent_is_watched_even_if_its_lock_was_free_at_the_first_look(tmp_path: Path, holders: list) -> None:
    process = hold(tmp_path, W, holders, "raise SystemExit(4)")
    pidfd = os.pidfd_open(process.pid)
    leave(process)
    process.wait()
    deaths = Deaths(tmp_path, parent=(pidfd, process.pid))
    assert deaths.look(W, process.pid)
    assert deaths.exit_code(W) == 4
    deaths.close()
    os.close(pidfd)
