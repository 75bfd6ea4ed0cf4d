"""Rising milliseconds: gives each series times that a store with millisecond resolution keeps apart.

Prometheus stores milliseconds, and of two points of a series in one millisecond the second is lost or costs its whole
request; MLflow takes points of equal key, step, value and millisecond for one. So a point that is not later than the
one before it in its series goes to the millisecond after it. How far that may lead the clock is the destination's
own (`rising_limit_s`): beyond it a point keeps its own time and is marked dense.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping
from typing import Any

from tracelet.records import PointBatch

numpy: Any
try:
    import numpy
except ImportError:  # the pure path below is the whole truth; numpy only makes it faster
    numpy = None

__all__ = ["CLOCK_FELL_MS", "State", "rise", "rise_by_numpy", "rise_by_python", "series_key", "stamp"]

State = tuple[int, int]
"""Of a series: the last millisecond given out, and the highest one its own clock has shown."""

CLOCK_FELL_MS = 60_000
"""A clock that shows a time this much below the highest it has shown was set back: its own time counts again."""

_NS = 1_000_000
_FRESH: State = (-1, -1)  # before any point: every time is later than these
_WORTH_NUMPY = 256  # below, the arrays' set-up costs more than the loop
_INT64_SAFE = 2**62

Risen = tuple["array[int]", frozenset[int], dict[int, State]]


def series_key(instance_id: str, name: str) -> str:
    """The journal's key of a series: one metric of one rank, over all its writers."""
    return f"{instance_id}/{name}"


def stamp(
    points: PointBatch, instance_id: str, states: Mapping[str, State], rising_limit_s: float | None
) -> tuple[PointBatch, dict[str, State]]:
    """`points` with rising milliseconds, and the states of the series it changed (only those).

    `states` are the series' states before, by `series_key`; `points.names` must name every metric id in `points`.
    """
    if not len(points):
        return points, {}
    keys: dict[int, str] = {}
    first_id: dict[str, int] = {}
    merged: dict[int, int] = {}
    for metric_id in set(points.metric_ids):
        key = keys[metric_id] = series_key(instance_id, points.names[metric_id])
        if first_id.setdefault(key, metric_id) != metric_id:
            merged[metric_id] = first_id[key]
    ids = points.metric_ids
    if merged:  # two ids of one name are one series
        ids = array("I", [merged.get(metric_id, metric_id) for metric_id in ids])
    before = {metric_id: states[key] for key, metric_id in first_id.items() if key in states}
    limit_ms = None if rising_limit_s is None else int(rising_limit_s * 1000)
    times, dense, after = rise(points.time_unix_nano, ids, before, limit_ms)
    changed = {keys[metric_id]: state for metric_id, state in after.items() if before.get(metric_id) != state}
    return dataclasses.replace(points, time_unix_nano=times, dense=dense), changed


def rise(times: array[int], ids: array[int], before: Mapping[int, State], limit_ms: int | None) -> Risen:
    """Times with rising milliseconds for each id, the indices of dense points, and each id's state afterwards."""
    if numpy is None or len(times) < _WORTH_NUMPY:
        return rise_by_python(times, ids, before, limit_ms)
    return rise_by_numpy(times, ids, before, limit_ms)


def rise_by_python(times: array[int], ids: array[int], before: Mapping[int, State], limit_ms: int | None) -> Risen:
    """`rise` one point after the other."""
    risen, dense = array("Q", times), list[int]()
    states: dict[int, State] = {}
    for index, (time, metric_id) in enumerate(zip(times, ids, strict=True)):
        last, high = states.get(metric_id) or before.get(metric_id, _FRESH)
        own = time // _NS
        if own < high - CLOCK_FELL_MS:
            states[metric_id] = (own, own)
            continue
        high = max(high, own)
        if own > last:
            last = own
        elif limit_ms is not None and last + 1 - own > limit_ms:
            dense.append(index)
        else:
            last += 1
            risen[index] = last * _NS
        states[metric_id] = (last, high)
    return risen, frozenset(dense), states


def rise_by_numpy(times: array[int], ids: array[int], before: Mapping[int, State], limit_ms: int | None) -> Risen:
    """`rise` for all series at once; a series whose clock fell, or that leads too far, goes point by point.

    With `n` the place of a point in its series, `last = max(own, last + 1)` is `n + cumulative max(own - n)`: one
    pass of numpy over the points sorted by series.
    """
    np: Any = numpy
    count = len(times)
    raw = np.frombuffer(times, dtype=np.uint64)
    order = np.argsort(np.frombuffer(ids, dtype=np.uint32), kind="stable")
    sorted_ids = np.frombuffer(ids, dtype=np.uint32)[order]
    own = (raw[order] // np.uint64(_NS)).astype(np.int64)
    starts = np.flatnonzero(np.concatenate(([True], sorted_ids[1:] != sorted_ids[:-1])))
    group_ids = sorted_ids[starts].tolist()
    lengths = np.diff(np.append(starts, count))
    group = np.repeat(np.arange(len(starts)), lengths)
    place = np.arange(count) - starts[group]
    state = np.array([before.get(metric_id, _FRESH) for metric_id in group_ids], dtype=np.int64).reshape(-1, 2)
    # The state enters as if it stood before the first point: the first time is at least last + 1.
    lifted = own - place
    lifted[starts] = np.maximum(lifted[starts], state[:, 0] + 1)
    high = own.copy()
    high[starts] = np.maximum(high[starts], state[:, 1])
    spread = max(int(lifted.max() - lifted.min()), int(high.max() - high.min())) + 1
    if spread * len(starts) > _INT64_SAFE:  # absurd times; no room to keep the groups apart in one int64
        return rise_by_python(times, ids, before, limit_ms)
    apart = group * spread
    low = int(min(lifted.min(), high.min()))
    given = np.maximum.accumulate(lifted - low + apart) - apart + low + place
    high = np.maximum.accumulate(high - low + apart) - apart + low
    high_before = np.concatenate(([0], high[:-1]))
    high_before[starts] = state[:, 1]
    odd = own < high_before - CLOCK_FELL_MS
    if limit_ms is not None:
        odd |= given - own > limit_ms
    sorted_times = np.where(given == own, raw[order], given.astype(np.uint64) * np.uint64(_NS))
    risen = np.empty(count, dtype=np.uint64)
    risen[order] = sorted_times
    ends = starts + lengths - 1
    states = dict(zip(group_ids, zip(given[ends].tolist(), high[ends].tolist(), strict=True), strict=True))
    dense: list[int] = []
    for number in np.unique(group[odd]).tolist() if odd.any() else ():
        which = order[starts[number] : starts[number] + lengths[number]]
        metric_id = group_ids[number]
        slow_times = array("Q", raw[which].tobytes())
        slow_ids = array("I", [metric_id]) * len(slow_times)
        slow, slow_dense, after = rise_by_python(slow_times, slow_ids, before, limit_ms)
        risen[which] = np.frombuffer(slow, dtype=np.uint64)
        dense.extend(which[sorted(slow_dense)].tolist())
        states.update(after)
    return array("Q", risen.tobytes()), frozenset(dense), states
