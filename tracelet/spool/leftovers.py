"""What killed processes left half made in a run's folder, under names that begin with a dot: deleted when it is safe.

Whoever makes such a file renames it to its name a moment later, or is dead. By whom it was made tells when none of that
kind can be under way:

    .lease.json.*  .spare-*  .*.seal.*         who has the shipper's lock, in one thread: the caller of `sweep`
    .manifest.json.*  .manifest.copy.json.*    who has the manifest's lock: `sweep` takes it
    .<writer>.lock                             a writer that has not appeared yet, and holds a lock on it as it lives
    .journal-<destination>.*                   who writes that journal, and looks when it opens it (`cursor.Journal`)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tracelet.spool import store

__all__ = ["UNBORN_S", "sweep"]

UNBORN_S = 60.0
"""A writer takes the lock in the microseconds after it has made its file: a free one this old is nobody's."""

_OF_SHIPPER = re.compile(r"\.(lease\.json\.\d+\.\d+|spare-\d+\.points\.\d+|[0-9a-f]{16}-\d{6,}\.seal\.\d+)")
_OF_MANIFEST = re.compile(r"\.manifest(\.copy)?\.json\.\d+\.\d+")
_UNBORN = re.compile(r"\.([0-9a-f]{16})\.lock")


def sweep(folder: Path, *, now_s: float, ask_locks: bool) -> int:
    """Delete what no living process can be at work on; returns how many files.

    Only under the shipper's lock, in the thread that makes spares, seals and leases, on the writers' own host.
    `ask_locks`: look at writers' locks; not where a writer may be of this process, which would lose its lock by that.
    """
    names = [name for name in os.listdir(folder) if name.startswith(".")]
    swept = _delete(folder, filter(_OF_SHIPPER.fullmatch, names))
    if any(map(_OF_MANIFEST.fullmatch, names)):
        with store.held_manifest(folder):
            swept += _delete(folder, filter(_OF_MANIFEST.fullmatch, os.listdir(folder)))
    for found in filter(None, map(_UNBORN.fullmatch, names)) if ask_locks else ():
        swept += _sweep_unborn(folder, found.group(1), folder / found.group(), now_s)
    return swept


def _delete(folder: Path, names: Iterable[str]) -> int:
    deleted = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
            deleted += 1
    return deleted


def _sweep_unborn(folder: Path, writer: str, lock: Path, now_s: float) -> int:
    """The files of a writer that died before it appeared: no reader knows of them, and no call of it has returned."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        if now_s - os.fstat(fd).st_mtime < UNBORN_S:
            return 0
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0  # it lives
        if not lock.exists():  # it has appeared meanwhile, and died since
            return 0
        return _delete(folder, [path.name for path in folder.glob(f"{writer}-*")]) + _delete(folder, [lock.name])
    finally:
        os.close(fd)
