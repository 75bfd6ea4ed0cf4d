"""Reads a spool folder, live or dead: which slots are closed, and what stands in them.

Two passes, always: first the markers, then the fields of exactly the slots whose marker was set. Copying whole
records and looking at their markers afterwards gave 8,000 torn records in 23 million, each with a valid marker.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from tracelet.spool import frames as frame_files
from tracelet.spool.frames import frames_name, read_frame
from tracelet.spool.pages import PAGE, Pages
from tracelet.spool.points import (
    FRAME,
    HEADER_SIZE,
    POINT,
    SLOT,
    SLOT_SIZE,
    VOID,
    Header,
    segment_name,
)
from tracelet.spool.seal import Seal, read_seal

__all__ = ["DELIVERED", "START", "Damage", "Position", "SlotRange", "SpoolReader", "Taken"]

DELIVERED = "delivered"
_LOCK = re.compile(r"([0-9a-f]{16})\.lock")
_POINTS = re.compile(r"([0-9a-f]{16})-(\d{6,})\.points")
_FRAMES = re.compile(r"([0-9a-f]{16})-(\d{6,})\.frames")
_PEEK = 1024  # how far behind an open slot to look for closed ones; more threads than that never stand in slots
_STRONG_ORDER = platform.machine() in ("x86_64", "AMD64")
_OPEN_FILES = 16
_PAGE_SLOTS = PAGE // SLOT_SIZE


class SlotRange(NamedTuple):
    """Slots [first, end) of one segment, all of them closed when `poll` made it."""

    writer: str
    segment: int
    first: int
    end: int


class Position(NamedTuple):
    """Where a destination stands in one writer: the next slot, and slots passed while in flight."""

    segment: int = 1
    next: int = 0
    open: tuple[tuple[int, int], ...] = ()

    def passed(self, segment: int, slot: int) -> bool:
        """Whether this slot lies behind."""
        return (segment, slot) < (self.segment, self.next) and (segment, slot) not in self.open


START = Position()


class Damage(NamedTuple):
    """Slots [first, end) that can't be delivered, and why."""

    writer: str
    segment: int
    first: int
    end: int
    reason: str


class Taken(NamedTuple):
    """What stands in a range: point records in slot order, frames as (slot, kind, payload), and what is missing."""

    records: bytes
    frames: tuple[tuple[int, int, bytes], ...]
    voids: int
    damaged: tuple[Damage, ...]


class _Look(NamedTuple):
    """What one look at a segment has found."""

    ranges: list[SlotRange]
    slots: int
    next: int  # the slot to go on at
    stretch_end: int  # behind the last one found in this segment; 0: none was
    still_open: list[tuple[int, int]]


class _File:
    """An open segment: its descriptor stays good when the file is moved to delivered/."""

    __slots__ = ("_pages", "damaged_header", "fd", "header", "seal")

    def __init__(self, fd: int, pages: Pages) -> None:
        self.fd = fd
        self._pages = pages
        self.header: Header | None = None
        self.damaged_header = False
        self.seal: Seal | None = None

    def markers(self, first: int, end: int) -> memoryview:
        """The markers of the slots [first, end), as far as the file goes; `.tolist()` gives integers."""
        data = self.pread((end - first) * SLOT_SIZE, HEADER_SIZE + first * SLOT_SIZE)
        whole = len(data) - len(data) % SLOT_SIZE
        lost = self.lost(first, first + whole // SLOT_SIZE)
        if lost and self.header is not None:
            # They count as closed: `read` says what is missing, where open ones would be passed without a word.
            changed = bytearray(data)
            with memoryview(changed)[:whole] as bytes_, bytes_.cast("I") as words, words[7::8] as markers:
                for a, b in lost:
                    for slot in range(a, b):
                        markers[slot - first] = self.header.base | VOID
            data = bytes(changed)
        return memoryview(data)[:whole].cast("I")[7::8]

    def pread(self, length: int, offset: int) -> bytes:
        """Bytes of the file; zeros where the disk has given up a page for good."""
        return self._pages.pread(self.fd, length, offset)

    def lost(self, first: int, end: int) -> list[tuple[int, int]]:
        """The stretches of slots [first, end) that stand on such pages."""
        header = HEADER_SIZE // PAGE
        pages = self._pages.lost(self.fd, header + first // _PAGE_SLOTS, header + (end - 1) // _PAGE_SLOTS + 1)
        found: list[tuple[int, int]] = []
        for page in pages:
            start = (page - header) * _PAGE_SLOTS
            a, b = max(first, start), min(end, start + _PAGE_SLOTS)
            if found and found[-1][1] == a:
                found[-1] = found[-1][0], b
            else:
                found.append((a, b))
        return found


class SpoolReader:
    """Follows the writers of one folder; keeps no state that matters, so a new one can go on from a `Position`."""

    def __init__(
        self,
        folder: Path,
        *,
        strong_order: bool = _STRONG_ORDER,
        pages: Pages | None = None,
        reopen_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`strong_order`: stores become visible in the order they were made (x86-64). Elsewhere a slot counts as
        closed only when its marker was set at the poll before, too. `pages`: what another reader here has found
        unreadable.

        `reopen_s`: open files anew after so many seconds, for a folder that another host writes: over a network what
        was read once may be shown for as long as the file is open, whatever has been written to it since.
        """
        self._folder = folder
        self._strong_order = strong_order
        self._files: OrderedDict[tuple[str, str, int], _File] = OrderedDict()
        self._ended: dict[str, bool] = {}
        # For weak order only: slots whose markers were set at the last poll of each writer, and at the one before.
        self._seen: dict[str, set[tuple[int, int]]] = {}
        self._before: set[tuple[int, int]] = set()
        self.damaged_frames = 0
        self._folder_fd = -1
        self._pages = Pages() if pages is None else pages
        self._reopen_s = reopen_s
        self._clock = clock
        self._opened_at: dict[str, float] = {}  # by writer: when its files were last opened anew
        self._known_dead: set[str] = set()

    # ---- what is there ----------------------------------------------------------------------------------------

    def writers(self) -> tuple[str, ...]:
        """The writers of this folder, in order of appearance.

        Of this folder itself: one that was deleted and made anew at the same place is another, and not ours to read.

        Raises:
            FileNotFoundError: it was deleted.
        """
        found: list[tuple[int, str]] = []
        # Opened anew at each look: some file systems (sshfs) list an open folder once, and then as empty. The first one
        # is kept, so that its number can't be given to another folder.
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._folder_fd < 0:
                self._folder_fd = os.dup(fd)
            elif not os.path.samestat(os.fstat(self._folder_fd), os.fstat(fd)):
                raise FileNotFoundError(errno.ENOENT, "the folder was deleted", str(self._folder))
            with os.scandir(fd) as entries:
                for entry in entries:
                    match = _LOCK.fullmatch(entry.name)
                    if match:
                        found.append((entry.stat().st_ctime_ns, match.group(1)))
        finally:
            os.close(fd)
        return tuple(writer for _, writer in sorted(found))

    def _numbers(self, pattern: re.Pattern[str]) -> dict[str, list[int]]:
        numbers: dict[str, set[int]] = {}
        for folder in (self._folder, self._folder / DELIVERED):
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                continue
            for name in names:
                match = pattern.fullmatch(name)
                if match:
                    numbers.setdefault(match.group(1), set()).add(int(match.group(2)))
        return {writer: sorted(mine) for writer, mine in numbers.items()}

    def all_segments(self) -> dict[str, list[int]]:
        """By writer: the numbers of the segments that are there, delivered ones too. One look for all of them."""
        return self._numbers(_POINTS)

    def segments(self, writer: str) -> list[int]:
        """The numbers of the writer's segments that are there, delivered ones too."""
        return self.all_segments().get(writer, [])

    def _open(self, writer: str, name: str, number: int) -> int:
        # Twice, because the file may move to delivered/ between the two looks.
        for folder in (self._folder, self._folder / DELIVERED, self._folder):
            try:
                return os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
        raise FileNotFoundError(name)

    def _file(self, writer: str, kind: str, number: int) -> _File | None:
        key = (writer, kind, number)
        file = self._files.get(key)
        if file is None:
            name = segment_name(writer, number) if kind == "points" else frames_name(writer, number)
            try:
                file = _File(self._open(writer, name, number), self._pages)
            except FileNotFoundError:
                return None
            self._files[key] = file
            while len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1].fd)
        self._files.move_to_end(key)
        return file

    def _segment(self, writer: str, number: int) -> _File | None:
        """The segment, with its header; None where it is not there (yet)."""
        file = self._file(writer, "points", number)
        if file is None:
            return None
        if file.seal is None:
            file.seal = read_seal(self._folder, writer, number)
        if file.damaged_header and file.seal is None:
            file.header = self._rebuilt(file, writer, number)  # what is appended to grows
        if file.header is None:
            file.header = Header.unpack(file.pread(HEADER_SIZE, 0))
        if file.header is None:
            rebuilt = self._rebuilt(file, writer, number)
            # Read again: the header is written before any slot, so it is there if slots were found, unless damaged. A
            # header that came between the two looks would otherwise be made up, with the size that the file had then.
            page = file.pread(HEADER_SIZE, 0)
            file.header = Header.unpack(page)
            if file.header is None:
                if not rebuilt.base and file.seal is None and not any(page[:64]):
                    self._forget(writer, number)
                    return None  # just made: a header of zeros, and no slot is filled before there is one
                file.header = rebuilt
                file.damaged_header = True
        return file

    @staticmethod
    def _rebuilt(file: _File, writer: str, number: int) -> Header:
        """A header for a segment whose own is damaged: most markers of a segment share their upper 30 bits."""
        capacity = max(0, (os.fstat(file.fd).st_size - HEADER_SIZE) // SLOT_SIZE)
        votes = Counter(marker & ~3 for marker in file.markers(0, capacity).tolist() if marker & 3)
        return Header(writer, number, capacity, votes.most_common(1)[0][0] if votes else 0)

    # ---- which slots are closed -------------------------------------------------------------------------------

    def poll(
        self, writer: str, position: Position, limit: int, *, dead: bool
    ) -> tuple[tuple[SlotRange, ...], Position]:
        """At most `limit` closed slots after `position`, and the position behind them.

        Slots that were open at an earlier poll and have closed come first. `dead`: the writer's process is gone, so
        a slot that is still open stays so, and is passed for good.
        """
        self._look_anew(writer, dead)
        self._before, self._seen[writer] = self._seen.get(writer, set()), set()
        room = limit
        late, unsettled = self._closed(writer, position.open, dead)
        late = late[:room]
        ranges = _as_ranges(writer, late)
        room -= len(late)
        # The writer is dead: what is open now stays so, unless there was no room to look at all of it.
        still_open = _without(position.open, late) if not dead or room <= 0 else []
        number, slot = position.segment, position.next
        self._look_back(writer, number, slot)
        while room > 0 and not unsettled:
            file = self._segment(writer, number)
            if file is None or file.header is None:
                later = [n for n in self.segments(writer) if n > number]
                if not later or (file is not None and not dead):
                    break
                # Looked at again, now that there are later ones: it may have been made and filled between the looks.
                again = self._segment(writer, number)
                if again is None or again.header is None:
                    number, slot = later[0], 0  # older ones were deleted after their delivery
                    continue
                file = again
            last = self._sealed_end(file)
            rolled = self._exists(writer, number + 1)
            found = self._look(writer, number, file, slot, room, dead, rolled, still_open)
            slot, still_open = found.next, found.still_open
            ranges.extend(found.ranges)
            room -= found.slots
            if found.stretch_end:
                self._look_back(writer, number, found.stretch_end)
            if slot >= last and rolled:
                number, slot = number + 1, 0
            elif not found.slots:
                break
        return _joined(ranges), Position(number, slot, tuple(still_open))

    def _look_anew(self, writer: str, dead: bool) -> None:
        """Let files go that show an old state; what is passed as never written must not be what was not seen."""
        if self._reopen_s is None:
            return
        now = self._clock()
        if now - self._opened_at.setdefault(writer, now) < self._reopen_s and (not dead or writer in self._known_dead):
            return
        self._opened_at[writer] = now
        if dead:
            self._known_dead.add(writer)
        for key in [key for key in self._files if key[0] == writer]:
            os.close(self._files.pop(key).fd)

    def _look(  # noqa: PLR0917
        self,
        writer: str,
        number: int,
        file: _File,
        first: int,
        room: int,
        dead: bool,
        rolled: bool,
        still_open: list[tuple[int, int]],
    ) -> _Look:
        """At most `room` slots closed from `first` on, and before them those of `still_open` that are closed by now.

        What was open at the look before this one may be older than what this one finds: its thread may have filled it
        meanwhile, and gone on. So it is looked at again behind the new ones, and comes before them.
        """
        last = self._sealed_end(file)
        whole = rolled or dead or file.seal is not None
        window = last if whole else min(last, first + max(room, _PEEK))
        late: list[tuple[int, int]] = []
        while True:
            stretches, end, opened = self._window(writer, number, file, first, window, room - len(late), dead, rolled)
            more, unsettled = self._closed(writer, still_open, dead)
            more = more[: room - len(late)]
            late = sorted(late + more)
            still_open = _without(still_open, more)
            if len(late) == room or unsettled:
                return _Look(_as_ranges(writer, late), len(late), first, 0, still_open)
            slots = len(late) + sum(b - a for a, b in stretches)
            if not more or slots <= room:
                ranges = _as_ranges(writer, late) + [SlotRange(writer, number, a, b) for a, b in stretches]
                return _Look(ranges, slots, end, stretches[-1][1] if stretches else 0, still_open + opened)
            file = self._segment(writer, number) or file  # so many were looked at that it may have been let go

    def _exists(self, writer: str, number: int) -> bool:
        file = self._file(writer, "points", number)
        if file is not None and any(file.pread(64, 0)):
            return True
        return self._segment(writer, number) is not None

    def _forget(self, writer: str, number: int) -> None:
        """Open it anew next time: a segment that is being made may give way to another file of its name."""
        os.close(self._files.pop((writer, "points", number)).fd)

    @staticmethod
    def _sealed_end(file: _File) -> int:
        assert file.header is not None
        return file.header.capacity if file.seal is None else file.seal.slots

    def _closed(self, writer: str, slots: Iterable[tuple[int, int]], dead: bool) -> tuple[list[tuple[int, int]], bool]:
        """Those of `slots` that are closed and may be read, in order.

        Looked at until a look finds no more: what is open then is open behind everything that was found. And whether
        others are closed that may not be read yet: then nothing that is newer may be, either.
        """
        found: set[tuple[int, int]] = set()
        sealed: set[int] = set()
        left = sorted(slots)
        while left:
            new: set[tuple[int, int]] = set()
            for segment, group in groupby(left, key=lambda one: one[0]):
                numbers = [slot for _, slot in group]
                new.update((segment, slot) for slot in self._closed_in(writer, segment, numbers, sealed))
            if not new:
                break
            found |= new
            left = [one for one in left if one not in new]
        closed = sorted(found)
        if self._strong_order or dead:
            return closed, False
        self._seen[writer] |= found
        settled = list(takewhile(lambda one: one in self._before or one[0] in sealed, closed))
        return settled, len(settled) < len(closed)

    def _closed_in(self, writer: str, segment: int, slots: list[int], sealed: set[int]) -> list[int]:
        file = self._segment(writer, segment)
        if file is None or file.header is None:
            return []
        if file.seal is not None:
            sealed.add(segment)
            return slots
        first, base = slots[0], file.header.base
        markers = file.markers(first, slots[-1] + 1).tolist()
        return [slot for slot in slots if slot - first < len(markers) and _is_closed(markers[slot - first], base)]

    def _window(  # noqa: PLR0917
        self, writer: str, number: int, file: _File, first: int, window: int, room: int, dead: bool, rolled: bool
    ) -> tuple[list[tuple[int, int]], int, list[tuple[int, int]]]:
        """Closed stretches of [first, window), at most `room` slots; the slot to go on at; slots left open.

        A slot without a marker is in flight where something stands behind it (in this segment or, `rolled`, in the
        next one), else it has not been taken yet.
        """
        header = file.header
        assert header is not None
        if file.seal is not None:  # nothing in it is in flight; `read` tells what is damaged
            end = max(first, min(window, first + room))
            return ([(first, end)] if end > first else []), end, []
        view = file.markers(first, window)
        count = min(len(view), room)
        if self._strong_order and count and view[:count].tobytes() == _word(header.base | POINT) * count:
            return [(first, first + count)], first + count, []
        kinds = (header.base | POINT, header.base | FRAME, header.base | VOID)
        closed = [first + i for i, marker in enumerate(view.tolist()) if marker in kinds]
        if closed and len(closed) <= closed[-1] - first:
            # A slot may have been filled after the look at it and before the look at its successor. A second look
            # finds it closed, and what one thread wrote stays in order; what is open then is in flight.
            view = file.markers(first, closed[-1] + 1)
            closed = [first + i for i, marker in enumerate(view.tolist()) if marker in kinds]
        if not (self._strong_order or dead):
            # Up to the first one whose marker was not set at the poll before: what is newer waits for it.
            self._seen[writer].update((number, slot) for slot in closed)
            new = next((slot for slot in closed if (number, slot) not in self._before), window)
            closed, window = [slot for slot in closed if slot < new], new
        end = window if rolled and len(closed) <= room else (closed[:room] or [first - 1])[-1] + 1
        stretches: list[tuple[int, int]] = []
        missing: list[tuple[int, int]] = []
        at = first
        for slot in closed[:room]:
            if stretches and slot == at:
                stretches[-1] = (stretches[-1][0], slot + 1)
            else:
                missing.extend((number, open_slot) for open_slot in range(at, slot))
                stretches.append((slot, slot + 1))
            at = slot + 1
        missing.extend((number, open_slot) for open_slot in range(at, end))
        return stretches, end, [] if dead else missing

    # ---- the END ----------------------------------------------------------------------------------------------

    def ended(self, writer: str) -> bool:
        """Whether the writer's END stands before the position last polled."""
        return self._ended.get(writer, False)

    def _look_back(self, writer: str, number: int, slot: int) -> None:
        """The END is a writer's last slot, so it is enough to look at the one before the position."""
        if self._ended.get(writer) or slot <= 0:
            return
        file = self._segment(writer, number)
        if file is None or file.header is None:
            return
        record = file.pread(SLOT_SIZE, HEADER_SIZE + (slot - 1) * SLOT_SIZE)
        if len(record) == SLOT_SIZE:
            _, value, _, _, marker = SLOT.unpack(record)
            if marker == file.header.base | FRAME and value == 1.0:
                self._ended[writer] = True

    # ---- what stands in them ----------------------------------------------------------------------------------

    def read(self, piece: SlotRange) -> Taken:
        """The records of a range that `poll` made; the same answer every time."""
        writer, number, first, end = piece
        file = self._segment(writer, number)
        if file is None or file.header is None:
            return Taken(b"", (), 0, (Damage(*piece, "the segment is missing"),))
        data = file.pread((end - first) * SLOT_SIZE, HEADER_SIZE + first * SLOT_SIZE)
        whole = len(data) // SLOT_SIZE
        damaged: list[Damage] = []
        if first + whole < end:
            damaged.append(Damage(writer, number, first + whole, end, "the segment is cut short"))
            data = data[: whole * SLOT_SIZE]
        lost = file.lost(first, first + whole) if whole else []
        damaged += [Damage(writer, number, a, b, "the disk can't read it") for a, b in lost]
        bad = [one for one in self._bad_slots(file, first, first + whole) if not any(a <= one[0] < b for a, b in lost)]
        damaged += [Damage(writer, number, a, b, "checksum of a sealed page") for a, b in bad]
        bad += lost
        base = file.header.base
        view = memoryview(data).cast("I")[7::8]
        if not bad and view.tobytes() == _word(base | POINT) * whole:
            return Taken(data, (), 0, tuple(damaged))
        skip = {slot for a, b in bad for slot in range(a, b)}
        records: list[bytes] = []
        frames: list[tuple[int, int, bytes]] = []
        voids, run = 0, -1
        for i, marker in enumerate(view.tolist()):
            slot = first + i
            if marker == base | POINT and slot not in skip:
                run = i if run < 0 else run
                continue
            if run >= 0:
                records.append(data[run * SLOT_SIZE : i * SLOT_SIZE])
                run = -1
            if slot in skip:
                continue
            if marker == base | FRAME:
                frame = self._frame(writer, data[i * SLOT_SIZE : (i + 1) * SLOT_SIZE])
                if frame is None:
                    damaged.append(Damage(writer, number, slot, slot + 1, "the frame of this slot can't be read"))
                else:
                    frames.append((slot, frame.kind, frame.payload))
            else:
                voids += 1
        if run >= 0:
            records.append(data[run * SLOT_SIZE :])
        return Taken(b"".join(records), tuple(frames), voids, tuple(damaged))

    def _bad_slots(self, file: _File, first: int, end: int) -> list[tuple[int, int]]:
        """Stretches of [first, end) whose page is not what it was when the segment was sealed."""
        if file.seal is None or end <= first:
            return []
        bad: list[tuple[int, int]] = []
        for page in range(first // _PAGE_SLOTS, (end - 1) // _PAGE_SLOTS + 1):
            data = file.pread(PAGE, HEADER_SIZE + page * PAGE)
            # Page 0 of the file is the header.
            if page + 1 >= len(file.seal.crcs) or crc32(data) != file.seal.crcs[page + 1]:
                bad.append((max(first, page * _PAGE_SLOTS), min(end, (page + 1) * _PAGE_SLOTS)))
        return bad

    def _frame(self, writer: str, record: bytes) -> frame_files.Frame | None:
        _, _, offset, number, _ = SLOT.unpack(record)
        file = self._file(writer, "frames", number)
        return None if file is None else read_frame(file.fd, offset, self._pages.pread)

    def scan_frames(self, writer: str) -> Iterator[tuple[int, bytes]]:
        """All valid frames of a writer as (kind, payload), in order; `damaged_frames` counts what was passed over.

        Raises:
            SpoolFormatError: a frames file of a version that this release doesn't know.
        """
        for number in self._numbers(_FRAMES).get(writer, []):
            name = frames_name(writer, number)
            try:
                fd = self._open(writer, name, number)
            except FileNotFoundError:
                continue
            try:
                frame_files.check_header(fd, self._folder / name, self._pages.pread)
                for frame in frame_files.scan(fd, self._count_damage, self._pages.pread):
                    yield frame.kind, frame.payload
            finally:
                os.close(fd)

    def _count_damage(self, start: int, end: int) -> None:
        self.damaged_frames += 1

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """Bytes of an open file of this folder, as they are read here: zeros where the disk has given up a page."""
        return self._pages.pread(fd, length, offset)

    def used_slots(self, writer: str, number: int) -> tuple[int, int, int] | None:
        """Of a segment: how many slots were used, how many have no marker, the free ones behind them too, and its
        descriptor (ours to close). None where no such segment was begun."""
        file = self._segment(writer, number)
        if file is None or file.header is None:
            return None
        kinds = (file.header.base | POINT, file.header.base | FRAME, file.header.base | VOID)
        closed = [marker in kinds for marker in file.markers(0, file.header.capacity).tolist()]
        used = len(closed) - closed[::-1].index(True) if True in closed else 0
        return used, file.header.capacity - sum(closed), file.fd

    def close(self) -> None:
        """Let the files go."""
        while self._files:
            os.close(self._files.popitem()[1].fd)
        fd, self._folder_fd = self._folder_fd, -1
        if fd >= 0:
            os.close(fd)


def _word(marker: int) -> bytes:
    return marker.to_bytes(4, sys.byteorder)


def _is_closed(marker: int, base: int) -> bool:
    return base < marker <= base | VOID


def _without(slots: Iterable[tuple[int, int]], those: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    gone = set(those)
    return [one for one in slots if one not in gone]


def _as_ranges(writer: str, slots: list[tuple[int, int]]) -> list[SlotRange]:
    return [SlotRange(writer, segment, slot, slot + 1) for segment, slot in slots]


def _joined(ranges: list[SlotRange]) -> tuple[SlotRange, ...]:
    """The same slots in the same order, in as few ranges as that takes."""
    joined: list[SlotRange] = []
    for piece in ranges:
        if joined and joined[-1].segment == piece.segment and joined[-1].end == piece.first:
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return tuple(joined)
