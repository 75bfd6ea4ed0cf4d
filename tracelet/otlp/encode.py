"""Loads: what goes to an OTLP destination in one request each, able to become bytes and to be halved.

A load holds one signal of one Resource. Points keep their columns until the bytes are asked for; everything else
(log events, spans, the run's own gauges) is few, and is kept as protobuf messages. Bytes are made anew at each
attempt, which is cheaper than keeping them and always gives the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from tracelet.otlp import encode_points, semconv
from tracelet.otlp.encode_points import field, varint, wire_text
from tracelet.otlp.message_json import message_dict, message_of
from tracelet.records import PointBatch, Scalar

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = [
    "SIGNALS",
    "EventsLoad",
    "Load",
    "MetricsLoad",
    "PointsLoad",
    "SpansLoad",
    "any_value",
    "attributes",
    "fitting",
    "loads_of",
    "of_writer",
    "points_codec",
    "resource_bytes",
    "swells",
]

SIGNALS = ("metrics", "traces", "logs")
_INT64 = range(-(2**63), 2**63)
_LABELLED_ROW = 22  # of a row in Prometheus' branch: its head, time and value; the rest are its attributes
_LABELLED_KEY = len(semconv.METRIC_KEY) + 18  # of an attribute with the metric's name, beside the name itself
_LABELLED_METRIC = 64  # of a metric and its companion, beside the name and the rows
_LABELLED_REQUEST = 128  # of a request, beside the Resource and the metrics
_NUMPY_POINTS = 256  # below it numpy's fixed costs (and its import) are not worth it


class PointsCodec(Protocol):
    """What `encode_points` and `encode_points_numpy` both have."""

    def group(self, points: PointBatch, /) -> PointBatch:
        """The same points by name, each name's in their old order."""
        ...

    def counts(self, points: PointBatch, /) -> tuple[list[int], list[int]]:
        """The ids of grouped points, and how many points each has."""
        ...

    def metric_fields(self, points: PointBatch, /) -> bytes:
        """The repeated field ScopeMetrics.metrics of grouped points."""
        ...


def points_codec(count: int) -> PointsCodec:
    """The module to encode `count` points with: numpy's where it is installed and worth it, else the pure one."""
    if count >= _NUMPY_POINTS and _numpy_is_there():
        from tracelet.otlp import encode_points_numpy

        return encode_points_numpy
    return encode_points


@functools.cache
def _numpy_is_there() -> bool:
    try:
        import numpy  # noqa: F401
    except ImportError:
        return False
    return True


class Load(Protocol):
    """What goes out in one request."""

    @property
    def signal(self) -> str:
        """One of `SIGNALS`."""
        ...

    @property
    def writer(self) -> str | None:
        """Whose it is: the id of its part in the batch. Not on the wire; for what is told of a refusal."""
        ...

    def __len__(self) -> int:
        """How many items: points, events, or spans."""
        ...

    def encode(self) -> bytes:
        """The Export...ServiceRequest, uncompressed; the same bytes every time."""
        ...

    def labelled_bytes(self) -> int:
        """At most so many bytes a collector makes of it for Prometheus: labels on each point, a companion for each."""
        ...

    def halves(self) -> tuple[Load, Load]:
        """The first and the second half of its items, for a load of at least two."""
        ...

    def describe(self, index: int) -> tuple[str, dict[str, Any]]:
        """What item `index` is ("point", "event", "span") and enough of it (JSON) to send it again."""
        ...


def any_value(value: Scalar) -> AnyValue:
    """`value` as an OTLP AnyValue; an integer beyond int64, which OTLP lacks, as its decimal text."""
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue

    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value) if value in _INT64 else AnyValue(string_value=str(value))
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(string_value=wire_text(str(value)))


def attributes(values: Mapping[str, Scalar]) -> list[KeyValue]:
    """`values` as OTLP attributes, in their order."""
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue

    return [KeyValue(key=wire_text(key), value=any_value(value)) for key, value in values.items()]


class ResourceBytes:
    """One Resource, encoded once: all loads of a writer share it."""

    __slots__ = ("attributes", "encoded", "labels")

    def __init__(self, resource: Mapping[str, Scalar]) -> None:
        from opentelemetry.proto.resource.v1.resource_pb2 import Resource

        self.attributes = dict(resource)
        self.encoded = field(1, Resource(attributes=attributes(resource)).SerializeToString())
        # As attributes of a data point, those that Prometheus has on every one.
        self.labels = b"".join(field(7, each.SerializeToString()) for each in self.label_attributes())

    def label_attributes(self) -> list[KeyValue]:
        """What Prometheus has of this Resource on every point."""
        return attributes({name: self.attributes[name] for name in semconv.LABELS if name in self.attributes})

    def request(self, scope: str, items: bytes) -> bytes:
        """An Export...ServiceRequest: the three signals number their fields alike, down to the items (2)."""
        named = field(1, field(1, scope.encode()))
        schema = field(3, semconv.SCHEMA_URL.encode())
        inside = b"\x12" + varint(len(named) + len(items))  # scope_metrics (_spans, _logs) = 2
        length = len(self.encoded) + len(inside) + len(named) + len(items) + len(schema)
        # One join: nested fields would copy a megabyte four times.
        return b"".join((b"\x0a", varint(length), self.encoded, inside, named, items, schema))


@dataclass(frozen=True, slots=True)
class PointsLoad:
    """The user's metric values of one writer, grouped by name."""

    resource: ResourceBytes
    points: PointBatch
    signal: str = "metrics"
    writer: str | None = None

    @classmethod
    def of(cls, resource: ResourceBytes, points: PointBatch) -> PointsLoad:
        """A load of `points` as they come from the shipper."""
        return cls(resource, points_codec(len(points)).group(points))

    def __len__(self) -> int:
        return len(self.points)

    def encode(self) -> bytes:
        """One request, one `Metric` for each name."""
        return self.resource.request(semconv.SCOPE, points_codec(len(self.points)).metric_fields(self.points))

    def labelled_bytes(self) -> int:
        """Found by counting: the names are few beside the points."""
        names, total = self.points.names, len(self.resource.encoded) + _LABELLED_REQUEST
        row = _LABELLED_ROW + _LABELLED_KEY + len(self.resource.labels)
        for identity, count in zip(*points_codec(len(self.points)).counts(self.points), strict=True):
            name = len(wire_text(names[identity]).encode())
            total += 2 * count * (row + name) + name + _LABELLED_METRIC
        return total

    def halves(self) -> tuple[PointsLoad, PointsLoad]:
        """Both halves, each still grouped by name."""
        middle = len(self.points) // 2
        return (
            replace(self, points=self.points.slice(0, middle)),
            replace(self, points=self.points.slice(middle, len(self.points))),
        )

    def describe(self, index: int) -> tuple[str, dict[str, Any]]:
        """Name, iteration, value and time of one point, and whether it is dense."""
        points = self.points
        value = points.values[index]
        facts = {
            "name": points.names[points.metric_ids[index]],
            "iteration": points.iterations[index],
            # JSON has no word for NaN and infinities.
            "value": value if value - value == 0 else str(value),
            "time_unix_nano": points.time_unix_nano[index],
        }
        return "point", {**facts, "dense": True} if index in points.dense else facts


@dataclass(frozen=True, slots=True)
class _MessagesLoad:
    """Protobuf messages of one signal, Resource and scope."""

    resource: ResourceBytes
    items: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.items)

    def labelled_bytes(self) -> int:
        """None: Prometheus has metrics alone."""
        return 0

    def _encoded(self, scope: str) -> bytes:
        return self.resource.request(scope, b"".join(field(2, item.SerializeToString()) for item in self.items))

    def _told(self, signal: str, scope: str, index: int) -> dict[str, Any]:
        """A message whole, with what it takes to make a request of it again."""
        return {"signal": signal, "scope": scope, "message": message_dict(self.items[index])}


@dataclass(frozen=True, slots=True)
class MetricsLoad(_MessagesLoad):
    """Points of scope `tracelet.run`, or end markers of the user's series: `Metric`s of one data point each."""

    items: tuple[Metric, ...]
    scope: str = semconv.RUN_SCOPE
    signal: str = "metrics"
    writer: str | None = None

    def encode(self) -> bytes:
        """One request; points of one name become one `Metric`, as the data model asks."""
        from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

        merged: dict[str, Metric] = {}
        for item in self.items:
            metric = merged.get(item.name)
            if metric is None:
                metric = merged[item.name] = Metric()
                metric.CopyFrom(item)
            else:
                metric.MergeFrom(item)  # repeated fields are appended
        return _MessagesLoad(self.resource, tuple(merged.values()))._encoded(self.scope)

    def labelled_bytes(self) -> int:
        """What is about the run has labels; the end of a series has its name as one, too, and a companion."""
        request = len(self.resource.encoded) + _LABELLED_REQUEST
        labels = len(self.resource.labels) + _LABELLED_METRIC
        if self.scope != semconv.SCOPE:
            return request + sum(item.ByteSize() + labels for item in self.items)
        return request + sum(2 * (2 * item.ByteSize() + labels + _LABELLED_KEY) for item in self.items)

    def halves(self) -> tuple[MetricsLoad, MetricsLoad]:
        """Both halves."""
        middle = len(self.items) // 2
        return (
            replace(self, items=self.items[:middle]),
            replace(self, items=self.items[middle:]),
        )

    def describe(self, index: int) -> tuple[str, dict[str, Any]]:
        """The metric with its one point."""
        return "point", self._told(self.signal, self.scope, index)


@dataclass(frozen=True, slots=True)
class EventsLoad(_MessagesLoad):
    """Log events."""

    items: tuple[LogRecord, ...]
    signal: str = "logs"
    writer: str | None = None

    def encode(self) -> bytes:
        """One ExportLogsServiceRequest."""
        return self._encoded(semconv.SCOPE)

    def halves(self) -> tuple[EventsLoad, EventsLoad]:
        """Both halves."""
        middle = len(self.items) // 2
        return replace(self, items=self.items[:middle]), replace(self, items=self.items[middle:])

    def describe(self, index: int) -> tuple[str, dict[str, Any]]:
        """The event whole."""
        return "event", self._told(self.signal, semconv.SCOPE, index)


@dataclass(frozen=True, slots=True)
class SpansLoad(_MessagesLoad):
    """Ended spans."""

    items: tuple[Span, ...]
    signal: str = "traces"
    writer: str | None = None

    def encode(self) -> bytes:
        """One ExportTraceServiceRequest."""
        return self._encoded(semconv.SCOPE)

    def halves(self) -> tuple[SpansLoad, SpansLoad]:
        """Both halves."""
        middle = len(self.items) // 2
        return replace(self, items=self.items[:middle]), replace(self, items=self.items[middle:])

    def describe(self, index: int) -> tuple[str, dict[str, Any]]:
        """The span whole."""
        return "span", self._told(self.signal, semconv.SCOPE, index)


def loads_of(resource: ResourceBytes, told: Iterable[Mapping[str, Any]]) -> list[Load]:
    """Loads of single messages, from what `describe` told of them: those that can go in one request are in one.

    Raises:
        ValueError: one is no message of these signals.
    """
    loads: dict[tuple[Any, Any], Any] = {}
    for facts in told:
        one: Any = _load_of(resource, facts)
        kind = (facts.get("signal"), facts.get("scope"))
        before = loads.get(kind)
        loads[kind] = one if before is None else replace(before, items=before.items + one.items)
    return list(loads.values())


def _load_of(resource: ResourceBytes, facts: Mapping[str, Any]) -> Load:
    from google.protobuf.json_format import ParseError
    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    try:
        match facts.get("signal"):
            case "metrics":
                return MetricsLoad(resource, (message_of(facts["message"], Metric()),), str(facts["scope"]))
            case "logs":
                return EventsLoad(resource, (message_of(facts["message"], LogRecord()),))
            case "traces":
                return SpansLoad(resource, (message_of(facts["message"], Span()),))
    except (ParseError, KeyError, TypeError) as error:
        raise ValueError(f"it can't be read: {error}") from error
    raise ValueError(f"it is of no signal that OTLP has: {facts.get('signal')!r}")


def of_writer(load: Load, writer: str) -> Load:
    """The same load, which says whose it is."""
    return replace(load, writer=writer)  # type: ignore[type-var]


def swells(load: Load) -> bool:
    """Whether a load has to be halved whatever it has now, for what a collector would make of it for Prometheus."""
    return len(load) > 1 and load.labelled_bytes() > semconv.LABELLED_MAX_BYTES


def fitting(load: Load, max_bytes: int = semconv.REQUEST_MAX_BYTES) -> Sequence[tuple[Load, bytes]]:
    """`load` and its bytes, halved as often as it takes for each request to have at most `max_bytes`, and not to swell.

    A single item that is larger still goes out alone: whether it passes is the destination's to say.
    """
    if not swells(load):
        encoded = load.encode()
        if len(encoded) <= max_bytes or len(load) < 2:
            return ((load, encoded),)
    first, second = load.halves()
    return (*fitting(first, max_bytes), *fitting(second, max_bytes))


@functools.lru_cache(maxsize=256)
def _resource(key: tuple[tuple[str, Scalar, str], ...]) -> ResourceBytes:
    return ResourceBytes({name: value for name, value, _ in key})


def resource_bytes(resource: Mapping[str, Scalar]) -> ResourceBytes:
    """The encoded Resource, made once for equal ones."""
    # 1, 1.0 and True are equal as dictionary keys and different on the wire.
    return _resource(tuple((name, value, type(value).__name__) for name, value in resource.items()))
