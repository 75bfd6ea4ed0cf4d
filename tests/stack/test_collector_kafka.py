"""Kafka between two collectors, backends away: nothing that the edge acknowledged is skipped, or out of order."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sinks import HttpSink, until
from tests.stack.collectors import (
    MINUTE,
    Collector,
    Process,
    Sender,
    as_sent,
    free_ports,
    made,
    now_ns,
    refuse,
    send,
    stored_points,
)
from tests.stack.harness import lacking, program

SETTINGS = """process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
log.dirs={folder}/data
num.partitions=4
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
"""


class Broker(Process):
    """A Kafka broker that is its own controller; topics get four partitions."""

    def __init__(self, folder: Path) -> None:
        java = shutil.which("java")
        if java is None:
            lacking("Kafka needs Java")
        self.port, controller = free_ports(2)
        folder.mkdir(parents=True)
        settings = folder / "server.properties"
        settings.write_text(SETTINGS.format(port=self.port, controller=controller, folder=folder))
        run = [str(java), "-Xmx512m", "-cp", f"{program('kafka')}/*"]
        form = [*run, "kafka.tools.StorageTool", "format", "-t", "dHJhY2VsZXQtc3RhY2stMA", "-c", str(settings)]
        subprocess.run(form, cwd=folder, check=True, capture_output=True)
        super().__init__(folder, "kafka", [*run, "kafka.Kafka", str(settings)], dict(os.environ), "")

    def serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        with socket.socket() as asked:
            return asked.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with Broker(tmp_path / "kafka") as running:
        yield running


def test_a_full_queue_behind_kafka_skips_nothing_and_a_run_keeps_its_order(tmp_path: Path, broker: Broker) -> None:
    runs = [Sender(f"run-{number}") for number in range(8)]
    batch = made(5_000, "loss", start=now_ns(MINUTE))
    at = f"127.0.0.1:{broker.port}"
    with HttpSink() as gateway:
        gateway.rule = lambda _: refuse()
        with (
            Collector(tmp_path / "edge", "kafka-edge.yaml", TRACELET_KAFKA_BROKERS=at) as edge,
            Collector(
                tmp_path / "core",
                "collector.yaml",
                "kafka-core.yaml",
                "yaml:exporters::otlp_http/gateway::sending_queue::num_consumers: 1",  # to see the order
                gateway=gateway.url,
                TRACELET_KAFKA_BROKERS=at,
                TRACELET_QUEUE_BYTES="100000",  # some four requests of two hundred
            ) as core,
        ):
            for start in range(0, len(batch), 200):
                for run in runs:
                    assert send(edge.http, run.bodies(batch.slice(start, start + 200))) == [200]
            until(lambda: core.number("otelcol_exporter_enqueue_failed_metric_points", "otlp_http/gateway") > 0, 40)
            gateway.rule = None
            wanted = as_sent(batch)
            until(lambda: all(stored_points(gateway, run.run_id) == wanted for run in runs), 60)
            for run in runs:
                # At least once, each time in order: a repeat begins again at an earlier point, and skips none.
                seen = -1
                for point in gateway.points(run.run_id):
                    assert point.iteration <= seen + 1
                    seen = max(seen, point.iteration)
