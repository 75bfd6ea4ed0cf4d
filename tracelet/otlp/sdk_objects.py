"""Loads as the OpenTelemetry SDK's own objects, for exporters that take those: the same content as the bytes.

One thing the SDK's objects can't carry, and it is left out: the points that end a series (a data point has no flags
there). What the SDK's own encoders make of the rest is what goes out as OTLP, held by a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracelet.otlp import semconv
from tracelet.otlp.encode import EventsLoad, MetricsLoad, PointsLoad, SpansLoad
from tracelet.otlp.encode_points import wire_text
from tracelet.records import Scalar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.metrics.export import Metric, MetricsData
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext

__all__ = ["log_records", "metrics_data", "readable_spans"]

_INT64 = range(-(2**63), 2**63)


def metrics_data(load: PointsLoad | MetricsLoad) -> MetricsData | None:
    """One `NumberDataPoint` for each point, with its own time and attributes; None where nothing but ends is in it."""
    from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics

    if isinstance(load, PointsLoad):
        metrics, scope = _of_points(load), semconv.SCOPE
    else:
        metrics, scope = _of_messages(load.items), load.scope
    if not metrics:
        return None
    own = ScopeMetrics(scope=_scope(scope), metrics=metrics, schema_url="")
    resource = _resource(load.resource.attributes)
    return MetricsData([ResourceMetrics(resource=resource, scope_metrics=[own], schema_url=semconv.SCHEMA_URL)])


def readable_spans(load: SpansLoad) -> list[ReadableSpan]:
    """The load's spans, ended."""
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import Link, SpanKind, Status, StatusCode

    resource, scope = _resource(load.resource.attributes), _scope(semconv.SCOPE)
    return [
        ReadableSpan(
            name=span.name,
            context=_context(span.trace_id, span.span_id),
            parent=_context(span.trace_id, span.parent_span_id) if span.parent_span_id else None,
            resource=resource,
            attributes=_attributes(span.attributes),
            events=[Event(one.name, _attributes(one.attributes), one.time_unix_nano) for one in span.events],
            links=[
                Link(_context(one.trace_id, one.span_id, is_remote=True), _attributes(one.attributes))
                for one in span.links
            ],
            kind=SpanKind(max(0, span.kind - 1)),  # the protocol has one more in front: unspecified
            status=Status(StatusCode(span.status.code), span.status.message or None),
            start_time=span.start_time_unix_nano,
            end_time=span.end_time_unix_nano,
            instrumentation_scope=scope,
        )
        for span in load.items
    ]


def log_records(load: EventsLoad) -> list[ReadableLogRecord]:
    """The load's events."""
    from opentelemetry._logs import LogRecord, SeverityNumber
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.trace import NonRecordingSpan, set_span_in_context

    resource, scope = _resource(load.resource.attributes), _scope(semconv.SCOPE)
    return [
        ReadableLogRecord(
            log_record=LogRecord(
                timestamp=event.time_unix_nano,
                observed_timestamp=event.observed_time_unix_nano,
                context=set_span_in_context(NonRecordingSpan(_context(event.trace_id, event.span_id))),
                severity_text=event.severity_text,
                severity_number=SeverityNumber(event.severity_number),
                body=_value(event.body),
                attributes=_attributes(event.attributes),
                event_name=event.event_name,
            ),
            resource=resource,
            instrumentation_scope=scope,
        )
        for event in load.items
    ]


# ---- metrics -----------------------------------------------------------------------------------------------------


def _of_points(load: PointsLoad) -> list[Metric]:
    from opentelemetry.sdk.metrics.export import Gauge, Metric, NumberDataPoint

    points = load.points  # grouped: one name's points stand together
    found: dict[int, list[NumberDataPoint]] = {}
    columns = zip(points.time_unix_nano, points.values, points.iterations, points.metric_ids, strict=True)
    for at, (time, value, iteration, metric) in enumerate(columns):
        attributes: dict[str, Scalar] = {semconv.ITERATION: iteration}
        if at in points.dense:
            attributes[semconv.DENSE] = True
        found.setdefault(metric, []).append(NumberDataPoint(attributes, 0, time, value))
    return [Metric(wire_text(points.names[metric]), "", "", Gauge(own)) for metric, own in found.items()]


def _of_messages(items: Iterable[Any]) -> list[Metric]:
    from opentelemetry.sdk.metrics.export import AggregationTemporality, Gauge, Metric, NumberDataPoint, Sum

    found: dict[str, tuple[Any, list[NumberDataPoint]]] = {}
    for item in items:
        kind = item.WhichOneof("data")
        for point in getattr(item, kind).data_points:
            if point.flags:
                continue  # the end of a series: a value of 0 in its place would be a lie
            value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
            own = NumberDataPoint(
                _attributes(point.attributes), point.start_time_unix_nano, point.time_unix_nano, value
            )
            found.setdefault(item.name, (item, []))[1].append(own)
    metrics = []
    for name, (item, points) in found.items():
        data: Gauge | Sum = Gauge(points)
        if item.WhichOneof("data") == "sum":
            temporality = AggregationTemporality(item.sum.aggregation_temporality)
            data = Sum(points, temporality, item.sum.is_monotonic)
        metrics.append(Metric(name, item.description, item.unit, data))
    return metrics


# ---- what all three have ------------------------------------------------------------------------------------------


def _resource(attributes: Any) -> Resource:
    from opentelemetry.sdk.resources import Resource

    # The SDK drops an integer beyond int64 only when it encodes; our own encoder sends its text.
    values = {
        wire_text(key): wire_text(value) if isinstance(value, str) else _in_range(value)
        for key, value in attributes.items()
    }
    return Resource(values, semconv.SCHEMA_URL)


def _in_range(value: Any) -> Any:
    return str(value) if isinstance(value, int) and value not in _INT64 else value


def _scope(name: str) -> InstrumentationScope:
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    return InstrumentationScope(name)  # without a schema's address of its own: the Resource's holds for it


def _context(trace_id: bytes, span_id: bytes, *, is_remote: bool = False) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(
        int.from_bytes(trace_id), int.from_bytes(span_id), is_remote=is_remote, trace_flags=TraceFlags(1)
    )


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind is not None else None  # ours are scalars: see `encode.any_value`
