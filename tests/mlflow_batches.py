"""Batches as the shipper would hand them to the MLflow exporter, made by hand."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

from tracelet.exporters.base import Delivered, RetryLater
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.records import AttemptEnded, Batch, ErrorInfo, Part, PointBatch, Record, RunInfo, RunStarted, WriterOpened

START_NS = 1_790_000_000_000_000_000
Row = tuple[str, float, int, int]  # name, value, iteration, time in ms after START_NS


def points(rows: Iterable[Row]) -> PointBatch:
    """Columns of these rows; each name gets an id in order of appearance."""
    ids: dict[str, int] = {}
    times, values, iterations, numbers = array("Q"), array("d"), array("q"), array("I")
    for name, value, iteration, after_ms in rows:
        times.append(START_NS + after_ms * 1_000_000)
        values.append(value)
        iterations.append(iteration)
        numbers.append(ids.setdefault(name, len(ids)))
    return PointBatch({number: name for name, number in ids.items()}, times, values, iterations, numbers)


def opened(attempt: str = "a" * 16, started: int = START_NS, **other: Any) -> WriterOpened:
    fields: dict[str, Any] = {"role": "first", "pid": 1, "rank": 0, "resource": {}, **other}
    return WriterOpened(started, attempt_key=attempt, attempt_started_unix_nano=started, **fields)


def started(run_name: str = "test run", tags: Mapping[str, str] | None = None) -> RunStarted:
    return RunStarted(START_NS, run_name, {}, {"mlflow.user": "somebody"} if tags is None else tags)


def ended(status: str = "FINISHED", error: ErrorInfo | None = None, **other: Any) -> AttemptEnded:
    fields: dict[str, Any] = {"newest": True, "params": {}, "tags": {}, "open_spans": (), "series": {}, **other}
    return AttemptEnded(status, START_NS, START_NS + 5_000_000_000, error=error, **fields)


def batch(
    run: RunInfo,
    *records: Record,
    rows: Iterable[Row] = (),
    number: int = 1,
    folder: str = "/spool/run/host-boot",
    by: WriterOpened | None = None,
) -> Batch:
    """A batch of one part."""
    return Batch(number, run, folder, (Part("0" * 16, by or opened(), tuple(records), points(rows)),))


def run_info(run_id: str, project: str = "tests", run_name: str = "test run") -> RunInfo:
    return RunInfo(run_id, project, run_name, run_name)


def opened_exporter(
    uri: str,
    run: RunInfo,
    memory: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    **spec: Any,
) -> MLflowExporter:
    exporter = MLflowExporter({"tracking_uri": uri, **spec}, {}, environ or {})
    _opened.append(exporter)
    assert exporter.open(run, memory or {}) == Delivered()
    return exporter


_opened: list[MLflowExporter] = []


@pytest.fixture(autouse=True)
def exporters_closed() -> Iterator[None]:
    """Closes what `opened_exporter` opened; a test module imports it."""
    yield
    while _opened:
        _opened.pop().close()


def deliver(exporter: MLflowExporter, *batches: Batch) -> None:
    """Each batch delivered whole at the first attempt."""
    for one in batches:
        assert exporter.begin(one).attempt() == Delivered()


def persist(delivery: Any, within_s: float = 30.0) -> Any:
    """Attempts until the answer is final, as the shipper's loop would, without its pauses."""
    until = time.monotonic() + within_s
    while isinstance(answer := delivery.attempt(), RetryLater):
        assert time.monotonic() < until, answer
    return answer
