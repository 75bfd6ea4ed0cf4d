"""Rising milliseconds agree with a model that takes one point at a time, however they are cut into batches."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracelet.records import PointBatch
from tracelet.shipper import stamps
from tracelet.shipper.stamps import State

NOW_MS = 1_760_000_000_000


class Model:
    """The rule as the contract words it, one point at a time; nothing shared with the code under test."""

    def __init__(self, state: dict[int, State], limit_ms: int | None) -> None:
        self.state, self.limit_ms = dict(state), limit_ms

    def take(self, time: int, series: int) -> tuple[int, bool]:
        own = time // 1_000_000
        if series not in self.state:
            self.state[series] = (own, own)
            return time, False
        last, high = self.state[series]
        if own < high - 60_000:
            self.state[series] = (own, own)
            return time, False
        if own > last:
            self.state[series] = (own, max(own, high))
            return time, False
        lead = last + 1 - own
        if self.limit_ms is not None and lead > self.limit_ms:
            self.state[series] = (last, max(own, high))
            return time, True
        self.state[series] = (last + 1, max(own, high))
        return (last + 1) * 1_000_000, False


near = st.integers(NOW_MS - 70_000, NOW_MS + 70_000)
same = st.sampled_from([NOW_MS, NOW_MS, NOW_MS + 1, NOW_MS - 1])
times = st.one_of(same, near, st.integers(0, 18_446_744_073_708)).flatmap(
    lambda ms: st.integers(ms * 1_000_000, ms * 1_000_000 + 999_999)
)
points = st.lists(st.tuples(times, st.integers(0, 3)), max_size=60)
states = st.dictionaries(st.integers(0, 3), st.tuples(near, near), max_size=4)
limits = st.sampled_from([None, 0, 1, 5, 60_000])


@pytest.mark.parametrize("way", [stamps.rise_by_python, stamps.rise_by_numpy])
@given(batches=st.lists(points.filter(bool), max_size=4), before=states, limit_ms=limits)
def test_every_way_agrees_with_the_model_over_any_cut(
    way: Callable[..., stamps.Risen],
    batches: list[list[tuple[int, int]]],
    before: dict[int, State],
    limit_ms: int | None,
) -> None:
    model, state = Model(before, limit_ms), dict(before)
    for batch in batches:
        expected = [model.take(*point) for point in batch]
        risen, dense, after = way(array("Q", [t for t, _ in batch]), array("I", [i for _, i in batch]), state, limit_ms)
        state.update(after)
        assert [(time, index in dense) for index, time in enumerate(risen)] == expected
        assert set(after) == {series for _, series in batch}
    assert state == model.state


@given(st.lists(st.tuples(st.integers(-30_000, 30_000), st.integers(0, 2)), min_size=1, max_size=300))
def test_stamped_times_of_a_series_are_strictly_rising_milliseconds(offsets: list[tuple[int, int]]) -> None:
    names = {0: "loss", 1: "acc", 2: "loss"}  # two ids of one name are one series
    raw = PointBatch(
        names,
        array("Q", [(NOW_MS + ms) * 1_000_000 for ms, _ in offsets]),
        array("d", [0.0]) * len(offsets),
        array("q", [0]) * len(offsets),
        array("I", [i for _, i in offsets]),
    )
    stamped, changed = stamps.stamp(raw, "instance", {}, None)
    for name in set(names.values()):
        of_series = [
            t // 1_000_000 for t, i in zip(stamped.time_unix_nano, raw.metric_ids, strict=True) if names[i] == name
        ]
        assert all(a < b for a, b in itertools.pairwise(of_series))
        if of_series:
            assert changed[stamps.series_key("instance", name)][0] == of_series[-1]
    assert stamped.values == raw.values
    assert not stamped.dense
