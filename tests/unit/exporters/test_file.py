"""The file exporter: lines a collector reads back, each once, whatever happens in between."""

from __future__ import annotations

import fcntl
import json
import math
import os
import resource
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tests.otlp_batches import MS, RUN, START, batch, opened
from tracelet.exporters.base import Delivered, RetryLater
from tracelet.exporters.file import FileExporter
from tracelet.otlp import semconv
from tracelet.records import Heartbeat, ParamsLogged, SpanEnded, SpanStarted


def exporter(path: Path) -> FileExporter:
    made = FileExporter({"path": str(path)}, {}, {})
    assert made.open(RUN, {}) == Delivered()
    return made


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


RECORDS = [
    ParamsLogged(START, {"lr": 0.1, "depth": 3, "note": 'say "hé"'}),
    SpanStarted("1" * 16, "2" * 16, "epoch", START),
    SpanEnded("1" * 16, START + MS),
]


def test_lines_are_otlp_json_as_the_specification_has_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    made = exporter(path)
    rows = [("loss", 0.5, -(2**63)), ("loss", math.nan, 2**63 - 1), ("a/é", math.inf, 0), ("a/é", -math.inf, 1)]
    assert made.begin(batch(rows, RECORDS)).attempt() == Delivered()
    metrics, counters, logs, traces = lines(path)
    (resource_metrics,) = metrics["resourceMetrics"]
    scope = resource_metrics["scopeMetrics"][0]
    assert scope["scope"] == {"name": "tracelet"}
    assert [metric["name"] for metric in scope["metrics"]] == ["loss", "a/é"]
    first, second = scope["metrics"][0]["gauge"]["dataPoints"]
    assert first == {
        "timeUnixNano": str(START),
        "asDouble": 0.5,
        "attributes": [{"key": "tracelet.iteration", "value": {"intValue": str(-(2**63))}}],
    }
    assert second["asDouble"] == "NaN"
    assert [p["asDouble"] for p in scope["metrics"][1]["gauge"]["dataPoints"]] == ["Infinity", "-Infinity"]
    assert counters["resourceMetrics"][0]["scopeMetrics"][0]["metrics"][0]["sum"]["aggregationTemporality"] == 2
    record = logs["resourceLogs"][0]["scopeLogs"][0]["logRecords"][0]
    assert record["eventName"] == "tracelet.params"
    assert len(record["traceId"]) == 32
    assert int(record["traceId"], 16)
    (span,) = traces["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert (span["spanId"], span["parentSpanId"], span["kind"]) == ("1" * 16, "2" * 16, 1)


def test_a_line_of_points_is_the_same_message_as_the_protobuf(tmp_path: Path) -> None:
    from tracelet.otlp.encode import PointsLoad, resource_bytes
    from tracelet.otlp.encode_json import json_line

    part = batch([("loss", 0.1, 7), ("acc", 1e300, -1), ("loss", -0.0, 8)]).parts[0]
    load = PointsLoad.of(resource_bytes(part.opened.resource), part.points)
    parsed = ParseDict(json.loads(json_line(load)), ExportMetricsServiceRequest())
    assert parsed == ExportMetricsServiceRequest.FromString(load.encode())


def test_no_line_is_longer_than_the_receiver_reads(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    exporter(path).begin(batch([(f"m{i % 5}", i / 7, i) for i in range(16_000)])).attempt()
    texts = path.read_bytes().splitlines()
    assert len(texts) > 1
    assert max(map(len, texts)) <= 900_000
    count = sum(
        len(metric["gauge"]["dataPoints"])
        for line in lines(path)
        for metric in line["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    )
    assert count == 16_000


def test_no_line_grows_beyond_the_smallest_queue_of_the_collector_that_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert exporter(path).begin(batch([("x" * 3_000, 0.5, i) for i in range(5_000)])).attempt() == Delivered()
    counts = [
        len(metric["gauge"]["dataPoints"])
        for line in lines(path)
        for metric in line["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    ]
    assert sum(counts) == 5_000
    assert max(counts) * 2 * 3_000 < semconv.LABELLED_MAX_BYTES  # the name alone, at a point and its companion
    assert path.stat().st_size < semconv.REQUEST_MAX_BYTES  # which as lines would have been one


def test_a_repeat_writes_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    exporter(path).begin(batch([("before", 1.0, 1)])).attempt()
    one = batch([("loss", 0.5, 1), ("loss", math.nan, 2)], RECORDS, number=2)
    made = exporter(path)
    delivery = made.begin(one)
    delivery.attempt()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    # Cut anywhere: between lines, in a line, at nothing written; a repeat always ends at the same file.
    for cut in [delivery.note["offset"], *ends[1:], ends[0] + 1, ends[0] + 500, len(whole) - 1, len(whole) - 2]:
        path.write_bytes(whole[:cut])
        assert exporter(path).begin(one, delivery.note).attempt() == Delivered()
        assert path.read_bytes() == whole


def test_a_repeat_leaves_another_runs_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    mine = batch([("loss", 0.5, 1)], RECORDS)
    delivery = exporter(path).begin(mine)
    delivery.attempt()
    other = batch([("loss", 0.5, 1)], opening=opened(instance="another"))
    exporter(path).begin(other).attempt()
    whole = path.read_bytes()
    exporter(path).begin(mine, delivery.note).attempt()
    assert path.read_bytes() == whole


def test_a_line_that_is_not_ours_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"notes without a newline")
    exporter(path).begin(batch([("loss", 0.5, 1)])).attempt()
    assert path.read_bytes().startswith(b'notes without a newline\n{"resource')


def test_another_writer_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    delivery = exporter(path).begin(batch([("loss", 0.5, 1)]))
    with path.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert delivery.attempt() == RetryLater("another run is writing to the file", 0.1)
    assert delivery.attempt() == Delivered()


def test_a_full_disk_leaves_no_half_line_and_is_tried_later(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    made = exporter(path)
    made.begin(batch([("loss", 0.5, 1)])).attempt()
    before = path.read_bytes()
    delivery = made.begin(batch([("loss", i / 7, i) for i in range(1000)], number=2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))
    try:
        answer = delivery.attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert path.read_bytes() == before
    assert delivery.attempt() == Delivered()
    assert len(lines(path)) == 2


def test_a_folder_that_can_not_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    made = FileExporter({"path": str(tmp_path / "taken" / "out.jsonl")}, {}, {})
    answer = made.open(RUN, {})
    assert isinstance(answer, RetryLater)
    assert answer.loud


def test_a_heartbeat_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    made = exporter(path)
    made.beat(batch(), Heartbeat(START, "RUNNING", None, {}))
    assert "tracelet.run.status" in path.read_text()
    assert made.memory()["link"] == path.as_uri()
    assert os.listdir(tmp_path) == ["out.jsonl"]
