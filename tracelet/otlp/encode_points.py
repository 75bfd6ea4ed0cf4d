"""Points to OTLP bytes in bulk: grouped by name, and each run of like rows made by strided copies, without numpy.

A point is the same few bytes each time, but for its time, value and the varint of its iteration. So rows of one
*form* (varint width, dense or not, time zero or not) are a template repeated, with the varying bytes laid over it
column by column. `encode_points_numpy` does the same with numpy; both give the bytes the SDK's encoder gives
(canonical varints, fields in ascending order, zero time left out as proto3 does), held by a property test.
"""

from __future__ import annotations

import functools
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter

from tracelet.otlp import semconv
from tracelet.records import PointBatch

__all__ = [
    "Form",
    "bulk",
    "canonical_ids",
    "counts",
    "field",
    "group",
    "lanes",
    "metric_field",
    "metric_fields",
    "template",
    "varint",
    "wire_text",
]

_BULK_ROWS = 8  # from here on strided copies beat a struct call a row


def wire_text(text: str) -> str:
    """`text` as protobuf can carry it: lone surrogates (from file names and argv) written as `\\udcxx`."""
    return text.encode("utf-8", "backslashreplace").decode()


def varint(number: int) -> bytes:
    """The canonical varint of a non-negative number."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


class Form:
    """The shape of a data point's row: everything but time, value and iteration.

    `time_at` is None for a point at time zero, which proto3 leaves out; a `width` of 0 is a point without an
    iteration. `constants` are attributes that all rows have, encoded: each a field 7 of the data point.
    """

    __slots__ = ("size", "template", "time_at", "value_at", "varint_at", "width")

    def __init__(self, width: int, dense: bool, timeless: bool, constants: bytes = b"") -> None:
        key = semconv.ITERATION.encode()
        point = b"" if timeless else b"\x19" + bytes(8)  # time_unix_nano = 3, fixed64
        value_in_point = len(point) + 1
        point += b"\x21" + bytes(8)  # as_double = 4
        if width:
            any_value = b"\x18" + bytes(width)  # AnyValue.int_value = 3
            attribute = field(1, key) + field(2, any_value)
            point += field(7, attribute)  # attributes = 7
        varint_in_point = len(point) - width
        if dense:
            point += field(7, field(1, semconv.DENSE.encode()) + field(2, b"\x10\x01"))  # AnyValue.bool_value = 2
        point += constants
        self.template = field(1, point)  # Gauge.data_points = 1
        start = len(self.template) - len(point)
        self.size = len(self.template)
        self.width = width
        self.time_at = None if timeless else start + 1
        self.value_at = start + value_in_point
        self.varint_at = start + varint_in_point


@functools.cache
def template(width: int, dense: bool, timeless: bool) -> Form:
    """The form of rows whose iteration takes `width` varint bytes; there are forty at most."""
    return Form(width, dense, timeless)


def metric_field(name: str, rows: bytes | bytearray | memoryview) -> bytes:
    """ScopeMetrics.metrics = 2: a gauge of this name with these data points, no unit and no description."""
    gauge = varint(5 << 3 | 2) + varint(len(rows))
    label = field(1, wire_text(name).encode()) if name else b""  # proto3 leaves an empty text out
    return b"".join((b"\x12", varint(len(label) + len(gauge) + len(rows)), label, gauge, rows))


def canonical_ids(used: Iterable[int], names: Mapping[int, str]) -> dict[int, int]:
    """Which ids have to be replaced so that one name has one id; empty where each name has one already."""
    first: dict[str, int] = {}
    return {i: first[name] for i in sorted(used) if first.setdefault(name := wire_text(names[i]), i) != i}


def group(points: PointBatch) -> PointBatch:
    """The same points by name, each name's in their old order: one metric a name, as the data model asks."""
    ids = points.metric_ids
    used = set(ids)
    replaced = canonical_ids(used, points.names)
    if replaced:
        ids = array("I", [replaced.get(i, i) for i in ids])
    if len(used) - len(replaced) <= 1:
        order: list[int] | None = None
    else:
        order = sorted(range(len(ids)), key=ids.__getitem__)
    if order is None:
        return PointBatch(points.names, points.time_unix_nano, points.values, points.iterations, ids, points.dense)
    take = itemgetter(*order)
    return PointBatch(
        points.names,
        array("Q", take(points.time_unix_nano)),
        array("d", take(points.values)),
        array("q", take(points.iterations)),
        array("I", take(ids)),
        frozenset(new for new, old in enumerate(order) if old in points.dense) if points.dense else frozenset(),
    )


def counts(points: PointBatch) -> tuple[list[int], list[int]]:
    """The ids of `points`, which must come from `group`, and how many points each has."""
    ids, start = points.metric_ids, 0
    found: list[int] = []
    many: list[int] = []
    while start < len(ids):
        end = bisect_right(ids, ids[start], start)
        found.append(ids[start])
        many.append(end - start)
        start = end
    return found, many


def metric_fields(points: PointBatch) -> bytes:
    """The repeated field ScopeMetrics.metrics of `points`, which must come from `group`."""
    out: list[bytes] = []
    ids, start = points.metric_ids, 0
    while start < len(ids):
        end = bisect_right(ids, ids[start], start)
        out.append(metric_field(points.names[ids[start]], b"".join(_rows(points, start, end))))
        start = end
    return b"".join(out)


def _rows(points: PointBatch, start: int, end: int) -> Iterator[bytes | bytearray]:
    times = points.time_unix_nano[start:end]
    values = points.values[start:end]
    iterations = points.iterations[start:end]
    low, high = min(iterations), max(iterations)
    dense = any(start <= i < end for i in points.dense)
    same_width = _width(low) == _width(high) and (low >= 0 or high < 0)
    if end - start >= _BULK_ROWS and same_width and not dense and 0 not in times:
        yield bulk(template(_width(low), False, False), times, values, iterations)
        return

    def form_at(i: int) -> Form:
        return template(_width(iterations[i]), start + i in points.dense, times[i] == 0)

    for form, run in groupby(range(end - start), key=form_at):
        indices = list(run)
        first, last = indices[0], indices[-1] + 1
        if len(indices) >= _BULK_ROWS:
            yield bulk(form, times[first:last], values[first:last], iterations[first:last])
        else:
            yield from (_one(form, times[i], values[i], iterations[i]) for i in indices)


def _width(iteration: int) -> int:
    # int64 goes out as its two's complement: ten bytes for every negative number.
    return 10 if iteration < 0 else (iteration.bit_length() + 6) // 7 or 1


def _one(form: Form, time: int, value: float, iteration: int) -> bytearray:
    row = bytearray(form.template)
    if form.time_at is not None:
        struct.pack_into("<Q", row, form.time_at, time)
    struct.pack_into("<d", row, form.value_at, value)
    row[form.varint_at : form.varint_at + form.width] = varint(iteration & 0xFFFF_FFFF_FFFF_FFFF)
    return row


def bulk(form: Form, times: array[int], values: array[float], iterations: array[int]) -> bytearray:
    """The rows of one form, one after another."""
    count, size = len(times), form.size
    rows = bytearray(form.template * count)
    columns = [(form.value_at, values.tobytes())]
    if form.time_at is not None:
        columns.append((form.time_at, times.tobytes()))
    for at, column in columns:
        for byte in range(8):
            rows[at + byte :: size] = column[byte::8]
    # All varints at once: the iterations are one big number of 64-bit lanes; shifting it by 7k brings every lane's
    # k-th group of seven bits to its lowest byte (what a neighbour shifts in lies above them, and is masked).
    numbers = int.from_bytes(iterations.tobytes(), "little") if form.width else 0
    for k in range(form.width):
        last = k == form.width - 1
        mask = 0x01 if k == 9 else 0x7F
        groups = numbers >> (7 * k) & lanes(mask, count)
        if not last:
            groups |= lanes(0x80, count)
        rows[form.varint_at + k :: size] = groups.to_bytes(8 * count, "little")[::8]
    return rows


@functools.lru_cache(maxsize=64)
def lanes(byte: int, count: int) -> int:
    """A number of `count` 64-bit lanes that hold `byte` each."""
    return int.from_bytes((bytes((byte,)) + bytes(7)) * count, "little")
