"""Our encoding of points is the SDK's, byte for byte, with numpy and without."""

from __future__ import annotations

import math
import struct
from array import array
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import (
    Gauge,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from tracelet.otlp import encode_points, encode_points_numpy, semconv
from tracelet.otlp.encode import PointsLoad, resource_bytes
from tracelet.records import PointBatch

CODECS = pytest.mark.parametrize("codec", [encode_points, encode_points_numpy], ids=["pure", "numpy"])
RESOURCE = {"service.name": "vision", "tracelet.rank": 3, "ratio": 0.5, "flag": True}

INT64 = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 300),
    st.sampled_from([0, -1, 127, 128, 2**14, 2**21 - 1, 2**35, 2**49, 2**56, 2**63 - 1, -(2**63)]),
)
# Every bit pattern: signalling NaNs and their payloads, denormals, negative zero.
DOUBLES = st.one_of(
    st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]),
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 5e-324]),
)
TIMES = st.one_of(
    st.integers(0, 2**64 - 1), st.just(0), st.integers(1_700_000_000_000_000_000, 1_700_000_001_000_000_000)
)
NAMES = st.lists(st.text(max_size=20), min_size=1, max_size=5)


@st.composite
def point_batches(draw: st.DrawFn) -> PointBatch:
    names = dict(enumerate(draw(NAMES), draw(st.sampled_from([0, 7, 70_000]))))
    rows = draw(st.lists(st.tuples(TIMES, DOUBLES, INT64, st.sampled_from(sorted(names)), st.booleans()), max_size=60))
    if draw(st.booleans()):  # the usual shape: many points alike
        rows = rows * 20
    return PointBatch(
        names,
        array("Q", [row[0] for row in rows]),
        array("d", [row[1] for row in rows]),
        array("q", [row[2] for row in rows]),
        array("I", [row[3] for row in rows]),
        frozenset(i for i, row in enumerate(rows) if row[4]) if draw(st.booleans()) else frozenset(),
    )


def by_the_sdk(points: PointBatch) -> bytes:
    """The same points through the SDK's dataclasses and its encoder; names in the order of their ids."""
    grouped: dict[str, list[NumberDataPoint]] = {}
    for i in sorted(range(len(points)), key=lambda i: (points.metric_ids[i], i)):
        attributes: dict[str, Any] = {semconv.ITERATION: points.iterations[i]}
        if i in points.dense:
            attributes[semconv.DENSE] = True
        grouped.setdefault(points.names[points.metric_ids[i]], [])
        grouped[points.names[points.metric_ids[i]]].append(
            NumberDataPoint(
                attributes=attributes,
                start_time_unix_nano=0,
                time_unix_nano=points.time_unix_nano[i],
                value=points.values[i],
            )
        )
    # Two ids of one name: their points keep slot order within the one metric.
    metrics = [Metric(name, "", "", Gauge(rows)) for name, rows in grouped.items()]
    scope = ScopeMetrics(InstrumentationScope(semconv.SCOPE), metrics, "")
    resource = Resource(RESOURCE, semconv.SCHEMA_URL)
    data = MetricsData([ResourceMetrics(resource, [scope], semconv.SCHEMA_URL)])
    return encode_metrics(data).SerializeToString()


def distinct(points: PointBatch) -> PointBatch:
    """Names made distinct: what two ids of one name do has a test of its own."""
    names: dict[int, str] = {}
    for number, name in points.names.items():
        while name in names.values():
            name += "'"
        names[number] = name
    columns = (points.time_unix_nano, points.values, points.iterations, points.metric_ids)
    return PointBatch(names, *columns, points.dense)


@CODECS
@given(points=point_batches())
@settings(max_examples=150, deadline=None)
def test_points_are_the_sdks_bytes(codec: Any, points: PointBatch) -> None:
    points = distinct(points)
    fields = codec.metric_fields(codec.group(points))
    assert resource_bytes(RESOURCE).request(semconv.SCOPE, fields) == by_the_sdk(points)


@given(points=point_batches())
@settings(max_examples=100, deadline=None)
@example(
    PointBatch(
        {0: "a", 1: "a"}, array("Q", [1, 2, 3]), array("d", [1, 2, 3]), array("q", [1, 2, 3]), array("I", [1, 0, 1])
    )
)
def test_with_numpy_and_without_the_groups_and_bytes_are_the_same(points: PointBatch) -> None:
    pure, fast = encode_points.group(points), encode_points_numpy.group(points)
    for column in ("time_unix_nano", "iterations", "metric_ids"):
        assert getattr(pure, column) == getattr(fast, column)
    assert pure.values.tobytes() == fast.values.tobytes()
    assert pure.dense == fast.dense
    assert encode_points.metric_fields(pure) == encode_points_numpy.metric_fields(fast)


@given(points=point_batches(), at=st.integers(0, 2000))
@settings(max_examples=100, deadline=None)
def test_grouping_keeps_every_point_and_its_marks_and_each_names_order(points: PointBatch, at: int) -> None:
    def rows(batch: PointBatch) -> list[tuple[str, int, bytes, int, bool]]:
        return [
            (
                batch.names[batch.metric_ids[i]],
                batch.time_unix_nano[i],
                struct.pack("<d", batch.values[i]),
                batch.iterations[i],
                i in batch.dense,
            )
            for i in range(len(batch))
        ]

    grouped = encode_points.group(points)
    for name in set(points.names.values()):
        assert [r for r in rows(grouped) if r[0] == name] == [r for r in rows(points) if r[0] == name]
    # Halving anywhere loses nothing either.
    cut = min(at, len(grouped))
    assert rows(grouped.slice(0, cut)) + rows(grouped.slice(cut, len(grouped))) == rows(grouped)


@given(points=point_batches())
@settings(max_examples=50, deadline=None)
def test_the_bytes_read_back_as_the_points(points: PointBatch) -> None:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    load = PointsLoad.of(resource_bytes(RESOURCE), points)
    message = ExportMetricsServiceRequest.FromString(load.encode())
    (scope,) = message.resource_metrics[0].scope_metrics
    names = [metric.name for metric in scope.metrics]
    assert len(names) == len(set(names))
    read = [
        (metric.name, p.time_unix_nano, struct.pack("<d", p.as_double), p.attributes[0].value.int_value)
        for metric in scope.metrics
        for p in metric.gauge.data_points
    ]
    g = load.points
    assert read == [
        (g.names[g.metric_ids[i]], g.time_unix_nano[i], struct.pack("<d", g.values[i]), g.iterations[i])
        for i in range(len(g))
    ]
