"""Ships every run of a folder, those to come too, until it is told to stop: what a sidecar does.

    round: which folders are there? -> one that isn't served: its lock, a Shipment in a thread -> its end -> its mark

A folder whose run is delivered is marked by what lies in it; it is taken up again when that has changed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tracelet.errors import SpoolError
from tracelet.guard import guard, logger
from tracelet.shipper.process import ship
from tracelet.shipper.shipment import Build, Outcome
from tracelet.spool import store
from tracelet.spool.store import RunFolder

__all__ = ["Follower", "Served"]

LOOK_S = 1.0
AGAIN_S = 30.0
"""After a folder could not be served (no manifest, another shipper, a fault): how long until it is tried again."""
AT_ONCE = 64
"""Folders served at the same time, each with a thread and one for each destination."""

Mark = tuple[tuple[str, ...], tuple[str, ...]]


def mark_of(folder: Path) -> Mark | None:
    """What a run consists of by now: its writers and its attempts. None where that can't be read."""
    try:
        manifest = store.read_manifest(folder)
    except (OSError, SpoolError):
        return None
    writers = sorted(path.name for path in folder.glob("*.lock"))
    return tuple(writers), tuple(attempt.key for attempt in manifest.attempts) if manifest is not None else ()


@dataclass(slots=True)
class Served:
    """One folder on its way, or the last that was known of it."""

    folder: Path
    run_id: str
    thread: threading.Thread | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    outcome: Outcome | None = None
    mark: Mark | None = None  # as it was when all of it had been delivered
    not_before: float = float("-inf")


class Follower:
    """Serves the runs below `root` (or the folders that `find` yields) with its caller's credentials."""

    def __init__(
        self,
        root: Path,
        *,
        find: Callable[[], Iterator[RunFolder]] | None = None,
        environ: Mapping[str, str],
        build: Build | None = None,
        on_change: Callable[[Served], None] | None = None,
    ) -> None:
        """`on_change` is told, from the thread of the run, when serving a folder begins and when it is over."""
        self._root, self._find = root, find
        self._environ = environ
        self._build = build
        self._on_change = on_change
        self._known: dict[Path, Served] = {}

    def run(self, stop: threading.Event, *, until_over: bool = False) -> None:
        """Serve until `stop` is set; with `until_over`, until all that is there is over and delivered."""
        while not stop.is_set():
            with guard("look for runs"):
                self.round()
            if until_over and self._known and all(self._is_through(served) for served in self._known.values()):
                return
            stop.wait(LOOK_S)

    def drain(self, grace_s: float) -> bool:
        """Deliver what is there for `grace_s` at most, also of runs that came last; whether all of it is delivered."""
        until = time.monotonic() + grace_s
        for one in self._known.values():
            one.stop.set()
        for one in self._known.values():
            if one.thread is not None:
                one.thread.join(max(0.0, until - time.monotonic()))
        for entry in self._entries():
            self._known.setdefault(entry.folder, Served(entry.folder, entry.run_id))
        through = True
        for one in self._known.values():
            if self._is_through(one):
                continue
            if one.thread is None or not one.thread.is_alive():
                one.outcome = self._ship_rest(one, max(0.0, until - time.monotonic()))
            through = through and one.outcome is not None and one.outcome.complete
        return through

    def round(self) -> None:
        """Take up what is new, or has changed since it was delivered."""
        now = time.monotonic()
        busy = sum(1 for one in self._known.values() if one.thread is not None and one.thread.is_alive())
        for entry in self._entries():
            one = self._known.setdefault(entry.folder, Served(entry.folder, entry.run_id))
            if one.thread is not None and one.thread.is_alive():
                continue
            if now < one.not_before or busy >= AT_ONCE or (one.mark is not None and one.mark == mark_of(one.folder)):
                continue
            busy += 1
            one.stop, one.outcome, one.mark = threading.Event(), None, None
            one.thread = threading.Thread(
                target=self._serve, args=(one,), name=f"tracelet follow {one.run_id}", daemon=True
            )
            one.thread.start()

    def _entries(self) -> Iterator[RunFolder]:
        return store.list_runs(self._root) if self._find is None else self._find()

    def _is_through(self, one: Served) -> bool:
        alive = one.thread is not None and one.thread.is_alive()
        return not alive and one.mark is not None and one.mark == mark_of(one.folder)

    def _serve(self, one: Served) -> None:
        one.not_before = time.monotonic() + AGAIN_S  # unless it goes well
        with guard(f"ship {one.folder}"), self._told(one):
            try:
                before = mark_of(one.folder)
                one.outcome = ship(
                    one.folder,
                    environ=self._environ,
                    follow=True,
                    give_up_s=float("inf"),
                    stop=one.stop,
                    build=self._build,
                )
            except (OSError, SpoolError) as error:
                logger.warning("%s can't be shipped now: %s", one.folder, error)
                return
            if one.outcome.complete and mark_of(one.folder) == before:
                one.mark = before
            if one.outcome.complete:  # what has come since is taken up by the next round
                one.not_before = float("-inf")

    def _ship_rest(self, one: Served, timeout_s: float) -> Outcome | None:
        """What is there now, and its end if it has one; nobody waits for more."""
        try:
            return ship(one.folder, environ=self._environ, timeout_s=timeout_s, build=self._build)
        except (OSError, SpoolError) as error:
            logger.warning("%s can't be shipped now: %s", one.folder, error)
            return None

    @contextmanager
    def _told(self, one: Served) -> Iterator[None]:
        if self._on_change is not None:
            self._on_change(one)
        try:
            yield
        finally:
            if self._on_change is not None:
                self._on_change(one)
