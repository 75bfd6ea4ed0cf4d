"""The user's data points read back, as columns."""

from __future__ import annotations

from array import array
from typing import Any

from tracelet.otlp import semconv
from tracelet.otlp.decode_resource import Tally
from tracelet.otlp.decode_rows import rows_of
from tracelet.records import PointBatch

__all__ = ["Columns", "count_points"]

_NO_RECORDED_VALUE = 1
_OVERFLOW = "otel.metric.overflow"  # the SDK's one point for all sets of attributes beyond its limit: nobody's value
_KINDS = ("gauge", "sum", "histogram", "exponential_histogram", "summary")


def count_points(metric: Any) -> int:
    """How many data points a Metric holds, of whatever kind."""
    kind = metric.WhichOneof("data")
    return len(getattr(metric, kind).data_points) if kind in _KINDS else 0


class Columns:
    """Collects the points of one Resource; `batch` makes a PointBatch of them."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._times = array("Q")
        self._values = array("d")
        self._iterations = array("q")
        self._metrics = array("I")
        self._dense: list[int] = []

    def add(self, metric: Any, tally: Tally) -> None:
        """The points of a Metric of scope `tracelet`; what is no gauge of numbers, or has no name, is foreign."""
        if metric.WhichOneof("data") != "gauge":
            tally.add_foreign("metric that is no gauge", count_points(metric))
            return
        points = metric.gauge.data_points
        if not metric.name or metric.name.startswith("tracelet."):
            tally.add_foreign("metric's name that is nobody's", len(points))
            return
        start = len(self._values)
        rows = rows_of(metric.gauge, len(points))
        if rows is not None:
            self._times += rows[0]
            self._values += rows[1]
            self._iterations += rows[2]
        else:
            self._one_by_one(points, tally)
        added = len(self._values) - start
        if added:
            name = self._ids.setdefault(metric.name, len(self._ids))
            self._metrics += array("I", (name,)) * added

    def _one_by_one(self, points: Any, tally: Tally) -> None:
        times, values, iterations = self._times, self._values, self._iterations
        for point in points:
            if point.flags & _NO_RECORDED_VALUE:
                continue
            value = point.as_double
            if value == 0.0:  # a double of zero, an integer, or nothing
                kind = point.WhichOneof("value")
                if kind is None:
                    tally.add_foreign("point without a value")
                    continue
                if kind == "as_int":
                    value = float(point.as_int)
            iteration, dense, fault = 0, False, "iteration that is no integer"
            for attribute in point.attributes:
                key = attribute.key
                if key == semconv.ITERATION:
                    number = attribute.value
                    iteration = number.int_value
                    if not iteration and number.WhichOneof("value") != "int_value":
                        break
                elif key == semconv.DENSE:
                    dense = attribute.value.bool_value
                elif key == _OVERFLOW:
                    fault = "the SDK's overflow"
                    break
            else:
                if dense:
                    self._dense.append(len(values))
                times.append(point.time_unix_nano)
                values.append(value)
                iterations.append(iteration)
                continue
            tally.add_foreign(fault)

    def first(self) -> int:
        """The earliest time there is, 0 without any."""
        return min(filter(None, self._times), default=0)

    def batch(self) -> PointBatch | None:
        """All points in the order they came, None if there are none."""
        if not self._values:
            return None
        names = {number: name for name, number in self._ids.items()}
        return PointBatch(names, self._times, self._values, self._iterations, self._metrics, frozenset(self._dense))
