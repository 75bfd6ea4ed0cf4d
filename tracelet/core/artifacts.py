"""Takes the bytes of an artifact at the call: a copy in the spool, or a reference to a large file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import time_ns

from tracelet.records import ArtifactLogged

__all__ = ["take"]


def take(
    source: str | os.PathLike[str],
    path: str | None,
    folder: Path,
    copy: bool | None = None,
    *,
    clock: Callable[[], int] = time_ns,
) -> list[ArtifactLogged]:
    """One record for each file of `source`; raises InvalidValue or ArtifactMissing before anything is logged."""
    raise NotImplementedError
