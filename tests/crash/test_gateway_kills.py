"""A gateway killed in mid-request, again and again: what it acknowledged is in MLflow, and nothing is there twice.

Pattern: three senders that repeat what was not acknowledged, eight kills at random moments, a real MLflow behind.
Limit: five minutes.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tests.gateway_process import GatewayProcess
from tests.recorded import record
from tests.servers import MlflowServer, free_port, get_run, rows_of
from tests.shipping import until
from tests.sinks import Received
from tracelet import ids

POINTS = 4000
A_REQUEST = 20
KILLS = 8


def small(requests: list[Received]) -> list[tuple[str, bytes]]:
    """The same as many requests: path and body."""
    made: list[tuple[str, bytes]] = []
    for one in requests:
        if one.signal != "metrics":
            made.append(("/v1/" + one.signal, one.body))
            continue
        for part in _split(one.message):
            made.append(("/v1/metrics", part.SerializeToString()))
    return made


def _split(message: ExportMetricsServiceRequest) -> Iterator[ExportMetricsServiceRequest]:
    longest = max(
        len(metric.gauge.data_points)
        for resource in message.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )
    for first in range(0, longest, A_REQUEST):
        part = copy.deepcopy(message)
        for resource in part.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    mine = list(metric.gauge.data_points)[first : first + A_REQUEST]
                    if metric.HasField("gauge"):
                        del metric.gauge.data_points[:]
                        metric.gauge.data_points.extend(mine)
        yield part


class Sender(threading.Thread):
    """Sends each request until it is acknowledged, as a collector does."""

    def __init__(self, port: int, requests: list[tuple[str, bytes]]) -> None:
        super().__init__(daemon=True)
        self.base = f"http://127.0.0.1:{port}"
        self.requests = requests
        self.acknowledged = 0
        self.again = 0

    def run(self) -> None:
        for path, body in self.requests:
            while not self._send(path, body):
                self.again += 1
                time.sleep(0.05)
            self.acknowledged += 1

    def _send(self, path: str, body: bytes) -> bool:
        request = Request(self.base + path, body, {"Content-Type": "application/x-protobuf"})
        try:
            with urlopen(request, timeout=20) as reply:
                return bool(reply.status == 200)
        except (URLError, OSError):
            return False


def test_a_gateway_killed_in_mid_request_loses_nothing_acknowledged_and_stores_nothing_twice(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    chance = random.Random(20)
    runs = [ids.new_run_id() for _ in range(3)]
    port = free_port()
    senders = [Sender(port, small(record(tmp_path / run_id, run_id, points=POINTS))) for run_id in runs]
    total = sum(len(sender.requests) for sender in senders)
    for sender in senders:
        sender.start()
    for kill in range(KILLS):
        with GatewayProcess(tmp_path / "gateway", mlflow_server.uri, ports=(port, 0)) as gateway:
            goal = total * (kill + chance.random()) / KILLS
            until(lambda goal=goal: sum(one.acknowledged for one in senders) >= goal, within_s=120)
            time.sleep(chance.random() * 0.02)  # anywhere in a request
            gateway.process.kill()
            gateway.process.wait(10)
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri, ports=(port, 0)) as gateway:
        until(lambda: not any(sender.is_alive() for sender in senders), within_s=120)
        assert sum(sender.again for sender in senders) >= KILLS  # else nothing was in flight
        found = [until(lambda run_id=run_id: _finished(mlflow_server, run_id), within_s=120) for run_id in runs]
        gateway.process.terminate()  # it drains: what could come twice has come when it is gone
        gateway.process.wait(60)
    for mlflow_id in found:
        rows = rows_of(mlflow_server, mlflow_id, "loss")
        assert sorted((row.step, row.value) for row in rows) == [(i, 1.0 / (i + 1)) for i in range(POINTS)]
        assert get_run(mlflow_server, mlflow_id).data.tags["mood"] == "late"


def _finished(server: MlflowServer, run_id: str) -> str | None:
    experiments = server.ask("experiments/search", {"max_results": 1000}).get("experiments", [])
    query = {
        "experiment_ids": [one["experiment_id"] for one in experiments],
        "filter": f"tags.`tracelet.run.id` = '{run_id}'",
    }
    found = server.ask("runs/search", query).get("runs", [])
    assert len(found) < 2, "two runs were made of one"
    return str(found[0]["info"]["run_id"]) if found and found[0]["info"]["status"] == "FINISHED" else None
