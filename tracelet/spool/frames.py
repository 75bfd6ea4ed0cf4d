"""Frames: opaque payloads of any length, each with a length and a checksum, in files of their own.

A frames file is a header of 64 bytes and then frames, little endian:

    0  u32  sync magic
    4  u32  length of the payload
    8  u8   kind        9  u8  flags (1: the writer's END)      10  u16  zero
    12 u32  crc32 of bytes 4 to 11 and the payload
    16      payload
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from tracelet.errors import SpoolError, SpoolFormatError
from tracelet.spool.disk import CANT_ALLOCATE, Identity, allocate, close_own, identity
from tracelet.spool.pages import Pread

__all__ = ["END_FLAG", "Frame", "FrameWriter", "frames_name", "read_frame", "scan"]

MAGIC = b"TRLTFRMS"
VERSION = 1
HEADER_SIZE = 64
_HEADER = struct.Struct("<8sI16sI")  # magic, version, writer id, number; then crc32
_FRAME = struct.Struct("<IIBBHI")
_COVERED = struct.Struct("<IBBH")
SYNC = 0xF7A9E5D1  # no byte of it is ASCII, so it can't stand in a payload of JSON
_SYNC_BYTES = SYNC.to_bytes(4, "little")
END_FLAG = 1
ROLL_AT = 16 * 2**20
MAX_PAYLOAD = 256 * 2**20
RESERVE = 8192
"""Room that a file has behind its last frame, for the writer's END: a disk may be full when a run ends."""
_STEP = 4096
_MOST_ROOM = RESERVE + 2 * _STEP


class Frame(NamedTuple):
    """One frame as read: where the next one begins, what it is, and what it holds."""

    end: int
    kind: int
    flags: int
    payload: bytes


def frames_name(writer: str, number: int) -> str:
    """The file name of a frames file."""
    return f"{writer}-{number:06d}.frames"


def pack_frame(kind: int, flags: int, payload: bytes) -> bytes:
    """The bytes of one frame."""
    covered = _COVERED.pack(len(payload), kind, flags, 0)
    return _SYNC_BYTES + covered + crc32(payload, crc32(covered)).to_bytes(4, "little") + payload


class FrameWriter:
    """Appends frames to one writer's frames files; used under the writer's lock."""

    def __init__(
        self,
        folder: Path,
        writer: str,
        admit: Callable[[int], None],
        *,
        sync_at_roll: bool = False,
        end_kept: bool = False,
    ) -> None:
        """`end_kept`: a frame is written only where `RESERVE` bytes behind it have room too; they are the END's."""
        self._sync_at_roll = sync_at_roll
        self.left: dict[str, None] = {}  # files that were left without a flush, by name
        self._reserve = RESERVE if end_kept else 0
        self._room_to = 0
        self._zeros = False  # room is zeros that are written, because this file system allocates none
        self._folder = folder
        self._writer = writer
        self._admit = admit
        self._fd = -1
        self._opened: Identity = (-1, -1)
        self._end = 0
        self._number = 0

    def append(self, kind: int, payload: bytes) -> tuple[int, int]:
        """Write one frame; returns the number of its file and its offset there.

        Raises:
            OSError: it could not be written; nothing of it stands in the file, or the file has been left.
            SpoolError: longer than any frame may be.
        """
        if len(payload) > MAX_PAYLOAD:
            raise SpoolError(
                f"a record of {len(payload):,} bytes is longer than a frame may be ({MAX_PAYLOAD:,}):"
                " log it as an artifact",
                size=len(payload),
            )
        data = pack_frame(kind, 0, payload)
        self._admit(len(data))
        if self._fd < 0 or self._end >= ROLL_AT:
            self._roll()
        try:
            self._have_room(len(data))
            return self._write(data)
        except OSError as error:
            if error.errno != errno.EFBIG or self._end <= HEADER_SIZE:
                raise
        self._roll()  # a limit on the size of files (RLIMIT_FSIZE): the next one has room
        self._have_room(len(data))
        return self._write(data)

    def append_last(self, kind: int, payload: bytes) -> tuple[int, int]:
        """As `append`, for the writer's END: into the room that was kept for it, whatever the quota says.

        Raises:
            OSError: it is longer than that, and there is no other room.
        """
        data = pack_frame(kind, END_FLAG, payload)
        try:
            return self._write(data)
        except OSError:
            self._roll()
            return self._write(data)

    def _have_room(self, size: int) -> None:
        """See that a frame of `size` bytes leaves the END its room, before anything of the frame is written."""
        wanted = self._end + size + self._reserve
        if not self._reserve or wanted <= self._room_to:
            return
        wanted += -wanted % _STEP
        if not self._zeros:
            try:
                allocate(self._fd, wanted - self._end, at=self._end, keep_size=True)
            except OSError as error:
                if error.errno not in CANT_ALLOCATE:
                    raise
                self._zeros = True
        if self._zeros:
            self._write_zeros(max(self._end, self._room_to), wanted)
        self._room_to = wanted

    def _write_zeros(self, start: int, end: int) -> None:
        at = start
        try:
            while at < end:
                more = os.pwrite(self._fd, bytes(min(end - at, 2**20)), at)
                if more == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                at += more
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, start)
            raise

    def _write(self, data: bytes) -> tuple[int, int]:
        fd, offset = self._fd, self._end
        # The place is taken before it is written: a record made by a signal handler meanwhile goes behind this one.
        self._end = offset + len(data)
        try:
            written = 0
            while written < len(data):
                more = os.pwrite(fd, memoryview(data)[written:], offset + written)
                if more == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                written += more
        except OSError:
            self._cut(fd, offset, offset + len(data))
            raise
        return self._number, offset

    def _cut(self, fd: int, offset: int, end: int) -> None:
        if self._end != end:
            return  # something stands behind it; the reader passes over the torn frame
        try:
            os.ftruncate(fd, offset)
            self._end = self._room_to = offset
        except OSError:
            self._end = ROLL_AT  # leave the file for a new one

    def _roll(self) -> None:
        if self._sync_at_roll:
            self.sync()
        number = self._number + 1
        path = self._folder / frames_name(self._writer, number)
        fields = _HEADER.pack(MAGIC, VERSION, self._writer.encode("ascii"), number)
        header = (fields + crc32(fields).to_bytes(4, "little")).ljust(HEADER_SIZE, b"\0")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.pwrite(fd, header, 0) != HEADER_SIZE:
                raise OSError(errno.ENOSPC, "No space left on device")
        except BaseException:
            os.close(fd)
            raise
        old, opened = self._fd, self._opened
        self._opened = identity(fd)
        left, self._fd, self._number, self._end, self._room_to = self._end, fd, number, HEADER_SIZE, HEADER_SIZE
        if old >= 0:
            if not self._sync_at_roll:
                self.left[frames_name(self._writer, number - 1)] = None
            self._let_go(old, opened, left)

    @property
    def descriptor(self) -> int:
        """Of the file that is written to now; -1 before the first."""
        return self._fd

    def sync(self) -> None:
        """Flush to the disk itself, for power loss."""
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def _let_go(self, fd: int, opened: Identity, end: int) -> None:
        """Close a file that gets no more frames, without the room it had for one: zeros at the end are no frames."""
        close_own(fd, opened, cut_at=end if self._reserve else None)

    def close(self, *, mine: bool = True) -> None:
        """Let the file go. Not `mine`: another process writes it, and its room stays."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and mine:
            self._let_go(fd, self._opened, self._end)
        elif fd >= 0:
            close_own(fd, self._opened)


def read_frame(fd: int, offset: int, pread: Pread = os.pread) -> Frame | None:
    """The frame at `offset`; None where none stands whole with its checksum right."""
    head = pread(fd, _FRAME.size, offset) if offset >= 0 else b""
    if len(head) < _FRAME.size:
        return None
    sync, length, kind, flags, _, check = _FRAME.unpack(head)
    if sync != SYNC or length > MAX_PAYLOAD:
        return None
    payload = pread(fd, length, offset + _FRAME.size)
    if len(payload) < length or crc32(payload, crc32(head[4:12])) != check:
        return None
    return Frame(offset + _FRAME.size + length, kind, flags, payload)


def check_header(fd: int, path: Path, pread: Pread = os.pread) -> None:
    """Refuse a frames file of a version that this release doesn't know; a damaged header is passed over.

    Raises:
        SpoolFormatError: it is whole and names another version.
    """
    header = pread(fd, _HEADER.size + 4, 0)
    if len(header) < _HEADER.size + 4 or crc32(header[:-4]).to_bytes(4, "little") != header[-4:]:
        return
    magic, version, _, _ = _HEADER.unpack(header[:-4])
    if magic != MAGIC or version != VERSION:
        raise SpoolFormatError(
            f"{path} has format {version}, this tracelet reads {VERSION}:"
            " use the release that wrote it, or a newer one",
            version=version,
        )


def scan(fd: int, damaged: Callable[[int, int], None] | None = None, pread: Pread = os.pread) -> Iterator[Frame]:
    """Every valid frame of an open frames file, in order; `damaged(start, end)` hears of each gap passed over."""
    size = os.fstat(fd).st_size
    data = b""
    offset = HEADER_SIZE
    while offset < size:
        frame = read_frame(fd, offset, pread)
        if frame is not None:
            yield frame
            offset = frame.end
            continue
        if size - offset <= _MOST_ROOM and not any(pread(fd, size - offset, offset)):
            return  # room kept for the END
        data = data or pread(fd, size, 0)
        start = offset
        offset = data.find(_SYNC_BYTES, start + 1)
        if offset < 0:
            offset = size
        if damaged is not None:
            damaged(start, offset)
