"""A spool folder to ship: a run's manifest, its writers, and a shipment over destinations in memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tracelet import codec, ids
from tracelet.core import values
from tracelet.errors import RunClosed
from tracelet.exporters.base import Exporter
from tracelet.records import MetricNamed, Record, RunStarted, WriterEnded, WriterOpened
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.shipment import Shipment
from tracelet.spool import store
from tracelet.spool.writer import Writer

START_NS = 1_760_000_000_000_000_000


def destination(name: str) -> dict[str, Any]:
    """A destination as a manifest has it."""
    return {"id": f"memory-{name}", "kind": "memory", "spec": {}}


def add_attempt(
    folder: Path, *names: str, run_id: str = "run", started: int | None = None, key: str | None = None
) -> store.Attempt:
    """Put an attempt with these destinations into the folder's manifest."""
    attempt = store.Attempt(
        key=key or ids.new_attempt_key(),
        started_unix_nano=time.time_ns() if started is None else started,
        pid=os.getpid(),
        rank=0,
        destinations=tuple(destination(name) for name in names),
    )
    fresh = store.Manifest(run_id, "project", "experiment", "a run")
    store.update_manifest(folder, lambda before: (before or fresh).with_attempt(attempt))
    return attempt


def open_writer(
    folder: Path, attempt: store.Attempt, role: str = "first", opened: WriterOpened | None = None, **options: Any
) -> Writer:
    """A writer of this process for the attempt; `opened` is what it says of itself, where that matters."""

    def opening(actual: str) -> tuple[int, bytes]:
        if opened is not None:
            return codec.encode(opened)
        instance = ids.instance_id("run", attempt.key, 0)
        resource = {"service.name": "project", "service.instance.id": instance, "tracelet.run.id": "run"}
        return codec.encode(
            WriterOpened(time.time_ns(), actual, os.getpid(), 0, attempt.key, attempt.started_unix_nano, resource)
        )

    return Writer(
        folder,
        role=role,
        opening=opening,
        name_frame=lambda metric_id, name: codec.encode(MetricNamed(metric_id, name)),
        check_name=values.check_name,
        to_float=values.to_float,
        to_iteration=values.to_iteration,
        closed=lambda: RunClosed("closed"),
        **options,
    )


def put(writer: Writer, record: Record) -> None:
    """Write one record."""
    writer.frame(*codec.encode(record), time.time_ns())


def start(writer: Writer) -> None:
    """What a run's first writer says first."""
    put(writer, RunStarted(time.time_ns(), "a run", {}, {}))


def end(writer: Writer, status: str | None = "FINISHED", seen_by: str = "stop", **facts: Any) -> None:
    """Write the writer's END."""
    now = time.time_ns()
    writer.end(*codec.encode(WriterEnded(now, status, seen_by, **facts)), now)


class Alive:
    """Who is alive, as a test says; a process can't look at its own writers' locks."""

    def __init__(self) -> None:
        self.dead: set[str] = set()

    def __call__(self, writer: str) -> bool:
        return writer not in self.dead


def shipment(
    folder: Path,
    exporters: Mapping[str, Exporter | Callable[[], Exporter]],
    alive: Callable[[str], bool] | None = None,
    **options: Any,
) -> Shipment:
    """A shipment of `folder` to these exporters, by the names their destinations have."""

    def build(known: Mapping[str, Any], secrets: object, environ: object) -> Exporter:
        made = exporters[str(known["id"]).removeprefix("memory-")]
        return made() if callable(made) else made

    manifest = store.read_manifest(folder)
    assert manifest is not None
    deaths = Deaths(folder, is_alive=Alive() if alive is None else alive, every_s=0.0)
    return Shipment(folder, manifest, environ={}, secrets={}, build=build, deaths=deaths, **options)


def ship(folder: Path, exporters: Mapping[str, Any], alive: Callable[[str], bool] | None = None, **options: Any) -> Any:
    """Ship until everything is delivered (within 20 s), and give the outcome."""
    made = shipment(folder, exporters, alive, **options)
    made.run(follow=True, stop=threading.Event(), timeout_s=20.0)
    outcome = made.close()
    return outcome


def until(done: Callable[[], Any], within_s: float = 20.0) -> Any:
    """The first true answer of `done`, asked again and again."""
    limit = time.monotonic() + within_s
    while True:
        answer = done()
        if answer:
            return answer
        assert time.monotonic() < limit, "waited in vain"
        threading.Event().wait(0.01)
