"""Destinations served by a thread of the training process itself: what can't be in another process, like the console.

Such a destination dies with the process. Writers' lock files are never opened here: closing one would drop its lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracelet.exporters import registry
from tracelet.guard import guard
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.shipment import Build, Shipment
from tracelet.spool.lease import is_alive as is_writer_alive
from tracelet.spool.store import read_manifest

__all__ = ["Handle", "start"]


class Handle:
    """What was started; after a fork the child has no threads, and the handle is good for nothing."""

    def __init__(self, shipment: Shipment) -> None:
        self._shipment = shipment
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracelet in-process", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with guard("ship in this process"):
            self._shipment.run(follow=True, stop=self._stop)
            self._shipment.close()

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
) -> Handle:
    """Serve just these destinations of `folder` until the run's writers in this process have ended.

    Raises:
        SpoolError: the folder has no manifest this release can read.
    """
    manifest = read_manifest(folder)
    assert manifest is not None, "an attempt's manifest is written before anything serves it"

    def is_alive(writer: str) -> bool:
        opened = shipment.site.roster.opened.get(writer)
        mine = opened is None or opened.pid == os.getpid()
        return is_writer_alive(folder, writer, mine=(writer,) if mine else ())

    shipment = Shipment(
        folder,
        manifest,
        environ=environ,
        secrets=secrets,
        build=build,
        deaths=Deaths(folder, is_alive=is_alive),
        only=[str(destination["id"]) for destination in destinations],
        in_process=True,
    )
    return Handle(shipment)
