"""One destination's way through a folder: gather, journal, deliver, acknowledge; in a thread of its own.

    gather slots -> batch -> exporter.begin -> journal.intend -> delivery.attempt* -> dead letters -> journal.ack
                                                    ^                   |
                                  restart: the same |                   | RetryLater: wait, ask the same again
                                  slots, same batch +-------------------+

A lane waits for nobody but its own destination. Whatever goes wrong in it, it goes on: an answer of RetryLater and a
fault of ours are both tried again, for as long as it takes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tracelet.errors import ConfigError, IntegrationUnavailable
from tracelet.exporters.base import Answer, Delivered, Delivery, Exporter, Refusal, Rejected, RetryLater
from tracelet.guard import guard, logger
from tracelet.records import LOST, RUNNING, AttemptEnded, Batch, Heartbeat, Part, TagsSet
from tracelet.shipper.batches import Assembled, Gathering, assemble, empty_points
from tracelet.shipper.deadletter import DeadLetters
from tracelet.shipper.ends import ending_from, ending_of, word_of
from tracelet.shipper.reship import Reship, is_again
from tracelet.shipper.retry import BackOff
from tracelet.shipper.site import Clock, Decided, End, Site
from tracelet.spool.cursor import Intent, Journal
from tracelet.spool.reader import START, Position, SpoolReader

__all__ = ["Lane"]

BEAT_EVERY_S = 30.0
LATE_WRITER_S = 10.0
"""How long a writer that is still alive may hold an ended attempt open."""
RECEIVED_WRITER_S = 2.0
"""The same where a gateway writes: its writers never end, and what is still under way is delivered as late points."""

RECEIVED_IDLE_S = 1.0

REOPEN_S = 1.0
"""How old what is read of another host's files may be."""

_IDLE_S = ((2.0, 0.05), (30.0, 0.1), (float("inf"), 0.2))  # quiet for less than ...: look again after ...


class Lane:
    """Delivers one folder to one destination.

    `step()` does one thing and says how long nothing else will be due; `run()` is that in a loop. Everything but
    its properties and public attributes, which other threads may read, belongs to the thread that steps.
    """

    def __init__(
        self,
        site: Site,
        destination: Mapping[str, Any],
        build: Callable[[], Exporter],
        *,
        clock: Clock = time,
        backoff: BackOff | None = None,
        on_delivered: Callable[[str, Assembled, tuple[Refusal, ...]], None] | None = None,
        sieve: Callable[[str], str] = str,
        again: bool = False,
    ) -> None:
        """`sieve` takes secrets out of what destinations and drivers say, before it is kept or logged. `again`: send
        also, once, what the destination refused before.
        """
        self.id = str(destination["id"])
        self.trouble: str | None = None  # why it doesn't get on, in words
        self.finished_of: object = None  # the state of the site of which everything is delivered, ends included
        self.caught_up = False  # at the last look nothing was left to be sent
        self.moved_at = clock.monotonic()  # when it last delivered something
        self.hurry = False  # don't linger
        self._site = site
        self._build = build
        self._clock = clock
        self._backoff = BackOff() if backoff is None else backoff
        self._on_delivered = on_delivered
        self._sieve = sieve
        self._reader = SpoolReader(
            site.folder, pages=site.pages, reopen_s=REOPEN_S if site.deaths.from_elsewhere else None
        )
        self._journal = Journal(site.folder, self.id, clock=lambda: clock.time_ns() / 1e9)
        self._letters = DeadLetters(site.folder, self.id)
        self._reship = Reship(self._letters, wanted=again)
        self._exporter: Exporter | None = None
        self._opened = False
        self._assembled: Assembled | None = None
        self._gathered: Gathering | None = None
        self._delivery: Delivery | None = None
        self._intent: Intent | None = None
        self._refused: tuple[Refusal, ...] | None = None  # the final answer to the batch in hand; None: none yet
        self._lettered: int | None = None  # how many dead letters it has; None: they are not on disk yet
        self._resumed = False  # the batch in hand was under way when a shipper died
        self._positions: dict[str, Position] = dict(self._journal.positions)
        self._drained: set[str] = set()  # writers of which nothing is left to read, as long as they are over
        self._not_before = 0.0
        self.active_at = clock.monotonic()
        self._beat_at: float | None = None
        self._latest: dict[str, int] = {}
        self._stop = threading.Event()
        self._wake = threading.Event()

    # ---- the thread ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until `stop()`; then let the destination go."""
        while not self._stop.is_set():
            try:
                delay = self.step()
            except BaseException as error:  # noqa: BLE001 - an exporter of the program's that calls sys.exit, or is
                # cancelled by asyncio: not this thread's end, which would be the end of the destination
                words = type(error).__name__  # its own may be what it failed at
                guard.note(f"ship to {self.id}", error, words)
                delay = self._later(RetryLater(words))
            if delay > 0:
                self._wake.wait(delay)
                self._wake.clear()
        self.close()

    def wake(self) -> None:
        """Look for more now. From any thread."""
        self._wake.set()

    def stop(self) -> None:
        """Finish the attempt that is being made, and no more. From any thread."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """Let the destination's connections and the files go."""
        if self._exporter is not None:
            with guard(f"close {self.id}"):
                self._exporter.close()
        self._reader.close()
        self._journal.close()

    @property
    def memory(self) -> Mapping[str, Any]:
        """What the destination wants remembered: the run's id there, its address."""
        return self._journal.memory

    @property
    def counts(self) -> tuple[int, int]:
        """Points delivered and things refused, ever."""
        return self._journal.delivered, self._journal.refused

    @property
    def positions(self) -> dict[str, Position]:
        """How far the destination has acknowledged each writer."""
        return dict(self._journal.positions)

    def is_done(self, attempt_key: str) -> bool:
        """The destination has the attempt's end, and that of each of its ranks that have begun here."""
        return all(self._journal.done.get(end.mark) for end in self._site.ends_of(attempt_key))

    # ---- one step -----------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Do the next thing; seconds until there may be another."""
        wait = self._not_before - self._clock.monotonic()
        if wait > 0:
            return wait
        try:
            return self._step()
        except (ConfigError, IntegrationUnavailable) as error:
            return self._later(RetryLater(str(error), after_s=60.0, loud=True))
        except Exception as error:  # noqa: BLE001
            # Ours or an exporter's fault: said, counted, and tried again like an outage. A thread that died of it
            # would leave its destination's data lying without a word.
            words = self._sieve(str(error))
            guard.note(f"ship to {self.id}", error, words)
            return self._later(RetryLater(f"{type(error).__name__}: {words}"))

    def _step(self) -> float:
        if self._exporter is None:
            self._exporter = self._build()
        exporter = self._exporter
        if not self._opened:
            answer = exporter.open(self._site.run, dict(self._journal.memory))
            if not isinstance(answer, Delivered):
                return self._later(_as_retry(answer))
            self._opened = True
            self._well()
            self._remember(exporter)
        if self._assembled is None:
            self._beat(exporter)
            self._assembled = (
                self._resume(exporter) or self._gather(exporter) or self._word() or self._end() or self._again(exporter)
            )
        if self._assembled is None:
            return self._idle()
        if self._intent is None:
            self._intend(exporter)
        return self._attempt(exporter)

    def _resume(self, exporter: Exporter) -> Assembled | None:
        """The batch that was under way when a shipper died, made of the same slots again."""
        pending = self._journal.pending
        if pending is None:
            return None
        if is_again(pending.extra):
            assembled = self._reship.resume(self._site.run, str(self._site.folder), pending.number, pending.extra)
        elif pending.extra:
            assembled = ending_from(self._site, self._reader, self._journal.stamps, pending.number, pending.extra)
        else:
            pieces = [(piece, self._reader.read(piece)) for piece in pending.ranges]
            assembled = self._assemble(pieces, pending.number, exporter)
        self._resumed = True
        self._intent = pending
        self._delivery = None if assembled.empty else exporter.begin(assembled.batch, pending.note)
        return assembled

    def _assemble(self, pieces: list[Any], number: int, exporter: Exporter) -> Assembled:
        return assemble(
            pieces,
            number=number,
            run=self._site.run,
            folder=str(self._site.folder),
            roster=self._site.roster,
            states=self._journal.stamps,
            rising_limit_s=exporter.rising_limit_s,
            stamped=self._site.received,
        )

    # ---- gathering ----------------------------------------------------------------------------------------------

    def _gather(self, exporter: Exporter) -> Assembled | None:
        """Collect what the writers have closed since; a batch once it is due."""
        gathered = self._gathered
        if gathered is None:
            gathered = self._gathered = Gathering(self._reader, self._site.roster)
        now = self._clock.monotonic()
        before = gathered.slots
        # A notebook's workers come and go by the thousand: those of which nothing can come cost nothing here.
        site = self._site
        writers = [writer for writer in site.writers if writer not in self._drained or not site.is_over(writer)]
        limit = exporter.max_points
        # In order of appearance, but each only its share at first: one at full speed must not starve its siblings.
        greedy = []
        for index, writer in enumerate(writers):
            share = max(1, (limit - gathered.slots) // (len(writers) - index))
            if gathered.slots < limit and self._poll(writer, gathered, share, now) >= share:
                greedy.append(writer)
        for writer in greedy:
            if gathered.slots < limit:
                self._poll(writer, gathered, limit - gathered.slots, now)
        if gathered.slots > before:
            self.active_at = now
        if not gathered.slots:
            return None
        assert gathered.since is not None
        lingered = now - gathered.since >= exporter.linger_s
        if not (lingered or gathered.urgent or self.hurry or gathered.slots >= exporter.max_points):
            return None
        return self._assemble(gathered.pieces, self._journal.number + 1, exporter)

    def _poll(self, writer: str, gathered: Gathering, room: int, now: float) -> int:
        """Gather at most `room` slots of one writer; how many it were."""
        dead = self._site.deaths.is_dead(writer)  # asked before the poll: what is read afterwards is all there is
        position = self._positions.get(writer, START)
        ranges, after = self._reader.poll(writer, position, room, dead=dead)
        if ranges or after != position:
            gathered.take(writer, ranges, after, now)
            self._positions[writer] = after
        gathered.urgent = gathered.urgent or (dead and bool(ranges))
        if not ranges and not after.open and (dead or self._reader.ended(writer)):
            self._drained.add(writer)
        else:
            self._drained.discard(writer)
        return sum(piece.end - piece.first for piece in ranges)

    def _end(self) -> Assembled | None:
        """The end of an attempt, or of one of its ranks, whose writers' last slots have all been acknowledged here."""
        if self._gathered is not None and self._gathered.slots:
            return None
        for attempt in self._site.manifest.attempts:
            if self._site.is_hollow(attempt):
                continue
            for end in self._site.ends_of(attempt.key):
                if end.decided is None or self._journal.done.get(end.mark):
                    continue
                if not self._waits_for(attempt.key, end, end.decided):
                    number = self._journal.number + 1
                    extra = ending_of(self._site, self._reader, attempt, end)
                    return ending_from(self._site, self._reader, self._journal.stamps, number, extra)
        return None

    def _word(self) -> Assembled | None:
        """That the run is LOST, or is heard of again, if the destination has not been told; before an end."""
        word = self._site.word()
        if word is None or (self._gathered is not None and self._gathered.slots):
            return None
        extra = word_of(*word)
        if self._journal.done.get(extra["mark"]):
            return None
        return ending_from(self._site, self._reader, self._journal.stamps, self._journal.number + 1, extra)

    def _waits_for(self, attempt_key: str, end: End, decided: Decided) -> bool:
        """Whether a writer has something before this end: one that is over for sure, one that lives for a while."""
        patience_s = RECEIVED_WRITER_S if self._site.received else LATE_WRITER_S
        held_open = decided.age_s(self._clock.monotonic()) < patience_s
        roster = self._site.roster
        return any(
            writer not in self._drained and (held_open or self._site.is_over(writer))
            for writer in roster.writers_of(attempt_key)
            if end.mark == attempt_key or roster.opened[writer].rank == end.rank
        )

    def _again(self, exporter: Exporter) -> Assembled | None:
        """What was refused before, if that is wished for, once there is nothing else."""
        if self._gathered is not None and self._gathered.slots:
            return None
        number = self._journal.number + 1
        return self._reship.next(self._site.run, str(self._site.folder), number, exporter.max_points)

    # ---- delivering ---------------------------------------------------------------------------------------------

    def _intend(self, exporter: Exporter) -> None:
        assembled = self._assembled
        assert assembled is not None
        if not assembled.empty:
            self._delivery = exporter.begin(assembled.batch)
        gathered = None if assembled.extra else self._gathered
        self._intent = self._journal.intend(
            gathered.ranges() if gathered else [],
            gathered.positions if gathered else {},
            {} if self._delivery is None else self._delivery.note,
            assembled.stamps,
            extra=assembled.extra,
        )

    def _attempt(self, exporter: Exporter) -> float:
        assembled = self._assembled
        assert assembled is not None
        if self._refused is None:
            if _shows_repeats(exporter):
                self._journal.sync()  # at each try: the last one may have failed, or a shipper been killed before it
            answer: Answer = Delivered() if self._delivery is None else self._delivery.attempt()
            if isinstance(answer, RetryLater):
                return self._later(answer)
            # Kept until it is written down: on a full disk that is tried again, and nothing is sent again for it.
            refused = answer.items if isinstance(answer, Rejected) else ()
            # Of what was refused only the reason is sieved: the rest is the user's, and has to be sent again as it is.
            self._refused = tuple(dataclasses.replace(item, reason=self._sieve(item.reason)) for item in refused)
        self._settle(exporter, assembled, self._refused)
        return 0.0

    def _settle(self, exporter: Exporter, assembled: Assembled, refused: tuple[Refusal, ...]) -> None:
        """The answer is final: dead letters first, then what the destination remembers, then the journal."""
        intent = self._intent
        assert intent is not None
        letters = assembled.refusals + _placed(refused, assembled.batch)
        again = is_again(assembled.extra)
        if letters and not again and self._lettered is None:
            self._lettered = self._letters.write(
                intent.number,
                letters,
                time_unix_nano=self._clock.time_ns(),
                repeat=self._resumed,
                openings=self._site.roster.opened,
            )
            if self._lettered:
                guard.limited(
                    f"refused {self.id}",
                    "%s: %d things will not arrive there; each is in %s with the reason, the first: %s: %s",
                    self.id,
                    self._lettered,
                    self._letters.path,
                    letters[0].what,
                    letters[0].reason,
                )
        self._remember(exporter)
        if assembled.extra and not again:
            # Before the acknowledgement: a crash in between repeats this end, instead of making a second one.
            self._journal.close_attempt(str(assembled.extra.get("mark", assembled.extra["attempt"])))
        if again:
            # Marked before the acknowledgement, too: what is marked already is not sent a third time.
            delivered, taken = self._reship.settle(intent.extra, refused)
            self._journal.ack(intent, delivered=delivered, refused=-taken)
        else:
            lost = sum(int(item.facts.get("count", 1)) for item in refused if item.what == "point")
            delivered = max(0, assembled.points - lost)
            overtaken = self._letters.overtaken(_tags_taken(assembled.batch, refused))
            self._journal.ack(intent, delivered=delivered, refused=(self._lettered or 0) - overtaken)
        self._latest.update(assembled.latest_unix_nano)
        if self._on_delivered is not None:
            self._on_delivered(self.id, assembled, letters)
        if not self._resumed and not assembled.extra:
            self._gathered = None
        self._assembled = self._delivery = self._intent = self._refused = None
        self._resumed, self._lettered = False, None
        self._positions.update(self._journal.positions)
        self.active_at = self.moved_at = self._clock.monotonic()
        self._well()
        if _shows_repeats(exporter):
            self._journal.sync()  # last: the batch is through, whatever the disk says to this

    def _remember(self, exporter: Exporter) -> None:
        memory = exporter.memory()
        if memory and dict(memory) != dict(self._journal.memory):
            self._journal.remember(memory)

    def _beat(self, exporter: Exporter) -> None:
        """Say that the run lives, every 30 s; best effort, and never while something waits to be tried again."""
        now = self._clock.monotonic()
        if self._site.received:  # the run's own shipper says that it lives
            return
        if self._beat_at is not None and now - self._beat_at < BEAT_EVERY_S:
            return
        for attempt in self._site.manifest.attempts:
            writer = self._site.roster.first_of(attempt.key)
            if writer is None or self._site.is_over(writer) or self._site.deaths.is_dead(writer):
                continue
            if self._site.deaths.from_elsewhere and not self._site.is_newest(attempt):
                continue  # nothing shows that it is dead, and a newer one has begun: it would live for ever
            self._beat_at = now
            batch = Batch(
                0,
                self._site.run,
                str(self._site.folder),
                (Part(writer, self._site.roster.opened[writer], (), empty_points()),),
            )
            beat = Heartbeat(
                self._clock.time_ns(),
                LOST if self._site.is_lost else RUNNING,
                self._latest.get(attempt.key),
                self._site.backend_ids(),
                min(each.started_unix_nano for each in self._site.manifest.attempts),
            )
            try:
                exporter.beat(batch, beat)
            except Exception as error:  # noqa: BLE001 - a missed heartbeat is nothing; the batches behind it are
                guard.note(f"send a heartbeat to {self.id}", error, self._sieve(str(error)))

    # ---- waiting ------------------------------------------------------------------------------------------------

    def _idle(self) -> float:
        now = self._clock.monotonic()
        gathered = self._gathered
        busy = gathered is not None and gathered.slots > 0
        self.caught_up = not busy
        state = self._site.state  # before the questions, so that they are about no older one
        self.finished_of = state if self.caught_up and self._all_done() else None
        quiet = now - self.active_at
        if self._site.received and not busy:  # who receives wakes us, and has many runs open at once
            return RECEIVED_IDLE_S
        return next(delay for limit, delay in _IDLE_S if quiet < limit)

    def _all_done(self) -> bool:
        site = self._site
        attempts = site.manifest.attempts
        return all(self.is_done(attempt.key) or site.is_hollow(attempt) for attempt in attempts) and all(
            writer in self._drained for writer in site.writers
        )

    def _well(self) -> None:
        if self.trouble is not None:
            logger.info("%s: goes on", self.id)
        self.trouble = None
        self.finished_of, self.caught_up = None, False
        self._backoff.reset()

    def _later(self, answer: RetryLater) -> float:
        """Nothing arrives there now; when to ask again. Said at once if a person has to act, else as information."""
        self.finished_of, self.caught_up = None, False
        answer = dataclasses.replace(answer, reason=self._sieve(answer.reason))
        delay = self._backoff.next_s(answer.after_s)
        if answer.loud:
            guard.limited(f"loud {self.id}", "%s: %s (asked again in %.1f s)", self.id, answer.reason, delay)
        elif self.trouble is None or self._backoff.tries % 10 == 0:
            logger.info("%s: not now: %s (try %d)", self.id, answer.reason, self._backoff.tries)
        self.trouble = answer.reason
        self._not_before = self._clock.monotonic() + delay
        return delay


def _shows_repeats(exporter: Exporter) -> bool:
    return bool(getattr(exporter, "shows_repeats", False))


def _tags_taken(batch: Batch, refused: tuple[Refusal, ...]) -> set[str]:
    """Tags of which the destination now has this batch's value; none, where a refusal doesn't say which it means."""
    records = (record for part in batch.parts for record in part.records)
    tags = {key for record in records if isinstance(record, (TagsSet, AttemptEnded)) for key in record.tags}
    not_taken = {item.facts.get("key") for item in refused if item.what == "tag"}
    return set() if None in not_taken else tags - not_taken


def _placed(refused: tuple[Refusal, ...], batch: Batch) -> tuple[Refusal, ...]:
    """Each with its writer: an exporter that doesn't tell is right where there is only one."""
    if len(batch.parts) != 1:
        return refused
    only = batch.parts[0].writer_id
    return tuple(item if item.writer is not None else dataclasses.replace(item, writer=only) for item in refused)


def _as_retry(answer: Rejected | RetryLater) -> RetryLater:
    """Opening can't be refused item by item: whatever it is, a person has to look, and the data waits."""
    if isinstance(answer, RetryLater):
        return answer
    reasons = "; ".join(item.reason for item in answer.items)
    return RetryLater(f"refuses to open the run: {reasons}", loud=True)
