"""Reads files of which the disk may not give back every page: waits a minute for such a page, then goes on without it.

A read of one range fails as a whole where one sector of it is bad, and a shipper that only tried again would deliver
nothing of what stands behind. But a disk that can't be reached for a moment says the same, so nothing is given up at
once.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

from tracelet.guard import guard

__all__ = ["PAGE", "Pages", "Pread"]

PAGE = 4096

PATIENCE_S = 60.0
"""How long a file may be in trouble before what stands on a page that can't be read counts as lost."""

_OVER_S = 5 * PATIENCE_S  # without a failure for so long, the next one is trouble of its own

Pread = Callable[[int, int, int], bytes]
"""As `os.pread`: descriptor, length, offset."""


class Pages:
    """What the readers of one folder have found unreadable. Costs nothing as long as nothing is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._trouble: dict[int, tuple[float, float]] = {}  # by inode: when a page of it failed first, and last
        self._lost: set[tuple[int, int]] = set()  # inode and page

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """As `os.pread`; in the place of pages that are given up stand zeros, and `lost` names them.

        Raises:
            OSError: a page can't be read, and its file has not been in trouble for long; or another error.
        """
        data = b""
        try:
            data = os.pread(fd, length, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        else:
            if len(data) == length:
                return data
        # Less than was asked for: the file's end, or a bad page, before which a read ends as if that were one.
        stat = os.fstat(fd)
        pieces = [data]
        at, end = offset + len(data), min(offset + length, stat.st_size)
        while at < end:
            stop = min(end, at - at % PAGE + PAGE)
            try:
                piece = os.pread(fd, stop - at, at)
            except OSError as error:
                self._give_up(stat.st_ino, at // PAGE, error)
                piece = bytes(stop - at)
            pieces.append(piece)
            if len(piece) < stop - at:  # somebody has made the file shorter
                break
            at = stop
        return b"".join(pieces)

    def _give_up(self, inode: int, page: int, error: OSError) -> None:
        if (inode, page) in self._lost:
            return
        now = self._clock()
        since, last = self._trouble.get(inode, (now, now))
        if now - last > _OVER_S:
            since = now
        self._trouble[inode] = since, now
        if error.errno != errno.EIO or now - since < PATIENCE_S:
            raise error
        self._lost.add((inode, page))
        guard.limited(
            "read a page",
            "the disk can't read %d pages of the spool (%s): what stands on them is lost, and the rest goes on",
            len(self._lost),
            error,
        )

    def lost(self, fd: int, first: int, end: int) -> list[int]:
        """The pages among [first, end) of an open file that have been given up."""
        if not self._lost:
            return []
        inode = os.fstat(fd).st_ino
        return [page for page in range(first, end) if (inode, page) in self._lost]
