"""What a point costs on its way to OTLP bytes: our encoder with numpy, without it, and the SDK's.

    .venv/bin/python benchmarks/encode.py

Nanoseconds of processor time a point, the best of several rounds. Grouping by name is part of ours; making the SDK's
data point objects is part of the SDK's, since its encoder takes nothing else.
"""

from __future__ import annotations

import gzip
import math
import time
from array import array
from collections.abc import Callable
from typing import Any

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
from tracelet.otlp.encode import PointsCodec, resource_bytes
from tracelet.records import PointBatch

RESOURCE = {"service.name": "vision", "service.instance.id": "instance-0", "tracelet.run.id": "run-1"}
SIZES = (100, 1_000, 10_000, 16_000)


def usual(count: int) -> PointBatch:
    """Ten metrics, logged at each iteration from 5,000 on."""
    return PointBatch(
        {i: f"metric_{i}" for i in range(10)},
        array("Q", [1_790_000_000_000_000_000 + i * 1_000_000 for i in range(count)]),
        array("d", [math.sin(i) for i in range(count)]),
        array("q", [5_000 + i // 10 for i in range(count)]),
        array("I", [i % 10 for i in range(count)]),
    )


def mixed(count: int) -> PointBatch:
    """The worst there is: every point's iteration has another width than its neighbour's, and a third are dense."""
    points = usual(count)
    wild = array("q", [(-1) ** i * (1 << (7 * (i % 9))) for i in range(count)])
    dense = frozenset(range(0, count, 3))
    return PointBatch(points.names, points.time_unix_nano, points.values, wild, points.metric_ids, dense)


def ours(codec: PointsCodec) -> Callable[[PointBatch], bytes]:
    """Grouping and encoding with one of our two encoders."""
    resource = resource_bytes(RESOURCE)
    return lambda points: resource.request(semconv.SCOPE, codec.metric_fields(codec.group(points)))


def the_sdks(points: PointBatch) -> bytes:
    """The same request from the SDK's objects by the SDK's encoder."""
    rows: dict[int, list[NumberDataPoint]] = {}
    for i, metric in enumerate(points.metric_ids):
        attributes: dict[str, Any] = {semconv.ITERATION: points.iterations[i]}
        if i in points.dense:
            attributes[semconv.DENSE] = True
        point = NumberDataPoint(attributes, 0, points.time_unix_nano[i], points.values[i])
        rows.setdefault(metric, []).append(point)
    metrics = [Metric(points.names[metric], "", "", Gauge(rows[metric])) for metric in sorted(rows)]
    scope = ScopeMetrics(InstrumentationScope(semconv.SCOPE), metrics, "")
    resource = Resource(RESOURCE, semconv.SCHEMA_URL)
    data = MetricsData([ResourceMetrics(resource, [scope], semconv.SCHEMA_URL)])
    return bytes(encode_metrics(data).SerializeToString())


def nanoseconds(encode: Callable[[PointBatch], bytes], points: PointBatch) -> float:
    """Processor time a point: the best of rounds that take half a second together."""
    best, until = math.inf, time.perf_counter() + 0.5
    while time.perf_counter() < until:
        start = time.process_time_ns()
        encode(points)
        best = min(best, (time.process_time_ns() - start) / len(points))
    return best


def main() -> None:
    """Print the table, after checking that all three make the same bytes."""
    encoders = {
        "numpy": ours(encode_points_numpy),
        "pure Python": ours(encode_points),
        "the SDK": the_sdks,
    }
    print(f"{'ns a point':24}" + "".join(f"{count:>10,}" for count in SIZES) + "   bytes a point")
    for shape in (usual, mixed):
        reference = {count: the_sdks(shape(count)) for count in SIZES}
        for name, encode in encoders.items():
            times = []
            for count in SIZES:
                points = shape(count)
                assert encode(points) == reference[count], f"{name} makes other bytes than the SDK"
                times.append(nanoseconds(encode, points))
            size = len(reference[SIZES[-1]]) / SIZES[-1]
            print(f"{shape.__name__ + ', ' + name:24}" + "".join(f"{t:>10,.0f}" for t in times) + f"   {size:.1f}")
    request = encoders["numpy"](usual(10_000))
    for level in (1, 6, 9):
        start = time.process_time_ns()
        packed = gzip.compress(request, level)
        taken = (time.process_time_ns() - start) / 10_000
        print(f"{f'gzip level {level}':24}{taken:>30,.0f}{'':10}   {len(packed) / 10_000:.1f}")


if __name__ == "__main__":
    main()
