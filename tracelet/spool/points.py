"""Point segments: the layout of header and slots, and the one fused append that training calls.

A segment file is a header of 4096 bytes and then `capacity` slots of 32 bytes, little endian:

    0  u64  time_unix_nano
    8  f64  value                (FRAME: 0.0, and 1.0 for the writer's END)
    16 i64  iteration            (FRAME: offset of the frame in its frames file)
    24 u32  metric id            (FRAME: number of the frames file)
    28 u32  marker               (base | POINT, base | FRAME, base | VOID; anything else: in flight)

The marker base is drawn anew for each segment, so that neither zeros nor stale bytes can pass for a record. The whole
format, with a reader of 30 lines, is in docs/reference/spool-format.md.
"""

from __future__ import annotations

import mmap
import operator
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol
from zlib import crc32

from tracelet.errors import SpoolFormatError

__all__ = [
    "FRAME",
    "HEADER_SIZE",
    "POINT",
    "SLOT",
    "SLOT_SIZE",
    "VERSION",
    "VOID",
    "Address",
    "Fused",
    "Header",
    "Log",
    "MappedSegment",
    "Seldom",
    "Segment",
    "fuse",
    "segment_name",
]

MAGIC = b"TRLTPNTS"
VERSION = 1
HEADER_SIZE = 4096
_HEADER = struct.Struct("<8sII16sIII")  # magic, version, header size, writer id, segment, capacity, marker base
_CRC = struct.Struct("<I")
SLOT = struct.Struct("<QdqII")
# The same bytes with metric id and marker as one word: the hot path has it ready for each name, which saves it a
# field to pack and a name to look up (263 -> 240 ns).
_WORDED = struct.Struct("<QdqQ")
SLOT_SIZE = 32
MARKER_AT = 28
UNSET = b"\0\0\0\0"
POINT, FRAME, VOID = 1, 2, 3
_MIN_INT64, _MAX_INT64 = -(2**63), 2**63 - 1


class Address(NamedTuple):
    """One slot of one writer; comparable within a writer."""

    writer: str
    segment: int
    slot: int


class Header(NamedTuple):
    """What the first page of a segment says."""

    writer: str
    segment: int
    capacity: int
    base: int

    def pack(self) -> bytes:
        """The header's bytes, without the zeros that fill its page."""
        fields = _HEADER.pack(
            MAGIC, VERSION, HEADER_SIZE, self.writer.encode("ascii"), self.segment, self.capacity, self.base
        )
        return fields + _CRC.pack(crc32(fields))

    @classmethod
    def unpack(cls, page: bytes) -> Header | None:
        """The header in `page`; None where its magic or checksum is not right (or not there yet).

        Raises:
            SpoolFormatError: a valid header of a version this release doesn't know.
        """
        fields = page[: _HEADER.size]
        if len(page) < _HEADER.size + 4 or _CRC.unpack_from(page, _HEADER.size)[0] != crc32(fields):
            return None
        magic, version, size, writer, segment, capacity, base = _HEADER.unpack(fields)
        if magic != MAGIC or not writer.isascii():
            return None
        if version != VERSION or size != HEADER_SIZE:
            raise SpoolFormatError(
                f"segment {segment} of writer {writer!r} has format {version}, this tracelet reads {VERSION}:"
                " use the release that wrote it, or a newer one",
                version=version,
            )
        return cls(writer.decode("ascii"), segment, capacity, base)


def segment_name(writer: str, number: int) -> str:
    """The file name of a segment."""
    return f"{writer}-{number:06d}.points"


def new_base() -> int:
    """A random marker base: not zero, its two low bits zero."""
    while True:
        base = int.from_bytes(os.urandom(4), "little") & ~3
        if base:
            return base


class Segment(Protocol):
    """Where one set of files puts its slots at present."""

    number: int
    capacity: int  # without the slot that may be kept for the END
    voids: int

    def head(self) -> int:
        """The next slot to be taken; `capacity` when full."""
        ...

    def put(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> int | None:
        """Take a slot, fill it and return it; None where the segment is full."""
        ...

    def put_last(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> int | None:
        """As `put`; in a full segment the slot that was kept for the END is taken. None where that is gone too."""
        ...

    def seize(self) -> None:
        """Take the free slots away from everybody but `put`: whoever still holds the old iterator finds it dry."""
        ...

    def void_open(self) -> int:
        """Mark taken slots that have no marker as VOID; returns how many were."""
        ...

    def open_slots(self) -> int:
        """How many taken slots have no marker."""
        ...


_pack_into = SLOT.pack_into
_pack_worded = _WORDED.pack_into
_pack_marker = _CRC.pack_into
_time_ns = time.time_ns
_StructError = struct.error


class MappedSegment:
    """A segment in a mapped file: a slot is taken without a lock and filled without a system call."""

    __slots__ = ("base", "buffer", "capacity", "kept", "number", "slots", "voids", "words")

    def __init__(self, fd: int, header: Header, *, end_kept: bool = False) -> None:
        """Map `fd`, whose whole size must have been allocated (a store into a hole of a full disk is SIGBUS).

        `end_kept`: the last slot is for the END alone, so that a run can end on a disk that has room for nothing else.
        """
        self.words: dict[str, int] = {}  # each known name's metric id and this segment's POINT marker, as one word
        self.number = header.segment
        self.kept = int(end_kept)
        self.capacity = header.capacity - self.kept
        self.base = header.base
        end = HEADER_SIZE + SLOT_SIZE * self.capacity
        self.buffer = mmap.mmap(fd, HEADER_SIZE + SLOT_SIZE * header.capacity)
        self.buffer[: len(header.pack())] = header.pack()
        # The offsets of the free slots. A range's iterator, because it gives the offset itself and runs dry where the
        # segment is full: no arithmetic, and no exception to be told from others. Its next() is one C call under the
        # interpreter's lock, like that of itertools.count.
        self.slots: Iterator[int] = iter(range(HEADER_SIZE, end, SLOT_SIZE))
        self.voids = 0

    def learn(self, ids: Mapping[str, int]) -> None:
        """Let the hot path take these names; their frames are written."""
        high = (self.base | POINT) << 32
        self.words.update({name: high | metric_id for name, metric_id in ids.items()})

    def head(self) -> int:
        return self.capacity - operator.length_hint(self.slots)

    def put(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> int | None:
        buffer, base, offset = self.buffer, self.base, 0
        marker = base | kind
        try:  # see `fuse` for why this looks as it does
            for offset in self.slots:  # noqa: B007
                break
            else:
                return None
            _pack_into(buffer, offset, time_unix_nano, value, iteration, metric_id, marker)
        except BaseException:
            if offset and buffer[offset + MARKER_AT : offset + SLOT_SIZE] == UNSET:
                _pack_marker(buffer, offset + MARKER_AT, base | VOID)
                self.voids += 1
            raise
        return (offset - HEADER_SIZE) // SLOT_SIZE

    def put_last(self, time_unix_nano: int, value: float, iteration: int, metric_id: int, kind: int) -> int | None:
        slot = self.put(time_unix_nano, value, iteration, metric_id, kind)
        if slot is None and self.kept:
            self.slots, self.capacity, self.kept = (
                iter((HEADER_SIZE + SLOT_SIZE * self.capacity,)),
                self.capacity + 1,
                0,
            )
            slot = self.put(time_unix_nano, value, iteration, metric_id, kind)
        return slot

    def seize(self) -> None:
        self.slots = iter(list(self.slots))  # emptied by one C call, so no thread gets a slot in between

    def _open_offsets(self) -> list[int]:
        end = HEADER_SIZE + SLOT_SIZE * self.head()
        with memoryview(self.buffer) as whole, whole[HEADER_SIZE:end].cast("I") as words, words[7::8] as markers:
            closed = {self.base | POINT, self.base | FRAME, self.base | VOID}
            return [HEADER_SIZE + SLOT_SIZE * i for i, marker in enumerate(markers.tolist()) if marker not in closed]

    def open_slots(self) -> int:
        return len(self._open_offsets())

    def void_open(self) -> int:
        offsets = self._open_offsets()
        for offset in offsets:
            _pack_marker(self.buffer, offset + MARKER_AT, self.base | VOID)
        self.voids += len(offsets)
        return len(offsets)


class Log(Protocol):
    """The shape of the fused append."""

    def __call__(self, name: str, value: object, iteration: int | None = None) -> None: ...


class Seldom:
    """What `log` needs seldom: held in one object, because every variable of a closure costs each call 1 to 2 ns."""

    __slots__ = ("current", "slow", "to_float", "to_iteration", "voids", "without_iteration")

    def __init__(
        self,
        to_float: Callable[[str, object], float],
        to_iteration: Callable[[object], int],
        slow: Callable[[str, float, int, int], None],
        without_iteration: Callable[[str], int],
    ) -> None:
        self.to_float = to_float
        self.to_iteration = to_iteration
        self.slow = slow
        self.without_iteration = without_iteration
        self.current: int | None = None
        self.voids = 0  # slots given up in the hot path


class Fused(NamedTuple):
    """The append closures, and what changes them: `publish` their cell, `seldom` the rest."""

    log: Log
    log_many: Callable[[Mapping[str, object], int | None], None]
    publish: Callable[[Segment | None], None]
    seldom: Seldom


def fuse(  # noqa: PLR0915 - one scope, because its cell is what makes a call cost what an append costs
    seldom: Seldom, check_name: Callable[[object], str]
) -> Fused:
    """Make `log(name, value, iteration=None)`: one function for good, whose cell changes at roll, fork and stop.

    `seldom.slow(name, value, iteration, time)` takes a record that the cell can't: a new name, a full segment, a
    writer not open (yet, or any more). `seldom.without_iteration(name)` is asked as long as no iteration was ever set.

    Order of work, each with its reason:
    1. Conversion and name before the slot: a tensor's `__float__` may wait 20 ms or raise, and would hold a slot open.
       The iteration alone is left to `pack_into`, which takes what has an `__index__` and lets through what that
       raises; to ask for its type here as well cost 5 ns a call.
    2. One read of the cell: a roll or a fork in between can't mix two segments.
    3. The slot by `for ... in slots`. Between taking it and the end of `pack_into` the interpreter looks neither at
       signals nor at other threads (it does so at calls' ends and at backward jumps), so nothing can come between.
       Taken by a *call* it was lost to a signal in 1,131 of 11,237 interrupts.
    4. The marker last. Whatever raises meanwhile (a trace function can) leaves VOID where no marker stands yet;
       that path makes no Python call, which a second signal could interrupt.
    """
    nothing: Any = ()
    cell: tuple[dict[str, int], Iterator[int], Any] = ({}, nothing, None)

    def log(name: str, value: object, iteration: int | None = None) -> None:
        if type(value) is not float:
            value = seldom.to_float(name, value)
        if iteration is None:
            iteration = seldom.current
            if iteration is None:
                iteration = seldom.without_iteration(name)
        now = _time_ns()
        words, slots, buffer = cell
        try:
            word = words[name]
        except (KeyError, TypeError):  # new, or not even hashable
            seldom.slow(name, value, iteration, now)
            return
        offset = 0
        try:
            for offset in slots:
                return _pack_worded(buffer, offset, now, value, iteration, word)
        except BaseException as error:
            if offset and buffer[offset + MARKER_AT : offset + SLOT_SIZE] == UNSET:
                _pack_marker(buffer, offset + MARKER_AT, (word >> 32) | VOID)
                seldom.voids += 1
                if type(error) is _StructError:
                    seldom.slow(name, value, iteration, now)  # says what doesn't fit: an iteration beyond int64
                    return
            raise
        seldom.slow(name, value, iteration, now)  # full, stopped, forked, or not mapped

    def log_many(values: Mapping[str, object], iteration: int | None = None) -> None:  # noqa: PLR0912
        if type(iteration) is not int:
            iteration = seldom.current if iteration is None else seldom.to_iteration(iteration)
        rows: list[tuple[str, float]] = []
        for name, value in values.items():
            rows.append((name, value if type(value) is float else seldom.to_float(name, value)))
        if iteration is None:
            iteration = max((seldom.without_iteration(name) for name in values), default=0)
        if not _MIN_INT64 <= iteration <= _MAX_INT64:
            iteration = seldom.to_iteration(iteration)
        now = _time_ns()
        words, slots, buffer = cell
        if not words.keys() >= values.keys():
            for name, _ in rows:
                check_name(name)
        for name, number in rows:
            word = words.get(name, 0)
            offset = 0
            try:
                if word:
                    for offset in slots:  # noqa: B007
                        break
                if offset:
                    _pack_worded(buffer, offset, now, number, iteration, word)
                else:
                    seldom.slow(name, number, iteration, now)
            except BaseException:
                if offset and buffer[offset + MARKER_AT : offset + SLOT_SIZE] == UNSET:
                    _pack_marker(buffer, offset + MARKER_AT, (word >> 32) | VOID)
                    seldom.voids += 1
                raise

    def publish(segment: Segment | None) -> None:
        nonlocal cell
        if isinstance(segment, MappedSegment):
            cell = (segment.words, segment.slots, segment.buffer)
        else:  # closed, forked, or appended under the lock: every record takes the slow way
            cell = ({}, nothing, None)

    return Fused(log, log_many, publish, seldom)
