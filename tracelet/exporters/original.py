"""A logged file's bytes on their way to a store: open, compared with what was logged of them before and after."""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

from tracelet.records import ArtifactLogged

__all__ = ["CHUNK", "Changed", "Original", "place_of", "umask"]

CHUNK = 1 << 20


class Changed(Exception):
    """The file is not what it was when it was logged."""


def place_of(artifact: ArtifactLogged, folder: str) -> str:
    """Where the bytes are on this host: our copy in the spool's `folder`, or the file itself."""
    return artifact.source if artifact.stored is None else os.path.join(folder, artifact.stored)


class Original:
    """An open file that is compared with what was logged of it, before and after it is sent."""

    def __init__(self, file: BinaryIO, artifact: ArtifactLogged, at: str) -> None:
        self.file = file
        self.at = at
        self.size = artifact.size
        self.logged_unix_nano = artifact.time_unix_nano
        self._artifact = artifact

    def check(self) -> None:
        """Raise `Changed` if size, or for a reference time or inode, are others than when it was logged."""
        # Of the open file: what is deleted or replaced under its name meanwhile is still here, and whole.
        artifact, now = self._artifact, os.fstat(self.file.fileno())
        ours = artifact.stored is not None
        if now.st_size != artifact.size:
            raise Changed(f"{self.at} has {now.st_size} bytes, but had {artifact.size} when it was logged")
        if not ours and (
            (artifact.mtime_ns is not None and now.st_mtime_ns != artifact.mtime_ns)
            or (artifact.inode is not None and now.st_ino != artifact.inode)
        ):
            raise Changed(
                f"{self.at} has changed since it was logged (it was taken as a reference: log_artifact(..., copy=True)"
                " keeps a copy)"
            )

    def digest(self) -> None:
        """Compare the bytes with the digest taken at the call; leaves the file at its start."""
        if self._artifact.sha256 is not None:
            self.compare(self.sha256())
        self.file.seek(0)

    def sha256(self) -> str:
        """The digest of the bytes as they are now; leaves the file at its start."""
        self.file.seek(0)
        digest = hashlib.sha256()
        while piece := self.file.read(CHUNK):
            digest.update(piece)
        self.file.seek(0)
        return digest.hexdigest()

    def compare(self, sha256: str) -> None:
        """Raise `Changed` if the bytes that were read have another digest than when they were logged."""
        if self._artifact.sha256 is not None and sha256 != self._artifact.sha256:
            raise Changed(f"{self.at} is damaged: its sha256 is {sha256}, but was {self._artifact.sha256} when logged")


def umask() -> int:
    """This process's umask, without changing it (os.umask can only be read by setting it)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Umask:"):
                    return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    return 0o022
