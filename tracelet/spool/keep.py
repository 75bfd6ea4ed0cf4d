"""What of the delivered may be deleted: TRACELET_KEEP's rule, and the look before each deletion.

What lies in delivered/ was passed by every destination there was. One may be named later (`tracelet ship --to`, the run
again with another backend), and reads the run from its first record on: from that moment what it hasn't passed is
undelivered again. Who names one holds the manifest's lock, and so does who deletes, from its look to its last unlink.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tracelet.errors import SpoolError
from tracelet.spool import store
from tracelet.spool.cursor import Progress, rank_mark, sync_journals
from tracelet.spool.reader import DELIVERED, Position, SpoolReader
from tracelet.spool.seal import read_seal
from tracelet.spool.store import Manifest

__all__ = ["KeepRule", "awaited", "beyond_keep", "delivered_files", "readers_of", "release", "retain"]

_OF_WRITER = re.compile(r"([0-9a-f]{16})-(\d{6,})\.(points|seal|frames)")


@dataclass(frozen=True, slots=True)
class KeepRule:
    """How long and how much of what has been delivered stays readable (TRACELET_KEEP)."""

    seconds: float = 7 * 86400.0
    bytes: int = 2 * 10**9


def readers_of(manifest: Manifest) -> set[str]:
    """The destinations for which a record is kept. Not a console: what it hasn't shown when its program ends is of no
    use to anybody."""
    return {
        identity
        for identity, destination in manifest.destinations.items()
        if not destination.get("in_process") or destination.get("kind") == "live"
    }


def delivered_files(folder: Path) -> list[tuple[float, int, Path]]:
    """What lies in a run's delivered/: time, bytes, path."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in (folder / DELIVERED).iterdir():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat(follow_symlinks=False)
                found.append((stat.st_mtime, stat.st_size, path))
    return found


def awaited(folder: Path) -> Collection[str]:
    """The names of those files in delivered/ that some destination has not passed; all, where nothing tells.

    Cost: reads the manifest and the journals of the run.
    """
    names = [path.name for _, _, path in delivered_files(folder)]
    progress = Progress(folder)
    try:
        manifest = store.read_manifest(folder)
        progress.refresh()
    except (OSError, SpoolError):
        return names
    if manifest is None:
        return names
    ends = {attempt.key for attempt in manifest.attempts if attempt.ended is not None}
    ends |= {rank_mark(attempt.key, int(rank)) for attempt in manifest.attempts for rank in attempt.ranks_ended}
    known = [progress.destinations.get(identity) for identity in readers_of(manifest)]
    if not known:
        return names  # without a destination nothing of a run is delivered
    reader = SpoolReader(folder)
    try:
        segments = reader.all_segments()
    finally:
        reader.close()
    behind = {
        (writer, number): all(one is not None and _is_behind(folder, writer, number, one.positions) for one in known)
        for writer, numbers in segments.items()
        for number in numbers
    }
    over = all(one is not None and all(one.done.get(key) for key in ends) for one in known)
    return [name for name in names if _is_awaited(name, segments, behind, over)]


def _is_awaited(
    name: str, segments: Mapping[str, list[int]], behind: Mapping[tuple[str, int], bool], over: bool
) -> bool:
    """A segment by whoever is not behind it; a writer's frames (its metrics' names) with any of its segments, and
    for the ends of its attempt and of each rank, which are made of them."""
    found = _OF_WRITER.fullmatch(name)
    if found is None:
        return False
    writer, number, kind = found.groups()
    if kind == "frames":
        return not over or not all(behind[writer, one] for one in segments.get(writer, ()))
    return not behind.get((writer, int(number)), True)


def _is_behind(folder: Path, writer: str, number: int, positions: Mapping[str, Position]) -> bool:
    sealed = read_seal(folder, writer, number)  # of one that is damaged only those are behind that stand in a later one
    return store.is_behind(positions.get(writer), number, sys.maxsize if sealed is None else sealed.slots)


def release(folder: Path, paths: Iterable[Path]) -> int:
    """Delete these files of the run's delivered/ but those that are awaited by now; returns the bytes deleted.

    Nobody can name a destination meanwhile. That everybody has them has to be on the disk before: after a loss of power
    a journal that lacks its last seconds would ask for them again, and make an end of a run without its END.

    Raises:
        OSError: the disk would not have the journals, the manifest stays locked, or a file can't be deleted.
    """
    deleted = 0
    sync_journals(folder)
    with contextlib.suppress(FileNotFoundError), store.held_manifest(folder):
        waiting = set(awaited(folder))
        for path in paths:
            if path.name in waiting:
                continue
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                deleted += size
    return deleted


def beyond_keep(folders: Iterable[Path], rule: KeepRule, *, now_s: float) -> dict[Path, list[tuple[Path, int]]]:
    """By run's folder, what lies in its delivered/ beyond `rule`, with its bytes: oldest first, over all of them."""
    files = [(modified, size, path, folder) for folder in folders for modified, size, path in delivered_files(folder)]
    files.sort(key=lambda one: (one[0], one[2].name))
    left = sum(size for _, size, _, _ in files)
    waiting: dict[Path, Collection[str]] = {}
    beyond: dict[Path, list[tuple[Path, int]]] = {}
    for modified, size, path, folder in files:
        if now_s - modified <= rule.seconds and left <= rule.bytes:
            break
        left -= size  # what is awaited is no longer delivered, so that it doesn't count either
        if folder not in waiting:
            waiting[folder] = awaited(folder)
        if path.name not in waiting[folder]:
            beyond.setdefault(folder, []).append((path, size))
    return beyond


def retain(folders: Iterable[Path], rule: KeepRule, *, now_s: float) -> int:
    """Delete what `beyond_keep` names; returns the bytes deleted."""
    beyond = beyond_keep(folders, rule, now_s=now_s)
    return sum(release(folder, [path for path, _ in files]) for folder, files in beyond.items())
