"""Slots written with system calls: one by one where mapping could kill, and many at once for a gateway."""

from __future__ import annotations

import errno
import os
import time
from array import array

from tracelet.spool.disk import identity, is_open_on
from tracelet.spool.points import HEADER_SIZE, MARKER_AT, POINT, SLOT, SLOT_SIZE, UNSET, VOID, Header

__all__ = ["AppendedSegment", "pack_points"]


class AppendedSegment:
    """A segment written with system calls, for file systems where mapping could kill; used under the writer's lock."""

    __slots__ = (
        "_counts",
        "_opened",
        "_room_to",
        "_synced",
        "_synced_at",
        "_unsettled",
        "base",
        "capacity",
        "doubtful",
        "failed",
        "fd",
        "kept",
        "next",
        "number",
        "voids",
    )

    SYNC_EVERY_S = 1.0

    def __init__(self, fd: int, header: Header, *, end_kept: bool = False) -> None:
        """`end_kept`: a point is written only where the slot behind it has room too, so that the END always has some.
        And for a writer that nobody waits for: what the disk refuses at a flush is counted, where others get an error.

        Room ahead is zeros written there: where mapping is not allowed, fallocate often isn't to be had either.
        """
        self.number = header.segment
        self.kept = int(end_kept)
        self._counts = end_kept
        self.capacity = header.capacity - self.kept
        self._room_to = HEADER_SIZE
        self.base = header.base
        self.fd = fd
        self._opened = identity(fd)
        self.next = 0
        self.voids = 0
        self._unsettled = -1  # the slot of a call that did not come to its end
        self._synced_at = time.monotonic()
        self._synced = 0  # the slots before this one are on the disk, or known to be in doubt
        self.doubtful = 0  # slots that were written, and that the disk would not have at the flush after them
        self.failed: OSError | None = None  # what it said
        page = header.pack().ljust(HEADER_SIZE, b"\0")
        if os.pwrite(fd, page, 0) != HEADER_SIZE:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._have_room(0)

    def _have_room(self, slot: int) -> None:
        """See that the slot behind `slot` has room: one page more at a time."""
        if not self.kept or self._room_to >= HEADER_SIZE + SLOT_SIZE * (slot + 2):
            return
        end = min(self._room_to + HEADER_SIZE, HEADER_SIZE + SLOT_SIZE * (self.capacity + self.kept))
        self._room_to += os.pwrite(self.fd, bytes(end - self._room_to), self._room_to)
        if self._room_to < end:
            raise OSError(errno.ENOSPC, "No space left on device")

    def head(self) -> int:
        return self.next

    def put(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> int | None:
        if self._unsettled >= 0:
            self._settle()
        slot = self.next
        if slot >= self.capacity:
            return None
        self._have_room(slot)
        return self._fill(slot, time_unix_nano, value, iteration, metric_id, kind)

    def put_last(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> int | None:
        if self._unsettled >= 0:
            self._settle()
        slot = self.next
        if slot >= self.capacity + self.kept:
            return None
        self.capacity, self.kept = self.capacity + self.kept, 0
        return self._fill(slot, time_unix_nano, value, iteration, metric_id, kind)

    def _fill(  # noqa: PLR0917
        self, slot: int, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int
    ) -> int:
        # Taken before it is written: after an interrupt the next record must not land on this one, which a reader
        # may have delivered already. Whether an interrupted one was written is found out by whoever comes next,
        # since here a second interrupt could cut that short.
        self._unsettled = slot
        self.next = slot + 1
        data = SLOT.pack(time_unix_nano, value, iteration, metric_id, self.base | kind)
        try:
            if os.pwrite(self.fd, data, HEADER_SIZE + SLOT_SIZE * slot) != SLOT_SIZE:
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            # The marker, its last field, did not get there; the next record is written over it.
            self.next = slot
            self._unsettled = -1
            raise
        self._unsettled = -1
        now = time.monotonic()
        if now - self._synced_at >= self.SYNC_EVERY_S:
            self._synced_at = now
            if self._counts:
                self.sync()
            else:
                os.fdatasync(self.fd)
        return slot

    def sync(self) -> None:
        """Ask the disk for what it was given. Where a write is only a promise (NFS, FUSE), a full disk says so here.

        Never raises: the slots since the last time become `doubtful`. They are written and may be read here, from
        memory; whether anybody else will ever see them is open.
        """
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self.doubt(error)
        self._synced = self.next

    def unsynced(self) -> int:
        """How many slots were filled since the disk was last asked by `sync`."""
        return self.next - self._synced

    def doubt(self, error: OSError) -> None:
        """Count what was written since then: the disk would not have it, and says so to one who asks and no more."""
        self.failed = error
        self.doubtful += self.next - self._synced
        self._synced = self.next

    def put_many(self, records: memoryview) -> int:
        """Fill the next slots with whole point records whose markers are zero; returns how many there was room for.

        The fields first and the markers after them, each in one system call: a reader beside us, who takes a marker's
        word for its fields, never meets one without the other.

        Raises:
            OSError: a marker may stand or not; nobody may write here any more, and readers pass over what is open.
        """
        if self._unsettled >= 0:
            self._settle()
        count = min(len(records) // SLOT_SIZE, self.capacity - self.next)
        data = bytearray(records[: count * SLOT_SIZE])
        at = HEADER_SIZE + SLOT_SIZE * self.next
        self._write(data, at)
        self.next += count
        with memoryview(data) as whole, whole.cast("I") as words, words[7::8] as markers:
            markers[:] = memoryview(array("I", [self.base | POINT]) * count)
        self._write(data, at)
        return count

    def _write(self, data: bytearray, at: int) -> None:
        if data and os.pwrite(self.fd, data, at) != len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def _settle(self) -> None:
        at = HEADER_SIZE + SLOT_SIZE * self._unsettled
        if os.pread(self.fd, 4, at + MARKER_AT) in (b"", UNSET):
            os.pwrite(self.fd, SLOT.pack(0, 0.0, 0, 0, self.base | VOID), at)
            self.voids += 1
        self._unsettled = -1

    def close(self) -> None:
        """Let the file go; again is no harm. What the disk refuses only now is in `doubtful`, see `sync`."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            try:
                if is_open_on(fd, self._opened):
                    os.close(fd)
            except OSError as error:
                if not self._counts:
                    raise
                self.doubt(error)

    def seize(self) -> None:
        if self._unsettled >= 0:
            self._settle()

    def open_slots(self) -> int:
        return 0  # one record at a time, under the lock

    def void_open(self) -> int:
        return 0


def pack_points(
    time_unix_nano: array[int], values: array[float], iterations: array[int], metric_ids: array[int]
) -> bytearray:
    """Columns (of 8, 8, 8 and 4 bytes an item) as point records without markers; the inverse of reading them."""
    records = bytearray(SLOT_SIZE * len(values))
    # Assigning to a strided slice of a cast view copies a column at C speed, without numpy.
    with memoryview(records) as whole:
        for code, start, step, column in (
            ("Q", 0, 4, time_unix_nano),
            ("d", 1, 4, values),
            ("q", 2, 4, iterations),
            ("I", 6, 8, metric_ids),
        ):
            with whole.cast(code) as items, items[start::step] as places:  # type: ignore[call-overload]
                places[:] = memoryview(column)
    return records
