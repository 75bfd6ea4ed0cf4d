"""Many points without a destination, and many names: nothing lost, memory flat, the spool as large as it says.

Pattern: a real program whose resident memory, and its shipper's, is read from /proc as it goes; a real receiver and a
real MLflow, as a server and as a database. Limit: 60 s a program (10 min in the soak), three times that to MLflow;
1 million points and 10,000 names, with TRACELET_SOAK=1 10 million and 100,000.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.crash.test_disk_full import delivered
from tests.programs import said, started
from tests.servers import MlflowServer
from tests.shipping import until
from tests.sinks import HttpSink
from tests.spooled import folder_of
from tests.wire import Wire
from tracelet.spool.lease import shipper_alive
from tracelet.spool.reader import Position, SpoolReader
from tracelet.spool.store import usage

SOAK = bool(os.environ.get("TRACELET_SOAK"))
POINTS = 10_000_000 if SOAK else 1_000_000
BESIDE_POINTS = 1_000_000 if SOAK else 60_000
NAMES = 100_000 if SOAK else 10_000
LIMIT_S = 600 if SOAK else 60

MEMORY = """
def resident(pid="self"):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
"""

PLENTY = (
    MEMORY
    + """
import importlib.util, json, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "mlflow" else find(name, *more)  # as without MLflow
import tracelet
count = int(sys.argv[1])
exp = tracelet.start_logging(exp_name="plenty", project="p")
assert exp._run.ticket.destinations == ()
log = exp.log_metric
samples = []
for i in range(count):
    log("loss", i / 2, i)
    if i % (count // 20) == count // 20 - 1:
        samples.append(resident())
print(json.dumps([exp.stats.logged, exp.stats.refused, samples]))
exp.stop()
"""
)

NAMED = (
    MEMORY
    + """
import json, pathlib, sys, tracelet
from tracelet.spool.lease import shipper_alive
count = int(sys.argv[1])
turns, where = int(sys.argv[2]), sys.argv[3:]
backend = {
    1: lambda file: tracelet.File(file),
    2: lambda otlp, mlflow: [tracelet.OTLP(otlp), tracelet.MLflow(mlflow)],
}[len(where)](*where)
exp = tracelet.start_logging(exp_name="named", project="p", backend=backend)
samples = []
for turn in range(turns):
    for i in range(count):
        exp.log_metric(f"metric/{i}", float(turn), iteration=turn)
    assert exp.flush(600)
    samples.append([resident(), resident(shipper_alive(exp._run.folder))])
print(json.dumps([exp.stats.logged, exp.stats.shipped, samples]))
exp.stop()
"""
)


Record = Callable[[str, object], None]


def remember(record: Record, logged: object, samples: list[list[int]]) -> None:
    """For the page of the long runs; samples are of training and of its shipper, in bytes."""
    record("points", logged)
    record("most MB of training", max(training for training, *_ in samples) // 1_000_000)
    if len(samples[0]) > 1:
        record("most MB of the shipper", max(shipper for _, shipper in samples) // 1_000_000)


def run(program: str, *arguments: str, cwd: Path, limit_s: float = LIMIT_S) -> list[object]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


def test_points_without_a_destination_are_all_there_and_take_no_memory(
    tmp_path: Path, clean_environment: Path, record_property: Record
) -> None:
    logged, refused, samples = run(PLENTY, str(POINTS), cwd=tmp_path)
    assert (logged, refused) == (POINTS, 0)
    assert isinstance(samples, list)
    remember(record_property, logged, [[one] for one in samples])
    assert max(samples[5:]) - samples[4] < 4_000_000  # mapped segments that are full are given back
    folder = folder_of(clean_environment)
    assert usage(folder) < 32 * POINTS * 1.1 + 2_000_000
    assert count(folder) == POINTS


def count(folder: Path) -> int:
    """The points in a folder, each iteration being one more than the one before."""
    reader = SpoolReader(folder)
    (writer,) = reader.writers()
    position, total = Position(), 0
    while True:
        ranges, position = reader.poll(writer, position, 100_000, dead=True)
        if not ranges:
            reader.close()
            return total
        for piece in ranges:
            records = reader.read(piece).records
            iterations = memoryview(records).cast("q")[2::4].tolist()
            assert iterations == list(range(total, total + len(iterations)))
            total += len(iterations)


def test_very_many_names_arrive_and_memory_stays_where_it_is(
    tmp_path: Path, clean_environment: Path, record_property: Record
) -> None:
    out = tmp_path / "out.jsonl"
    logged, shipped, samples = run(NAMED, str(NAMES), "12", str(out), cwd=tmp_path)
    assert logged == shipped == 12 * NAMES
    assert isinstance(samples, list)
    remember(record_property, logged, samples)
    for which in (0, 1):  # training, and the shipper
        assert samples[-1][which] - samples[4][which] < 3_000_000 + 100 * NAMES  # flat from the fourth turn on
    folder = folder_of(clean_environment)
    until(lambda: shipper_alive(folder) is None, 60)
    arrived = delivered(out)
    assert len(arrived) == len(set(arrived)) == 12 * NAMES


@pytest.mark.parametrize("kind", ["server", "sqlite"])
def test_very_many_names_are_all_at_an_otlp_receiver_and_in_mlflow_once(
    tmp_path: Path,
    clean_environment: Path,
    otlp_sink: HttpSink,
    mlflow_server: MlflowServer,
    kind: str,
    record_property: Record,
) -> None:
    """One destination is quick, the other slow, and each has to remember every name for the end of its series."""
    database = tmp_path / "mlflow.db" if kind == "sqlite" else mlflow_server.database
    address = f"sqlite:///{database}" if kind == "sqlite" else mlflow_server.uri
    limit_s = 3 * LIMIT_S  # MLflow takes some 100 us a value
    logged, _, samples = run(NAMED, str(NAMES), "4", otlp_sink.url, address, cwd=tmp_path, limit_s=limit_s)
    assert logged == 4 * NAMES
    assert isinstance(samples, list)
    remember(record_property, logged, samples)
    for which in (0, 1):  # training, and the shipper
        assert samples[-1][which] - samples[1][which] < 10_000_000 + 200 * NAMES, samples
    folder = folder_of(clean_environment)
    until(lambda: shipper_alive(folder) is None, limit_s)
    assert not list(folder.glob("rejected-*"))
    expected = Counter((f"metric/{i}", turn) for i in range(NAMES) for turn in range(4))
    assert Counter((point.name, point.iteration) for point in otlp_sink.points()) == expected
    with closing(sqlite3.connect(database)) as there:
        rows = there.execute(
            "select key, step from metrics where run_uuid = (select run_uuid from tags where value = ?)",
            [folder.parent.name],
        )
        assert Counter(row for row in rows if row[0].startswith("metric/")) == expected


BESIDE = (
    MEMORY
    + """
import json, sys, tracelet
from tests.shipping import until
from tracelet.spool.cursor import Progress
from tracelet.spool.lease import shipper_alive
out, http, grpc, mlflow, points = sys.argv[1:]
hanging = [tracelet.OTLP(http, timeout_s=2), tracelet.OTLP(grpc, "grpc", timeout_s=2), tracelet.MLflow(mlflow)]
backend = [tracelet.File(out), *hanging]
exp = tracelet.start_logging(exp_name="beside", project="p", backend=backend)
progress = Progress(exp._run.folder)
def delivered():
    progress.refresh()
    return {one: there.delivered for one, there in progress.destinations.items() if there.delivered}
logged, samples = 0, []
for phase in range(8):
    for i in range(int(points)):
        exp.log_metric("loss", i / 2, logged)
        logged += 1
    until(lambda: logged in delivered().values(), 120)
    if phase == 1:
        print("begun", flush=True)
        sys.stdin.readline()
    samples.append([resident(), resident(shipper_alive(exp._run.folder))])
print(json.dumps([exp.stats.logged, exp.stats.refused, list(delivered()), samples]), flush=True)
sys.stdin.readline()
"""
)


def test_memory_stays_where_it_is_beside_destinations_that_hang_while_another_is_served(
    tmp_path: Path, record_property: Record
) -> None:
    """They take the connection and never say a word; what waits for them waits on the disk."""
    with Wire(1) as http, Wire(1) as grpc, Wire(1) as mlflow:
        wires = (http, grpc, mlflow)
        for wire in wires:
            wire.spoil("hanging")
        at = [f"http://127.0.0.1:{wire.port}" for wire in wires]
        with started(
            tmp_path, BESIDE, tmp_path / "out.jsonl", *at, BESIDE_POINTS, MLFLOW_HTTP_REQUEST_TIMEOUT="2"
        ) as program:
            assert said(program) == "begun"
            # Given up and asked again, more than once; gRPC alone holds on to its connection over that.
            until(lambda: min(http.connections, mlflow.connections) > 3 and grpc.connections, 60)
            assert program.stdin is not None
            program.stdin.write("\n")
            program.stdin.flush()
            logged, refused, served, samples = json.loads(said(program))
            assert (logged, refused) == (8 * BESIDE_POINTS, 0)
            assert [one.partition("-")[0] for one in served] == ["file"]
            remember(record_property, logged, samples)
            for which in (0, 1):  # training, and the shipper
                assert samples[-1][which] - samples[2][which] < 6_000_000, samples
