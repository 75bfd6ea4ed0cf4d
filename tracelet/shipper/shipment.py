"""All it takes to ship one folder: the lanes and their threads, the look-out, the housekeeping, and when to go."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracelet.errors import TraceletError
from tracelet.exporters import registry
from tracelet.exporters.base import Exporter, Refusal
from tracelet.guard import guard
from tracelet.shipper.batches import Assembled
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.loop import Lane
from tracelet.shipper.site import Clock, Site
from tracelet.shipper.upkeep import Destination, Upkeep, keep_rule
from tracelet.sieve import Sieve
from tracelet.spool import home
from tracelet.spool.cursor import Progress
from tracelet.spool.reader import START, Position, SpoolReader
from tracelet.spool.store import Manifest

__all__ = ["Build", "Outcome", "Shipment"]

Build = Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, str]], Exporter]

GIVE_UP_S = 600.0
"""After the run's end, how long nothing may move before the shipper leaves the rest to `tracelet ship`."""

_JOIN_S = 15.0  # longer than any exporter's timeout


@contextmanager
def _survived(doing: str) -> Iterator[None]:
    """Go on after a fault of ours (counted), and after a file that is not as it should be (said once a minute)."""
    try:
        with guard(doing):
            yield
    except TraceletError as error:
        guard.limited(doing, "could not %s: %s", doing, error)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far each destination (by id) has come when a shipper leaves."""

    delivered: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)  # slots not acknowledged; 0: all of it is there
    reasons: Mapping[str, str] = field(default_factory=dict)  # why something is left
    complete: bool = True
    joined: bool = False  # another shipper serves the folder
    gone: bool = False  # the folder was deleted meanwhile: what was not delivered is lost


@dataclass(frozen=True, slots=True)
class _Away:
    """A destination that somebody else serves, and how far it is."""

    id: str
    positions: Mapping[str, Position]


class Shipment:
    """One folder on its way to its destinations, each in a thread of its own.

    `run` returns when everything is delivered (or, without `follow`, everything that is there now), when `stop` is
    set, or when nothing moves any more; it can be called again.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        environ: Mapping[str, str],
        secrets: Mapping[str, Mapping[str, Any]],
        build: Build = registry.build,
        deaths: Deaths | None = None,
        only: Sequence[str] | None = None,
        in_process: bool = False,
        with_in_process: bool = False,
        clock: Clock = time,
        suppress: Callable[[], AbstractContextManager[object]] = nullcontext,
        give_up_s: float = GIVE_UP_S,
        again: bool = False,
        silent: Callable[[Iterable[str]], bool] | None = None,
    ) -> None:
        """`only`: ids of the destinations to serve (None: all but those served in the training process).

        `in_process`: beside the run's shipper, for destinations of the training process itself. `with_in_process`:
        this is the run's shipper, in the training process, and serves those too.
        `again`: send also, once, what they refused before. `silent`: see `Site`.
        """
        self.site = Site(
            folder,
            manifest,
            Deaths(folder, clock=clock.monotonic) if deaths is None else deaths,
            clock=clock,
            in_process=in_process,
            backend_ids=self._backend_ids,
            silent=silent,
        )
        self.lanes: dict[str, Lane] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._environ = environ
        self._secrets = secrets
        self._sieve = Sieve(environ, secrets.values())
        self._build = build
        self._again = again
        self._only = only
        self._in_process = in_process
        self._with_in_process = with_in_process
        self._clock = clock
        self._suppress = suppress
        self._give_up_s = give_up_s
        self._upkeep = None if in_process else Upkeep(self.site)
        # What a gateway received has no host whose death would end it.
        at_home = home.is_here(manifest) and not in_process and not self.site.received
        self._beat = home.Beat(folder, clock=clock.monotonic) if at_home else None
        self._faulty = False
        self._upkeep_at = float("-inf")
        self._progress = Progress(folder)
        self._began = clock.monotonic()
        self._waker, self._wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self, *, follow: bool, stop: threading.Event, timeout_s: float | None = None, hurry: bool = False) -> None:
        """Ship until there is nothing more to do, or `stop` is set, or `timeout_s` is over."""
        until = None if timeout_s is None else self._clock.monotonic() + timeout_s
        while not stop.is_set():
            self.tick(hurry=hurry)
            now = self._clock.monotonic()
            if self.site.gone or self.is_complete() or (not follow and self.is_caught_up()):
                return
            if (until is not None and now >= until) or (follow and self._nothing_moves(now)):
                return
            self.site.deaths.wait(self._pause(), self._waker, for_deaths=not self._faulty)
            self._drain_wakes()

    def wake(self) -> None:
        """Let `run` look at `stop` now; safe in a signal handler."""
        try:
            os.write(self._wake_end, b"!")
        except OSError:  # full of wakes already
            pass

    def nudge(self) -> None:
        """Something has come: look around, and let every destination look for it now."""
        self.tick()
        for lane in self.lanes.values():
            lane.wake()

    def stop_lanes(self) -> None:
        """Let every destination finish the attempt it is making; `close` waits for them."""
        for lane in self.lanes.values():
            lane.stop()

    def _drain_wakes(self) -> None:
        try:
            while os.read(self._waker, 512):
                pass
        except BlockingIOError:
            pass

    def tick(self, *, hurry: bool = False) -> None:
        """Look around once, start lanes for new destinations, keep the folder in order."""
        # A fault in here must not end the shipper: what it missed comes with the next look.
        self._faulty = True
        with _survived("look after the spool"):
            self.site.look(stuck=any(lane.trouble is not None for lane in self.lanes.values()))
            self._faulty = False
        if self.site.gone:
            return
        for identity, destination in self._served().items():
            with _survived(f"begin to ship to {identity}"):
                if identity not in self.lanes:
                    self.lanes[identity] = self._lane(identity, destination)
                if identity not in self._threads:
                    self._start(identity)
        for lane in self.lanes.values():
            lane.hurry = hurry
        if self._beat is not None:
            with _survived("renew the lease"):
                self._beat.renew()
        now = self._clock.monotonic()
        if self._upkeep is not None and now - self._upkeep_at >= 1.0:
            self._upkeep_at = now
            with _survived("keep the spool in order"):
                self._upkeep.round(self._readers())

    def _serves(self, identity: str, destination: Mapping[str, Any]) -> bool:
        if self._only is not None:
            return identity in self._only
        return self._with_in_process or bool(destination.get("in_process")) == self._in_process

    def _served(self) -> dict[str, Mapping[str, Any]]:
        known = self.site.manifest.destinations
        return {identity: one for identity, one in known.items() if self._serves(identity, one)}

    def _all_started(self) -> bool:
        return self._served().keys() <= self.lanes.keys()

    def _readers(self) -> list[Destination]:
        """All who still need what they have not passed: the lanes, and exporter objects of the training program.

        What such an object had not taken when its program died waits for the next start. A console's rest is of no use.
        """
        mine = self._served()
        known = self.site.manifest.destinations.items()
        objects = [identity for identity, one in known if one.get("kind") == "live" and identity not in mine]
        if not objects:
            return list(self.lanes.values())
        self._progress.refresh()
        away = []
        for identity in objects:
            there = self._progress.destinations.get(identity)
            # An end is made of frames that it has passed already.
            marks = [end.mark for attempt in self.site.decided for end in self.site.ends_of(attempt)]
            whole = there is not None and all(there.done.get(mark) for mark in marks)
            away.append(_Away(identity, there.positions if there is not None and whole else {}))
        return [*self.lanes.values(), *away]

    def _lane(self, identity: str, destination: Mapping[str, Any]) -> Lane:
        secrets = self._secrets.get(identity, {})
        return Lane(
            self.site,
            destination,
            lambda: self._build(destination, secrets, self._environ),
            clock=self._clock,
            on_delivered=self._delivered,
            sieve=self._sieve,
            again=self._again,
        )

    def _start(self, identity: str) -> None:
        """Let a lane run; where no thread can be started (no memory, RLIMIT_NPROC) the next look tries again."""
        lane = self.lanes[identity]
        thread = threading.Thread(target=self._run_lane, args=(lane,), name=f"tracelet {identity}", daemon=True)
        thread.start()
        self._threads[identity] = thread

    def _run_lane(self, lane: Lane) -> None:
        with self._suppress():
            lane.run()

    def _delivered(self, lane: str, assembled: Assembled, refused: tuple[Refusal, ...]) -> None:
        if self._upkeep is not None:
            self._upkeep.delivered(lane, assembled, refused)

    def _backend_ids(self) -> dict[str, str]:
        lanes = list(self.lanes.values())
        return {lane.id: str(lane.memory["run_id"]) for lane in lanes if lane.memory.get("run_id")}

    def _pause(self) -> float:
        quiet = self._clock.monotonic() - max((lane.active_at for lane in self.lanes.values()), default=self._began)
        return 0.05 if quiet < 2.0 else 0.1 if quiet < 30.0 else 0.2

    # ---- when to go -------------------------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """All writers are over, and every destination has everything, ends included."""
        site = self.site
        return (
            not site.strangers
            and not site.gone
            and all(site.is_over(writer) for writer in site.writers)
            and all(attempt.key in site.decided or site.is_hollow(attempt) for attempt in site.manifest.attempts)
            and self._all_started()
            and all(lane.finished_of == site.state for lane in self.lanes.values())
        )

    def is_caught_up(self) -> bool:
        """Every destination has what was there when it last looked, and the ends of attempts that are over."""
        site = self.site
        for attempt in site.manifest.attempts:
            writers = site.roster.writers_of(attempt.key)
            # Of what came over the wire the writers end without the run: a gateway closes its files, or dies.
            over = all(map(site.is_over, site.roster.firsts(writers) or writers))
            if site.received:
                over = attempt.key in site.decided
            if over and writers and not all(lane.is_done(attempt.key) for lane in self.lanes.values()):
                return False
        return self._all_started() and all(lane.caught_up for lane in self.lanes.values())

    def _nothing_moves(self, now: float) -> bool:
        site = self.site
        if not all(attempt.key in site.decided or site.is_hollow(attempt) for attempt in site.manifest.attempts):
            return False
        ends = [decided.noticed for decided in site.decided.values()]
        moved = [lane.moved_at for lane in self.lanes.values()]
        return now - max([self._began, *ends, *moved]) >= self._give_up_s

    def tidy(self) -> None:
        """All is delivered: clear the folder away, as far as the run's KEEP allows. Only under the shipper's lock."""
        if self._upkeep is not None and self.lanes and self._only is None:
            attempts = self.site.manifest.attempts
            rule = keep_rule(attempts[-1].extra.get("keep") if attempts else None)
            with _survived("clear away what is delivered"):
                self._upkeep.finish(self._readers(), rule, self._clock.time_ns() / 1e9)

    def close(self) -> Outcome:
        """Stop the lanes (each finishes the attempt it is making) and say how far they came."""
        self.stop_lanes()
        if self._beat is not None:
            self._beat.withdraw()
        until = time.monotonic() + _JOIN_S
        for identity, lane in self.lanes.items():
            if identity not in self._threads:  # no thread that would do it
                lane.close()
        for thread in self._threads.values():
            thread.join(max(0.0, until - time.monotonic()))
        outcome = self.outcome()
        self.site.close()
        os.close(self._waker)
        os.close(self._wake_end)
        return outcome

    def outcome(self) -> Outcome:
        """How far each destination is now."""
        if self.site.gone:
            return Outcome(
                delivered={identity: lane.counts[0] for identity, lane in self.lanes.items()},
                refused={identity: lane.counts[1] for identity, lane in self.lanes.items()},
                reasons=dict.fromkeys(self._served(), "its folder was deleted"),
                complete=False,
                gone=True,
            )
        reader = SpoolReader(self.site.folder, pages=self.site.pages)
        try:
            left = {identity: self._left(reader, lane) for identity, lane in self.lanes.items()}
        finally:
            reader.close()
        reasons = dict.fromkeys(self._served().keys() - self.lanes.keys(), "it could not be begun; the log says why")
        for identity, lane in self.lanes.items():
            ends = [
                a.key for a in self.site.manifest.attempts if a.key in self.site.decided and not lane.is_done(a.key)
            ]
            if left[identity] or ends:
                reasons[identity] = lane.trouble or "it was still on its way"
            elif self.site.strangers:
                reasons[identity] = "some of the run is in a format that this release of tracelet doesn't know"
        return Outcome(
            delivered={identity: lane.counts[0] for identity, lane in self.lanes.items()},
            refused={identity: lane.counts[1] for identity, lane in self.lanes.items()},
            left=left,
            reasons=reasons,
            complete=not reasons,
        )

    def _left(self, reader: SpoolReader, lane: Lane) -> int:
        slots = 0
        for writer in self.site.writers:
            position = lane.positions.get(writer, START)
            while True:
                try:
                    ranges, after = reader.poll(writer, position, 2**16, dead=self.site.deaths.is_dead(writer))
                except OSError:  # a disk that can't be read at present: there may be more, and the lane has said so
                    return max(1, slots)
                slots += sum(piece.end - piece.first for piece in ranges)
                if after == position:
                    break
                position = after
        return slots
