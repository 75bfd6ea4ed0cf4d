"""OTLP over gRPC against a real server: what arrives, and what each status code leads to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tests.otlp_batches import MS, RUN, START, batch, otlp_spec
from tests.sinks import GrpcSink, Received, Say, attributes, certificate
from tracelet.exporters.base import Answer, Delivered, Rejected, RetryLater
from tracelet.exporters.otlp import OTLPExporter
from tracelet.exporters.otlp_grpc import GrpcSender
from tracelet.records import ParamsLogged, SpanEnded, SpanStarted


@pytest.fixture
def sink() -> Iterator[GrpcSink]:
    with GrpcSink() as running:
        yield running


@pytest.fixture
def made() -> Iterator[Any]:
    """Makes exporters and closes them at the end: an open channel has threads."""
    exporters: list[OTLPExporter] = []

    def make(endpoint: str | None, secrets: dict[str, Any] | None = None, **spec: Any) -> OTLPExporter:
        exporter = OTLPExporter(otlp_spec(endpoint, **({"protocol": "grpc"} | spec)), secrets or {}, os.environ)
        exporter.open(RUN, {})
        exporters.append(exporter)
        return exporter

    yield make
    for exporter in exporters:
        exporter.close()


def rows(count: int) -> list[tuple[str, float, int]]:
    return [("loss", i / 8, i) for i in range(count)]


RECORDS = [
    ParamsLogged(START, {"lr": 0.1}),
    SpanStarted("1" * 16, "2" * 16, "epoch", START),
    SpanEnded("1" * 16, START + MS),
]


def first_try(exporter: OTLPExporter) -> Answer:
    return exporter.begin(batch(rows(1))).attempt()


def test_all_three_signals_arrive(sink: GrpcSink, made: Any) -> None:
    assert made(sink.endpoint).begin(batch(rows(100), RECORDS)).attempt() == Delivered()
    assert [p.iteration for p in sink.points()] == list(range(100))
    assert [record.event_name for record in sink.events()] == ["tracelet.params"]
    assert [span.name for span in sink.spans()] == ["epoch"]


def test_the_protocol_may_come_from_the_variables(sink: GrpcSink, made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.endpoint)
    assert first_try(made(None, protocol=None)) == Delivered()


@pytest.mark.parametrize("compression", ["none", "gzip", "", "zstd"])
def test_every_compression_variable_is_survived(
    sink: GrpcSink, made: Any, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    assert first_try(made(sink.endpoint)) == Delivered()


def test_an_endpoint_without_a_scheme_works_when_insecure_and_is_explained_when_not(
    sink: GrpcSink, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = f"127.0.0.1:{sink.port}"
    answer = first_try(made(bare, timeout_s=2.0))
    assert isinstance(answer, RetryLater)
    assert f"write http://{bare}" in answer.reason
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "true")
    assert first_try(made(bare)) == Delivered()


def test_headers_of_the_variables_and_of_arguments_are_merged(
    sink: GrpcSink, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x")
    first_try(made(sink.endpoint, {"headers": {"X-Scope-OrgID": "ml"}}))
    assert sink.stored[0].headers["authorization"] == "Bearer x"
    assert sink.stored[0].headers["x-scope-orgid"] == "ml"


def test_every_request_says_which_wire_version_it_speaks(sink: GrpcSink, made: Any) -> None:
    first_try(made(sink.endpoint))
    first_try(made(sink.endpoint, {"headers": {"x-key": "value"}}))
    assert [received.headers["tracelet.wire.version"] for received in sink.stored] == ["1.0", "1.0"]


def test_tls_with_the_variables_certificate(made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    public, key = certificate(tmp_path)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), public.read_bytes())])
    with GrpcSink(credentials) as sink:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(public))
        assert first_try(made(f"https://localhost:{sink.port}")) == Delivered()


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "DATA_LOSS", "INTERNAL", "UNKNOWN"])
def test_passing_trouble_is_tried_later(sink: GrpcSink, made: Any, code: str) -> None:
    delivery = made(sink.endpoint).begin(batch(rows(2), RECORDS))
    sink.script.extend([Say(), Say(code=grpc.StatusCode[code], message="busy")])
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert not answer.loud
    assert code in answer.reason
    assert delivery.attempt() == Delivered()
    assert sorted(received.signal for received in sink.stored) == ["logs", "metrics", "traces"]


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED"])
def test_what_a_person_must_mend_is_loud_and_loses_nothing(sink: GrpcSink, made: Any, code: str) -> None:
    delivery = made(sink.endpoint).begin(batch(rows(2)))
    sink.script.append(Say(code=grpc.StatusCode[code]))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert delivery.attempt() == Delivered()


def test_retry_info_is_honoured_in_both_trailers(sink: GrpcSink, made: Any) -> None:
    delivery = made(sink.endpoint).begin(batch(rows(1)))
    info = RetryInfo()
    info.retry_delay.FromMilliseconds(2500)
    detail = AnyMessage()
    detail.Pack(info)
    for name, value in (
        ("google.rpc.retryinfo-bin", info.SerializeToString()),
        ("grpc-status-details-bin", Status(code=8, details=[detail]).SerializeToString()),
    ):
        sink.script.append(Say(code=grpc.StatusCode.RESOURCE_EXHAUSTED, trailers=((name, value),)))
        answer = delivery.attempt()
        assert isinstance(answer, RetryLater)
        assert answer.after_s == 2.5


def test_an_invalid_argument_is_halved_to_the_point_at_fault(sink: GrpcSink, made: Any) -> None:
    def rule(received: Received) -> Say | None:
        metric = received.message.resource_metrics[0].scope_metrics[0].metrics[0]
        bad = any(attributes(point)["tracelet.iteration"] == 9 for point in metric.gauge.data_points)
        return Say(code=grpc.StatusCode.INVALID_ARGUMENT, message="too old") if bad else None

    sink.rule = rule
    answer = made(sink.endpoint).begin(batch(rows(40))).attempt()
    assert isinstance(answer, Rejected)
    assert [item.facts["iteration"] for item in answer.items] == [9]
    assert len(sink.points()) == 39


def test_a_message_too_large_for_the_server_is_halved(sink: GrpcSink, made: Any) -> None:
    def rule(received: Received) -> Say | None:
        if len(received.body) < 3_000:
            return None
        return Say(code=grpc.StatusCode.RESOURCE_EXHAUSTED, message="Received message larger than max (9 vs. 8)")

    sink.rule = rule
    assert made(sink.endpoint).begin(batch(rows(200))).attempt() == Delivered()
    assert len(sink.points()) == 200


def test_a_partial_success_is_not_a_success(sink: GrpcSink, made: Any) -> None:
    sink.script.append(Say(rejected=1, message="duplicate"))
    answer = made(sink.endpoint).begin(batch(rows(1))).attempt()
    assert isinstance(answer, Rejected)
    assert answer.items[0].reason == "duplicate"


def test_a_server_that_comes_back_is_found_soon(made: Any) -> None:
    import time

    with GrpcSink() as gone:
        endpoint = gone.endpoint
        exporter = made(endpoint)
        assert first_try(exporter) == Delivered()
    delivery = exporter.begin(batch(rows(1)))
    assert isinstance(delivery.attempt(), RetryLater)
    with GrpcSink(port=int(endpoint.rpartition(":")[2])) as back:
        deadline = time.monotonic() + 15
        while delivery.attempt() != Delivered():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(back.points()) == 1


def test_without_the_sdks_private_channel_data_still_arrives(
    sink: GrpcSink, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrpcSender, "_raw_call", lambda _: None)
    assert made(sink.endpoint).begin(batch(rows(10), RECORDS)).attempt() == Delivered()
    assert len(sink.points()) == 10
    assert [span.name for span in sink.spans()] == ["epoch"]
    assert len(sink.events()) == 1
    sink.script.append(Say(code=grpc.StatusCode.INVALID_ARGUMENT))
    assert isinstance(first_try(made(sink.endpoint)), RetryLater)


def test_a_header_that_is_not_legal_is_said_without_its_value(sink: GrpcSink, made: Any) -> None:
    answer = first_try(made(sink.endpoint, {"headers": {"x-key": "hunter2\nhunter3"}}))
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert "hunter" not in answer.reason
