"""A run's points out of its spool, delivered ones included, in order of time, in little memory.

Points stand in the order in which each writer logged them. Times get their rising milliseconds as on the way to any
destination, then pieces are sorted, put aside in one temporary file, and merged.
"""

from __future__ import annotations

import heapq
import os
import struct
import tempfile
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import IO

from tracelet import codec
from tracelet.errors import SpoolError
from tracelet.records import MetricNamed, PointBatch, Scalar, WriterOpened
from tracelet.shipper import stamps
from tracelet.spool.reader import START, SpoolReader
from tracelet.spool.store import RunFolder

__all__ = ["DENSE", "Row", "Rows", "Series"]

Row = tuple[int, int, float, int]
"""Time (ns), series number with `DENSE` for a point without a millisecond of its own, value, iteration."""

DENSE = 1 << 31
_ROW = struct.Struct("<QIdq")
_AT_ONCE = 1 << 16
_PIECE = 250_000  # rows sorted at once: some 50 MB
_READ = 2048  # rows of a piece held while merging
_RISING_LIMIT_S = 60.0  # as on the way to Prometheus


@dataclass(frozen=True, slots=True)
class Series:
    """One metric of one process: the process's Resource, and the metric's name."""

    resource: Mapping[str, Scalar]
    name: str


@dataclass
class Rows:
    """All points of a run's folders; iterating reads them. Series become known while it runs.

    Cost: 32 bytes a point read, and 28 bytes a point in a temporary file where there are more than 250,000.
    """

    folders: Iterable[RunFolder]
    series: list[Series] = field(default_factory=list)
    damaged: int = 0  # slots or frames that can't be read
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        """The rows in order of time; rows of one time as they were logged."""
        pieces: list[tuple[int, int]] = []
        rows: list[Row] = []
        with tempfile.TemporaryFile(prefix="tracelet-export-") as aside:
            for some in self._in_order_of_logging():
                rows += some
                if len(rows) >= _PIECE:
                    pieces.append(_put_aside(rows, aside))
                    rows = []
            rows.sort(key=itemgetter(0))
            aside.flush()
            sources = [_read(aside.fileno(), *piece) for piece in pieces]
            yield from heapq.merge(*sources, rows, key=itemgetter(0))

    def _in_order_of_logging(self) -> Iterator[list[Row]]:
        states: dict[str, stamps.State] = {}
        for entry in self.folders:
            # What a gateway received has its times from the sender.
            received = entry.manifest is not None and entry.manifest.extra.get("received") is True
            reader = SpoolReader(entry.folder)
            try:
                for writer in reader.writers():
                    yield from self._writer(reader, writer, None if received else states)
                self.damaged += reader.damaged_frames
            finally:
                reader.close()

    def _writer(self, reader: SpoolReader, writer: str, states: dict[str, stamps.State] | None) -> Iterator[list[Row]]:
        opened, names = self._frames(reader, writer)
        resource: Mapping[str, Scalar] = opened.resource if opened is not None else {}
        instance = str(resource.get("service.instance.id") or writer)
        position = START
        while True:
            # `dead`: a slot still in flight is passed over; nothing is delivered from here.
            ranges, after = reader.poll(writer, position, _AT_ONCE, dead=True)
            for piece in ranges:
                taken = reader.read(piece)
                self.damaged += sum(damage.end - damage.first for damage in taken.damaged)
                bare = PointBatch.from_records(taken.records, {})
                used = {i: names.get(i, f"(id {i}, its name is damaged)") for i in set(bare.metric_ids)}
                points = PointBatch(used, bare.time_unix_nano, bare.values, bare.iterations, bare.metric_ids)
                if states is not None:
                    points, changed = stamps.stamp(points, instance, ChainMap(states), _RISING_LIMIT_S)
                    states.update(changed)
                yield self._rows(points, instance, resource)
            if not ranges and after == position:
                return
            position = after

    def _frames(self, reader: SpoolReader, writer: str) -> tuple[WriterOpened | None, dict[int, str]]:
        opened: WriterOpened | None = None
        names: dict[int, str] = {}
        for kind, payload in reader.scan_frames(writer):
            try:
                record = codec.decode(kind, payload)
            except SpoolError:
                self.damaged += 1
                continue
            if isinstance(record, MetricNamed):
                names[record.metric_id] = record.name
            elif isinstance(record, WriterOpened):
                opened = record
        return opened, names

    def _rows(self, points: PointBatch, instance: str, resource: Mapping[str, Scalar]) -> list[Row]:
        numbers = {}
        for identity, name in points.names.items():
            number = self._numbers.get((instance, name))
            if number is None:
                number = self._numbers[instance, name] = len(self.series)
                self.series.append(Series(resource, name))
            numbers[identity] = number
        ids: Iterable[int] = [numbers[identity] for identity in points.metric_ids]
        if points.dense:
            ids = [number | DENSE if i in points.dense else number for i, number in enumerate(ids)]
        return list(zip(points.time_unix_nano, ids, points.values, points.iterations, strict=True))


def _put_aside(rows: list[Row], file: IO[bytes]) -> tuple[int, int]:
    rows.sort(key=itemgetter(0))
    start = file.tell()
    file.write(b"".join([_ROW.pack(*row) for row in rows]))
    return start, file.tell()


def _read(descriptor: int, start: int, end: int) -> Iterator[Row]:
    step = _READ * _ROW.size
    blocks = (os.pread(descriptor, min(step, end - at), at) for at in range(start, end, step))
    return chain.from_iterable(_ROW.iter_unpack(block) for block in blocks)
