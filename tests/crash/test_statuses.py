"""How a program ends, as MLflow and the root span tell it: the same status and the same time in both.

Pattern: real programs, each ended in another way, into a real MLflow and an OTLP receiver; their shipper goes on, or
both are killed and somebody ships later. Limit: two minutes for all ways together.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import said, started, written
from tests.servers import MlflowServer, run_of
from tests.sinks import HttpSink, attributes, until
from tests.spooled import folder_of
from tracelet.spool.lease import shipper_alive

TRAINING = """
import os, signal, sys, tracelet
name, how = sys.argv[1:]
exp = tracelet.start_logging(exp_name=name, project="statuses", backend=["mlflow", "otlp"], run_id=name)
for step in range(100):
    exp.log_metric("loss", step, iteration=step)
print("logged", flush=True)
exec(how)
"""

ENDS = {
    "pass": "FINISHED",
    "exp.stop()": "FINISHED",
    "exp.stop('FAILED')": "FAILED",
    "sys.exit(0)": "FINISHED",
    "sys.exit(3)": "FAILED",
    "raise ValueError('bad batch')": "FAILED",
    "raise KeyboardInterrupt": "KILLED",
    "os.kill(os.getpid(), signal.SIGINT); sys.stdin.read()": "KILLED",
    "os.kill(os.getpid(), signal.SIGTERM); sys.stdin.read()": "KILLED",
    "os.kill(os.getpid(), signal.SIGKILL)": "KILLED",
    "os._exit(0)": "KILLED",
    "os.abort()": "KILLED",
}


def to_both(server: MlflowServer, sink: HttpSink) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": server.uri, "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url}


def told_by_both(server: MlflowServer, sink: HttpSink, name: str, status: str) -> int:
    """The end time (ns), once both say this status."""
    run = run_of(server, name, project="statuses", status=status, within_s=90)
    until(lambda: any(span.name == f"run {name}" for span in sink.spans()), 60)
    (root,) = [span for span in sink.spans() if span.name == f"run {name}"]
    assert attributes(root)["tracelet.run.state"] == status
    assert root.status.code == (0 if status == "FINISHED" else 2)
    if status == "FAILED" and "bad batch" in str(root.events):
        assert attributes(root)["error.type"] == "ValueError"
    assert run.info.end_time == root.end_time_unix_nano // 1_000_000
    assert len([point for point in sink.points(name) if point.name == "loss"]) == 100
    return int(root.end_time_unix_nano)


def test_every_way_to_end_has_its_status_and_one_end_time_everywhere(
    tmp_path: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink
) -> None:
    environ = {**os.environ, **to_both(mlflow_server, otlp_sink)}
    script, began = written(tmp_path, TRAINING), time.time_ns()
    programs = [
        subprocess.Popen([sys.executable, str(script), f"ends-{number}", how], env=environ, stderr=subprocess.DEVNULL)
        for number, how in enumerate(ENDS)
    ]
    for program in programs:
        program.wait(90)
    for number, status in enumerate(ENDS.values()):
        assert began < told_by_both(mlflow_server, otlp_sink, f"ends-{number}", status) < time.time_ns()


def test_a_run_that_was_killed_with_its_shipper_has_the_same_end_once_somebody_ships_it(
    tmp_path: Path, clean_environment: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink
) -> None:
    environ = to_both(mlflow_server, otlp_sink)
    with started(tmp_path, TRAINING, "both-killed", "sys.stdin.read()", **environ) as program:
        assert said(program) == "logged"
        folder = folder_of(clean_environment, "both-killed")
        until(lambda: shipper_alive(folder) is not None, 30)
        shipper = shipper_alive(folder)
        assert shipper is not None
        os.kill(shipper, signal.SIGKILL)
        program.kill()
        program.wait(30)
        gone = time.time_ns()
    until(lambda: shipper_alive(folder) is None, 30)
    done = subprocess.run(
        [sys.executable, "-m", "tracelet", "ship"],
        env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert told_by_both(mlflow_server, otlp_sink, "both-killed", "KILLED") < gone


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root here")
def test_a_container_whose_first_process_is_killed_is_shipped_from_outside(
    tmp_path: Path, clean_environment: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink
) -> None:
    environ = to_both(mlflow_server, otlp_sink)
    contained = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with started(tmp_path, TRAINING, "pid-1", "sys.stdin.read()", before=contained, **environ) as program:
        assert said(program) == "logged"
        (inside,) = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        os.kill(int(inside), signal.SIGKILL)  # and the kernel takes the shipper with it
        program.wait(30)
        gone = time.time_ns()
    folder = folder_of(clean_environment, "pid-1")
    until(lambda: shipper_alive(folder) is None, 30)
    done = subprocess.run(
        [sys.executable, "-m", "tracelet", "ship", str(folder)],
        env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert told_by_both(mlflow_server, otlp_sink, "pid-1", "KILLED") < gone
