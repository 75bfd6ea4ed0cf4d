"""Signals: the program's own handlers are its own, may log at any moment, and SIGTERM drains where nothing outlives it.

Pattern: real programs that signal themselves, or are signalled from outside. Limit: a minute each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import finished, said, started
from tests.sinks import HttpSink, Say, attributes, until
from tests.spooled import folder_of, read
from tracelet.records import ParamsLogged, TagsSet, WriterEnded, WriterOpened
from tracelet.spool.lease import shipper_alive

UNTOUCHED = """
import faulthandler, os, signal, socket, sys, threading
numbers = [n for n in signal.valid_signals() if n not in (signal.SIGKILL, signal.SIGSTOP)]
taken = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
mine = {n: (lambda *_, n=n: None) for n in taken}
for n, handler in mine.items():
    signal.signal(n, handler)
near, far = socket.socketpair()
near.setblocking(False)
signal.set_wakeup_fd(near.fileno())
faulthandler.enable()
sys.excepthook = lambda *_: None
threading.excepthook = lambda *_: None

def now():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    return [signal.getsignal(n) for n in numbers], fd, faulthandler.is_enabled(), sys.excepthook, threading.excepthook

before = now()
import tracelet
assert now() == before
exp = tracelet.start_logging(exp_name="signals", project="signals", backend="file")
exp.log_metric("loss", 1.0, iteration=0)
assert now() == before
exp.flush(timeout=30)
tracelet.stop_logging()
assert now() == before
"""


@pytest.mark.parametrize("job", ["", "4711"])
def test_handlers_and_hooks_of_the_program_are_untouched_from_import_to_stop(tmp_path: Path, job: str) -> None:
    done = finished(tmp_path, UNTOUCHED, SLURM_JOB_ID=job)
    assert done.returncode == 0, done.stderr


IN_THE_MIDDLE_OF_A_START = """
import os, signal, sys, tracelet
given, step = sys.argv[1] == "given", int(sys.argv[2])
line = came = 0
def handler(*_):
    exp.log_metric("from a handler", 1.0, iteration=1)
    exp.log_params({"a": 1})
    exp.set_tags({"b": 2})
signal.signal(signal.SIGUSR1, handler)
def trace(frame, event, argument):
    global line
    if os.sep + "tracelet" + os.sep not in frame.f_code.co_filename:
        return None
    if event == "line":
        line += 1
        if line == wanted:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGUSR1)
    return trace
for wanted in range(step // 2, 100_000, step):
    line = 0
    run_id = f"run-{wanted}" if given else None
    exp = tracelet.Experiment("x", project="signals", backend="file", shipper="off", run_id=run_id)
    sys.settrace(trace)
    exp.log_metric("first", 1.0, iteration=1)
    sys.settrace(None)
    exp.stop()
    if line < wanted:
        break
    came += 1
print(came)
"""


@pytest.mark.parametrize("given", ["given", "drawn"])
def test_a_handler_that_logs_at_any_line_of_a_start_adds_to_the_run_that_is_being_started(
    tmp_path: Path, clean_environment: Path, given: str
) -> None:
    done = finished(tmp_path, IN_THE_MIDDLE_OF_A_START, given, 97)
    assert done.returncode == 0, done.stderr
    came = int(done.stdout)
    assert came > 10
    folders = [path for path in clean_environment.glob("*/*") if path.is_dir()]
    assert len(folders) == came + 1  # the last one was over before its line
    whole = 0
    for folder in folders:
        found = read(folder)
        names = sorted(point.name for point in found.points)
        assert names in (["first", "from a handler"], ["first"])
        assert len({record.attempt_key for record in found.of(WriterOpened)}) == 1
        if len(names) == 2:
            whole += 1
            assert [record.params for record in found.of(ParamsLogged)] == [{"a": 1}]
            assert {"b": "2"} in [record.tags for record in found.of(TagsSet)]
    assert whole == came


OURS_IS_TAKEN_BACK = """
import signal, sys, tracelet
others = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP)]  # of a parent under nohup SIGHUP is ignored
exp = tracelet.start_logging(exp_name="signals", project="signals", backend="file")
assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGHUP)] == others
tracelet.stop_logging()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""


def test_the_handler_set_in_a_job_is_for_sigterm_alone_and_goes_with_the_run(tmp_path: Path) -> None:
    done = finished(tmp_path, OURS_IS_TAKEN_BACK, SLURM_JOB_ID="4711")
    assert done.returncode == 0, done.stderr


INTERRUPTED = """
import signal, sys, tracelet
exp = tracelet.start_logging(exp_name="handler", project="signals", backend="file", shipper="off")
exp.set_iteration(0)
handled = 0

def handler(*_):
    global handled
    exp.log_metric(f"handler{handled}", handled)
    exp.log_params({f"p{handled}": handled})
    handled += 1
    if handled % 7 == 0:  # a signal meets the handler of another one
        signal.raise_signal(signal.SIGUSR1)
    signal.setitimer(signal.ITIMER_REAL, 0.001)

signal.signal(signal.SIGUSR1, lambda *_: exp.log_metric("nested", handled))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001)
logged = 0
while handled < 500:
    exp.log_metric(f"main{logged}", logged)
    exp.log_params({f"q{logged}": logged})
    logged += 1
signal.setitimer(signal.ITIMER_REAL, 0)
tracelet.stop_logging()
print(logged, handled)
"""


def test_a_handler_that_logs_new_names_while_new_names_are_logged_loses_none(
    tmp_path: Path, clean_environment: Path
) -> None:
    done = finished(tmp_path, INTERRUPTED)
    assert done.returncode == 0, done.stderr
    logged, handled = map(int, done.stdout.split())
    found = read(folder_of(clean_environment))
    wanted = [(f"main{n}", float(n)) for n in range(logged)] + [(f"handler{n}", float(n)) for n in range(handled)]
    wanted += [("nested", float(n)) for n in range(7, handled + 1, 7)]
    assert sorted((point.name, point.value) for point in found.points) == sorted(wanted)
    assert found.open_slots == 0


TERMINATED = """
import os, signal, sys, tracelet
exp = tracelet.start_logging(exp_name="terminated", project="signals", backend="otlp", run_id="terminated")
if sys.argv[1] != "default":
    def handler(*_):
        exp.log_metric("rescued", 1.0, iteration=1)
        exp.stop("KILLED") if sys.argv[1] == "own handler, KILLED" else tracelet.stop_logging()
        sys.exit(7)
    signal.signal(signal.SIGTERM, handler)
for step in range(10_000):
    exp.log_metric("loss", step, iteration=step)
print("logged", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def job(otlp_sink: HttpSink) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url, "SLURM_JOB_ID": "4711"}


@pytest.mark.parametrize(
    ("how", "code", "state"),
    [("default", -signal.SIGTERM, "KILLED"), ("own handler", 7, "FINISHED"), ("own handler, KILLED", 7, "KILLED")],
)
def test_sigterm_in_a_job_is_drained_before_the_program_ends(
    tmp_path: Path, otlp_sink: HttpSink, job: dict[str, str], how: str, code: int, state: str
) -> None:
    with started(tmp_path, TERMINATED, how, **job) as program:
        assert said(program) == "logged"
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == code
        # SLURM ends what is left now: all has arrived already.
        assert len([point for point in otlp_sink.points() if point.name == "loss"]) == 10_000
        (root,) = otlp_sink.spans()
        assert attributes(root)["tracelet.run.state"] == state
        assert [point.name for point in otlp_sink.points() if point.name == "rescued"] == (
            [] if how == "default" else ["rescued"]
        )


def test_a_second_sigterm_ends_a_draining_program_at_once_and_its_data_waits(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink, job: dict[str, str]
) -> None:
    otlp_sink.rule = lambda received: Say(status=503)
    with started(tmp_path, TERMINATED, "default", TRACELET_GRACE="1h", **job) as program:
        assert said(program) == "logged"
        folder = folder_of(clean_environment)
        program.send_signal(signal.SIGTERM)
        until(lambda: bool(read(folder).of(WriterEnded)), 30)  # it has begun to drain
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == -signal.SIGTERM
    otlp_sink.rule = None
    shipper = shipper_alive(folder)
    if shipper is not None:  # as the batch system would
        os.kill(shipper, signal.SIGKILL)
        until(lambda: shipper_alive(folder) is None, 30)
    done = subprocess.run(
        [sys.executable, "-m", "tracelet", "ship"],
        env={**os.environ, **job}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(otlp_sink.points("terminated")) == 10_000
    assert [attributes(span)["tracelet.run.state"] for span in otlp_sink.spans()] == ["KILLED"]
