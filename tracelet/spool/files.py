"""One set of files of one writer id: its lock, its frames, and the segment its slots go to now."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from tracelet.spool.appended import AppendedSegment
from tracelet.spool.disk import NO_ROOM, allocate
from tracelet.spool.frames import END_FLAG, FrameWriter
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

__all__ = ["SPARES", "Abandoned", "FileSet"]

SPARES = ("spare-1.points", "spare-2.points")
"""Segments made ahead by the shipper; a writer takes one by renaming it."""


class Abandoned(Exception):
    """These files are the parent's; the forked child has to open its own."""


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
    ) -> None:
        """Make the files and write the opening frame (kind, payload, time).

        `sync_at_roll`: flush a full file to the disk before leaving it, so that `sync` is about all that was written.

        Raises:
            OSError: the folder can't be written, or has no room.
        """
        self.writer = secrets.token_hex(8)
        self.ids: dict[str, int] = {}
        self.frames = 0
        self.abandoned = False
        self.ended = False
        self._next_id = 0
        self._folder = folder
        self._capacity = capacity
        self._mapped = mapped
        self._admit = admit
        self._sync_at_roll = sync_at_roll
        self._slots_before = 0  # of segments left behind
        self._voids_before = 0
        self._fd = -1
        self._lock = WriterLock(folder, self.writer)
        try:
            self._frame_writer = FrameWriter(folder, self.writer, admit, sync_at_roll=sync_at_roll)
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
        self._close_fd()
        for path in self._folder.glob(f"{self.writer}-*"):
            path.unlink(missing_ok=True)

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def visible(self) -> bool:
        """Whether readers know of these files."""
        return self._lock.visible

    def appear(self) -> None:
        """Let readers know."""
        self._lock.appear()

    # ---- segments ---------------------------------------------------------------------------------------------

    def _new_segment(self, number: int) -> Segment:
        path = self._folder / segment_name(self.writer, number)
        header = Header(self.writer, number, self._capacity, new_base())
        size = HEADER_SIZE + SLOT_SIZE * self._capacity
        if not self._mapped:
            self._admit(size)  # it grows to that
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                appended = AppendedSegment(fd, header)
            except BaseException:
                os.close(fd)
                raise
            old, self._fd = self._fd, fd
            if old >= 0:
                os.close(old)
            return appended
        fd = self._take_spare(path, size)
        if fd < 0:
            self._admit(size)
            # An earlier try at this number may have left a file; nothing in it was ever used.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            allocate(fd, size)  # for a spare too: it costs 1 us where the room is there already
            return MappedSegment(fd, header)
        except OSError as error:
            if error.errno in NO_ROOM:
                path.unlink(missing_ok=True)
            elif error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
                self._mapped = False
                return self._new_segment(number)
            raise
        finally:
            os.close(fd)  # the mapping has its own

    def _take_spare(self, path: Path, size: int) -> int:
        for spare in SPARES:
            try:
                os.rename(self._folder / spare, path)
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue
            if os.fstat(fd).st_size == size and os.pread(fd, HEADER_SIZE, 0).count(0) == HEADER_SIZE:
                return fd
            os.close(fd)  # made for another size; the caller makes the file anew
        return -1

    def _full(self) -> bool:
        return self.segment.head() >= self.segment.capacity

    def roll(self) -> None:
        """Go on in a new segment if this one is full.

        Raises:
            OSError: there is none to be had.
        """
        old = self.segment
        if old.head() >= old.capacity:
            if self._sync_at_roll:
                self._sync_segment()
            new = self._new_segment(old.number + 1)
            if isinstance(new, MappedSegment):
                new.learn(self.ids)
            self.segment, self._slots_before, self._voids_before = (
                new,
                self._slots_before + old.capacity,
                self._voids_before + old.voids,
            )

    # ---- records ----------------------------------------------------------------------------------------------

    def _put(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> Address:
        if self.abandoned:
            raise Abandoned
        while True:
            segment = self.segment
            slot = segment.put(time_unix_nano, value, iteration, metric_id, kind)
            if slot is not None:
                return Address(self.writer, segment.number, slot)
            self.roll()

    def frame(self, kind: int, payload: bytes, time_unix_nano: int, *, end: bool = False) -> Address:
        """Write a frame and then its slot.

        Raises:
            OSError, SpoolError: as `FrameWriter.append`.
        """
        if self.abandoned:
            raise Abandoned
        self.roll()  # first, so that a full disk leaves no frame without a slot
        number, offset = self._frame_writer.append(kind, payload, END_FLAG if end else 0)
        address = self._put(time_unix_nano, 1.0 if end else 0.0, offset, number, FRAME)
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
                self.roll()
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

    def sync(self) -> None:
        """Flush frames and slots to the disk itself, for power loss."""
        self._frame_writer.sync()
        self._sync_segment()

    def to_sync(self) -> list[int]:
        """Duplicates of the descriptors that a flush is about, for the caller to flush and to close."""
        return [os.dup(fd) for fd in (self._frame_writer.descriptor, self._fd) if fd >= 0]

    def _sync_segment(self) -> None:
        if isinstance(self.segment, MappedSegment):
            self.segment.buffer.flush()
        elif self._fd >= 0:
            os.fdatasync(self._fd)

    def end(self, kind: int, payload: bytes, time_unix_nano: int) -> Address:
        """Write the END: the last slot."""
        address = self.frame(kind, payload, time_unix_nano, end=True)
        self.ended = True
        return address

    def close(self) -> None:
        """Let files and lock go. A mapping goes when its last user does."""
        self._frame_writer.close()
        self._close_fd()
        self._lock.release()
