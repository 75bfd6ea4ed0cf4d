"""The gateway's inside: what came over the wire goes into the spool, and from there to MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelet.exporters import registry
from tracelet.gateway.callers import Caller, Forbidden, Full, IntakeInfo, Taken
from tracelet.shipper.shipment import Build
from tracelet.shipper.site import Clock

if TYPE_CHECKING:
    from tracelet.otlp.decode import Decoded

__all__ = ["Caller", "Forbidden", "Full", "Intake", "IntakeInfo", "Taken"]


class Intake:
    """Takes decoded requests into a spool folder for each run, and ships them from there."""

    def __init__(
        self,
        root: Path,
        destinations: Sequence[Mapping[str, Any]],
        secrets: Mapping[str, Mapping[str, Any]],
        environ: Mapping[str, str],
        *,
        lost_after_s: float = 3600.0,
        sync: bool = True,
        clock: Clock = time,
        max_bytes: int | None = None,
        build: Build = registry.build,
    ) -> None:
        """`secrets` by destination id, as `tracelet.launch` hands them to a shipper."""
        raise NotImplementedError

    def start(self) -> None:
        """Find what is there from before, and begin to ship it."""
        raise NotImplementedError

    def take(self, decoded: Decoded, caller: Caller) -> Taken:
        """Store what is ours of a request; returns only when it is on the disk."""
        raise NotImplementedError

    def run_info(self) -> IntakeInfo:
        """The numbers for /metrics."""
        raise NotImplementedError

    def close(self, grace_s: float = 0.0) -> None:
        """Take nothing more, deliver for `grace_s` at most, and leave the rest for the next start."""
        raise NotImplementedError
