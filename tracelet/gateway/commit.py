"""Group commit: whoever waits for the disk waits for one flush that serves them all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

__all__ = ["GroupCommit", "flush_all"]


class Flushable(Protocol):
    """Something whose writes can be brought to the disk."""

    def flush(self) -> None:
        """Return when all that was written before the call is on the disk.

        Raises:
            OSError: it may not be.
        """
        ...


class _Round:
    """Those who wait for the same flush."""

    def __init__(self) -> None:
        self.things: dict[Flushable, None] = {}
        self.failed: dict[Flushable, BaseException] = {}
        self.done = False


class GroupCommit:
    """Flushes in rounds: what comes while one is under way waits for the next, all of it together.

    The first who waits leads the round in its own thread, so there is nothing to start and nothing to stop.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._gathering = _Round()
        self._busy = False
        self.rounds = 0

    def wait(self, things: Iterable[Flushable]) -> None:
        """Return when what was written to `things` before is flushed.

        Raises:
            OSError: one of them could not be flushed; whatever else its flush has raised, in whoever's thread it ran.
        """
        mine = list(things)
        with self._changed:
            joined = self._gathering
            joined.things.update(dict.fromkeys(mine))
            while self._busy and not joined.done:
                self._changed.wait()
            leads = not joined.done
            if leads:
                self._busy = True
                self._gathering = _Round()
        if leads:
            self._lead(joined)
        for thing in mine:
            if thing in joined.failed:
                raise joined.failed[thing]

    def _lead(self, joined: _Round) -> None:
        try:
            for thing in joined.things:
                try:
                    thing.flush()
                except BaseException as error:  # noqa: BLE001 - whatever it is, others wait for this flush too, and each
                    # of them has to hear that it failed: they would acknowledge what may not be on the disk
                    joined.failed[thing] = error
        finally:
            with self._changed:
                self._busy = False
                self.rounds += 1
                joined.done = True
                self._changed.notify_all()


def flush_all(descriptors: Sequence[int]) -> None:
    """Bring these files to the disk, and close the descriptors whatever comes of it."""
    try:
        for fd in descriptors:
            os.fdatasync(fd)
    finally:
        for fd in descriptors:
            os.close(fd)
