"""What another process needs to write into an attempt; a pickled experiment carries it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tracelet.otlp import semconv
from tracelet.records import Scalar
from tracelet.spool.store import Attempt, Manifest

__all__ = ["Ticket"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """All that another process needs to write into the same attempt; what a pickled experiment carries."""

    folder: str
    run_id: str
    attempt_key: str
    attempt_started_unix_nano: int
    attempt_number: int
    rank: int
    leaves_out: bool  # what the user logs in this rank is another rank's business
    alone: bool  # the attempt has no other ranks
    resource: Mapping[str, Scalar]
    destinations: tuple[Mapping[str, Any], ...]
    shipper: str
    max_bytes: int | None
    grace_s: float
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # as it was at the start
    secrets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    secrets_left_out: bool = False
    keep: Mapping[str, Any] = field(default_factory=dict)  # TRACELET_KEEP, as settings.Keep has it

    def manifest(self) -> Manifest:
        """The manifest of a folder that has nothing but this attempt."""
        attempt = Attempt(
            key=self.attempt_key,
            started_unix_nano=self.attempt_started_unix_nano,
            pid=os.getpid(),
            rank=self.rank,
            number=self.attempt_number,
            order_unix_nano=int(self.resource[semconv.ATTEMPT_ORDER]),
            destinations=self.destinations,
            shipper=self.shipper,
            extra={"keep": dict(self.keep), "max_bytes": self.max_bytes},
        )
        return Manifest(
            run_id=self.run_id,
            project=str(self.resource[semconv.PROJECT]),
            experiment_name=str(self.resource[semconv.EXPERIMENT_NAME]),
            run_name=str(self.resource[semconv.RUN_NAME]),
            attempts=(attempt,),
        )

    def without_secrets(self) -> Ticket:
        """The same, fit to be pickled: the process that unpickles it has an environment of its own."""
        # What a thread of the first process serves (a live exporter) is no secret that a shipper would lack.
        here = {d["id"] for d in self.destinations if d.get("in_process")}
        left_out = self.secrets_left_out or any(name not in here for name in self.secrets)
        return replace(self, secrets={}, environ={}, secrets_left_out=left_out)
