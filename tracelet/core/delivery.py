"""How far delivery has come, as training sees it: the shipper it starts, the waiting, the counts and addresses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tracelet import launch
from tracelet.core.ticket import Ticket
from tracelet.errors import SpoolError
from tracelet.guard import guard, logger
from tracelet.spool import lease
from tracelet.spool.cursor import Progress
from tracelet.spool.writer import Writer

__all__ = ["Delivery", "Stats"]

POLL_S = 0.02  # how often a waiting caller looks at the journals
OUTLIVED_WAIT_S = 2.0  # stop() and exit, where the shipper goes on by itself
STALLED_S = 30.0  # and where it can't: give up after this long without progress


@dataclass(frozen=True, slots=True)
class Stats:
    """How many points this process logged, and how far they have come.

    `logged`: by this process; `shipped`: delivered to the slowest destination, for the whole run on this host;
    `waiting`: logged and not yet shipped; `refused`: by the spool (no room) or, for good, by a destination; params,
    tags, artifacts and phases count here like points. `left_out`: logged by a rank that logs nothing, see `ranks`.
    """

    logged: int
    shipped: int
    waiting: int
    refused: int
    left_out: int = 0


class Delivery:
    """The way of one attempt's records out of this process."""

    def __init__(self, ticket: Ticket, writer: Writer, *, first: bool) -> None:
        self._ticket = ticket
        self._folder = Path(ticket.folder)
        self._writer = writer
        self._first = first  # this process began the attempt
        self._cannot_outlive = (
            "TRACELET_SHIPPER=thread: what delivers is a part of this program"
            if ticket.shipper == "thread"
            else launch.can_outlive(ticket.environ or os.environ)
        )
        self._progress: Progress | None = None
        self._in_process: Any = None
        self._shipper: launch.ShipperProcess | None = None
        self._links_told: set[str] = set()

    @property
    def outlived(self) -> bool:
        """Whether the shipper goes on after this process is gone."""
        return self._cannot_outlive is None

    @property
    def progress(self) -> Progress:
        """How far each destination is; as of the last `refresh()`."""
        if self._progress is None:
            self._progress = Progress(self._folder)
        return self._progress

    def passed(self, writer: str) -> tuple[int, int]:
        """The segment and slot of `writer` that every destination is known to have reached; reads nothing anew."""
        known = [one.positions.get(writer) for one in self.progress.destinations.values()]
        reached = [(where.segment, where.next) for where in known if where is not None]
        return min(reached) if reached and len(reached) == len(self._ticket.destinations) else (1, 0)

    def begin_anew(self) -> None:
        """The folder was deleted, and there is a new one, of which the old one's shipper and journals know nothing."""
        self._progress = None
        self._shipper = None
        self._in_process = None  # its threads serve the old folder, see that it is gone, and end
        self.serve()

    def serve(self) -> None:
        """See that something ships this folder: the shipper process, and for the console a thread of the first one.

        With TRACELET_SHIPPER=thread that is a thread of the first process for everything; other processes of the run
        leave their records to it.

        Never raises: what hinders it (no process, thread or descriptor to be had) is said, and it is tried again.
        """
        try:
            self._serve()
        except (OSError, RuntimeError, MemoryError, SpoolError) as error:
            guard.limited(
                "start the shipper",
                "nothing could be started that ships (%s); the data waits in the spool: tracelet ship %s",
                error,
                self._folder,
            )

    def _serve(self) -> None:
        ticket = self._ticket
        if ticket.shipper == "thread":
            if self._in_process is None and self._first and ticket.destinations:
                module = import_module("tracelet.shipper.inprocess")
                self._in_process = module.start_all(self._folder, ticket.secrets, ticket.environ or os.environ)
            return
        here = [d for d in ticket.destinations if d.get("in_process")]
        if ticket.shipper != "process":
            if self._first and ticket.rank == 0 and any(d["kind"] == "live" for d in here):
                guard.limited(
                    "serve a live exporter",
                    "run %s: the exporter object given as backend gets nothing, because TRACELET_SHIPPER is off and"
                    " nobody but this program could serve it",
                    ticket.run_id,
                )
            return
        if here and self._in_process is None and self._first and ticket.rank == 0:
            module = import_module("tracelet.shipper.inprocess")
            self._in_process = module.start(self._folder, here, ticket.secrets, ticket.environ)
        if len(here) == len(ticket.destinations) or self._is_served():
            return
        if self._shipper is not None and not self._shipper.has_ended():
            return  # on its way to the lock
        if ticket.secrets_left_out:
            guard.limited(
                "start the shipper",
                "run %s: no shipper serves it, and this process can't start one: its credentials were given as"
                " arguments, and don't travel. What is logged here waits in the spool: tracelet ship %s",
                ticket.run_id,
                self._folder,
            )
            return
        secrets = {name: own for name, own in ticket.secrets.items() if name not in {d["id"] for d in here}}
        self._shipper = launch.start_shipper(self._folder, secrets, environ=ticket.environ or os.environ)

    def _look(self) -> Progress:
        """How far each destination is by now; as far as was known before, where that can't be read."""
        progress = self.progress
        try:
            progress.refresh()
        except (OSError, SpoolError) as error:
            guard.limited(
                "look at the journals", "run %s: how far it has come can't be read: %s", self._ticket.run_id, error
            )
        return progress

    def _is_served(self) -> bool:
        try:
            return lease.shipper_alive(self._folder) is not None
        except OSError as error:
            guard.limited("see to a shipper", "whether a shipper is at work can't be told: %s", error)
            return True  # one that is started now could not read the folder either

    def wait(
        self,
        reached: Callable[[Progress], bool],
        *,
        timeout_s: float | None = None,
        stalled_s: float | None = None,
        at: Collection[str] | None = None,
    ) -> bool:
        """Wait until `reached`, at most `timeout_s`, and at most `stalled_s` without any progress; whether it was.

        `at`: the destinations (ids) whose progress counts; None: all.
        """
        started = moved = time.monotonic()
        looked_after = started
        before: object = None
        while True:
            progress = self._look()
            if reached(progress):
                return True
            now = time.monotonic()
            state = [
                (dict(d.positions), d.refused, dict(d.done))
                for name, d in progress.destinations.items()
                if at is None or name in at
            ]
            if state != before:
                before, moved = state, now
            if timeout_s is not None and now - started >= timeout_s:
                return False
            if stalled_s is not None and now - moved >= stalled_s:
                return False
            if now - looked_after > 1.0:
                looked_after = now
                self.serve()  # a shipper that was killed is replaced
            time.sleep(POLL_S)

    def all_delivered(self, timeout_s: float | None) -> bool:
        """Whether all that was logged before is delivered to every destination, within `timeout_s`."""
        if not self._ticket.destinations:
            return False
        heads = self._writer.heads()
        done = self.wait(lambda p: all(p.reached(head) for head in heads), timeout_s=timeout_s)
        self.tell_links()
        return done

    def links(self, timeout_s: float) -> dict[str, str]:
        """Each destination's address of the run, by the destination's kind, as far as known within `timeout_s`."""
        wanted = [d for d in self._ticket.destinations if d["kind"] not in ("console", "file", "live")]
        self.wait(lambda p: all(_memory(p, d["id"]).get("link") for d in wanted), timeout_s=timeout_s)
        self.tell_links()
        found = {}
        for destination in self._ticket.destinations:
            link = _memory(self.progress, destination["id"]).get("link")
            if link:
                name = destination["kind"] if destination["kind"] not in found else destination["id"]
                found[name] = str(link)
        return found

    def tell_links(self) -> None:
        """Log each destination's address of the run, once, when it is known."""
        for destination in self._ticket.destinations:
            link = _memory(self.progress, destination["id"]).get("link")
            if link and destination["id"] not in self._links_told:
                self._links_told.add(destination["id"])
                logger.info("run %s in %s: %s", self._ticket.run_id, destination["kind"], link)

    def backend_run_id(self, kind: str, timeout_s: float) -> str | None:
        """The run's id at the first destination of `kind`, None if it is not known within `timeout_s`."""
        found = [d["id"] for d in self._ticket.destinations if d["kind"] == kind]
        if not found:
            return None
        self.wait(lambda p: bool(_memory(p, found[0]).get("run_id")), timeout_s=timeout_s)
        run_id = _memory(self.progress, found[0]).get("run_id")
        return None if run_id is None else str(run_id)

    def stats(self) -> Stats:
        """Counts as of now; reads what the journals appended since the last look."""
        counts = self._writer.counts()
        there = self._look().destinations
        at = [there[d["id"]] for d in self._ticket.destinations if d["id"] in there]
        known = len(at) == len(self._ticket.destinations) and bool(at)
        shipped = self._writer.delivered_before + (min(d.delivered for d in at) if known else 0)
        refused_there = max((d.refused for d in at), default=0)
        return Stats(
            logged=counts.points,
            shipped=shipped,
            waiting=max(0, counts.points - shipped - refused_there),
            refused=counts.refused + refused_there,
        )

    def after_end(self, seen_by: str, timeout_s: float | None) -> None:
        """Wait as long as the promise of `stop` says after END was written, and tell what is left."""
        done = True
        if self._first:
            done = self._wait_after_end(seen_by, timeout_s)
        elif self._writer.writer_id is not None:
            self.serve()  # the run's own shipper may be gone
        if self._in_process is not None:
            # All of it has been waited for above, where a thread ships everything, or has been given up.
            self._in_process.stop(0.0 if not done else 1.0 if self._ticket.shipper == "thread" else 5.0)

    def _wait_after_end(self, seen_by: str, timeout_s: float | None) -> bool:
        ticket = self._ticket
        if not ticket.destinations or ticket.shipper == "off":
            return True
        if self._is_gone():
            logger.warning(
                "run %s: its folder was deleted, and there is no new one: nothing more of it is delivered, and its"
                " destinations don't hear of its end", ticket.run_id
            )  # fmt: skip
            return False
        self.serve()
        heads = self._writer.heads()
        provisional = seen_by in ("exit", "exit-code")

        def reached(progress: Progress) -> bool:
            if provisional:  # the rest comes after this process is gone
                return all(progress.reached(head) for head in heads)
            if not ticket.alone and all(progress.reached(head) for head in heads) and self._others_live():
                return True  # the end of the attempt is the last rank's to wait for
            return all(
                d["id"] in progress.destinations and ticket.attempt_key in progress.destinations[d["id"]].done
                for d in ticket.destinations
            )

        if self.outlived:
            done = self.wait(reached, timeout_s=OUTLIVED_WAIT_S if timeout_s is None else timeout_s)
            here = self._served_here()
            if here and not done and timeout_s is None:
                # These end with this program, whatever the shipper does: the rule of places where nothing outlives it.
                self.wait(lambda p: not self._unended(here) or reached(p), stalled_s=STALLED_S, at=here)
                done = reached(self.progress)
        elif seen_by == "signal":
            done = self.wait(reached, timeout_s=ticket.grace_s)
        else:
            done = self.wait(reached, timeout_s=timeout_s, stalled_s=STALLED_S)
        self.tell_links()
        if not done:
            self._tell_rest()
        return done

    def _is_gone(self) -> bool:
        try:
            os.stat(self._folder)
        except OSError as error:  # a disk that can't be read is not a folder that was deleted
            return isinstance(error, FileNotFoundError)
        return False

    def _served_here(self) -> list[str]:
        """The destinations (ids) that a thread of this very process serves beside the shipper."""
        return [d["id"] for d in self._ticket.destinations if d.get("in_process") and self._in_process is not None]

    def _unended(self, among: Collection[str]) -> list[str]:
        """Those of these destinations (ids) that don't have the end of this attempt."""
        there = self.progress.destinations
        return [name for name in among if name not in there or self._ticket.attempt_key not in there[name].done]

    def _others_live(self) -> bool:
        mine = self._writer.writer_ids()
        try:
            others = {path.stem for path in self._folder.glob("*.lock")} - {*mine, "manifest", "shipper"}
            return any(lease.is_alive(self._folder, writer) for writer in others)
        except OSError:  # not to be told: waiting for them would be in vain
            return False

    def _tell_rest(self) -> None:
        left = self._unended([d["id"] for d in self._ticket.destinations])
        served = self._served_here()
        here = [d for d in self._ticket.destinations if d["id"] in left and d["id"] in served]
        elsewhere = [d for d in self._ticket.destinations if d["id"] in left and d["id"] not in served]
        if here:
            logger.warning(
                "run %s: %s not delivered to %s, which ends with this program. It is safe in the spool (%s); start the"
                " run again with the same backend and run_id=%r, and it is delivered",
                self._ticket.run_id, self._waiting(here), _kinds(here), self._folder, self._ticket.run_id,
            )  # fmt: skip
        if not elsewhere:
            return
        if self.outlived and not self._is_shipped():
            logger.warning(
                "run %s: %s not delivered to %s, and no shipper is at work."
                " The data is safe in the spool; deliver it with: tracelet ship %s",
                self._ticket.run_id, self._waiting(elsewhere), _kinds(elsewhere), self._folder,
            )  # fmt: skip
        elif self.outlived:
            logger.warning(
                "run %s: %s still on the way to %s; the shipper goes on in the background."
                " If this machine goes down first: tracelet ship %s",
                self._ticket.run_id, self._waiting(elsewhere), _kinds(elsewhere), self._folder,
            )  # fmt: skip
        else:
            logger.warning(
                "run %s: %s not delivered to %s, and nothing outlives this process here (%s)."
                " The data is safe in the spool; deliver it with: tracelet ship %s",
                self._ticket.run_id, self._waiting(elsewhere), _kinds(elsewhere), self._cannot_outlive, self._folder,
            )  # fmt: skip

    def _is_shipped(self) -> bool:
        """Whether a shipper serves the folder, or is on its way to its lock."""
        if self._shipper is not None and not self._shipper.has_ended():
            return True
        try:
            return lease.shipper_alive(self._folder) is not None
        except OSError:
            return False

    def _waiting(self, destinations: Collection[Mapping[str, Any]]) -> str:
        """What the slowest of them lacks, in words."""
        there = self.progress.destinations
        at = [there[d["id"]] for d in destinations if d["id"] in there]
        settled = min((d.delivered + d.refused for d in at), default=0) if len(at) == len(destinations) else 0
        waiting = max(0, self._writer.counts().points - self._writer.delivered_before - settled)
        return f"{waiting:,} points" if waiting else "the end of the run"


def _kinds(destinations: Collection[Mapping[str, Any]]) -> str:
    return ", ".join(
        d["spec"]["exporter"].rpartition(".")[2] if d["kind"] == "live" else d["kind"] for d in destinations
    )


def _memory(progress: Progress, destination_id: str) -> Mapping[str, Any]:
    found = progress.destinations.get(destination_id)
    return found.memory if found is not None else {}
