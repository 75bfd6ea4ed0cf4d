"""No receiver for ten minutes under a run, or for a laptop's week: its runs wait in the spool, and all is delivered.

Pattern: real programs and their shippers, over a receiver that refuses or a wire that is cut; their clocks run faster,
and each may stand on a later day. Limit: a minute a test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import processes_of
from tests.crash.clocks import other_clocks
from tests.crash.test_sidecar import points
from tests.programs import LIMIT_S, said, started
from tests.shipping import until
from tests.sinks import GrpcSink, HttpSink, Say, Sink
from tests.spooled import folder_of
from tests.wire import Wire
from tracelet.spool.lease import shipper_alive

DAY_NS = 86_400 * 10**9

TRAIN = """
import sys, tracelet
for run_id in sys.argv[1:]:
    exp = tracelet.start_logging(exp_name="job", project="laptop", run_id=run_id)
    for i in range(1000):
        exp.log_metric("loss", 1 / (i + 1), iteration=i)
    tracelet.stop_logging()
"""


def on_day(day: int, tmp_path: Path, sink: HttpSink, *words: str) -> subprocess.CompletedProcess[str]:
    """A command on that day, its ten minutes a second and a half long."""
    clocks = other_clocks(tmp_path / f"clocks-{day}", faster=400, days=day)
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url, **clocks},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )


def test_a_week_of_runs_is_named_at_the_next_start_and_delivered_by_one_command(
    tmp_path: Path, clean_environment: Path, otlp_sink: HttpSink
) -> None:
    otlp_sink.rule = lambda _: Say(503)
    for day in (0, 2, 5):
        done = on_day(day, tmp_path, otlp_sink, "-c", TRAIN, f"day-{day}")
        assert "1,000 points still on the way to otlp" in done.stderr
        # Ten minutes after the end, without progress, its shipper leaves: a closed lid finds no process.
        until(lambda: not processes_of(str(tmp_path)), LIMIT_S)
    assert points(otlp_sink, "day-0") == []

    otlp_sink.rule = None
    done = on_day(7, tmp_path, otlp_sink, "-c", TRAIN, "home-1", "home-2")
    (said,) = re.findall(
        r"^3 earlier runs wait in (\S+), .*: (day-\d), (day-\d), (day-\d)\. ", done.stderr, re.MULTILINE
    )
    assert said[0] == str(clean_environment)
    assert done.stderr.count("earlier run") == 1  # not again at the program's second start
    assert sorted(said[1:]) == ["day-0", "day-2", "day-5"]
    assert points(otlp_sink, "day-0") == []  # a new run's shipper is no other's

    on_day(8, tmp_path, otlp_sink, "-m", "tracelet", "ship")
    for day in (0, 2, 5):
        run_id = f"day-{day}"
        assert points(otlp_sink, run_id) == list(range(1000))
        assert otlp_sink.ends(run_id) == ["FINISHED"]
    first, last = (otlp_sink.points(f"day-{day}")[0].time_unix_nano for day in (0, 5))
    assert 5 * DAY_NS <= last - first < 6 * DAY_NS  # each value has the time at which it was logged
    listed = on_day(8, tmp_path, otlp_sink, "-m", "tracelet", "runs", "--json")
    assert {run["undelivered"] for run in json.loads(listed.stdout)} == {False}
    done = on_day(9, tmp_path, otlp_sink, "-c", TRAIN, "home-3")
    assert "earlier run" not in done.stderr


GOES_ON = """
import sys, time, tracelet
exp = tracelet.start_logging(exp_name="job", project="outage", run_id="run")
i = 0
def log(count):
    global i
    for i in range(i + 1, i + 1 + count):
        exp.log_metric("loss", 1 / i, iteration=i)
log(100)
print("logged", flush=True)
sys.stdin.readline()
over = time.monotonic() + 600
while time.monotonic() < over:
    log(10)
    time.sleep(0.01)  # six seconds by its clock
print(i, flush=True)
sys.stdin.readline()
"""


def arrived(sink: Sink) -> list[int]:
    """The iterations of its points; a request whose answer was lost comes again, with the same times."""
    return sorted(iteration for iteration, _ in {(p.iteration, p.time_unix_nano) for p in sink.points("run")})


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_ten_minutes_without_a_receiver_under_a_run_that_goes_on_lose_nothing(
    tmp_path: Path, clean_environment: Path, kind: str
) -> None:
    """The whole of it: training, its shipper, and ten minutes by their clocks, which that one shipper outlasts."""
    with GrpcSink() if kind == "grpc" else HttpSink() as sink, Wire(int(sink.endpoint.rpartition(":")[2])) as wire:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{wire.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc" if kind == "grpc" else "http/protobuf",
            **other_clocks(tmp_path / "clocks", faster=600),
        }
        with started(tmp_path, GOES_ON, **variables) as program:
            assert said(program) == "logged"
            assert program.stdin is not None
            until(lambda: len(sink.points("run")) == 100, LIMIT_S)
            folder = folder_of(clean_environment)
            shipper = until(lambda: shipper_alive(folder), LIMIT_S)
            wire.spoil("refusing")
            program.stdin.write("the receiver is away\n")
            program.stdin.flush()
            logged = int(said(program))
            until(lambda: "not now" in (folder / "shipper.log").read_text(), LIMIT_S)
            assert len(sink.points("run")) == 100
            wire.mend()
            until(lambda: len(arrived(sink)) >= logged, LIMIT_S)
            assert shipper_alive(folder) == shipper
            program.stdin.close()
            until(lambda: sink.ends("run"), LIMIT_S)
        assert arrived(sink) == list(range(1, logged + 1))
        assert sink.ends("run") == ["FINISHED"]
        assert list(folder.glob("rejected-*")) == []
        until(lambda: shipper_alive(folder) is None, LIMIT_S)
