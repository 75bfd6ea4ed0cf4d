"""What a fuzzer's target is, and what a target needs to be quick."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = ["Target", "folder"]


class Target(NamedTuple):
    """One decoder under fuzz: it returns, or raises what it documents; anything else is a find."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder, in memory where that can be had: a fuzzer makes some hundred thousand of them."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
    try:
        yield path
    finally:
        shutil.rmtree(path)
