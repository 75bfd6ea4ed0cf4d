"""One set of files of one writer id: its lock, its frames, and the segment its slots go to now."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tracelet.spool.appended import AppendedSegment
from tracelet.spool.disk import CANT_ALLOCATE, NO_ROOM, allocate, is_refusal, sync_file
from tracelet.spool.frames import FrameWriter
from tracelet.spool.lease import WriterLock
from tracelet.spool.points import (
    FRAME,
    HEADER_SIZE,
    POINT,
    SLOT_SIZE,
    Address,
    Header,
    MappedSegment,
    Segment,
    new_base,
    segment_name,
)
from tracelet.spool.reader import DELIVERED

__all__ = ["SPARES", "Abandoned", "FileSet", "Gone"]

SPARES = ("spare-1.points", "spare-2.points")
"""Segments made ahead by the shipper; a writer takes one by renaming it."""


class Abandoned(Exception):
    """These files are the parent's; the forked child has to open its own."""


class Gone(OSError):
    """The folder was deleted: nobody will ever read what stands in these files, or is written to them from now on."""


class FileSet:
    """Opened in one go: a reader sees it (by its lock file) only when its opening frame is written."""

    def __init__(
        self,
        folder: Path,
        opening: tuple[int, bytes, int],
        capacity: int,
        mapped: bool,
        admit: Callable[[int], None],
        *,
        sync_at_roll: bool = False,
        end_kept: bool = False,
    ) -> None:
        """Make the files and write the opening frame (kind, payload, time).

        `sync_at_roll`: flush a full file to the disk before leaving it, so that `sync` is about all that was written.
        `end_kept`: keep a slot and a few kilobytes free all the time, so that `end` has room whatever else has none.

        Raises:
            OSError: the folder can't be written, or has no room.
        """
        self.writer = secrets.token_hex(8)
        self.ids: dict[str, int] = {}
        self.frames = 0
        self.abandoned = False
        self.ended = False
        self.failed: OSError | None = None  # what the disk said to segments that were left
        self._next_id = 0
        self._folder = folder
        self._capacity = capacity
        self._mapped = mapped
        self._admit = admit
        self._sync_at_roll = sync_at_roll
        self._end_kept = end_kept
        self._slots_before = 0  # of segments left behind
        self._voids_before = 0
        self._doubtful_before = 0
        self._next: Segment | None = None  # the one behind `segment`, once that is full
        self._header: Header | None = None  # of the segment that was made, or begun, last
        self._left: dict[str, None] = {}  # files that were left behind since they were last flushed, by name
        self._unflushed: OSError | None = None  # what the disk would not take once, it may never have
        self._lock = WriterLock(folder, self.writer)
        try:
            self._frame_writer = FrameWriter(folder, self.writer, admit, sync_at_roll=sync_at_roll, end_kept=end_kept)
            self.segment: Segment = self._new_segment(1)
            self.frame(*opening)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Take back files that never appeared."""
        self._lock.discard()
        if hasattr(self, "_frame_writer"):
            self._frame_writer.close()
        self._close_segments()
        for path in self._folder.glob(f"{self.writer}-*"):
            path.unlink(missing_ok=True)

    def _close_segments(self) -> None:
        for segment in (getattr(self, "segment", None), self._next):
            if isinstance(segment, AppendedSegment):
                segment.close()

    @property
    def visible(self) -> bool:
        """Whether readers know of these files."""
        return self._lock.visible

    def is_there(self) -> bool:
        """Whether readers can find these files: they know of a writer by its lock. Costs two system calls."""
        return self._lock.is_there()

    def is_open(self) -> bool:
        """Whether the descriptors are still those of these files."""
        return self._lock.is_open()

    def appear(self) -> None:
        """Let readers know."""
        self._lock.appear()

    # ---- segments ---------------------------------------------------------------------------------------------

    def _new_segment(self, number: int) -> Segment:
        path = self._folder / segment_name(self.writer, number)
        # A try that failed (no room behind the header, a signal's handler that raised) may have left a file with a
        # header, and a reader may have seen it, and holds it open. So a second one goes into that very file, with that
        # very header: of slots with the markers of another one the reader would believe none.
        again = self._header is not None and self._header.segment == number
        if self._header is None or not again:
            self._header = Header(self.writer, number, self._capacity, new_base())
        header = self._header
        size = HEADER_SIZE + SLOT_SIZE * self._capacity
        if not self._mapped:
            self._admit(size)  # it grows to that
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                return AppendedSegment(fd, header, end_kept=self._end_kept)
            except BaseException:
                os.close(fd)
                raise
        self._admit(0)  # a spare counts already, but there may be too much of everything
        fd = -1 if again else self._take_spare(path, size)
        if fd < 0:
            self._admit(size)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            allocate(fd, size)  # for a spare too: it costs 1 us where the room is there already
            return MappedSegment(fd, header, end_kept=self._end_kept)
        except OSError as error:
            if error.errno in NO_ROOM:
                os.ftruncate(fd, 0)  # what it has taken is given back; the file stays, a reader may know it
            elif error.errno in CANT_ALLOCATE:
                self._mapped = False
                return self._new_segment(number)
            raise
        finally:
            os.close(fd)  # the mapping has its own

    def _take_spare(self, path: Path, size: int) -> int:
        for spare in SPARES:
            try:
                if os.stat(self._folder / spare).st_size != size:  # made for writers with another capacity
                    continue
                os.rename(self._folder / spare, path)
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue
            if os.fstat(fd).st_size == size and os.pread(fd, HEADER_SIZE, 0).count(0) == HEADER_SIZE:
                return fd
            os.close(fd)  # made for another size; the caller makes the file anew
        return -1

    def _have_room(self) -> None:
        """See that the next record has a slot: of a full segment the one kept for the END, once there is another one.

        Raises:
            OSError: there is none to be had.
        """
        if self._next is None and self.segment.head() >= self.segment.capacity:
            if not self.is_there():
                raise Gone(errno.ENOENT, "the folder was deleted")
            if self._sync_at_roll:
                self._sync_segment()
            self._next = self._new_segment(self.segment.number + 1)

    def _roll(self) -> None:
        """Go on in the next segment."""
        old, new = self.segment, self._next
        assert new is not None, "made by `_have_room`"
        if isinstance(new, MappedSegment):
            new.learn(self.ids)
        if not self._sync_at_roll:
            self._left[segment_name(self.writer, old.number)] = None
        self.segment, self._slots_before, self._voids_before, self._next = (
            new,
            self._slots_before + old.head(),
            self._voids_before + old.voids,
            None,
        )
        if isinstance(old, AppendedSegment):
            if self._end_kept:
                old.sync()  # nobody looks after it any more
            old.close()
            self._doubtful_before += old.doubtful
            self.failed = old.failed or self.failed

    # ---- records ----------------------------------------------------------------------------------------------

    def _put(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> Address:
        if self.abandoned:
            raise Abandoned
        while True:
            segment = self.segment
            slot = segment.put(time_unix_nano, value, iteration, metric_id, kind)
            if slot is None:
                self._have_room()
                slot = segment.put_last(time_unix_nano, value, iteration, metric_id, kind)
                self._roll()
            if slot is not None:
                return Address(self.writer, segment.number, slot)

    def frame(self, kind: int, payload: bytes, time_unix_nano: int) -> Address:
        """Write a frame and then its slot.

        Raises:
            OSError, SpoolError: as `FrameWriter.append`.
        """
        if self.abandoned:
            raise Abandoned
        self._have_room()  # first, so that a full disk leaves no frame without a slot
        number, offset = self._frame_writer.append(kind, payload)
        address = self._put(time_unix_nano, 0.0, offset, number, FRAME)
        self.frames += 1
        return address

    def id_of(self, name: str, name_frame: Callable[[int, str], tuple[int, bytes]], time_unix_nano: int) -> int:
        """The metric id of `name`; a new one is used only after its frame and slot are written."""
        metric_id = self.ids.get(name)
        if metric_id is None:
            metric_id = self._next_id
            self._next_id = metric_id + 1  # an id whose frame was interrupted is never used again
            self.frame(*name_frame(metric_id, name), time_unix_nano)
            self.ids[name] = metric_id
            if isinstance(self.segment, MappedSegment):
                self.segment.learn({name: metric_id})
        return metric_id

    def point(self, time_unix_nano: int, value: float, iteration: int, metric_id: int) -> Address:
        """Write one point, rolling as needed."""
        return self._put(time_unix_nano, value, iteration, metric_id, POINT)

    def points_at_once(self, records: bytearray) -> None:
        """Write many points (as `pack_points` made them), rolling as needed; for files that are not mapped.

        Raises:
            OSError: some of them may have been written, and some slots stay open: close these files and open others.
        """
        with memoryview(records) as left:
            at = 0
            while at < len(left):
                self._have_room()
                if self._next is not None:
                    self._roll()
                segment = self.segment
                assert isinstance(segment, AppendedSegment), "mapped files are filled one by one, by the hot path"
                at += SLOT_SIZE * segment.put_many(left[at:])

    # ---- numbers and ends -------------------------------------------------------------------------------------

    def head(self) -> Address:
        """The next slot."""
        segment = self.segment
        return Address(self.writer, segment.number, segment.head())

    def points(self) -> int:
        """How many points were written here (interrupted calls in the mapped hot path are taken off by the caller)."""
        segment = self.segment
        return self._slots_before + segment.head() - self.frames - self._voids_before - segment.voids

    def doubtful(self) -> tuple[int, OSError | None]:
        """How many slots were written and may not have reached the disk, as it said afterwards; and its words."""
        segment = self.segment
        if isinstance(segment, AppendedSegment) and segment.failed is not None:
            return self._doubtful_before + segment.doubtful, segment.failed
        return self._doubtful_before, self.failed

    def sync(self, lock: AbstractContextManager[object]) -> None:
        """Bring all that was written to the disk itself, for power loss. Others may write on meanwhile.

        `lock`: the writer's, taken for a look at which files these are.

        Raises:
            OSError: the disk has not taken all of it, now or at an earlier call: what it refused the kernel no longer
                counts as waiting to be written, so the next flush alone would say that all is well.
        """
        with lock:
            segment = self.segment
            left = [*self._left, *self._frame_writer.left]
            names = [*left, segment_name(self.writer, segment.number)]
            asked = segment.unsynced() if isinstance(segment, AppendedSegment) else 0
            fds = self.to_sync()
        try:
            for fd in fds:
                os.fdatasync(fd)
            for name in names:  # by name: a mapping's own flush holds the interpreter's lock as long as the disk takes
                self._sync_named(name)
        except OSError as error:
            if not is_refusal(error):
                raise
            self._unflushed = self._unflushed or error
            with lock:
                self._doubt(segment, asked, error)
        finally:
            for fd in fds:
                os.close(fd)
        with lock:  # what the disk has said once, to whomever, it says to nobody again
            self._unflushed = self._unflushed or self.doubtful()[1]
        if self._unflushed is not None:
            raise self._unflushed
        for name in left:
            self._left.pop(name, None)
            self._frame_writer.left.pop(name, None)

    def _doubt(self, segment: Segment, slots: int, error: OSError) -> None:
        """Count `slots` of an appended segment as its own `sync` would have, had the disk said it to that one."""
        if segment is self.segment and isinstance(segment, AppendedSegment):
            segment.doubt(error)
        elif slots:  # left meanwhile, with what it had heard
            self._doubtful_before += slots
            self.failed = error

    def _sync_named(self, name: str) -> None:
        for folder in (self._folder, self._folder / DELIVERED):
            with contextlib.suppress(FileNotFoundError):  # moved, or even deleted, after its delivery
                sync_file(folder / name)
                return

    def to_sync(self) -> list[int]:
        """Duplicates of the descriptors that a flush is about, for the caller to flush and to close."""
        fds = [self._frame_writer.descriptor]
        if isinstance(self.segment, AppendedSegment):
            fds.append(self.segment.fd)
        copies: list[int] = []
        try:
            for fd in fds:
                if fd >= 0:
                    copies.append(os.dup(fd))
        except OSError:
            for fd in copies:
                os.close(fd)
            raise
        return copies

    def _sync_segment(self) -> None:
        if isinstance(self.segment, MappedSegment):
            self.segment.buffer.flush()
        elif isinstance(self.segment, AppendedSegment) and self.segment.fd >= 0:
            os.fdatasync(self.segment.fd)

    def end(self, kind: int, payload: bytes, time_unix_nano: int) -> Address:
        """Write the END: the last slot. Needs no room but what was kept for it, unless the payload is longer.

        Raises:
            OSError: it could not be written.
        """
        if self.abandoned:
            raise Abandoned
        number, offset = self._frame_writer.append_last(kind, payload)
        slot = self.segment.put_last(time_unix_nano, 1.0, offset, number, FRAME)
        if slot is None:
            self._have_room()
            self._roll()
            slot = self.segment.put_last(time_unix_nano, 1.0, offset, number, FRAME)
        assert slot is not None, "a new segment has a slot"
        self.frames += 1
        self.ended = True
        if isinstance(self.segment, AppendedSegment) and self._end_kept:
            self.segment.sync()
        return Address(self.writer, self.segment.number, slot)

    def close(self) -> None:
        """Let files and lock go. A mapping goes when its last user does."""
        self._frame_writer.close(mine=not self.abandoned)
        self._close_segments()
        self._lock.release()
