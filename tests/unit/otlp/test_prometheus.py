"""A batch as Prometheus takes it: names, labels, companions, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tests.otlp_batches import MS, START, opened, points
from tests.sinks import attributes
from tracelet.otlp import semconv
from tracelet.otlp.encode import MetricsLoad, PointsLoad, resource_bytes
from tracelet.otlp.prometheus import LeftOut, SeriesLoad, Window, for_prometheus, kept
from tracelet.otlp.run_metrics import end_markers, nonfinite, status
from tracelet.records import PointBatch

WINDOW = Window(START - 1000 * MS, START + 10**6 * MS)
LABELS = {
    semconv.RUN_ID: "run-1",
    semconv.RUN_NAME: "bold-hawk",
    semconv.RANK: 0,
    semconv.RUN_ATTEMPT: "a" * 16,
}


def metrics_of(body: bytes) -> list[Any]:
    (resource,) = ExportMetricsServiceRequest.FromString(body).resource_metrics
    (scope,) = resource.scope_metrics
    assert {each.key for each in resource.resource.attributes} == set(opened().resource)
    return list(scope.metrics)


def load(batch: PointBatch) -> SeriesLoad:
    (one,), left_out = for_prometheus(PointsLoad.of(resource_bytes(opened().resource), batch), "ml.", WINDOW)
    assert not left_out
    assert isinstance(one, SeriesLoad)
    return one


@pytest.mark.parametrize("count", [1, 7, 8, 300])
@pytest.mark.parametrize("numpy", [True, False])
def test_each_point_is_a_sample_and_a_companion_with_the_same_labels_and_time(
    count: int, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not numpy:
        monkeypatch.setattr("tracelet.otlp.encode._numpy_is_there", lambda: False)
    rows = [(("train/loss", "损失")[i % 2], i / 4, (-1) ** i * 2**i if i < 60 else i) for i in range(count)]
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for metric in metrics_of(load(points(rows)).encode()):
        for point in metric.gauge.data_points:
            labels = attributes(point)
            key = str(labels.pop(semconv.METRIC_KEY))
            assert labels == LABELS
            assert not point.flags
            found.setdefault((metric.name, key), []).append((point.time_unix_nano, point.as_double))
    for key in {name for name, _, _ in rows}:
        mine = [(START + i * MS, row) for i, row in enumerate(rows) if row[0] == key]
        assert found.pop((f"ml.{key}", key)) == [(at, value) for at, (_, value, _) in mine]
        assert found.pop(("tracelet.iteration", key)) == [(at, float(it)) for at, (_, _, it) in mine]
    assert not found


def test_a_point_at_time_zero_is_what_the_data_model_has_for_it() -> None:
    batch = points([("loss", 1.0, 1), ("loss", 2.0, 2)], start=0)
    whole = SeriesLoad(resource_bytes(opened().resource), batch, "ml.")
    times = [[p.time_unix_nano for p in m.gauge.data_points] for m in metrics_of(whole.encode())]
    assert times == [[0, MS], [0, MS]]


def test_what_the_server_would_refuse_is_left_out_and_counted_by_its_reason() -> None:
    batch = points([("loss", float(i), i) for i in range(10)], dense=[0, 4, 5])
    left, out = kept(batch, Window(START + 2 * MS, START + 7 * MS))
    assert list(left.iterations) == [2, 3, 6, 7]
    assert not left.dense
    assert out == LeftOut(too_old=2, ahead=2, dense=2)
    none, out = kept(batch, Window(0, 1))
    assert len(none) == 0
    assert out == LeftOut(ahead=10)
    assert for_prometheus(PointsLoad.of(resource_bytes({}), batch), "ml.", Window(0, 1)) == ([], LeftOut(ahead=10))


def test_the_edges_of_the_window_are_inside() -> None:
    batch = points([("loss", 1.0, 1)])
    assert kept(batch, Window(START, START)) == (batch, LeftOut())


def test_a_full_batch_is_cut_into_requests_below_the_largest_one() -> None:
    rows = [(f"a rather long name of a metric {i % 50}", i / 8, i) for i in range(16_000)]
    loads, _ = for_prometheus(PointsLoad.of(resource_bytes(opened().resource), points(rows)), "ml.", WINDOW)
    assert sum(len(each) for each in loads) == 16_000
    sizes = [len(each.encode()) for each in loads]
    assert max(sizes) <= semconv.REQUEST_MAX_BYTES
    assert min(sizes[:-1]) > semconv.REQUEST_MAX_BYTES // 2


def test_halves_hold_all_and_name_what_was_logged() -> None:
    whole = load(points([("a", 1.0, 1), ("b", 2.0, 2), ("a", 3.0, 3)]))
    first, second = whole.halves()
    assert (len(first), len(second)) == (1, 2)
    assert [half.describe(0)[1]["name"] for half in (first, second)] == ["a", "a"]
    assert whole.describe(2) == (
        "point",
        {"name": "b", "iteration": 2, "value": 2.0, "time_unix_nano": START + MS},
    )


def test_an_end_marker_ends_both_series() -> None:
    markers = MetricsLoad(resource_bytes(opened().resource), tuple(end_markers([("x", START)])), semconv.SCOPE)
    (one,), _ = for_prometheus(markers, "ml.", WINDOW)
    found = metrics_of(one.encode())
    assert [metric.name for metric in found] == ["ml.x", "tracelet.iteration"]
    for metric in found:
        (point,) = metric.gauge.data_points
        assert (point.flags, point.time_unix_nano) == (1, START + MS)
        assert attributes(point) == {**LABELS, semconv.METRIC_KEY: "x"}


def test_what_tracelet_says_of_a_run_keeps_its_name_and_gets_the_labels() -> None:
    said = (*status(START, "RUNNING"), nonfinite("x", START, START, 3))
    (one,), _ = for_prometheus(MetricsLoad(resource_bytes(opened().resource), said), "ml.", WINDOW)
    found = metrics_of(one.encode())
    assert [metric.name for metric in found] == [semconv.RUN_STATUS, semconv.NONFINITE]
    for metric in found:
        for point in metric.gauge.data_points or metric.sum.data_points:
            assert attributes(point).items() >= LABELS.items()
    assert for_prometheus(MetricsLoad(resource_bytes({}), said), "ml.", Window(0, 1)) == ([], LeftOut())


def test_the_same_load_has_the_same_bytes_with_and_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"m{i % 3}", i / 3, i * 1000) for i in range(1500)]
    fast = load(points(rows)).encode()
    assert fast == load(points(rows)).encode()
    monkeypatch.setattr("tracelet.otlp.encode._numpy_is_there", lambda: False)
    assert load(points(rows)).encode() == fast
