"""Real disks for tests: small file systems that are mounted for one test, filled, and gone after it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["ext", "fill", "tmpfs"]


@contextmanager
def tmpfs(at: Path, size: str) -> Iterator[Path]:
    """A file system in memory, of this size."""
    with _mounted(at, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield at


@contextmanager
def ext(at: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """An ext2 (which has no fallocate) or ext4 file system in a file."""
    image = at.with_name(f"{at.name}.{kind}")
    with open(image, "wb") as file:
        file.truncate(megabytes * 2**20)
    made = subprocess.run(["mke2fs", "-q", "-F", "-t", kind, str(image)], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"mke2fs made no {kind}")
    try:
        with _mounted(at, "-o", "loop", "-t", kind, str(image)):
            yield at
    finally:
        image.unlink()


@contextmanager
def _mounted(at: Path, *options: str) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *options, str(at)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root with CAP_SYS_ADMIN")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def fill(ballast: Path) -> None:
    """Take all the room there is, to the last byte."""
    with open(ballast, "ab", buffering=0) as file:
        for step in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(step))
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EFBIG), error  # noqa: PT017
