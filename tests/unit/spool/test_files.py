"""A flush of a writer's files: what the disk has refused once is told from then on, and is counted."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.spool.pens import OPENED, name_frame
from tracelet.spool.appended import AppendedSegment
from tracelet.spool.files import FileSet

LOCK = threading.RLock()


def opened(folder: Path, *, mapped: bool) -> FileSet:
    files = FileSet(folder, (OPENED, b"first", 1), 64, mapped, lambda size: None, end_kept=True)
    files.id_of("loss", name_frame, 1)
    return files


def log(files: FileSet, points: int) -> None:
    for i in range(points):
        files.point(1, float(i), i, 0)


@contextmanager
def refusing(files: FileSet) -> Iterator[None]:
    """Within the block what is written to the segment can't be flushed, as on a disk that fails."""
    segment = files.segment
    assert isinstance(segment, AppendedSegment)
    own, other = os.dup(segment.fd), os.open("/dev/zero", os.O_RDWR)
    os.dup2(other, segment.fd, inheritable=False)
    try:
        yield
    finally:
        os.dup2(own, segment.fd, inheritable=False)
        os.close(own)
        os.close(other)


def test_what_a_flush_could_not_bring_to_the_disk_counts_as_in_doubt(tmp_path: Path) -> None:
    files = opened(tmp_path, mapped=False)
    files.sync(LOCK)
    before = files.segment.head()
    log(files, 5)
    with refusing(files), pytest.raises(OSError, match="Invalid argument"):
        files.sync(LOCK)
    slots, said = files.doubtful()
    assert slots == before + 5, "an upper bound: those that its own look at the disk has not settled"
    assert said is not None
    log(files, 100)  # through to another segment
    assert files.doubtful()[0] == slots
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(LOCK)
    files.close()


def test_what_the_disk_said_before_a_flush_is_told_by_it(tmp_path: Path) -> None:
    files = opened(tmp_path, mapped=False)
    log(files, 5)
    segment = files.segment
    assert isinstance(segment, AppendedSegment)
    with refusing(files):
        segment.sync()
    assert files.doubtful()[0] == segment.head()
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(LOCK)
    files.close()


@contextmanager
def descriptors_left(number: int) -> Iterator[int]:
    """So many, and no more; the lowest one that is free."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    above = [os.dup(0) for _ in range(number)]
    most = max(above, default=lowest - 1) + 1
    for fd in above:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        yield lowest
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(("mapped", "left"), [(True, 0), (True, 1), (False, 1), (False, 2)])
def test_a_flush_for_which_no_descriptor_was_left_is_not_held_against_the_disk(
    tmp_path: Path, mapped: bool, left: int
) -> None:
    files = opened(tmp_path, mapped=mapped)
    log(files, 100)
    with descriptors_left(left) as lowest, pytest.raises(OSError) as raised:  # noqa: PT011 - its number is compared
        files.sync(LOCK)
    assert raised.value.errno == errno.EMFILE
    free = os.dup(0)
    os.close(free)
    assert free == lowest, "and none is left open"
    files.sync(LOCK)
    assert files.doubtful() == (0, None)
    files.close()
