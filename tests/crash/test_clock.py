"""Clocks that jump between two attempts of one run, or stand still in one: the order of starts counts, and every point.

Pattern: real programs whose clock is moved before tracelet is imported; real shippers. Limit: two minutes each.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.programs import finished
from tests.servers import MlflowServer, rows_of, run_of
from tests.shipping import until
from tests.sinks import HttpSink
from tests.spooled import read
from tracelet.records import WriterOpened
from tracelet.spool import store
from tracelet.spool.lease import shipper_alive

ATTEMPT = """
import sys, time
real, days, status = time.time_ns, int(sys.argv[1]), sys.argv[2]
time.time_ns = lambda: real() + days * 86_400 * 10**9
import tracelet
exp = tracelet.start_logging(exp_name=sys.argv[4], project="clock", backend=sys.argv[3], run_id=sys.argv[4])
exp.log_metric("loss", days, iteration=days)
exp.stop(status)
if sys.argv[3] == "mlflow":
    exp.flush(timeout=60)
"""


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumped_a_day_between_two_attempts_lets_the_last_one_stand(
    tmp_path: Path, mlflow_server: MlflowServer, days: int
) -> None:
    run_id = f"clock{days}"
    for shift, status in ((0, "FAILED"), (days, "FINISHED")):
        done = finished(
            tmp_path, ATTEMPT, shift, status, "mlflow", run_id, limit_s=120, MLFLOW_TRACKING_URI=mlflow_server.uri
        )
        assert done.returncode == 0, done.stderr
    run = run_of(mlflow_server, run_id, project="clock", status="FINISHED", within_s=60)
    assert sorted(row.step for row in rows_of(mlflow_server, run.info.run_id, "loss")) == sorted([0, days])
    assert run.info.end_time >= run.info.start_time


JUMPS = """
import sys, time
real, days, off = time.time_ns, int(sys.argv[1]), 0
time.time_ns = lambda: real() + off * 86_400 * 10**9
import tracelet
exp = tracelet.start_logging(exp_name=sys.argv[2], project="jumps", run_id=sys.argv[2])
def log(first):
    for i in range(first, first + 300):
        exp.log_metric("loss", float(i), iteration=i)
log(0)
with exp.span("phase"):
    off = days
    log(300)
with exp.span("back"):
    off = 0
    log(600)
if days < 0:
    off = days
exp.stop()
exp.flush(60)
"""


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_a_day_and_back_within_a_run_costs_no_point_and_nothing_ends_before_it_began(
    tmp_path: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink, days: int
) -> None:
    run_id = f"jumps{days}"
    servers = {"MLFLOW_TRACKING_URI": mlflow_server.uri, "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url}
    done = finished(tmp_path, JUMPS, days, run_id, limit_s=120, **servers)
    assert done.returncode == 0, done.stderr
    run = run_of(mlflow_server, run_id, project="jumps", status="FINISHED", within_s=60)
    assert sorted(row.step for row in rows_of(mlflow_server, run.info.run_id, "loss")) == list(range(900))
    assert run.info.end_time >= run.info.start_time
    until(lambda: len(otlp_sink.spans()) == 3, 60)
    assert sorted(point.iteration for point in otlp_sink.points(run_id)) == list(range(900))
    assert [span.name for span in otlp_sink.spans() if span.end_time_unix_nano < span.start_time_unix_nano] == []
    (root,) = (span for span in otlp_sink.spans() if not span.parent_span_id)
    assert root.end_time_unix_nano // 1_000_000 == run.info.end_time


def test_attempts_are_counted_over_a_restart_of_the_machine_and_other_hosts_that_share_the_folder(
    tmp_path: Path, clean_environment: Path
) -> None:
    before = clean_environment / "shared" / "other-host-0123456789ab"
    old = store.Manifest("shared", "p", "e", "r", host="other-host", boot_id="0123456789ab")
    for number in (0, 0, 2):  # two of a release that did not count
        key = f"{len(old.attempts):016x}"
        old = old.with_attempt(store.Attempt(key, time.time_ns(), 1, 0, number=number))
    store.update_manifest(before, lambda _: old)
    done = finished(tmp_path, ATTEMPT, -1, "FINISHED", "file", "shared", TRACELET_SHIPPER="off")
    assert done.returncode == 0, done.stderr
    (mine,) = [folder for folder in (clean_environment / "shared").iterdir() if folder != before]
    manifest = store.read_manifest(mine)
    assert manifest is not None
    assert [attempt.number for attempt in manifest.attempts] == [4]
    (order,) = [attempt.order for attempt in manifest.attempts]
    assert order == max(attempt.order for attempt in old.attempts) + 1  # whose clock says a day later
    assert [one.resource["tracelet.run.attempt.order"] for one in read(mine).of(WriterOpened)] == [order]


STANDS_STILL = """
import math, os, sys, time
now = time.time_ns()
time.time_ns = lambda: now
import tracelet
if len(sys.argv) == 2:
    backend = tracelet.Prometheus(sys.argv[1])
else:
    out, tracking_uri, endpoint = sys.argv[1:]
    backend = [tracelet.File(out), tracelet.MLflow(tracking_uri), tracelet.OTLP(endpoint)]
exp = tracelet.start_logging(exp_name="still", project="clock", run_id="still", backend=backend)
def log():
    for i in range(300):
        exp.log_metric("equal", 1.0, iteration=7)
        exp.log_metric("nan", math.nan, iteration=7)
        exp.log_metric("different", float(i), iteration=7)
        exp.log_metric("alternating", float(i % 2), iteration=i // 10)
log()
child = os.fork()
if child == 0:
    log()
    os._exit(0)
os.waitpid(child, 0)
exp.stop()
print(now)
"""
LOGGED = Counter(
    {("equal", "1.0", 7): 600, ("nan", "nan", 7): 600}
    | {("different", str(float(i)), 7): 2 for i in range(300)}
    | {("alternating", str(float(value)), step): 10 for value in range(2) for step in range(30)}
)
Arrived = tuple[str, float, int, int]
"""Name, value, iteration, and the time by which the destination tells it from others."""


def all_once(points: Iterable[Arrived]) -> bool:
    """Everything is there, and no two are one to who takes them for one by their times."""
    points = list(points)
    times = Counter((name, time) for name, _, _, time in points)
    return Counter((n, str(v), i) for n, v, i, _ in points) == LOGGED and set(times.values()) == {1}


def test_points_of_one_nanosecond_equal_and_different_are_all_there_and_none_twice(
    tmp_path: Path, mlflow_server: MlflowServer, otlp_sink: HttpSink, clean_environment: Path
) -> None:
    out = tmp_path / "out.jsonl"
    done = finished(tmp_path, STANDS_STILL, out, mlflow_server.uri, otlp_sink.url, limit_s=120)
    assert done.returncode == 0, done.stderr
    until(lambda: shipper_alive(store.run_folder(clean_environment, "still")) is None, 60)
    assert all_once((p.name, p.value, p.iteration, p.time_unix_nano) for p in otlp_sink.points())
    run = run_of(mlflow_server, "still", project="clock", status="FINISHED", within_s=60)
    rows = [row for row in rows_of(mlflow_server, run.info.run_id) if not row.key.startswith("system/")]
    assert all_once((row.key, float("nan") if row.is_nan else row.value, row.step, row.timestamp) for row in rows)
    assert all_once(points_in(out))


def points_in(path: Path) -> Iterable[Arrived]:
    """The user's points in a file of the file destination."""
    for line in path.read_text().splitlines():
        for resource in json.loads(line).get("resourceMetrics", ()):
            for scope in resource["scopeMetrics"]:
                for metric in scope["metrics"] if scope["scope"]["name"] == "tracelet" else ():
                    for point in metric.get("gauge", {}).get("dataPoints", ()):
                        if not point.get("flags"):
                            iteration = int(point["attributes"][0]["value"]["intValue"])
                            yield metric["name"], float(point["asDouble"]), iteration, int(point["timeUnixNano"])
