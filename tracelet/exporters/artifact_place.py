"""What a place for artifacts' bytes does, and the ways in which it says no."""

from __future__ import annotations

from typing import Protocol

from tracelet.exporters.original import Original

__all__ = ["NeverTaken", "Place", "Waiting"]


class Waiting(Exception):
    """The bytes are not there yet; later they may be."""

    def __init__(self, reason: str, after_s: float | None = None, *, loud: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = after_s
        self.loud = loud


class NeverTaken(Exception):
    """The other side will not take these bytes, whatever we do (they are too large for it)."""


class Place(Protocol):
    """Where bytes go."""

    def uri(self, run_id: str, sha256: str, path: str) -> str:
        """The address that the event will carry; known before anything is sent."""
        ...

    def put(self, run_id: str, sha256: str, path: str, original: Original) -> None:
        """Return once the bytes are there, whole and for good.

        Raises:
            Waiting: not now.
            NeverTaken: never.
            Changed: the file is not what was logged.
        """
        ...
