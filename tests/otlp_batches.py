"""Batches as the shipper would make them, for tests of what speaks OTLP."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from tracelet.otlp import semconv
from tracelet.records import Batch, Part, PointBatch, Record, RunInfo, WriterOpened

START = 1_700_000_000_000_000_000
MS = 1_000_000
RUN = RunInfo("run-1", "vision", "cnn", "bold-hawk")


def opened(rank: int = 0, instance: str = "instance-0", attempt: str = "a" * 16) -> WriterOpened:
    resource: dict[str, Any] = {
        "host.name": "node-1",
        "service.instance.id": instance,
        "service.name": "vision",
        semconv.EXPERIMENT_NAME: RUN.experiment_name,
        semconv.PROJECT: RUN.project,
        semconv.RANK: rank,
        semconv.RUN_ATTEMPT: attempt,
        semconv.RUN_ID: RUN.run_id,
        semconv.RUN_NAME: RUN.run_name,
    }
    return WriterOpened(START, "first", 4711, rank, attempt, START, resource)


def points(
    rows: Iterable[tuple[str, float, int]], *, start: int = START, dense: Iterable[int] = (), step: int = MS
) -> PointBatch:
    """Points of name, value, iteration; a millisecond apart."""
    ids: dict[str, int] = {}
    rows = list(rows)
    metric_ids = [ids.setdefault(name, len(ids)) for name, _, _ in rows]
    return PointBatch(
        {number: name for name, number in ids.items()},
        array("Q", [start + i * step for i in range(len(rows))]),
        array("d", [value for _, value, _ in rows]),
        array("q", [iteration for _, _, iteration in rows]),
        array("I", metric_ids),
        frozenset(dense),
    )


def batch(
    rows: Iterable[tuple[str, float, int]] = (),
    records: Iterable[Record] = (),
    *,
    number: int = 1,
    start: int = START,
    writer: str = "w" * 16,
    opening: WriterOpened | None = None,
) -> Batch:
    """A batch of one part."""
    return Batch(
        number, RUN, "/nowhere", (Part(writer, opening or opened(), tuple(records), points(rows, start=start)),)
    )


def otlp_spec(endpoint: str | None, **more: Any) -> Mapping[str, Any]:
    """The spec of an OTLP destination, as tracelet.destinations makes it."""
    return {
        "explicit": True,
        "endpoint": endpoint,
        "protocol": None,
        "compression": None,
        "timeout_s": None,
        "signals": ["metrics", "traces", "logs"],
        "environment": {},
    } | more
