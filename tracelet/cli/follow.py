"""`tracelet ship --follow`: ships a folder's runs, those to come too, until SIGTERM; the sidecar beside training."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tracelet.cli.find import chosen
from tracelet.settings import Settings
from tracelet.shipper.follow import Follower, Served
from tracelet.sieve import Sieve, SievedLines
from tracelet.spool.store import RunFolder

__all__ = ["run"]


def run(resolved: Settings, wanted: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C, or until the runs that are named are over; 0 if nothing is left."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sieve = Sieve(resolved.environ)
    _log_to_stderr(sieve)
    # A name may stand for several folders, and its next start makes one more.
    find = (lambda: _named(resolved.dir, wanted)) if wanted else None
    follower = Follower(resolved.dir, find=find, environ=resolved.environ, on_change=lambda one: _tell(one, sieve))
    if wanted:
        chosen(resolved.dir, wanted)  # one that isn't there is said at once
        print(f"follows {', '.join(wanted)} until it is over and delivered", flush=True)
    else:
        print(f"follows the runs in {resolved.dir} until SIGTERM", flush=True)
    follower.run(stop, until_over=bool(wanted))
    if stop.is_set():
        print(f"stops: delivers what is there, for {resolved.grace_s:.0f} s at most", flush=True)
    through = follower.drain(resolved.grace_s)
    if not through:
        print(f"Something is left. It is safe in {resolved.dir}: deliver it with `tracelet ship`.", flush=True)
    return 0 if through else 1


def _named(spool: Path, wanted: Sequence[str]) -> Iterator[RunFolder]:
    yield from chosen(spool, wanted)


def _tell(one: Served, sieve: Sieve) -> None:
    if one.outcome is None:
        print(f"{one.run_id}: ships it", flush=True)
    elif one.outcome.complete:
        arrived = ", ".join(f"{points:,} to {name}" for name, points in one.outcome.delivered.items())
        print(f"{one.run_id}: over, and delivered: {arrived or 'it has no destination'}", flush=True)
    elif not one.outcome.joined:
        why = "; ".join(f"{name}: {reason}" for name, reason in one.outcome.reasons.items())
        print(sieve(f"{one.run_id}: not all of it is delivered ({why})"), flush=True)


def _log_to_stderr(sieve: Sieve) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SievedLines(sieve))
    log = logging.getLogger("tracelet")
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    log.propagate = False
