"""Shipping by threads of the training process itself: the console, and all of it where no process may be started.

What is served here dies with the process. Its own writers' lock files, and the shipper's lock that it holds, are never
opened a second time: closing any descriptor of one would drop the lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tracelet.exporters import registry
from tracelet.guard import guard, logger
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.process import suppress_instrumentation
from tracelet.shipper.shipment import Build, Shipment
from tracelet.spool.lease import ShipperLock
from tracelet.spool.lease import is_alive as is_writer_alive
from tracelet.spool.store import Manifest, read_manifest

__all__ = ["Handle", "start", "start_all"]


class Handle:
    """What was started; after a fork the child has no threads, and the handle is good for nothing."""

    def __init__(self, shipment: Shipment, locks: Sequence[ShipperLock], *, whole: bool = False) -> None:
        """`whole`: it is the run's shipper, and so clears the folder away."""
        self._shipment = shipment
        self._locks = locks
        self._whole = whole
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracelet in-process", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # no memory, no process: whoever tries again must find the locks free
            shipment.close()
            self._release()
            raise

    def _run(self) -> None:
        try:
            with guard("ship in this process"):
                self._shipment.run(follow=True, stop=self._stop)
                if self._whole and self._shipment.is_complete():
                    self._shipment.tidy()
                self._shipment.close()
        finally:
            self._release()

    def _release(self) -> None:
        for lock in self._locks:
            lock.release()

    def stop(self, timeout_s: float) -> None:
        """Let it deliver what was logged, at most `timeout_s`; what is left then is left for good with the process."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._stop.set()
            self._shipment.wake()
            self._thread.join(1.0)


def start(
    folder: Path,
    destinations: Sequence[Mapping[str, Any]],
    secrets: Mapping[str, Mapping[str, Any]],
    environ: Mapping[str, str],
    *,
    build: Build = registry.build,
) -> Handle | None:
    """Serve just these destinations of `folder` until the run's writers in this process have ended.

    One that another process of the run serves already is left to it, and so is None where that is all of them: two
    would write one journal.

    Raises:
        SpoolError: the folder has no manifest this release can read.
    """
    manifest = read_manifest(folder)
    assert manifest is not None, "an attempt's manifest is written before anything serves it"
    locks, mine = [], []
    for destination in destinations:
        lock = ShipperLock(folder, f"served-{destination['id']}")
        if lock.acquire():
            locks.append(lock)
            mine.append(destination)
        else:
            logger.info("another process serves %s of run %s", destination["id"], manifest.run_id)
    if not mine:
        return None
    ids = [str(destination["id"]) for destination in mine]
    shipment = _shipment(folder, manifest, environ, secrets, build, only=ids, in_process=True)
    _get_ready(shipment, mine)
    return Handle(shipment, locks)


def start_all(
    folder: Path,
    secrets: Mapping[str, Mapping[str, Any]],
    environ: Mapping[str, str],
    *,
    build: Build = registry.build,
) -> Handle | None:
    """Serve every destination of `folder` as the shipper process would, until the run is over and delivered.

    Those of the program's own process (the console) are among them. None where another process has the shipper's lock:
    it ships what this one writes.

    Raises:
        SpoolError: the folder has no manifest this release can read, or belongs to another user.
    """
    manifest = read_manifest(folder)
    assert manifest is not None, "an attempt's manifest is written before anything serves it"
    lock = ShipperLock(folder)
    if not lock.acquire():
        logger.info("another process ships %s", folder)
        return None
    shipment = _shipment(folder, manifest, environ, secrets, build, with_in_process=True)
    _get_ready(shipment, manifest.destinations.values())
    return Handle(shipment, [lock], whole=True)


def _get_ready(shipment: Shipment, destinations: Iterable[Mapping[str, Any]]) -> None:
    """Load and start all there is: a short program may be over before its threads have begun, and then none can be."""
    with guard("load the exporters"):
        for destination in destinations:
            registry.preload(destination)
    shipment.tick()


def _shipment(
    folder: Path,
    manifest: Manifest,
    environ: Mapping[str, str],
    secrets: Mapping[str, Mapping[str, Any]],
    build: Build,
    **which: Any,
) -> Shipment:
    made = Shipment(
        folder,
        manifest,
        environ=environ,
        secrets=secrets,
        build=build,
        deaths=Deaths(folder, is_alive=lambda writer: _is_alive(made, writer)),
        suppress=suppress_instrumentation,
        **which,
    )
    return made


def _is_alive(shipment: Shipment, writer: str) -> bool:
    opened = shipment.site.roster.opened.get(writer)
    mine = opened is None or opened.pid == os.getpid()
    return is_writer_alive(shipment.site.folder, writer, mine=(writer,) if mine else ())
