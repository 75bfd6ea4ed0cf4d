"""MLflow by its own client: a real plugin's scheme from training to the database, databricks, and the file store."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.mlflow_batches import batch, deliver, exporters_closed, opened_exporter, run_info, started
from tests.shipper_process import REPO
from tracelet.backends import MLflow
from tracelet.destinations import to_destination
from tracelet.errors import ConfigError
from tracelet.exporters.base import Delivered, RetryLater
from tracelet.exporters.mlflow.client import ClientTransport
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.records import ParamsLogged, RunInfo, TagsSet

__all__ = ["exporters_closed"]

PLUGIN = '''"""A tracking store under a scheme of its own: sqlite below, which is nobody's business."""

import pathlib

if pathlib.Path(__file__).with_name("broken").exists():
    raise ImportError("a spring is missing")

def store(store_uri, artifact_uri=None):
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = pathlib.Path(store_uri.removeprefix("drawer://"))
    if (folder / "locked").exists():
        raise RuntimeError("the drawer is locked")
    return SqlAlchemyStore(f"sqlite:///{folder}/drawer.db", str(folder / "files"))
'''

TRAIN = """
import math, pathlib, tracelet
pathlib.Path("model.bin").write_bytes(b"weights")
exp = tracelet.start_logging(exp_name="drawn", project="by plugin")
exp.log_params({"lr": 0.1, "long": "x" * 10_000})
exp.set_tags({"team": "ml"})
for i in range(1500):
    exp.log_metric("loss", math.nan if i == 7 else 1 / (i + 1), iteration=i)
exp.log_metric("ends", math.inf, iteration=1)
exp.log_artifact("model.bin", "models/model.bin")
exp.stop(timeout=60)
print(exp.stats.waiting, exp.stats.refused)
"""


@pytest.fixture
def drawer(tmp_path: Path) -> Path:
    """A package that brings the scheme `drawer://`, found by its entry point; the folder to put on the path."""
    site = tmp_path / "site"
    (site / "drawer-1.0.dist-info").mkdir(parents=True)
    (site / "drawer.py").write_text(PLUGIN)
    (site / "drawer-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: drawer\nVersion: 1.0\n")
    (site / "drawer-1.0.dist-info" / "entry_points.txt").write_text("[mlflow.tracking_store]\ndrawer = drawer:store\n")
    (tmp_path / "drawer").mkdir()
    return site


def run(*words: str, drawer: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": f"{drawer}{os.pathsep}{REPO}", **variables}
    work = drawer.parent / "work"
    work.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *words],
        env=environ,
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_run_goes_to_a_plugins_scheme_whole_and_what_is_locked_waits(drawer: Path, tmp_path: Path) -> None:
    uri = f"drawer://{tmp_path}/drawer"
    lock = tmp_path / "drawer" / "locked"
    lock.touch()
    trained = run("-c", TRAIN, drawer=drawer, MLFLOW_TRACKING_URI=uri, TRACELET_SHIPPER="off")
    assert trained.returncode == 0, trained.stderr
    shut = run("-m", "tracelet", "ship", "--timeout", "8", drawer=drawer)
    assert shut.returncode == 1
    assert "the drawer is locked" in shut.stdout, shut.stdout + shut.stderr
    lock.unlink()
    shipped = run("-m", "tracelet", "ship", drawer=drawer)
    assert shipped.returncode == 0, shipped.stdout + shipped.stderr
    assert f"mlflow ui --backend-store-uri {uri}" in shipped.stdout
    with closing(sqlite3.connect(tmp_path / "drawer" / "drawer.db")) as database:
        rows = database.execute("select key, step, value, is_nan from metrics order by key, step").fetchall()
        params = dict(database.execute("select key, value from params"))
        tags = dict(database.execute("select key, value from tags"))
        ((run_id, status, name),) = database.execute("select run_uuid, status, name from runs").fetchall()
        assert database.execute("select name from experiments where name = 'by plugin'").fetchall()
    assert [row[1] for row in rows if row[0] == "loss"] == list(range(1500))
    assert [row[1] for row in rows if row[3]] == [7]
    assert params["lr"] == "0.1"
    assert params["long"].startswith("xxx")
    assert (tags["team"], status, name) == ("ml", "FINISHED", "drawn")
    stored = (tmp_path / "drawer" / "files").rglob("model.bin")
    assert [path.parts[-4:] for path in stored] == [(run_id, "artifacts", "models", "model.bin")]


def test_a_live_shipper_inherits_the_plugin_and_doctor_reaches_it(drawer: Path, tmp_path: Path) -> None:
    uri = f"drawer://{tmp_path}/drawer"
    told = run("-m", "tracelet", "doctor", drawer=drawer, MLFLOW_TRACKING_URI=uri)
    assert "mlflow's client reaches it" in told.stdout, told.stdout + told.stderr
    trained = run("-c", TRAIN, drawer=drawer, MLFLOW_TRACKING_URI=uri)
    assert trained.stdout == "0 0\n", trained.stdout + trained.stderr
    (drawer / "broken").touch()
    assert "a spring is missing" in run("-m", "tracelet", "doctor", drawer=drawer, MLFLOW_TRACKING_URI=uri).stdout
    unknown = run("-c", TRAIN, drawer=tmp_path / "nothing", MLFLOW_TRACKING_URI=uri)
    assert "is of a kind that MLflow doesn't know here" in unknown.stderr


# ---- databricks: a server of the same REST API behind another door -------------------------------------------------


class Workspace:
    """What a Databricks workspace is asked, answered from memory."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.answers: dict[str, tuple[int, Any]] = {}


@contextmanager
def workspace() -> Iterator[tuple[str, Workspace]]:
    """Its address on this machine."""
    made = Workspace()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0].rpartition("/mlflow/")[2]
            made.asked.append((path, self.headers.get("Authorization", ""), json.loads(body) if body else None))
            status, answer = made.answers.get(path, (404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = _handle

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_databricks_gets_what_its_client_sends_with_its_credentials_and_its_no_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with workspace() as (host, door):
        monkeypatch.setenv("DATABRICKS_HOST", host)
        monkeypatch.setenv("DATABRICKS_TOKEN", "planted-s3cret")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT", "1")
        destination, secrets = to_destination(MLflow("databricks"), dict(os.environ), Path("/"))
        assert destination["spec"]["tracking_uri"] == "databricks"
        run = RunInfo(uuid.uuid4().hex, "/Users/me/digits", "digits", "a run")
        exporter = MLflowExporter(destination["spec"], secrets, dict(os.environ))

        door.answers["experiments/get-by-name"] = (
            403,
            {"error_code": "PERMISSION_DENIED", "message": "planted-s3cret is not welcome"},
        )
        answer = exporter.open(run, {})
        assert isinstance(answer, RetryLater)
        assert answer.loud
        assert "databricks forbids this to us" in answer.reason

        door.answers["experiments/get-by-name"] = (
            200,
            {"experiment": {"experiment_id": "17", "name": run.project, "lifecycle_stage": "active"}},
        )
        info = {
            "run_id": "r1",
            "run_uuid": "r1",
            "experiment_id": "17",
            "status": "RUNNING",
            "start_time": 1,
            "lifecycle_stage": "active",
            "artifact_uri": "dbfs:/databricks/mlflow-tracking/17/r1/artifacts",
        }
        door.answers["runs/search"] = (200, {})
        assert exporter.open(run, {}) == Delivered()
        door.answers["runs/create"] = (200, {"run": {"info": info, "data": {}}})
        door.answers["runs/get"] = (200, {"run": {"info": info, "data": {}}})
        door.answers["runs/update"] = (200, {"run_info": info})
        door.answers["runs/log-batch"] = (429, {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slowly"})
        one = batch(run, started(), ParamsLogged(1, {"lr": 1}), TagsSet(1, {"a": "b"}), rows=[("m", 0.5, 1, 1)])
        delivery = exporter.begin(one)
        answer = delivery.attempt()
        assert isinstance(answer, RetryLater)
        assert "databricks is busy or gone" in answer.reason
        door.answers["runs/log-batch"] = (200, {})
        assert delivery.attempt() == Delivered()
        assert exporter.memory()["link"] == f"{host}/ml/experiments/17/runs/r1"
        exporter.close()
    bodies = [body for path, _, body in door.asked if path == "runs/log-batch"]
    (metrics,) = [body["metrics"] for body in bodies if body.get("metrics")]
    assert [(m["key"], m["value"], m["step"]) for m in metrics] == [("m", 0.5, 1)]
    assert {token for path, token, _ in door.asked if path[0] != "/"} == {"Bearer planted-s3cret"}


# ---- the file store ------------------------------------------------------------------------------------------------


def test_a_file_store_is_refused_at_once_and_by_mlflows_own_words_where_it_gets_that_far(tmp_path: Path) -> None:
    for uri in (f"file://{tmp_path}/mlruns", "mlruns"):
        with pytest.raises(ConfigError, match=r"MLFLOW_ALLOW_FILE_STORE=true.*sqlite:///mlflow\.db"):
            to_destination(MLflow(uri), {}, tmp_path)
        allowed, _ = to_destination(MLflow(uri), {"MLFLOW_ALLOW_FILE_STORE": "true"}, tmp_path)
        assert allowed["spec"]["tracking_uri"].endswith(f"{tmp_path}/mlruns")
    answer = MLflowExporter({"tracking_uri": str(tmp_path / "mlruns")}, {}, {}).open(run_info("r"), {})
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert "maintenance mode" in answer.reason


def test_a_file_store_that_is_allowed_takes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = run_info(uuid.uuid4().hex)
    exporter = opened_exporter(str(tmp_path / "mlruns"), run)
    rows = [("m", float(i), i, i) for i in range(20)] + [("m", math.nan, 30, 30), ("m", math.inf, 31, 31)]
    deliver(exporter, batch(run, started(), ParamsLogged(1, {"lr": 1}), rows=rows))
    transport = exporter._transport
    assert isinstance(transport, ClientTransport)
    run_id = str(exporter.memory()["run_id"])
    ms = (1_790_000_000_000_000_000 // 1_000_000) + 30
    assert transport.has_metric_row(run_id, ("m", math.nan, ms, 30))
    assert transport.has_metric_row(run_id, ("m", math.inf, ms + 1, 31))
    assert not transport.has_metric_row(run_id, ("m", 1.5, ms, 30))
    view = transport.run(run_id)
    assert view is not None
    assert (view.params["lr"], view.latest["m"][:2]) == ("1", (31, ms + 1))
    assert transport.run("0" * 32) is None
