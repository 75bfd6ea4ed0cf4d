"""The MLflow exporter against a real server with MLflow's own user accounts (`--app-name basic-auth`)."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mlflow_batches import START_NS, batch, deliver, ended, exporters_closed, opened_exporter, run_info, started
from tests.servers import MlflowServer, start_mlflow
from tracelet.exporters.base import RetryLater
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.records import ArtifactLogged

__all__ = ["exporters_closed"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flask_wtf") is None, reason="mlflow[auth] (Flask-WTF) is not installed here"
)
PASSWORD = "correct-horse-battery"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder: Path = tmp_path_factory.mktemp("auth")
    settings = folder / "basic_auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = admin\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environ = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "x"}
    server = start_mlflow(folder, "--app-name", "basic-auth", environ=environ)
    yield server
    server.stop()


def test_a_run_is_written_with_the_right_password_and_waits_with_a_wrong_one(
    guarded: MlflowServer, tmp_path: Path
) -> None:
    run = run_info(uuid.uuid4().hex)
    wrong = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "no-such-word"}
    for environ in ({}, wrong):
        answer = MLflowExporter({"tracking_uri": guarded.uri}, {}, environ).open(run, {})
        assert isinstance(answer, RetryLater)
        assert answer.loud
        assert "MLFLOW_TRACKING_PASSWORD" in answer.reason
        assert "no-such-word" not in answer.reason
    right = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    exporter = opened_exporter(guarded.uri, run, environ=right)
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    record = ArtifactLogged(START_NS, "a/b.bin", str(file), None, 5, None, "x/y")
    deliver(exporter, batch(run, started(), record, rows=[("m", 1.0, 1, 1)]), batch(run, ended(), number=2))
    view = exporter._transport.run(exporter.memory()["run_id"])
    assert view is not None
    assert (view.status, set(view.latest)) == ("FINISHED", {"m"})
    assert guarded.artifacts(view.run_id) == {"a/b.bin": 5}
