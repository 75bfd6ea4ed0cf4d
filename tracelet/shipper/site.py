"""What all destinations of one folder share: its manifest, its writers, who of them is alive, how attempts ended.

`look()` is called by one thread, again and again; the destinations' threads only read.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tracelet.errors import SpoolError
from tracelet.guard import guard, logger
from tracelet.records import LOST, RUNNING, RunInfo, WriterEnded
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.roster import Roster, decode_frame
from tracelet.shipper.standin import stand_in
from tracelet.shipper.status import PROVISIONAL, Verdict, decide
from tracelet.spool import store
from tracelet.spool.cursor import rank_mark
from tracelet.spool.pages import Pages
from tracelet.spool.points import SLOT_SIZE
from tracelet.spool.reader import Position, SpoolReader
from tracelet.spool.store import Attempt, Manifest

__all__ = ["Clock", "Decided", "End", "Site"]

EXIT_WAIT_S = 10.0
"""How long an interpreter that said it is leaving may take until its exit code no longer counts."""

REAP_WAIT_S = 1.0
"""How long to ask for the exit code of a process that is gone but that its parent hasn't reaped."""

HOLLOW_AFTER_S = 30.0
"""An attempt in the manifest that never opened a file by then never will."""

FIRST_RANK_WAIT_S = 10.0
"""How long the end of a launch waits for a rank 0 that has written nothing yet, once all others are over: less than
`stop()` waits in a job without progress, for it may be the last of those others that waits for the end."""

_RESCAN_S = 5.0

SILENCE_EVERY_S = 1.0
"""How often a run that can't be seen from here is asked for a sign of life."""


class Clock(Protocol):
    """Where the time comes from: the module `time`, or a fake."""

    def monotonic(self) -> float:
        """Seconds, never going back."""
        ...

    def time_ns(self) -> int:
        """Nanoseconds since 1970."""
        ...


@dataclass(frozen=True, slots=True)
class Decided:
    """An attempt's end, and when this shipper learnt of it."""

    verdict: Verdict
    noticed: float  # monotonic; minus infinity: before this shipper began

    def age_s(self, now: float) -> float:
        """How long it has been known."""
        return now - self.noticed


@dataclass(frozen=True, slots=True)
class End:
    """One end to be told of an attempt: its own, or that of one more of its ranks."""

    mark: str  # what a journal calls it
    rank: int | None  # None: nothing of the attempt can be read
    decided: Decided | None  # None: not over yet
    whole: bool  # with params, tags and what may be the run's status


class Site:
    """One run's folder on this host, as its shipper sees it."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        deaths: Deaths,
        *,
        clock: Clock = time,
        in_process: bool = False,
        backend_ids: Callable[[], Mapping[str, str]] = dict,
        silent: Callable[[Iterable[str]], bool] | None = None,
    ) -> None:
        """`in_process`: the writers are in this process, so the manifest's word on their end is for others to write.

        `silent`: asked whether nothing has been heard of these writers for long; None where their life can be seen.
        """
        self.folder = folder
        self.manifest = manifest
        # What came over the wire: its writers are a gateway's, so neither their deaths nor their ends are the run's.
        self.received = bool(manifest.extra.get("received"))
        self.run = RunInfo(manifest.run_id, manifest.project, manifest.experiment_name, manifest.run_name)
        self.deaths = deaths
        self.roster = Roster()
        self.decided: dict[str, Decided] = {}
        self._ranks: dict[tuple[str, int], Decided] = {}  # the ends of further ranks, each its own
        self.writers: tuple[str, ...] = ()  # those whose opening is known, in order of appearance
        self.strangers: set[str] = set()  # writers whose files are of a format that this release doesn't know
        self.backend_ids = backend_ids
        self._clock = clock
        self._in_process = in_process
        self.pages = Pages()
        self._silent = silent
        self._silence_at = float("-inf")
        self._reader = SpoolReader(folder, pages=self.pages)
        self._began = clock.monotonic()
        self._inode = _inode_of(folder)
        self.gone = False  # the folder was deleted; what may stand in its place is another one
        self._manifest_key: tuple[int, int] | None = None
        self._found: tuple[str, ...] = ()  # all writers there were at the last look
        self._end_seen: dict[str, float] = {}  # attempt -> when its provisional end was first met
        self._unreadable: dict[str, float] = {}  # writers without an opening -> when their frames were scanned
        self._frames_seen: dict[str, tuple[float, int]] = {}  # writer -> when its frames were scanned, their size

    # ---- for the destinations' threads ----------------------------------------------------------------------------

    def is_over(self, writer: str) -> bool:
        """The writer has ended or is gone."""
        return writer in self.roster.ended or self.deaths.is_dead(writer)

    def is_hollow(self, attempt: Attempt) -> bool:
        """The attempt never wrote anything: nothing to deliver, nothing to end."""
        waited = self._clock.monotonic() - self._began >= HOLLOW_AFTER_S
        return not self.roster.writers_of(attempt.key) and (waited or attempt.ended is not None)

    def is_newest(self, attempt: Attempt) -> bool:
        """No other attempt of the run, on any host whose folder is here, began later."""
        others = list(self.manifest.attempts)
        for other in self.folder.parent.iterdir():
            if other == self.folder or not other.is_dir():
                continue
            try:
                manifest = store.read_manifest(other)
            except SpoolError:
                continue  # of a version we can't read; it says so where it is shipped
            others += manifest.attempts if manifest is not None else ()
        # A launch's attempt has the same key on each of its hosts.
        return all(one.order <= attempt.order for one in others if one.key != attempt.key)

    def speaks_for(self, attempt: Attempt) -> bool:
        """The attempt's end here is the run's: rank 0 is here, or all ranks there are, or it has no others."""
        first = self.roster.first_of(attempt.key)
        rank = attempt.rank if first is None else self.roster.opened[first].rank
        return rank == 0 or self.received or bool(attempt.extra.get("launch", {}).get("all_here"))

    def ends_of(self, attempt_key: str) -> list[End]:
        """What has to be told of the attempt's end: that of each further rank, and last its own, its lowest rank's.

        In this order: a program that nothing outlives waits for the attempt's end, and leaves.
        """
        main = End(attempt_key, self._rank_of_end(attempt_key), self.decided.get(attempt_key), whole=True)
        ranks = [] if self.received else self.roster.ranks_of(attempt_key)
        # Rank 0 is the root span: should it come so late that another rank's end was told for the attempt, its own
        # is told all the same, and is the run's.
        further = [
            End(rank_mark(attempt_key, rank), rank, self._ranks.get((attempt_key, rank)), whole=rank == 0)
            for rank in ranks
            if rank != main.rank
        ]
        return [*further, main]

    def _rank_of_end(self, attempt_key: str) -> int | None:
        """The rank whose end is the attempt's here. Once it is decided it stays, whoever comes late."""
        decided = self.decided.get(attempt_key)
        if decided is not None and decided.verdict.rank is not None:
            return decided.verdict.rank
        ranks = self.roster.ranks_of(attempt_key)
        if ranks:
            return ranks[0]
        first = self.roster.first_of(attempt_key)
        return None if first is None else self.roster.opened[first].rank

    @property
    def is_lost(self) -> bool:
        """Nothing has been heard of the run for long, as the manifest has it; no end."""
        return not self.received and bool(self.manifest.extra.get("lost"))

    def word(self) -> tuple[Attempt, str, int] | None:
        """What has to be told of a run that fell silent, or speaks again, and since when; None: it never was, or it has
        ended, which says more."""
        noted, newest = int(self.manifest.extra.get("noted_unix_nano", 0)), self.manifest.newest
        if self.received or not noted or newest is None or newest.key in self.decided:
            return None
        if self.roster.first_of(newest.key) is None:
            return None
        return newest, LOST if self.is_lost else RUNNING, noted

    @property
    def state(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The writers and attempts known now: what "finished" is about."""
        return self.writers, tuple(attempt.key for attempt in self.manifest.attempts)

    # ---- looking --------------------------------------------------------------------------------------------------

    def look(self, *, stuck: bool = False) -> None:
        """Take in new attempts, writers, deaths and ends. `stuck`: a destination doesn't read on, so seek ENDs here."""
        if _inode_of(self.folder) != self._inode:
            self.gone = True
            return
        self._refresh_manifest()
        known = []
        self._found = self._reader.writers()
        for writer in self._found:
            if writer not in self.roster.opened and writer not in self.strangers:
                self._meet(writer)
            if writer in self.roster.opened:
                known.append(writer)
                self._look_at(writer, stuck)
        self.writers = tuple(known)
        for attempt in self.manifest.attempts:
            for end in self.ends_of(attempt.key)[:-1]:
                if end.decided is None:
                    self._decide_rank(attempt, end)
            if attempt.key not in self.decided or (self.received and attempt.ended is not None):
                self._decide(attempt)

        self._note_silence()

    def has_news(self) -> bool:
        """A writer or an attempt has come since the last look. Takes nothing in: for who no longer holds the lock.

        No for a folder that was deleted: what isn't there any more is no news, and would be none at the next look.
        """
        manifest = store.read_manifest(self.folder)
        if manifest is None:
            return False
        attempts = tuple(attempt.key for attempt in manifest.attempts)
        try:
            return self._reader.writers() != self._found or attempts != self.state[1]
        except FileNotFoundError:  # deleted, and another one made in its place: its own shipper's
            return False

    def close(self) -> None:
        """Let the descriptors go."""
        self._reader.close()
        self.deaths.close()

    def _refresh_manifest(self) -> None:
        try:
            stat = os.stat(self.folder / store.MANIFEST)
        except FileNotFoundError:
            return
        key = (stat.st_ino, stat.st_mtime_ns)
        if key == self._manifest_key:
            return
        try:
            manifest = store.read_manifest(self.folder)
        except SpoolError as error:  # what is known of the run goes on
            guard.limited("read the manifest", "goes on with the manifest as it was: %s", error)
            return
        if manifest is not None:
            self.manifest = manifest
            self._manifest_key = key

    def _look_at(self, writer: str, stuck: bool) -> None:
        was_dead = self.deaths.is_dead(writer)
        if (
            self.deaths.look(writer, self.roster.opened[writer].pid)
            and not was_dead
            and writer not in self.roster.ended
        ):
            self.roster.scan(self._reader, writer)  # its END may stand there, read by no destination yet
        elif stuck and writer not in self.roster.ended:
            now = self._clock.monotonic()
            at, size = self._frames_seen.get(writer, (-_RESCAN_S, -1))
            if now - at >= _RESCAN_S:
                bytes_now = sum(path.stat().st_size for path in self.folder.glob(f"{writer}-*.frames"))
                self._frames_seen[writer] = (now, bytes_now)
                if bytes_now != size:
                    self.roster.scan(self._reader, writer)

    def _meet(self, writer: str) -> None:
        """Learn who `writer` is; from elsewhere, where its own first frame can't be read."""
        now = self._clock.monotonic()
        seen = self._unreadable.get(writer)
        if seen is not None and now - seen < _RESCAN_S:
            return
        try:
            self.roster.scan(self._reader, writer)
        except SpoolError as error:  # of a newer version: its data waits for a release that reads it
            guard.limited(f"read writer {writer}", "the records of writer %s wait: %s", writer, error)
            self.strangers.add(writer)
        if writer in self.roster.opened or writer in self.strangers:
            return
        self._unreadable[writer] = now
        # It is written before a writer can be seen, so it is damaged; but a file may just be on its way elsewhere.
        if (seen is None and not self.deaths.look(writer)) or not self._reader.segments(writer):
            return
        opened = stand_in(self.folder, self.manifest, self.roster, writer)
        if opened is not None:
            logger.warning(
                "the first frame of writer %s can't be read; its points count as rank %d's", writer, opened.rank
            )
            self.roster.open(writer, opened)

    # ---- silence ------------------------------------------------------------------------------------------------

    def _note_silence(self) -> None:
        """Write down that the run fell silent or speaks again: whoever ships it next has to know what was told."""
        now = self._clock.monotonic()
        if self._in_process or self.received or (self._silent is None and not self.is_lost):
            return
        if now - self._silence_at < SILENCE_EVERY_S:
            return
        self._silence_at = now
        lost = self._is_silent()
        if lost == self.is_lost:
            return

        def put(manifest: Manifest | None) -> Manifest:
            current = self.manifest if manifest is None else manifest
            # Later than any word before, over a clock set back, or of another host, too.
            noted = max(self._clock.time_ns(), int(current.extra.get("noted_unix_nano", 0)) + 1)
            return dataclasses.replace(current, extra={**current.extra, "lost": lost, "noted_unix_nano": noted})

        try:
            self.manifest = store.update_manifest(self.folder, put, make=False)
        except (OSError, SpoolError) as error:  # no room: it is tried again
            guard.note("note in the manifest that a run is silent", error)
            return
        if lost:
            logger.warning("run %s is LOST: nothing has been heard of it for long", self.run.run_id)
        else:
            logger.info("run %s is heard of again", self.run.run_id)

    def _is_silent(self) -> bool:
        """Whether the run is LOST. Not for an attempt that is over, or old, or whose rank 0 is on another host."""
        newest = self.manifest.newest
        if self._silent is None or newest is None or newest.key in self.decided:
            return False
        writers = self.roster.writers_of(newest.key)
        return bool(writers) and self._silent(writers) and self.speaks_for(newest) and self.is_newest(newest)

    # ---- an attempt's end -------------------------------------------------------------------------------------------

    def _decide(self, attempt: Attempt) -> None:
        now = self._clock.monotonic()
        if attempt.ended is not None:
            known, verdict = self.decided.get(attempt.key), Verdict.from_json(attempt.ended)
            if known is not None:  # a better witness of it has come over the wire
                self.decided[attempt.key] = dataclasses.replace(known, verdict=verdict)
                return
            began_with_it = not self.roster.writers_of(attempt.key) or now - self._began < 1.0
            self.decided[attempt.key] = Decided(verdict, float("-inf") if began_with_it else now)
            return
        first = self.roster.first_of(attempt.key)
        if first is None or self.received:  # the end of a received attempt is put into the manifest by who received it
            return
        if self._waits_for_rank_0(attempt, now):
            return
        firsts = self.roster.firsts(self.roster.writers_of(attempt.key))
        told = self._verdict(attempt.key, first, firsts or [first], now)
        if told is not None:
            self.decided[attempt.key] = Decided(self._settle(attempt, told), now)
            logger.info("attempt %s of run %s is over: %s", attempt.key, self.run.run_id, told.status)

    def _decide_rank(self, attempt: Attempt, end: End) -> None:
        assert end.rank is not None, "a further rank has a number"
        now, kept = self._clock.monotonic(), attempt.ranks_ended.get(str(end.rank))
        if kept is not None:
            self._ranks[attempt.key, end.rank] = Decided(Verdict.from_json(kept), float("-inf"))
            return
        first = self.roster.first_of(attempt.key, end.rank)
        assert first is not None, "who is told of has begun"
        firsts = self.roster.firsts(self.roster.writers_of(attempt.key))
        mine = [writer for writer in firsts if self.roster.opened[writer].rank == end.rank]
        verdict = self._verdict(end.mark, first, mine, now)
        if verdict is not None:
            self._ranks[attempt.key, end.rank] = Decided(self._settle(attempt, verdict, further=True), now)

    def _verdict(self, what: str, first: str, firsts: Sequence[str], now: float) -> Verdict | None:
        """How it ended for the writer `first`; None as long as one of `firsts` lives."""
        if not all(self.is_over(writer) for writer in firsts):
            return None
        ended = self.roster.ended.get(first)
        if self._waits_for_exit(what, first, ended, now):
            return None
        dead = self.deaths.is_dead(first)
        watched = self.deaths.was_seen_alive(first) and not self.deaths.from_elsewhere
        gone = self._clock.time_ns() if ended is not None or watched else self._last_record_unix_nano(first)
        verdict = decide(ended, exit_code=self.deaths.exit_code(first) if dead else None, gone_unix_nano=gone)
        opened = self.roster.opened[first]
        # Over a clock that was set back meanwhile: nothing ends before it began.
        end = max(verdict.end_unix_nano, opened.attempt_started_unix_nano, opened.time_unix_nano)
        return dataclasses.replace(verdict, rank=opened.rank, end_unix_nano=end)

    def _waits_for_rank_0(self, attempt: Attempt, now: float) -> bool:
        """Whether the rank whose end is the run's may only just start, where others had little to do and are over.

        Not where nobody was seen at work: who ships what was left long ago waits for nobody.
        """
        launch = attempt.extra.get("launch", {})
        firsts = self.roster.firsts(self.roster.writers_of(attempt.key))
        expected = launch.get("all_here") or "0" in launch.get("ranks", {})
        if not expected or not firsts or any(self.roster.opened[writer].rank == 0 for writer in firsts):
            return False
        if not all(self.is_over(writer) for writer in firsts):
            return True
        recent = self._clock.time_ns() - attempt.started_unix_nano < FIRST_RANK_WAIT_S * 1e9
        if not recent and not any(self.deaths.was_seen_alive(writer) for writer in firsts):
            return False
        return now - self._end_seen.setdefault(f"{attempt.key} rank 0", now) < FIRST_RANK_WAIT_S

    def _waits_for_exit(self, key: str, first: str, ended: WriterEnded | None, now: float) -> bool:
        """An END of an interpreter on its way out: wait for its exit code, while there is a process to ask."""
        if ended is None or ended.seen_by not in PROVISIONAL or not self.deaths.is_watched(first):
            return False
        since = self._end_seen.setdefault(key, now)
        if not self.deaths.is_gone(first):
            return now - since < EXIT_WAIT_S
        gone_since = self._end_seen.setdefault(f"{key} gone", now)
        return self.deaths.exit_code(first) is None and now - gone_since < REAP_WAIT_S

    def _settle(self, attempt: Attempt, verdict: Verdict, *, further: bool = False) -> Verdict:
        """Write the verdict down, once for all destinations and shippers; the one that was there first stands.

        `further`: it is one rank's, and not the attempt's.
        """
        if self._in_process:
            return verdict

        def put(manifest: Manifest | None) -> Manifest:
            current = self.manifest if manifest is None else manifest
            mine = current.attempt(attempt.key)
            if mine is None or written(mine) is not None:
                return current
            if further:
                ranks = {**mine.ranks_ended, str(verdict.rank): verdict.to_json()}
                return current.with_attempt(dataclasses.replace(mine, ranks_ended=ranks))
            return current.with_attempt(dataclasses.replace(mine, ended=verdict.to_json()))

        def written(mine: Attempt) -> Mapping[str, Any] | None:
            return mine.ranks_ended.get(str(verdict.rank)) if further else mine.ended

        try:
            mine = store.update_manifest(self.folder, put, make=False).attempt(attempt.key)
        except (OSError, SpoolError) as error:  # no room, or damaged: the end is delivered all the same
            guard.note("write an attempt's end into the manifest", error)
            return verdict
        kept = None if mine is None else written(mine)
        return verdict if kept is None else Verdict.from_json(kept)

    def _last_record_unix_nano(self, writer: str) -> int:
        """When a writer that nobody watched wrote last."""
        latest = self.roster.opened[writer].time_unix_nano
        for segment in reversed(self._reader.segments(writer)):
            position, last = Position(segment, 0, ()), None
            while True:
                ranges, after = self._reader.poll(writer, position, 2**16, dead=True)
                last = ranges[-1] if ranges else last
                if after == position:
                    break
                position = after
            if last is None:
                continue
            taken = self._reader.read(last._replace(first=max(last.first, last.end - 1024)))
            times: list[Any] = list(memoryview(taken.records).cast("Q")[:: SLOT_SIZE // 8])
            for _, kind, payload in taken.frames:
                times.append(getattr(decode_frame(kind, payload), "time_unix_nano", 0))
            return int(max([latest, *times]))
        return latest


def _inode_of(folder: Path) -> int | None:
    try:
        return os.stat(folder).st_ino
    except FileNotFoundError:
        return None
