"""The SDK's own pipelines to a real MLflow, through the exporters that speak its interfaces."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExportResult, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExportResult,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from tests.servers import MlflowServer, Seen, Spoil, free_port, recording_proxy, rows_of, run_of
from tracelet.exporters.mlflow import sdk_runs
from tracelet.exporters.mlflow.sdk import MLflowLogExporter, MLflowMetricExporter, MLflowSpanExporter
from tracelet.otlp import resource_attributes

ROOT = Path(__file__).parents[2]
Later = Callable[[Callable[[], object]], None]


@pytest.fixture
def at_the_end() -> Iterator[Later]:
    calls: list[Callable[[], object]] = []
    yield calls.append
    for call in reversed(calls):
        call()


def event(name: str, **attributes: Any) -> LogRecord:
    return LogRecord(
        event_name=name,
        severity_number=SeverityNumber.INFO,
        body=name,
        attributes=attributes,
        timestamp=1_790_000_000 * 10**9,
    )


def test_three_pipelines_of_one_program_fill_one_run(mlflow_server: MlflowServer, at_the_end: Later) -> None:
    name = f"sdk-{uuid4().hex[:8]}"
    resource = Resource(resource_attributes("sdk-project", name))
    spans = MLflowSpanExporter(mlflow_server.uri)
    metrics = MLflowMetricExporter(mlflow_server.uri)
    logs = MLflowLogExporter(mlflow_server.uri)
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(spans))
    meters = MeterProvider([PeriodicExportingMetricReader(metrics, export_interval_millis=60_000)], resource=resource)
    loggers = LoggerProvider(resource=resource)
    loggers.add_log_record_processor(BatchLogRecordProcessor(logs))
    for provider in (tracers, meters, loggers):
        at_the_end(provider.shutdown)

    with tracers.get_tracer("my.program").start_as_current_span("epoch"):
        gauge = meters.get_meter("tracelet").create_gauge("train/loss")
        for iteration in range(300):
            gauge.set(1 / (iteration + 1), {"tracelet.iteration": iteration})
        meters.get_meter("my.program").create_counter("requests").add(3)
    events = loggers.get_logger("tracelet")
    events.emit(event("tracelet.params", **{"tracelet.param.lr": 0.1, "tracelet.param.layers": 3}))
    events.emit(event("tracelet.tags", **{"tracelet.tag.team": "ml"}))
    loggers.get_logger("my.program").emit(LogRecord(body="hello"))
    assert tracers.force_flush()
    assert meters.force_flush()
    assert loggers.force_flush()

    run = run_of(mlflow_server, name, project="sdk-project", status="RUNNING")
    assert run.data.params == {"lr": "0.1", "layers": "3"}
    assert run.data.tags["team"] == "ml"
    rows = rows_of(mlflow_server, run.info.run_id, "train/loss")
    assert sorted((row.step, row.value) for row in rows) == [(i, 1 / (i + 1)) for i in range(300)]
    assert len(traces_of(mlflow_server, run.info.run_id)) == 1
    assert (spans.foreign, metrics.foreign, logs.foreign) == (0, 1, 1)

    events.emit(event("tracelet.run.ended", **{"tracelet.run.state": "FINISHED"}))
    assert loggers.force_flush()
    ended = run_of(mlflow_server, name, project="sdk-project", status="FINISHED")
    assert ended.info.run_id == run.info.run_id  # one run for all three


def traces_of(server: MlflowServer, run_id: str) -> list[Any]:
    experiments = server.ask("experiments/search", {"max_results": 1000})["experiments"]
    ids = [e["experiment_id"] for e in experiments if e["name"] == "sdk-project"]
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=server.uri)
    return list(client.search_traces(locations=ids, run_id=run_id))


def test_without_mlflow_an_export_fails_in_time_and_says_so(
    caplog: pytest.LogCaptureFixture, at_the_end: Later
) -> None:
    resource = Resource(resource_attributes("sdk-project", "nowhere", run_id="nowhere-1"))
    exporter = MLflowSpanExporter(f"http://127.0.0.1:{free_port()}", timeout_s=1.0)
    at_the_end(exporter.shutdown)
    with caplog.at_level(logging.WARNING, "tracelet"):
        assert exporter.export([a_span(resource)]) is SpanExportResult.FAILURE
    assert "1 items of run nowhere-1 are not in MLflow" in caplog.text


def gauge_data(resource: Resource, values: dict[str, int]) -> MetricsData:
    """So many points of each name, a step each."""
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    for name, count in values.items():
        gauge = meters.get_meter("tracelet").create_gauge(name)
        for step in range(count):
            gauge.set(float(step), {"tracelet.iteration": step})
    data = reader.get_metrics_data()
    assert data is not None
    return data


def test_an_mlflow_that_hangs_is_asked_once_in_the_time_that_an_export_has(at_the_end: Later) -> None:
    """A read may be repeated, but not beyond that time, which is also the longest that one answer is waited for."""
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    at_the_end(listener.close)

    def take() -> None:
        while True:
            try:
                taken, _ = listener.accept()
            except OSError:
                return
            at_the_end(taken.close)
            asked.append(taken.recv(1000))  # and never a word

    threading.Thread(target=take, daemon=True).start()
    at_the_end(lambda: listener.shutdown(socket.SHUT_RDWR))
    # With this limit alone the one answer would be waited for ten minutes.
    exporter = MLflowMetricExporter(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=600.0)
    at_the_end(exporter.shutdown)
    data = gauge_data(Resource(resource_attributes("sdk-project", "hangs")), {"a": 1})
    assert exporter.export(data, timeout_millis=700) is MetricExportResult.FAILURE
    assert [one.split()[0] for one in asked] == [b"GET"]


def test_a_point_that_mlflow_refuses_keeps_no_other_from_it(
    mlflow_server: MlflowServer, caplog: pytest.LogCaptureFixture, at_the_end: Later
) -> None:
    name = f"sdk-{uuid4().hex[:8]}"
    no = (400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"}', {})

    def rule(seen: Seen) -> Spoil:
        bad = seen.path.endswith("runs/log-batch") and b'"bad"' in seen.body
        return Spoil(forward=False, answer=no) if bad else Spoil()

    with recording_proxy(mlflow_server.uri) as proxy:
        proxy.rule = rule
        exporter = MLflowMetricExporter(proxy.uri)
        data = gauge_data(Resource(resource_attributes("sdk-project", name)), {"bad": 1, "good": 1900})
        with caplog.at_level(logging.WARNING, "tracelet"):
            assert exporter.export(data, timeout_millis=60_000) is MetricExportResult.FAILURE
        exporter.shutdown()
    assert "1 items of run" in caplog.text
    assert "not this one" in caplog.text
    run = run_of(mlflow_server, name, project="sdk-project")
    assert len(rows_of(mlflow_server, run.info.run_id, "good")) == 1900


def a_span(resource: Resource) -> Any:
    kept: list[Any] = []
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    with provider.get_tracer("t").start_as_current_span("s") as span:
        kept.append(span)
    return kept[0]


def test_an_mlflow_that_comes_up_meanwhile_has_it(mlflow_server: MlflowServer, at_the_end: Later) -> None:
    name = f"sdk-{uuid4().hex[:8]}"
    exporter = MLflowSpanExporter(mlflow_server.uri)
    at_the_end(exporter.shutdown)
    assert exporter.export([a_span(Resource(resource_attributes("sdk-project", name)))]) is SpanExportResult.SUCCESS
    assert run_of(mlflow_server, name, project="sdk-project").info.status == "RUNNING"


def test_what_is_nobodys_succeeds_and_is_counted() -> None:
    exporter = MLflowSpanExporter(f"http://127.0.0.1:{free_port()}")
    assert exporter.export([a_span(Resource({"service.name": "shop"}))] * 3) is SpanExportResult.SUCCESS
    assert exporter.foreign == 3
    assert sdk_runs._shared == {}  # nobody asked for MLflow


def test_after_shutdown_an_export_fails_and_nothing_is_left_open(
    mlflow_server: MlflowServer, caplog: pytest.LogCaptureFixture
) -> None:
    span = a_span(Resource(resource_attributes("sdk-project", f"sdk-{uuid4().hex[:8]}")))
    first, second = MLflowSpanExporter(mlflow_server.uri), MLflowSpanExporter(mlflow_server.uri)
    assert first.export([span]) is SpanExportResult.SUCCESS
    assert second.export([span]) is SpanExportResult.SUCCESS
    first.shutdown()
    first.shutdown()
    assert len(sdk_runs._shared) == 1
    second.shutdown()
    assert sdk_runs._shared == {}
    assert second.export([span]) is SpanExportResult.FAILURE
    assert "has been shut down" in caplog.text
    assert first.force_flush()


def test_metrics_and_logs_fail_as_their_interfaces_say(at_the_end: Later) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    resource = Resource(resource_attributes("sdk-project", "nowhere"))
    metrics, logs = MLflowMetricExporter(uri, timeout_s=0.2), MLflowLogExporter(uri, timeout_s=0.2)
    at_the_end(metrics.shutdown)
    at_the_end(logs.shutdown)
    seen: list[Any] = []
    export = metrics.export
    metrics.export = lambda *args, **kwargs: seen.append(export(*args, **kwargs)) or seen[-1]  # type: ignore[method-assign,assignment,func-returns-value]
    meters = MeterProvider([PeriodicExportingMetricReader(metrics, 60_000)], resource=resource)
    meters.get_meter("tracelet").create_gauge("loss").set(1.0)
    meters.force_flush()
    meters.shutdown()
    assert seen[0] is MetricExportResult.FAILURE
    export_logs = logs.export
    logs.export = lambda batch: seen.append(export_logs(batch)) or seen[-1]  # type: ignore[method-assign,assignment,func-returns-value]
    loggers = LoggerProvider(resource=resource)
    loggers.add_log_record_processor(SimpleLogRecordProcessor(logs))
    loggers.get_logger("tracelet").emit(event("tracelet.tags", **{"tracelet.tag.a": "b"}))
    loggers.shutdown()
    assert seen[-1] is LogRecordExportResult.FAILURE


AUTOMATIC = """
from importlib.metadata import entry_points
from opentelemetry import metrics, trace
from opentelemetry.sdk._configuration import _initialize_components

_initialize_components()
with trace.get_tracer("any").start_as_current_span("work"):
    metrics.get_meter("tracelet").create_gauge("loss").set(0.5, {"tracelet.iteration": 7})
trace.get_tracer_provider().shutdown()
metrics.get_meter_provider().shutdown()
"""


def test_a_program_configured_by_variables_alone_is_a_run(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    name = f"sdk-{uuid4().hex[:8]}"
    # An installed tracelet has its entry points in its metadata; this one is made from pyproject.toml.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "tracelet_points-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tracelet-points\nVersion: 1.0\n")
    groups = {g: points for g, points in project["entry-points"].items() if g.startswith("opentelemetry_")}
    lines = [line for g, points in groups.items() for line in (f"[{g}]", *(f"{k} = {v}" for k, v in points.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "MLFLOW_", "TRACELET_"))},
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "OTEL_TRACES_EXPORTER": "mlflow",
        "OTEL_METRICS_EXPORTER": "mlflow",
        "OTEL_LOGS_EXPORTER": "mlflow",
        "OTEL_RESOURCE_ATTRIBUTES": f"tracelet.run.id={name},tracelet.project=sdk-project,tracelet.rank=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", AUTOMATIC], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not in MLflow" not in done.stderr
    run = run_of(mlflow_server, name, project="sdk-project")  # nobody named it: its id is its name
    assert [(row.step, row.value) for row in rows_of(mlflow_server, run.info.run_id, "loss")] == [(7, 0.5)]
    assert len(traces_of(mlflow_server, run.info.run_id)) == 1
