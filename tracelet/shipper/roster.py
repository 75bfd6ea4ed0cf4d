"""Who writes in this folder: each writer's opening, metric names and end, shared by all destinations' threads.

Filled by a scan of a writer's frames when it is first seen (so that a restarted shipper knows what was said before
its positions), and by every thread as it reads on. Entries are only added and never change, so no lock is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tracelet import codec
from tracelet.errors import SpoolError
from tracelet.guard import guard
from tracelet.records import MetricNamed, Record, WriterEnded, WriterOpened
from tracelet.spool.reader import SpoolReader

__all__ = ["Roster", "decode_frame", "frames_of"]


def decode_frame(kind: int, payload: bytes) -> Record | None:
    """The record of a frame; None, said once a minute, for one that can't be read or is of a newer version's kind."""
    try:
        record = codec.decode(kind, payload)
    except SpoolError as error:
        guard.limited("frame", "a frame is set aside: %s", error)
        return None
    if record is None:
        guard.limited(f"frame kind {kind}", "a frame of kind %d is of a newer version of tracelet; set aside", kind)
    return record


class Roster:
    """The writers of one folder, as far as their frames have been read."""

    def __init__(self) -> None:
        self.opened: dict[str, WriterOpened] = {}
        self.names: dict[str, dict[int, str]] = {}
        self.ended: dict[str, WriterEnded] = {}
        self._ranks: dict[str, dict[int, None]] = {}  # attempt -> ranks that have begun here: asked at every step

    def writers_of(self, attempt_key: str) -> list[str]:
        """The attempt's writers whose opening is known, first come first."""
        return [writer for writer, opened in list(self.opened.items()) if opened.attempt_key == attempt_key]

    def first_of(self, attempt_key: str, rank: int | None = None) -> str | None:
        """The writer whose end is the attempt's: the lowest rank's first one; any, if a damaged folder has none.

        With `rank`, of that rank alone.
        """
        mine = [one for one in self.writers_of(attempt_key) if rank is None or self.opened[one].rank == rank]
        return min(self.firsts(mine) or mine, key=lambda writer: self.opened[writer].rank, default=None)

    def firsts(self, writers: Iterable[str]) -> list[str]:
        """Those of `writers` whose end is their rank's."""
        return [writer for writer in writers if self.opened[writer].role == "first"]

    def ranks_of(self, attempt_key: str) -> list[int]:
        """The attempt's ranks that have begun here, the lowest first."""
        return sorted(list(self._ranks.get(attempt_key, ())))  # noqa: C414 - a copy at once: others add to it

    def learn(self, writer: str, record: Record) -> None:
        """Take what a record says about its writer."""
        match record:
            case WriterOpened():
                self.open(writer, record)
            case MetricNamed():
                self.names.setdefault(writer, {}).setdefault(record.metric_id, record.name)
            case WriterEnded():
                self.ended.setdefault(writer, record)

    def open(self, writer: str, opened: WriterOpened) -> None:
        """Take in who a writer is, if that isn't known."""
        if self.opened.setdefault(writer, opened) is opened and opened.role == "first":
            self._ranks.setdefault(opened.attempt_key, {}).setdefault(opened.rank)

    def scan(self, reader: SpoolReader, writer: str) -> None:
        """Learn from all frames the writer has on disk now."""
        for record in frames_of(reader, writer):
            self.learn(writer, record)


def frames_of(reader: SpoolReader, writer: str) -> Iterator[Record]:
    """All readable records of a writer, in its order."""
    for kind, payload in reader.scan_frames(writer):
        record = decode_frame(kind, payload)
        if record is not None:
            yield record
