"""Whether the writers of another host's folder live, as far as this host can tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tracelet.spool import home, lease
from tracelet.spool.store import Manifest

__all__ = ["Elsewhere", "watched"]


class Elsewhere:
    """Asked for each writer of a folder that another host writes, or wrote.

    A lock that is seen held is the truth. A free one says nothing here: many shared file systems don't carry locks. So
    a writer counts as alive until the lease of its host's shipper has been missed three times, or somebody who knows
    says that it is dead (`assume_dead`). Without a lease only that ends it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        assume_dead: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._gone = assume_dead or home.is_of_an_earlier_boot(manifest)
        self._watch = home.Watch(folder, clock=clock)
        self._written = home.written_ns(folder)
        # Who ships once has no hour to wait: what the files say of the time before this look counts too.
        last = max(self._written.values(), default=0)
        self._quiet_since = clock() - (max(0.0, (time.time_ns() - last) / 1e9) if last else 0.0)

    def is_alive(self, writer: str) -> bool:
        """Whether the writer has to be taken for alive."""
        if lease.is_alive(self._folder, writer):
            return True
        return not (self._gone or self._watch.is_missed())

    def is_silent(self, writers: Iterable[str]) -> bool:
        """Whether nothing has been heard for so long that the run is LOST; what is heard of it next takes that back.

        Where a lease is kept, one that was missed; else an hour in which nothing was written.
        """
        if any(lease.is_alive(self._folder, writer) for writer in writers):
            return False
        late = self._watch.unchanged_s() >= home.LATE_S
        if self._watch.lease is not None:
            return late
        written, now = home.written_ns(self._folder), self._clock()
        if not written.items() <= self._written.items():  # else a shipper has moved some away, which is no sign of life
            self._quiet_since = now
        self._written = written
        return now - self._quiet_since >= home.SILENT_S


def watched(
    folder: Path, manifest: Manifest, *, assume_dead: bool = False, clock: Callable[[], float] = time.monotonic
) -> Elsewhere | None:
    """Who to ask about the writers; None where their own locks tell (the folder is of this machine)."""
    if home.is_here(manifest):
        return None
    return Elsewhere(folder, manifest, assume_dead=assume_dead, clock=clock)
