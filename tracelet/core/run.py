"""One attempt as this process takes part in it: its folder, its pen, its shipper, and how far delivery has come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tracelet import codec, ids, launch
from tracelet.collectors import environment
from tracelet.core import artifacts, process, values
from tracelet.core.process import Ending
from tracelet.errors import RunClosed, SpoolError
from tracelet.guard import guard, logger
from tracelet.records import (
    FlushAsked,
    MetricNamed,
    Record,
    RunStarted,
    Scalar,
    TagsSet,
    WriterEnded,
    WriterOpened,
)
from tracelet.settings import Settings
from tracelet.spool import lease, store
from tracelet.spool.cursor import Progress
from tracelet.spool.writer import Writer

__all__ = ["Run", "Stats", "Ticket", "closed_error"]

POLL_S = 0.02  # how often a waiting caller looks at the journals
OUTLIVED_WAIT_S = 2.0  # stop() and exit, where the shipper goes on by itself
STALLED_S = 30.0  # and where it can't: give up after this long without progress


@dataclass(frozen=True, slots=True)
class Stats:
    """How many points this process logged, and how far they have come.

    `logged`: by this process; `shipped`: delivered to the slowest destination, for the whole run on this host;
    `waiting`: logged and not yet shipped; `refused`: by the spool (no room) or, for good, by a destination.
    """

    logged: int
    shipped: int
    waiting: int
    refused: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """All that another process needs to write into the same attempt; what a pickled experiment carries."""

    folder: str
    run_id: str
    attempt_key: str
    attempt_started_unix_nano: int
    rank: int
    resource: Mapping[str, Scalar]
    destinations: tuple[Mapping[str, Any], ...]
    shipper: str
    max_bytes: int | None
    grace_s: float
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)  # as it was at the start
    secrets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    secrets_left_out: bool = False

    def without_secrets(self) -> Ticket:
        """The same, fit to be pickled: the process that unpickles it has an environment of its own."""
        left_out = self.secrets_left_out or bool(self.secrets)
        return replace(self, secrets={}, environ={}, secrets_left_out=left_out)


class Run:
    """This process's part in one attempt. Made by `begin` (the first writer) or `join` (another process)."""

    def __init__(self, ticket: Ticket, role: str) -> None:
        self.ticket = ticket
        self.folder = Path(ticket.folder)
        self._role = role
        self.closed = False
        self.refused_records = 0  # params, tags, spans, artifacts for which there was no room
        self._cannot_outlive = launch.can_outlive(ticket.environ or os.environ)
        self._progress: Progress | None = None
        self._in_process: Any = None
        self._shipper: launch.ShipperProcess | None = None
        self._links_told: set[str] = set()
        self.writer = Writer(
            self.folder,
            role=role,
            opening=self._opening,
            name_frame=_name_frame,
            check_name=values.check_name,
            to_float=values.to_float,
            to_iteration=values.to_iteration,
            closed=self.closed_error,
            max_bytes=ticket.max_bytes,
            repeated_without_iteration=_warn_no_iteration,
        )

    # ---- begin and join -----------------------------------------------------------------------------------------

    @classmethod
    def begin(
        cls,
        settings: Settings,
        *,
        destinations: tuple[Mapping[str, Any], ...],
        secrets: Mapping[str, Mapping[str, Any]],
        tags: Mapping[str, str],
    ) -> Run:
        """Start an attempt: write the manifest and the first records, and see that a shipper serves the folder.

        Raises:
            SpoolError: the folder can't be made or written, or is of an unknown format.
        """
        now = time.time_ns()
        run_id = ids.new_run_id() if settings.run_id is None else ids.valid_run_id(settings.run_id)
        attempt_key = ids.new_attempt_key()
        rank = 0
        resource = environment.resource(
            project=settings.project,
            experiment_name=settings.experiment_name,
            run_id=run_id,
            run_name=settings.experiment_name,
            attempt_key=attempt_key,
            rank=rank,
            environ=settings.environ,
        )
        folder = store.run_folder(settings.dir, run_id)
        ticket = Ticket(
            folder=str(folder),
            run_id=run_id,
            attempt_key=attempt_key,
            attempt_started_unix_nano=now,
            rank=rank,
            resource=resource,
            destinations=destinations,
            shipper=settings.shipper,
            max_bytes=settings.max_bytes,
            grace_s=settings.grace_s,
            environ=settings.environ,
            secrets=secrets,
        )
        attempt = store.Attempt(
            key=attempt_key,
            started_unix_nano=now,
            pid=os.getpid(),
            rank=rank,
            destinations=destinations,
            shipper=settings.shipper,
            extra={"keep": asdict(settings.keep)},
        )
        fresh = store.Manifest(run_id, settings.project, settings.experiment_name, settings.experiment_name)
        store.update_manifest(folder, lambda before: (before or fresh).with_attempt(attempt))
        run = cls(ticket, "first")
        facts = environment.take(settings.environ, settings.cwd, settings.argv)
        run.put(
            RunStarted(
                time_unix_nano=now,
                run_name=settings.experiment_name,
                environment=facts.attributes,
                mlflow_tags=facts.mlflow_tags,
                traceparent=settings.environ.get("TRACEPARENT"),
            )
        )
        if tags:
            run.put(TagsSet(now, dict(tags)))
        run._serve()
        process.enter(run, drain_on_sigterm=not run.outlived and settings.shipper != "off")
        return run

    @classmethod
    def join(cls, ticket: Ticket) -> Run:
        """Take part in an attempt another process began: records go into files of this process's own.

        Raises:
            SpoolError: the run began on another host, or its folder is gone.
        """
        folder = Path(ticket.folder)
        why = None
        if folder != store.run_folder(folder.parent.parent, ticket.run_id):
            why = f"began on another host or before a restart of this one ({folder.name})"
        elif store.read_manifest(folder) is None:
            why = f"has no folder any more ({folder})"
        if why is not None:
            raise SpoolError(
                f"run {ticket.run_id} {why}, so this process can't write into it; to add to the run, start it here"
                f" with run_id={ticket.run_id!r}",
                run_id=ticket.run_id,
                folder=ticket.folder,
            )
        run = cls(ticket, "child")
        process.enter(run, drain_on_sigterm=False)
        return run

    # ---- records ------------------------------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        """Write one record that is not a metric value; with no room for it, that is counted and said.

        Raises:
            RunClosed: after `end`.
        """
        if self.closed:
            raise self.closed_error()
        kind, payload = codec.encode(record)
        try:
            self.writer.frame(kind, payload, time.time_ns())
        except SpoolError as error:
            # Training goes on whatever the disk does; the log line and the count are where it shows.
            self.refused_records += 1
            what = type(record).__name__
            guard.limited("write a record", "a record (%s) is lost, %d so far: %s", what, self.refused_records, error)

    def take_artifact(self, source: str | os.PathLike[str], path: str | None, copy: bool | None) -> None:
        """Take an artifact's bytes and write its records; no room for the copy is counted and said.

        Raises:
            InvalidValue: nothing there, or a `path` that leads outside the run.
            RunClosed: after `end`.
        """
        limit = self.ticket.max_bytes
        room = None if limit is None else max(0, limit - store.usage(self.folder))
        try:
            taken = artifacts.take(source, path, self.folder, copy, room=room)
        except SpoolError as error:
            self.refused_records += 1
            guard.limited("take an artifact", "artifact %s is not recorded: %s", source, error)
            return
        for record in taken:
            self.put(record)

    def _opening(self, role: str) -> tuple[int, bytes]:
        ticket = self.ticket
        if self._role != "first":
            with guard("see to a shipper"):
                self._serve()  # the run may have ended, and its shipper left; a new one finds what comes now
        return codec.encode(
            WriterOpened(
                time_unix_nano=time.time_ns(),
                role=role,
                pid=os.getpid(),
                rank=ticket.rank,
                attempt_key=ticket.attempt_key,
                attempt_started_unix_nano=ticket.attempt_started_unix_nano,
                resource=ticket.resource,
            )
        )

    def closed_error(self) -> RunClosed:
        """What a call on the stopped run raises."""
        return closed_error(self.ticket.run_id)

    # ---- delivery -----------------------------------------------------------------------------------------------

    @property
    def outlived(self) -> bool:
        """Whether the shipper goes on after this process is gone."""
        return self._cannot_outlive is None

    @property
    def progress(self) -> Progress:
        """How far each destination is; as of the last `refresh()`."""
        if self._progress is None:
            self._progress = Progress(self.folder)
        return self._progress

    def _serve(self) -> None:
        """See that something ships this folder: the shipper process, and for the console a thread of the first one."""
        ticket = self.ticket
        if ticket.shipper != "process":
            return
        here = [d for d in ticket.destinations if d.get("in_process")]
        if here and self._in_process is None and self._role == "first":
            module = import_module("tracelet.shipper.inprocess")
            self._in_process = module.start(self.folder, here, ticket.secrets, ticket.environ)
        if len(here) == len(ticket.destinations) or lease.shipper_alive(self.folder) is not None:
            return
        if self._shipper is not None and not self._shipper.has_ended():
            return  # on its way to the lock
        if ticket.secrets_left_out:
            guard.limited(
                "start the shipper",
                "run %s: no shipper serves it, and this process can't start one: its credentials were given as"
                " arguments, and don't travel. What is logged here waits in the spool: tracelet ship %s",
                ticket.run_id,
                self.folder,
            )
            return
        try:
            self._shipper = launch.start_shipper(self.folder, ticket.secrets, environ=ticket.environ or os.environ)
        except OSError as error:
            guard.limited(
                "start the shipper",
                "no shipper process could be started (%s); the data waits in the spool: tracelet ship %s",
                error,
                self.folder,
            )

    def wait(
        self,
        reached: Callable[[Progress], bool],
        *,
        timeout_s: float | None = None,
        stalled_s: float | None = None,
    ) -> bool:
        """Wait until `reached`, at most `timeout_s`, and at most `stalled_s` without any progress; whether it was."""
        started = moved = time.monotonic()
        looked_after = started
        before: object = None
        while True:
            progress = self.progress
            progress.refresh()
            if reached(progress):
                return True
            now = time.monotonic()
            state = [(dict(d.positions), d.refused, dict(d.done)) for d in progress.destinations.values()]
            if state != before:
                before, moved = state, now
            if timeout_s is not None and now - started >= timeout_s:
                return False
            if stalled_s is not None and now - moved >= stalled_s:
                return False
            if now - looked_after > 1.0:
                looked_after = now
                self._serve()  # a shipper that was killed is replaced
            time.sleep(POLL_S)

    def flush(self, timeout_s: float | None) -> bool:
        """Whether all that was logged before is delivered to every destination, within `timeout_s`."""
        if not self.ticket.destinations:
            return False
        if not self.closed:
            self.put(FlushAsked(time.time_ns()))
        heads = self.writer.heads()
        done = self.wait(lambda p: all(p.reached(head) for head in heads), timeout_s=timeout_s)
        self.tell_links()
        return done

    def links(self, timeout_s: float) -> dict[str, str]:
        """Each destination's address of the run, by the destination's kind, as far as known within `timeout_s`."""
        wanted = [d for d in self.ticket.destinations if d["kind"] not in ("console", "file")]
        self.wait(lambda p: all(_memory(p, d["id"]).get("link") for d in wanted), timeout_s=timeout_s)
        self.tell_links()
        found = {}
        for destination in self.ticket.destinations:
            link = _memory(self.progress, destination["id"]).get("link")
            if link:
                name = destination["kind"] if destination["kind"] not in found else destination["id"]
                found[name] = str(link)
        return found

    def tell_links(self) -> None:
        """Log each destination's address of the run, once, when it is known."""
        for destination in self.ticket.destinations:
            link = _memory(self.progress, destination["id"]).get("link")
            if link and destination["id"] not in self._links_told:
                self._links_told.add(destination["id"])
                logger.info("run %s in %s: %s", self.ticket.run_id, destination["kind"], link)

    def backend_run_id(self, kind: str, timeout_s: float) -> str | None:
        """The run's id at the first destination of `kind`, None if it is not known within `timeout_s`."""
        found = [d["id"] for d in self.ticket.destinations if d["kind"] == kind]
        if not found:
            return None
        self.wait(lambda p: bool(_memory(p, found[0]).get("run_id")), timeout_s=timeout_s)
        run_id = _memory(self.progress, found[0]).get("run_id")
        return None if run_id is None else str(run_id)

    def stats(self) -> Stats:
        """Counts as of now; reads what the journals appended since the last look."""
        counts = self.writer.counts()
        self.progress.refresh()
        at = [
            self.progress.destinations[d["id"]]
            for d in self.ticket.destinations
            if d["id"] in self.progress.destinations
        ]
        known = len(at) == len(self.ticket.destinations) and bool(at)
        shipped = min(d.delivered for d in at) if known else 0
        refused_there = max((d.refused for d in at), default=0)
        return Stats(
            logged=counts.points,
            shipped=shipped,
            waiting=max(0, counts.points - shipped - refused_there),
            refused=counts.refused + refused_there,
        )

    # ---- end ----------------------------------------------------------------------------------------------------

    def end(self, ending: Ending, *, timeout_s: float | None = None) -> None:
        """Write END, let the shipper deliver as long as the promise of `stop` says, and tell what is left."""
        if self.closed:
            return
        self.closed = True
        first = self._role == "first"
        record = WriterEnded(
            time_unix_nano=time.time_ns(),
            status=ending.status if first else None,
            seen_by=ending.seen_by if self.outlived or ending.seen_by != "exit" else "exit-final",
            error=ending.error if first else None,
            exit_code=ending.exit_code if first else None,
        )
        kind, payload = codec.encode(record)
        self.writer.end(kind, payload, record.time_unix_nano)
        process.leave(self)
        if first:
            self._wait_after_end(record.seen_by, timeout_s)
        elif self.writer.writer_id is not None:
            self._serve()  # the run's own shipper may be gone
        if self._in_process is not None:
            self._in_process.stop(5.0)

    def _wait_after_end(self, seen_by: str, timeout_s: float | None) -> None:
        ticket = self.ticket
        if not ticket.destinations or ticket.shipper != "process":
            return
        self._serve()
        heads = self.writer.heads()
        provisional = seen_by in ("exit", "exit-code")

        def reached(progress: Progress) -> bool:
            if provisional:  # the rest comes after this process is gone
                return all(progress.reached(head) for head in heads)
            return all(
                d["id"] in progress.destinations and ticket.attempt_key in progress.destinations[d["id"]].done
                for d in ticket.destinations
            )

        if self.outlived:
            done = self.wait(reached, timeout_s=OUTLIVED_WAIT_S if timeout_s is None else timeout_s)
        elif seen_by == "signal":
            done = self.wait(reached, timeout_s=ticket.grace_s)
        else:
            done = self.wait(reached, timeout_s=timeout_s, stalled_s=STALLED_S)
        self.tell_links()
        if not done:
            self._tell_rest()

    def _tell_rest(self) -> None:
        waiting = self.stats().waiting
        what = f"{waiting:,} points" if waiting else "the end of the run"
        where = ", ".join(d["kind"] for d in self.ticket.destinations)
        if self.outlived:
            logger.warning(
                "run %s: %s still on the way to %s; the shipper goes on in the background."
                " If this machine goes down first: tracelet ship %s",
                self.ticket.run_id, what, where, self.folder,
            )  # fmt: skip
        else:
            logger.warning(
                "run %s: %s not delivered to %s, and nothing outlives this process here (%s)."
                " The data is safe in the spool; deliver it with: tracelet ship %s",
                self.ticket.run_id, what, where, self._cannot_outlive, self.folder,
            )  # fmt: skip

    # ---- what the process tells us ------------------------------------------------------------------------------

    def forked(self) -> None:
        """In a forked child: own files at the first record, no status, nobody to wait for."""
        self.writer.after_fork_in_child()
        self._role = "child"
        self._progress = None
        self._in_process = None
        self._shipper = None

    def process_ends(self, ending: Ending) -> None:
        """The program is over without `stop()`."""
        self.end(ending)


def closed_error(run_id: str) -> RunClosed:
    """What a call on a stopped run raises."""
    return RunClosed(
        f"run {run_id} has been stopped; to add to it, start it again with run_id={run_id!r}", run_id=run_id
    )


def _name_frame(metric_id: int, name: str) -> tuple[int, bytes]:
    return codec.encode(MetricNamed(metric_id, name))


def _warn_no_iteration(name: str) -> None:
    logger.warning(
        "metric %r was logged again, and no iteration was ever given: all its values stand at iteration 0."
        " Pass iteration=, or call set_iteration() once a step",
        name,
    )


def _memory(progress: Progress, destination_id: str) -> Mapping[str, Any]:
    found = progress.destinations.get(destination_id)
    return found.memory if found is not None else {}
