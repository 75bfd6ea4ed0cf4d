"""The journal's lines, and the state that they add up to: shared by who writes it and who only follows it.

A line is `<crc32 of the rest, 8 hex digits> <kind> <JSON>\\n`. Kinds: `journal` (first line: format), `snapshot` and
`stamps` (the whole state, written at compaction), `intent`, `ack`, `memory`, `done`. The first line, a snapshot and its
stamps are the head: a compacted journal stands on it, so it is there twice, the second time in a file of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any
from zlib import crc32

from tracelet.errors import SpoolFormatError
from tracelet.spool.reader import Position, SlotRange

__all__ = ["FORMAT", "Intent", "Line", "State", "head_is_whole", "line", "may_be_torn", "parse", "split"]

_NOT_WHAT_IT_SAYS = (ValueError, TypeError, LookupError, AttributeError, RecursionError)

Line = tuple[str, str] | None
"""Kind and JSON text of a line; None for one that is damaged."""

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Intent:
    """A batch about to be sent: which slots in which order, and what holds once it is acknowledged."""

    number: int
    ranges: tuple[SlotRange, ...]
    positions: Mapping[str, Position]  # the changed ones, after this batch
    stamps: Mapping[str, tuple[int, int]]  # the changed ones, after this batch
    note: Mapping[str, Any]
    extra: Mapping[str, Any]


def line(kind: str, body: Mapping[str, Any]) -> bytes:
    """The bytes of one line."""
    rest = f"{kind} {json.dumps(body, separators=(',', ':'))}".encode("ascii")
    return b"%08x %s\n" % (crc32(rest), rest)


def opening(destination: str, stamps: int | None = None) -> bytes:
    """The first line of a journal; its random mark tells a follower that the file is another one.

    `stamps`: a snapshot follows, and so many lines of stamps.
    """
    head = {} if stamps is None else {"stamps": stamps}
    return line("journal", {"mark": os.urandom(8).hex(), "format": FORMAT, "destination": destination, **head})


def split(data: bytes) -> tuple[list[Line], int]:
    """The lines of a journal, and how long it is without what a death left of a last one."""
    lines: list[Line] = []
    start = good = 0
    while (end := data.find(b"\n", start)) >= 0:
        lines.append(parse(data[start:end]))
        start = end + 1
        if lines[-1] is not None:
            good = start
    while lines and lines[-1] is None:
        lines.pop()
    return lines, good


def may_be_torn(rest: bytes) -> bool:
    """Whether a death in the middle of a line may have left this behind the last whole one: its beginning, or nothing.

    The loss of power, too, can leave more: zeros where a page was.
    """
    return all(0x20 <= byte < 0x7F for byte in rest)


def head_is_whole(lines: Sequence[Line]) -> bool:
    """Whether the first line is there, and the snapshot and the stamps that it promises."""
    if not lines or lines[0] is None or lines[0][0] != "journal":
        return False
    try:
        stamps = json.loads(lines[0][1]).get("stamps")
    except _NOT_WHAT_IT_SAYS:
        return False
    if type(stamps) is not int:
        return stamps is None
    head = [one and one[0] for one in lines[1 : 2 + stamps]]
    return head == ["snapshot"] + ["stamps"] * stamps


def parse(text: bytes) -> tuple[str, str] | None:
    """Kind and JSON text of a line (without its newline); None if it is not whole."""
    check, rest = text[:8], text[9:]
    try:
        if text[8:9] != b" " or int(check, 16) != crc32(rest):
            return None
        kind, _, body = rest.decode("ascii").partition(" ")
    except ValueError:
        return None
    return kind, body


def positions_to_json(positions: Mapping[str, Position]) -> dict[str, Any]:
    return {
        writer: [where.segment, where.next, [list(slot) for slot in where.open]] for writer, where in positions.items()
    }


def _positions(body: Mapping[str, Any]) -> dict[str, Position]:
    return {
        writer: Position(index(segment), index(slot), tuple((index(a), index(b)) for a, b in opened))
        for writer, (segment, slot, opened) in body.items()
    }


def intent_to_json(intent: Intent) -> dict[str, Any]:
    return {
        "n": intent.number,
        "ranges": [list(piece) for piece in intent.ranges],
        "positions": positions_to_json(intent.positions),
        "stamps": {series: list(stamp) for series, stamp in intent.stamps.items()},
        "note": dict(intent.note),
        "extra": dict(intent.extra),
    }


def _stamps(body: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    return {series: (index(last), index(high)) for series, (last, high) in body.items()}


def _intent(body: Mapping[str, Any]) -> Intent:
    return Intent(
        index(body["n"]),
        tuple(SlotRange(str(w), index(segment), index(a), index(b)) for w, segment, a, b in body["ranges"]),
        _positions(body["positions"]),
        _stamps(body["stamps"]),
        dict(body["note"]),
        dict(body["extra"]),
    )


@dataclass
class State:
    """What the lines of a journal add up to."""

    keep_stamps: bool = True
    positions: dict[str, Position] = field(default_factory=dict)
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    done: dict[str, bool] = field(default_factory=dict)
    pending: Intent | None = None
    number: int = 0
    delivered: int = 0
    refused: int = 0

    def apply(self, kind: str, text: str) -> bool:
        """Take one line into account; kinds that a newer minor version added are passed over. False where what it
        holds is not what its kind says.

        Raises:
            SpoolFormatError: the journal is of a format this release doesn't know.
        """
        if kind == "stamps" and not self.keep_stamps:
            return True
        try:
            self._apply(kind, json.loads(text))
        except _NOT_WHAT_IT_SAYS:
            return False
        return True

    def _apply(self, kind: str, body: dict[str, Any]) -> None:
        if kind == "journal":
            if body["format"] != FORMAT:
                raise SpoolFormatError(
                    f"the journal of {body.get('destination')} has format {body['format']}, this tracelet reads"
                    f" {FORMAT}: use the release that wrote it, or a newer one",
                    version=body["format"],
                )
        elif kind == "intent":
            intent = _intent(body)
            if self.pending is not None and intent.number > self.pending.number:
                self.acked()  # its `ack` was lost to a damaged line; the next intent proves it
            self.pending = intent
            self.number = self.pending.number
        elif kind == "ack":
            number, positions = index(body["n"]), _positions(body.get("positions", {}))
            stamps = _stamps(body.get("stamps", {})) if self.keep_stamps else {}
            delivered, refused = index(body["delivered"]), index(body["refused"])
            if self.pending is not None and self.pending.number <= number:
                self.acked()
            self.positions.update(positions)  # its `intent` may be a damaged line
            self.stamps.update(stamps)
            self.number = max(self.number, number)
            self.delivered += delivered
            self.refused += refused
        elif kind == "memory":
            self.memory = dict(body)
        elif kind == "done":
            self.done[str(body["attempt"])] = True
        elif kind == "stamps":
            self.stamps.update(_stamps(body))
        elif kind == "snapshot":
            numbers = index(body["number"]), index(body["delivered"]), index(body["refused"])
            pending = None if body["pending"] is None else _intent(body["pending"])
            memory, done = dict(body["memory"]), dict(body["done"])
            self.positions = _positions(body["positions"])
            self.memory, self.done, self.pending = memory, done, pending
            self.number, self.delivered, self.refused = numbers

    def acked(self) -> None:
        """The pending batch has arrived: what it changes holds."""
        intent, self.pending = self.pending, None
        if intent is not None:
            self.positions.update(intent.positions)
            if self.keep_stamps:
                self.stamps.update(intent.stamps)

    def is_stale(self, kind: str, text: str) -> bool:
        """A line that a snapshot of this state has taken into account already; for lines read behind it."""
        if kind in ("journal", "snapshot", "stamps"):
            return True
        if kind not in ("intent", "ack"):
            return False
        try:
            number = index(json.loads(text)["n"])
        except _NOT_WHAT_IT_SAYS:
            return True
        awaited = kind == "ack" and self.pending is not None and self.pending.number == number
        return number <= self.number and not awaited

    def snapshot(self, destination: str) -> list[bytes]:
        """The lines of a journal that says just this: a head."""
        series = list(self.stamps.items())
        starts = range(0, len(series), 1000)
        lines = [
            opening(destination, len(starts)),
            line(
                "snapshot",
                {
                    "positions": positions_to_json(self.positions),
                    "memory": self.memory,
                    "done": self.done,
                    "pending": None if self.pending is None else intent_to_json(self.pending),
                    "number": self.number,
                    "delivered": self.delivered,
                    "refused": self.refused,
                },
            ),
        ]
        for start in starts:
            lines.append(line("stamps", {name: list(stamp) for name, stamp in series[start : start + 1000]}))
        return lines
