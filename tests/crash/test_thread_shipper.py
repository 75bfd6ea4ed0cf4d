"""TRACELET_SHIPPER=thread: the program delivers by itself, and what it could not deliver when it died is not lost.

Pattern: real programs over a real receiver; no process beside them is started. Limit: a minute a test.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shipping import until
from tests.sinks import GrpcSink, HttpSink, Say, Sink, attributes

LIMIT_S = 60.0

BEGIN = """
import multiprocessing, os, signal, sys, threading, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="thread", run_id="run")
exp.log_params({"lr": 0.1})
def log(first, count, name="loss"):
    for i in range(first, first + count):
        exp.log_metric(name, float(i), iteration=i)
log(0, 20_000)
"""


def program(code: str, sink: HttpSink | GrpcSink, **variables: str) -> subprocess.Popen[str]:
    environ = {
        **os.environ,
        "TRACELET_SHIPPER": "thread",
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(code: str, sink: HttpSink | GrpcSink, **variables: str) -> subprocess.CompletedProcess[str]:
    with program(code, sink, **variables) as running:
        out, err = running.communicate(timeout=LIMIT_S)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def points(sink: Sink, name: str = "loss") -> list[int]:
    return [point.iteration for point in sink.points("run") if point.name == name]


def ends(sink: HttpSink) -> list[str]:
    return [attributes(e)["tracelet.run.state"] for e in sink.events() if e.event_name == "tracelet.run.ended"]


@pytest.mark.parametrize(
    ("code", "status", "returned"),
    [
        ("tracelet.stop_logging()", "FINISHED", 0),
        ("", "FINISHED", 0),
        ("raise RuntimeError('no')", "FAILED", 1),
        ("sys.exit(3)", "FAILED", 3),
        ("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)", "KILLED", -15),
    ],
    ids=["stop", "end", "exception", "exit 3", "SIGTERM"],
)
def test_all_is_delivered_with_its_end_before_the_program_is_gone(
    code: str, status: str, returned: int, otlp_sink: HttpSink
) -> None:
    done = run(code, otlp_sink)
    assert done.returncode == returned, done.stderr
    assert points(otlp_sink) == list(range(20_000))
    assert ends(otlp_sink) == [status]


def test_a_short_program_delivers_over_grpc_and_into_a_database(tmp_path: Path) -> None:
    with GrpcSink() as sink:
        done = run("", sink, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
        assert done.returncode == 0, done.stderr
        assert points(sink) == list(range(20_000))
    database = f"sqlite:///{tmp_path}/mlflow.db"
    done = run("", sink, TRACELET_BACKEND="mlflow", MLFLOW_TRACKING_URI=database, TRACELET_DIR=str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlflow.db") as there:
        assert there.execute("select count(*) from metrics where key = 'loss'").fetchone() == (20_000,)
        assert there.execute("select status from runs").fetchall() == [("FINISHED",)]
    there.close()


def test_no_process_is_started_and_nothing_waits_afterwards(
    otlp_sink: HttpSink, clean_environment: Path, tmp_path: Path
) -> None:
    done = run("tracelet.stop_logging()\nprint(os.popen('ps -eo ppid,args').read())", otlp_sink)
    assert str(clean_environment) not in done.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "tracelet", "runs", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    (found,) = json.loads(listed.stdout)
    assert (found["waiting"], found["undelivered"], found["state"]) == (0, False, "FINISHED")


def test_what_a_killed_program_had_not_delivered_is_delivered_by_ship(otlp_sink: HttpSink) -> None:
    otlp_sink.rule = lambda _: Say(503)
    with program("print('logged', flush=True)\ntime.sleep(60)", otlp_sink) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "logged\n"
        running.kill()
    otlp_sink.rule = None
    assert points(otlp_sink) == []
    done = subprocess.run([sys.executable, "-m", "tracelet", "ship"], check=False, timeout=LIMIT_S)
    assert done.returncode == 0
    assert points(otlp_sink) == list(range(20_000))
    assert ends(otlp_sink) == ["KILLED"]


def test_forked_and_spawned_workers_leave_their_records_to_it(otlp_sink: HttpSink) -> None:
    """The usual worker that leaves by os._exit; all of one run, nothing twice, no hang."""
    code = """
def work(number):
    log(0, 1000, f"worker{number}")
    os._exit(0)
children = []
for number in range(4):
    pid = os.fork()
    if pid == 0:
        work(number)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
log(20_000, 10)
tracelet.stop_logging()
"""
    done = run(code, otlp_sink, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr
    until(lambda: points(otlp_sink) == list(range(20_010)))
    for number in range(4):
        assert points(otlp_sink, f"worker{number}") == list(range(1000))
    assert ends(otlp_sink) == ["FINISHED"]


def test_with_a_dead_destination_the_program_says_what_waits_and_leaves(otlp_sink: HttpSink) -> None:
    otlp_sink.rule = lambda _: Say(503)
    code = "from tracelet.core import delivery\ndelivery.STALLED_S = 1.0\ntracelet.stop_logging()"
    done = run(code, otlp_sink)
    assert done.returncode == 0, done.stderr
    assert "20,000 points not delivered to otlp" in done.stderr
    assert "TRACELET_SHIPPER=thread" in done.stderr
    assert "tracelet ship" in done.stderr
