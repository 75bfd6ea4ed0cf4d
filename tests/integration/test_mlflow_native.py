"""A run of ours beside the same run by MLflow's own fluent API: every row of it, in every table."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_batches import START_NS, batch, deliver, ended, exporters_closed, opened_exporter, run_info, started
from tests.servers import MlflowServer
from tracelet.collectors import environment
from tracelet.exporters.mlflow.native import quiet_mlflow
from tracelet.records import ArtifactLogged, ParamsLogged, TagsSet

__all__ = ["exporters_closed"]

with quiet_mlflow():
    import mlflow
    import mlflow.store.tracking.sqlalchemy_store
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import _run_context_provider_registry

MS = START_NS // 1_000_000
PARAMS: dict[str, Any] = {"lr": 0.001, "on": True, "none": "None", "n": 3, "a.b/c": "text", "empty": "", "big": 10**30}
TAGS = {"team": "ml", "note with space": "é\n損失"}
VALUES = [0.5, math.nan, math.inf, -math.inf, 5e-324, -0.0, 1e300]
TABLES = ("params", "tags", "metrics", "latest_metrics", "inputs", "input_tags")


def by_mlflow(uri: str, experiment: str, file: Path) -> str:
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment)
    with mlflow.start_run(run_name="same", tags=TAGS) as run:
        mlflow.log_params(PARAMS)
        for step, value in enumerate(VALUES):
            mlflow.log_metric("loss", value, step=step - 2, timestamp=MS + step)
        mlflow.log_artifact(str(file), "models/deep")
    return str(run.info.run_id)


def by_us(uri: str, experiment: str, file: Path, **spec: Any) -> str:
    run = run_info(uuid.uuid4().hex, project=experiment, run_name="same")
    exporter = opened_exporter(uri, run, **spec)
    rows = [("loss", value, step - 2, step) for step, value in enumerate(VALUES)]
    artifact = ArtifactLogged(1, f"models/deep/{file.name}", str(file), None, file.stat().st_size, None, "x/y")
    params, tags = ParamsLogged(1, PARAMS), TagsSet(1, TAGS)
    surroundings = environment.take(os.environ, Path.cwd(), sys.argv)
    deliver(exporter, batch(run, started("same", surroundings.mlflow_tags), params, tags, artifact, rows=rows))
    deliver(exporter, batch(run, ended(), number=2))
    return str(exporter.memory()["run_id"])


def rows_of_run(database: Path, run_id: str) -> dict[str, Any]:
    """Everything the tables say of a run, without what belongs to the moment: ids, times and folders."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        seen: dict[str, Any] = {}
        for table in TABLES:
            columns = [row[1] for row in connection.execute(f"pragma table_info({table})")]
            key = "run_uuid" if "run_uuid" in columns else None
            if key is None:
                continue
            found = connection.execute(f"select * from {table} where {key} = ?", [run_id]).fetchall()
            seen[table] = sorted(repr({k: row[k] for k in row.keys() if k != "run_uuid"}) for row in found)  # noqa: SIM118
        (run,) = connection.execute("select * from runs where run_uuid = ?", [run_id]).fetchall()
        info = {k: run[k] for k in run.keys() if k not in ("run_uuid", "start_time", "end_time", "artifact_uri")}  # noqa: SIM118
        seen["run"] = {**info, "has times": bool(run["start_time"]) and bool(run["end_time"])}
        seen["artifact_uri"] = run["artifact_uri"].replace(run_id, "<run>")
        return seen


@pytest.fixture(params=["server", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path, dict[str, Any]]:
    """Address, database file, the folder of the artifacts, and what our specification has besides."""
    if request.param == "server":
        server: MlflowServer = request.getfixturevalue("mlflow_server")
        return server.uri, server.database, server.folder / "artifacts", {}
    return f"sqlite:///{tmp_path}/m.db", tmp_path / "m.db", tmp_path / "mlruns", {"artifact_root": f"{tmp_path}/mlruns"}


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_row_is_as_mlflows_own_client_writes_it(
    store: tuple[str, Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, database, artifacts, spec = store
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for command in (["init", "-q"], ["config", "user.email", "x@y"], ["config", "user.name", "x"]):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    subprocess.run(["git", "commit", "-q", "--allow-empty", "-m", "x"], cwd=checkout, check=True)
    monkeypatch.chdir(checkout)
    monkeypatch.setattr("sys.argv", [str(checkout / "train.py")])
    for provider in _run_context_provider_registry:
        if isinstance(provider, GitRunContext):  # it looks once a process, and a test before this one has made it
            monkeypatch.setattr(provider, "_cache", {})
    (checkout / "train.py").write_text("")
    if "artifact_root" in spec:
        monkeypatch.chdir(tmp_path)  # mlflow's own client puts a database's artifacts into ./mlruns
    file = tmp_path / "best.pt"
    file.write_bytes(b"weights")
    experiment = f"native-{uuid.uuid4().hex}"
    try:
        theirs = by_mlflow(uri, experiment, file)
        ours = by_us(uri, experiment, file, **spec)
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.tracking.fluent._active_experiment_id = None
        monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    native, made = rows_of_run(database, theirs), rows_of_run(database, ours)
    own_tags = [row for row in made["tags"] if "'key': 'tracelet." in row]
    assert [row.split("'")[3] for row in own_tags] == [
        "tracelet.infinite.loss",
        "tracelet.run.attempt",
        "tracelet.run.id",
    ]
    made["tags"] = [row for row in made["tags"] if row not in own_tags]
    assert made == native
    assert any("mlflow.source.git.commit" in row for row in made["tags"])
    for run_id in (theirs, ours):
        (root,) = artifacts.glob(f"*/{run_id}/artifacts")
        assert [(str(f.relative_to(root)), f.read_bytes()) for f in root.rglob("*") if f.is_file()] == [
            ("models/deep/best.pt", b"weights")
        ]
