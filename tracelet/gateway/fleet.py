"""The shared shipper over many runs: each on its way while it has something to deliver, in fair turns.

    news(run) -> waiting -> open (lock, Shipment, its lanes' threads) -> everything delivered, quiet -> closed
                    ^                                                        |
                    +---- its turn is over, and others wait -----------------+

One thread looks after all of them; delivering itself is the lanes' work, each in a thread of its own.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracelet.errors import TraceletError
from tracelet.guard import guard, logger
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.process import suppress_instrumentation
from tracelet.shipper.shipment import Build, Shipment
from tracelet.shipper.site import Clock
from tracelet.spool.lease import ShipperLock
from tracelet.spool.store import read_manifest

__all__ = ["Fleet", "FleetInfo"]

CEILING = 200
"""Runs on their way at once: each has a thread for each destination, and about forty descriptors."""

TURN_S = 5.0
"""How long a run may go on while others wait for its place."""

QUIET_S = 60.0
"""How long nothing must come, and everything be delivered, until a run is closed."""

TIDY_AFTER_S = 600.0
"""How long nothing must come to a run that is over, until its folder is cleared away."""

AGAIN_S = 5.0  # after what kept a folder from being opened
_ROUND_S = 0.2
_LOOK_S = 1.0
_FILES_A_RUN = 40
_FILES_ELSEWHERE = 300


@dataclass(frozen=True, slots=True)
class FleetInfo:
    """How far the runs on their way are."""

    open_runs: int = 0
    waiting_runs: int = 0
    delivered: int = 0
    refused: int = 0
    trouble: Mapping[str, str] | None = None


class _Ship:
    """One run on its way."""

    def __init__(self, run_id: str, shipment: Shipment, lock: ShipperLock, now: float) -> None:
        self.run_id = run_id
        self.shipment = shipment
        self.lock = lock
        self.opened_at = now
        self.news_at = now
        self.looked_at = float("-inf")
        self.closing: threading.Thread | None = None
        self.counted = (0, 0)
        self.opened_to_tidy = False
        self.tidied = False

    def counts(self) -> tuple[int, int]:
        """Delivered and refused by all its lanes, ever."""
        counts = [lane.counts for lane in self.shipment.lanes.values()]
        return sum(one[0] for one in counts), sum(one[1] for one in counts)


class Fleet:
    """Ships the folders it has heard of, as many at once as there is room for."""

    def __init__(
        self,
        *,
        folder_of: Callable[[str], Path],
        writers_of: Callable[[str], Collection[str]],
        secrets: Mapping[str, Mapping[str, Any]],
        environ: Mapping[str, str],
        build: Build,
        clock: Clock = time,
        ceiling: int = CEILING,
        turn_s: float = TURN_S,
        quiet_s: float = QUIET_S,
        tidy_after_s: float = TIDY_AFTER_S,
    ) -> None:
        """`writers_of(run)`: who writes in its folder now, all in this process; everybody else there is dead."""
        self._folder_of = folder_of
        self._writers_of = writers_of
        self._secrets = secrets
        self._environ = environ
        self._build = build
        self._clock = clock
        self._ceiling = min(ceiling, _affordable())
        self._turn_s, self._quiet_s, self._tidy_after_s = turn_s, quiet_s, tidy_after_s
        self._mutex = threading.Lock()
        self._news: dict[str, None] = {}
        self._waiting: dict[str, float] = {}  # run -> not before, in the order of their turns
        self._tidy_at: dict[str, float] = {}
        self._tidying: set[str] = set()
        self._open: dict[str, _Ship] = {}
        self._delivered = self._refused = 0
        self._hurry = False
        self._stop = threading.Event()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- from any thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to ship."""
        self._thread = threading.Thread(target=self._run, name="tracelet gateway fleet", daemon=True)
        self._thread.start()

    def news(self, run_id: str) -> None:
        """Something of this run may be waiting to be delivered."""
        with self._mutex:
            self._news[run_id] = None
        self._woken.set()

    def info(self) -> FleetInfo:
        """Numbers, and what is in the way."""
        ships = list(self._open.values())
        trouble = {}
        for ship in ships:
            for lane in list(ship.shipment.lanes.values()):
                if lane.trouble is not None:
                    trouble[ship.run_id] = lane.trouble
        with self._mutex:
            waiting = len(self._waiting.keys() | self._news.keys() - self._open.keys())
            return FleetInfo(len(ships), waiting, self._delivered, self._refused, trouble)

    def positions(self, run_id: str) -> list[Mapping[str, Any]]:
        """By writer, how far each destination of an open run is; nothing for a run that isn't open."""
        ship = self._open.get(run_id)
        return [] if ship is None else [lane.positions for lane in list(ship.shipment.lanes.values())]

    def open_runs(self) -> list[str]:
        """The runs on their way."""
        return list(self._open)

    def is_settled(self) -> bool:
        """Nothing waits, and everything that has been seen is delivered."""
        with self._mutex:
            if self._news or self._waiting:
                return False
        now = self._clock.monotonic()
        ships = list(self._open.values())
        # Whether a lane has caught up is of its last look; what lies in the folder now is counted.
        return all(self._is_idle(ship, now, 0.0) for ship in ships) and not any(
            slots for ship in ships if ship.closing is None for slots in ship.shipment.outcome().left.values()
        )

    def close(self, grace_s: float) -> bool:
        """Deliver for `grace_s` at most, then stop; whether all was delivered."""
        self._hurry = True
        for run_id in self.open_runs():
            self.news(run_id)
        until = time.monotonic() + grace_s
        settled = self.is_settled()
        while not settled and time.monotonic() < until and self._thread is not None:
            self._stop.wait(0.05)
            settled = self.is_settled()
        self._stop.set()
        self._woken.set()
        if self._thread is not None:
            self._thread.join()
        return settled

    # ---- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            with guard("look after the runs on their way"):
                self._round()
            self._woken.wait(_ROUND_S)
            self._woken.clear()
        ships = list(self._open.values())
        for ship in ships:
            ship.shipment.stop_lanes()
        for ship in ships:
            if ship.closing is not None:
                ship.closing.join()
            else:
                self._close(ship)

    def _round(self) -> None:
        now = self._clock.monotonic()
        with self._mutex:
            news, self._news = self._news, {}
        for run_id in news:
            ship = self._open.get(run_id)
            self._tidy_at.pop(run_id, None)
            self._tidying.discard(run_id)
            if ship is None or ship.closing is not None:
                self._queue(run_id, now)
                continue
            ship.news_at = ship.looked_at = now
            ship.opened_to_tidy = ship.tidied = False
            ship.shipment.nudge()
            self._count(ship)
        for run_id in [run_id for run_id, at in self._tidy_at.items() if now >= at]:
            del self._tidy_at[run_id]
            if run_id not in self._open:
                self._tidying.add(run_id)
                self._queue(run_id, now)
        for ship in list(self._open.values()):
            self._look(ship, now)
        self._fill(now)

    def _queue(self, run_id: str, not_before: float) -> None:
        with self._mutex:
            self._waiting.setdefault(run_id, not_before)

    def _look(self, ship: _Ship, now: float) -> None:
        if ship.closing is not None:
            if not ship.closing.is_alive():
                self._open.pop(ship.run_id, None)
            return
        if now - ship.looked_at < _LOOK_S:
            return
        ship.looked_at = now
        ship.shipment.tick(hurry=self._hurry)
        self._count(ship)
        if not self._is_idle(ship, now, min(self._quiet_s, 2.0)):
            return
        self._clear_away(ship, now)
        if self._is_idle(ship, now, self._quiet_s):
            self._begin_to_close(ship)

    def _clear_away(self, ship: _Ship, now: float) -> None:
        """Tidy the folder of a run that is over, once nothing has come for long; it may have to be opened for that."""
        if ship.tidied or not all(one.ended is not None for one in ship.shipment.site.manifest.attempts):
            return
        if ship.shipment.is_complete() and (ship.opened_to_tidy or now - ship.news_at >= self._tidy_after_s):
            ship.shipment.tidy()
            ship.tidied = True
            self._tidy_at.pop(ship.run_id, None)
        else:
            self._tidy_at.setdefault(ship.run_id, now + self._tidy_after_s)

    def _is_idle(self, ship: _Ship, now: float, quiet_s: float) -> bool:
        lanes = list(ship.shipment.lanes.values())
        return (
            now - ship.news_at >= quiet_s
            and ship.looked_at >= ship.news_at
            and all(lane.trouble is None for lane in lanes)
            and ship.shipment.is_caught_up()
            and all(self._has_ends(ship, lane.is_done) for lane in lanes)
        )

    @staticmethod
    def _has_ends(ship: _Ship, is_done: Callable[[str], bool]) -> bool:
        site = ship.shipment.site
        return all(is_done(one.key) or one.ended is None or site.is_hollow(one) for one in site.manifest.attempts)

    def _count(self, ship: _Ship) -> None:
        counts = ship.counts()
        with self._mutex:
            self._delivered += counts[0] - ship.counted[0]
            self._refused += counts[1] - ship.counted[1]
        ship.counted = counts

    # ---- turns --------------------------------------------------------------------------------------------------

    def _fill(self, now: float) -> None:
        ready = [run_id for run_id, at in self._waiting.items() if now >= at and run_id not in self._open]
        for run_id in ready[: max(0, self._ceiling - len(self._open))]:
            with self._mutex:
                del self._waiting[run_id]
            with guard(f"begin to ship run {run_id}"):
                self._begin(run_id, now)
        missing = len(ready) - max(0, self._ceiling - len(self._open))
        if missing > 0:
            self._make_way(missing, now)

    def _make_way(self, missing: int, now: float) -> None:
        """Others wait: runs that are delivered go at once, those that had their turn go to the end of the queue."""
        missing -= sum(1 for ship in self._open.values() if ship.closing is not None)
        ships = [ship for ship in self._open.values() if ship.closing is None]
        idle = [ship for ship in ships if self._is_idle(ship, now, _LOOK_S)]
        over = [ship for ship in ships if ship not in idle and now - ship.opened_at >= self._turn_s]
        for ship in (idle + sorted(over, key=lambda one: one.opened_at))[: max(0, missing)]:
            if ship not in idle:
                self._queue(ship.run_id, now)
            self._begin_to_close(ship)

    def _begin(self, run_id: str, now: float) -> None:
        folder = self._folder_of(run_id)
        lock = ShipperLock(folder)
        try:
            manifest = read_manifest(folder)
            if manifest is None:
                return
            if not lock.acquire():
                logger.warning("another process ships %s; asked again in %.0f s", folder, AGAIN_S)
                self._queue(run_id, now + AGAIN_S)
                return
            shipment = Shipment(
                folder,
                manifest,
                environ=self._environ,
                secrets=self._secrets,
                build=self._build,
                # Their lock files are this process's own: to look at one is to drop it.
                deaths=Deaths(folder, is_alive=lambda writer: writer in self._writers_of(run_id)),
                clock=self._clock,
                suppress=suppress_instrumentation,
            )
        except (OSError, TraceletError) as error:
            lock.release()
            logger.warning("run %s can't be shipped now (%s); asked again in %.0f s", run_id, error, 12 * AGAIN_S)
            self._queue(run_id, now + 12 * AGAIN_S)
            return
        ship = self._open[run_id] = _Ship(run_id, shipment, lock, now)
        ship.looked_at = now
        ship.opened_to_tidy = run_id in self._tidying
        self._tidying.discard(run_id)
        shipment.tick(hurry=self._hurry)
        ship.counted = ship.counts()

    def _begin_to_close(self, ship: _Ship) -> None:
        """In a thread of its own: a lane finishes what it is sending, which may take as long as a time-out."""
        ship.closing = threading.Thread(target=self._close, args=(ship,), name="tracelet closing", daemon=True)
        ship.closing.start()

    def _close(self, ship: _Ship) -> None:
        with guard("stop shipping a run"):
            self._count(ship)
            ship.shipment.close()
        ship.lock.release()
        self._woken.set()


def _affordable() -> int:
    """How many runs the limit on open files leaves room for; raises that limit as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with guard("raise the limit on open files"):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return 65536 if soft == resource.RLIM_INFINITY else max(4, (soft - _FILES_ELSEWHERE) // _FILES_A_RUN)
