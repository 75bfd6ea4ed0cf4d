"""Whether the writers of another host's folder live, as far as this host can tell."""

from __future__ import annotations

import time
from collections.abc import Callable
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
        self._gone = assume_dead or home.is_of_an_earlier_boot(manifest)
        self._watch = home.Watch(folder, clock=clock)

    def is_alive(self, writer: str) -> bool:
        """Whether the writer has to be taken for alive."""
        if lease.is_alive(self._folder, writer):
            return True
        return not (self._gone or self._watch.is_missed())


def watched(
    folder: Path, manifest: Manifest, *, assume_dead: bool = False, clock: Callable[[], float] = time.monotonic
) -> Callable[[str], bool] | None:
    """What to ask for the life of a writer; None where its own lock tells (the folder is of this machine)."""
    if home.is_here(manifest):
        return None
    return Elsewhere(folder, manifest, assume_dead=assume_dead, clock=clock).is_alive
