"""Which runs have been silent for too long: a gateway can't see their processes, so silence is all it has."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["AFTER_START_S", "Silence"]

AFTER_START_S = 300.0
"""After a start of the gateway, how long its senders have to come back before their silence counts."""


class Silence:
    """When each run that has not ended was last heard of. From any thread."""

    def __init__(self, after_s: float, *, now: Callable[[], float], after_start_s: float = AFTER_START_S) -> None:
        """`now` is the time of day in seconds: silence goes on while the gateway is down."""
        self._after_s = after_s
        self._now = now
        self._not_before = now() + min(after_s, after_start_s)
        self._heard: dict[str, float] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()

    def heard(self, run_id: str, at: float | None = None) -> None:
        """The run spoke (at that time): it is not lost."""
        with self._lock:
            self._lost.discard(run_id)
            self._heard[run_id] = self._now() if at is None else at

    def ended(self, run_id: str) -> None:
        """Nothing more is expected of it."""
        with self._lock:
            self._lost.discard(run_id)
            self._heard.pop(run_id, None)

    def lost(self, run_id: str) -> None:
        """It is noted as lost."""
        with self._lock:
            self._lost.add(run_id)
            self._heard.pop(run_id, None)

    def overdue(self) -> list[str]:
        """Runs that have been silent for too long, and are not noted as lost yet."""
        now = self._now()
        if now < self._not_before:
            return []
        with self._lock:
            return [run_id for run_id, at in self._heard.items() if now - at >= self._after_s]

    def counts(self) -> tuple[int, int]:
        """How many runs are expected to speak, and how many are lost."""
        with self._lock:
            return len(self._heard), len(self._lost)
