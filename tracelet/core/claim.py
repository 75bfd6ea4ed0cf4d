"""Claims a start's place in its run: the attempt it is, written into the folder's manifest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracelet import ids
from tracelet.errors import SpoolError
from tracelet.settings import Settings
from tracelet.spool import store

__all__ = ["Claim", "claim"]


@dataclass(frozen=True, slots=True)
class Claim:
    """A start's place: its run's folder here, and its attempt as the manifest has it."""

    run_id: str
    folder: Path
    attempt: store.Attempt


def claim(settings: Settings, *, destinations: tuple[Mapping[str, Any], ...], now: int) -> Claim:
    """Make the folder, and put this start into its manifest.

    Raises:
        ConfigError: a `run_id` that can't be one.
        SpoolError: the folder can't be made or written, or is of an unknown format.
    """
    run_id = ids.new_run_id() if settings.run_id is None else ids.valid_run_id(settings.run_id)
    folder = store.run_folder(settings.dir, run_id)
    attempt = store.Attempt(
        key=ids.new_attempt_key(),
        started_unix_nano=now,
        pid=os.getpid(),
        rank=0,
        destinations=destinations,
        shipper=settings.shipper,
        extra={"keep": asdict(settings.keep)},
    )

    def put(before: store.Manifest | None) -> store.Manifest:
        nonlocal attempt
        attempt = dataclasses.replace(attempt, number=_next_number(folder, before))
        return (before or _fresh(settings, run_id)).with_attempt(attempt)

    store.update_manifest(folder, put)
    return Claim(run_id, folder, attempt)


def _fresh(settings: Settings, run_id: str) -> store.Manifest:
    return store.Manifest(run_id, settings.project, settings.experiment_name, settings.experiment_name)


def _next_number(folder: Path, manifest: store.Manifest | None) -> int:
    """One more than any attempt of the run known here has, also before a restart of this machine, or on another host
    that shares the folder. Not by the clock: set back a day, it would make the old attempt the newest."""
    known = [] if manifest is None else [manifest]
    for other in _others(folder):
        try:
            found = store.read_manifest(other)
        except SpoolError:
            continue  # of a version we can't read; it says so where it is shipped
        known += [found] if found is not None else []
    return 1 + max(
        (max(len(one.attempts), *(a.number for a in one.attempts)) for one in known if one.attempts), default=0
    )


def _others(folder: Path) -> list[Path]:
    return [other for other in folder.parent.iterdir() if other != folder and other.is_dir()]
