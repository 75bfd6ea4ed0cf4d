"""Data points as they mostly are, read in bulk: runs of rows that differ in time, value and iteration alone.

The reverse of `encode_points`, by the same forms: the varying bytes are taken out of a run of equally long rows as
strided slices and zeroed there; if what is left is the form's template repeated, they were the columns. What has any
other shape (more attributes, integer values, a mark, widths that change all the time) is read point by point.
"""

from __future__ import annotations

from array import array
from typing import Any

from tracelet.otlp.encode_points import Form, lanes, template

__all__ = ["rows_of"]

_FEWEST = 12  # below it a bulk costs more than its points one by one
_LARGEST = 4096  # rows of a run at once
_SHORT_RUNS = 64  # so many, and mostly them: reading one by one is faster
_WIDTHS = {template(width, False, False).size: width for width in range(1, 11)}
Rows = tuple["array[int]", "array[float]", "array[int]"]


def rows_of(gauge: Any, count: int) -> Rows | None:
    """Times, values and iterations of a Gauge's `count` points; None where they are not all of our usual forms.

    Cost: one serialization by protobuf, and a few dozen strided copies for each run of rows.
    """
    if count < _FEWEST:
        return None
    data = gauge.SerializeToString()
    times, values, iterations = array("Q"), array("d"), array("q")
    at, short = 0, 0
    while at + 1 < len(data):
        width = _WIDTHS.get(data[at + 1] + 2)
        if width is None:
            return None
        form = template(width, False, False)
        rows = _run(data, at, form.size)
        columns = _columns(data[at : at + rows * form.size], form, rows) if rows else None
        if columns is None:
            return None
        if rows < _FEWEST:
            short += 1
            if short > _SHORT_RUNS and short * _FEWEST > len(times):
                return None
        times.frombytes(columns[0])
        values.frombytes(columns[1])
        iterations.frombytes(columns[2])
        at += rows * form.size
    return (times, values, iterations) if len(times) == count else None


def _run(data: bytes, at: int, size: int) -> int:
    """How many rows of `size` bytes stand one after another; no fewer than half of what there are."""
    rows = min((len(data) - at) // size, _LARGEST)
    head = data[at : at + 2]
    while rows:
        end = at + rows * size
        if data[at:end:size] == head[:1] * rows and data[at + 1 : end : size] == head[1:] * rows:
            return rows
        rows //= 2
    return 0


def _columns(block: bytes, form: Form, rows: int) -> tuple[bytes, bytes, bytes] | None:
    """The bytes of three columns, each of 8 bytes a row; None if the rows are not of this form."""
    assert form.time_at is not None
    left, size, zeros = bytearray(block), form.size, bytes(rows)
    columns = []
    for at in (form.time_at, form.value_at):
        column = bytearray(8 * rows)
        for byte in range(at, at + 8):
            column[byte - at :: 8] = block[byte::size]
            left[byte::size] = zeros
        columns.append(bytes(column))
    # Each iteration is one 64-bit lane of a big number; the k-th byte of its varint has seven bits for it.
    iterations, lane = 0, bytearray(8 * rows)
    continued = lanes(0x80, rows)
    for k in range(form.width):
        byte = form.varint_at + k
        lane[::8] = block[byte::size]
        left[byte::size] = zeros
        number = int.from_bytes(lane, "little")
        if number & continued != (continued if k < form.width - 1 else 0):
            return None
        iterations |= (number & lanes(0x01 if k == 9 else 0x7F, rows)) << (7 * k)
    if left != form.template * rows:
        return None
    return columns[0], columns[1], iterations.to_bytes(8 * rows, "little")
