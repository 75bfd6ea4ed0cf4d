"""What waits in the collector: on disk, in bytes, without the callers' tokens, and no longer than was promised."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import StatusCode
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.otlp_batches import points
from tests.sinks import GrpcSink, HttpSink, Say, until
from tests.stack.collectors import (
    MINUTE,
    MS,
    Collector,
    Prometheus,
    Sender,
    as_sent,
    made,
    now_ns,
    refuse,
    send,
    stored_points,
)
from tests.stack.harness import lacking
from tracelet import OTLP, Experiment, ExperimentConfig
from tracelet.exporters.base import Delivered
from tracelet.exporters.otlp import OTLPExporter
from tracelet.otlp import semconv
from tracelet.otlp.encode import EventsLoad, PointsLoad, SpansLoad, resource_bytes, swells
from tracelet.records import Batch, Part, PointBatch, RunInfo, WriterOpened

TOKEN = "planted-token-6d1f"
CHUNK = 500
UNFIT = "otelcol_exporter_enqueue_failed_metric_points"


def in_order(url: str, run: Sender, batch: PointBatch, *, give_up_at: int | None = None) -> Iterator[int]:
    """Send as a shipper does: the next request only when this one is acknowledged. Yields each status."""
    for at in range(0, len(batch), CHUNK):
        (body,) = run.bodies(batch.slice(at, at + CHUNK))
        while True:
            (status,) = send(url, [body])
            yield status
            if status == 200:
                break
            time.sleep(0.05)


def test_a_callers_token_is_in_no_queue_file(tmp_path: Path) -> None:
    run = Sender("secret")
    away = "http://127.0.0.1:1"
    with Collector(tmp_path / "collector", prometheus=away, gateway=away, loki=away, tempo="127.0.0.1:1") as collector:
        bodies = run.bodies(made(1_000, "loss", start=now_ns()))
        for sent, kind in ((bodies, "metrics"), ([a_log(run, 1)], "logs"), ([a_span(run, 1)], "traces")):
            statuses = send(collector.http, sent, signal=kind, Authorization=f"Bearer {TOKEN}", X_Api_Key=TOKEN)
            assert set(statuses) == {200}
        assert collector.waiting() > 2 * len(bodies[0])
    files = [path for path in collector.queues.iterdir() if path.is_file()]
    held = b"".join(path.read_bytes() for path in files)
    assert b"secret" in held  # the run's id: the data is there
    assert TOKEN.encode() not in held


def test_the_gateways_token_goes_to_the_gateway_and_an_empty_one_does_no_harm(tmp_path: Path) -> None:
    run, start = Sender("token"), now_ns()
    with HttpSink() as gateway:
        for number, token in enumerate(["", "t0ken"]):
            given = {"TRACELET_GATEWAY_TOKEN": token} if token else {}
            with Collector(tmp_path / str(number), gateway=gateway.url, **given) as collector:
                assert send(collector.http, run.bodies(made(10, "loss", start=start + number * 10 * MS))) == [200]
                until(lambda seen=number + 1: len(gateway.stored) == seen)  # type: ignore[misc]
            assert gateway.stored[-1].headers["authorization"] == f"Bearer {token}".strip()


def test_what_was_acknowledged_survives_a_killed_collector(tmp_path: Path) -> None:
    run, batch = Sender("killed"), made(20_000, "loss", start=now_ns(MINUTE))
    with HttpSink() as gateway:
        gateway.rule = lambda _: refuse()
        with Collector(tmp_path / "collector", gateway=gateway.url) as collector:
            assert set(in_order(collector.http, run, batch)) == {200}
            collector.stop(signal.SIGKILL)
            gateway.rule = None
            collector.start()
            until(lambda: stored_points(gateway, "killed") == as_sent(batch), 40)


def test_a_full_queue_is_a_quick_503_and_after_the_return_both_backends_have_every_point(tmp_path: Path) -> None:
    run, batch = Sender("full"), made(40_000, "loss", start=now_ns(MINUTE))
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(
            tmp_path / "collector",
            prometheus=prometheus.otlp,
            gateway=gateway.url,
            TRACELET_QUEUE_BYTES="1000000",
        ) as collector,
    ):
        gateway.rule = lambda _: refuse()
        sending = in_order(collector.http, run, batch)
        until(lambda: next(sending) == 503 and collector.number(UNFIT, "otlp_http/gateway") > 0)
        full = collector.number("otelcol_exporter_queue_size", 'data_type="metrics",exporter="otlp_http/gateway"')
        assert full >= 0.9 * 1_000_000
        # An in-order sender stands still now, for Prometheus as well.
        assert list(itertools.islice(sending, 5)) == [503] * 5
        assert prometheus.count("ml_loss") < len(batch)
        gateway.rule = None
        assert set(sending) <= {200, 503}
        until(lambda: stored_points(gateway, "full") == as_sent(batch), 40)
        until(lambda: prometheus.count("ml_loss") == prometheus.count("tracelet_iteration") == len(batch))


def test_with_a_second_port_prometheus_goes_on_while_the_gateways_queue_is_full(tmp_path: Path) -> None:
    run, batch = Sender("two-ports"), made(40_000, "loss", start=now_ns(MINUTE))
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(
            tmp_path / "collector",
            "collector.yaml",
            "second-port.yaml",
            prometheus=prometheus.otlp,
            gateway=gateway.url,
            TRACELET_QUEUE_BYTES="1000000",
        ) as collector,
    ):
        gateway.rule = lambda _: refuse()
        to_gateway = in_order(collector.second, run, batch)
        assert 503 in set(itertools.islice(to_gateway, 100))
        assert set(in_order(collector.http, run, batch)) <= {200, 503}
        until(lambda: prometheus.count("ml_loss") == len(batch), 40)
        assert next(to_gateway) == 503
        gateway.rule = None
        assert set(to_gateway) <= {200, 503}
        until(lambda: stored_points(gateway, "two-ports") == as_sent(batch), 40)


def test_a_run_keeps_what_the_collector_has_no_room_for_and_delivers_it_all(tmp_path: Path) -> None:
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(
            tmp_path / "collector", prometheus=prometheus.otlp, gateway=gateway.url, TRACELET_QUEUE_BYTES="3000000"
        ) as collector,
    ):
        gateway.rule = lambda _: refuse()
        logged = itertools.count()
        with Experiment("full", ExperimentConfig(project="collector"), backend=OTLP(collector.http)) as exp:
            while exp.flush(timeout=2):
                for i in itertools.islice(logged, 4_000):
                    exp.log_metric(f"m{i % 10}", i * 0.5, iteration=i)  # ten: one alone would be dense
                assert i < 400_000
            assert collector.number(UNFIT, "otlp_http/gateway") > 0
            gateway.rule = None
            assert exp.flush(timeout=60)
            run_id = exp.id
        wanted = {(i, i * 0.5) for i in range(next(logged))}
        until(lambda: {(p.iteration, p.value) for p in gateway.points(run_id)} == wanted, 40)
        until(lambda: prometheus.count(f'{{__name__=~"ml_m.",tracelet_run_id="{run_id}"}}') == len(wanted), 40)


def delivered(way: OTLPExporter, run: Sender, sent: PointBatch, number: int = 1) -> None:
    """Through the shipper's own exporter, again for as long as the collector has no room."""
    opened = WriterOpened(now_ns(), "first", 4711, 0, "a" * 16, now_ns(), run.resource)
    about = RunInfo(run.run_id, "vision", "cnn", str(run.resource[semconv.RUN_NAME]))
    delivery = way.begin(Batch(number, about, "/nowhere", (Part("w" * 16, opened, (), sent),)))
    until(lambda: delivery.attempt() == Delivered(), 60)


SMALLEST = "16000000"  # bytes of a queue, as the files and pages name it


def test_the_largest_request_that_is_made_fits_the_smallest_queue_that_is_allowed(tmp_path: Path) -> None:
    run, rows = Sender("largest"), [(i / 2, i) for i in range(OTLPExporter.max_points)]

    def named(length: int) -> PointBatch:
        return points([("x" * length, *row) for row in rows], start=now_ns(MINUTE))

    longest = next(
        length for length in range(400, 0, -1) if not swells(PointsLoad.of(resource_bytes(run.resource), named(length)))
    )
    prometheus = Prometheus(tmp_path / "prometheus")  # not there yet
    with (
        HttpSink() as gateway,
        Collector(
            tmp_path / "collector", prometheus=prometheus.otlp, gateway=gateway.url, TRACELET_QUEUE_BYTES=SMALLEST
        ) as collector,
    ):
        way = OTLPExporter({"signals": ["metrics"], "endpoint": collector.http}, {}, os.environ)
        delivered(way, run, named(longest))
        waiting = collector.number("otelcol_exporter_queue_size", 'exporter="otlp_http/prometheus"')
        assert 0.97 * semconv.LABELLED_MAX_BYTES < waiting <= semconv.LABELLED_MAX_BYTES
        with prometheus:
            until(lambda: prometheus.count('{__name__=~"ml_x+|tracelet_iteration"}') == 2 * len(rows), 40)
        way.close()


def test_names_of_3_000_characters_pass_the_smallest_queue_and_prometheus_has_every_point(tmp_path: Path) -> None:
    # Labels make 117 MB of these 0.9 MB. As one request a third of it is over what Prometheus takes as a body.
    run, batch = Sender("long"), made(18_000, "x" * 3_000, start=now_ns(MINUTE))
    other, named = Sender("n" * 400), made(18_000, "loss", start=now_ns(MINUTE))
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(
            tmp_path / "collector", prometheus=prometheus.otlp, gateway=gateway.url, TRACELET_QUEUE_BYTES=SMALLEST
        ) as collector,
    ):
        way = OTLPExporter({"signals": ["metrics"], "endpoint": collector.http}, {}, os.environ)
        delivered(way, run, batch)
        delivered(way, other, named, 2)
        way.close()
        for sender, sent in ((run, batch), (other, named)):
            selector = f'{{tracelet_run_id="{sender.run_id}",tracelet_metric_key!=""}}'
            until(lambda selector=selector: prometheus.count(selector) == 2 * 18_000, 60)  # type: ignore[misc]
            assert stored_points(gateway, sender.run_id) == as_sent(sent)
        assert not collector.numbers("otelcol_exporter_send_failed_metric_points")


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 50 MB."""
    at = tmp_path / "volume"
    at.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(at)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        lacking(f"no volume of 50 MB can be mounted here: {mounted.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_six_queues_of_5_mb_on_a_volume_of_50_lose_nothing_acknowledged(tmp_path: Path, volume: Path) -> None:
    """All backends down until all queues are full, then a kill and a start, with its compaction, on the full volume."""
    run, batch = Sender("volume"), made(150_000, "loss", "acc", start=now_ns(10 * MINUTE))
    with HttpSink() as gateway, HttpSink() as others, GrpcSink() as tempo:
        sinks = (gateway, others, tempo)
        for sink in sinks:
            sink.rule = lambda _: Say(503, body=b"", code=StatusCode.UNAVAILABLE)
        collector = Collector(
            tmp_path / "collector",
            prometheus=others.url,
            gateway=gateway.url,
            loki=others.url,
            tempo=f"127.0.0.1:{tempo.port}",
            TRACELET_QUEUE_DIR=str(volume / "queue"),
            TRACELET_QUEUE_BYTES="5000000",
        )
        with collector:
            pieces = [batch.slice(at, at + CHUNK) for at in range(0, len(batch), CHUNK)]
            statuses = send(collector.http, [body for piece in pieces for body in run.bodies(piece)])
            points = [p for p, status in zip(pieces, statuses, strict=True) if status == 200]
            logs = send(collector.http, [a_log(run, n) for n in range(100)], signal="logs")
            spans = send(collector.http, [a_span(run, n) for n in range(100)], signal="traces")
            assert set(statuses) == set(logs) == set(spans) == {200, 503}
            full = collector.numbers("otelcol_exporter_queue_size")
            assert len(full) == 6
            assert min(full.values()) > 0.9 * 5_000_000
            collector.stop(signal.SIGKILL)
            collector.start()
            for sink in sinks:
                sink.rule = None
            wanted = {point for piece in points for point in as_sent(piece)}
            until(lambda: wanted <= stored_points(gateway, "volume"), 60)
            until(lambda: collector.waiting() == 0, 60)
        in_prometheus = {
            (point.as_double, point.time_unix_nano)
            for _, _, metric in others.metrics()
            if metric.name != "tracelet.iteration"
            for point in metric.gauge.data_points
        }
        assert {(value, at) for _, value, _, at in wanted} <= in_prometheus
        for sent, kept in ((logs, others.events()), (logs, gateway.events())):
            texts = {event.body.string_value[:8] for event in kept}
            assert {f"{n:08}" for n, status in enumerate(sent) if status == 200} <= texts
        for each in (gateway, tempo):
            assert {f"{n:08}" for n, status in enumerate(spans) if status == 200} <= {
                span.name[:8] for span in each.spans()
            }


def a_log(run: Sender, number: int) -> bytes:
    record = LogRecord(time_unix_nano=now_ns(), body=AnyValue(string_value=f"{number:08}" + "x" * 100_000))
    return EventsLoad(resource_bytes(run.resource), (record,)).encode()


def a_span(run: Sender, number: int) -> bytes:
    span = Span(trace_id=b"t" * 16, span_id=b"s" * 8, name=f"{number:08}" + "x" * 100_000)
    return SpansLoad(resource_bytes(run.resource), (span,)).encode()


def test_an_outage_of_prometheus_as_long_as_promised_loses_nothing(tmp_path: Path) -> None:
    """The promise, scaled: an outage may last as long as the window exceeds the filter's age, here 60 s less 40 s.

    Beside it a filter as old as the window, to show what the difference is for.
    """
    soon = "yaml:exporters::otlp_http/prometheus::retry_on_failure::max_interval: 1s"  # of an outage of 24 h: 30 s
    with Prometheus(tmp_path / "prometheus", "60s") as prometheus:
        kept, careless = (
            Collector(tmp_path / age, "collector.yaml", soon, prometheus=prometheus.otlp, TRACELET_WINDOW_AGE=age)
            for age in ("40s", "59s")
        )
        with kept, careless:
            # A series' first points may be older than the window; what comes behind its newest may not.
            newest = made(100, "late", start=now_ns(1_000 * MS))
            for each, run in ((kept, "kept"), (careless, "careless")):
                assert send(each.http, Sender(run).bodies(newest)) == [200]
            until(lambda: prometheus.count("ml_late") == 200)
            prometheus.stop()
            # The oldest points that each filter takes.
            began, oldest = time.monotonic(), now_ns(39_000 * MS)
            assert send(kept.http, Sender("kept").bodies(made(1_000, "late", start=oldest))) == [200]
            lost = made(1_000, "late", start=now_ns(58_000 * MS))
            assert send(careless.http, Sender("careless").bodies(lost)) == [200]
            until(lambda: time.monotonic() - began > 16)  # nothing to wait for: the outage is what is tested
            # The window counts from the newest sample that the server has. Somebody else's comes first.
            for each in (kept, careless):
                each.signal(signal.SIGSTOP)
            prometheus.start()
            fresh = Sender("fresh").bodies(made(1, "fresh", start=now_ns()))
            assert send(prometheus.at, fresh, prefix="/api/v1/otlp") == [200]
            for each in (kept, careless):
                each.signal(signal.SIGCONT)
            until(lambda: prometheus.count('ml_late{tracelet_run_id="kept"}') == 1_100)
            failed = "otelcol_exporter_send_failed_metric_points"
            until(lambda: careless.number(failed, "otlp_http/prometheus") == 2 * 1_000)
            assert not kept.numbers(failed)
            assert kept.number("otelcol_processor_filter_datapoints_filtered", "filter/too_old") == 0
            assert prometheus.count('ml_late{tracelet_run_id="careless"}') == 100


@pytest.mark.parametrize("status", [401, 403, 500, 429, 502, 503, 504])
def test_a_backlog_is_dropped_at_a_401_or_500_and_kept_at_a_503(tmp_path: Path, status: int) -> None:
    """Why the gateway answers 503 to a collector whose token is wrong, and an alert watches send_failed."""
    run, start = Sender("refused"), now_ns(MINUTE)
    with HttpSink() as gateway, Collector(tmp_path / "collector", gateway=gateway.url) as collector:
        gateway.rule = lambda _: refuse(status)
        batch = made(1_000, "loss", start=start)
        assert set(in_order(collector.http, run, batch)) == {200}
        final = status in {401, 403, 500}
        if final:
            failed = "otelcol_exporter_send_failed_metric_points"
            until(lambda: collector.number(failed, "otlp_http/gateway") == 1_000)
        gateway.rule = None
        more = made(10, "more", start=start)
        assert send(collector.http, run.bodies(more)) == [200]
        wanted = as_sent(more) if final else as_sent(more) | as_sent(batch)
        until(lambda: stored_points(gateway, "refused") == wanted, 40)
