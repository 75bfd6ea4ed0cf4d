"""Whose a run is, and who may write to it: one rule, for telemetry and for files; and whether anything of it waits."""

from __future__ import annotations

from pathlib import Path

from tracelet.errors import ConfigError
from tracelet.gateway.callers import Caller
from tracelet.gateway.runs import FOLDER, owner_of
from tracelet.ids import valid_run_id
from tracelet.spool.store import Manifest, read_manifest

__all__ = ["foreign_project", "foreign_run", "nothing_waits", "why_not"]


def foreign_project(project: str, caller: Caller) -> str | None:
    """Why `caller` may write nothing of this project; None if it may."""
    if caller.projects is None or project in caller.projects:
        return None
    return f"its project {project!r} is none of those that token {caller.name!r} may write"


def foreign_run(manifest: Manifest, caller: Caller) -> str | None:
    """Why `caller` may write nothing to this run; None if it may, as anybody may where the run is nobody's."""
    reason, owner = foreign_project(manifest.project, caller), owner_of(manifest)
    if reason is None and caller.name and owner not in ("", caller.name):
        reason = f"it belongs to token {owner!r}, not to {caller.name!r}"
    return reason


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
    reason = foreign_run(manifest, caller)
    if reason is None or foreign_project(manifest.project, caller) is not None:
        return reason
    return f"{reason}: files are put with a token of the name that the run's telemetry comes with"


def nothing_waits(runs: Path, run_id: str) -> bool:
    """Whether all that came of a run is delivered and cleared away, or nothing ever came."""
    return not any((runs / run_id / FOLDER).glob("*.points"))
