"""Points to OTLP bytes in bulk with numpy: the same bytes as `encode_points`, in a third of its time.

The whole batch at once, whatever the number of names: rows of one form are a template repeated, with times, values
and varint bytes stored into it as columns; where forms are mixed, each form's rows are scattered to their places.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from tracelet.otlp.encode_points import Form, canonical_ids, metric_field, template
from tracelet.records import PointBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["bulk", "counts", "group", "metric_fields"]


def group(points: PointBatch) -> PointBatch:
    """The same points by name, each name's in their old order."""
    ids: NDArray[np.uint32] = np.frombuffer(points.metric_ids, np.uint32)
    used = np.unique(ids)
    replaced = canonical_ids(used.tolist(), points.names)
    if replaced:
        ids = ids.copy()
        for old, new in replaced.items():
            ids[ids == old] = new
    # A stable sort of 16-bit keys is a radix sort.
    keys = ids.astype(np.uint16) if used.size and used[-1] < 1 << 16 else ids
    order = np.argsort(keys, kind="stable")
    dense: frozenset[int] = frozenset()
    if points.dense:
        marked = np.zeros(len(points), bool)
        marked[list(points.dense)] = True
        dense = frozenset(np.flatnonzero(marked[order]).tolist())

    def column(code: str, values: NDArray[Any]) -> array[Any]:
        out = array(code)
        out.frombytes(values[order].tobytes())
        return out

    return PointBatch(
        points.names,
        column("Q", np.frombuffer(points.time_unix_nano, np.uint64)),
        column("d", np.frombuffer(points.values, np.float64)),
        column("q", np.frombuffer(points.iterations, np.int64)),
        column("I", ids),
        dense,
    )


def counts(points: PointBatch) -> tuple[list[int], list[int]]:
    """The ids of `points`, which must come from `group`, and how many points each has."""
    if not len(points):
        return [], []
    ids = np.frombuffer(points.metric_ids, np.uint32)
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] ^ 1))
    return ids[starts].tolist(), np.diff(starts, append=len(ids)).tolist()


def metric_fields(points: PointBatch) -> bytes:
    """The repeated field ScopeMetrics.metrics of `points`, which must come from `group`."""
    if not len(points):
        return b""
    ids = np.frombuffer(points.metric_ids, np.uint32)
    rows, offsets = _rows(points)
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] ^ 1))
    ends = np.append(starts[1:], len(ids))
    view = memoryview(rows)
    return b"".join(
        metric_field(points.names[name], view[first:last])
        for name, first, last in zip(
            ids[starts].tolist(), offsets[starts].tolist(), offsets[ends].tolist(), strict=True
        )
    )


def _rows(points: PointBatch) -> tuple[memoryview | bytearray, NDArray[np.int64]]:
    """All rows one after another, and where each begins (one more: where the last ends)."""
    times = np.frombuffer(points.time_unix_nano, np.uint64)
    values = np.frombuffer(points.values, np.float64)
    # As unsigned numbers negative iterations are the largest ones, ten bytes wide, as two's complement is.
    iterations = np.frombuffer(points.iterations, np.uint64)
    codes = np.ones(len(points), np.uint8)
    largest = int(iterations.max())
    for width in range(1, 10):
        if largest >> (7 * width) == 0:
            break
        codes += iterations >= np.uint64(1 << (7 * width))
    if points.dense:
        codes[list(points.dense)] |= 0x10
    codes[times == 0] |= 0x20
    present = np.unique(codes).tolist() if codes.min() != codes.max() else [int(codes[0])]
    forms = {code: template(code & 0x0F, bool(code & 0x10), bool(code & 0x20)) for code in present}

    if len(present) == 1:
        form = forms[present[0]]
        return bulk(form, times, values, iterations), np.arange(len(points) + 1, dtype=np.int64) * form.size
    sizes = np.zeros(256, np.int64)
    for code, form in forms.items():
        sizes[code] = form.size
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes[codes])))
    out = np.empty(int(offsets[-1]), np.uint8)
    for code, form in forms.items():
        chosen = np.flatnonzero(codes == code)
        rows = bulk(form, times[chosen], values[chosen], iterations[chosen])
        # Overlapping windows of one row's size, one at every byte: storing by index then copies whole rows.
        windows = np.ndarray((len(out) - form.size + 1,), f"V{form.size}", out, strides=(1,))
        windows[offsets[:-1][chosen]] = np.frombuffer(rows, f"V{form.size}")
    return out.data, offsets


def bulk(
    form: Form, times: NDArray[np.uint64], values: NDArray[np.float64], iterations: NDArray[np.uint64]
) -> bytearray:
    """The rows of one form, one after another."""
    rows = bytearray(form.template * len(times))
    fields: dict[str, tuple[Any, int]] = {"value": (np.dtype("<f8"), form.value_at)}
    if form.time_at is not None:
        fields["time"] = (np.dtype("<u8"), form.time_at)
    for k in range(form.width):
        fields[f"varint{k}"] = (np.dtype("u1"), form.varint_at + k)
    columns = np.frombuffer(
        rows,
        np.dtype(
            {
                "names": list(fields),
                "formats": [kind for kind, _ in fields.values()],
                "offsets": [at for _, at in fields.values()],
                "itemsize": form.size,
            }
        ),
    )
    columns["value"] = values
    if form.time_at is not None:
        columns["time"] = times
    for k in range(form.width):
        groups = (iterations >> np.uint64(7 * k)).astype(np.uint8)
        columns[f"varint{k}"] = groups & 0x7F if k == form.width - 1 else groups | 0x80
    return rows
