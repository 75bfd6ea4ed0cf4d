"""Runs made by hand, with the spool's own writer and journal, for the commands to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracelet import codec
from tracelet.core import values
from tracelet.errors import RunClosed
from tracelet.records import FINISHED, MetricNamed, ParamsLogged, Record, TagsSet, WriterEnded, WriterOpened
from tracelet.spool import store
from tracelet.spool.cursor import Journal
from tracelet.spool.reader import START, SpoolReader
from tracelet.spool.writer import Writer

NOON = 1_772_366_400_000_000_000  # 2026-03-01 12:00:00 UTC
FILE = {"id": "file-00000001", "kind": "file", "spec": {"path": "/tmp/out.jsonl"}}
MLFLOW = {"id": "mlflow-00000001", "kind": "mlflow", "spec": {"tracking_uri": "http://mlflow.example:5000"}}


def make_run(
    spool: Path,
    run_id: str = "a" * 32,
    *,
    points: int = 3,
    name: str = "digits",
    destinations: Sequence[Mapping[str, Any]] = (FILE,),
    started: int = NOON,
    ended: str | None = FINISHED,
    decided: bool = False,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    records: Sequence[Record] = (),
    slots: int = 32768,
) -> Path:
    """A run with points of `loss`, its writer ended (`ended`) or simply gone (None)."""
    folder = store.run_folder(spool, run_id)
    attempt = store.Attempt(
        key="0123456789abcdef",
        started_unix_nano=started,
        pid=1,
        rank=0,
        destinations=tuple(destinations),
        ended={"status": ended, "end_unix_nano": started, "seen_by": "stop"} if decided and ended else None,
    )
    manifest = store.Manifest(run_id=run_id, project="examples", experiment_name=name, run_name=name)
    store.update_manifest(folder, lambda _: manifest.with_attempt(attempt))
    writer = Writer(
        folder,
        role="first",
        opening=lambda role: codec.encode(WriterOpened(started, role, 1, 0, attempt.key, started, {})),
        name_frame=lambda number, metric: codec.encode(MetricNamed(number, metric)),
        check_name=values.check_name,
        to_float=values.to_float,
        to_iteration=values.to_iteration,
        closed=lambda: RunClosed("closed"),
        slots_per_segment=slots,
        mapped=False,
    )
    if params:
        writer.frame(*codec.encode(ParamsLogged(started, params)), started)
    if tags:
        writer.frame(*codec.encode(TagsSet(started, tags)), started)
    for record in records:
        writer.frame(*codec.encode(record), started)
    for iteration in range(points):
        writer.log("loss", 1.0 / (iteration + 1) if iteration else math.nan, iteration)
    kind, payload = codec.encode(WriterEnded(started + 60_000_000_000, ended, "stop"))
    writer.end(kind, payload, started)
    return folder


def deliver(
    folder: Path,
    destination: str = FILE["id"],  # type: ignore[assignment]
    *,
    slots: int = 1 << 20,
    refused: int = 0,
    memory: Mapping[str, Any] | None = None,
    done: bool = True,
) -> None:
    """Write into a destination's journal that it has the first `slots` slots of each writer."""
    reader, journal = SpoolReader(folder), Journal(folder, destination)
    try:
        for writer in reader.writers():
            ranges, position = reader.poll(writer, START, slots, dead=True)
            points = sum(len(reader.read(piece).records) // 32 for piece in ranges)
            intent = journal.intend(ranges, {writer: position}, {}, {})
            journal.ack(intent, delivered=points - refused, refused=refused)
        if memory:
            journal.remember(memory)
        if done:
            journal.close_attempt("0123456789abcdef")
    finally:
        reader.close()
        journal.close()
