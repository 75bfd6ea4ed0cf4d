"""What a destination is to the shipper: one protocol, three answers.

The shipper hands an exporter a `Batch`, journals the exporter's `note` beside the batch's slot ranges, and then asks
for delivery until the answer is final. Outcomes are values; an exception from an exporter is a fault of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tracelet.records import Batch, Heartbeat, RunInfo

__all__ = ["Answer", "Delivered", "Delivery", "Exporter", "Refusal", "Rejected", "RetryLater"]


@dataclass(frozen=True, slots=True)
class Delivered:
    """The destination has it, for good."""


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Not now; ask the same delivery again after `after_s` (None: by the shipper's own back-off).

    `loud`: a person has to do something (a wrong token, a host name refused); it is logged as a warning at once.
    """

    reason: str
    after_s: float | None = None
    loud: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing the destination will never take, and its own words on why."""

    what: str  # "point", "param", "tag", "artifact", "span", "event"
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON: enough to send it again (shipper/deadletter.py)
    writer: str | None = None  # whose it is, by the id of its part in the batch; None: not told


@dataclass(frozen=True, slots=True)
class Rejected:
    """Everything has been delivered except `items`, which go to the dead-letter file."""

    items: tuple[Refusal, ...]


Answer = Delivered | RetryLater | Rejected


class Delivery(Protocol):
    """One batch on its way to one destination."""

    @property
    def note(self) -> Mapping[str, Any]:
        """JSON that the journal keeps with the batch before the first attempt, and hands back after a restart."""
        ...

    def attempt(self) -> Answer:
        """Send what has not been acknowledged yet. Called again after `RetryLater`; what went is not sent twice."""
        ...


class Exporter(Protocol):
    """A destination. Used by one thread at a time, for one run.

    Guarantees expected of it: a repeat of a batch, in this process or after a restart, has no effect; nothing is
    cut, dropped or changed without a `Refusal` or a place where the whole is kept.

    After a loss of power the journal may lack its last seconds, and what it lacks is sent again in other batches, every
    value with the name, iteration and time that it had. An exporter whose destination would keep both has an
    attribute `shows_repeats` that is true: then the journal is on the disk before a batch leaves, and after its answer.
    """

    max_points: int
    """The most points a batch may hold."""
    linger_s: float
    """How long a batch that is not full may wait."""
    rising_limit_s: float | None
    """How far rising milliseconds may lead the clock before a point is marked dense; None: without limit."""

    def open(self, run: RunInfo, memory: Mapping[str, Any]) -> Answer:
        """Reach the destination and find or create the run there. `memory` is what `memory()` gave last time."""
        ...

    def memory(self) -> Mapping[str, Any]:
        """JSON to be kept in the journal: `run_id` (the run's id there) and `link` (its address), when known."""
        ...

    def begin(self, batch: Batch, note: Mapping[str, Any] | None = None) -> Delivery:
        """Prepare a batch. With `note` the batch was under way when a shipper died: whether it arrived is unclear."""
        ...

    def beat(self, batch: Batch, heartbeat: Heartbeat) -> None:
        """Send the run's state, best effort. `batch` holds the first writer's opening, and no points."""
        ...

    def close(self) -> None:
        """Let connections go. Never waits for a network."""
        ...
