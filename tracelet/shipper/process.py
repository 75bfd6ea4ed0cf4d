"""The shipper process: takes a folder's lock, ships until there is nothing left, and leaves. Also `tracelet ship`.

The lines it logs go to standard error, which is `shipper.log` in the folder.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracelet.shipper.shipment import Build, Outcome
    from tracelet.spool.store import Manifest

__all__ = ["main", "ship"]

DRAIN_S = 25.0
"""After a SIGTERM, how long to go on delivering, as TRACELET_GRACE has it by default."""


def main(argv: Sequence[str], *, build: Build | None = None) -> int:
    """Ship the folder `argv[0]`: 0 when all is delivered or another shipper serves it, 1 when something is left.

    With `argv[1]` "orphan" that is done by a process whose parent is init: somebody kills the children of training.
    """
    parent = _hold_parent()  # first of all: a short run is over before the imports below are through
    if argv[1:] == ["orphan"]:
        _become_orphan()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for training; what it logged still has to leave
    folder = Path(argv[0])
    secrets = _read_secrets()
    _log_to_stderr(secrets)

    from tracelet.errors import TraceletError
    from tracelet.guard import logger
    from tracelet.spool.lease import ShipperLock

    lock = ShipperLock(folder)
    try:
        if not lock.acquire():
            logger.info("another shipper serves %s", folder)
            return 0
        return _serve(folder, lock, secrets, parent, build)
    except TraceletError as error:
        logger.error("%s", error)
        return 1
    finally:
        lock.release()


def _become_orphan() -> None:
    """Go on in a child, and end: who looks for the children of training finds none.

    The session stays, and with it what `setsid` was for. Until the child has the folder's lock nobody but training
    itself knows of it, which may then start another shipper: that one sees the lock, and leaves.
    """
    if os.fork():
        os._exit(0)


def _serve(folder: Path, lock: Any, secrets: Mapping[str, Any], parent: tuple[int, int] | None, build: Any) -> int:
    from tracelet.exporters import registry
    from tracelet.guard import logger
    from tracelet.shipper.deaths import Deaths
    from tracelet.shipper.shipment import Shipment
    from tracelet.spool.store import read_manifest

    manifest = read_manifest(folder)
    if manifest is None:
        logger.error("%s has no manifest: nothing says where its data goes", folder)
        return 1
    logger.info(
        "pid %d ships run %s to %s", os.getpid(), manifest.run_id, ", ".join(manifest.destinations) or "nowhere"
    )

    def begun(manifest: Manifest) -> Shipment:
        return Shipment(
            folder,
            manifest,
            environ=os.environ,
            secrets=secrets,
            build=registry.build if build is None else build,
            deaths=Deaths(folder, parent=parent),
            suppress=suppress_instrumentation,
        )

    def wake() -> None:
        shipment.wake()  # the one of now

    shipment = begun(manifest)
    term = _on_sigterm(wake)
    while True:
        shipment.run(follow=True, stop=term)
        if term.is_set():
            again = _on_sigterm(wake)
            logger.info("SIGTERM: delivers what is there, for %.0f s at most; once more ends it at once", _grace_s())
            shipment.run(follow=True, stop=again, timeout_s=_grace_s(), hurry=True)
            break
        if not shipment.is_complete():
            break
        # A second rank, or the run again, may have found this lock taken and left its data to us: once the lock is
        # free nobody can make that mistake any more, so what came before is seen by this look.
        shipment.tidy()
        lock.release()
        if not shipment.site.has_news() or not lock.acquire():
            break
        # Another shipper may have held the lock meanwhile, and gone. What these lanes remember of their journals would
        # then be old: they would send once more what that one has delivered, and write over its lines.
        manifest = read_manifest(folder)
        if manifest is None:
            break
        before, shipment = shipment, begun(manifest)
        before.close()
    outcome = shipment.close()
    _report(folder, outcome)
    return 0 if outcome.complete else 1


def ship(
    folder: Path,
    *,
    destinations: Sequence[Mapping[str, Any]] | None = None,
    secrets: Mapping[str, Mapping[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
    follow: bool = False,
    assume_dead: bool = False,
    timeout_s: float | None = None,
    give_up_s: float | None = None,
    stop: threading.Event | None = None,
    build: Build | None = None,
    again: bool = False,
) -> Outcome:
    """Ship a run's folder in this process, with its caller's credentials.

    Returns when all that is there is delivered; with `follow`, when the run is over and delivered too; and in any
    case when `timeout_s` is over or `stop` is set (looked at several times a second), or, with `follow`, when nothing
    has moved for `give_up_s` (None: ten minutes) after the run's end. `destinations` are for attempts that name none;
    None leaves those undelivered. A folder that another shipper serves is left to it (`joined`).

    The folder may be another host's: its writers then count as alive until the lease of that host's shipper has been
    missed three times, or with `assume_dead`, for a caller who knows that they are gone.

    `again`: what was refused before is sent once more, too.

    Raises:
        SpoolError: the folder has no manifest, or one this release can't read.
    """
    from tracelet.exporters import registry
    from tracelet.shipper.deaths import Deaths
    from tracelet.shipper.elsewhere import watched
    from tracelet.shipper.shipment import GIVE_UP_S, Outcome, Shipment
    from tracelet.spool.lease import ShipperLock

    lock = ShipperLock(folder)
    if not lock.acquire():
        return Outcome(complete=False, joined=True)
    try:
        manifest = _manifest_for(folder, destinations or ())
        there = watched(folder, manifest, assume_dead=assume_dead)
        shipment = Shipment(
            folder,
            manifest,
            environ=os.environ if environ is None else environ,
            secrets=secrets or {},
            build=registry.build if build is None else build,
            deaths=Deaths(folder, is_alive=None if there is None else there.is_alive, from_elsewhere=there is not None),
            silent=None if there is None else there.is_silent,
            suppress=suppress_instrumentation,
            give_up_s=GIVE_UP_S if give_up_s is None else give_up_s,
            again=again,
        )
        shipment.run(
            follow=follow,
            stop=threading.Event() if stop is None else stop,
            timeout_s=timeout_s,
            hurry=not follow,
        )
        if shipment.is_complete():
            shipment.tidy()
        return shipment.close()
    finally:
        lock.release()


def _manifest_for(folder: Path, destinations: Sequence[Mapping[str, Any]]) -> Any:
    """The folder's manifest, in which attempts without a destination are given `destinations`."""
    import dataclasses

    from tracelet.errors import SpoolError
    from tracelet.spool.store import read_manifest, update_manifest

    def give(manifest: Manifest | None) -> Manifest:
        if manifest is None:
            raise SpoolError(f"{folder} has no manifest, so it is not a run's folder", folder=str(folder))
        given = [
            attempt if attempt.destinations else dataclasses.replace(attempt, destinations=tuple(destinations))
            for attempt in manifest.attempts
        ]
        return dataclasses.replace(manifest, attempts=tuple(given))

    if not destinations:
        return give(read_manifest(folder))
    return update_manifest(folder, give, make=False)  # written down, so that every later shipper and reader knows


# ---- the process's surroundings -------------------------------------------------------------------------------------


def _hold_parent() -> tuple[int, int] | None:
    """A pidfd of the process that started this one, and its pid; None where it is gone or can't be had."""
    pid = os.getppid()
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None
    if os.getppid() != pid:  # gone before the pidfd: the number may be another's
        os.close(pidfd)
        return None
    return pidfd, pid


def _read_secrets() -> dict[str, Any]:
    """The one line on standard input, if that is a pipe; never logged."""
    try:
        if not stat.S_ISFIFO(os.fstat(0).st_mode):
            return {}
        line = sys.stdin.readline()
        found = json.loads(line) if line.strip() else {}
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _log_to_stderr(secrets: Mapping[str, Any]) -> None:
    """Log to `shipper.log`, all of it through the sieve: tracebacks and other libraries' lines are words of others."""
    from tracelet.sieve import Sieve, SievedLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SievedLines(Sieve(os.environ, secrets.values())))
    log = logging.getLogger("tracelet")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger().addHandler(handler)  # in place of the last resort, which prints warnings as they are
    logging.captureWarnings(True)

    def uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        log.critical("the shipper ends of a fault", exc_info=(kind, error or kind(), trace))

    def uncaught_in_thread(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_type is not SystemExit:
            uncaught(ended.exc_type, ended.exc_value, ended.exc_traceback)

    sys.excepthook, threading.excepthook = uncaught, uncaught_in_thread


def _on_sigterm(wake: Any) -> threading.Event:
    event = threading.Event()

    def stop(number: int, frame: object) -> None:
        event.set()
        wake()

    signal.signal(signal.SIGTERM, stop)
    return event


def _grace_s() -> float:
    from tracelet.errors import ConfigError
    from tracelet.settings import parse_duration

    try:
        return parse_duration(os.environ.get("TRACELET_GRACE") or DRAIN_S)
    except ConfigError:  # training said so already
        return DRAIN_S


@contextmanager
def suppress_instrumentation() -> Iterator[None]:
    """Keep OpenTelemetry's instrumentations of HTTP and database clients from tracing what the exporters send."""
    from opentelemetry import context

    # The instrumentations look for this key; it is drawn at import, and its constant is private: without it, an older
    # name, which does no harm.
    key = getattr(context, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
    token = context.attach(context.set_value(key, True))
    try:
        yield
    finally:
        context.detach(token)


def _report(folder: Path, outcome: Outcome) -> None:
    from tracelet.guard import logger

    if outcome.gone:
        logger.error(
            "%s was deleted while its run was being shipped: what had not been delivered by then is lost", folder
        )
    for identity, delivered in outcome.delivered.items():
        refused = outcome.refused[identity]
        logger.info("%s: %d points delivered%s", identity, delivered, f", {refused} things refused" if refused else "")
    if outcome.gone:
        return
    for identity, reason in outcome.reasons.items():
        logger.warning(
            "%s: about %d records are left (%s). They are safe in the spool; deliver them with: tracelet ship %s",
            identity,
            outcome.left.get(identity, 0),
            reason,
            folder,
        )
