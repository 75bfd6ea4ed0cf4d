"""What a run's folder tells of it: its state, what was logged, what each destination has, and what waits."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracelet import codec
from tracelet.errors import SpoolError
from tracelet.records import FlushAsked, MetricNamed, WriterEnded, WriterOpened
from tracelet.spool import home, lease, store
from tracelet.spool.cursor import DestinationProgress, Progress, rank_mark
from tracelet.spool.reader import START, Position, SpoolReader

__all__ = ["LOST", "NOT_DELIVERED", "RUNNING", "Destination", "Facts", "address", "look"]

RUNNING, NOT_DELIVERED, UNREADABLE = "RUNNING", "ended, not delivered", "unreadable"
LOST = "LOST"  # behind a gateway, or on another host: nothing has been heard of it for long; it may speak again

_AT_ONCE = 1 << 20  # slots asked of the reader at a time
_SILENT = frozenset(codec.kind_of(kind) for kind in (WriterOpened, MetricNamed, FlushAsked))
_END = codec.kind_of(WriterEnded)
_RECORD = 32  # bytes of a point


@dataclass(frozen=True, slots=True)
class Destination:
    """One destination of a run, and how far it is. Points, unless said otherwise."""

    id: str
    kind: str
    address: str
    in_process: bool  # served by the program itself: nobody else can deliver there
    delivered: int
    refused: int  # points and other items, for good
    waiting: int
    waiting_records: int  # params, tags, spans, artifacts, ends
    over: bool  # it has the end of every attempt that has one
    memory: Mapping[str, Any]  # "run_id" and "link", when known

    @property
    def waits(self) -> bool:
        """Whether something is still to be taken there, the end of the run included, that can be shipped."""
        return not self.in_process and self.lacks

    @property
    def lacks(self) -> bool:
        """Whether something is still to be taken there, by whomever."""
        return not (self.over and not self.waiting and not self.waiting_records)


@dataclass(frozen=True, slots=True)
class Facts:
    """A run on one host, as its folder tells it."""

    folder: Path
    run_id: str
    manifest: store.Manifest | None
    problem: str | None
    state: str
    started_unix_nano: int
    alive: tuple[str, ...]  # writers whose process lives
    shipper_pid: int | None
    logged: int
    destinations: tuple[Destination, ...]
    elsewhere: bool = False  # another host's: its locks tell nothing here

    @property
    def title(self) -> str:
        """Project and name."""
        return f"{self.manifest.project}/{self.manifest.run_name}" if self.manifest else "?"

    @property
    def waiting(self) -> int:
        """Points that some destination doesn't have; all of them, where there is no destination."""
        if not self.destinations:
            return self.logged
        return max((d.waiting for d in self.destinations if not d.in_process), default=0)

    @property
    def waiting_records(self) -> int:
        """The most records other than points that a destination doesn't have."""
        return max((d.waiting_records for d in self.destinations if not d.in_process), default=0)

    @property
    def waits(self) -> bool:
        """Whether something is undelivered: at some destination, or because there is none."""
        return not self.destinations or any(d.waits for d in self.destinations)

    @property
    def refused(self) -> int:
        """What destinations refused for good."""
        return sum(d.refused for d in self.destinations)


def look(entry: store.RunFolder, *, holds_lock: bool = False) -> Facts:
    """Read a run's folder, from another process than its writers'.

    `holds_lock`: this process itself has the shipper's lock, so that nobody ships the run.

    What is delivered and what waits is exact. What was logged is their sum, so it stays right when delivered segments
    are deleted; it counts a param or an artifact that was refused for good as a point. A run that is being written
    goes on meanwhile.

    Cost: reads what waits, not what is delivered.
    """
    folder, manifest = entry.folder, entry.manifest
    reader = SpoolReader(folder)
    try:
        writers = reader.writers()
        alive = tuple(writer for writer in writers if lease.is_alive(folder, writer))
        openings = {writer: opening(reader, writer) for writer in writers}
        attempt_of = {writer: None if one is None else one.attempt_key for writer, one in openings.items()}
        progress, problem = _progress(folder, entry.problem)
        with_end = _with_end(manifest, [one for one in openings.values() if one is not None])
        elsewhere = manifest is not None and not home.is_here(manifest)
        ended = {attempt_of[writer] for writer in writers if elsewhere and _has_end(reader, writer)}
        destinations = tuple(
            _destination(reader, destination, progress.get(identity), attempt_of, alive, with_end=with_end)
            for identity, destination in (manifest.destinations if manifest else {}).items()
        )
        if destinations:
            logged = max(d.delivered + d.refused + d.waiting for d in destinations)
        else:
            logged = sum(count_beyond(reader, writer, START, dead=writer not in alive)[0] for writer in writers)
    finally:
        reader.close()
    return Facts(
        folder=folder,
        run_id=entry.run_id,
        manifest=manifest,
        problem=problem,
        state=_state(manifest, problem, alive, quiet=_quiet(folder, manifest, ended) if elsewhere else NOT_DELIVERED),
        started_unix_nano=min((a.started_unix_nano for a in manifest.attempts), default=0) if manifest else 0,
        alive=alive,
        shipper_pid=None if holds_lock else lease.shipper_alive(folder),
        logged=logged,
        destinations=destinations,
        elsewhere=elsewhere,
    )


def _quiet(folder: Path, manifest: store.Manifest | None, ended: Collection[str | None]) -> str:
    """The state of another host's run that no lock here shows alive and that nobody has ended."""
    attempt = manifest.newest if manifest is not None else None
    if attempt is None or attempt.key in ended or (manifest is not None and home.is_of_an_earlier_boot(manifest)):
        return NOT_DELIVERED
    told = home.read_lease(folder)
    if told is not None:
        return RUNNING if _age_s(told.renewed_unix_nano) < home.MISSED_S else LOST
    return RUNNING if _age_s(home.last_written_ns(folder)) < home.SILENT_S else LOST


def _age_s(unix_nano: int) -> float:
    return (time.time_ns() - unix_nano) / 1e9


def _has_end(reader: SpoolReader, writer: str) -> bool:
    return any(kind == _END for kind, _ in reader.scan_frames(writer))


def _progress(folder: Path, problem: str | None) -> tuple[Mapping[str, DestinationProgress], str | None]:
    """What the journals say, and why they can't be read, if so."""
    progress = Progress(folder)
    try:
        progress.refresh()
    except SpoolError as error:
        return {}, problem or str(error)
    return progress.destinations, problem


def _state(manifest: store.Manifest | None, problem: str | None, alive: Sequence[str], *, quiet: str) -> str:
    if problem is not None:
        return UNREADABLE
    attempt = manifest.newest if manifest else None
    ended = None if attempt is None or attempt.ended is None else str(attempt.ended["status"])
    if manifest is not None and manifest.extra.get("received"):  # its writers are a gateway's: they tell nothing
        return ended or (LOST if manifest.extra.get("lost") else RUNNING)
    if alive:
        return RUNNING
    return ended or quiet


def opening(reader: SpoolReader, writer: str) -> WriterOpened | None:
    """The first frame of a writer, None where it can't be read."""
    for kind, payload in reader.scan_frames(writer):
        record = codec.decode(kind, payload)
        return record if isinstance(record, WriterOpened) else None
    return None


def _with_end(manifest: store.Manifest | None, openings: Sequence[WriterOpened]) -> set[str]:
    """The ends that a destination has to have, as its journal calls them: of attempts, and of their further ranks.

    Of what came over the wire only those of attempts that were said to end.
    """
    begun = {opened.attempt_key for opened in openings}
    if manifest is not None and manifest.extra.get("received"):
        return begun & {attempt.key for attempt in manifest.attempts if attempt.ended is not None}
    marks = set(begun)
    for key in begun:
        ranks = {opened.rank for opened in openings if opened.attempt_key == key and opened.role == "first"}
        attempt = manifest.attempt(key) if manifest is not None else None
        told = None if attempt is None or attempt.ended is None else attempt.ended.get("rank")
        marks |= {rank_mark(key, rank) for rank in ranks - {min(ranks, default=0) if told is None else told}}
    return marks


def _destination(
    reader: SpoolReader,
    destination: Mapping[str, Any],
    progress: DestinationProgress | None,
    attempt_of: Mapping[str, str | None],
    alive: Sequence[str],
    *,
    with_end: Collection[str],
) -> Destination:
    """How far `destination` is. It gets all writers of the run, also those of attempts before it was named."""
    points = records = 0
    for writer in attempt_of:
        position = progress.positions.get(writer, START) if progress is not None else START
        more_points, more_records = count_beyond(reader, writer, position, dead=writer not in alive)
        points, records = points + more_points, records + more_records
    return Destination(
        id=str(destination["id"]),
        kind=str(destination["kind"]),
        address=address(destination),
        in_process=bool(destination.get("in_process")),
        delivered=progress.delivered if progress is not None else 0,
        refused=progress.refused if progress is not None else 0,
        waiting=points,
        waiting_records=records,
        over=progress is not None and all(progress.done.get(attempt) for attempt in with_end),
        memory=progress.memory if progress is not None else {},
    )


def count_beyond(reader: SpoolReader, writer: str, position: Position, *, dead: bool) -> tuple[int, int]:
    """Points, and records of other kinds, that `writer` has after `position`, as of now."""
    points = records = 0
    asked_again = False
    while True:
        ranges, position = reader.poll(writer, position, _AT_ONCE, dead=dead)
        for piece in ranges:
            taken = reader.read(piece)
            points += len(taken.records) // _RECORD
            records += sum(kind not in _SILENT for _, kind, _ in taken.frames)
        if sum(piece.end - piece.first for piece in ranges) >= _AT_ONCE:
            continue
        # Where stores may be seen out of order (arm64) a slot counts only from the second look on, behind others, too.
        if asked_again:
            return points, records
        asked_again = True


def address(destination: Mapping[str, Any]) -> str:
    """Where a destination is, for a person; without secrets, as the manifest itself."""
    kind, spec = destination["kind"], destination.get("spec", {})
    if kind == "mlflow":
        return str(spec.get("tracking_uri"))
    if kind == "file":
        return str(spec.get("path", "?"))
    if kind == "prometheus":
        return str(spec.get("url"))
    if kind == "otlp":
        variables = spec.get("environment", {})
        named = spec.get("endpoint") or next((v for n, v in variables.items() if n.endswith("ENDPOINT")), None)
        return str(named) if named else "OTLP's default on localhost"
    if kind == "live":
        return f"an object of the program ({spec.get('exporter', '?')})"
    return "its own output" if kind == "console" else "?"
