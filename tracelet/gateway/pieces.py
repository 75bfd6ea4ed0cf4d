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
"""Of a run's unfinished values; beyond it the one that has waited longest is given up."""

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

    Each piece is a line of a file before `take` returns; the file is emptied when nothing is unfinished.
    """

    def __init__(self, folder: Path, make: Any, *, max_bytes: int = MAX_BYTES) -> None:
        """`make(**fields)` builds a `Piece` of what stands in a line."""
        self._path = folder / FILE
        self._max_bytes = max_bytes
        self._open: dict[_Key, dict[int, Piece]] = {}
        self._bytes = 0
        self._fd = -1
        self._load(make)

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
                    self._add(tuple(body["of"]), make(**body["piece"]))
            except (ValueError, TypeError, KeyError):
                logger.warning("a line of %s can't be read; the value it belongs to stays unfinished", self._path)
            good += len(line)
        if good < len(data) or not self._open:
            os.truncate(self._path, good if self._open else 0)

    def _add(self, key: _Key, piece: Piece) -> None:
        held = self._open.setdefault(key, {})
        if piece.index not in held:
            held[piece.index] = piece
            self._bytes += len(piece.text)

    def _drop(self, key: _Key) -> None:
        for piece in self._open.pop(key, {}).values():
            self._bytes -= len(piece.text)

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
            if piece.count > 1:
                self._append({"of": key, "piece": asdict(piece)})
            self._add(key, piece)
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
        elif piece.count > 1:
            self._append({"done": key})

    def _make_room(self, newest: _Key) -> None:
        while self._bytes > self._max_bytes:
            oldest = next((key for key in self._open if key != newest), newest)
            logger.warning("gives up a long value that lacks pieces (%s): too many wait for theirs", oldest[2])
            self._drop(oldest)
            self._append({"done": oldest})

    def _append(self, body: Mapping[str, Any]) -> None:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(self._fd, json.dumps(body).encode("ascii") + b"\n")

    def to_sync(self) -> list[int]:
        """A duplicate of the descriptor that a flush is about, for the caller to flush and to close."""
        return [os.dup(self._fd)] if self._fd >= 0 else []

    def close(self) -> None:
        """Let the file go; what is unfinished stays in it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with guard("close the pieces of long values"):
                os.close(fd)


def _key(instance: str, piece: Piece) -> _Key:
    return (instance, piece.event, piece.key, piece.digest, str(piece.count), piece.span_id or "")
