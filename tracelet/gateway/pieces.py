"""Long values on their way: the pieces that have come, kept until the value is whole, in any order, over restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelet.guard import guard, logger

if TYPE_CHECKING:
    from tracelet.otlp.arrival import Piece

__all__ = ["FILE", "MAX_BYTES", "Pieces", "Whole"]

FILE = "pieces.jsonl"
MAX_BYTES = 64 * 2**20
"""Of a run's unfinished values in memory; beyond it the one that has waited longest is given up."""

SLACK = 2**20
"""Bytes that the file may have beyond twice what is unfinished, until it is written anew."""

_PIECE_BYTES = 1024  # what a piece takes beside its text: else empty ones would take all memory, and count nothing

_Key = tuple[str, ...]


class Whole:
    """A value whose pieces have all come, and the times of its first piece."""

    def __init__(self, pieces: Mapping[int, Piece]) -> None:
        first = pieces[min(pieces)]
        self.piece = first
        self.text = "".join(pieces[index].text for index in sorted(pieces))
        self.time_unix_nano = min(piece.time_unix_nano for piece in pieces.values())

    @property
    def is_right(self) -> bool:
        """Its digest is the one that was announced."""
        digest = sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()
        return digest == self.piece.digest.removeprefix("sha256:")


class Pieces:
    """The unfinished values of one run. Used under the run's lock.

    Each piece is a line of a file before `take` returns; the file is emptied when nothing is unfinished, and written
    anew when most of it is about values that are done.
    """

    def __init__(self, folder: Path, make: Any, *, max_bytes: int = MAX_BYTES, slack: int = SLACK) -> None:
        """`make(**fields)` builds a `Piece` of what stands in a line."""
        self._path = folder / FILE
        self._max_bytes = max_bytes
        self._slack = slack
        self._open: dict[_Key, dict[int, Piece]] = {}
        self._bytes = 0
        self._lines: dict[_Key, int] = {}  # bytes in the file
        self._file_bytes = self._live_bytes = 0
        self._fd = -1
        self._load(make)
        self._shorten()

    def _load(self, make: Any) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        good = 0
        for line in data.splitlines(keepends=True):
            try:
                body = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if "done" in body:
                    self._drop(tuple(body["done"]))
                else:
                    self._add(tuple(body["of"]), make(**body["piece"]), len(line))
            except (ValueError, TypeError, KeyError):
                logger.warning("a line of %s can't be read; the value it belongs to stays unfinished", self._path)
            good += len(line)
        self._file_bytes = good if self._open else 0
        if self._file_bytes < len(data):
            os.truncate(self._path, self._file_bytes)

    def _add(self, key: _Key, piece: Piece, line: int) -> None:
        held = self._open.setdefault(key, {})
        if piece.index not in held:
            held[piece.index] = piece
            self._bytes += len(piece.text) + _PIECE_BYTES
            self._lines[key] = self._lines.get(key, 0) + line
            self._live_bytes += line

    def _drop(self, key: _Key) -> None:
        for piece in self._open.pop(key, {}).values():
            self._bytes -= len(piece.text) + _PIECE_BYTES
        self._live_bytes -= self._lines.pop(key, 0)

    @property
    def unfinished(self) -> int:
        """How many values lack a piece."""
        return len(self._open)

    def take(self, instance: str, piece: Piece) -> Whole | None:
        """Keep one piece; the value, where it was the last one that lacked. Call `done` once that is stored.

        Raises:
            OSError: it could not be written.
        """
        key = _key(instance, piece)
        held = self._open.get(key, {})
        if piece.index not in held:
            line = _line_of(key, piece) if piece.count > 1 else b""
            self._append(line)
            self._add(key, piece, len(line))
        held = self._open[key]
        if len(held) < piece.count:
            self._make_room(key)
            return None
        whole = Whole(held)
        if not whole.is_right:
            logger.warning(
                "run value %s: its %d pieces don't add up to the digest that was announced; given up",
                piece.key,
                piece.count,
            )
            self.done(instance, piece)
            return None
        return whole

    def done(self, instance: str, piece: Piece) -> None:
        """The value of this piece is stored: its pieces may go."""
        key = _key(instance, piece)
        if key not in self._open:
            return
        self._drop(key)
        if not self._open and self._fd >= 0:
            os.ftruncate(self._fd, 0)
            self._file_bytes = 0
        elif piece.count > 1:
            self._append(_line({"done": key}))
            self._shorten()

    def _make_room(self, newest: _Key) -> None:
        while self._bytes > self._max_bytes:
            oldest = next((key for key in self._open if key != newest), newest)
            logger.warning("gives up a long value that lacks pieces (%s): too many wait for theirs", oldest[2])
            self._drop(oldest)
            self._append(_line({"done": oldest}))
            self._shorten()

    def _append(self, line: bytes) -> None:
        if not line:
            return
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file_bytes += os.write(self._fd, line)

    def _shorten(self) -> None:
        """Write what is unfinished into a new file, where the old one is mostly about what is done.

        That is flushed before it takes the old one's place: whoever waits for a flush of the old one has it too.
        """
        if self._file_bytes <= 2 * self._live_bytes + self._slack:
            return
        new = self._path.with_name(f"{FILE}.new")
        with guard("shorten the file of long values"):  # else it stays as long as it is
            with open(new, "wb") as file:
                for key, held in self._open.items():
                    file.writelines(_line_of(key, piece) for piece in held.values())
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.replace(new, self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            self.close()
            self._file_bytes = size

    def to_sync(self) -> list[int]:
        """A duplicate of the descriptor that a flush is about, for the caller to flush and to close."""
        return [os.dup(self._fd)] if self._fd >= 0 else []

    def close(self) -> None:
        """Let the file go; what is unfinished stays in it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with guard("close the pieces of long values"):
                os.close(fd)


def _line_of(key: _Key, piece: Piece) -> bytes:
    return _line({"of": key, "piece": asdict(piece)})


def _line(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode("ascii") + b"\n"


def _key(instance: str, piece: Piece) -> _Key:
    return (instance, piece.event, piece.key, piece.digest, str(piece.count), piece.span_id or "")
