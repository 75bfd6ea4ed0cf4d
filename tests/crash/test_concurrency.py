"""Several processes, one folder: shippers that meet, runs that share an id, a run again while its shipper still drains.

Pattern: real programs and their real shippers over a real receiver, many times over, so that they meet at the bad
moment. Limit: two minutes a test.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import launches
from tests.crash.clocks import other_clocks
from tests.shipping import until
from tests.sinks import HttpSink, Say, attributes
from tracelet.spool import store
from tracelet.spool.lease import shipper_alive

LIMIT_S = 120.0
SOAK = os.environ.get("TRACELET_SOAK") == "1"

TRAIN = """
import sys, tracelet
exp = tracelet.start_logging(exp_name="job", project="together", run_id=sys.argv[1])
for i in range(int(sys.argv[3])):
    exp.log_metric(sys.argv[2], float(i), iteration=i)
tracelet.stop_logging()
"""


def start(sink: HttpSink, run_id: str, name: str, points: int, **variables: str) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url, **variables}
    return subprocess.Popen([sys.executable, "-c", TRAIN, run_id, name, str(points)], env=environ)


def stored(sink: HttpSink, run_id: str) -> Counter[tuple[str, int, int]]:
    """Each point by name, iteration and time, and how often it was taken."""
    return Counter((p.name, p.iteration, p.time_unix_nano) for p in sink.points(run_id))


def test_programs_that_start_as_the_shipper_leaves_are_all_delivered(otlp_sink: HttpSink) -> None:
    """One run, again and again, each start a little later or earlier after the last one's shipper has nothing left."""
    for number in range(12):
        program = start(otlp_sink, "relay", f"m{number}", 200)
        assert program.wait(LIMIT_S) == 0
        if number % 3 == 0:
            until(lambda number=number: len(otlp_sink.ends("relay")) == number + 1, LIMIT_S)
    until(lambda: len(otlp_sink.ends("relay")) == 12, LIMIT_S)
    points = stored(otlp_sink, "relay")
    assert set(points.values()) == {1}
    assert Counter(name for name, _, _ in points) == {f"m{number}": 200 for number in range(12)}


LEAVING = """
import subprocess, sys
from tracelet.shipper import process
from tracelet.shipper.shipment import Shipment
left, serve, is_complete = -1, process._serve.__code__, Shipment.is_complete.__code__

def watch(frame, event, arg):
    global left
    if frame.f_code is is_complete and frame.f_back.f_code is serve:
        if event == "return" and arg and left < 0:
            left = int(sys.argv[2])
    elif frame.f_code is not serve:
        return None
    elif event == "line" and left >= 0:
        if left == 0:
            subprocess.run(sys.argv[3:], check=True, timeout=60)
            sys.settrace(None)
        left -= 1
    return watch

sys.settrace(watch)
sys.exit(process.main([sys.argv[1]]))
"""


def test_a_program_that_comes_and_goes_at_any_line_of_the_shippers_leaving_is_delivered(
    otlp_sink: HttpSink, clean_environment: Path
) -> None:
    """A whole second start between two lines: while the lock is held it leaves its data to who holds it."""
    environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url}
    leaving = []
    for number in range(6):
        run_id = f"leaving-{number}"
        assert start(otlp_sink, run_id, "first", 20, TRACELET_SHIPPER="off").wait(LIMIT_S) == 0
        second = [sys.executable, "-c", TRAIN, run_id, "second", "20"]
        words = [sys.executable, "-c", LEAVING, str(store.run_folder(clean_environment, run_id)), str(number), *second]
        leaving.append(subprocess.Popen(words, env=environ))
    for shipper in leaving:
        assert shipper.wait(LIMIT_S) == 0
    for number in range(6):
        run_id = f"leaving-{number}"
        until(lambda run_id=run_id: otlp_sink.ends(run_id) == ["FINISHED"] * 2, LIMIT_S)
        points = stored(otlp_sink, run_id)
        assert set(points.values()) == {1}
        assert Counter(name for name, _, _ in points) == {"first": 20, "second": 20}


RANK = """
import os, sys, tracelet
exp = tracelet.start_logging(exp_name=sys.argv[1], project="together")
for i in range(20):
    exp.log_metric(f"of-rank-{os.environ['RANK']}", float(i), iteration=i)
print(exp.id, flush=True)
exp.stop("FINISHED" if os.environ["RANK"] == "0" else "FAILED")
"""


@pytest.mark.parametrize(("first", "ends"), [(0, ["FINISHED"]), (1, ["FAILED", "FINISHED"])])
def test_a_second_rank_that_joins_at_any_line_of_the_shippers_leaving_is_of_the_same_attempt(
    tmp_path: Path, otlp_sink: HttpSink, clean_environment: Path, first: int, ends: list[str]
) -> None:
    """Of one launch: rank 1 when all of rank 0 is delivered, or rank 0 when the shipper has waited for it in vain.

    The launcher of both is this process: the leaving shipper stands before the late rank like a wrapper script.
    """
    clocks = other_clocks(tmp_path / "clocks", faster=20)  # ten seconds are what it waits for a rank 0
    environ = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_sink.url, "TRACELET_RANKS": "all"}
    leaving, run_ids = [], {}
    for number in range(6) if first == 0 or SOAK else random.sample(range(6), 2):
        ranks = launches.torchrun(2, rdzv_id=f"leaving-{number}")
        program = [sys.executable, "-c", RANK, f"late-{number}"]
        early, late = ({**environ, **ranks[rank]} for rank in (first, 1 - first))
        early["TRACELET_SHIPPER"] = "off"
        done = subprocess.run(program, env=early, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        run_ids[number] = done.stdout.strip()
        words = [sys.executable, "-c", LEAVING, str(store.run_folder(clean_environment, run_ids[number])), str(number)]
        leaving.append(subprocess.Popen([*words, *program], env={**late, **clocks}, stdout=subprocess.PIPE, text=True))
    for shipper, run_id in zip(leaving, run_ids.values(), strict=True):
        assert shipper.communicate(timeout=LIMIT_S)[0].strip() == run_id  # the late rank found the run
        assert shipper.returncode == 0
    for number, run_id in run_ids.items():
        folder = store.run_folder(clean_environment, run_id)
        root = until(lambda name=f"run late-{number}": [s for s in otlp_sink.spans() if s.name == name], LIMIT_S)[0]
        until(lambda run_id=run_id: len(stored(otlp_sink, run_id)) == 40, LIMIT_S)
        until(lambda trace=root.trace_id: len(spans_of(otlp_sink, trace)) == 2, LIMIT_S)
        until(lambda run_id=run_id: otlp_sink.ends(run_id) == ends, LIMIT_S)
        until(lambda folder=folder: shipper_alive(folder) is None, LIMIT_S)
        assert spans_of(otlp_sink, root.trace_id) == {f"run late-{number}": ["FINISHED"], "rank 1": ["FAILED"]}
        assert otlp_sink.ends(run_id) == ends  # rank 0's is the last, and the run's
        points = stored(otlp_sink, run_id)
        assert set(points.values()) == {1}
        assert Counter(name for name, _, _ in points) == {"of-rank-0": 20, "of-rank-1": 20}
        manifest = store.read_manifest(folder)
        assert manifest is not None
        (attempt,) = manifest.attempts
        assert sorted(attempt.extra["launch"]["ranks"]) == ["0", "1"]


def spans_of(sink: HttpSink, trace: bytes) -> dict[str, list[str]]:
    """The states of a trace's spans as they came, by name."""
    found: dict[str, list[str]] = {}
    for span in sink.spans():
        if span.trace_id == trace:
            found.setdefault(span.name, []).append(attributes(span)["tracelet.run.state"])
    return found


def test_two_programs_with_one_id_at_once_are_two_attempts_of_one_run(otlp_sink: HttpSink) -> None:
    programs = [start(otlp_sink, "twins", f"m{number}", 5000) for number in range(4)]
    for program in programs:
        assert program.wait(LIMIT_S) == 0
    until(lambda: len(otlp_sink.ends("twins")) == 4, LIMIT_S)
    points = stored(otlp_sink, "twins")
    assert set(points.values()) == {1}
    assert Counter(name for name, _, _ in points) == {f"m{number}": 5000 for number in range(4)}
    assert otlp_sink.ends("twins") == ["FINISHED"] * 4


def test_a_run_resumed_while_its_shipper_still_drains_is_shipped_by_it(
    otlp_sink: HttpSink, clean_environment: Path
) -> None:
    otlp_sink.rule = lambda _: Say(503)
    assert start(otlp_sink, "again", "first", 3000).wait(LIMIT_S) == 0
    folder = store.run_folder(clean_environment, "again")
    shipper = shipper_alive(folder)
    assert shipper is not None
    assert start(otlp_sink, "again", "second", 3000).wait(LIMIT_S) == 0
    assert shipper_alive(folder) == shipper  # the second start found the lock taken, and left its data to it
    otlp_sink.rule = None
    until(lambda: len(otlp_sink.ends("again")) == 2, LIMIT_S)
    points = stored(otlp_sink, "again")
    assert Counter(name for name, _, _ in points) == {"first": 3000, "second": 3000}
    until(lambda: shipper_alive(folder) is None, LIMIT_S)


@pytest.mark.parametrize("count", [4])
def test_of_many_shippers_of_one_folder_one_ships(otlp_sink: HttpSink, clean_environment: Path, count: int) -> None:
    assert start(otlp_sink, "shared", "m", 20_000, TRACELET_SHIPPER="off").wait(LIMIT_S) == 0
    words = [sys.executable, "-m", "tracelet", "ship", "shared"]
    shippers = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    said = [shipper.communicate(timeout=LIMIT_S)[0] for shipper in shippers]
    assert [shipper.returncode for shipper in shippers] == [0] * count, said
    points = stored(otlp_sink, "shared")
    assert set(points.values()) == {1}
    assert len(points) == 20_000
    assert otlp_sink.ends("shared") == ["FINISHED"]
