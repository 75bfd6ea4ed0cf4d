"""Pages that a disk can't read: waited for, then given up one by one, the rest is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tracelet.guard import guard
from tracelet.spool import pages
from tracelet.spool.pages import PAGE, Pages

CONTENT = b"".join(bytes([n]) * PAGE for n in range(1, 6))


class BadDisk:
    """`os.pread` over a disk that can't read some pages, and ends a read before one as the kernel does."""

    def __init__(self, *bad: int) -> None:
        self.bad = set(bad)
        self._pread = os.pread

    def __call__(self, fd: int, length: int, offset: int) -> bytes:
        first, end = offset // PAGE, -(-(offset + length) // PAGE)
        bad = [page for page in range(first, end) if page in self.bad]
        if not bad:
            return self._pread(fd, length, offset)
        if bad[0] == first:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._pread(fd, bad[0] * PAGE - offset, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> BadDisk:
    bad = BadDisk()
    monkeypatch.setattr(os, "pread", bad)
    monkeypatch.setattr(guard, "strict", False)
    return bad


@pytest.fixture
def fd(tmp_path: Path) -> int:
    (tmp_path / "file").write_bytes(CONTENT)
    return os.open(tmp_path / "file", os.O_RDONLY)


def test_a_read_that_meets_no_bad_page_is_as_it_was(fd: int, disk: BadDisk) -> None:
    disk.bad = {4}
    read = Pages()
    assert read.pread(fd, 3 * PAGE, 100) == CONTENT[100 : 100 + 3 * PAGE]
    assert read.pread(fd, PAGE, len(CONTENT)) == b""
    assert read.lost(fd, 0, 5) == []


def test_a_bad_page_is_waited_for_and_may_come_back(fd: int, disk: BadDisk) -> None:
    now = [0.0]
    read = Pages(clock=lambda: now[0])
    disk.bad = {2}
    for now[0] in (0.0, 30.0, pages.PATIENCE_S - 1):
        with pytest.raises(OSError, match="Input/output error"):
            read.pread(fd, len(CONTENT), 0)
    disk.bad = set()
    now[0] = pages.PATIENCE_S + 1
    assert read.pread(fd, len(CONTENT), 0) == CONTENT
    assert read.lost(fd, 0, 5) == []


def test_pages_that_stay_bad_are_given_up_together_and_the_rest_is_read(fd: int, disk: BadDisk) -> None:
    now = [0.0]
    read = Pages(clock=lambda: now[0])
    disk.bad = {1, 3}
    with pytest.raises(OSError, match="Input/output error"):
        read.pread(fd, len(CONTENT), 0)
    now[0] = pages.PATIENCE_S
    zeros = bytes(PAGE)
    whole = CONTENT[:PAGE] + zeros + CONTENT[2 * PAGE : 3 * PAGE] + zeros + CONTENT[4 * PAGE :]
    assert read.pread(fd, len(CONTENT), 0) == whole
    assert read.pread(fd, 10, PAGE - 5) == whole[PAGE - 5 : PAGE + 5]
    assert read.lost(fd, 0, 5) == [1, 3]


def test_trouble_of_long_ago_gives_up_nothing_today(fd: int, disk: BadDisk) -> None:
    now = [0.0]
    read = Pages(clock=lambda: now[0])
    disk.bad = {2}
    with pytest.raises(OSError, match="Input/output error"):
        read.pread(fd, len(CONTENT), 0)
    now[0] = 86_400.0
    with pytest.raises(OSError, match="Input/output error"):
        read.pread(fd, len(CONTENT), 0)
