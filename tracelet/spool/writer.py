"""This process's pen into a run's folder: it survives a full segment, a fork, a signal and a stop."""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

from tracelet.errors import SpoolError
from tracelet.guard import guard
from tracelet.spool.disk import is_refusal, may_map, refused
from tracelet.spool.files import Abandoned, FileSet, Gone
from tracelet.spool.points import Address, Log, Seldom, fuse
from tracelet.spool.store import flush_names, make_folder, usage

__all__ = ["Address", "Counts", "Writer"]

_T = TypeVar("_T")
_INT64 = range(-(2**63), 2**63)
_RETRY_AFTER_S = 0.5  # how long points are refused without asking the disk again
_USAGE_FOR_S = 1.0
_STANDING_IN_S = 0.2
_LOOK_EVERY_S = 1.0  # whether the folder is still there, apart from the looks at each roll and frame


class Counts(NamedTuple):
    """What this process has written so far; `refused` had no room (or no writable folder)."""

    points: int
    frames: int
    refused: int


class Writer:
    """The points and frames of one process of a run, one for each Experiment.

    Guarantees:
    - a point whose `log` returned survives the death of the process (`kill -9`), unless `counts().refused` has it;
    - `log` never raises for the disk's sake and never waits for another thread's disk, except at a segment's end;
    - a signal handler or a finalizer may log at any moment, whatever its own thread is doing;
    - in a folder that is deleted meanwhile, what isn't known to be delivered becomes `counts().refused` at the next
      frame, new name or full segment, or at the end; what comes then goes into a new folder.

    Files are made at the first record. The folder has mode 0700, its files 0600.
    """

    log: Log
    """`log(name, value, iteration=None)`: one closure for the Writer's life; see `points.fuse`."""

    def __init__(
        self,
        folder: Path,
        *,
        role: str,
        opening: Callable[[str], tuple[int, bytes]],
        name_frame: Callable[[int, str], tuple[int, bytes]],
        check_name: Callable[[object], str],
        to_float: Callable[[str, object], float],
        to_iteration: Callable[[object], int],
        closed: Callable[[], Exception],
        max_bytes: int | None = None,
        slots_per_segment: int = 32768,
        mapped: bool | None = None,
        repeated_without_iteration: Callable[[str], None] | None = None,
        make: Callable[[], object] | None = None,
        passed: Callable[[str], tuple[int, int]] = lambda writer: (1, 0),
        aside: Callable[[], object] | None = None,
    ) -> None:
        """`make` makes the folder, and what else belongs into a new one; `passed`: the segment and slot of a writer
        that every destination is known to have reached, asked when the folder is gone. `aside` is called after what
        takes long anyway: a full segment, a new name, a frame; without the lock."""
        self._folder = folder
        self._make = make if make is not None else lambda: make_folder(folder)
        self._passed = passed
        self._aside = aside
        self._role = role
        self._opening = opening
        self._name_frame = name_frame
        self._check_name = check_name
        self._to_iteration = to_iteration
        self._closed = closed
        self._max_bytes = max_bytes
        self._capacity = slots_per_segment
        self._mapped = mapped
        self._repeated = repeated_without_iteration
        self._once: set[str] = set()  # names logged once while no iteration was ever given
        # Re-entrant, and `_depth` tells re-entry: a signal handler that logs a new name while its own thread is in
        # here would otherwise wait for itself. It writes to the set of files of its depth instead.
        self._lock = threading.RLock()
        self._depth = 0
        self._sets: dict[int, FileSet] = {}
        self._inherited: list[FileSet] = []
        self._stranded: list[FileSet] = []
        self._ended = False
        self._end_due: tuple[int, bytes, bytes, int] | None = None
        self._refused = 0
        self._gone_points = 0  # of files that were deleted
        self._lost = 0  # of these, how many nobody is known to have
        self._looked_at = 0.0
        self._retry_at = 0.0
        self._used = 0
        self._used_at = -_USAGE_FOR_S
        self._voids_before_fork = 0
        self._seldom = Seldom(to_float, to_iteration, self._slow, self._without_iteration)
        self._fused = fuse(self._seldom, check_name)
        self.log = self._fused.log

    # ---- what callers use -------------------------------------------------------------------------------------

    def log_many(self, values: Mapping[str, object], iteration: int | None = None) -> None:
        """Log several metrics with one time; if one name or value is wrong, raises before anything is written."""
        self._fused.log_many(values, iteration)

    def open(self) -> None:
        """Make this process's files now, instead of at its first record; without room that comes again there."""
        with contextlib.suppress(OSError, SpoolError):
            self._locked(lambda files: None)

    def frame(self, kind: int, payload: bytes, time_unix_nano: int) -> Address:
        """Append one frame and return where its slot is.

        Raises:
            SpoolFull: no room; nothing was written.
            SpoolError: the folder can't be written, for another reason.
        """
        try:
            return self._locked(lambda files: files.frame(kind, payload, time_unix_nano), look=True)
        except OSError as error:
            raise refused(self._folder, error) from error

    @property
    def iteration(self) -> int:
        """The current iteration: 0 before any was set."""
        return self._seldom.current or 0

    def set_iteration(self, iteration: int) -> None:
        """Make `iteration` the one that a log call without an own one takes."""
        if type(iteration) is not int or iteration not in _INT64:
            iteration = self._to_iteration(iteration)
        self._seldom.current = iteration

    @property
    def writer_id(self) -> str | None:
        """The id of this process's main set of files; None before the first record."""
        files = self._sets.get(0)
        return files.writer if files is not None else None

    def writer_ids(self) -> tuple[str, ...]:
        """All ids of this process: nobody in it may open their lock files (that would drop the lock)."""
        return tuple(files.writer for files in list(self._sets.values()))

    def heads(self) -> tuple[Address, ...]:
        """The next slot of every set of files: what is below has been logged. See `Progress.reached`."""
        return tuple(files.head() for files in list(self._sets.values()))

    def counts(self) -> Counts:
        """How much this process has logged."""
        sets = list(self._sets.values())
        written = self._gone_points + sum(files.points() for files in sets)
        doubtful = sum(files.doubtful()[0] for files in sets)
        points = written - self._lost - doubtful - (self._seldom.voids - self._voids_before_fork)
        return Counts(max(0, points), sum(files.frames for files in sets), self._refused + doubtful)

    @property
    def delivered_before(self) -> int:
        """Points known to be delivered from files that were deleted since; no journal has them any more."""
        return self._gone_points - self._lost

    def sync(self) -> None:
        """Flush to the disk itself, for power loss; a process's death needs none. Waits for the disk, and nobody else.

        Raises:
            SpoolError: some of what was logged is not on the disk; where the disk would not take it, it may never be.
        """
        sets = list(self._sets.values())
        if not sets:
            return
        try:
            for files in sets:
                files.sync(self._lock)
            flush_names(self._folder)
        except OSError as error:
            then = "It can still be delivered, from memory; new runs need another disk (TRACELET_DIR)"
            if not is_refusal(error):
                then = "The disk was not asked: flush again once this process may open files (ulimit -n)"
            raise SpoolError(
                f"the spool folder {self._folder} could not be flushed to the disk ({error.strerror or error}):"
                f" what was logged there would not survive a loss of power. {then}",
                folder=str(self._folder),
            ) from error

    def end(self, kind: int, payload: bytes, time_unix_nano: int, *, brief: bytes | None = None) -> None:
        """Make new calls raise, wait briefly for threads inside, and write the END of every set of files.

        Room for a payload of 8 kB is kept from the start, so a full disk, or TRACELET_MAX_BYTES, hinders no end.
        `brief`: what to write in its place if it is longer than that and has no room.

        Called by a signal handler while its own thread is writing, the END follows when that write is done.
        """
        self._ended = True
        self._fused.publish(None)
        with self._lock:
            if self._end_due is None:
                self._end_due = (kind, payload, payload if brief is None else brief, time_unix_nano)
            if self._depth == 0:
                self._write_end()

    def after_fork_in_child(self) -> None:
        """Leave the parent's files alone from here on; no I/O. The next record opens own ones, with role "child"."""
        self._fused.publish(None)
        for files in self._sets.values():
            files.abandoned = True
        self._inherited.extend(self._sets.values())
        self._sets = {}
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._depth = 0
        self._role = "child"
        self._end_due = None
        self._refused = self._gone_points = self._lost = 0
        self._retry_at = 0.0
        self._voids_before_fork = self._seldom.voids

    # ---- under the lock ---------------------------------------------------------------------------------------

    def _locked(self, act: Callable[[FileSet], _T], *, look: bool = False) -> _T:
        """Run `act` on the files of this depth; raises `closed()` after the end. `look`: are they still there?"""
        while True:
            with self._lock:
                if self._ended:
                    raise self._closed()
                depth = self._depth
                self._depth = depth + 1
                try:
                    files = self._files(depth, look=look)
                    done = act(files)
                    self._tell_doubts(files)
                    return done
                except Abandoned:
                    continue  # forked meanwhile: once more, with files of our own
                except Gone:
                    self._give_up(depth)
                    continue
                finally:
                    self._depth = depth
                    if self._end_due is not None and depth == 0:
                        self._write_end()

    def _tell_doubts(self, files: FileSet) -> None:
        slots, said = files.doubtful()
        if said is not None:
            guard.limited(
                "keep what was written",
                "%d records in the spool folder %s were written, and then not kept (%s): they count as refused, though"
                " some of them may still be delivered from memory",
                slots,
                self._folder,
                said.strerror or said,
            )

    def _files(self, depth: int, *, look: bool = False) -> FileSet:
        files = self._sets.get(depth)
        if files is not None and (look or time.monotonic() - self._looked_at >= _LOOK_EVERY_S):
            self._looked_at = time.monotonic()
            if not files.abandoned and not files.is_there():
                self._give_up(depth)
                files = None
        if files is None:
            files = self._open("overflow" if depth else self._role)
            self._sets[depth] = files
        if not files.visible:
            files.appear()
        return files

    def _give_up(self, depth: int) -> None:
        """Count what stands in files that were deleted. Only those of this depth: below it somebody is at work."""
        files = self._sets.pop(depth)
        if depth == 0:
            self._fused.publish(None)
        # An error is of a file system that is gone, too: a slot more or less, in an upper bound.
        with contextlib.suppress(OSError):
            files.segment.seize()
            self._void(files)
        points = files.points()
        segment, slot = self._passed(files.writer)
        known = (segment - 1) * self._capacity + slot - files.frames  # at least so many of the slots were points
        lost = points - max(0, min(points, known))
        self._close(files)
        self._gone_points += points
        self._lost += lost
        self._refused += lost
        guard.limited(
            f"keep {self._folder}",
            "the spool folder %s was deleted under the run, or its disk unmounted, or its files closed: up to %d points"
            " are lost, and what else had not been delivered. What is logged from now on goes into new files there",
            self._folder,
            lost,
        )

    def _close(self, files: FileSet) -> None:
        if not files.is_open():
            # Somebody closed our descriptors by number, and what is open under them now is his. A mapping has one that
            # can't be looked at, and closes it when it goes: so it never goes.
            self._stranded.append(files)
        files.close()

    def _open(self, role: str) -> FileSet:
        while self._inherited:
            self._close(self._inherited.pop())
        self._make()
        if self._mapped is None:
            self._mapped = may_map(self._folder)
        kind, payload = self._opening(role)
        opening = (kind, payload, time.time_ns())
        return FileSet(self._folder, opening, self._capacity, self._mapped, self._admit, end_kept=True)

    def _admit(self, size: int) -> None:
        if self._max_bytes is None:
            return
        now = time.monotonic()
        if now - self._used_at >= _USAGE_FOR_S:
            self._used, self._used_at = usage(self._folder), now
        if self._used + size > self._max_bytes:
            raise OSError(errno.EDQUOT, f"TRACELET_MAX_BYTES ({self._max_bytes:,}) is reached")
        self._used += size

    def _publish(self, files: FileSet, depth: int) -> None:
        if depth == 0 and not files.abandoned and not self._ended:
            self._fused.publish(files.segment)

    def _slow(self, name: str, value: float, iteration: int, time_unix_nano: int) -> None:
        """A point that the cells of `log` can't take; refused points are counted, never raised."""
        if self._ended:
            raise self._closed()
        main = self._sets.get(0)
        if type(name) is not str or main is None or name not in main.ids:
            name = self._check_name(name)
        if type(iteration) is not int or iteration not in _INT64:  # a float in a range is looked for one by one
            iteration = self._to_iteration(iteration)
        if time.monotonic() < self._retry_at:
            self._refused += 1
            return
        time_unix_nano = max(time_unix_nano, 0)

        def write(files: FileSet) -> None:
            depth = self._depth - 1
            metric_id = files.id_of(name, self._name_frame, time_unix_nano)
            files.point(time_unix_nano, value, iteration, metric_id)
            self._publish(files, depth)

        try:
            self._locked(write)
        except (OSError, SpoolError) as error:
            self._refused += 1
            self._retry_at = time.monotonic() + _RETRY_AFTER_S
            why = refused(self._folder, error) if isinstance(error, OSError) else error
            guard.limited("write a point", "points are not recorded (%d so far): %s", self._refused, why)
        if self._aside is not None:
            self._aside()

    def _without_iteration(self, name: str) -> int:
        """0, for a call without an iteration while none was ever set; says so once, at a name's second."""
        if type(name) is not str:  # refused a step later, by name
            return 0
        if name in self._once:
            self._once.clear()
            self._seldom.current = 0
            if self._repeated is not None:
                self._repeated(name)
        else:
            self._once.add(name)
        return 0

    # ---- the end ----------------------------------------------------------------------------------------------

    def _write_end(self) -> None:
        """Write the END of each set; at depth 0 and under the lock. What can't be written is for the reader to find
        by the lock: it is free at this process's end."""
        due = self._end_due
        if due is None:
            return
        for depth, files in list(self._sets.items()):
            if files.ended:
                continue
            try:
                if not files.abandoned and not files.is_there():
                    self._give_up(depth)
                    if depth:
                        continue
                    files = self._files(depth)  # noqa: PLW2901 - in a new folder: the run's end is news all the same
                files.segment.seize()
                self._void(files)
                kind, payload, brief, time_unix_nano = due
                try:
                    files.end(kind, payload, time_unix_nano)
                except OSError:
                    files.end(kind, brief, time_unix_nano)
            except (OSError, SpoolError) as error:
                guard.note("write the end of the run to its spool", error)
            else:
                self._tell_doubts(files)
                with guard("close the files of the run"):  # a file system may say only here what it has not kept
                    files.close()

    def _void(self, files: FileSet) -> None:
        """Close slots that no thread stands in; waits a moment for those that do."""
        segment = files.segment
        until = time.monotonic() + _STANDING_IN_S
        while segment.open_slots():
            me = threading.get_ident()
            if not any(self._stands_in_slot(frame) for thread, frame in sys._current_frames().items() if thread != me):
                segment.void_open()
                return
            if time.monotonic() > until:
                return  # still in there: left open, skipped by readers once this process is gone
            time.sleep(0.001)

    def _stands_in_slot(self, frame: FrameType | None) -> bool:
        inside = (self._fused.log.__code__, self._fused.log_many.__code__)  # type: ignore[attr-defined]
        while frame is not None:
            if frame.f_code is Writer._slow.__code__:
                return False  # waits for the lock, without a slot
            if frame.f_code in inside:
                return True
            frame = frame.f_back
        return False
