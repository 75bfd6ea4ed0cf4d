"""The MLflow exporter against a real MLflow server, over its REST API."""

from __future__ import annotations

import math
import sqlite3
import uuid
from typing import Any

from tests.mlflow_batches import batch, deliver, ended, opened_exporter, run_info, started
from tests.servers import MLflowServer

from tracelet.records import ParamsLogged, RunInfo, TagsSet


def new_run(**other: Any) -> RunInfo:
    return run_info(uuid.uuid4().hex, **other)


def stored(server: MLflowServer, run_id: str, name: str | None = None) -> list[tuple[Any, ...]]:
    """The rows of a run in the server's database: key, value, timestamp, step, is_nan; in the order of storing."""
    with sqlite3.connect(server.database) as database:
        rows = database.execute(
            "select key, value, timestamp, step, is_nan from metrics where run_uuid = ? order by rowid", [run_id]
        ).fetchall()
    database.close()
    return [row for row in rows if name is None or row[0] == name]


def test_a_batch_of_params_tags_and_points_becomes_a_run(mlflow: MLflowServer) -> None:
    run = new_run()
    exporter = opened_exporter(mlflow.uri, run)
    rows = [("loss", 1.0 / (i + 1), i, i) for i in range(100)]
    deliver(exporter, batch(run, started(), ParamsLogged(1, {"lr": 0.001, "on": True}), TagsSet(1, {"team": "ml"}), rows=rows))
    deliver(exporter, batch(run, ended(), number=2))
    memory = exporter.memory()
    view = exporter._transport.run(memory["run_id"])
    assert view is not None
    assert (view.status, view.params, view.tags["team"]) == ("FINISHED", {"lr": "0.001", "on": "True"}, "ml")
    assert [(r[1], r[3]) for r in stored(mlflow, memory["run_id"], "loss")] == [(row[1], row[2]) for row in rows]
    assert memory["link"] == f"{mlflow.uri}/#/experiments/{view.experiment_id}/runs/{view.run_id}"
    exporter.close()
    assert not math.isnan(view.latest["loss"][2])
