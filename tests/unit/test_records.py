"""Points as columns: cut out of raw records at C speed, equal to reading them one by one, and sliced."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracelet.records import PointBatch

RECORD = struct.Struct("<QdqII")
POINTS = st.lists(
    st.tuples(
        st.integers(0, 2**64 - 1),
        st.floats(width=64),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
    ),
    max_size=50,
)


def raw(points: list[tuple[int, float, int, int, int]]) -> bytes:
    return b"".join(RECORD.pack(*point) for point in points)


@given(POINTS)
def test_columns_hold_what_the_records_do_bit_for_bit(points: list[tuple[int, float, int, int, int]]) -> None:
    batch = PointBatch.from_records(raw(points), {0: "loss"})
    again = b"".join(
        RECORD.pack(*row, marker)
        for row, (*_, marker) in zip(
            zip(batch.time_unix_nano, batch.values, batch.iterations, batch.metric_ids, strict=True),
            points,
            strict=True,
        )
    )
    assert again == raw(points)
    assert len(batch) == len(points)


def test_records_may_be_a_view_into_something_larger() -> None:
    data = bytearray(b"x" * 32 + raw([(1, 0.5, -3, 7, 9)]))
    batch = PointBatch.from_records(memoryview(data)[32:], {7: "loss"})
    data[:] = bytes(64)
    assert (list(batch.values), list(batch.iterations), list(batch.metric_ids)) == ([0.5], [-3], [7])


@pytest.mark.parametrize("size", [1, 31, 33])
def test_half_a_record_is_refused(size: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        PointBatch.from_records(b"x" * size, {})


@given(POINTS, st.integers(0, 60), st.integers(0, 60))
def test_a_slice_is_the_same_points_with_its_own_dense_ones(
    points: list[tuple[int, float, int, int, int]], start: int, end: int
) -> None:
    whole = PointBatch.from_records(raw(points), {})
    dense = frozenset(range(0, len(points), 3))
    part = PointBatch(whole.names, whole.time_unix_nano, whole.values, whole.iterations, whole.metric_ids, dense).slice(
        start, end
    )
    assert part.iterations == whole.iterations[start:end]
    assert {part.time_unix_nano[i] for i in part.dense} == {
        whole.time_unix_nano[i] for i in dense if start <= i < end and i < len(points)
    }
    assert len(part) == len(points[start:end])
