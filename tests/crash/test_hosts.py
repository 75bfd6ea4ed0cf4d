"""Attempts of one run on two hosts: the newest attempt's status stands, whoever ships last and whatever clocks say.

Pattern: real programs and shippers in namespaces with a host name and a boot of their own, their clocks moved before
tracelet is imported; a real MLflow, an OTLP receiver, a real gateway. Limit: two minutes a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import hosts
from tests.gateway_process import GatewayProcess
from tests.programs import written
from tests.servers import MlflowServer, Run, get_run, rows_of, run_of
from tests.shipping import until
from tests.sinks import HttpSink, attributes
from tracelet.spool.cursor import Progress

ATTEMPT = """
import sys, time
real, days, status, run_id = time.time_ns, int(sys.argv[1]), sys.argv[2], sys.argv[3]
time.time_ns = lambda: real() + days * 86_400 * 10**9
import tracelet
with tracelet.Experiment(run_id, project="hosts", run_id=run_id) as exp:
    exp.log_metric("loss", 1.0, iteration=len(status))
    with exp.span(f"phase of {status}"):
        pass
    if status == "FAILED":
        raise ValueError("a bad batch")
"""


@pytest.fixture(autouse=True)
def two_hosts(tmp_path: Path) -> None:
    if not hosts.can_be_made(tmp_path):
        pytest.skip("namespaces for a host's name and files can't be made here")


def on(folder: Path, host: str, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command on a host, to its end."""
    return subprocess.run(
        [*hosts.words_for(folder, host), *command],
        cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def attempt(folder: Path, host: str, run_id: str, status: str, *, days: int = 0, **environ: str) -> None:
    """One attempt on a host whose clock is wrong by `days`; its shipper has delivered it, or is about to."""
    script = written(folder, ATTEMPT)
    done = on(folder, host, sys.executable, str(script), str(days), status, run_id, **environ)
    assert ("ValueError" in done.stderr) == (status == "FAILED"), done.stderr
    assert (done.returncode == 0) == (status == "FINISHED")


def ship(folder: Path, host: str, **environ: str) -> None:
    done = on(folder, host, sys.executable, "-m", "tracelet", "ship", **environ)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(params=["shared", "own"])
def spools(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, dict[str, str]]:
    """Where each host's spool is: in a folder that both see, or each in its own."""
    shared = request.param == "shared"
    return {host: {"TRACELET_DIR": str(tmp_path / ("spool" if shared else host))} for host in ("node1", "node2")}


def to_both(server: MlflowServer, sink: HttpSink) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": server.uri, "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url}


def roots_of(sink: HttpSink, run_id: str) -> list[str]:
    """What the root spans say, one for each attempt, the earliest first."""
    roots = {one.span_id: one for one in sink.spans() if one.name == f"run {run_id}"}
    return [
        str(attributes(one)["tracelet.run.state"])
        for one in sorted(roots.values(), key=lambda one: one.start_time_unix_nano)
    ]


def settled(server: MlflowServer, run_id: str, status: str) -> Run:
    """The run with this status and the rows of both attempts."""
    run = run_of(server, run_id, project="hosts", status=status, within_s=60)
    until(lambda: len(rows_of(server, run.info.run_id, "loss")) == 2, 60)
    return get_run(server, run.info.run_id)


def test_a_run_resumed_on_another_host_has_the_status_of_its_second_attempt(
    tmp_path: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink, spools: dict[str, dict[str, str]],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    run_id = f"resumed-{request.node.callspec.id}"
    for host, status in (("node1", "FAILED"), ("node2", "FINISHED")):
        attempt(tmp_path, host, run_id, status, **to_both(mlflow_server, otlp_sink), **spools[host])
        until(lambda status=status: otlp_sink.ends(run_id)[-1:] == [status], 60)
        run_of(mlflow_server, run_id, project="hosts", status=status, within_s=60)
    settled(mlflow_server, run_id, "FINISHED")
    until(lambda: roots_of(otlp_sink, run_id) == ["FAILED", "FINISHED"], 60)


def test_a_late_shipper_of_an_old_attempt_leaves_the_newest_attempts_status(
    tmp_path: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink, spools: dict[str, dict[str, str]],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    run_id, both = f"late-{request.node.callspec.id}", to_both(mlflow_server, otlp_sink)
    attempt(tmp_path, "node1", run_id, "FAILED", TRACELET_SHIPPER="off", **both, **spools["node1"])
    attempt(tmp_path, "node2", run_id, "FINISHED", **both, **spools["node2"])
    ended = run_of(mlflow_server, run_id, project="hosts", status="FINISHED", within_s=60)
    until(lambda: roots_of(otlp_sink, run_id) == ["FINISHED"], 60)
    ship(tmp_path, "node1", **both, **spools["node1"])
    run = settled(mlflow_server, run_id, "FINISHED")
    assert run.info.end_time == ended.info.end_time
    assert run.data.tags["tracelet.run.attempt"] == ended.data.tags["tracelet.run.attempt"]
    assert not [key for key in run.data.tags if key.startswith("tracelet.error.")]
    assert roots_of(otlp_sink, run_id) == ["FAILED", "FINISHED"]


def ends_told(folder: Path) -> int:
    """How many attempts' ends a gateway has brought to MLflow."""
    progress = Progress(folder)
    progress.refresh()
    return sum(len(one.done) for one in progress.destinations.values())


@contextmanager
def to_mlflow(folder: Path, server: MlflowServer, way: str) -> Iterator[dict[str, str]]:
    """The variables that send a run to the server, straight or through a gateway."""
    if way == "straight":
        yield {"MLFLOW_TRACKING_URI": server.uri}
        return
    with GatewayProcess(folder / "gateway", server.uri) as gateway:
        yield {"OTEL_EXPORTER_OTLP_ENDPOINT": gateway.http}


@pytest.mark.parametrize("days", [-1, 1])
@pytest.mark.parametrize("way", ["straight", "through a gateway"])
def test_a_clock_a_day_wrong_on_the_second_of_two_hosts_that_share_a_folder_lets_its_attempt_stand(
    tmp_path: Path, mlflow_server: MlflowServer, way: str, days: int
) -> None:
    run_id = f"clock-{way[0]}-{days}"
    with to_mlflow(tmp_path, mlflow_server, way) as environ:
        for host, shift, status in (("node1", 0, "FAILED"), ("node2", days, "FINISHED")):
            attempt(tmp_path, host, run_id, status, days=shift, TRACELET_DIR=str(tmp_path / "spool"), **environ)
            run_of(mlflow_server, run_id, project="hosts", status=status, within_s=60)
        settled(mlflow_server, run_id, "FINISHED")


def test_the_attempt_whose_clock_was_behind_stands_when_the_first_ones_end_comes_last_through_a_gateway(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    run_id, spool = "clock-late", str(tmp_path / "spool")
    with to_mlflow(tmp_path, mlflow_server, "through a gateway") as environ:
        attempt(tmp_path, "node1", run_id, "FAILED", TRACELET_DIR=spool, TRACELET_SHIPPER="off", **environ)
        attempt(tmp_path, "node2", run_id, "FINISHED", days=-1, TRACELET_DIR=spool, **environ)
        run_of(mlflow_server, run_id, project="hosts", status="FINISHED", within_s=60)
        ship(tmp_path, "node1", TRACELET_DIR=spool, **environ)
        until(lambda: ends_told(tmp_path / "gateway" / "runs" / run_id / "gateway") == 2, 60)
        settled(mlflow_server, run_id, "FINISHED")


def test_a_run_resumed_after_its_folder_was_pruned_has_the_status_of_its_last_attempt(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    run_id, environ = "pruned", {"MLFLOW_TRACKING_URI": mlflow_server.uri, "TRACELET_DIR": str(tmp_path / "spool")}
    for _ in range(2):
        attempt(tmp_path, "node1", run_id, "FAILED", **environ)
        run_of(mlflow_server, run_id, project="hosts", status="FAILED", within_s=60)
    until(
        lambda: (
            on(
                tmp_path, "node1", sys.executable, "-m", "tracelet", "prune", "--keep", "0s", run_id, **environ
            ).returncode
            == 0
        ),
        60,
    )
    until(lambda: not (tmp_path / "spool" / run_id).exists(), 10)
    attempt(tmp_path, "node1", run_id, "FINISHED", **environ)
    run_of(mlflow_server, run_id, project="hosts", status="FINISHED", within_s=60)
