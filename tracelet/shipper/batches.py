"""From slots to a batch: collects what writers have closed; the same slots make the same batch every time."""

from __future__ import annotations

from array import array
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tracelet.exporters.base import Refusal
from tracelet.records import (
    Batch,
    FlushAsked,
    MetricNamed,
    Part,
    PointBatch,
    Record,
    RunInfo,
    WriterEnded,
    WriterOpened,
)
from tracelet.shipper import stamps
from tracelet.shipper.roster import Roster, decode_frame
from tracelet.shipper.stamps import State
from tracelet.spool.reader import Position, SlotRange, SpoolReader, Taken

__all__ = ["Assembled", "Gathering", "assemble", "empty_points"]

Piece = tuple[SlotRange, Taken]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A batch, and what its being delivered changes."""

    batch: Batch
    stamps: Mapping[str, State]  # states of the series it changes
    refusals: tuple[Refusal, ...]  # what was damaged in the spool: it can't be sent, and is not passed over
    latest_unix_nano: Mapping[str, int]  # attempt -> the clock's time of its latest point here
    extra: Mapping[str, Any] | None = None  # of a batch that is not made of slots: from what it is made again

    @property
    def empty(self) -> bool:
        """Nothing in it for a destination: only names, wishes to flush, voided slots."""
        return not self.refusals and not any(part.records or len(part.points) for part in self.batch.parts)

    @property
    def points(self) -> int:
        """How many points it holds."""
        return sum(len(part.points) for part in self.batch.parts)


@dataclass
class Gathering:
    """The slots on their way into a destination's next batch. Memory is bounded by the batch's size."""

    reader: SpoolReader
    roster: Roster
    pieces: list[Piece] = field(default_factory=list)
    positions: dict[str, Position] = field(default_factory=dict)  # of the writers that contributed, after the batch
    slots: int = 0
    urgent: bool = False  # somebody waits, or a writer has ended
    since: float | None = None  # when the first slot came

    def take(self, writer: str, ranges: Iterable[SlotRange], after: Position, now: float) -> None:
        """Read newly closed `ranges` of `writer`, whose position is `after` once they are delivered."""
        # All of it is read before anything is noted: a read that fails must not leave a position beyond its slots.
        pieces = [(piece, self.reader.read(piece)) for piece in ranges]
        self.positions[writer] = after
        for piece, taken in pieces:
            self.pieces.append((piece, taken))
            self.slots += piece.end - piece.first
            for _, kind, payload in taken.frames:
                record = decode_frame(kind, payload)
                if record is not None:
                    self.roster.learn(writer, record)
                    self.urgent = self.urgent or isinstance(record, (FlushAsked, WriterEnded))
        if self.since is None and self.slots:
            self.since = now

    def ranges(self) -> list[SlotRange]:
        """The slots in sending order, neighbours joined: polls are many, and a journal's line should be short."""
        joined: list[SlotRange] = []
        for piece, _ in self.pieces:
            last = joined[-1] if joined else None
            if (
                last is not None
                and (last.writer, last.segment, last.end) == (piece.writer, piece.segment, piece.first)
            ):  # fmt: skip
                joined[-1] = SlotRange(last.writer, last.segment, last.first, piece.end)
            else:
                joined.append(piece)
        return joined


def assemble(
    pieces: Iterable[Piece],
    *,
    number: int,
    run: RunInfo,
    folder: str,
    roster: Roster,
    states: Mapping[str, State],
    rising_limit_s: float | None,
    stamped: bool = False,
) -> Assembled:
    """The batch of `pieces`: one part a writer, in the order in which writers first appear in them.

    Depends on nothing but the arguments and the writers' names, which never change: a restarted shipper that hands in
    the same slots and the same states gets the same batch. `stamped`: the times are right already, whoever sent them
    having made them rise; in whatever order they came, each point keeps its own, so that a repeat stays the same. One
    that a death left twice in the spool, by two writers, counts once: MLflow would be given it a millisecond later.
    """
    by_writer: dict[str, list[Piece]] = {}
    for piece, taken in pieces:
        by_writer.setdefault(piece.writer, []).append((piece, taken))
    changed: dict[str, State] = {}
    refusals: list[Refusal] = []
    parts: list[Part] = []
    latest: dict[str, int] = {}
    seen: dict[str, set[tuple[str, int, int, bytes]]] = {}
    for writer, mine in by_writer.items():
        records: list[Record] = []
        for piece, taken in mine:
            refusals.extend(_damage(piece, taken))
            for slot, kind, payload in taken.frames:
                record = decode_frame(kind, payload)
                if record is None:
                    refusals.append(_unreadable(piece, slot, kind, payload))
                    continue
                roster.learn(writer, record)
                if not isinstance(record, (MetricNamed, FlushAsked)):
                    records.append(record)
        opened = roster.opened[writer]
        raw = _points(b"".join(taken.records for _, taken in mine), roster.names.get(writer, {}), writer, refusals)
        if len(raw):
            latest[opened.attempt_key] = max(latest.get(opened.attempt_key, 0), *raw.time_unix_nano)
        points = raw
        if not stamped:
            points, after = stamps.stamp(raw, instance_of(opened), ChainMap(changed, states), rising_limit_s)  # type: ignore[arg-type]
            changed.update(after)
        else:
            points = _without_repeats(raw, seen.setdefault(instance_of(opened), set()))
        parts.append(Part(writer, opened, tuple(records), points))
    batch = Batch(number, run, folder, tuple(part for part in parts if part.records or len(part.points)))
    return Assembled(batch, changed, tuple(refusals), latest)


def instance_of(opened: WriterOpened) -> str:
    """What tells this writer's series from those of other ranks and attempts."""
    return str(opened.resource.get("service.instance.id", f"{opened.attempt_key}/{opened.rank}"))


def empty_points() -> PointBatch:
    """No points."""
    return PointBatch({}, array("Q"), array("d"), array("q"), array("I"))


def _points(records: bytes, names: Mapping[int, str], writer: str, refusals: list[Refusal]) -> PointBatch:
    points = PointBatch.from_records(records, {})
    used = set(points.metric_ids)
    lost = used - names.keys()
    if lost:  # the frame that named them is damaged: their values are kept where a person can find them
        kept = PointBatch({}, array("Q"), array("d"), array("q"), array("I"))
        for time, value, iteration, metric_id in zip(
            points.time_unix_nano, points.values, points.iterations, points.metric_ids, strict=True
        ):
            if metric_id in lost:
                facts = {
                    "writer": writer,
                    "metric_id": metric_id,
                    "value": value,
                    "iteration": iteration,
                    "time_unix_nano": time,
                }
                refusals.append(
                    Refusal("point", "the frame with its metric's name is damaged in the spool", facts, writer)
                )
                continue
            kept.time_unix_nano.append(time)
            kept.values.append(value)
            kept.iterations.append(iteration)
            kept.metric_ids.append(metric_id)
        points = kept
    return replace(points, names={metric_id: names[metric_id] for metric_id in sorted(used - lost)})


def _without_repeats(points: PointBatch, seen: set[tuple[str, int, int, bytes]]) -> PointBatch:
    """Points that are not in `seen`, which holds those of the same rank; its times rise, so two equal ones are one."""
    bits = memoryview(points.values).cast("B")
    fresh = []
    for index, (time, iteration, metric_id) in enumerate(
        zip(points.time_unix_nano, points.iterations, points.metric_ids, strict=True)
    ):
        identity = (points.names[metric_id], time, iteration, bytes(bits[8 * index : 8 * index + 8]))  # NaN, too
        if identity not in seen:
            seen.add(identity)
            fresh.append(index)
    if len(fresh) == len(points):
        return points
    columns = (points.time_unix_nano, points.values, points.iterations, points.metric_ids)
    times, values, iterations, ids = (array(one.typecode, (one[index] for index in fresh)) for one in columns)
    return replace(points, time_unix_nano=times, values=values, iterations=iterations, metric_ids=ids)  # type: ignore[arg-type]


def _damage(piece: SlotRange, taken: Taken) -> list[Refusal]:
    where = {"writer": piece.writer, "segment": piece.segment}
    return [Refusal("damage", str(damage), where, piece.writer) for damage in taken.damaged]


def _unreadable(piece: SlotRange, slot: int, kind: int, payload: bytes) -> Refusal:
    facts = {
        "writer": piece.writer,
        "segment": piece.segment,
        "slot": slot,
        "kind": kind,
        "payload": payload.decode("utf-8", "backslashreplace"),
    }
    return Refusal("frame", "this release of tracelet can't read it", facts, piece.writer)
