"""Starts the shipper process, detached, and says whether it can outlive the program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["ShipperProcess", "can_outlive", "start_shipper"]


class ShipperProcess:
    """A shipper that was started: its pid, and whether it has ended. Keep it as long as the run: it reaps the child."""

    pid: int

    def has_ended(self) -> bool:
        """Whether it has ended; reaps it if so. Never waits."""
        raise NotImplementedError


def start_shipper(
    folder: Path,
    secrets: Mapping[str, Mapping[str, object]],
    *,
    environ: Mapping[str, str],
    inherit_stdout: bool = False,
) -> ShipperProcess:
    """Start the shipper of `folder`. Raises OSError if no process can be started; the data waits in the spool."""
    raise NotImplementedError


def can_outlive(environ: Mapping[str, str], *, proc: Path = Path("/proc"), root: Path = Path("/")) -> str | None:
    """None if a shipper outlives the program, else the reason why it can't."""
    raise NotImplementedError
