"""How much of the disk a gateway's spool may take, and the one process that may write in it."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

from tracelet.errors import SpoolError
from tracelet.spool.store import make_folder, usage

__all__ = ["Room", "RootLock"]

_MEASURED_FOR_S = 10.0
_AGAIN_WHEN_FULL_S = 2.0


class Room:
    """`TRACELET_GATEWAY_MAX_BYTES` over all runs: measured now and then, and added up in between."""

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._measured_at = float("-inf")
        self.used = 0

    def measure(self) -> None:
        """Look at the disk, if the last look is some time ago."""
        with self._lock:
            self._measure(_MEASURED_FOR_S)

    def _measure(self, older_than_s: float) -> None:
        now = time.monotonic()
        if now - self._measured_at >= older_than_s:
            self.used, self._measured_at = usage(self._root), now

    def is_full(self, size: int) -> bool:
        """Whether `size` bytes more would be too many."""
        with self._lock:
            if self._max_bytes is None or self.used + size <= self._max_bytes:
                return False
            self._measure(_AGAIN_WHEN_FULL_S)
            return self.used + size > self._max_bytes

    def admit(self, size: int) -> None:
        """Count `size` more bytes.

        Raises:
            OSError: they are too many (EDQUOT).
        """
        with self._lock:
            if self._max_bytes is not None and self.used + size > self._max_bytes:
                self._measure(_AGAIN_WHEN_FULL_S)
                if self.used + size > self._max_bytes:
                    raise OSError(errno.EDQUOT, f"TRACELET_GATEWAY_MAX_BYTES ({self._max_bytes:,}) is reached")
            self.used += size


class RootLock:
    """The right to write in a gateway's spool; held by one process, until release or death."""

    def __init__(self, root: Path) -> None:
        self._path = Path(root) / ".gateway.lock"  # beside the runs' folders: no run id begins with a point
        self._fd = -1

    def acquire(self) -> None:
        """Take it.

        Raises:
            SpoolError: another gateway has it.
        """
        make_folder(self._path.parent.absolute())
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise SpoolError(
                f"another gateway (pid {pid}) writes in {self._path.parent}: stop it, or give this one its own --dir",
                folder=str(self._path.parent),
                pid=pid,
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode("ascii"), 0)
        self._fd = fd

    def release(self) -> None:
        """Give it back; again is no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
