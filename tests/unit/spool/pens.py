"""Writers with plain parts, and what stands in a spool folder, for the spool's tests."""

from __future__ import annotations

import json
import operator
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracelet.errors import InvalidValue, RunClosed
from tracelet.spool.reader import START, Damage, Position, SlotRange, SpoolReader
from tracelet.spool.writer import Writer

OPENED, NAMED, TEXT, ENDED = 1, 3, 4, 10


def to_float(name: str, value: object) -> float:
    if isinstance(value, str) or value is None:
        raise InvalidValue(f"{name}: {value!r}")
    return float(value)  # type: ignore[arg-type]


def to_iteration(iteration: object) -> int:
    number = operator.index(iteration)  # type: ignore[arg-type]
    if not -(2**63) <= number < 2**63:
        raise InvalidValue(f"iteration {iteration!r}")
    return number


def check_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise InvalidValue(f"name {name!r}")
    return name


def name_frame(metric_id: int, name: str) -> tuple[int, bytes]:
    return NAMED, json.dumps([metric_id, name]).encode()


def pen(folder: Path, *, role: str = "first", **options: Any) -> Writer:
    options.setdefault("name_frame", name_frame)
    options.setdefault("to_float", to_float)
    return Writer(
        folder,
        role=role,
        opening=lambda role: (OPENED, role.encode()),
        check_name=check_name,
        to_iteration=to_iteration,
        closed=lambda: RunClosed("the run has been stopped"),
        **options,
    )


def end(writer: Writer) -> None:
    writer.end(ENDED, b"{}", time.time_ns())


@dataclass
class Story:
    """What one writer left, in slot order."""

    role: str = ""
    points: list[tuple[str, float, int]] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    frames: list[tuple[int, bytes]] = field(default_factory=list)
    voids: int = 0
    damaged: list[Damage] = field(default_factory=list)
    ranges: list[SlotRange] = field(default_factory=list)
    position: Position = START
    ended: bool = False

    def take(self, reader: SpoolReader, ranges: tuple[SlotRange, ...]) -> None:
        self.ranges += ranges
        for piece in ranges:
            taken = reader.read(piece)
            self.damaged += taken.damaged
            self.voids += taken.voids
            for _, kind, payload in taken.frames:
                self.frames.append((kind, payload))
                if kind == OPENED:
                    self.role = payload.decode()
            names = self.names()
            for at, value, iteration, metric_id, _ in struct.iter_unpack("<QdqII", taken.records):
                self.points.append((names[metric_id], value, iteration))
                self.times.append(at)

    def names(self) -> dict[int, str]:
        return dict(json.loads(payload) for kind, payload in self.frames if kind == NAMED)

    def slots(self) -> list[tuple[int, int]]:
        return [(piece.segment, slot) for piece in self.ranges for slot in range(piece.first, piece.end)]


def drain(folder: Path, *, limit: int = 10_000, dead: bool = False) -> dict[str, Story]:
    """Everything that can be read now, by writer in order of appearance."""
    reader = SpoolReader(folder)
    stories: dict[str, Story] = {}
    try:
        for writer in reader.writers():
            story = stories[writer] = Story()
            while True:
                ranges, story.position = reader.poll(writer, story.position, limit, dead=dead)
                if not ranges:
                    break
                story.take(reader, ranges)
            story.ended = reader.ended(writer)
    finally:
        reader.close()
    return stories


def only(stories: dict[str, Story]) -> Story:
    (story,) = stories.values()
    return story


def until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    """Poll until `true()`; fails after `within_s`."""
    limit = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < limit, f"not within {within_s} s"
        time.sleep(0.002)
