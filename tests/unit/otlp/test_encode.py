"""Loads: sizes, halves, and what stands in for the SDK's encoder."""

from __future__ import annotations

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tests.otlp_batches import START, opened, points
from tracelet.otlp import encode, encode_points, encode_points_numpy, semconv
from tracelet.otlp.encode import MetricsLoad, PointsLoad, any_value, fitting, resource_bytes, swells
from tracelet.otlp.prometheus import SeriesLoad, Window, for_prometheus
from tracelet.otlp.run_metrics import end_markers, nonfinite, status


def test_the_resource_is_encoded_once_for_equal_ones() -> None:
    assert resource_bytes({"a": 1}) is resource_bytes({"a": 1})
    # Equal as dictionary keys, different on the wire.
    assert resource_bytes({"a": 1}).encoded != resource_bytes({"a": True}).encoded
    assert resource_bytes({"a": 1}).encoded != resource_bytes({"a": 1.0}).encoded


def test_an_integer_beyond_int64_goes_as_its_decimal_text() -> None:
    assert any_value(2**63 - 1).int_value == 2**63 - 1
    assert any_value(2**63).string_value == str(2**63)
    assert any_value(-(2**63) - 1).string_value == str(-(2**63) - 1)


def test_a_lone_surrogate_in_a_name_does_not_stop_its_request() -> None:
    load = PointsLoad.of(resource_bytes({}), points([("caf\udce9", 0.5, 1)]))
    message = ExportMetricsServiceRequest.FromString(load.encode())
    assert message.resource_metrics[0].scope_metrics[0].metrics[0].name == "caf\\udce9"


@pytest.mark.parametrize("limit", [500, 2_000, 100_000])
def test_fitting_loads_are_within_the_limit_and_complete(limit: int) -> None:
    load = PointsLoad.of(resource_bytes(opened().resource), points([(f"m{i % 3}", i, i) for i in range(500)]))
    pieces = fitting(load, limit)
    floor = max(limit, len(load.halves()[0].halves()[0].encode()) if limit < 600 else 0)
    assert all(len(data) <= floor or len(piece) == 1 for piece, data in pieces)
    assert sum(len(piece) for piece, _ in pieces) == 500


ALWAYS = Window(0, 2**63)


@pytest.mark.parametrize(
    "names", [["loss"], ["x" * 3_000], ["损失" * 1_500, "caf\udce9"], [f"m{i}" for i in range(700)]]
)
@pytest.mark.parametrize("count", [10, 3_000])
def test_what_labels_make_of_points_is_known_beforehand_and_hardly_overstated(names: list[str], count: int) -> None:
    resource = resource_bytes(opened().resource)
    load = PointsLoad.of(resource, points([(names[i % len(names)], i, i) for i in range(count)]))
    made = len(SeriesLoad(resource, load.points, "ml.").encode())
    assert made <= load.labelled_bytes() < 1.1 * made + 1_000


def test_what_labels_make_of_ends_and_counters_is_known_beforehand() -> None:
    resource = resource_bytes(opened().resource)
    for items, scope in (
        (end_markers((f"m{i}", START) for i in range(500)), semconv.SCOPE),
        (end_markers([("x" * 3_000, START), ("损失" * 1_500, START)]), semconv.SCOPE),
        ([nonfinite(f"m{i}", START, START, 1) for i in range(500)], semconv.RUN_SCOPE),
    ):
        load = MetricsLoad(resource, tuple(items), scope)
        (labelled,), _ = for_prometheus(load, "ml.", ALWAYS)
        assert len(labelled.encode()) <= load.labelled_bytes() < 2 * len(labelled.encode())


@pytest.mark.parametrize("length", [4, 60, 3_000])
def test_no_request_grows_beyond_the_smallest_queue_behind_a_collector(length: int) -> None:
    resource = resource_bytes(opened().resource)
    load = PointsLoad.of(resource, points([("x" * length, i, i) for i in range(16_000)]))
    pieces = [piece for piece, _ in fitting(load)]
    assert sum(map(len, pieces)) == 16_000
    sizes = [
        len(SeriesLoad(resource, piece.points, "ml.").encode()) for piece in pieces if isinstance(piece, PointsLoad)
    ]
    assert max(sizes) <= semconv.LABELLED_MAX_BYTES
    if length < 100:  # usual names: one request, as without a limit
        assert len(pieces) == 1
    else:
        assert min(sizes) > semconv.LABELLED_MAX_BYTES / 3


def test_ends_of_many_series_of_a_run_with_a_long_name_are_several_requests() -> None:
    resource = resource_bytes({**opened().resource, semconv.RUN_NAME: "n" * 2_000})
    load = MetricsLoad(resource, tuple(end_markers((f"m{i}", START) for i in range(10_000))), semconv.SCOPE)
    assert len(load.encode()) < semconv.REQUEST_MAX_BYTES
    pieces = [piece for piece, _ in fitting(load)]
    assert sum(map(len, pieces)) == 10_000
    for piece in pieces:
        (labelled,), _ = for_prometheus(piece, "ml.", ALWAYS)
        assert len(labelled.encode()) <= semconv.LABELLED_MAX_BYTES


def test_a_single_point_goes_out_however_much_it_grows() -> None:
    resource = resource_bytes({semconv.RUN_NAME: "n" * semconv.LABELLED_MAX_BYTES})
    assert not swells(PointsLoad.of(resource, points([("loss", 1.0, 1)])))


@pytest.mark.parametrize("codec", [encode_points, encode_points_numpy])
def test_both_encoders_count_the_points_of_a_name(codec: encode.PointsCodec) -> None:
    batch = codec.group(points([("a", 1.0, 1), ("b", 1.0, 2), ("a", 1.0, 3)]))
    assert codec.counts(batch) == ([0, 1], [2, 1])
    assert codec.counts(points([])) == ([], [])


def test_points_of_one_name_become_one_metric() -> None:
    load = MetricsLoad(resource_bytes({}), (*status(START, "RUNNING"), *end_markers([("a", 1), ("a", 5), ("b", 2)])))
    message = ExportMetricsServiceRequest.FromString(load.encode())
    metrics: list[Metric] = list(message.resource_metrics[0].scope_metrics[0].metrics)
    assert [metric.name for metric in metrics] == [semconv.RUN_STATUS, "a", "b"]
    assert [point.time_unix_nano for point in metrics[1].gauge.data_points] == [5 + 1_000_000]
    assert load.halves()[0].items + load.halves()[1].items == load.items


def test_without_numpy_the_pure_encoder_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracelet.otlp import encode_points, encode_points_numpy

    assert encode.points_codec(10_000) is encode_points_numpy
    assert encode.points_codec(10) is encode_points
    monkeypatch.setattr(encode, "_numpy_is_there", lambda: False)
    assert encode.points_codec(10_000) is encode_points
