"""Runs that the SDK's exporters of one process write to MLflow: what is decoded goes there at once, or not at all.

    SDK objects ─ the SDK's encoder ─ otlp.decode ─ Arrival ─ Batch ─ MLflowExporter, one a run

No spool and no journal: what can't be delivered in time is lost, and said to be.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tracelet.exporters.base import Answer, Refusal, Rejected, RetryLater
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.guard import guard
from tracelet.otlp.decode import Arrival, AttemptEnd
from tracelet.records import AttemptEnded, Batch, Part, PointBatch, Record, WriterOpened

__all__ = ["Missing", "Runs", "leave", "shared"]

_EXACT = ("event", "span")
_BACK_OFF_S = 0.5


class Missing(NamedTuple):
    """How many items of an export are not in MLflow, and why."""

    items: int
    why: str


class Runs:
    """The runs that one process writes to one MLflow; used by the threads of several processors."""

    def __init__(self, destination: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._built = (destination["spec"], secrets, environ)
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}
        self._stopping = threading.Event()
        self.users = 0

    def deliver(self, arrival: Arrival, until: float) -> Missing | None:
        """What of `arrival` MLflow does not have at `until` (of the monotonic clock), and why; None if it has all."""
        with self._lock:
            run = self._runs.get(arrival.run.run_id)
            if run is None:
                run = self._runs[arrival.run.run_id] = _Run(MLflowExporter(*self._built), self._stopping)
        return run.deliver(arrival, until)

    def close(self) -> None:
        """Let the connections go; who waits for a retry stops waiting."""
        self._stopping.set()
        with self._lock:
            for run in self._runs.values():
                run.close()


class _Run:
    """One run; one thread at a time is at its exporter."""

    def __init__(self, exporter: MLflowExporter, stopping: threading.Event) -> None:
        self._exporter = exporter
        self._stopping = stopping
        self._lock = threading.Lock()
        self._open = False
        self._batches = 0
        self._started: dict[str, int] = {}  # attempt key -> its start, which stays as it was first told
        self._ended: dict[str, AttemptEnd] = {}
        # Where a batch raises no latest value MLflow gets a row named after this folder: one of this process.
        self._folder = f"sdk-{uuid.uuid4().hex}"

    def deliver(self, arrival: Arrival, until: float) -> Missing | None:
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            return Missing(arrival.items, "another thread's export to the same run has not come through")
        try:
            self._exporter.limit(until)
            return self._deliver(arrival, until)
        finally:
            self._exporter.limit(None)
            self._lock.release()

    def _deliver(self, arrival: Arrival, until: float) -> Missing | None:
        if not self._open:
            answer = self._tried(lambda: self._exporter.open(arrival.run, {}), until)
            if isinstance(answer, RetryLater):
                return Missing(arrival.items, answer.reason)
            self._open = True
        refused: list[Refusal] = []
        through = 0  # points; what else there is goes with the first batch
        for batch in self._batches_of(arrival):
            answer = self._tried(self._exporter.begin(batch).attempt, until)
            if isinstance(answer, RetryLater):
                left = (len(arrival.points or ()) - through) if through else arrival.items
                return Missing(left + len(refused), answer.reason)
            through += sum(len(part.points) for part in batch.parts)
            if isinstance(answer, Rejected):
                refused.extend(answer.items)  # these alone: what comes after them is as good as before
        if not refused:
            return None
        first = refused[0]
        return Missing(len(refused), f"MLflow refused {len(refused)} of it, the first a {first.what}: {first.reason}")

    def close(self) -> None:
        with self._lock:
            self._exporter.close()

    def _tried(self, attempt: Callable[[], Answer], until: float) -> Answer:
        """The final answer to `attempt`, or the last one in time."""
        while True:
            answer = attempt()
            if not isinstance(answer, RetryLater):
                return answer
            wait = _BACK_OFF_S if answer.after_s is None else answer.after_s
            if time.monotonic() + wait >= until or self._stopping.wait(wait):
                return answer

    def _batches_of(self, arrival: Arrival) -> Iterator[Batch]:
        start = arrival.started_unix_nano or arrival.first_unix_nano or time.time_ns()
        opened = WriterOpened(
            time_unix_nano=start,
            role="first",
            pid=os.getpid(),
            rank=arrival.rank,
            attempt_key=arrival.attempt_key,
            attempt_started_unix_nano=self._started.setdefault(arrival.attempt_key, start),
            resource=arrival.resource,
        )
        records: tuple[Record, ...] = arrival.records
        points = arrival.points if arrival.points is not None else PointBatch.from_records(b"", {})
        most = self._exporter.max_points
        ended = self._end(arrival, opened)
        for first in range(0, max(len(points), 1), most):
            if first + most >= len(points):
                records += ended
            self._batches += 1
            part = Part(arrival.instance_id, opened, records, points.slice(first, first + most))
            yield Batch(self._batches, arrival.run, self._folder, (part,))
            records = ()

    def _end(self, arrival: Arrival, opened: WriterOpened) -> tuple[AttemptEnded, ...]:
        """The attempt's end, where this tells it first, or better than what told it before. Rank 0 has the word."""
        end = arrival.ended
        known = self._ended.get(arrival.attempt_key)
        if end is None or arrival.rank != 0 or (known is not None and known.told_by in _EXACT):
            return ()
        self._ended[arrival.attempt_key] = end
        start = opened.attempt_started_unix_nano
        return (AttemptEnded(end.status, start, end.end_unix_nano, True, end.error, {}, {}, (), {}),)


# The SDK makes the exporters of three signals apart, by names in variables, and they write to the same runs: two
# that know nothing of each other would create each run twice. So those of one process and one MLflow share this.
_shared: dict[tuple[int, str], Runs] = {}
_shared_lock = threading.Lock()


def shared(destination: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> Runs:
    """The runs of this process at this destination. After a fork they are others: a connection can't be shared."""
    key = (os.getpid(), str(destination["id"]))
    with _shared_lock:
        runs = _shared.get(key)
        if runs is None:
            runs = _shared[key] = Runs(destination, secrets, environ)
        runs.users += 1
        return runs


def leave(runs: Runs) -> None:
    """One exporter less; the last one closes the connections."""
    with _shared_lock:
        runs.users -= 1
        last = runs.users == 0
        if last:
            for key in [key for key, value in _shared.items() if value is runs]:
                del _shared[key]
    if last:
        with guard("close the connections of the SDK's exporters"):
            runs.close()
