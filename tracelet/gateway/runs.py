"""One run in a gateway's spool: its folder and manifest, the files its arrivals go to, its attempts and their ends."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelet import codec
from tracelet.gateway.commit import flush_all
from tracelet.gateway.latest import Latest
from tracelet.gateway.pieces import Pieces
from tracelet.gateway.repeats import Repeats, digest_of
from tracelet.guard import guard, logger
from tracelet.otlp import semconv
from tracelet.records import LOST, RUNNING, MetricNamed, Record, RunInfo, RunStarted, Scalar, StateNoted, WriterOpened
from tracelet.shipper.roster import Roster, frames_of
from tracelet.shipper.status import Verdict
from tracelet.spool import store
from tracelet.spool.appended import pack_points
from tracelet.spool.files import FileSet
from tracelet.spool.points import HEADER_SIZE, SLOT_SIZE, Address
from tracelet.spool.reader import SpoolReader

if TYPE_CHECKING:
    from tracelet.otlp.arrival import Arrival, AttemptEnd, Piece

__all__ = ["FOLDER", "SEGMENT_BYTES", "RunSpool", "Stored", "Terms", "owner_of"]

FOLDER = "gateway"
"""The name of a run's folder here: a boot changes nothing, since nobody's training writes in it."""

SLOTS = 8192
"""Of a segment: 256 KiB, so that thousands of small runs need little room."""

SEGMENT_BYTES = HEADER_SIZE + SLOTS * SLOT_SIZE
"""What a rank's files take at least; admitted when they are opened."""

PENS = 256
"""Ranks of a run whose files are open at once; the one that has been quiet longest gives way."""

SPOKE_NS = 90 * 10**9
"""How long a host counts as heard of after its last word: three heartbeats."""

_WITNESSES = {"span": 1, "status": 2, "event": 3}  # the better one tells more: the event alone has the error whole

_Rank = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Terms:
    """What all runs of a gateway have in common."""

    root: Path
    destinations: tuple[Mapping[str, Any], ...]
    admit: Callable[[int], None]  # raises OSError where there is no room for so many bytes
    piece: Callable[..., Any]  # makes a Piece of its fields
    whole: Callable[[str, str, str, int], Record | None]  # the record of a long value, if it makes one
    sync: bool = True
    time_ns: Callable[[], int] = time.time_ns


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of one arrival."""

    points: int = 0
    repeat: bool = False
    anything: bool = False  # there is something new for a destination
    alive: bool = True  # it is a sign of life


def owner_of(manifest: store.Manifest) -> str:
    """The name of the token that a run belongs to; empty: nobody's."""
    return str(manifest.extra.get("owner") or "")


class _Pen:
    """The files that one rank of an attempt writes to, while they are open."""

    def __init__(self, files: FileSet, now: float) -> None:
        self.files = files
        self.used_at = now
        self.wrote = True  # since the last flush


class RunSpool:
    """One run's folder, written by this process alone. Its methods may be called from any thread."""

    def __init__(self, terms: Terms, run: RunInfo, owner: str) -> None:
        """Open the run's folder, or make it.

        Raises:
            OSError, SpoolError: it can't be made, written or read.
        """
        self.folder = Path(terms.root).absolute() / run.run_id / FOLDER
        self.run_id = run.run_id
        self.lock = threading.RLock()
        self._terms = terms
        self._pens: dict[_Rank, _Pen] = {}
        self._to_sync: list[int] = []  # duplicates of files that were closed before their flush
        self._new_files = not self.folder.exists()
        self.manifest = store.update_manifest(self.folder, lambda before: self._opened(before, run, owner))
        self._repeats = Repeats(self.folder)
        self._pieces = Pieces(self.folder, terms.piece)
        self._latest = Latest()
        if not self._new_files:
            self._latest.learn(self._records())
        self.heard = time.monotonic()
        self._spoke: dict[str, int] = {}  # host -> when one of its ranks last did, of the attempt `_speaking`
        self._speaking = ""
        self.is_closed = False

    def _records(self) -> Iterator[Record]:
        reader = SpoolReader(self.folder)
        try:
            for writer in reader.writers():
                yield from frames_of(reader, writer)
        finally:
            reader.close()

    def _opened(self, before: store.Manifest | None, run: RunInfo, owner: str) -> store.Manifest:
        """The manifest with this gateway's destinations, and with the owner it has, or `owner` where it has none."""
        if before is None:
            return store.Manifest(
                run.run_id,
                run.project,
                run.experiment_name,
                run.run_name,
                extra={"received": True, "owner": owner, "lost": False},
            )
        ours = self._terms.destinations
        attempts = tuple(dataclasses.replace(one, destinations=ours) for one in before.attempts)
        extra = {**before.extra, "received": True, "owner": before.extra.get("owner") or owner}
        return dataclasses.replace(before, attempts=attempts, extra=extra)

    # ---- what is known ------------------------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """The name of the token that the run belongs to; empty: nobody's."""
        return owner_of(self.manifest)

    def adopt(self, owner: str) -> None:
        """Give a run that is nobody's to `owner`; one that is somebody's by now stays so."""
        with self.lock:
            if self.owner:
                return
            self._change(lambda manifest: dataclasses.replace(manifest, extra={**manifest.extra, "owner": owner}))

    @property
    def is_lost(self) -> bool:
        """It was noted as LOST, and nothing has come since."""
        return bool(self.manifest.extra.get("lost"))

    @property
    def is_ended(self) -> bool:
        """Its newest attempt has ended."""
        newest = self.manifest.newest
        return newest is not None and newest.ended is not None

    def writers(self) -> frozenset[str]:
        """The writers whose files are open here: alive, as far as a shipper is concerned.

        One is among them before its files can be seen in the folder, and until the last byte is written to them.
        """
        return frozenset(pen.files.writer for pen in list(self._pens.values()))

    def heads(self) -> dict[str, Address]:
        """The next slot of each open writer."""
        return {pen.files.writer: pen.files.head() for pen in list(self._pens.values())}

    # ---- storing ------------------------------------------------------------------------------------------------

    def keep(self, arrival: Arrival) -> Stored:
        """Put one arrival into the spool; it is there for good after `flush`.

        Raises:
            OSError, SpoolError: some of it may stand there; the same again is no harm.
        """
        digest = digest_of(arrival)
        with self.lock:
            if digest in self._repeats:
                return Stored(repeat=True)
            self.heard = time.monotonic()
            substance = bool(arrival.points or arrival.records or arrival.pieces)
            known = self.manifest.attempt(arrival.attempt_key)
            if known is not None and arrival.lost and not substance and arrival.ended is None:
                # Of an attempt that is no more the newest it says nothing about the run.
                believed = known == self.manifest.newest and not self._another_lives(arrival)
                return Stored(anything=believed and self.note_lost(), alive=False)
            if known is not None and not substance and not self._tells_more(known, arrival) and not self.is_lost:
                self._hear(arrival)
                return Stored()
            rank = (arrival.attempt_key, arrival.rank, arrival.instance_id)
            try:
                self._attempt(arrival)
                self._hear(arrival)
                pen = self._pen(rank, arrival)
                if self.is_lost:
                    self._note(pen.files, RUNNING)
                points = self._write(pen, arrival)
            except BaseException:
                self._drop(rank)
                raise
            if arrival.ended is not None:
                self._end(arrival.attempt_key, arrival.ended)
            if substance or arrival.ended is not None:
                self._repeats.add(digest)
            return Stored(points, anything=True)

    def _write(self, pen: _Pen, arrival: Arrival) -> int:
        pen.used_at, pen.wrote = time.monotonic(), True
        files = pen.files
        for record in arrival.records:
            self._record(files, record, self._time_of(arrival))
        for piece in arrival.pieces:
            self._take_piece(files, arrival.instance_id, piece)
        points = arrival.points
        if points is None or not len(points):
            return 0
        ids = {number: files.id_of(name, _name_frame, self._time_of(arrival)) for number, name in points.names.items()}
        metric_ids = points.metric_ids
        if any(number != metric_id for number, metric_id in ids.items()):
            metric_ids = type(metric_ids)("I", map(ids.__getitem__, metric_ids))
        files.points_at_once(pack_points(points.time_unix_nano, points.values, points.iterations, metric_ids))
        return len(points)

    def _record(self, files: FileSet, record: Record, time_unix_nano: int) -> None:
        if isinstance(record, RunStarted) and not record.run_name:
            record = dataclasses.replace(record, run_name=self.manifest.run_name)
        newer = self._latest.newer(record)
        if newer is not None:
            self._frame(files, newer, time_unix_nano)

    def _time_of(self, arrival: Arrival) -> int:
        return arrival.first_unix_nano if arrival.first_unix_nano > 0 else self._terms.time_ns()

    def _frame(self, files: FileSet, record: Record, time_unix_nano: int) -> None:
        kind, payload = codec.encode(record)
        files.frame(kind, payload, max(0, getattr(record, "time_unix_nano", time_unix_nano)))

    def _take_piece(self, files: FileSet, instance: str, piece: Piece) -> None:
        whole = self._pieces.take(instance, piece)
        if whole is not None:
            record = self._terms.whole(piece.event, piece.key, whole.text, whole.time_unix_nano)
            if record is not None:
                self._record(files, record, piece.time_unix_nano)
            self._pieces.done(instance, piece)

    def _pen(self, rank: _Rank, arrival: Arrival) -> _Pen:
        pen = self._pens.get(rank)
        if pen is None:
            while len(self._pens) >= PENS:
                self._drop(min(self._pens, key=lambda one: self._pens[one].used_at))
            opened = self._opening(arrival.attempt_key, arrival.rank, arrival.resource, self._time_of(arrival))
            pen = self._open(rank, opened)
        return pen

    def _opening(self, key: str, rank: int, resource: Mapping[str, Scalar], time_unix_nano: int) -> WriterOpened:
        attempt = self.manifest.attempt(key)
        started = time_unix_nano if attempt is None else attempt.started_unix_nano
        return WriterOpened(time_unix_nano, "first", os.getpid(), rank, key, started, dict(resource))

    def _open(self, rank: _Rank, opened: WriterOpened) -> _Pen:
        kind, payload = codec.encode(opened)
        files = FileSet(
            self.folder,
            (kind, payload, opened.time_unix_nano),
            SLOTS,
            False,  # a mapped page is flushed under the interpreter's lock; and here nobody counts nanoseconds
            self._terms.admit,
            sync_at_roll=self._terms.sync,
        )
        # Alive first, visible then: a shipper that sees files of nobody takes their writer for dead, for good. Its lane
        # reads no more of them, and they are sealed under our hands.
        pen = self._pens[rank] = _Pen(files, time.monotonic())
        try:
            files.appear()
        except BaseException:
            del self._pens[rank]
            files.discard()
            raise
        self._new_files = True
        return pen

    def _drop(self, rank: _Rank) -> None:
        """Close files that a write may have left with open slots; readers pass over these once the writer is gone."""
        pen = self._pens.pop(rank, None)
        if pen is not None:
            if pen.wrote and self._terms.sync:  # others wait for the flush of what they wrote here
                self._to_sync += pen.files.to_sync()
            if len(self._to_sync) > PENS:
                left, self._to_sync = self._to_sync, []
                flush_all(left)
            with guard("close a gateway's files"):
                pen.files.close()

    # ---- attempts and ends --------------------------------------------------------------------------------------

    def _change(self, change: Callable[[store.Manifest], store.Manifest]) -> None:
        def put(before: store.Manifest | None) -> store.Manifest:
            return change(self.manifest if before is None else before)

        self.manifest = store.update_manifest(self.folder, put)
        self._new_files = True

    def _attempt(self, arrival: Arrival) -> None:
        """See that the manifest has the arrival's attempt, with its exact start once that is known."""
        known = self.manifest.attempt(arrival.attempt_key)
        exact = arrival.started_unix_nano
        if known is None:
            attempt = store.Attempt(
                key=arrival.attempt_key,
                started_unix_nano=self._time_of(arrival) if exact is None else exact,
                pid=os.getpid(),
                rank=arrival.rank,
                order_unix_nano=_order_of(arrival),
                destinations=self._terms.destinations,
                extra={"estimated": exact is None},
            )
        elif exact is not None and known.extra.get("estimated"):
            attempt = dataclasses.replace(known, started_unix_nano=exact, extra={**known.extra, "estimated": False})
        else:
            return
        self._change(lambda manifest: manifest.with_attempt(attempt))

    @staticmethod
    def _tells_more(attempt: store.Attempt, arrival: Arrival) -> bool:
        exact = arrival.started_unix_nano is not None and bool(attempt.extra.get("estimated"))
        return exact or (arrival.ended is not None and _is_better(arrival.ended, attempt.ended))

    def _end(self, key: str, ended: AttemptEnd) -> None:
        verdict = Verdict(ended.status, ended.end_unix_nano, ended.told_by, ended.error)

        def put(manifest: store.Manifest) -> store.Manifest:
            attempt = manifest.attempt(key)
            if attempt is None or not _is_better(ended, attempt.ended):
                return manifest
            return manifest.with_attempt(dataclasses.replace(attempt, ended=verdict.to_json()))

        self._change(put)

    # ---- LOST ---------------------------------------------------------------------------------------------------

    def note_lost(self) -> bool:
        """Note that nothing has been heard for long; False where that is noted already, or the run has ended.

        Raises:
            OSError, SpoolError: it could not be written.
        """
        with self.lock:
            newest = self.manifest.newest
            if self.is_lost or self.is_ended or newest is None:
                return False
            rank = next((rank for rank in self._pens if rank[0] == newest.key), None)
            if rank is None:
                opened = self._known_opening(newest)
                rank = (newest.key, opened.rank, str(opened.resource.get("service.instance.id", "")))
                self._open(rank, opened)
            self._note(self._pens[rank].files, LOST)
            return True

    def _hear(self, arrival: Arrival) -> None:
        newest = self.manifest.newest
        if newest is None or newest.key != arrival.attempt_key:
            return
        if newest.key != self._speaking:
            self._speaking, self._spoke = newest.key, {}
        self._spoke[_host_of(arrival)] = self._terms.time_ns()

    def _another_lives(self, arrival: Arrival) -> bool:
        """Whether another host spoke a moment ago: whoever says that the run is LOST sees one host's folder alone."""
        now, host = self._terms.time_ns(), _host_of(arrival)
        return self._speaking == arrival.attempt_key and any(
            0 <= now - at < SPOKE_NS for other, at in self._spoke.items() if other != host
        )

    def _note(self, files: FileSet, state: str) -> None:
        # They stand with different writers, and by their times the later one counts: over a clock set back, too.
        now = max(self._terms.time_ns(), int(self.manifest.extra.get("noted_unix_nano", 0)) + 1)
        self._frame(files, StateNoted(now, state), 0)
        for pen in self._pens.values():
            pen.wrote = pen.wrote or pen.files is files
        lost = state == LOST
        noted = {"lost": lost, "noted_unix_nano": now}
        self._change(lambda manifest: dataclasses.replace(manifest, extra={**manifest.extra, **noted}))
        if lost:
            logger.warning("run %s is LOST: nothing has come of it for long", self.run_id)
        else:
            logger.info("run %s speaks again", self.run_id)

    def _known_opening(self, attempt: store.Attempt) -> WriterOpened:
        """Who wrote for `attempt` before, from its files; where they are gone, what the manifest says."""
        reader, roster = SpoolReader(self.folder), Roster()
        try:
            for writer in reader.writers():
                roster.scan(reader, writer)
        finally:
            reader.close()
        first = roster.first_of(attempt.key)
        if first is not None:
            return roster.opened[first]
        return self._opening(attempt.key, attempt.rank, _resource_of(self.manifest, attempt), self._terms.time_ns())

    # ---- the disk -----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Bring everything written to the disk, then write down what of it was stored.

        Raises:
            OSError: it may not be there; what is sent again is stored again.
        """
        with self.lock:
            digests = self._repeats.take_unwritten()
            new_files, self._new_files = self._new_files, False
            pens = [pen for pen in self._pens.values() if pen.wrote]
            descriptors, self._to_sync = self._to_sync, []
            try:
                for pen in pens:
                    descriptors += pen.files.to_sync() if self._terms.sync else []
                descriptors += self._pieces.to_sync() if self._terms.sync else []
            except BaseException:
                self._to_sync = descriptors  # the next flush has them, and closes them
                self._not_flushed(digests, pens)
                raise
            for pen in pens:
                pen.wrote = False
        try:
            flush_all(descriptors)
            if new_files and self._terms.sync:
                store.flush_names(self.folder)
            with self.lock:
                self._repeats.write(digests)
        except BaseException:
            with self.lock:
                self._not_flushed(digests, pens)
            raise

    def _not_flushed(self, digests: list[bytes], pens: list[_Pen]) -> None:
        self._repeats.forget(digests)
        self._new_files = True
        for pen in pens:
            pen.wrote = True

    def close_quiet(self, after_s: float, now: float) -> bool:
        """Close the files that nothing was written to for so long; whether none is open any more."""
        with self.lock:
            for rank, pen in list(self._pens.items()):
                if now - pen.used_at >= after_s and not pen.wrote:
                    self._drop(rank)
            return not self._pens

    def close(self) -> None:
        """Let all files go. What is in them is whole: readers need no END of a writer that is gone."""
        with self.lock:
            self.is_closed = True
            for rank in list(self._pens):
                self._drop(rank)
            self._pieces.close()
            left, self._to_sync = self._to_sync, []
        with guard("flush what a gateway wrote last"):
            flush_all(left)


def _is_better(ended: AttemptEnd, known: Mapping[str, Any] | None) -> bool:
    return known is None or _WITNESSES.get(ended.told_by, 0) > _WITNESSES.get(str(known.get("seen_by")), 0)


def _order_of(arrival: Arrival) -> int:
    """What the sender says that its attempts are sorted by; 0: nothing, so that the start has to do."""
    order = arrival.resource.get(semconv.ATTEMPT_ORDER)
    return order if type(order) is int and order > 0 else 0


def _host_of(arrival: Arrival) -> str:
    """The host that a rank is on; where its resource names none each rank counts as one."""
    return str(arrival.resource.get(semconv.HOST_NAME) or arrival.instance_id)


def _resource_of(manifest: store.Manifest, attempt: store.Attempt) -> dict[str, Scalar]:
    return {
        "service.name": manifest.project,
        "tracelet.project": manifest.project,
        "tracelet.experiment.name": manifest.experiment_name,
        "tracelet.run.id": manifest.run_id,
        "tracelet.run.name": manifest.run_name,
        "tracelet.run.attempt": attempt.key,
        semconv.ATTEMPT_ORDER: attempt.order,
        "tracelet.rank": attempt.rank,
    }


def _name_frame(metric_id: int, name: str) -> tuple[int, bytes]:
    return codec.encode(MetricNamed(metric_id, name))
