"""The cursor of a destination: its journal (written by the shipper) and its progress (followed by anybody else)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracelet.errors import SpoolError
from tracelet.guard import logger
from tracelet.spool.disk import sync_file, sync_folder
from tracelet.spool.journal import (
    Intent,
    Line,
    State,
    head_is_whole,
    intent_to_json,
    line,
    may_be_torn,
    opening,
    parse,
    positions_to_json,
    split,
)
from tracelet.spool.points import Address
from tracelet.spool.reader import Position, SlotRange
from tracelet.spool.store import MANIFEST, read_manifest, write_whole

__all__ = [
    "DestinationProgress",
    "Intent",
    "Journal",
    "Progress",
    "copy_name",
    "journal_name",
    "rank_mark",
    "sync_journals",
]

_COMPACT_AT = 4 * 2**20
_COMPACT_RATIO = 4
_STAMPS_TWICE = 256  # series of a batch; beyond that the journal would grow by a good part of what is sent


def journal_name(destination_id: str) -> str:
    """The file name of a destination's journal."""
    return f"journal-{destination_id}"


def rank_mark(attempt_key: str, rank: int) -> str:
    """What a journal calls the end of one more rank of an attempt, beside the attempt's own."""
    return f"{attempt_key}/{rank}"


def copy_name(destination_id: str) -> str:
    """The file name of the second copy of a compacted journal's head."""
    return f"journal-{destination_id}.copy"


class Journal:
    """What one destination was sent, in append-only lines; the write-ahead log of its cursor.

    The order of work: `intend` (before anything leaves), then the sending, then `ack`. After a restart `pending` is
    the batch whose answer nobody heard, and `positions` and `stamps` are those from before it, so that the same batch
    can be made again, bit for bit. Used by one thread of the one shipper that holds the folder.

    Durability: a line survives the death of the process when its call returns, and the loss of power after `sync`.
    """

    def __init__(self, folder: Path, destination_id: str, *, clock: Callable[[], float] = time.time) -> None:
        """Open or make the journal; cuts off what a death left of a last line, and mends what damage it can.

        Raises:
            SpoolFormatError: it is of a format this release doesn't know.
        """
        self._path = folder / journal_name(destination_id)
        self._copy = folder / copy_name(destination_id)
        self._destination = destination_id
        self._clock = clock
        self._state = State()
        if not self._path.exists():  # whoever takes it away wants everything sent again
            self._copy.unlink(missing_ok=True)
        for name in os.listdir(folder):  # what a death left of a shorter one; nobody else makes it
            if name.startswith(f".{self._path.name}."):
                (folder / name).unlink(missing_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._compact_at = _COMPACT_AT
        self._named = False  # the disk has the file's name
        try:
            self._load()
            if self._size == 0:
                self._write(opening(destination_id))
        except BaseException:
            os.close(self._fd)
            raise

    def _load(self) -> None:
        with open(self._fd, "rb", closefd=False) as file:
            data = file.read()
        lines, self._size = split(data)
        if self._size < len(data):
            os.ftruncate(self._fd, self._size)
        copy = None if head_is_whole(lines) else self._read_copy()
        # Said too: else a journal that is zeroed to its end would be sent again without a word.
        damaged = 0 if may_be_torn(data[self._size :]) else max(1, data.count(b"\n", self._size))
        for one in copy or ():
            assert one is not None
            self._state.apply(*one)
        # Stamps without the positions they belong to would give records that are sent again other times than before.
        headless = copy is None and not any(one is not None and one[0] == "snapshot" for one in lines)
        for one in lines:
            if one is None:
                damaged += 1
            elif not ((copy is not None and self._state.is_stale(*one)) or (headless and one[0] == "stamps")):
                damaged += not self._state.apply(*one)
        if damaged or copy is not None:
            self._tell_damage(damaged, mended=copy is not None)
            self._compact(anyway=True)

    def _read_copy(self) -> list[Line] | None:
        """The second copy of the head; None where there is none that is whole."""
        try:
            lines, _ = split(self._copy.read_bytes())
        except FileNotFoundError:
            return None
        return lines if head_is_whole(lines) and None not in lines else None

    def _tell_damage(self, lines: int, *, mended: bool) -> None:
        logger.warning(
            "%s is damaged (%d lines): %s",
            self._path,
            lines,
            "how far the destination had come is taken from the copy beside it"
            if mended
            else "batches that stood there may be sent again",
        )

    # ---- what stands there ------------------------------------------------------------------------------------

    @property
    def positions(self) -> dict[str, Position]:
        """By writer: where this destination stands, without the pending batch."""
        return self._state.positions

    @property
    def stamps(self) -> dict[str, tuple[int, int]]:
        """By series: last and highest millisecond given, without the pending batch."""
        return self._state.stamps

    @property
    def pending(self) -> Intent | None:
        """The batch that was intended and not acknowledged."""
        return self._state.pending

    @property
    def memory(self) -> dict[str, Any]:
        """What the exporter asked to be remembered."""
        return self._state.memory

    @property
    def done(self) -> dict[str, bool]:
        """Keys of the attempts whose end this destination has, and marks of the ranks (`rank_mark`)."""
        return self._state.done

    @property
    def delivered(self) -> int:
        """How many points and frames' records arrived, all batches together."""
        return self._state.delivered

    @property
    def refused(self) -> int:
        """How many the destination refused for good."""
        return self._state.refused

    @property
    def number(self) -> int:
        """The number of the last batch intended; 0 before the first."""
        return self._state.number

    # ---- what is written --------------------------------------------------------------------------------------

    def _append(self, kind: str, body: Mapping[str, Any]) -> None:
        self._write(line(kind, body))

    def _write(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._fd, memoryview(data)[written:], self._size + written)
        except BaseException:
            with contextlib.suppress(OSError):  # the next line is written over it, and a torn end is cut at opening
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def intend(
        self,
        ranges: Sequence[SlotRange],
        positions: Mapping[str, Position],
        note: Mapping[str, Any],
        stamps: Mapping[str, tuple[int, int]],
        extra: Mapping[str, Any] | None = None,
    ) -> Intent:
        """Write down a batch before it leaves. `positions` and `stamps`: those that it changes, as they are after it.

        Raises:
            SpoolError: another batch is pending.
            OSError: it could not be written; nothing has changed.
        """
        if self._state.pending is not None:
            raise SpoolError(f"batch {self.number} of {self._destination} has not been acknowledged")
        intent = Intent(
            self._state.number + 1, tuple(ranges), dict(positions), dict(stamps), dict(note), dict(extra or {})
        )
        self._append("intent", intent_to_json(intent))
        self._state.pending = intent
        self._state.number = intent.number
        return intent

    def ack(self, intent: Intent, *, delivered: int, refused: int) -> None:
        """The batch is with the destination: its positions and stamps hold from now on.

        Raises:
            SpoolError: it is not the pending one.
            OSError: it could not be written; the batch stays pending.
        """
        if self._state.pending is None or self._state.pending.number != intent.number:
            raise SpoolError(f"batch {intent.number} of {self._destination} is not pending")
        body = {
            "n": intent.number,
            "delivered": delivered,
            "refused": refused,
            "at": self._clock(),
            # Once more: to lose the positions is to send it all again, to lose the stamps is to give other times.
            "positions": positions_to_json(intent.positions),
        }
        if len(intent.stamps) <= _STAMPS_TWICE:
            body["stamps"] = {series: list(stamp) for series, stamp in intent.stamps.items()}
        self._append("ack", body)
        self._state.acked()
        self._state.delivered += delivered
        self._state.refused += refused
        if self._size > self._compact_at:
            self._compact()

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Keep the exporter's memory; nothing is written when it has not changed."""
        if dict(memory) != self._state.memory:
            self._append("memory", memory)
            self._state.memory = dict(memory)

    def close_attempt(self, attempt_key: str) -> None:
        """This destination has the end of the attempt, or of what a `rank_mark` stands for; again is no harm."""
        if not self._state.done.get(attempt_key):
            self._append("done", {"attempt": attempt_key})
            self._state.done[attempt_key] = True

    def _compact(self, *, anyway: bool = False) -> None:
        """Replace the file by one that says the same in fewer lines; if that fails, the long one stays.

        The copy first: behind it the long file's lines are stale, behind an older copy the new file's would be missing.
        """
        data = b"".join(self._state.snapshot(self._destination))
        if self._size <= _COMPACT_RATIO * len(data) and not anyway:
            self._compact_at = _COMPACT_RATIO * len(data)
            return
        try:
            write_whole(self._copy, data, durable=True)
        except OSError:
            self._compact_at = 2 * self._size
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.write(data)
                os.fsync(fd)  # or a loss of power could leave an empty file in the place of the long one
                os.rename(temporary, self._path)
            except BaseException:
                os.close(fd)
                raise
        except OSError:  # no room for it now, or a disk that fails
            temporary.unlink(missing_ok=True)
            self._compact_at = 2 * self._size
            return
        os.close(self._fd)
        self._fd, self._size, self._named = fd, len(data), False
        self._compact_at = max(_COMPACT_AT, _COMPACT_RATIO * len(data))

    def sync(self) -> None:
        """Bring all lines to the disk itself.

        Raises:
            OSError: it would not have them.
        """
        os.fdatasync(self._fd)
        if not self._named:
            sync_folder(self._path.parent)
            self._named = True

    def close(self) -> None:
        """Let the file go; again is no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def sync_journals(folder: Path) -> None:
    """Bring what all destinations have acknowledged to the disk: before what they have is deleted.

    Raises:
        OSError: the disk would not have it.
    """
    for path in folder.glob(f"{journal_name('')}*"):
        with contextlib.suppress(FileNotFoundError):
            sync_file(path)


@dataclass(frozen=True, slots=True)
class DestinationProgress:
    """How far one destination is, as its journal said at the last refresh."""

    positions: Mapping[str, Position]
    delivered: int
    refused: int
    memory: Mapping[str, Any]
    done: Mapping[str, bool]
    pending: Intent | None


class _Tail:
    """Follows one journal from another process: reads what was appended, begins again when it was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key: tuple[int, int] = (-1, -1)  # inode and size, as last seen
        self._head = b""  # how the file begins: its mark
        self._offset = 0
        self._reread: int | None = None  # the offset of a bad line for which the file was read again
        self.state = State(keep_stamps=False)

    def refresh(self) -> bool:
        """Take in what is new; False where there is no journal (any more)."""
        try:
            stat = os.stat(self._path)
            if (stat.st_ino, stat.st_size) == self._key:
                return True
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            stat = os.fstat(fd)
            head = os.pread(fd, 64, 0)
            if not self._head or head != self._head or stat.st_size < self._offset:
                self._restart()
                self._head, self._reread = head, None
            if self._read(fd) is not None:  # the writer may have cut a torn line and gone on: once more from the top
                self._restart()
                self._reread = self._read(fd)
        finally:
            os.close(fd)
        self._key = (stat.st_ino, stat.st_size)
        return True

    def _restart(self) -> None:
        self._offset = 0
        self.state = State(keep_stamps=False)

    def _read(self, fd: int) -> int | None:
        """Read on; the offset of the first bad line that has not been read twice already."""
        bad: int | None = None
        data = os.pread(fd, max(0, os.fstat(fd).st_size - self._offset), self._offset)
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            parsed = parse(data[start:end])
            if parsed is not None:
                self.state.apply(*parsed)
            elif bad is None and self._offset + start > (-1 if self._reread is None else self._reread):
                bad = self._offset + start
            start = end + 1
        self._offset += start
        return bad


class Progress:
    """How far the destinations of a run are, for processes that don't ship: training itself, the command line."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[str, _Tail] = {}
        self._manifest_key: tuple[int, int] | None = None
        self._ids: tuple[str, ...] = ()
        self.destinations: dict[str, DestinationProgress] = {}

    def refresh(self) -> None:
        """Read what the shipper has written since; costs a `stat` for each destination when that is nothing."""
        try:
            stat = os.stat(self._folder / MANIFEST)
        except FileNotFoundError:
            return
        key = (stat.st_ino, stat.st_mtime_ns)
        if key != self._manifest_key:
            manifest = read_manifest(self._folder)
            self._ids = tuple(manifest.destinations) if manifest is not None else ()
            self._manifest_key = key
        found: dict[str, DestinationProgress] = {}
        for one in self._ids:
            tail = self._tails.setdefault(one, _Tail(self._folder / journal_name(one)))
            if tail.refresh():
                state = tail.state
                found[one] = DestinationProgress(
                    state.positions, state.delivered, state.refused, state.memory, state.done, state.pending
                )
        self.destinations = found

    def _everywhere(self) -> list[DestinationProgress] | None:
        """Every destination of the manifest; None where one has no journal yet, or there is no destination."""
        if not self._ids or len(self.destinations) < len(self._ids):
            return None
        return list(self.destinations.values())

    def passed(self, address: Address) -> bool:
        """Whether the record in this slot is delivered (or refused for good) at every destination.

        A run without a destination is undelivered.
        """
        everywhere = self._everywhere()
        return everywhere is not None and all(
            (where := one.positions.get(address.writer)) is not None and where.passed(address.segment, address.slot)
            for one in everywhere
        )

    def reached(self, head: Address) -> bool:
        """Whether everything below `head` (see `Writer.heads`) is delivered at every destination."""
        everywhere = self._everywhere()
        if everywhere is None:
            return False
        if (head.segment, head.slot) == (1, 0):
            return True
        for one in everywhere:
            where = one.positions.get(head.writer)
            if where is None or (where.segment, where.next) < (head.segment, head.slot):
                return False
            if any(slot < (head.segment, head.slot) for slot in where.open):
                return False
        return True
