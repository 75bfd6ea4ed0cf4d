"""Arrivals and an intake for tests: what a decoder would make of a request, and destinations in memory behind it."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.shipping import START_NS, destination
from tracelet import ids
from tracelet.exporters.base import Answer, Delivered, Rejected, RetryLater
from tracelet.gateway.callers import Caller
from tracelet.gateway.intake import Intake
from tracelet.otlp.arrival import Arrival, AttemptEnd, Decoded, Piece
from tracelet.records import Batch, Heartbeat, PointBatch, Record, RunInfo

ANYBODY = Caller()


def arrival(
    run_id: str = "run-1",
    *,
    attempt: str = "00000000000000a1",
    rank: int = 0,
    points: Sequence[tuple[str, float, int]] = (),
    records: Sequence[Record] = (),
    pieces: Sequence[Piece] = (),
    started: int | None = None,
    first: int = START_NS,
    ended: AttemptEnd | None = None,
    project: str = "project",
    host: str | None = None,
) -> Arrival:
    """What one Resource of a request says; points are (name, value, iteration), a millisecond apart."""
    instance = ids.instance_id(run_id, attempt, rank)
    return Arrival(
        run=RunInfo(run_id, project, "experiment", f"name of {run_id}"),
        attempt_key=attempt,
        rank=rank,
        instance_id=instance,
        resource={
            "tracelet.run.id": run_id,
            "service.instance.id": instance,
            "k8s.pod.name": "a",
            **({} if host is None else {"host.name": host}),
        },
        points=columns(points, first) if points else None,
        records=tuple(records),
        pieces=tuple(pieces),
        started_unix_nano=started,
        first_unix_nano=first,
        ended=ended,
        items=len(points) + len(records) + len(pieces),
    )


def columns(points: Sequence[tuple[str, float, int]], first: int) -> PointBatch:
    """These points as columns."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _, _ in points))}
    return PointBatch(
        {number: name for name, number in numbers.items()},
        array("Q", [first + index * 1_000_000 for index in range(len(points))]),
        array("d", [value for _, value, _ in points]),
        array("q", [iteration for _, _, iteration in points]),
        array("I", [numbers[name] for name, _, _ in points]),
    )


def ended(status: str = "FINISHED", told_by: str = "event", **facts: Any) -> AttemptEnd:
    """The end of an attempt."""
    return AttemptEnd(status, facts.pop("at", START_NS + 10**12), facts.pop("error", None), told_by)


def take(intake: Intake, *arrivals: Arrival, caller: Caller = ANYBODY) -> Any:
    """Hand in one request."""
    return intake.take(Decoded(arrivals), caller)


class Memory:
    """What every run's destination got; one for all runs, and its answers are as a test says."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.answer: Callable[[Batch], Answer] = lambda batch: Delivered()
        self.lock = threading.Lock()

    def build(self, known: Mapping[str, Any], secrets: object, environ: object) -> _Exporter:
        return _Exporter(self)

    def parts(self, run_id: str) -> Iterator[Any]:
        with self.lock:
            batches = list(self.batches)
        for batch in batches:
            if batch.run.run_id == run_id:
                yield from batch.parts

    def records(self, run_id: str, kind: type[Any] | None = None) -> list[Any]:
        return [r for part in self.parts(run_id) for r in part.records if kind is None or isinstance(r, kind)]

    def points(self, run_id: str) -> list[tuple[str, float, int, int]]:
        """Name, value, iteration and time, in order of arrival."""
        return [
            (part.points.names[number], value, iteration, time)
            for part in self.parts(run_id)
            for number, value, iteration, time in zip(
                part.points.metric_ids,
                part.points.values,
                part.points.iterations,
                part.points.time_unix_nano,
                strict=True,
            )
        ]


class _Delivery:
    def __init__(self, memory: Memory, batch: Batch) -> None:
        self.note: Mapping[str, Any] = {}
        self._memory, self._batch = memory, batch

    def attempt(self) -> Answer:
        answer = self._memory.answer(self._batch)
        if not isinstance(answer, (RetryLater, Rejected)):
            with self._memory.lock:
                self._memory.batches.append(self._batch)
        return answer


class _Exporter:
    linger_s = 0.0
    max_points = 1000
    rising_limit_s = None

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        return Delivered()

    def memory(self) -> Mapping[str, Any]:
        return {"run_id": "there"}

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> _Delivery:
        return _Delivery(self._memory, batch)

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        raise AssertionError("a gateway says nothing of its own about a run's life")

    def close(self) -> None:
        pass


def make(root: Path, memory: Memory, **options: Any) -> Intake:
    """An intake that is not started."""
    return Intake(root, [destination("mlflow")], {}, {}, build=memory.build, **{"sync": False, **options})


@contextmanager
def started(root: Path, memory: Memory, **options: Any) -> Iterator[Intake]:
    """A started intake; closed at the end without waiting for anything."""
    intake = make(root, memory, **options)
    intake.start()
    try:
        yield intake
    finally:
        intake.close()
