"""What has been stored before: a digest of each arrival's content, in memory and in a file of the run.

A sender that heard no answer sends again, and a collector may hold a request for days. The same content is then
acknowledged and not stored again, in whatever order requests come. What falls through (a death between the records and
their digest, more arrivals than are remembered) is stored twice, which has no effect in MLflow but its price.
"""

from __future__ import annotations

import os
from collections import deque
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from tracelet import codec
from tracelet.spool.store import write_whole

if TYPE_CHECKING:
    from tracelet.otlp.arrival import Arrival

__all__ = ["FILE", "REMEMBERED", "Repeats", "digest_of"]

FILE = "arrivals.digests"
REMEMBERED = 20_000
"""Arrivals of a run: at one request a second more than five hours."""
_SIZE = 16


def digest_of(arrival: Arrival) -> bytes:
    """16 bytes that stand for all an arrival says; the order of attributes in it doesn't matter."""
    digest = blake2b(digest_size=_SIZE)
    facts = (
        arrival.run,
        arrival.attempt_key,
        arrival.rank,
        arrival.instance_id,
        sorted(arrival.resource.items()),
        arrival.started_unix_nano,
        arrival.ended,
        arrival.pieces,
    )
    digest.update(repr(facts).encode("utf-8", "surrogatepass"))
    for record in arrival.records:
        kind, payload = codec.encode(record)
        digest.update(b"%d %d " % (kind, len(payload)))
        digest.update(payload)
    points = arrival.points
    if points is not None and len(points):
        digest.update(repr((len(points), sorted(points.names.items()))).encode("utf-8", "surrogatepass"))
        for column in (points.time_unix_nano, points.values, points.iterations, points.metric_ids):
            digest.update(memoryview(column).cast("B"))
    return digest.digest()


class Repeats:
    """The digests of one run's last arrivals. Used under the run's lock."""

    def __init__(self, folder: Path, *, remembered: int = REMEMBERED) -> None:
        """Read what is there; a torn last digest is cut off.

        Raises:
            OSError: the file is there and can't be read.
        """
        self._path = folder / FILE
        self._remembered = remembered
        self._order: deque[bytes] = deque()
        self._known: set[bytes] = set()
        self._unwritten: list[bytes] = []
        self._written = 0
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        whole = len(data) - len(data) % _SIZE
        for at in range(max(0, whole - remembered * _SIZE), whole, _SIZE):
            self._add(data[at : at + _SIZE])
        self._written = whole
        if whole < len(data):
            os.truncate(self._path, whole)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def _add(self, digest: bytes) -> None:
        if digest in self._known:
            return
        self._known.add(digest)
        self._order.append(digest)
        while len(self._order) > self._remembered:
            self._known.discard(self._order.popleft())

    def add(self, digest: bytes) -> None:
        """Remember it; `write` puts it down."""
        self._add(digest)
        self._unwritten.append(digest)

    def take_unwritten(self) -> list[bytes]:
        """Those that stand in memory alone: to be written once their records are on the disk, or forgotten."""
        taken, self._unwritten = self._unwritten, []
        return taken

    def forget(self, digests: list[bytes]) -> None:
        """Their records may not be on the disk: what is sent again shall be stored again."""
        gone = set(digests)
        self._known -= gone
        self._order = deque(digest for digest in self._order if digest not in gone)

    def write(self, digests: list[bytes]) -> None:
        """Put digests into the file; it is not flushed, since a digest that is lost costs one repeat.

        Raises:
            OSError: it could not be written.
        """
        if not digests:
            return
        if self._written > 2 * self._remembered * _SIZE:
            write_whole(self._path, b"".join(self._order), durable=True)  # an empty file would lose all of them
            self._written = len(self._order) * _SIZE
            return
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._written += os.write(fd, b"".join(digests))
        finally:
            os.close(fd)
