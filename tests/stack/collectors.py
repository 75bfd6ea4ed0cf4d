"""The real collector and the real Prometheus for tests of collector-config/: started on free ports, asked, stopped."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import SIGTERM
from typing import Any

from tests.otlp_batches import points
from tests.sinks import HttpSink, Say, until
from tests.stack.harness import REPOSITORY, program
from tracelet.otlp import semconv
from tracelet.otlp.encode import MetricsLoad, PointsLoad, fitting, resource_bytes
from tracelet.otlp.run_metrics import end_markers
from tracelet.records import PointBatch, Scalar

CONFIG = REPOSITORY / "collector-config"
MS = 1_000_000
MINUTE = 60_000_000_000
HOUR = 60 * MINUTE


def free_ports(count: int) -> list[int]:
    """So many ports that nobody listens on now."""
    with ExitStack() as open_:
        sockets = [open_.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Process:
    """A program that a test starts, stops, kills and starts again; `url` answers 200 when it serves."""

    def __init__(self, folder: Path, name: str, argv: Sequence[str], environ: Mapping[str, str], url: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self.argv, self.environ, self.url, self.folder = list(argv), dict(environ), url, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, env=self.environ, cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        if wait:
            until(self.serves, 30)

    def serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(self.url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def stop(self, how: int = SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Collector(Process):
    """A collector with files of collector-config/ (or others), its addresses in its environment.

    Branches that the test gives no address to (`prometheus`, `gateway`, `loki`, `tempo`) end in `nop`.
    """

    def __init__(
        self,
        folder: Path,
        *files: str | Path,
        prometheus: str | None = None,
        gateway: str | None = None,
        loki: str | None = None,
        tempo: str | None = None,
        **environ: str,
    ) -> None:
        ports = free_ports(6)
        here = [f"127.0.0.1:{port}" for port in ports]
        self.grpc, self.second_grpc = here[0], here[4]
        self.http, self.second, health = (f"http://{each}" for each in (here[1], here[5], here[2]))
        self.own_metrics = f"http://{here[3]}/metrics"
        self.queues = folder / "queue"
        given = {
            "TRACELET_OTLP_GRPC": here[0],
            "TRACELET_OTLP_HTTP": here[1],
            "TRACELET_COLLECTOR_HEALTH": here[2],
            "TRACELET_COLLECTOR_METRICS_HOST": "127.0.0.1",
            "TRACELET_COLLECTOR_METRICS_PORT": str(ports[3]),
            "TRACELET_SECOND_OTLP_GRPC": here[4],
            "TRACELET_SECOND_OTLP_HTTP": here[5],
            "TRACELET_QUEUE_DIR": str(self.queues),
            "TRACELET_QUEUE_FSYNC": "false",
        }
        argv = [str(program("collector"))]
        for file in files or ["collector.yaml"]:
            argv += ["--config", file if str(file).startswith("yaml:") else str(CONFIG / file)]
        addresses = {"PROMETHEUS_URL": prometheus, "GATEWAY_URL": gateway, "LOKI_URL": loki, "TEMPO_ENDPOINT": tempo}
        given |= {f"TRACELET_{name}": address for name, address in addresses.items() if address is not None}
        if "kafka-edge.yaml" not in files:
            argv += _without(
                [
                    *(["metrics/prometheus"] if prometheus is None else []),
                    *([f"{each}/gateway" for each in ("metrics", "traces", "logs")] if gateway is None else []),
                    *(["logs/loki"] if loki is None else []),
                    *(["traces/tempo"] if tempo is None else []),
                ]
            )
        super().__init__(folder, "collector", argv, {"PATH": os.environ.get("PATH", "")} | given | environ, health)

    def numbers(self, name: str) -> dict[str, float]:
        """The collector's own metric `name`: value by its labels, as they are written."""
        with urllib.request.urlopen(self.own_metrics, timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{re.escape(name)}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
        return {labels: float(value) for labels, value in found}

    def number(self, name: str, label: str) -> float:
        """The sum of `name` over the series with `label` (`filter="filter/dense"`)."""
        return sum(value for labels, value in self.numbers(name).items() if label in labels)

    def waiting(self) -> float:
        """Bytes in all queues."""
        return sum(self.numbers("otelcol_exporter_queue_size").values())


def _without(pipelines: Iterable[str]) -> list[str]:
    """Arguments that let these pipelines end in nothing, as the head of collector.yaml says."""
    found = ["--config", "yaml:exporters::nop: {}"]
    for each in pipelines:
        found += ["--config", f"yaml:service::pipelines::{each}::exporters: [nop]"]
    return found


class Prometheus(Process):
    """A Prometheus with an OTLP receiver, and remote write with `remote_write`."""

    def __init__(self, folder: Path, window: str = "7d", *more: str) -> None:
        (port,) = free_ports(1)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "prometheus.yaml"
        config.write_text(f"storage: {{tsdb: {{out_of_order_time_window: {window}}}}}\n")
        self.at = f"http://127.0.0.1:{port}"
        self.otlp = f"{self.at}/api/v1/otlp"
        argv = [
            str(program("prometheus")),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--web.enable-otlp-receiver",
            *more,
        ]
        super().__init__(folder, "prometheus", argv, {"PATH": os.environ.get("PATH", "")}, f"{self.at}/-/ready")

    def ask(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.at}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def samples(self, selector: str, *, back: str = "14d", ahead_s: float = 3600.0) -> list[Series]:
        """Every stored sample of each matching series, at its own millisecond."""
        found = self.ask("query", query=f"{selector}[{back}]", time=f"{time.time() + ahead_s:.3f}")["result"]
        return [
            Series(each["metric"], {round(float(at) * 1000): float(value) for at, value in each["values"]})
            for each in found
        ]

    def count(self, selector: str) -> int:
        return sum(len(series.values) for series in self.samples(selector))

    def now(self, query: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.ask("query", query=query, time=f"{time.time():.3f}")["result"]
        return result


class Series:
    """One series: labels, and value by millisecond."""

    def __init__(self, labels: dict[str, str], values: dict[int, float]) -> None:
        self.labels, self.values = labels, values

    def same_labels(self) -> tuple[tuple[str, str], ...]:
        """All labels but the name."""
        return tuple(sorted((k, v) for k, v in self.labels.items() if k != "__name__"))


class Sender:
    """One run's rank on the wire: requests as the shipper makes them, and what was acknowledged."""

    def __init__(self, run_id: str, *, rank: int = 0, more: Mapping[str, Scalar] | None = None) -> None:
        self.run_id = run_id
        self.resource: dict[str, Scalar] = {
            "service.name": "vision",
            "service.namespace": "tracelet",
            "service.instance.id": f"{run_id}-{rank}",
            "host.name": "node-1",
            semconv.PROJECT: "vision",
            semconv.EXPERIMENT_NAME: "cnn",
            semconv.RUN_ID: run_id,
            semconv.RUN_NAME: f"name of {run_id}",
            semconv.RUN_ATTEMPT: "a" * 16,
            semconv.RANK: rank,
            semconv.RESOURCE_WIRE_VERSION: semconv.WIRE_VERSION,
            **(more or {}),
        }

    def bodies(self, batch: PointBatch) -> list[bytes]:
        """The requests of these points."""
        return [body for _, body in fitting(PointsLoad.of(resource_bytes(self.resource), batch))]

    def ends(self, series: Iterable[tuple[str, int]]) -> bytes:
        """The request that ends these series (name, ns of the last point)."""
        return MetricsLoad(resource_bytes(self.resource), tuple(end_markers(series)), semconv.SCOPE).encode()


def rows(count: int, *names: str) -> list[tuple[str, float, int]]:
    """`count` points in turn for the names: value and iteration tell which."""
    return [(names[i % len(names)], i * 0.5, i) for i in range(count)]


def made(count: int, *names: str, start: int, step: int = MS, dense: Iterable[int] = ()) -> PointBatch:
    return points(rows(count, *names), start=start, step=step, dense=dense)


def now_ns(ago: int = 0) -> int:
    """`ago` ns before now, at a whole millisecond."""
    return (time.time_ns() - ago) // MS * MS


@contextmanager
def connection(url: str) -> Iterator[http.client.HTTPConnection]:
    parts = urllib.parse.urlsplit(url)
    open_ = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        yield open_
    finally:
        open_.close()


def send(url: str, bodies: Iterable[bytes], *, signal: str = "metrics", prefix: str = "", **headers: str) -> list[int]:
    """Send each body once; the statuses."""
    statuses = []
    with connection(url) as open_:
        for body in bodies:
            given = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}
            given |= {name.replace("_", "-"): value for name, value in headers.items()}
            open_.request("POST", f"{prefix}/v1/{signal}", gzip.compress(body, 1), given)
            answer = open_.getresponse()
            answer.read()
            statuses.append(answer.status)
    return statuses


def refuse(status: int = 503) -> Say:
    return Say(status, body=b"", headers={"Content-Type": "text/plain"})


def stored_points(sink: HttpSink, run_id: str) -> set[tuple[str, float, int, int]]:
    """What a sink in the gateway's place has of a run, each point once."""
    return {tuple(point) for point in sink.points(run_id)}  # type: ignore[misc]


def as_sent(batch: PointBatch) -> set[tuple[str, float, int, int]]:
    return {
        (batch.names[identity], value, iteration, at)
        for at, value, iteration, identity in zip(
            batch.time_unix_nano, batch.values, batch.iterations, batch.metric_ids, strict=True
        )
    }
