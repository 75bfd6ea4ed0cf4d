"""Loads as Prometheus takes them: what the collector's transform does to the same loads, done by the sender itself.

A metric gets a prefix, its own name as an attribute, and beside it a companion gauge `tracelet.iteration` with the same
attributes and times; the iteration itself goes, since as a label it would make a series of each point. Run, rank and
attempt stand on every point, so that no setting of the server is needed to have them as labels. What the server would
refuse (too old, ahead of its clock, a second point in a millisecond) costs its whole request there: it is left out and
counted here.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tracelet.otlp import encode_points, semconv
from tracelet.otlp.encode import Load, MetricsLoad, PointsLoad, ResourceBytes, attributes, points_codec
from tracelet.otlp.encode_points import Form, field, metric_field, wire_text
from tracelet.records import PointBatch

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

__all__ = ["LeftOut", "SeriesLoad", "Window", "for_prometheus", "kept"]

_ROW_BYTES = 18  # time and value of a row; the rest are its attributes


@dataclass(frozen=True, slots=True)
class Window:
    """The times that the server takes, in ns: `oldest` and `newest` are both inside."""

    oldest: int
    newest: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Points that don't go out, by reason."""

    too_old: int = 0
    ahead: int = 0
    dense: int = 0

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(self.too_old + other.too_old, self.ahead + other.ahead, self.dense + other.dense)

    def __bool__(self) -> bool:
        return bool(self.too_old or self.ahead or self.dense)


def kept(points: PointBatch, window: Window) -> tuple[PointBatch, LeftOut]:
    """The points that the server takes, in their order, and how many it wouldn't. Cost: a look at each time."""
    if not len(points):
        return points, LeftOut()
    times = points.time_unix_nano
    if not points.dense and min(times) >= window.oldest and max(times) <= window.newest:
        return points, LeftOut()
    chosen, too_old, ahead, dense = [], 0, 0, 0
    for i, time in enumerate(times):
        # In the collector's order, so that both count a point under the same reason.
        if time < window.oldest:
            too_old += 1
        elif time > window.newest:
            ahead += 1
        elif i in points.dense:
            dense += 1
        else:
            chosen.append(i)
    left = PointBatch(
        points.names,
        array("Q", [times[i] for i in chosen]),
        array("d", [points.values[i] for i in chosen]),
        array("q", [points.iterations[i] for i in chosen]),
        array("I", [points.metric_ids[i] for i in chosen]),
    )
    return left, LeftOut(too_old, ahead, dense)


@dataclass(frozen=True, slots=True)
class SeriesLoad:
    """The user's points of one writer, grouped by name; each point is two rows, itself and its companion."""

    resource: ResourceBytes
    points: PointBatch
    prefix: str
    signal: str = "metrics"
    writer: str | None = None

    def __len__(self) -> int:
        return len(self.points)

    def encode(self) -> bytes:
        """One request: for each name a gauge, and a gauge `tracelet.iteration` for it."""
        constants = self.resource.labels
        # By the whole load: a request of many names would be made of pieces too small to be worth numpy each.
        fast = points_codec(len(self)) is not encode_points
        out = []
        for first, last in _groups(self.points):
            name = wire_text(self.points.names[self.points.metric_ids[first]])
            labels = constants + field(7, _key(name).SerializeToString())
            piece = self.points.slice(first, last)
            iterations = array("d", piece.iterations)
            out.append(metric_field(self.prefix + name, _rows(piece, piece.values, labels, fast)))
            out.append(metric_field(semconv.ITERATION, _rows(piece, iterations, labels, fast)))
        return self.resource.request(semconv.SCOPE, b"".join(out))

    def halves(self) -> tuple[SeriesLoad, SeriesLoad]:
        """Both halves, each still grouped by name."""
        middle = len(self) // 2
        return self._slice(0, middle), self._slice(middle, len(self))

    def describe(self, index: int) -> tuple[str, dict[str, Any]]:
        """Name, iteration, value and time of one point, as they were logged."""
        return PointsLoad(self.resource, self.points).describe(index)

    def requests(self) -> Iterator[SeriesLoad]:
        """This load in pieces, each below the largest request; found by counting, as encoding twice costs more."""
        constants = len(self.resource.labels)
        names, (used, _) = self.points.names, points_codec(len(self)).counts(self.points)
        longest = max((len(wire_text(names[name]).encode()) for name in used), default=0)
        row = _ROW_BYTES + constants + longest + len(semconv.METRIC_KEY) + 20
        size = max(1, semconv.REQUEST_MAX_BYTES // (2 * row))
        for first in range(0, len(self), size):
            yield self._slice(first, min(first + size, len(self)))

    def labelled_bytes(self) -> int:
        """None: it has its labels, and goes through no collector."""
        return 0

    def _slice(self, first: int, last: int) -> SeriesLoad:
        return replace(self, points=self.points.slice(first, last))


def for_prometheus(load: Load, prefix: str, window: Window) -> tuple[list[Load], LeftOut]:
    """What to send in place of a load of the metrics signal, and which of the user's points are not in it.

    The same load with the same window gives the same bytes.
    """
    if isinstance(load, PointsLoad):
        points, left_out = kept(load.points, window)
        whole = SeriesLoad(load.resource, points, prefix, writer=load.writer)
        return list(whole.requests()), left_out
    assert isinstance(load, MetricsLoad)
    items: list[Metric] = []
    for metric in load.items:
        items.extend(_translated(metric, load, prefix, window))
    return [replace(load, items=tuple(items))] if items else [], LeftOut()


def _translated(metric: Metric, load: MetricsLoad, prefix: str, window: Window) -> Iterator[Metric]:
    """A metric of one data point: tracelet's own about the run, or the end of one of the user's series."""
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as NewMetric

    new = NewMetric()
    new.CopyFrom(metric)
    (point,) = new.gauge.data_points or new.sum.data_points
    if not window.oldest <= point.time_unix_nano <= window.newest:
        return
    own = load.resource.label_attributes()
    if load.scope == semconv.SCOPE:
        own.append(_key(metric.name))
    ours = {each.key for each in own}
    others = [each for each in point.attributes if each.key not in ours]
    del point.attributes[:]
    point.attributes.extend((*others, *own))
    if load.scope != semconv.SCOPE:
        yield new
        return
    new.name = prefix + metric.name
    yield new
    companion = NewMetric()
    companion.CopyFrom(new)
    companion.name = semconv.ITERATION
    yield companion


def _key(name: str) -> KeyValue:
    (key,) = attributes({semconv.METRIC_KEY: name})
    return key


def _groups(points: PointBatch) -> Iterator[tuple[int, int]]:
    ids, start = points.metric_ids, 0
    while start < len(ids):
        end = bisect_right(ids, ids[start], start)
        yield start, end
        start = end


def _rows(points: PointBatch, values: array[float], labels: bytes, fast: bool) -> bytes | bytearray:
    times = points.time_unix_nano
    if 0 in times:  # proto3 leaves a zero out: rows of another form
        zero = [i for i, time in enumerate(times) if time == 0]
        return b"".join(
            encode_points.bulk(Form(0, False, i in zero, labels), times[i : i + 1], values[i : i + 1], array("q", [0]))
            for i in range(len(times))
        )
    form = Form(0, False, False, labels)
    if not fast:
        return encode_points.bulk(form, times, values, points.iterations)
    import numpy as np

    from tracelet.otlp import encode_points_numpy

    return encode_points_numpy.bulk(
        form, np.frombuffer(times, np.uint64), np.frombuffer(values, np.float64), np.zeros(0, np.uint64)
    )
