"""Earlier runs that wait in the spool with nobody at work on them, found at a price that a start can pay.

A look at names and dates alone, but for the manifests of what seems to wait: whether it does, `tracelet runs` says.
What has been delivered lies in delivered/, so a segment outside it waits for somebody.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tracelet.errors import SpoolError
from tracelet.guard import guard, logger
from tracelet.spool import home, store

__all__ = ["earlier_runs", "tell"]

ROOT_ENTRIES = 1_000
"""So many runs are looked at by their date; in a folder with more, some are left out."""
NEWEST = 16
"""So many of them, the newest, are looked into."""
_ENTRIES = 1_000  # of one run's folder: enough to meet a segment, where there is one
_FRESH_S = 3 * home.RENEW_S  # by then a shipper that is at work has renewed its lease, and one that starts has begun


def tell(spool: Path, run_id: str) -> None:
    """Say on `logging` which earlier runs than `run_id` wait; whatever is wrong with them, the start goes on."""
    with guard("look for earlier runs"):
        found = list(earlier_runs(spool, run_id))
        if found:
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            logger.warning(
                "%d earlier %s in %s, not all of it delivered, with no shipper at work: %s."
                " `tracelet ship` delivers what is there, `tracelet runs` lists it",
                len(found),
                "run waits" if len(found) == 1 else "runs wait",
                spool,
                shown,
            )


def earlier_runs(spool: Path, run_id: str) -> Iterator[str]:
    """The ids of runs that wait, newest first, without `run_id`, which is only beginning."""
    try:
        with os.scandir(spool) as entries:
            dated = [
                (entry.stat(follow_symlinks=False).st_mtime, entry.name)
                for _, entry in zip(range(ROOT_ENTRIES), entries, strict=False)
                if entry.name != run_id
            ]
    except OSError:
        return
    for _, name in heapq.nlargest(NEWEST, dated):
        try:
            with os.scandir(spool / name) as hosts:
                if any(_waits(Path(host.path)) for host in hosts if host.is_dir(follow_symlinks=False)):
                    yield name
        except OSError:  # a file, or gone, or somebody else's
            continue


def _waits(folder: Path) -> bool:
    return _has_segment(folder) and not _is_served(folder) and _goes_somewhere(folder)


def _has_segment(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(
            entry.name.endswith(".points") and not entry.name.startswith(("spare-", "."))
            for _, entry in zip(range(_ENTRIES), entries, strict=False)
        )


def _is_served(folder: Path) -> bool:
    # Not by the shipper's lock: it may be held by this very process, and a look at one's own lock drops it. The
    # manifest is as new as the start of a run whose shipper is only on its way.
    for name in (home.LEASE, store.MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.stat(folder / name).st_mtime < _FRESH_S:
                return True
    return False


def _goes_somewhere(folder: Path) -> bool:
    """A destination is named that a shipper could serve; a run that was only to be kept waits for nobody."""
    try:
        manifest = store.read_manifest(folder)
    except SpoolError:
        return False  # of a version we can't read, or damaged: `tracelet runs` says so
    return manifest is not None and any(not one.get("in_process") for one in manifest.destinations.values())
