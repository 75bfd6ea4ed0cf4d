"""A run on another host of which nothing is heard: LOST in MLflow and the status gauge, no end, and taken back.

Pattern: real programs on a host of their own (a name and a boot), killed with their shipper; who ships is on this one.
Silence of an hour is made by the times of files, that of a shipper by a clock four times as fast. Limit: two minutes a
test.
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

from tests import hosts
from tests.crash.clocks import other_clocks
from tests.gateway_process import GatewayProcess
from tests.programs import said, started
from tests.servers import MlflowServer, Run, run_of
from tests.shipping import until
from tests.sinks import HttpSink, attributes
from tests.spooled import folder_of
from tracelet.spool import home
from tracelet.spool.lease import shipper_alive

TRAINING = """
import sys, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="lost", run_id=sys.argv[1])
exp.log_metric("loss", 1.0, iteration=1)
print("logged", flush=True)
sys.stdin.readline()
tracelet.stop_logging()
"""


@pytest.fixture(autouse=True)
def two_hosts(tmp_path: Path) -> None:
    if not hosts.can_be_made(tmp_path):
        pytest.skip("namespaces for a host's name and files can't be made here")


@contextmanager
def training(folder: Path, run_id: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A program on the other host, once it has logged."""
    with started(folder, TRAINING, run_id, before=hosts.words_for(folder, "node7"), **environ) as program:
        assert said(program) == "logged"
        yield program


def ship(*words: str) -> str:
    """`tracelet ship` on this host, and what it said."""
    command = [sys.executable, "-m", "tracelet", "ship", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def grow_old(folder: Path, seconds: float = home.SILENT_S + 60) -> None:
    """Let the folder look as if nothing had been written for so long."""
    then = time.time() - seconds
    for path in (*folder.glob("*.points"), *folder.glob("*.frames")):
        os.utime(path, (then, then))


def states(sink: HttpSink, run_id: str) -> list[str]:
    """The states that the status gauge went through."""
    found: list[str] = []
    for resource, scope, metric in sink.metrics():
        if scope == "tracelet.run" and metric.name == "tracelet.run.status" and resource["tracelet.run.id"] == run_id:
            found += [
                str(attributes(point)["tracelet.run.state"]) for point in metric.gauge.data_points if point.as_double
            ]
    return [state for number, state in enumerate(found) if number == 0 or found[number - 1] != state]


def seen(server: MlflowServer, run_id: str) -> tuple[str, str | None]:
    """Status and state tag in MLflow."""
    run: Run = run_of(server, run_id, project="lost", within_s=60)
    return run.info.status, run.data.tags.get("tracelet.state")


@pytest.mark.parametrize("way", ["straight", "gateway"])
def test_silence_of_an_hour_is_told_is_no_end_and_is_taken_back_by_the_next_record(
    tmp_path: Path, clean_environment: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink, way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_id = f"silent-{way}"
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri) as gateway:
        if way == "straight":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
        endpoint = otlp_sink.url if way == "straight" else gateway.http
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        with training(tmp_path, run_id, TRACELET_SHIPPER="off") as program:
            folder = folder_of(clean_environment, run_id)
            grow_old(folder)
            ship(run_id)  # alive, as its lock shows
            assert seen(mlflow_server, run_id) == ("RUNNING", None)
            program.kill()
            program.wait(30)
        with following(tmp_path, run_id):
            until(lambda: seen(mlflow_server, run_id) == ("RUNNING", "LOST"), 60)
            if way == "straight":
                until(lambda: states(otlp_sink, run_id)[-1:] == ["LOST"], 60)
                assert not otlp_sink.ends(run_id)
            with training(tmp_path, run_id, TRACELET_SHIPPER="off") as program:
                until(lambda: seen(mlflow_server, run_id) == ("RUNNING", None), 60)
                if way == "straight":
                    until(lambda: states(otlp_sink, run_id)[-2:] == ["LOST", "RUNNING"], 60)
                assert program.stdin is not None
                program.stdin.write("\n")
                program.stdin.flush()
                assert program.wait(60) == 0
            until(lambda: seen(mlflow_server, run_id) == ("FINISHED", None), 60)


@contextmanager
def following(folder: Path, *words: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """`tracelet ship --follow` on this host."""
    with (folder / "follow.log").open("ab") as log:
        command = [sys.executable, "-m", "tracelet", "ship", "--follow", *words]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **environ}
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def test_a_lease_that_is_missed_is_told_before_the_third_ends_the_run(
    tmp_path: Path, clean_environment: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_sink.url)
    run_id = "missed"
    with training(tmp_path, run_id) as program:
        folder = folder_of(clean_environment, run_id)
        until(lambda: home.read_lease(folder) is not None, 60)
        until(lambda: seen(mlflow_server, run_id) == ("RUNNING", None), 60)
        shipper = shipper_alive(folder)
        assert shipper is not None
        os.kill(shipper, signal.SIGKILL)
        program.kill()
        program.wait(30)
    with following(tmp_path, run_id, **other_clocks(tmp_path / "clocks", faster=4)):
        until(lambda: states(otlp_sink, run_id)[-1:] == ["KILLED"], 120)
        assert states(otlp_sink, run_id) == ["RUNNING", "LOST", "KILLED"]
        until(lambda: seen(mlflow_server, run_id) == ("KILLED", None), 60)
    assert re.search(r"run missed is LOST", (tmp_path / "follow.log").read_text())
