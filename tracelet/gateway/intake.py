"""The gateway's inside: what came over the wire goes into the spool, and from there to MLflow.

take(decoded) -> ownership -> RunSpool.store, one a run -> one flush for all who wait -> Taken, which means 2xx
                                    |
                                    +-> Fleet: the same lanes as at training's side -> MLflow
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelet.errors import ConfigError, SpoolError, TraceletError
from tracelet.exporters import registry
from tracelet.gateway import repeats
from tracelet.gateway.callers import Caller, Forbidden, Full, IntakeInfo, Taken
from tracelet.gateway.commit import GroupCommit
from tracelet.gateway.fleet import Fleet
from tracelet.gateway.lost import Silence
from tracelet.gateway.room import Room, RootLock
from tracelet.gateway.runs import FOLDER, SEGMENT_BYTES, SLOTS, RunSpool, Stored, Terms
from tracelet.gateway.whose import foreign_project, foreign_run
from tracelet.guard import guard, logger
from tracelet.ids import valid_run_id
from tracelet.otlp.arrival import Piece
from tracelet.otlp.decode_events import whole
from tracelet.records import RunInfo
from tracelet.shipper.shipment import Build
from tracelet.shipper.site import Clock
from tracelet.spool import store
from tracelet.spool.points import Address

if TYPE_CHECKING:
    from tracelet.otlp.arrival import Arrival, Decoded

__all__ = ["Caller", "Forbidden", "Full", "Intake", "IntakeInfo", "Taken"]

CLOSE_FILES_AFTER_S = 300.0
"""How long nothing must come to a rank until its files are closed; what comes later opens new ones."""

CLOSE_ENDED_AFTER_S = 10.0
"""The same for a run that has ended."""

FORGET_AFTER_S = 900.0
"""How long nothing must come to a run until it leaves this process's memory; its folder stays."""


class Intake:
    """Takes decoded requests into a spool folder for each run, and ships them from there.

    Guarantees:
    - what `take` returned for is on the disk, and reaches every destination, over restarts and `kill -9`;
    - the same arrival again is acknowledged and not stored again;
    - a run belongs to the first caller with a name that wrote it; nobody else's arrival is stored in it.

    One process at a time writes in `root`. `take` may be called by many threads at once.
    """

    def __init__(
        self,
        root: Path,
        destinations: Sequence[Mapping[str, Any]],
        secrets: Mapping[str, Mapping[str, Any]],
        environ: Mapping[str, str],
        *,
        lost_after_s: float = 3600.0,
        sync: bool = True,
        clock: Clock = time,
        max_bytes: int | None = None,
        build: Build = registry.build,
    ) -> None:
        """`destinations` and `secrets` (by destination id) as an attempt's manifest and a shipper have them.

        `sync` False: what was taken survives the death of the process, not the loss of power. `max_bytes` is for all
        runs together.
        """
        self._root = Path(root).absolute()
        self._clock = clock
        self._lock = threading.Lock()  # of `_runs` alone; each run has its own
        self._runs: dict[str, RunSpool] = {}
        self._known: set[str] = set()
        self._making: dict[str, threading.Lock] = {}
        self._rooted = RootLock(self._root)
        self._room = Room(self._root, max_bytes)
        self._terms = Terms(
            self._root, tuple(destinations), self._room.admit, Piece, whole, sync=sync, time_ns=clock.time_ns
        )
        self._commit = GroupCommit()
        self._silence = Silence(lost_after_s, now=lambda: clock.time_ns() / 1e9)
        self._fleet = Fleet(
            folder_of=lambda run_id: self._root / run_id / FOLDER,
            writers_of=self._writers_of,
            secrets=secrets,
            environ=environ,
            build=build,
            clock=clock,
        )
        self._points = self._items = self._repeats = 0
        self._inside = 0
        self._closed = threading.Event()
        self._left = threading.Condition()
        self._house: threading.Thread | None = None

    # ---- the start ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find what is there from before, and begin to ship it.

        Raises:
            SpoolError: another gateway writes in the same folder.
            OSError: the folder can't be made or written.
        """
        self._rooted.acquire()
        for found in store.list_runs(self._root):
            if found.folder.name != FOLDER:
                continue
            if found.manifest is None:
                logger.error("run %s is left alone: %s", found.run_id, found.problem)
                continue
            with guard(f"take up run {found.run_id}"):
                self._take_up(found.run_id, found.folder, found.manifest)
        self._fleet.start()
        self._house = threading.Thread(target=self._keep_house, name="tracelet gateway house", daemon=True)
        self._house.start()

    def _take_up(self, run_id: str, folder: Path, manifest: store.Manifest) -> None:
        self._known.add(run_id)
        newest = manifest.newest
        if manifest.extra.get("lost"):
            self._silence.lost(run_id)
        elif newest is not None and newest.ended is None:
            self._silence.heard(run_id, _last_heard(folder))
        if any(folder.glob("*.points")):  # else all of it is delivered and cleared away
            self._run(RunInfo(run_id, manifest.project, manifest.experiment_name, manifest.run_name), "")
            self._fleet.news(run_id)

    # ---- taking -------------------------------------------------------------------------------------------------

    def take(self, decoded: Decoded, caller: Caller) -> Taken:
        """Store what is ours of a request; returns only when all of it is on the disk.

        Call it in a thread: it waits for the disk, in one flush with everybody else who waits.

        Raises:
            Full: no room, or a disk that can't be written: nothing is acknowledged, the same again later is right.
            Forbidden: one of its runs belongs to another caller, or to a project that isn't this caller's; nothing
                of the request was stored.
        """
        with self._left:
            if self._closed.is_set():
                raise Full("the gateway is stopping: send it again, to the next one that listens here")
            self._inside += 1
        try:
            return self._take(decoded, caller)
        except OSError as error:
            raise _full(self._root, error) from error
        except Forbidden:
            raise
        except SpoolError as error:
            raise Full(str(error)) from error
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()

    def _take(self, decoded: Decoded, caller: Caller) -> Taken:
        arrivals = [arrival for arrival in decoded.arrivals if _has_legal_id(arrival)]
        for arrival in arrivals:
            reason = foreign_project(arrival.run.project, caller)
            if reason is not None:
                raise Forbidden(arrival.run.run_id, "", reason)
        # Runs that are there already first: a refusal then leaves no new one behind.
        for arrival in sorted(arrivals, key=lambda one: one.run.run_id not in self._known):
            self._check_owner(self._run(arrival.run, caller.name), caller)
        stored = []
        for arrival in arrivals:
            stored.append(self._store(arrival, caller))
            if stored[-1][0].is_lost:
                self._silence.lost(arrival.run.run_id)
            elif stored[-1][1].alive and not stored[-1][1].repeat:
                self._silence.heard(arrival.run.run_id)
        runs = dict.fromkeys(run for run, _ in stored)
        self._commit.wait(runs)
        for run in runs:
            if run.is_ended:
                self._silence.ended(run.run_id)
            if any(one.anything for where, one in stored if where is run):
                self._fleet.news(run.run_id)
        points = sum(one.points for _, one in stored)
        repeated = sum(one.repeat for _, one in stored)
        items = sum(arrival.items for arrival in arrivals)
        with self._lock:
            self._points += points
            self._items += items
            self._repeats += repeated
        return Taken(items, points, repeated)

    def _store(self, arrival: Arrival, caller: Caller) -> tuple[RunSpool, Stored]:
        while True:
            run = self._run(arrival.run, caller.name)
            with run.lock:
                if run.is_closed:  # forgotten meanwhile; the next one is another object with the same folder
                    continue
                return run, run.keep(arrival)

    def _run(self, run: RunInfo, owner: str) -> RunSpool:
        while True:
            with self._lock:
                found = self._runs.get(run.run_id)
                if found is not None:
                    return found
                making = self._making.setdefault(run.run_id, threading.Lock())
            with making:  # a long run's frames are read here, and nobody else shall wait for that
                with self._lock:
                    found = self._runs.get(run.run_id)
                    mine = self._making.get(run.run_id) is making
                if found is not None:
                    return found
                if mine:  # else whoever was here before could not make it, and a third one may be at it by now
                    return self._made(run, owner)

    def _made(self, run: RunInfo, owner: str) -> RunSpool:
        try:
            made = RunSpool(self._terms, run, owner)
            with self._lock:
                self._runs[run.run_id] = made
                self._known.add(run.run_id)
            return made
        finally:
            with self._lock:
                self._making.pop(run.run_id, None)

    def _check_owner(self, run: RunSpool, caller: Caller) -> None:
        reason = foreign_run(run.manifest, caller)
        if reason is None and caller.name and not run.owner:
            run.adopt(caller.name)
            reason = foreign_run(run.manifest, caller)  # another one may have been quicker
        if reason is not None:
            raise Forbidden(run.run_id, run.owner, reason)

    def _writers_of(self, run_id: str) -> frozenset[str]:
        run = self._runs.get(run_id)
        return frozenset() if run is None else run.writers()

    # ---- housekeeping -------------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        while not self._closed.wait(1.0):
            with guard("keep a gateway's house"):
                self.keep_house()

    def keep_house(self) -> None:
        """What is due now: runs noted as lost, quiet files closed, quiet runs forgotten, the spool measured."""
        for run_id in self._silence.overdue():
            try:
                with guard(f"note run {run_id} as lost"):
                    self._note_lost(run_id)
            except TraceletError as error:  # no room, a damaged manifest: it stays overdue, and is noted later
                guard.limited("note a run as lost", "run %s can't be noted as lost now: %s", run_id, error)
        now = time.monotonic()
        for run in list(self._runs.values()):
            with guard(f"close the files of run {run.run_id}"):
                quiet = run.close_quiet(CLOSE_ENDED_AFTER_S if run.is_ended else CLOSE_FILES_AFTER_S, now)
                if quiet and now - run.heard >= FORGET_AFTER_S:
                    self._forget(run)
        self._room.measure()

    def _note_lost(self, run_id: str) -> None:
        manifest = store.read_manifest(self._root / run_id / FOLDER)
        if manifest is None:  # pruned
            self._silence.ended(run_id)
            return
        run = self._run(RunInfo(run_id, manifest.project, manifest.experiment_name, manifest.run_name), "")
        if run.is_ended:
            self._silence.ended(run_id)
            return
        try:
            run.note_lost()
            self._commit.wait([run])
        except OSError as error:
            raise _full(self._root, error) from error
        self._silence.lost(run_id)
        self._fleet.news(run_id)

    def _forget(self, run: RunSpool) -> None:
        with run.lock, self._lock:
            if not run.writers():
                run.close()
                self._runs.pop(run.run_id, None)

    # ---- numbers, and the end -----------------------------------------------------------------------------------

    def run_info(self) -> IntakeInfo:
        """The numbers for /metrics; cheap enough to be asked every second."""
        fleet = self._fleet.info()
        running, lost = self._silence.counts()
        with self._lock:
            points, items, repeated, known = self._points, self._items, self._repeats, len(self._known)
        return IntakeInfo(
            runs=known,
            running=running,
            lost=lost,
            open_runs=fleet.open_runs,
            waiting_runs=fleet.waiting_runs,
            points=points,
            items=items,
            repeats=repeated,
            delivered=fleet.delivered,
            refused=fleet.refused,
            undelivered=sum(self._undelivered(run_id) for run_id in self._fleet.open_runs()),
            bytes=self._room.used,
            is_full=self._room.is_full(SEGMENT_BYTES),
            trouble=fleet.trouble or {},
        )

    def _undelivered(self, run_id: str) -> int:
        run = self._runs.get(run_id)
        heads = {} if run is None else run.heads()
        return max(
            (sum(_behind(where, head) for head in heads.values()) for where in self._fleet.positions(run_id)), default=0
        )

    def close(self, grace_s: float = 0.0) -> None:
        """Take nothing more, deliver for `grace_s` at most, and leave the rest for the next start."""
        self._closed.set()
        with self._left:
            self._left.wait_for(lambda: self._inside == 0, timeout=30.0)
        if self._house is not None:
            self._house.join()
            if not self._fleet.close(grace_s):
                logger.warning("not everything is delivered; the rest is in %s for the next start", self._root)
        for run in list(self._runs.values()):
            run.close()
        self._rooted.release()


def _has_legal_id(arrival: Arrival) -> bool:
    """Its run id can name a folder; what came over the wire may be anything."""
    try:
        valid_run_id(arrival.run.run_id)
    except ConfigError as error:
        logger.warning("an arrival is passed over: %s", error)
        return False
    return True


def _last_heard(folder: Path) -> float:
    times = []
    for name in (repeats.FILE, store.MANIFEST):
        try:
            times.append(os.stat(folder / name).st_mtime)
        except FileNotFoundError:
            continue
    return max(times, default=time.time())


def _behind(positions: Mapping[str, Any], head: Address) -> int:
    where = positions.get(head.writer)
    at = (0, 0) if where is None else (where.segment - 1, where.next)
    return max(0, (head.segment - 1 - at[0]) * SLOTS + head.slot - at[1])


def _full(root: Path, error: OSError) -> Full:
    return Full(f"the spool {root} takes nothing now ({error.strerror or error})", folder=str(root))
