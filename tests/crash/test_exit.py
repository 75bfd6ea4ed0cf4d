"""How a program ends, as its own END says: real interpreters, each left in another way.

Pattern: an interpreter runs a script without a shipper, and leaves; its END is read from the spool. Limit: a minute a
program.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.spooled import folder_of, read
from tracelet.records import WriterEnded

START = """
import os, signal, sys, tracelet
exp = tracelet.start_logging(exp_name="leaving", backend="file")
exp.log_metric("loss", 1.0, iteration=0)
"""


def run_and_leave(tmp_path: Path, spool: Path, code: str, *, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run START and `code` in an interpreter of their own, without a shipper."""
    script = tmp_path / "train.py"
    script.write_text(START + textwrap.dedent(code))
    environ = {**os.environ, "TRACELET_DIR": str(spool), "TRACELET_SHIPPER": "off"}
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
    )


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        ("pass", "FINISHED", 0),
        ("exp.stop()", "FINISHED", 0),
        ("sys.exit(0)", "FINISHED", 0),
        ("sys.exit()", "FINISHED", 0),
        ("sys.exit(3)", "FAILED", 3),
        ("sys.exit('no data')", "FAILED", 1),
        ("with exp.span('train'): sys.exit(3)", "FAILED", 3),
        ("try:\n    sys.exit(3)\nfinally:\n    exp.log_params({'rescued': 1})", "FAILED", 3),
        ("raise ValueError('bad batch')", "FAILED", 1),
        ("raise KeyboardInterrupt", "KILLED", -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(10)", "KILLED", -signal.SIGINT),
    ],
)
def test_end_says_how_the_program_ended(
    tmp_path: Path, clean_environment: Path, code: str, status: str, exit_code: int
) -> None:
    done = run_and_leave(tmp_path, clean_environment, code)
    assert done.returncode == exit_code, done.stderr
    found = read(folder_of(clean_environment))
    (ended,) = found.of(WriterEnded)
    assert ended.status == status
    assert found.values("loss") == [(0, 1.0)]


@pytest.mark.parametrize(("code", "seen_by"), [("sys.exit(3)", "exit-final"), ("pass", "exit-final")])
def test_in_a_job_the_programs_own_word_on_its_end_is_final(
    tmp_path: Path, clean_environment: Path, monkeypatch: pytest.MonkeyPatch, code: str, seen_by: str
) -> None:
    """Nobody is left to ask the kernel: an end that waited for its exit code would be lost with the job."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run_and_leave(tmp_path, clean_environment, code)
    (ended,) = read(folder_of(clean_environment)).of(WriterEnded)
    assert ended.seen_by == seen_by


def test_uncaught_exception_is_recorded_with_its_traceback(tmp_path: Path, clean_environment: Path) -> None:
    run_and_leave(tmp_path, clean_environment, "raise ValueError('bad batch')")
    (ended,) = read(folder_of(clean_environment)).of(WriterEnded)
    assert ended.error is not None
    assert (ended.error.type, ended.error.message) == ("ValueError", "bad batch")
    assert "train.py" in ended.error.stacktrace


@pytest.mark.parametrize(
    "after", ["pass", "exp.log_metric('loss', 2.0, iteration=1)", "exp.log_params({'went': 'on'})"]
)
def test_exit_somebody_caught_is_not_the_end(tmp_path: Path, clean_environment: Path, after: str) -> None:
    code = f"""
    try:
        sys.exit(3)
    except SystemExit:
        pass
    {after}
    """
    assert run_and_leave(tmp_path, clean_environment, code).returncode == 0
    assert read(folder_of(clean_environment)).of(WriterEnded)[0].status == "FINISHED"


def test_exit_of_a_thread_is_not_the_end(tmp_path: Path, clean_environment: Path) -> None:
    code = """
    import threading
    thread = threading.Thread(target=lambda: sys.exit(3))
    thread.start()
    thread.join()
    """
    assert run_and_leave(tmp_path, clean_environment, code).returncode == 0
    assert read(folder_of(clean_environment)).of(WriterEnded)[0].status == "FINISHED"


def test_own_run_of_a_forked_child_ends_as_the_child_does(tmp_path: Path, clean_environment: Path) -> None:
    code = """
    from tracelet.core.experiment import Experiment
    if os.fork() == 0:
        Experiment("own", run_id="own", backend="file").log_metric("child", 1.0, iteration=0)
        raise ValueError("of the child alone")
    os.wait()
    """
    assert run_and_leave(tmp_path, clean_environment, code).returncode == 0
    (own,) = read(folder_of(clean_environment, "own")).of(WriterEnded)
    assert own.status == "FAILED"
    (parents,) = [p for p in clean_environment.glob("*/*") if p.parent.name != "own"]
    assert [ended.status for ended in read(parents).of(WriterEnded)] == ["FINISHED"]


def test_sys_exit_is_put_back_at_stop(tmp_path: Path, clean_environment: Path) -> None:
    code = """
    import builtins
    assert sys.exit.__module__ != "sys"
    exp.stop()
    assert sys.exit.__module__ == "sys", sys.exit
    """
    assert run_and_leave(tmp_path, clean_environment, code).returncode == 0


@pytest.mark.parametrize("code", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_sudden_end_leaves_points_and_no_end(tmp_path: Path, clean_environment: Path, code: str) -> None:
    run_and_leave(tmp_path, clean_environment, code)
    found = read(folder_of(clean_environment))
    assert found.values("loss") == [(0, 1.0)]
    assert found.of(WriterEnded) == []


def test_forked_child_that_exits_does_not_end_the_run(tmp_path: Path, clean_environment: Path) -> None:
    code = """
    if os.fork() == 0:
        exp.log_metric("child", 1.0, iteration=0)
        sys.exit(3)
    os.wait()
    exp.log_metric("loss", 2.0, iteration=1)
    """
    assert run_and_leave(tmp_path, clean_environment, code).returncode == 0
    found = read(folder_of(clean_environment))
    assert [e.status for e in found.of(WriterEnded) if e.status is not None] == ["FINISHED"]
    assert found.values("loss") == [(0, 1.0), (1, 2.0)]
    assert found.values("child") == [(0, 1.0)]


def test_users_own_sigterm_handler_stays(tmp_path: Path, clean_environment: Path) -> None:
    code = """
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, lambda *a: print("mine"))
    exp.stop()
    os.kill(os.getpid(), signal.SIGTERM)
    """
    assert run_and_leave(tmp_path, clean_environment, code).stdout == "mine\n"
