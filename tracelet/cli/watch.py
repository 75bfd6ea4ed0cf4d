"""What a person sees while something is delivered: how far, how fast, and what a destination says when it won't."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from tracelet.cli.facts import Facts
from tracelet.errors import TraceletError
from tracelet.exporters import registry
from tracelet.exporters.base import Answer, Delivery, Exporter, RetryLater
from tracelet.records import Batch, Heartbeat, RunInfo
from tracelet.spool.cursor import DestinationProgress

__all__ = ["Line", "Pace", "Watch"]


class Line:
    """One line that is written over again at a terminal; elsewhere a new one every `every_s` seconds."""

    def __init__(self, out: IO[str], *, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._tty = out.isatty()
        self._every_s = every_s
        self._clock = clock
        self._at = clock()
        self._shown = ""

    def show(self, text: str) -> None:
        """Show `text` instead of what was there."""
        if self._tty:
            text = text[: shutil.get_terminal_size().columns - 1]
            if text != self._shown:
                self._out.write(f"\r\x1b[K{text}")
                self._out.flush()
                self._shown = text
        elif self._clock() - self._at >= self._every_s:
            self._at = self._clock()
            self._out.write(text + "\n")
            self._out.flush()

    def clear(self) -> None:
        """Leave an empty line for what comes next."""
        if self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()
        self._shown = ""
        self._at = self._clock()


class Pace:
    """How much of what waited at the start has arrived at each destination, and how fast it goes."""

    def __init__(self, facts: Facts, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._destinations = [d for d in facts.destinations if not d.in_process]
        self._arrived: dict[str, int] = {d.id: 0 for d in self._destinations}
        self._state = ""
        self._clock = clock
        self._moved = clock()
        self._began: float | None = None  # when the first batch was on its way; what comes before is no rate

    def take(self, progress: Mapping[str, DestinationProgress]) -> None:
        """Take in what the journals say now."""
        state = repr([(i, p.delivered, p.refused, p.positions, p.done) for i, p in progress.items()])
        if state != self._state:
            if self._state and self._began is None:
                self._began = self._moved
            self._state, self._moved = state, self._clock()
        for d in self._destinations:
            now = progress.get(d.id)
            if now is not None:
                # Fewer are refused than were, where dead letters are taken; these are among the delivered.
                self._arrived[d.id] = now.delivered - d.delivered + max(0, now.refused - d.refused)

    def arrived(self, identity: str) -> int:
        """Points that have got to this destination, or were refused there for good, since the start."""
        return self._arrived.get(identity, 0)

    def still_s(self) -> float:
        """How long nothing has moved."""
        return self._clock() - self._moved

    def words(self) -> str:
        """Each destination's share, and its rate."""
        passed = self._clock() - self._began if self._began is not None else 0.0
        parts = []
        for d in self._destinations:
            arrived = self._arrived[d.id]
            rate = f" ({arrived / passed:,.0f}/s)" if arrived and passed > 0.5 else ""
            parts.append(f"{d.kind} {arrived:,} of {max(d.waiting, arrived):,} points{rate}")
        return ", ".join(parts)


class Watch:
    """Listens in on the exporters of a shipper: `build` makes them, `trouble` is what they say when they won't."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}
        self._asked: set[str] = set()

    def build(self, destination: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> Exporter:
        """The destination's exporter, listened in on."""
        identity = str(destination["id"])
        try:
            return _Heard(registry.build(destination, secrets, environ), identity, self)
        except TraceletError as error:
            self._said[identity] = str(error)
            raise

    def trouble(self) -> dict[str, str]:
        """By destination id: why its last answer was "not now"."""
        return dict(self._said)

    def is_asking(self) -> bool:
        """Whether a destination that is well is being sent something at this moment: a large file takes its time."""
        return bool(self._asked - self._said.keys())

    def ask(self, identity: str, question: Callable[[], Answer]) -> Answer:
        """Put `question` to a destination and remember its answer. One thread a destination."""
        self._asked.add(identity)
        try:
            answer = question()
        except Exception as error:  # passed on: the loop counts it, says it, and tries again
            self._said[identity] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._asked.discard(identity)
        if isinstance(answer, RetryLater):
            self._said[identity] = answer.reason
        else:
            self._said.pop(identity, None)
        return answer


class _Heard:
    """An exporter whose answers a `Watch` hears; in all else the exporter itself."""

    def __init__(self, exporter: Exporter, identity: str, watch: Watch) -> None:
        self._exporter = exporter
        self._identity = identity
        self._watch = watch
        self.max_points = exporter.max_points
        self.linger_s = exporter.linger_s
        self.rising_limit_s = exporter.rising_limit_s

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        return self._watch.ask(self._identity, lambda: self._exporter.open(run, memory))

    def memory(self) -> Mapping[str, Any]:
        return self._exporter.memory()

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> Delivery:
        return _HeardDelivery(self._exporter.begin(batch, note), self._identity, self._watch)

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        self._exporter.beat(batch, heartbeat)

    def close(self) -> None:
        self._exporter.close()


class _HeardDelivery:
    def __init__(self, delivery: Delivery, identity: str, watch: Watch) -> None:
        self._delivery = delivery
        self._identity = identity
        self._watch = watch

    @property
    def note(self) -> Mapping[str, Any]:
        return self._delivery.note

    def attempt(self) -> Answer:
        return self._watch.ask(self._identity, self._delivery.attempt)
