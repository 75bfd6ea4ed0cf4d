"""One attempt as this process takes part in it: its beginning, its records, its end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tracelet import codec
from tracelet.collectors import environment
from tracelet.core import artifacts, claim, launchers, process, values
from tracelet.core.delivery import Delivery
from tracelet.core.process import Ending
from tracelet.core.ticket import Ticket
from tracelet.errors import RunClosed, SpoolError
from tracelet.guard import guard, logger
from tracelet.records import (
    ErrorInfo,
    FlushAsked,
    MetricNamed,
    ParamsLogged,
    Record,
    RunStarted,
    TagsSet,
    WriterEnded,
    WriterOpened,
)
from tracelet.settings import Settings
from tracelet.spool import store
from tracelet.spool.disk import is_refusal, refused, sync_file, sync_folder
from tracelet.spool.points import Log
from tracelet.spool.writer import Writer

__all__ = ["Run", "closed_error"]

_LOOK_AFTER_S = 5.0


class Run:
    """This process's part in one attempt. Made by `begin` (the first writer) or `join` (another process)."""

    def __init__(self, ticket: Ticket, role: str) -> None:
        self.ticket = ticket
        self.folder = Path(ticket.folder)
        self._role = role
        self.closed = False
        self._look_at = time.monotonic() + _LOOK_AFTER_S
        self.refused_records = 0  # params, tags, spans, artifacts for which there was no room
        self._copies: dict[str, None] = {}  # of artifacts, since the last flush
        self._copies_refused: SpoolError | None = None
        self._owed: list[Record] = []  # what the run begins with, as long as there was no room for it
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
            make=self._make_folder,
            passed=self._passed,
            aside=self.look_after,
        )
        self.left_out = 0  # of what the user logged in a rank that logs nothing
        # The pen's one closure itself, not a method around it: a call more would cost a third of the price.
        self.log: Log = self._leave_out_point if ticket.leaves_out else self.writer.log
        self.delivery = Delivery(ticket, self.writer, first=role == "first")

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
        launch = None
        if settings.ranks != "separate":
            launch = launchers.read(settings.environ, launchers.parentage)
        start = process.starts_of(settings.project, settings.experiment_name)
        place = claim.claim(settings, destinations=destinations, now=now, launch=launch, start=start)
        process.count_start(settings.project, settings.experiment_name)
        attempt = place.attempt
        ticket = Ticket(
            folder=str(place.folder),
            run_id=place.run_id,
            attempt_key=attempt.key,
            attempt_started_unix_nano=attempt.started_unix_nano,
            attempt_number=attempt.number,
            rank=place.rank,
            leaves_out=settings.ranks == "zero" and place.rank != 0,
            alone=launch is None,
            resource=environment.resource(
                project=settings.project,
                experiment_name=settings.experiment_name,
                run_id=place.run_id,
                run_name=settings.experiment_name,
                attempt_key=attempt.key,
                attempt_order=attempt.order,
                rank=place.rank,
                environ=settings.environ,
            ),
            destinations=destinations,
            shipper=settings.shipper,
            max_bytes=settings.max_bytes,
            keep=asdict(settings.keep),
            grace_s=settings.grace_s,
            environ=settings.environ,
            secrets=secrets,
        )
        run = cls(ticket, "first")
        run.writer.open()  # a rank that logs nothing has an end all the same
        if place.rank == 0:
            run._owe_start(settings, now, tags)
        run.delivery.serve()
        process.enter(run, drain_on_sigterm=not run.delivery.outlived and settings.shipper != "off")
        return run

    def _owe_start(self, settings: Settings, now: int, tags: Mapping[str, str]) -> None:
        """What rank 0 says first of an attempt."""
        facts = environment.take(settings.environ, settings.cwd, settings.argv)
        self._owed.append(
            RunStarted(
                time_unix_nano=now,
                run_name=settings.experiment_name,
                environment=facts.attributes,
                mlflow_tags=facts.mlflow_tags,
                traceparent=settings.environ.get("TRACEPARENT"),
            )
        )
        if tags:
            self._owed.append(TagsSet(now, dict(tags)))
        self._put_owed()

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

    # ---- what the user logs ---------------------------------------------------------------------------------------

    def log_many(self, metrics: Mapping[str, Any], iteration: int | None) -> None:
        """Log several metrics at one time; see `Writer.log_many`."""
        if not self._leaves_out("metrics"):
            self.writer.log_many(metrics, iteration)

    def log_record(self, record: ParamsLogged | TagsSet) -> None:
        """Write params or tags; see `put`."""
        if not self._leaves_out("params and tags"):
            self.put(record)

    def _leave_out_point(self, name: str, value: Any, iteration: int | None = None) -> None:
        self._leaves_out("metrics")

    def _leaves_out(self, what: str) -> bool:
        """Whether this rank logs nothing of the user's; then it is counted, and said once.

        Ranks of one launch mostly run the same code: to take all of it would be the same points eight times over.
        """
        if not self.ticket.leaves_out:
            return False
        if self.closed:
            raise self.closed_error()
        self.left_out += 1
        if self.left_out == 1:
            logger.warning(
                "rank %d of run %s logs %s, and they are left out, as all that is logged here: rank 0 logs for the"
                " run. ranks='all' (TRACELET_RANKS=all) takes every rank's, ranks='separate' makes each a run (said"
                " once)",
                self.ticket.rank, self.ticket.run_id, what,
            )  # fmt: skip
        return True

    # ---- records ------------------------------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        """Write one record that is not a metric value; with no room for it, that is counted and said.

        Raises:
            RunClosed: after `end`.
        """
        if self.closed:
            raise self.closed_error()
        self._put_owed()
        try:
            self._write(record)
        except SpoolError as error:
            # Training goes on whatever the disk does; the log line and the count are where it shows.
            self.refused_records += 1
            what = type(record).__name__
            guard.limited("write a record", "a record (%s) is lost, %d so far: %s", what, self.refused_records, error)
        self.look_after()

    def look_after(self) -> None:
        """See, every few seconds at most, that a shipper that was killed is replaced while training goes on.

        There is no thread for it: a program with threads may not fork as it likes. So it is done where a call takes
        long anyway, and at each new iteration. A program that does none of these is looked after at its end.
        """
        now = time.monotonic()
        if now < self._look_at or self.closed:
            return
        self._look_at = now + _LOOK_AFTER_S
        with guard("see to a shipper"):
            self.delivery.serve()

    def _write(self, record: Record) -> None:
        kind, payload = codec.encode(record)
        self.writer.frame(kind, payload, time.time_ns())

    def _put_owed(self) -> None:
        """Write what the run begins with; where there is no room now, that is said, and tried again with what follows.

        Without it the run would have neither name nor surroundings, however much room there is later.
        """
        while self._owed:
            try:
                record = self._owed.pop(0)
            except IndexError:  # another thread, or a signal's handler, was quicker
                return
            try:
                self._write(record)
            except SpoolError as error:
                self._owed.insert(0, record)
                what = type(record).__name__
                guard.limited("write the start of a run", "the run's first record (%s) has to wait: %s", what, error)
                return

    def take_artifact(self, source: str | os.PathLike[str], path: str | None, copy: bool | None) -> None:
        """Take an artifact's bytes and write its records; no room for the copy is counted and said.

        Raises:
            InvalidValue: nothing there, or a `path` that leads outside the run.
            RunClosed: after `end`.
        """
        if self._leaves_out("artifacts"):
            return
        limit = self.ticket.max_bytes
        room = None if limit is None else max(0, limit - store.usage(self.folder))
        try:
            taken = artifacts.take(source, path, self.folder, copy, room=room)
        except SpoolError as error:
            self.refused_records += 1
            guard.limited("take an artifact", "artifact %s is not recorded: %s", source, error)
            return
        for record in taken:
            if record.stored is not None:
                self._copies[record.stored] = None
            self.put(record)

    def _make_folder(self) -> None:
        """See that there is a folder to write in: a deleted one is made anew, as a run's folder, with a shipper.

        Raises:
            SpoolError: it was deleted, and this process is not the one that makes it anew.
            OSError: it can't be made.
        """
        if (self.folder / store.MANIFEST).exists():
            return
        if self._role != "first":  # the run's status would be this process's, as long as nobody else writes there
            raise SpoolError(
                f"the spool folder {self.folder} was deleted; what process {os.getpid()} logs is kept again once the"
                " run's own process has made it anew",
                folder=str(self.folder),
            )
        store.update_manifest(self.folder, lambda before: before or self.ticket.manifest())
        with guard("see to a shipper"):
            self.delivery.begin_anew()

    def _passed(self, writer: str) -> tuple[int, int]:
        return self.delivery.passed(writer)

    def _opening(self, role: str) -> tuple[int, bytes]:
        ticket = self.ticket
        if self._role != "first":
            with guard("see to a shipper"):
                self.delivery.serve()  # the run may have ended, and its shipper left; a new one finds what comes now
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

    def sieved(self, error: ErrorInfo) -> ErrorInfo:
        """`error` without secrets of the environment and the destinations.

        Its text and stack are mostly the words of others: of a driver that was given an address, a client that repeats
        its headers.
        """
        from tracelet.sieve import Sieve  # seldom needed, and 1 ms

        sieve = Sieve({**os.environ, **self.ticket.environ}, self.ticket.secrets.values())
        return ErrorInfo(error.type, sieve(error.message), sieve(error.stacktrace))

    def closed_error(self) -> RunClosed:
        """What a call on the stopped run raises."""
        return closed_error(self.ticket.run_id)

    def flush(self, timeout_s: float | None) -> bool:
        """Whether all that was logged before is delivered everywhere within `timeout_s`; it is on the disk in any case.

        The disk itself: what was flushed survives the loss of power too.

        Raises:
            SpoolError: it is not on the disk, and was not delivered in time either.
        """
        lost: SpoolError | None = None
        if not self.closed:
            self.put(FlushAsked(time.time_ns()))
            for sync in (self._sync_copies, self.writer.sync):
                try:
                    sync()
                except SpoolError as error:
                    lost = lost or error
                    guard.limited("flush", "%s", error)
        delivered = self.delivery.all_delivered(timeout_s)
        if lost is not None and not delivered:
            raise lost
        return delivered

    def _sync_copies(self) -> None:
        """Bring the copies of artifacts to the disk that came since the last time.

        Raises:
            SpoolError: it has not taken all of them, now or at an earlier call; it says so only once.
        """
        if self._copies_refused is not None:
            raise self._copies_refused
        stored = list(self._copies)
        try:
            for one in stored:
                with contextlib.suppress(FileNotFoundError):  # delivered
                    sync_file(self.folder / one)
            for folder in {os.path.dirname(one) for one in stored}:
                with contextlib.suppress(FileNotFoundError):
                    sync_folder(self.folder / folder)
        except OSError as error:
            failed = refused(self.folder, error)
            if is_refusal(error):
                self._copies_refused = failed
            raise failed from error
        for one in stored:
            self._copies.pop(one, None)

    # ---- end ----------------------------------------------------------------------------------------------------

    def end(self, ending: Ending, *, timeout_s: float | None = None) -> None:
        """Write END, let the shipper deliver as long as the promise of `stop` says, and tell what is left."""
        if self.closed:
            return
        self._put_owed()
        self.refused_records += len(self._owed)
        self.closed = True
        first = self._role == "first"
        record = WriterEnded(
            time_unix_nano=time.time_ns(),
            status=ending.status if first else None,
            seen_by=self._final(ending.seen_by),
            error=self.sieved(ending.error) if first and ending.error is not None else None,
            exit_code=ending.exit_code if first else None,
        )
        kind, payload = codec.encode(record)
        self.writer.end(kind, payload, record.time_unix_nano, brief=codec.encode(_brief(record))[1])
        process.leave(self)
        with guard("wait for the delivery"):
            self.delivery.after_end(record.seen_by, timeout_s)

    def _final(self, seen_by: str) -> str:
        """Where nothing outlives the program, nobody is left to ask the kernel how it ended: its own word stands."""
        return "exit-final" if seen_by in ("exit", "exit-code") and not self.delivery.outlived else seen_by

    # ---- what the process tells us ------------------------------------------------------------------------------

    def forked(self) -> None:
        """In a forked child: own files at the first record, no status, nobody to wait for."""
        self.writer.after_fork_in_child()
        self._role = "child"
        self._owed = []
        self._copies, self._copies_refused = {}, None
        self.refused_records = 0
        self.delivery = Delivery(self.ticket, self.writer, first=False)

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


def _brief(record: WriterEnded) -> WriterEnded:
    """The end for a disk that has no room for a long one: without the traceback."""
    error = record.error
    if error is None:
        return record
    return replace(record, error=ErrorInfo(error.type[:200], error.message[:1000], ""))


def _warn_no_iteration(name: str) -> None:
    logger.warning(
        "metric %r was logged again, and no iteration was ever given: all its values stand at iteration 0."
        " Pass iteration=, or call set_iteration() once a step",
        name,
    )
