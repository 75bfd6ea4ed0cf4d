"""The backend `prometheus` against a real one: the same series as through the collector, and what is not sent."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.otlp_batches import points
from tests.sinks import until
from tests.stack.collectors import HOUR, MINUTE, MS, Collector, Prometheus, Sender, now_ns
from tests.stack.prometheus_server import shipped
from tracelet.backends import Prometheus as PrometheusSpec
from tracelet.destinations import to_destination
from tracelet.exporters.base import Delivered, Exporter, Rejected, RetryLater
from tracelet.exporters.otlp import OTLPExporter
from tracelet.exporters.prometheus import PrometheusExporter
from tracelet.otlp import semconv
from tracelet.records import AttemptEnded, Batch, Heartbeat, Part, PointBatch, Record, RunInfo, WriterOpened

RUN = RunInfo("run-1", "vision", "cnn", "name of run-1")


def opening(rank: int = 0) -> WriterOpened:
    return WriterOpened(now_ns(), "first", 4711, rank, "a" * 16, now_ns(), Sender(RUN.run_id, rank=rank).resource)


def batch(number: int, writer: WriterOpened, sent: PointBatch, *records: Record) -> Batch:
    return Batch(number, RUN, "/nowhere", (Part(f"{writer.rank:016d}", writer, records, sent),))


def backend(server: Prometheus, **more: Any) -> PrometheusExporter:
    destination, secrets = to_destination(PrometheusSpec(server.at, **more), {}, Path("/"))
    made = PrometheusExporter(destination["spec"], secrets, os.environ)
    assert made.open(RUN, {}) == Delivered()
    return made


def all_of(server: Prometheus) -> dict[tuple[tuple[str, str], ...], dict[int, str]]:
    """Every series of the run, labels and samples; values as text, so that NaN equals NaN.

    Without target_info, which Prometheus makes by itself, a sample for each request.
    """
    return {
        tuple(sorted(each.labels.items())): {at: repr(value) for at, value in each.values.items()}
        for each in server.samples('{tracelet_run_id="run-1",__name__!="target_info"}')
    }


def test_the_backend_and_the_collector_make_the_same_series_labels_and_samples(tmp_path: Path) -> None:
    start = now_ns(MINUTE)
    names = ["train/loss", "train.loss", "损失", "up", "🔥", "///", "a b", "9", "x" * 300, "with:colon_and__two"]
    rows = [
        (names[i % len(names)], math.nan if i == 13 else math.inf if i == 17 else i / 7, i - 5) for i in range(2000)
    ]
    first = points(rows, start=start, dense=range(700, 720))
    second = points([("old", 1.0, 1)], start=start - 150 * HOUR)
    third = points([("ahead", 1.0, 1)], start=start + 11 * MINUTE)
    with (
        shipped(tmp_path / "direct") as direct,
        shipped(tmp_path / "behind") as behind,
        Collector(tmp_path / "collector", prometheus=behind.otlp) as collector,
    ):
        spec = {"signals": ["metrics"], "endpoint": collector.http, "protocol": "http/protobuf"}
        ways: list[Exporter] = [backend(direct), OTLPExporter(spec, {}, os.environ)]
        beat = Heartbeat(now_ns(), "RUNNING", start, {"mlflow-1": "5" * 32})
        writers = [opening(0), opening(1)]
        last = start + 1999 * MS
        ended = AttemptEnded(
            "FINISHED", start, last, True, None, {}, {}, (), {"0" * 16: tuple((name, last) for name in names)}
        )
        for way in ways:
            assert way.open(RUN, {}) == Delivered()
            for number, writer in enumerate(writers):
                for more, sent in enumerate((first, second, third)):
                    assert way.begin(batch(3 * number + more, writer, sent)).attempt() == Delivered()
            way.beat(batch(9, writers[0], points([])), beat)
            assert way.begin(batch(10, writers[0], points([]), ended)).attempt() == Delivered()
            way.close()
        wanted = all_of(direct)
        count = sum(map(len, wanted.values()))
        until(lambda: sum(map(len, all_of(behind).values())) >= count, 30)
        assert all_of(behind) == wanted
        kept = [labels for labels in wanted if dict(labels)["__name__"].startswith("ml")]
        assert len(kept) == 2 * len(names)
        assert sum(len(wanted[labels]) for labels in kept) == 2 * (2000 - 20)
        assert {dict(labels)["__name__"] for labels in wanted} >= {
            "tracelet_iteration",
            "tracelet_metric_nonfinite_total",
            "tracelet_run_attempt_start_time_seconds",
            "tracelet_run_heartbeat_seconds",
            "tracelet_run_info",
            "tracelet_run_last_iteration_time_seconds",
            "tracelet_run_start_time_seconds",
            "tracelet_run_status",
        }
        assert ways[0].memory()["left_out"] == {"too_old": 2, "ahead": 2, "dense": 40}
        targets = [sorted(sorted(s.labels.items()) for s in each.samples("target_info")) for each in (direct, behind)]
        assert targets[0] == targets[1]


def test_a_name_of_3_000_characters_costs_no_point(tmp_path: Path) -> None:
    with shipped(tmp_path / "prometheus") as server:
        way = backend(server)
        names = ("x" * 3_000, "loss")
        sent = points([(names[i % 2], i / 2, i) for i in range(way.max_points)], start=now_ns(MINUTE))
        assert way.begin(batch(1, opening(), sent)).attempt() == Delivered()
        assert server.count('{tracelet_metric_key!=""}') == 2 * len(sent)


def test_a_repeat_has_no_effect_and_a_point_at_fault_costs_only_itself(tmp_path: Path) -> None:
    start = now_ns(MINUTE)
    with shipped(tmp_path / "prometheus") as server:
        way = backend(server)
        one = batch(1, opening(), points([("loss", float(i), i) for i in range(500)], start=start))
        note = dict(way.begin(one).note)
        for _ in range(2):
            assert way.begin(one, note).attempt() == Delivered()
        assert server.count("ml_loss") == server.count("tracelet_iteration") == 500
        # Another value where the newest one is stored: Prometheus refuses the whole request for it.
        bad = points([("loss", float(i), i) for i in range(500, 1000)], start=start + 500 * MS)
        bad.time_unix_nano[0] -= MS
        answer = way.begin(batch(2, opening(), bad)).attempt()
        assert isinstance(answer, Rejected)
        assert [item.facts["iteration"] for item in answer.items] == [500]
        assert "duplicate sample" in answer.items[0].reason
        assert server.count("ml_loss") == 999


def test_a_server_without_its_receiver_or_not_there_is_told_in_words_and_the_delivery_goes_on(tmp_path: Path) -> None:
    server = shipped(tmp_path / "prometheus")
    switch = server.argv.index("--web.enable-otlp-receiver")
    del server.argv[switch]
    way = backend(server)
    delivery = way.begin(batch(1, opening(), points([("loss", 1.0, 1)], start=now_ns())))
    away = delivery.attempt()
    assert isinstance(away, RetryLater)
    assert "can't be reached" in away.reason
    with server:
        closed = delivery.attempt()
        assert isinstance(closed, RetryLater)
        assert closed.loud
        assert "--web.enable-otlp-receiver" in closed.reason
    server.argv.append("--web.enable-otlp-receiver")
    with server:
        assert delivery.attempt() == Delivered()
        assert server.count("ml_loss") == 1


def test_what_is_left_out_is_counted_across_restarts_and_said_with_what_helps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with shipped(tmp_path / "prometheus") as server:
        old = points([("loss", float(i), i) for i in range(100)], start=now_ns(200 * HOUR))
        way = backend(server)
        assert way.begin(batch(1, opening(), old)).attempt() == Delivered()
        assert "100 older than 143 h" in caplog.text
        assert "tracelet export --format openmetrics run-1" in caplog.text
        again = backend(server, window_age="1h")
        assert again.open(RUN, way.memory()) == Delivered()
        two_hours = points([("loss", 1.0, 1), ("loss", 2.0, 2)], start=now_ns(2 * HOUR))
        assert again.begin(batch(2, opening(), two_hours)).attempt() == Delivered()
        assert again.memory()["left_out"] == {"too_old": 102, "ahead": 0, "dense": 0}
        assert server.count("ml_loss") == 0
        assert semconv.RUN_ID not in caplog.text
