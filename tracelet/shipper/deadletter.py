"""What a destination refused for good, one JSON object a line, on disk before the batch counts as done.

`rejected-<destination>.jsonl` holds the lines, `rejected-<destination>.done` the digests of those that the destination
has taken since (`tracelet ship --dead-letters`). A line of version 1:

    version            1; a line without it was written by a release before this table
    time_unix_nano     when it was refused
    destination, batch by whom, and in which batch
    what               point, param, tag, span, event, artifact; damage and frame: it could not be read from the spool
    reason             in the destination's words
    at                 writer, attempt, rank; null where nobody can tell
    facts              what was logged, with the time that was sent; `items` where it is one of several, not said which
    opened             how the writer introduced itself, with its Resource: in its first line of a file
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracelet import codec
from tracelet.errors import SpoolFormatError
from tracelet.exporters.base import Refusal
from tracelet.records import WriterOpened
from tracelet.spool.disk import sync_folder

__all__ = ["VERSION", "DeadLetters", "Letter", "letters_in"]

VERSION = 1

_Name = tuple[str, str, str]  # attempt, kind, name


@dataclass(frozen=True, slots=True)
class Letter:
    """One line of a dead-letter file; what it lacks is empty."""

    digest: str  # of its bytes: by it the line is marked when the destination has taken it
    line: Mapping[str, Any]

    @property
    def version(self) -> object:
        """1, or what another release has written; None: a release before versions, or a line that can't be read."""
        return self.line.get("version")

    @property
    def what(self) -> str:
        """The kind of thing."""
        return str(self.line.get("what"))

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was logged."""
        facts = self.line.get("facts")
        return facts if isinstance(facts, Mapping) else {}

    @property
    def at(self) -> Mapping[str, Any]:
        """Writer, attempt and rank."""
        at = self.line.get("at")
        return at if isinstance(at, Mapping) else {}

    @property
    def time_unix_nano(self) -> int:
        """When it was refused."""
        time = self.line.get("time_unix_nano")
        return time if isinstance(time, int) else 0

    @property
    def count(self) -> int:
        """How many things were refused."""
        count = self.facts.get("count", 1)
        return count if isinstance(count, int) else 1

    @property
    def items(self) -> Sequence[Mapping[str, Any]]:
        """Each thing that may be meant."""
        items = self.facts.get("items")
        return items if isinstance(items, list) else [self.facts]


class DeadLetters:
    """The dead letters of one destination.

    `write` returns when the lines are on the disk; where it raises, none of them is. Written again after a crash
    (`repeat=True`), a batch's lines that are already there are left out. So is what the end of an attempt tells once
    more: a param or tag whose last line of that attempt has the same value and still waits. A tag's line waits until
    the destination takes a newer value, and no longer.
    """

    def __init__(self, folder: Path, destination_id: str) -> None:
        self.path = folder / f"rejected-{destination_id}.jsonl"
        self._done = folder / f"rejected-{destination_id}.done"
        self.destination = destination_id
        self._introduced: set[str] | None = None  # writers whose opening stands in the file
        self._waiting: dict[_Name, str] | None = None  # of each name the digest of the last value that waits

    def write(
        self,
        batch: int,
        items: Sequence[Refusal],
        *,
        time_unix_nano: int,
        repeat: bool = False,
        openings: Mapping[str, WriterOpened] | None = None,
    ) -> int:
        """Append `items` of a batch; `openings` are of the writers whose things they are.

        Returns how many stand in the file for this batch, now or since before a crash.
        """
        there = self._written_for(batch) if repeat else []
        introduced = self._openings_there()
        known = ChainMap[_Name, str]({}, self._names_waiting())
        lines: list[str] = []
        for item in items:
            opened = None if item.writer is None else (openings or {}).get(item.writer)
            line: dict[str, Any] = {
                "version": VERSION,
                "time_unix_nano": time_unix_nano,
                "destination": self.destination,
                "batch": batch,
                "what": item.what,
                "reason": item.reason,
                "at": None if opened is None else _place(str(item.writer), opened),
                "facts": dict(item.facts),
            }
            if _content(line) in there:
                continue
            name, value = _named(line)
            if name is not None:
                if known.get(name) == value:
                    continue
                known[name] = value
            if opened is not None and str(item.writer) not in introduced:
                introduced = introduced | {str(item.writer)}
                line["opened"] = json.loads(codec.encode(opened)[1])
            lines.append(json.dumps(line, default=str) + "\n")
        if lines:
            _append(self.path, lines)
            self._introduced = introduced
            self._names_waiting().update(known.maps[0])
        return len(there) + len(lines)

    def waiting(self) -> list[Letter]:
        """The lines that the destination has not taken since, in their order. Cost: reads the file."""
        done = self._taken()
        return [letter for letter in letters_in(self.path) if letter.digest not in done]

    def openings(self) -> dict[str, WriterOpened]:
        """How the writers introduced themselves whose things stand here."""
        found: dict[str, WriterOpened] = {}
        for letter in letters_in(self.path):
            opened, writer = letter.line.get("opened"), letter.at.get("writer")
            if not isinstance(opened, Mapping) or not isinstance(writer, str):
                continue
            try:
                record = codec.decode(codec.kind_of(WriterOpened), json.dumps(opened).encode())
            except SpoolFormatError:  # its letters are then refused by name, and keep nothing else back
                continue
            if isinstance(record, WriterOpened):
                found.setdefault(writer, record)
        return found

    def mark(self, letters: Iterable[Letter]) -> None:
        """The destination has these now. Again is no harm."""
        lines = [f"{letter.digest}\n" for letter in letters]
        if lines:
            _append(self._done, lines)
            self._waiting = None

    def overtaken(self, tags: AbstractSet[str]) -> int:
        """Give up what waits of these tags, of which the destination has just taken a newer value; how many lines.

        Sent once more it would write an old value over a newer one. Cost: reads the file where one of them waits.
        """
        names = {json.dumps(key) for key in tags}
        if not any(what == "tag" and name in names for _, what, name in self._names_waiting()):
            return 0
        old = [letter for letter in self.waiting() if letter.what == "tag" and _name_of(letter) in names]
        self.mark(old)
        return len(old)

    def _taken(self) -> set[str]:
        try:
            return set(self._done.read_text("ascii", "replace").split())
        except FileNotFoundError:
            return set()

    def _openings_there(self) -> set[str]:
        if self._introduced is None:
            self._introduced = {str(x.at.get("writer")) for x in letters_in(self.path) if "opened" in x.line}
        return self._introduced

    def _names_waiting(self) -> dict[_Name, str]:
        if self._waiting is None:
            named = (_named(letter.line) for letter in self.waiting())
            self._waiting = {name: value for name, value in named if name is not None}
        return self._waiting

    def _written_for(self, batch: int) -> list[str]:
        return [_content(letter.line) for letter in letters_in(self.path) if letter.line.get("batch") == batch]


def letters_in(path: Path) -> Iterator[Letter]:
    """The whole lines of a dead-letter file; one that can't be read is there, and empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    *whole, tail = data.split(b"\n")
    if _parsed(tail) is not None:  # an editor's last line; one of ours that is cut is written again
        whole.append(tail)
    for raw in whole:
        if raw.strip():
            yield Letter(hashlib.blake2b(raw, digest_size=16).hexdigest(), _parsed(raw) or {})


def _append(path: Path, lines: list[str]) -> None:
    """On disk, all of them or none."""
    new = not path.exists()
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        before, tail = _last_whole(file.fileno(), end)
        if before != end:
            file.truncate(before)  # what a crash left of a line, which is written again
        data = (b"\n" if tail else b"") + "".join(lines).encode("ascii")
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
            if new:
                sync_folder(path.parent)
        except OSError:
            file.truncate(before)  # all of it is written again
            raise


def _last_whole(file: int, end: int) -> tuple[int, bool]:
    """Where the file's whole lines end, and whether the last of them lacks its newline."""
    at, tail = end, b""
    while at > 0:
        start = max(0, at - 65_536)
        block = os.pread(file, at - start, start)
        newline = block.rfind(b"\n")
        tail = block[newline + 1 :] + tail
        if newline >= 0:
            at = start + newline + 1
            break
        at = start
    if tail and _parsed(tail) is not None:
        return end, True
    return at, False


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _place(writer: str, opened: WriterOpened) -> dict[str, Any]:
    return {"writer": writer, "attempt": opened.attempt_key, "rank": opened.rank}


def _named(line: Mapping[str, Any]) -> tuple[_Name | None, str]:
    """Of what an attempt's end tells once more (params, tags, long params' texts) its name, and its value's digest."""
    what, facts, at = line.get("what"), line.get("facts"), line.get("at")
    keys = {"param": ("key", "value"), "tag": ("key", "value"), "artifact": ("path", "text")}.get(str(what))
    if keys is None or not isinstance(facts, Mapping) or not facts.keys() >= set(keys):
        return None, ""
    attempt = at.get("attempt") if isinstance(at, Mapping) else None
    name, value = (json.dumps(facts[key], sort_keys=True, default=str) for key in keys)
    return (str(attempt), str(what), name), hashlib.blake2b(value.encode("ascii"), digest_size=16).hexdigest()


def _name_of(letter: Letter) -> str:
    name, _ = _named(letter.line)
    return "" if name is None else name[2]


def _content(line: Mapping[str, Any]) -> str:
    return json.dumps([line.get("what"), line.get("reason"), line.get("facts")], sort_keys=True, default=str)
