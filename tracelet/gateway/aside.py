"""What can't be understood yet is written aside: a bounded folder of raw requests, each to be sent again one day."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from tracelet.guard import guard

__all__ = ["Aside"]


class Aside:
    """A folder that holds requests as they came, up to `max_bytes`; a repeat is the same file.

    `keep` returns once the file is on the disk. The file is the request's protobuf body: sent to `/v1/<signal>` of a
    gateway that understands it, it is taken as if it came for the first time.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def keep(self, signal: str, body: bytes, why: str) -> bool:
        """Write one request aside; False if the folder is full, and the request is lost to it.

        Raises:
            OSError: the disk refuses it.
        """
        name = f"{hashlib.sha256(body).hexdigest()[:32]}.{signal}.pb"
        path = self._folder / name
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                return True
            held = sum(entry.stat().st_size for entry in os.scandir(self._folder))
            if held + len(body) > self._max_bytes:
                guard.limited(
                    f"aside full: {signal}",
                    "LOST: a request of %s was acknowledged and not kept, because %s, and %s holds %d bytes already"
                    " (TRACELET_GATEWAY_UNKNOWN_BYTES)",
                    signal,
                    why,
                    self._folder,
                    held,
                )
                return False
            self._write(path, body)
        guard.limited(
            f"aside: {signal}",
            "a request of %s is set aside as %s, because %s; nothing of it is lost",
            signal,
            path,
            why,
        )
        return True

    def _write(self, path: Path, body: bytes) -> None:
        draft = path.with_suffix(".part")
        with draft.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
