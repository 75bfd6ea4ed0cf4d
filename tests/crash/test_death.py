"""Training that is killed: what had been logged is delivered, and the run is marked, whoever else is alive.

Pattern: a real program with its shipper over a real MLflow; it is killed at a random moment, alone or with a worker
that lives on, or its PID namespace ends. Limit: two minutes a test.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.programs import said, started
from tests.servers import MlflowServer, rows_of, run_of
from tests.shipping import until
from tests.sinks import HttpSink

# Counts each call that returned in a file, by one write of one byte: what the kernel has is what was acknowledged.
TRAINING = """
import os, sys, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="death", backend="mlflow")
acknowledged = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
if os.fork() == 0:  # a data-loader worker that outlives its parent
    import time
    exp.log_metric("worker", 1.0, iteration=0)
    time.sleep(15)
    os._exit(0)
i = 0
while True:
    exp.log_metric("loss", i, iteration=i)
    os.write(acknowledged, b".")
    i += 1
"""


def test_points_of_a_killed_program_are_delivered_and_the_run_is_marked(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    logged = {name: killed(script, name, mlflow_server.uri) for name in ("killed-0", "killed-1", "killed-2")}
    for name, count in logged.items():  # each waits for its worker, all at the same time
        run = run_of(mlflow_server, name, project="death", status="KILLED", within_s=90)
        rows = {row.step: row.value for row in rows_of(mlflow_server, run.info.run_id, "loss")}
        assert set(range(count)) <= rows.keys()
        assert len(rows) <= count + 1
        assert len(rows_of(mlflow_server, run.info.run_id, "worker")) == 1


def killed(script: Path, name: str, uri: str) -> int:
    """How many points a program had logged when it was killed, at a random moment."""
    acknowledged = script.with_name(name)
    command = [sys.executable, str(script), name, str(acknowledged)]
    program = subprocess.Popen(command, env={**os.environ, "MLFLOW_TRACKING_URI": uri})
    # The moment is late enough for some points: the file's size is the clock.
    wanted = random.Random(name).randrange(1, 20_000)
    until(lambda: program.poll() is not None or (acknowledged.exists() and acknowledged.stat().st_size >= wanted), 60)
    program.send_signal(signal.SIGKILL)
    assert program.wait(10) == -signal.SIGKILL
    return acknowledged.stat().st_size


CONTAINED = """
import os, signal, sys, time, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="container", backend="mlflow")
assert os.getpid() == 1
with open("big.bin", "wb") as file:
    file.truncate(200_000_000)
exp.log_artifact("big.bin")
for i in range(30_000):
    exp.log_metric("loss", i, iteration=i)
open("ready", "w").close()
if sys.argv[2] == "term":
    time.sleep(600)
"""


CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def first_process(program: subprocess.Popen[Any]) -> int:
    """The container's process 1, seen from here."""
    (inside,) = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    return int(inside)


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root here")
@pytest.mark.parametrize(("way", "status", "code"), [("exit", "FINISHED", 0), ("term", "KILLED", 143)])
def test_container_that_ends_with_training_delivers_before_it_ends(
    tmp_path: Path, mlflow_server: MlflowServer, way: str, status: str, code: int
) -> None:
    name = f"contained-{way}"
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(CONTAINED))
    program = subprocess.Popen(
        [*CONTAINER, sys.executable, str(script), name, way],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.uri, "TRACELET_GRACE": "120s"},
    )
    try:
        if way == "term":
            until(lambda: (tmp_path / "ready").exists() or program.poll() is not None, 240)
            os.kill(first_process(program), signal.SIGTERM)
        assert program.wait(240) == code  # that of process 1: no signal of its own could end it
    finally:
        program.kill()
        program.wait()
    # Nothing of ours is alive any more: what is there now was delivered before the end.
    run = run_of(mlflow_server, name, project="container")
    assert run.info.status == status
    assert len(rows_of(mlflow_server, run.info.run_id, "loss")) == 30_000
    assert mlflow_server.artifacts(run.info.run_id) == {"big.bin": 200_000_000}


HANDLED = """
import os, signal, sys, tracelet
exp = tracelet.start_logging(exp_name="handled", project="container", backend="otlp", run_id="handled")
assert os.getpid() == 1
def on_term(number, frame):
    exp.stop("KILLED")
    sys.exit(128 + number)
if sys.argv[1] == "handler":
    signal.signal(signal.SIGTERM, on_term)
for i in range(1000):
    exp.log_metric("loss", i, iteration=i)
print("logged", flush=True)
print(sys.stdin.readline())
exp.stop()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root here")
@pytest.mark.parametrize(("way", "code", "status"), [("handler", 143, "KILLED"), ("none", 0, "FINISHED")])
def test_process_1_without_a_shipper_ends_its_run_by_a_handler_of_its_own(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink, way: str, code: int, status: str
) -> None:
    """With TRACELET_SHIPPER=off nothing takes the SIGTERM that the kernel drops: without a handler it goes on."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url, "TRACELET_SHIPPER": "off"}
    with started(tmp_path, HANDLED, way, before=CONTAINER, **environ) as program:
        assert said(program) == "logged"
        os.kill(first_process(program), signal.SIGTERM)
        program.communicate("goes on\n" if way == "none" else None, timeout=60)
        assert program.returncode == code
    assert otlp_sink.requests == []
    done = subprocess.run([sys.executable, "-m", "tracelet", "ship"], timeout=60, check=False)
    assert done.returncode == 0
    assert otlp_sink.ends("handled") == [status]
    assert [point.iteration for point in otlp_sink.points("handled")] == list(range(1000))
