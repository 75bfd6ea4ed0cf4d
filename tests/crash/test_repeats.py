"""A shipper killed between every answer and its acknowledgement: nothing twice, and what goes again is the same bytes.

Pattern: one real shipper after the other over one folder, each killed (SIGKILL) when a batch it has sent is about to be
acknowledged; two ranks that log the same keys, in series that rise, fall, are NaN, and whose steps come late.
Limit: 60 s for each shipper; 90 s a destination.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.mortal_shipper import logged_by_ranks, ship_with_deaths
from tests.servers import MlflowServer, Seen, Spoil, recording_proxy, rows_of
from tests.sinks import GrpcSink, HttpSink, Sink, attributes, until
from tracelet import ids
from tracelet.backends import OTLP, File, MLflow, Spec
from tracelet.destinations import to_destination
from tracelet.spool import store
from tracelet.spool.lease import shipper_alive

EACH, AND_LATE = 90, 250  # together more than one batch of MLflow's, whose last has nothing but late steps
THEIRS = 1_000_000  # a step that nobody here logs
Row = tuple[str, float, int]


def series(rank: int) -> list[Row]:
    """What a rank logs: one key after the other, round by round."""
    return [
        row
        for i in range(EACH)
        for row in (
            ("rising", i + rank / 4, i),
            ("falling", -i - rank / 4, i),
            ("nan", math.nan, i + 1000 * rank),
            ("late", 0.5 + rank, EACH + AND_LATE - i),  # the highest step first: none raises the latest value
            ("constant", 1.0 + rank, 7),  # equal in all but the millisecond
        )
    ] + [("late", 0.5 + rank, AND_LATE - i) for i in range(AND_LATE)]


ROWS = {0: series(0), 1: series(1)}
EXPECTED = Counter(dict.fromkeys(("rising", "falling", "nan", "late", "constant"), 2 * EACH)) + Counter(
    late=2 * AND_LATE
)


def folder_of(run_id: str, *specs: Spec, cwd: Path) -> Path:
    """The spool of a run of two ranks, with these destinations."""
    folder = store.make_folder(store.run_folder(Path(os.environ["TRACELET_DIR"]), run_id))
    logged_by_ranks(folder, run_id, [to_destination(spec, {}, cwd)[0] for spec in specs], ROWS)
    return folder


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(("", *filter(None, [os.environ.get("PYTHONPATH")])))}


# ---- OTLP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_an_otlp_receiver_gets_each_request_again_in_the_same_bytes(protocol: str, tmp_path: Path) -> None:
    made: HttpSink | GrpcSink = HttpSink() if protocol == "http/protobuf" else GrpcSink()
    with made as sink:
        folder = folder_of(ids.new_run_id(), OTLP(sink.endpoint, protocol=protocol), cwd=tmp_path)
        assert ship_with_deaths(folder, environ()) >= 2
        check_repeats([one.body for one in sink.stored if is_batch(one.message, one.signal)])
        assert kept_points(sink) == EXPECTED


def is_batch(message: Any, signal: str) -> bool:
    """Whether a request is a batch's, and no sign of life, of which each has its own time."""
    if signal != "metrics":
        return True
    scopes = [scope for resource in message.resource_metrics for scope in resource.scope_metrics]
    return not all(scope.scope.name == "tracelet.run" for scope in scopes)


def check_repeats(bodies: Sequence[bytes]) -> None:
    """Each was sent at least twice, and every time as it was."""
    counts = Counter(bodies)
    assert counts
    assert min(counts.values()) >= 2, "a repeat differs from the first"


def kept_points(sink: Sink) -> Counter[str]:
    """How many points a store has that keeps them by series and time; one with two values would show as a doubt."""
    kept: dict[tuple[Any, ...], set[str]] = {}
    for resource, scope, metric in sink.metrics():
        for point in metric.gauge.data_points if scope == "tracelet" else ():
            if not point.flags:
                at = (metric.name, resource["service.instance.id"], point.time_unix_nano // 1_000_000)
                kept.setdefault(at, set()).add(f"{point.as_double} {attributes(point)['tracelet.iteration']}")
    assert all(len(values) == 1 for values in kept.values())
    return Counter(name for name, _, _ in kept)


# ---- a file ------------------------------------------------------------------------------------------------------


def test_a_file_has_each_line_once(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    folder = folder_of(ids.new_run_id(), File(str(out)), cwd=tmp_path)
    assert ship_with_deaths(folder, environ()) >= 2
    lines = out.read_text().splitlines()
    found: Counter[str] = Counter()
    for line in map(json.loads, lines):
        for resource in line.get("resourceMetrics", ()):
            for scope in resource["scopeMetrics"]:
                for metric in scope["metrics"] if scope["scope"]["name"] == "tracelet" else ():
                    found[metric["name"]] += sum("flags" not in p for p in metric["gauge"]["dataPoints"])
    assert found == EXPECTED
    assert len(lines) == len(set(lines))


# ---- MLflow ------------------------------------------------------------------------------------------------------


def test_an_mlflow_server_has_each_row_once_and_is_sent_none_that_it_has(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    with recording_proxy(mlflow_server.uri) as proxy:
        folder = folder_of(run_id := ids.new_run_id(), MLflow(proxy.uri), cwd=tmp_path)
        assert ship_with_deaths(folder, environ()) >= 3
        bodies = [seen.body for seen in proxy.calls("runs/log-batch") if b'"metrics"' in seen.body]
    assert len(bodies) == len(set(bodies)), "rows that are stored were sent again"
    rows = rows_of(mlflow_server, _mlflow_run(mlflow_server, run_id))
    check_rows([(row.key, row.step, row.timestamp, repr(row.value), row.is_nan) for row in rows])


def test_what_never_reached_mlflow_is_sent_again_in_the_same_bytes(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    with recording_proxy(mlflow_server.uri) as proxy:
        folder = folder_of(run_id := ids.new_run_id(), MLflow(proxy.uri), cwd=tmp_path)
        struck: list[bytes] = []

        def rule(seen: Seen) -> Spoil:
            if b'"metrics"' not in seen.body or seen.body in struck:
                return Spoil()
            struck.append(seen.body)
            pid = shipper_alive(folder)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            return Spoil(forward=False, hang_up=True)

        proxy.rule = rule
        (folder.parent / "seen").mkdir()
        for number in range(1, 30):
            (folder.parent / "seen" / str(number)).touch()  # the proxy strikes, not the journal
        assert ship_with_deaths(folder, environ()) == len(struck) >= 2
        counts = Counter(seen.body for seen in proxy.calls("runs/log-batch") if b'"metrics"' in seen.body)
    assert set(counts) == set(struck)
    assert set(counts.values()) == {2}
    rows = rows_of(mlflow_server, _mlflow_run(mlflow_server, run_id))
    check_rows([(row.key, row.step, row.timestamp, repr(row.value), row.is_nan) for row in rows])


@pytest.mark.parametrize("came", [True, False], ids=["arrived", "did not arrive"])
def test_a_later_row_of_somebody_else_hides_neither_that_rows_arrived_nor_that_they_did_not(
    came: bool, tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    """Whoever asks MLflow for the latest step of a key then hears of a stranger's, and has to look for its own row."""
    with recording_proxy(mlflow_server.uri) as proxy:
        folder = folder_of(ids.new_run_id(), MLflow(proxy.uri), cwd=tmp_path)
        struck: list[bytes] = []
        theirs: list[str] = []

        def rule(seen: Seen) -> Spoil:
            if b'"metrics"' in seen.body and not struck:
                struck.append(seen.body)
                pid = shipper_alive(folder)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                return Spoil(forward=came, hang_up=True)
            if struck and not theirs:
                run_id = json.loads(struck[0])["run_id"]
                if came:
                    until(lambda: len(rows_of(mlflow_server, run_id, "rising")) > 1, 60)
                theirs.append(run_id)
                for key in ("rising", "falling", "nan", "late", "constant"):
                    row = {"run_id": run_id, "key": key, "value": 0.0, "timestamp": 2**41, "step": THEIRS}
                    mlflow_server.ask("runs/log-metric", row)
            return Spoil()

        proxy.rule = rule
        (folder.parent / "seen").mkdir()
        for number in range(1, 30):
            (folder.parent / "seen" / str(number)).touch()  # the proxy strikes, not the journal
        assert ship_with_deaths(folder, environ()) == 1
        counts = Counter(seen.body for seen in proxy.calls("runs/log-batch") if b'"metrics"' in seen.body)
    assert counts[struck[0]] == (1 if came else 2)
    rows = [row for row in rows_of(mlflow_server, theirs[0]) if row.step != THEIRS]
    check_rows([(row.key, row.step, row.timestamp, repr(row.value), row.is_nan) for row in rows])


def test_an_mlflow_database_has_each_row_once(tmp_path: Path) -> None:
    folder = folder_of(ids.new_run_id(), MLflow("sqlite:///mlflow.db"), cwd=tmp_path)
    assert ship_with_deaths(folder, environ()) >= 3
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        check_rows(database.execute("select key, step, timestamp, value, is_nan from metrics").fetchall())
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]


def check_rows(rows: Sequence[tuple[Any, ...]]) -> None:
    mine = [row for row in rows if not row[0].startswith("system/")]
    assert Counter(row[0] for row in mine) == EXPECTED
    assert len(mine) == len(set(mine))


def _mlflow_run(server: MlflowServer, run_id: str) -> str:
    experiment = server.ask("experiments/get-by-name?experiment_name=repeats")["experiment"]["experiment_id"]
    query = {"experiment_ids": [experiment], "filter": f"tags.`tracelet.run.id` = '{run_id}'"}
    (run,) = server.ask("runs/search", query)["runs"]
    return str(run["info"]["run_id"])
