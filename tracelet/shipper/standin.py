"""An opening for a writer whose own can't be read, so that its points still find their way."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from tracelet import ids
from tracelet.otlp import semconv
from tracelet.records import WriterOpened
from tracelet.shipper.roster import Roster
from tracelet.spool.lease import lock_name
from tracelet.spool.store import Attempt, Manifest

__all__ = ["stand_in"]


def stand_in(folder: Path, manifest: Manifest, roster: Roster, writer: str) -> WriterOpened | None:
    """What `writer` would have said of itself, from another writer's opening or from the manifest; None: no attempt.

    The same at each restart: the attempt is the one that was the newest when the writer's lock appeared.
    """
    appeared = os.stat(folder / lock_name(writer)).st_ctime_ns
    attempts = sorted(manifest.attempts, key=lambda one: one.started_unix_nano)
    before = [one for one in attempts if one.started_unix_nano <= appeared] or attempts[:1]
    if not before:
        return None
    attempt = before[-1]
    mine = [roster.opened[other] for other in roster.writers_of(attempt.key)]
    if mine:
        has_first = any(opened.role == "first" for opened in mine)
        return dataclasses.replace(mine[0], role="child" if has_first else "first")
    return _from_manifest(manifest, attempt)


def _from_manifest(manifest: Manifest, attempt: Attempt) -> WriterOpened:
    """The least that the wire contract asks for; what the environment had added is lost with the frame."""
    return WriterOpened(
        time_unix_nano=attempt.started_unix_nano,
        role="first",
        pid=attempt.pid,
        rank=attempt.rank,
        attempt_key=attempt.key,
        attempt_started_unix_nano=attempt.started_unix_nano,
        resource={
            "service.name": manifest.project,
            "service.namespace": "tracelet",
            semconv.SERVICE_INSTANCE_ID: ids.instance_id(manifest.run_id, attempt.key, attempt.rank),
            semconv.PROJECT: manifest.project,
            semconv.EXPERIMENT_NAME: manifest.experiment_name,
            semconv.RUN_ID: manifest.run_id,
            semconv.RUN_NAME: manifest.run_name,
            semconv.RUN_ATTEMPT: attempt.key,
            semconv.ATTEMPT_ORDER: attempt.order,
            semconv.RANK: attempt.rank,
            semconv.RESOURCE_WIRE_VERSION: semconv.WIRE_VERSION,
            semconv.HOST_NAME: manifest.host,
        },
    )
