"""A destination with everything a test wants to do to it: reach it, break it, mend it, and look inside.

To join the suite write a `World` here and add it to `WORLDS`: nothing in test_exporters.py changes.
"""

from __future__ import annotations

import io
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from tests.otlp_batches import otlp_spec
from tests.servers import MlflowServer, Proxy, Spoil, get_run, recording_proxy, rows_of
from tests.sinks import GrpcSink, HttpSink, Point, Received, Say, Sink, attributes
from tracelet.exporters.base import Delivered, Exporter
from tracelet.exporters.console import ConsoleExporter
from tracelet.exporters.file import FileExporter
from tracelet.exporters.live import LiveExporter
from tracelet.exporters.otlp import OTLPExporter
from tracelet.exporters.prometheus import PrometheusExporter
from tracelet.ids import new_run_id
from tracelet.records import Batch, Part, PointBatch, Record, RunInfo, WriterOpened

START = 1_790_000_000_000_000_000
MS = 1_000_000


class World(ABC):
    """One kind of destination."""

    name: str
    can_be_away = True
    """Whether `trouble` makes deliveries answer `RetryLater`."""
    metrics_only = False
    """Whether params and the end's words have no place there."""
    repeats_show = False
    """Whether a repeat is visible: only where nobody but a person reads."""

    def __init__(self) -> None:
        self.exporters: list[Exporter] = []
        self.run = RunInfo(new_run_id(), "vision", "cnn", "bold-hawk")
        resource = {"service.name": "vision", "service.instance.id": "instance-0", "tracelet.run.id": self.run.run_id}
        self._writer = WriterOpened(START, "first", 4711, 0, "a" * 16, START, resource)

    def batch(
        self,
        rows: Iterable[tuple[str, float, int]] = (),
        records: Iterable[Record] = (),
        *,
        number: int = 1,
        after_ms: int = 0,
    ) -> Batch:
        """A batch of one writer's points (name, value, iteration), a millisecond apart."""
        rows = list(rows)
        ids = {name: number for number, name in enumerate(dict.fromkeys(name for name, _, _ in rows))}
        points = PointBatch(
            {number: name for name, number in ids.items()},
            array("Q", [START + (after_ms + i) * MS for i in range(len(rows))]),
            array("d", [value for _, value, _ in rows]),
            array("q", [iteration for _, _, iteration in rows]),
            array("I", [ids[name] for name, _, _ in rows]),
        )
        return Batch(number, self.run, "/nowhere", (Part("0" * 16, self._writer, tuple(records), points),))

    @abstractmethod
    def make(self) -> Exporter:
        """A new exporter, as after a restart."""

    @abstractmethod
    def points(self) -> list[Point]:
        """The run's points as the destination has them, each once, in order of time within a name."""

    @abstractmethod
    def params(self) -> dict[str, str]:
        """The run's params, as text."""

    @abstractmethod
    def state(self) -> str:
        """The run's final status."""

    @contextmanager
    def trouble(self) -> Iterator[None]:
        """In the block the destination is there but not well."""
        yield

    def opened(self, memory: Mapping[str, Any] | None = None) -> Exporter:
        """A new exporter that has reached its destination."""
        exporter = self.make()
        self.exporters.append(exporter)
        assert exporter.open(self.run, memory or {}) == Delivered()
        return exporter


class OtlpWorld(World):
    """A receiver that keeps points by series and time, as every OTLP backend does."""

    def __init__(self, sink: Sink, endpoint: str, protocol: str) -> None:
        super().__init__()
        self.name = f"otlp over {protocol}"
        self.sink = sink
        self._spec = otlp_spec(endpoint, protocol=protocol)

    def make(self) -> Exporter:
        return OTLPExporter(self._spec, {}, os.environ)

    def points(self) -> list[Point]:
        kept = {(point.name, point.time_unix_nano): point for point in self.sink.points()}
        return sorted(kept.values(), key=lambda point: (point.name, point.time_unix_nano))

    def params(self) -> dict[str, str]:
        (root,) = [span for span in self.sink.spans() if span.name.startswith("run ")]
        prefix = "tracelet.param."
        return {k.removeprefix(prefix): str(v) for k, v in attributes(root).items() if k.startswith(prefix)}

    def state(self) -> str:
        (ended,) = [event for event in self.sink.events() if event.event_name == "tracelet.run.ended"]
        return str(attributes(ended)["tracelet.run.state"])

    @contextmanager
    def trouble(self) -> Iterator[None]:
        self.sink.rule = lambda _: Say(503, code=grpc.StatusCode.UNAVAILABLE)
        yield
        self.sink.rule = None


class Kept(SpanExporter, MetricExporter, LogRecordExporter):
    """An exporter object of a program, for all three signals: keeps what the SDK's encoders make of what it gets."""

    def __init__(self, sink: Sink) -> None:
        MetricExporter.__init__(self)
        self._sink = sink

    def export(self, given: Any, *_: Any, **__: Any) -> Any:
        if isinstance(given, MetricsData):
            signal, message, results = "metrics", encode_metrics(given), MetricExportResult
        elif isinstance(given[0], ReadableSpan):
            signal, message, results = "traces", encode_spans(given), SpanExportResult
        else:
            signal, message, results = "logs", encode_logs(given), LogRecordExportResult
        body = message.SerializeToString()
        said = self._sink.decide(Received(signal, message, body, {}, len(body)))
        return results.SUCCESS if said.status < 300 else results.FAILURE

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, *_: Any, **__: Any) -> None:
        raise AssertionError("the object belongs to the program, and is not shut down for it")


class LiveWorld(OtlpWorld):
    """An exporter object of the training program."""

    def __init__(self) -> None:
        super().__init__(Sink(), "http://nobody", "http/protobuf")
        self.name = "live"

    def make(self) -> Exporter:
        spec = {"exporter": "tests.Kept", "signals": ["metrics", "traces", "logs"]}
        return LiveExporter(spec, {"exporter": Kept(self.sink)}, {})


class PrometheusWorld(OtlpWorld):
    """A receiver of what Prometheus would be sent: samples of series, a companion beside each."""

    metrics_only = True

    def __init__(self, sink: Sink, endpoint: str) -> None:
        super().__init__(sink, endpoint, "http/protobuf")
        self.name = "prometheus"
        self._endpoint = endpoint

    def make(self) -> Exporter:
        spec = {"url": f"{self._endpoint}/v1/metrics", "prefix": "ml.", "window_age_s": 60.0, "window_ahead_s": 60.0}
        return PrometheusExporter(spec, {}, os.environ, now_ns=lambda: START + 10_000 * MS)

    def points(self) -> list[Point]:
        values: dict[tuple[str, int], float] = {}
        iterations: dict[tuple[str, int], float] = {}
        for _, scope, metric in self.sink.metrics():
            for point in metric.gauge.data_points if scope == "tracelet" else ():
                key = str(attributes(point)["tracelet.metric.key"])
                assert metric.name in (f"ml.{key}", "tracelet.iteration")
                if not point.flags:
                    kind = iterations if metric.name == "tracelet.iteration" else values
                    kind[key, point.time_unix_nano] = point.as_double
        assert values.keys() == iterations.keys()
        return sorted(
            (Point(key, value, int(iterations[key, at]), at) for (key, at), value in values.items()),
            key=lambda point: (point.name, point.time_unix_nano),
        )


class FileWorld(World):
    """A file of OTLP JSON lines."""

    name = "file"

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make(self) -> Exporter:
        return FileExporter({"path": str(self._path)}, {}, {})

    def _lines(self) -> list[Any]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def points(self) -> list[Point]:
        found = [
            Point(
                metric["name"],
                float(point["asDouble"]),
                int(point["attributes"][0]["value"]["intValue"]),
                int(point["timeUnixNano"]),
            )
            for line in self._lines()
            for resource in line.get("resourceMetrics", ())
            for scope in resource["scopeMetrics"]
            if scope["scope"]["name"] == "tracelet"
            for metric in scope["metrics"]
            for point in metric["gauge"]["dataPoints"]
            if not point.get("flags")
        ]
        return sorted(found, key=lambda point: (point.name, point.time_unix_nano))

    def params(self) -> dict[str, str]:
        (root,) = [
            span
            for line in self._lines()
            for resource in line.get("resourceSpans", ())
            for span in resource["scopeSpans"][0]["spans"]
            if span["name"].startswith("run ")
        ]
        prefix = "tracelet.param."
        values = {each["key"]: next(iter(each["value"].values())) for each in root["attributes"]}
        return {k.removeprefix(prefix): str(v) for k, v in values.items() if k.startswith(prefix)}

    def state(self) -> str:
        (ended,) = [
            record
            for line in self._lines()
            for resource in line.get("resourceLogs", ())
            for record in resource["scopeLogs"][0]["logRecords"]
            if record["eventName"] == "tracelet.run.ended"
        ]
        values = {each["key"]: next(iter(each["value"].values())) for each in ended["attributes"]}
        return str(values["tracelet.run.state"])

    @contextmanager
    def trouble(self) -> Iterator[None]:
        aside = self._path.with_suffix(".aside")
        if self._path.exists():
            self._path.rename(aside)
        self._path.mkdir()
        yield
        self._path.rmdir()
        if aside.exists():
            aside.rename(self._path)


class ConsoleWorld(World):
    """Lines for a person."""

    name = "console"
    can_be_away = False
    repeats_show = True

    def __init__(self) -> None:
        super().__init__()
        self._stream = io.StringIO()

    def make(self) -> Exporter:
        return ConsoleExporter({}, {}, {}, stream=self._stream)

    def _said(self, mark: str) -> list[str]:
        return [line.split("  ", 2)[2] for line in self._stream.getvalue().splitlines() if mark in line]

    def points(self) -> list[Point]:
        found = []
        for line in self._said("(iteration "):
            name, _, rest = line.partition(" = ")
            value, _, iteration = rest.rstrip(")").partition("  (iteration ")
            found.append(Point(name, float(value), int(iteration), 0))
        return sorted(found, key=lambda point: point.name)

    def params(self) -> dict[str, str]:
        pairs = (pair for line in self._said("  params  ") for pair in line.removeprefix("params  ").split(", "))
        return dict(pair.split("=", 1) for pair in pairs)

    def state(self) -> str:
        return self._said("  run ")[-1].split()[1]


class MlflowWorld(World):
    """A real MLflow server, through a proxy that can be told to fail."""

    name = "mlflow"

    def __init__(self, server: MlflowServer, proxy: Proxy) -> None:
        super().__init__()
        self._server = server
        self._proxy = proxy
        self._exporter: Exporter | None = None

    def make(self) -> Exporter:
        from tracelet.exporters.mlflow.exporter import MLflowExporter

        self._exporter = MLflowExporter({"tracking_uri": self._proxy.uri}, {}, os.environ)
        return self._exporter

    def _run_id(self) -> str:
        assert self._exporter is not None
        return str(self._exporter.memory()["run_id"])

    def points(self) -> list[Point]:
        rows = rows_of(self._server, self._run_id())
        found = [Point(row.key, row.value, row.step, row.timestamp * MS) for row in rows if "/" not in row.key]
        return sorted(found, key=lambda point: (point.name, point.time_unix_nano))

    def params(self) -> dict[str, str]:
        return dict(get_run(self._server, self._run_id()).data.params)

    def state(self) -> str:
        return get_run(self._server, self._run_id()).info.status

    @contextmanager
    def trouble(self) -> Iterator[None]:
        well = self._proxy.rule
        self._proxy.rule = lambda _: Spoil(forward=False, answer=(503, b"", {}))
        yield
        self._proxy.rule = well


def http_world(_: Any) -> Iterator[World]:
    with HttpSink() as sink:
        yield OtlpWorld(sink, sink.endpoint, "http/protobuf")


def grpc_world(_: Any) -> Iterator[World]:
    with GrpcSink() as sink:
        yield OtlpWorld(sink, sink.endpoint, "grpc")


def live_world(_: Any) -> Iterator[World]:
    yield LiveWorld()


def prometheus_world(_: Any) -> Iterator[World]:
    with HttpSink() as sink:
        yield PrometheusWorld(sink, sink.endpoint)


def file_world(request: Any) -> Iterator[World]:
    yield FileWorld(request.getfixturevalue("tmp_path") / "out.jsonl")


def console_world(_: Any) -> Iterator[World]:
    yield ConsoleWorld()


def mlflow_world(request: Any) -> Iterator[World]:
    server = request.getfixturevalue("mlflow_server")
    with recording_proxy(server.uri) as proxy:
        yield MlflowWorld(server, proxy)


WORLDS = {
    "otlp-http": http_world,
    "otlp-grpc": grpc_world,
    "live": live_world,
    "prometheus": prometheus_world,
    "file": file_world,
    "console": console_world,
    "mlflow": mlflow_world,
}
