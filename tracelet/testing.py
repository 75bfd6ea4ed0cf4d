"""Fakes for tests of tracelet, and of code that uses it: a destination in memory, and a clock that stands still.

They are what tracelet's own tests use; no mocking library is needed.

    >>> from tracelet.testing import InMemoryExporter, RetryLater
    >>> exporter = InMemoryExporter(answers=[RetryLater("down for a moment")])
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tracelet.exporters.base import Answer, Delivered, Delivery, Refusal, Rejected, RetryLater
from tracelet.records import AttemptEnded, Batch, Heartbeat, Record, RunInfo

__all__ = ["Delivered", "InMemoryExporter", "ManualClock", "MemoryStore", "Refusal", "Rejected", "RetryLater"]

Reaction = Answer | BaseException | Callable[[Batch], Answer]


@dataclass
class MemoryStore:
    """What a destination holds, kept when exporters come and go: the server's side of `InMemoryExporter`.

    A batch's number is what makes a repeat harmless; one that comes again with another content is kept in `unequal`,
    which a test expects to be empty.
    """

    batches: dict[int, Batch] = field(default_factory=dict)
    arrivals: list[int] = field(default_factory=list)  # numbers in the order they came, repeats included
    unequal: list[tuple[Batch, Batch]] = field(default_factory=list)
    beats: list[tuple[Batch, Heartbeat]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, batch: Batch) -> None:
        """Take a batch, once."""
        with self.lock:
            self.arrivals.append(batch.number)
            known = self.batches.setdefault(batch.number, batch)
            # By repr: a NaN is not equal to itself, and has to be.
            if known is not batch and repr(known) != repr(batch):
                self.unequal.append((known, batch))

    def in_order(self) -> list[Batch]:
        """The batches by number."""
        with self.lock:
            return [self.batches[number] for number in sorted(self.batches)]

    def points(self) -> list[tuple[str, float, int, int]]:
        """Every point as (name, value, iteration, time_unix_nano), in the order of the batches."""
        found: list[tuple[str, float, int, int]] = []
        for batch in self.in_order():
            for part in batch.parts:
                columns = part.points
                names = [columns.names[metric_id] for metric_id in columns.metric_ids]
                found.extend(zip(names, columns.values, columns.iterations, columns.time_unix_nano, strict=True))
        return found

    def records(self) -> list[Record]:
        """Every record, in the order of the batches."""
        return [record for batch in self.in_order() for part in batch.parts for record in part.records]

    def ends(self) -> list[AttemptEnded]:
        """The ends of attempts."""
        return [record for record in self.records() if isinstance(record, AttemptEnded)]


class InMemoryExporter:
    """A destination in memory that answers as it is told.

    `answers` are given to the attempts in turn: a `Delivered`, `RetryLater` or `Rejected`; an exception, which is
    raised; or a function of the batch that gives an answer. When they are used up everything is delivered.
    `lost` are numbers of attempts (from 0) whose batch arrives although the answer says otherwise, as when a
    connection breaks after the server has committed.

    Examples:
        >>> from tracelet.testing import InMemoryExporter
        >>> exporter = InMemoryExporter(max_points=100)
        >>> exporter.store.points()
        []
    """

    def __init__(
        self,
        store: MemoryStore | None = None,
        *,
        answers: Iterable[Reaction] = (),
        open_answers: Iterable[Answer] = (),
        lost: Iterable[int] = (),
        max_points: int = 1000,
        linger_s: float = 0.0,
        rising_limit_s: float | None = 60.0,
    ) -> None:
        self.max_points = max_points
        self.linger_s = linger_s
        self.rising_limit_s = rising_limit_s
        self.store = MemoryStore() if store is None else store
        self.attempts = 0
        self.opened: list[tuple[RunInfo, dict[str, Any]]] = []
        self.notes: list[Mapping[str, Any] | None] = []  # what each begin() was handed
        self.closed = False
        self._answers = iter(answers)
        self._open_answers = iter(open_answers)
        self._lost = frozenset(lost)

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """Remember the run; the next of `open_answers`, then Delivered."""
        self.opened.append((run, dict(memory)))
        return next(self._open_answers, Delivered())

    def memory(self) -> Mapping[str, Any]:
        """The run's id and address here."""
        run_id = self.opened[-1][0].run_id if self.opened else ""
        return {"run_id": f"memory-{run_id}", "link": f"memory://{run_id}"}

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> Delivery:
        """A delivery that answers from the script."""
        self.notes.append(note)
        return _InMemoryDelivery(self, batch, note)

    def answer(self, batch: Batch) -> Answer:
        """One attempt: the next answer of the script; what is not RetryLater stores the batch."""
        number, self.attempts = self.attempts, self.attempts + 1
        reaction = next(self._answers, None)
        if number in self._lost:
            self.store.put(batch)
        if isinstance(reaction, BaseException):
            raise reaction
        answer = Delivered() if reaction is None else reaction(batch) if callable(reaction) else reaction
        if not isinstance(answer, RetryLater):
            self.store.put(batch)
        return answer

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """Keep the heartbeat."""
        with self.store.lock:
            self.store.beats.append((batch, heartbeat))

    def close(self) -> None:
        """Only noted."""
        self.closed = True


class _InMemoryDelivery:
    def __init__(self, exporter: InMemoryExporter, batch: Batch, note: Mapping[str, Any] | None) -> None:
        self._exporter = exporter
        self._batch = batch
        self.note: Mapping[str, Any] = {"number": batch.number} if note is None else note

    def attempt(self) -> Answer:
        return self._exporter.answer(self._batch)


class ManualClock:
    """A clock that moves only when it is told to: `monotonic()` in seconds, `time_ns()` in Unix nanoseconds.

    Examples:
        >>> from tracelet.testing import ManualClock
        >>> clock = ManualClock()
        >>> before = clock.monotonic()
        >>> clock.advance(1.5)
        >>> clock.monotonic() - before
        1.5
    """

    def __init__(self, time_unix_nano: int = 1_760_000_000_000_000_000) -> None:
        self._start_unix_nano = time_unix_nano
        self._passed_ns = 0

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self._passed_ns / 1e9

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        return self._start_unix_nano + self._passed_ns

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self._passed_ns += round(seconds * 1e9)
