"""What a door that only knows a run's id has to know: whose it is, and whether it waits; from the run's folder."""

from __future__ import annotations

from pathlib import Path

from tracelet.errors import ConfigError
from tracelet.gateway.callers import Caller
from tracelet.gateway.runs import FOLDER
from tracelet.ids import valid_run_id
from tracelet.spool.store import read_manifest

__all__ = ["nothing_waits", "why_not"]


def why_not(runs: Path, run_id: str, caller: Caller) -> str | None:
    """Why `caller` may not put anything to the run; None if it may, as the intake would answer to its telemetry.

    A run that has not been heard of may take anybody's: bytes are put before the event that names them, and a refusal
    could keep the very event from coming that makes the run.

    Cost: one small file is read.
    """
    try:
        manifest = read_manifest(runs / valid_run_id(run_id) / FOLDER)
    except ConfigError:
        return None  # no run of that name is ever taken
    if manifest is None:
        return None
    if caller.projects is not None and manifest.project not in caller.projects:
        return f"its project {manifest.project!r} is none of those that token {caller.name!r} may write"
    owner = str(manifest.extra.get("owner") or "")
    if caller.name and owner not in ("", caller.name):
        return (
            f"it belongs to token {owner!r}, not to {caller.name!r}: files are put with a token of the name that the"
            " run's telemetry comes with"
        )
    return None


def nothing_waits(runs: Path, run_id: str) -> bool:
    """Whether all that came of a run is delivered and cleared away, or nothing ever came."""
    return not any((runs / run_id / FOLDER).glob("*.points"))
