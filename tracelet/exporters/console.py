"""The console exporter: a line a person can read for everything a run logs."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tracelet.exporters.base import Answer, Delivered
from tracelet.guard import guard
from tracelet.records import (
    ArtifactLogged,
    AttemptEnded,
    Batch,
    Heartbeat,
    ParamsLogged,
    PointBatch,
    Record,
    RunInfo,
    RunStarted,
    SpanEnded,
    SpanStarted,
    TagsSet,
)

__all__ = ["ConsoleExporter"]


class ConsoleExporter:
    """Writes to `stream`, by default the standard error of the moment; serves in the training process.

    Examples:
        >>> import io
        >>> from tracelet.exporters.console import ConsoleExporter
        >>> exporter = ConsoleExporter({}, {}, {}, stream=io.StringIO())
    """

    max_points = 1_000
    linger_s = 0.2
    rising_limit_s: float | None = 0.0  # for people the clock's own time is the right one

    def __init__(
        self,
        spec: Mapping[str, Any],
        secrets: Mapping[str, Any],
        environ: Mapping[str, str],
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream
        self._name = ""
        self._spans: dict[str, SpanStarted] = {}

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """A console is always there."""
        self._name = run.run_name
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        """A console remembers nothing."""
        return {}

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> _ConsoleDelivery:
        """The batch as lines."""
        lines = [line for part in batch.parts for line in (*self._records(part.records), *_points(part.points))]
        lines.sort(key=lambda line: line[0])  # stable; records and points come apart, a person reads them by time
        return _ConsoleDelivery(self, [f"{self._name}  {_clock(time)}  {text}\n" for time, text in lines])

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """Nothing: a person sees that the run lives."""

    def close(self) -> None:
        """Nothing to let go: the stream is the program's."""

    def write(self, lines: list[str]) -> None:
        """Write lines at once; a stream that is closed or broken is said so, once a minute."""
        stream = sys.stderr if self._stream is None else self._stream
        try:
            stream.write("".join(lines))
            stream.flush()
        except (OSError, ValueError, AttributeError) as error:  # broken pipe, closed file, no stderr (pythonw)
            guard.limited("console", "the console can't be written to: %s", error)

    def _records(self, records: tuple[Record, ...]) -> Iterator[tuple[int, str]]:
        for record in records:
            if isinstance(record, SpanStarted):
                self._spans[record.span_id] = record
                yield record.start_unix_nano, f"{record.name} began"
            elif isinstance(record, SpanEnded):
                begun = self._spans.pop(record.span_id, None)
                if begun is not None:
                    seconds = (record.end_unix_nano - begun.start_unix_nano) / 1e9
                    how = "ended" if record.error is None else f"failed ({record.error.type}: {record.error.message})"
                    yield record.end_unix_nano, f"{begun.name} {how} after {seconds:.3f} s"
            else:
                line = _line(record)
                if line is not None:
                    yield line


class _ConsoleDelivery:
    """Lines on their way to the console; they can't fail in a way that a repeat would mend."""

    def __init__(self, exporter: ConsoleExporter, lines: list[str]) -> None:
        self._exporter = exporter
        self._lines = lines

    @property
    def note(self) -> Mapping[str, Any]:
        """Nothing to note."""
        return {}

    def attempt(self) -> Answer:
        """Write the lines."""
        self._exporter.write(self._lines)
        self._lines = []
        return Delivered()


def _line(record: Record) -> tuple[int, str] | None:
    if isinstance(record, RunStarted):
        return record.time_unix_nano, f"run {record.run_name} started"
    if isinstance(record, ParamsLogged):
        return record.time_unix_nano, f"params  {_pairs(record.params)}"
    if isinstance(record, TagsSet):
        return record.time_unix_nano, f"tags  {_pairs(record.tags)}"
    if isinstance(record, ArtifactLogged):
        return record.time_unix_nano, f"artifact  {record.path}  ({record.size:,} bytes)"
    if isinstance(record, AttemptEnded):
        error = "" if record.error is None else f"  {record.error.type}: {record.error.message}"
        return record.end_unix_nano, f"run {record.status}{error}"
    return None


def _points(points: PointBatch) -> Iterator[tuple[int, str]]:
    columns = zip(points.time_unix_nano, points.values, points.iterations, points.metric_ids, strict=True)
    for time, value, iteration, metric in columns:
        yield time, f"{points.names[metric]} = {value:.6g}  (iteration {iteration})"


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _clock(time_unix_nano: int) -> str:
    moment = datetime.datetime.fromtimestamp(time_unix_nano // 1_000_000_000)
    return f"{moment:%H:%M:%S}.{time_unix_nano // 1_000_000 % 1000:03d}"
