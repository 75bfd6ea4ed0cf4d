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
"""How long a page may fail to be read before what stands on it counts as lost."""

Pread = Callable[[int, int, int], bytes]
"""As `os.pread`: descriptor, length, offset."""


class Pages:
    """What one reader has found unreadable. Costs nothing as long as nothing is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: dict[tuple[int, int], float] = {}  # inode and page -> since when

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        """As `os.pread`; in the place of pages that are given up stand zeros, and `lost` names them.

        Raises:
            OSError: a page can't be read, and not for long; or another error.
        """
        try:
            return os.pread(fd, length, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        stat = os.fstat(fd)
        pieces: list[bytes] = []
        at, end = offset, min(offset + length, stat.st_size)
        while at < end:
            stop = min(end, at - at % PAGE + PAGE)
            try:
                pieces.append(os.pread(fd, stop - at, at))
            except OSError as error:
                self._give_up(stat.st_ino, at // PAGE, error)
                pieces.append(bytes(stop - at))
            at = stop
        return b"".join(pieces)

    def _give_up(self, inode: int, page: int, error: OSError) -> None:
        now = self._clock()
        since = self._failed.setdefault((inode, page), now)
        if error.errno != errno.EIO or now - since < PATIENCE_S:
            raise error
        guard.limited(
            "read a page",
            "the disk can't read %d pages of the spool (%s): what stands on them is lost, and the rest goes on",
            len(self._failed),
            error,
        )

    def lost(self, fd: int, first: int, end: int) -> list[int]:
        """The pages among [first, end) of an open file that could not be read."""
        if not self._failed:
            return []
        inode = os.fstat(fd).st_ino
        return [page for page in range(first, end) if (inode, page) in self._failed]
