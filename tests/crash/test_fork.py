"""Processes that come from a training process: none hangs, nothing they log is lost or doubled, all of it is one run.

Pattern: a real interpreter forks, or starts workers, at the worst moment; its spool is read back, or its sink.
Limit: a minute for each program (a hanging child kills itself by an alarm before).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import finished

FORK_WHILE_HELD = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tracelet
from tracelet import guard, session
from tracelet.core import artifacts, process

exp = tracelet.start_logging(exp_name="fork", project="fork", backend="file", shipper="off")
exp.log_metric("parent", 1.0, iteration=0)
open("file.bin", "w").close()
held, act = {
    "guard": (lambda: guard.guard._lock, lambda: guard.guard.limited("child", "a warning of the child")),
    "session": (lambda: session._lock, tracelet.stop_logging),
    "artifacts": (lambda: artifacts._once._lock, lambda: artifacts._once.limited("child", "another")),
    "start": (lambda: process._lock, lambda: tracelet.Experiment("own", backend="file", shipper="off").start()),
    "writer": (lambda: exp._run.writer._lock, lambda: exp.log_metric("child", 1.0, iteration=0)),
}[sys.argv[1]]
inside, done = threading.Event(), threading.Event()

def hold():
    with held():
        inside.set()
        done.wait()

threading.Thread(target=hold, daemon=True).start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a child that hangs ends by it
    act()
    os._exit(0)
_, status = os.waitpid(child, 0)
done.set()
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@pytest.mark.parametrize("lock", ["guard", "session", "artifacts", "start", "writer"])
def test_a_child_forked_while_a_thread_held_a_lock_of_ours_does_not_hang(tmp_path: Path, lock: str) -> None:
    done = finished(tmp_path, FORK_WHILE_HELD, lock)
    assert done.returncode == 0, done.stderr
