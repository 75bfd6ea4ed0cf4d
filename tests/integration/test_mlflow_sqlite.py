"""The MLflow exporter against databases, through mlflow's own store."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_batches import (
    START_NS,
    batch,
    deliver,
    ended,
    exporters_closed,
    opened_exporter,
    persist,
    run_info,
    started,
)
from tracelet.exporters.base import Delivered, Rejected, RetryLater
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.exporters.mlflow.native import quiet_mlflow
from tracelet.records import ArtifactLogged, ParamsLogged, RunInfo, TagsSet

__all__ = ["exporters_closed"]

with quiet_mlflow():
    import mlflow  # noqa: F401  its packages warn on import
    import sqlalchemy.event


@pytest.fixture
def run() -> RunInfo:
    return run_info(uuid.uuid4().hex)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the module: making its tables takes seconds."""
    return tmp_path_factory.mktemp("database")


@pytest.fixture
def opened_here(folder: Path, run: RunInfo) -> MLflowExporter:
    return opened_exporter(uri_of(folder), run, artifact_root=str(folder / "mlruns"))


def uri_of(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def count(folder: Path, exporter: MLflowExporter, what: str = "count(*)") -> Any:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        run_id = exporter.memory()["run_id"]
        return database.execute(f"select {what} from metrics where run_uuid = ?", [run_id]).fetchone()[0]


def test_a_run_stands_in_the_database_complete(folder: Path, run: RunInfo, opened_here: MLflowExporter) -> None:
    exporter = opened_here
    spool = folder / "spool"
    spool.mkdir()
    (spool / "copy").write_bytes(b"model")
    file = ArtifactLogged(1, "models/best.pt", "/x", "copy", 5, None, "x/y")
    rows = [("m", float(i), i, i) for i in range(999)]
    records = (started(), ParamsLogged(1, {"lr": 0.1, "long": "x" * 7000}), TagsSet(1, {"a": "b"}), file)
    deliver(exporter, batch(run, *records, rows=rows, folder=str(spool)), batch(run, ended(), number=2))
    view = exporter._transport.run(exporter.memory()["run_id"])
    assert view is not None
    assert (view.status, view.params["lr"], view.tags["a"], count(folder, exporter)) == ("FINISHED", "0.1", "b", 999)
    assert exporter.memory()["link"] == f"mlflow ui --backend-store-uri {uri_of(folder)}"
    root = folder / "mlruns" / view.experiment_id / view.run_id / "artifacts"
    assert (root / "models/best.pt").read_bytes() == b"model"
    (whole,) = (root / "tracelet/params").iterdir()
    assert whole.read_text() == "x" * 7000
    assert not list(root.rglob(".tracelet-*"))


def test_a_folder_in_the_way_of_an_artifact_is_not_lost_silently(
    folder: Path, run: RunInfo, opened_here: MLflowExporter
) -> None:
    spool = folder / "spool-2"
    spool.mkdir()
    (spool / "copy").write_bytes(b"model")
    files = [ArtifactLogged(1, path, "/x", "copy", 5, None, "x/y") for path in ("a", "a/b", "c/d", "c")]
    answer = opened_here.begin(batch(run, started(), *files, folder=str(spool))).attempt()
    assert isinstance(answer, Rejected)
    assert [item.facts["path"] for item in answer.items] == ["a/b", "c"]


def test_100_000_equal_values_without_iteration_are_as_many_rows_and_none_is_compared_with_the_stored(
    folder: Path, run: RunInfo, opened_here: MLflowExporter
) -> None:
    exporter = opened_here
    deliver(exporter, batch(run, started()))
    said: list[str] = []
    engine = exporter._transport.store.engine  # type: ignore[attr-defined]
    listener = lambda *args: said.append(args[2])  # noqa: E731
    sqlalchemy.event.listen(engine, "before_cursor_execute", listener)
    points = 100_000
    for number, first in enumerate(range(0, points, 999)):
        rows = [("same", 1.0, 0, i) for i in range(first, min(first + 999, points))]
        deliver(exporter, batch(run, rows=rows, number=number + 2))
    sqlalchemy.event.remove(engine, "before_cursor_execute", listener)
    assert count(folder, exporter) == points
    # The recovery path reads back from metrics; appending only inserts.
    assert not [text for text in said if text.startswith("SELECT") and "FROM metrics" in text]
    assert len([text for text in said if text.startswith("INSERT INTO metrics")]) == -(-points // 999)
    assert sum(text == "ANALYZE metrics" for text in said) == 1


def test_a_repeat_after_a_restart_sends_nothing(folder: Path, run: RunInfo, opened_here: MLflowExporter) -> None:
    first = opened_here
    one = batch(run, started(), rows=[("m", float(i), 0, i) for i in range(50)])
    delivery = first.begin(one)
    note = json.loads(json.dumps(dict(delivery.note)))
    assert delivery.attempt() == Delivered()
    second = opened_exporter(uri_of(folder), run)  # by its tag: the memory was lost too
    said: list[str] = []
    engine = second._transport.store.engine  # type: ignore[attr-defined]
    listener = lambda *args: said.append(args[2])  # noqa: E731
    sqlalchemy.event.listen(engine, "before_cursor_execute", listener)
    assert second.begin(one, note).attempt() == Delivered()
    sqlalchemy.event.remove(engine, "before_cursor_execute", listener)
    assert not [text for text in said if "INSERT" in text or "UPDATE" in text]
    assert second.memory() == first.memory()
    assert count(folder, first) == 50


WRITER = """
import sys
import time
from tests.mlflow_batches import batch, opened_exporter, persist, run_info, started
from tracelet.exporters.base import Delivered
run = run_info(sys.argv[2])
exporter = opened_exporter(sys.argv[1], run)
assert persist(exporter.begin(batch(run, started())), 120) == Delivered()
for number in range(20):
    rows = [("m", float(i), i, i) for i in range(number * 200, (number + 1) * 200)]
    assert persist(exporter.begin(batch(run, rows=rows, number=number + 2)), 120) == Delivered()
print(exporter.memory()["run_id"])
"""


def test_two_processes_write_to_a_new_database_at_once(tmp_path: Path) -> None:
    uri, root = uri_of(tmp_path), Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", WRITER, uri]
    processes = [
        subprocess.Popen(
            [*command, uuid.uuid4().hex], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        rows = dict(database.execute("select run_uuid, count(*) from metrics group by run_uuid").fetchall())
    assert rows == {out.strip(): 4000 for out, _ in said}
    assert {error for _, error in said} == {""}, "mlflow and alembic are to be quiet"


def test_a_busy_database_is_asked_again_later_and_holds_each_row_once(
    folder: Path, run: RunInfo, opened_here: MLflowExporter
) -> None:
    exporter = opened_here
    deliver(exporter, batch(run, started()))
    exporter._transport._store.ManagedSessionMaker = _impatient(exporter._transport._store)  # type: ignore[attr-defined]
    delivery = exporter.begin(batch(run, rows=[("m", 1.0, 1, 1)], number=2))
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = delivery.attempt()
        assert isinstance(answer, RetryLater)
        assert "locked" in answer.reason
        assert str(folder) in answer.reason
        other.execute("ROLLBACK")
    assert persist(delivery) == Delivered()
    assert count(folder, exporter) == 1


def _impatient(store: Any) -> Any:
    """mlflow waits 20 s for sqlite's lock, which no test should."""
    before = store.ManagedSessionMaker

    @contextlib.contextmanager
    def session(*args: Any, **kwargs: Any) -> Any:
        from sqlalchemy import text

        with before(*args, **kwargs) as made:
            made.execute(text("PRAGMA busy_timeout = 50"))
            yield made

    return session


def test_a_row_is_found_in_the_history_exactly(run: RunInfo, opened_here: MLflowExporter) -> None:
    values = [0.0, float("nan"), float("inf"), 2.5]
    deliver(opened_here, batch(run, started(), rows=[("m", value, 1, 1) for value in values]))
    transport, run_id, ms = opened_here._transport, str(opened_here.memory()["run_id"]), START_NS // 1_000_000 + 1
    assert [transport.has_metric_row(run_id, ("m", value, ms, 1)) for value in values] == [True] * 4
    others = [("m", 3.0, ms, 1), ("m", 2.5, ms + 1, 1), ("m", 2.5, ms, 2), ("n", 2.5, ms, 1)]
    assert [transport.has_metric_row(run_id, row) for row in others] == [False] * 4


def test_a_database_that_can_not_be_reached_waits_and_tells_no_password(tmp_path: Path, run: RunInfo) -> None:
    full = "mysql://somebody:s3cret-word@127.0.0.1:1/runs"
    exporter = MLflowExporter({"tracking_uri": "mysql://somebody@127.0.0.1:1/runs"}, {"tracking_uri": full}, {})
    answer = exporter.open(run, {})
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert "s3cret" not in answer.reason
    assert "MySQLdb" in answer.reason
    (tmp_path / "file").write_text("")
    missing = MLflowExporter({"tracking_uri": f"sqlite:///{tmp_path}/file/mlflow.db"}, {}, {})
    answer = missing.open(run, {})
    assert isinstance(answer, RetryLater)
    assert f"{tmp_path}/file" in answer.reason


def test_a_database_that_is_away_is_said_at_once(tmp_path: Path, run: RunInfo) -> None:
    (tmp_path / "mlflow.db").mkdir()  # can't be opened; mlflow's store would try for minutes before it says so
    with quiet_mlflow():
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - its seconds are not the ones meant
    begun = time.monotonic()
    answer = MLflowExporter({"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}, {}, {}).open(run, {})
    assert isinstance(answer, RetryLater)
    assert "unable to open database file" in answer.reason
    assert time.monotonic() - begun < 60


def test_a_deleted_run_or_experiment_waits_and_says_how_to_restore_it(folder: Path, run: RunInfo) -> None:
    run = run_info(run.run_id, project=f"deleted-{START_NS}-{run.run_id}")
    exporter = opened_exporter(uri_of(folder), run)
    deliver(exporter, batch(run, started()))
    store = exporter._transport.store  # type: ignore[attr-defined]
    memory = exporter.memory()
    store.delete_run(memory["run_id"])
    delivery = exporter.begin(batch(run, rows=[("m", 1.0, 1, 1)], number=2))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert f"mlflow runs restore --run-id {memory['run_id']}" in answer.reason
    reopened = MLflowExporter({"tracking_uri": uri_of(folder)}, {}, {}).open(run, memory)
    assert isinstance(reopened, RetryLater)
    assert "is deleted" in reopened.reason
    store.restore_run(memory["run_id"])
    assert delivery.attempt() == Delivered()
    store.delete_experiment(memory["experiment_id"])
    reopened = MLflowExporter({"tracking_uri": uri_of(folder)}, {}, {}).open(run, memory)
    assert isinstance(reopened, RetryLater)
    assert reopened.loud
    assert f"mlflow experiments restore -x {memory['experiment_id']}" in reopened.reason
    waiting = exporter.begin(batch(run, rows=[("m", 2.0, 2, 2)], number=3))
    assert isinstance(waiting.attempt(), RetryLater)
    store.restore_experiment(memory["experiment_id"])
    assert waiting.attempt() == Delivered()
    opened_exporter(uri_of(folder), run, memory)
    assert count(folder, exporter) == 2
