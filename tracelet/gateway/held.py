"""The folder of files that were put to the gateway: what is whole, which events still need it, and when it goes.

    <run>/<sha256>                   a whole file, compared and flushed
    <run>/<sha256>.<token>.part      one that a token is putting (<sha256>.part without tokens)
    <run>/<sha256>.for-<event>       said to be there to the sender of that event, which may be still on its way
    <run>/<sha256>.had-<event>       MLflow has it for that event: written by the exporter, for which it goes from -for

A file goes once it was had, and no event is left that it is kept for. What says so are files, so that any death leaves
something to go on with: an event that comes twice finds its `had`.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tracelet.exporters.artifact_names import had_name, wanted_name
from tracelet.guard import logger

__all__ = ["UNCLAIMED_S", "HeldFiles", "Place"]

UNCLAIMED_S = 30 * 24 * 3600.0
"""How long a whole file stays of which no event has come to be delivered: longer than any queue holds one back."""

_UNFINISHED_S = 24 * 3600.0
_READ = 1 << 20
_FRESH_S = 2.0  # a folder that changed so short before it was looked at may change again without another time of change
_WHOLE = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one file of a run is put by one token, for one event (empty: the sender named none)."""

    folder: Path
    sha256: str
    part: Path
    event: str

    @property
    def whole(self) -> Path:
        """The file once it is complete."""
        return self.folder / self.sha256

    @property
    def wanted(self) -> Path:
        """Its mark while the event may still need it."""
        return self.folder / wanted_name(self.sha256, self.event)

    def size(self) -> int:
        """How much of it is there, whole or not."""
        return _size(self.whole) or _size(self.part)

    @property
    def had(self) -> Path:
        """Its mark once MLflow has it."""
        return self.folder / had_name(self.sha256, self.event)


class HeldFiles:
    """Everything below `folder`; any thread.

    `is_over(run_id)` tells whether nothing of a run waits to be delivered. Of one file at a time only one request
    writes: that is the caller's to see to.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_over: Callable[[str], bool] = lambda run_id: True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._is_over = is_over
        self._clock = clock
        self._lock = threading.Lock()  # of names: between a look at a file's marks and what follows from it
        self._counting = threading.Lock()
        self._settled: dict[Path, float] = {}  # run -> its folder's time of change, when nothing was to be done there
        self._parts: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._bytes = _bytes_in(folder)

    def size(self) -> int:
        """Bytes: what stands there, unfinished uploads too."""
        return self._bytes

    def place(self, run_id: str, sha256: str, token: str, event: str) -> Place:
        """Where that goes; no disk is touched. Run and digest have to be plain names."""
        mine = "." + hashlib.sha256(token.encode()).hexdigest()[:16] if token else ""  # it may be any text
        folder = self._folder / run_id
        return Place(folder, sha256, folder / f"{sha256}{mine}.part", event)

    # ---- what is there ------------------------------------------------------------------------------------------

    def promised(self, place: Place) -> bool:
        """Whether it is there, whole, for this event: from now on it stays until that is delivered.

        True as well where MLflow has it for that very event, and asked again since an answer was lost.
        """
        with self._lock:
            if place.event and place.had.exists():
                return True
            if not place.whole.exists():
                return False
            self._want(place)
            return True

    @staticmethod
    def _want(place: Place) -> None:
        if not place.wanted.exists():
            os.close(os.open(place.wanted, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            _sync(place.folder)
        else:
            os.utime(place.wanted)

    # ---- writing ------------------------------------------------------------------------------------------------

    def open(self, place: Place) -> int:
        """A descriptor that appends to the unfinished file; `close` it.

        Raises:
            OSError: it can't be made.
        """
        with self._lock:
            place.folder.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            handle = os.open(place.part, flags, 0o600)
            self._parts.add(place.part)
        return handle

    def close(self, handle: int, place: Place) -> None:
        """The request is over; what came stays."""
        os.close(handle)
        self._parts.discard(place.part)

    def write(self, handle: int, data: bytearray) -> int:
        """Append all of `data`; its length."""
        view = memoryview(data)
        while view:
            written = os.write(handle, view)
            self._count(written)
            view = view[written:]
        return len(data)

    def finish(self, handle: int, place: Place) -> str | None:
        """Compare with the digest, flush, and give it its name. Bytes that differ are thrown away: their digest."""
        digest = hashlib.sha256()
        with open(place.part, "rb") as file:
            while piece := file.read(_READ):
                digest.update(piece)
        if digest.hexdigest() != place.sha256:
            self._count(-_size(place.part))
            place.part.unlink()
            return digest.hexdigest()
        os.fsync(handle)
        with self._lock:
            self._want(place)  # before it appears: a whole file that nobody wants would go
            self._count(-_size(place.whole))  # another token's, of the same bytes
            os.replace(place.part, place.whole)
            _sync(place.folder)
            _sync(self._folder)
        return None

    def _count(self, change: int) -> None:
        with self._counting:
            self._bytes += change

    # ---- going --------------------------------------------------------------------------------------------------

    def clear(self) -> int:
        """Delete what MLflow has and no event needs any more; how many files that were.

        Cost: one look at each run's folder, and inside only where something has changed.
        """
        gone = 0
        for folder in self._runs():
            try:
                changed = folder.stat().st_mtime
            except FileNotFoundError:
                continue
            if self._settled.get(folder) == changed:
                continue
            now = time.time()
            with self._lock:
                for sha256, marks in _grouped(folder).items():
                    if "" in marks and _any(marks, ".had-") and not _any(marks, ".for-"):
                        gone += self._delete(folder, sha256)
            if now - changed > _FRESH_S:
                self._settled[folder] = changed
        return gone

    def sweep(self) -> int:
        """Delete uploads that nobody went on with for a day, files that no event came for, and marks as old as these;
        how many files with bytes went."""
        gone, now = self.clear(), self._clock()
        for folder in self._runs():
            with self._lock:
                for sha256, marks in _grouped(folder).items():
                    parts = [mark for mark in marks if mark.endswith(".part")]
                    for part in (folder / f"{sha256}{mark}" for mark in parts):
                        if part not in self._parts and _age(part, now) > _UNFINISHED_S:
                            gone += self._unlink(part)
                    gone += self._sweep_whole(folder, sha256, [mark for mark in marks if mark not in parts], now)
                self._remove_if_empty(folder)
        if gone:
            logger.info("gateway: %d files of runs are deleted: not finished within a day, or not needed", gone)
        return gone

    def _sweep_whole(self, folder: Path, sha256: str, marks: list[str], now: float) -> int:
        if not marks or min(_age(folder / f"{sha256}{mark}", now) for mark in marks) <= UNCLAIMED_S:
            return 0
        if "" in marks:
            if not self._is_over(folder.name):
                return 0
            days = round(UNCLAIMED_S / 86400)
            logger.warning("gateway: file %s of run %s goes: no event for it in %d days", sha256, folder.name, days)
        whole = self._unlink(folder / sha256)
        for mark in marks:
            (folder / f"{sha256}{mark}").unlink(missing_ok=True)
        return whole

    def _runs(self) -> list[Path]:
        return [Path(one.path) for one in os.scandir(self._folder) if one.is_dir(follow_symlinks=False)]

    def _delete(self, folder: Path, sha256: str) -> int:
        _sync(folder)  # the mark that allows it first
        return self._unlink(folder / sha256)

    def _unlink(self, path: Path) -> int:
        size = _size(path)
        try:
            path.unlink()
        except FileNotFoundError:
            return 0
        self._count(-size)
        return 1

    def _remove_if_empty(self, folder: Path) -> None:
        try:
            folder.rmdir()
        except OSError:
            return
        self._settled.pop(folder, None)


def _grouped(folder: Path) -> dict[str, list[str]]:
    """By digest, what stands behind it in the names of a run's folder; "" is the whole file."""
    found: dict[str, list[str]] = {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return found
    for name in names:
        if _WHOLE.fullmatch(name[:64]):
            found.setdefault(name[:64], []).append(name[64:])
    return found


def _any(marks: list[str], head: str) -> bool:
    return any(mark.startswith(head) for mark in marks)


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _bytes_in(folder: Path) -> int:
    return sum(_size(path) for path in folder.glob("*/*") if len(path.name) == 64 or path.name.endswith(".part"))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
