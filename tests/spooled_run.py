"""A run's folder with points of any time, written by the spool's own files: for runs of weeks ago."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

from tracelet import codec
from tracelet.records import MetricNamed, Scalar, WriterEnded, WriterOpened
from tracelet.spool import store
from tracelet.spool.files import FileSet

__all__ = ["write_run"]

Row = tuple[int, str, float, int]
"""Time (ns), name, value, iteration."""


def write_run(
    spool: Path, run_id: str, resource: Mapping[str, Scalar], rows: Iterable[Row], *, slots: int = 32768
) -> Path:
    """One rank's run that has ended, without a destination; its folder."""
    rows = iter(rows)
    first = next(rows)
    start = first[0]
    folder = store.make_folder(store.run_folder(spool, run_id))
    key = str(resource["tracelet.run.attempt"])
    attempt = store.Attempt(key, start, 1, 0)
    manifest = store.Manifest(run_id, "vision", "cnn", f"name of {run_id}", attempts=(attempt,))
    store.update_manifest(folder, lambda _: manifest)
    kind, payload = codec.encode(WriterOpened(start, "first", 1, 0, key, start, dict(resource)))
    files = FileSet(folder, (kind, payload, start), slots, False, lambda _: None)
    files.appear()
    last = start
    for time, name, value, iteration in chain([first], rows):
        number = files.id_of(name, lambda i, n: codec.encode(MetricNamed(i, n)), time)
        files.point(time, value, iteration, number)
        last = time
    kind, payload = codec.encode(WriterEnded(last, "FINISHED", "stop"))
    files.end(kind, payload, last)
    files.close()
    return folder
