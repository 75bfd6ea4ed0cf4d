"""Addresses planted in artifact events, through a running gateway: none is opened, and all else of the run arrives."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from tests.gateway_fakes import points_request
from tests.gateway_process import GatewayProcess, wait_until
from tests.servers import MlflowServer, rows_of
from tests.sinks import attributes

SECRET = b"a word that must not travel: 7f3d1c"


@contextmanager
def listening() -> Iterator[tuple[int, list[str]]]:
    """A port of this machine, as a cloud's metadata service would be, and who has asked there."""
    asked: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def take() -> None:
        while True:
            try:
                taken, where = listener.accept()
            except OSError:
                return
            asked.append(str(where))
            taken.close()

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield listener.getsockname()[1], asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


@contextmanager
def watched(pipe: Path) -> Iterator[threading.Event]:
    """A pipe with somebody who waits at its other end: set once anybody has opened it for reading."""
    os.mkfifo(pipe)
    opened = threading.Event()
    ours = threading.Event()

    def wait() -> None:
        with open(pipe, "wb"):  # returns when a reader comes
            if not ours.is_set():
                opened.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield opened
    finally:
        ours.set()
        with open(pipe, "rb"):
            thread.join(10)


def events(run_id: str, uris: dict[str, str | None], *, ends: bool) -> bytes:
    """An event for each path with its address, and the run's end."""
    like = points_request(run_id).resource_metrics[0].resource
    request = ExportLogsServiceRequest()
    resource = request.resource_logs.add()
    resource.resource.CopyFrom(like)
    scope = resource.scope_logs.add()
    scope.scope.name = "tracelet"

    def add(name: str, values: dict[str, str | int]) -> None:
        record = scope.log_records.add(event_name=name, time_unix_nano=1_800_000_000_000_000_000)
        for key, value in {"tracelet.event": name, **values}.items():
            pair = record.attributes.add(key=key)
            if isinstance(value, int):
                pair.value.int_value = value
            else:
                pair.value.string_value = value

    for path, uri in uris.items():
        facts: dict[str, str | int] = {"tracelet.artifact.name": path, "tracelet.artifact.size": len(SECRET)}
        facts["tracelet.artifact.digest"] = f"sha256:{hashlib.sha256(SECRET).hexdigest()}"
        add("tracelet.artifact", facts if uri is None else {**facts, "tracelet.artifact.uri": uri})
    if ends:
        add("tracelet.run.ended", {"tracelet.run.state": "FINISHED"})
    assert len(attributes(scope.log_records[0])) > 3
    return request.SerializeToString()


def test_planted_addresses_open_nothing_and_harm_nothing(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run_id = f"planted-{time.time_ns()}"
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    (shared / "link").symlink_to(tmp_path / "secret")
    digest = hashlib.sha256(SECRET).hexdigest()
    with (
        listening() as (port, asked),
        watched(tmp_path / "pipe") as opened,
        GatewayProcess(
            tmp_path / "gateway", mlflow_server.uri, "--artifact-prefix", f"file://{shared}", "--grace", "5s"
        ) as gateway,
    ):
        # Another run's file, of which only the digest is known.
        host = urlsplit(gateway.http)
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
        sent = {"Upload-Offset": "0", "Upload-Length": str(len(SECRET))}
        connection.request("PATCH", f"/v1/artifacts/somebodys/{digest}", SECRET, sent)
        assert connection.getresponse().status == 201
        connection.close()
        uris = {
            "file": f"file://{tmp_path}/secret",
            "pipe": f"file://{tmp_path}/pipe",
            "bare": f"{tmp_path}/pipe",
            "up": f"file://{shared}/../pipe",
            "coded": f"file://{shared}/%2e%2e/pipe",
            "twice": f"file://{shared}/%252e%252e/pipe",
            "link": f"file://{shared}/link",
            "local": f"local://{tmp_path}/pipe",
            "web": f"http://127.0.0.1:{port}/latest/meta-data/",
            "tls": f"https://127.0.0.1:{port}/",
            "ftp": f"ftp://127.0.0.1:{port}/x",
            "chain": f"simplecache::http://127.0.0.1:{port}/x",
            "below": f"file://{shared}/x::http://127.0.0.1:{port}/x",
            "host": f"file://127.0.0.1:{port}/x",
            "theirs": f"tracelet-gateway:sha256:{digest}",
            "mixed": "tracelet-gateway:sha256:../../somebodys/" + digest,
        }
        assert gateway.post("metrics", points_request(run_id, count=20).SerializeToString())[0] == 200
        # Without an address there is nothing to open either.
        assert gateway.post("logs", events(run_id, {**uris, "none": None}, ends=True))[0] == 200
        run = found(mlflow_server, run_id)
        files = mlflow_server.artifacts(run)
        assert set(files) == {f"{path}.reference.json" for path in uris}
        for path, uri in uris.items():
            (there,) = (mlflow_server.folder / "artifacts").glob(f"*/{run}/artifacts/{path}.reference.json")
            assert json.loads(there.read_text())["uri"] == uri
        assert len(rows_of(mlflow_server, run, "loss")) == 20
        assert asked == []
        assert not opened.is_set()
        assert gateway.get("/readyz") == b"ready\n"
    held = [path for path in (mlflow_server.folder / "artifacts").rglob("*") if path.is_file()]
    assert not [path for path in held if SECRET in path.read_bytes()]
    assert SECRET.decode() not in gateway.log


def found(server: MlflowServer, run_id: str) -> str:
    """MLflow's run, once it has ended there."""
    runs: list[str] = []

    def there() -> bool:
        experiments = server.ask("experiments/search", {"max_results": 1000}).get("experiments", [])
        query = {
            "experiment_ids": [one["experiment_id"] for one in experiments],
            "filter": f"tags.`tracelet.run.id` = '{run_id}'",
        }
        answer = server.ask("runs/search", query).get("runs", [])
        runs[:] = [run["info"]["run_id"] for run in answer if run["info"]["status"] == "FINISHED"]
        return bool(runs)

    wait_until(there, 60, f"no run {run_id} that has ended in MLflow")
    return runs[0]
