"""Loads: sizes, halves, and what stands in for the SDK's encoder."""

from __future__ import annotations

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tests.otlp_batches import START, opened, points
from tracelet.otlp import encode, semconv
from tracelet.otlp.encode import MetricsLoad, PointsLoad, any_value, fitting, resource_bytes
from tracelet.otlp.run_metrics import end_markers, status


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
