"""What stands in a spool folder, as records and points a test can compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tracelet import codec
from tracelet.records import MetricNamed, PointBatch, Record, WriterOpened
from tracelet.spool.reader import Position, SpoolReader

R = TypeVar("R")


@dataclass(frozen=True)
class Point:
    """One value as it was logged."""

    name: str
    value: float
    iteration: int
    time_unix_nano: int
    writer: str


@dataclass(frozen=True)
class Spooled:
    """Everything in one run's folder, each writer in its own order."""

    points: list[Point]
    records: list[tuple[str, Record]]
    voids: int
    open_slots: int

    def of(self, kind: type[R]) -> list[R]:
        """The records of one kind."""
        return [record for _, record in self.records if isinstance(record, kind)]

    def roles(self) -> list[str]:
        """The role of each writer."""
        return [record.role for record in self.of(WriterOpened)]

    def values(self, name: str) -> list[tuple[int, float]]:
        """Iteration and value of each point of one metric."""
        return [(p.iteration, p.value) for p in self.points if p.name == name]


def folder_of(spool: Path, run_id: str | None = None) -> Path:
    """The folder of the only run (or of `run_id`) under a spool root."""
    found = [p for p in spool.glob(f"{run_id or '*'}/*") if p.is_dir()]
    assert len(found) == 1, found
    return found[0]


def read(folder: Path) -> Spooled:
    """Read a folder no shipper serves, as a shipper would."""
    reader = SpoolReader(folder)
    points: list[Point] = []
    records: list[tuple[str, Record]] = []
    voids = open_slots = 0
    for writer in reader.writers():
        names: dict[int, str] = {}
        position = Position(1, 0, ())
        while True:
            ranges, after = reader.poll(writer, position, 10_000, dead=False)
            for piece in ranges:
                taken = reader.read(piece)
                voids += taken.voids
                assert not taken.damaged, taken.damaged
                for _, kind, payload in taken.frames:
                    record = codec.decode(kind, payload)
                    assert record is not None
                    records.append((writer, record))
                    if isinstance(record, MetricNamed):
                        names[record.metric_id] = record.name
                batch = PointBatch.from_records(taken.records, names)
                points += [
                    Point(names[i], v, n, t, writer)
                    for i, v, n, t in zip(
                        batch.metric_ids, batch.values, batch.iterations, batch.time_unix_nano, strict=True
                    )
                ]
            if after == position:
                break
            position = after
        open_slots += len(position.open)
    return Spooled(points, records, voids, open_slots)
