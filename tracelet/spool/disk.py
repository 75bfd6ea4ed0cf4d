"""What the file system under the spool can do: whether a mapped store is safe there, and room that is really there."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tracelet.errors import SpoolError, SpoolFull

__all__ = [
    "CANT_ALLOCATE",
    "NO_ROOM",
    "Identity",
    "allocate",
    "close_own",
    "identity",
    "is_open_on",
    "is_refusal",
    "may_map",
    "refused",
    "sync_file",
    "sync_folder",
]

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The errors that mean "no room" rather than "not allowed" or "broken"."""

CANT_ALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})
"""What fallocate(2) says where the file system, or the system, has no such thing."""

_NOT_ASKED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # the process lacked what it takes to ask the disk

_NO_FSYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})  # a file system without it, for folders

_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE, linux/falloc.h


Identity = tuple[int, int]
"""Which file a descriptor is open on: its device and inode."""


def identity(fd: int) -> Identity:
    """Of an open file."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def is_open_on(fd: int, opened: Identity) -> bool:
    """Whether it is still open on the file it was `opened` on, and not somebody else's by now."""
    try:
        return identity(fd) == opened
    except OSError:
        return False


def close_own(fd: int, opened: Identity, *, cut_at: int | None = None) -> bool:
    """Close `fd` if it is still open on the file it was `opened` on, cut at `cut_at` if it is longer; whether it was.

    A program that turns itself into a daemon closes all there is by number, and opens files of its own, which get our
    numbers: to close or cut these would be its loss.
    """
    if not is_open_on(fd, opened):
        return False
    try:
        if cut_at is not None and cut_at <= os.fstat(fd).st_size:
            with contextlib.suppress(OSError):  # it stays as long as it is
                os.ftruncate(fd, cut_at)
        os.close(fd)
    except OSError:
        return False
    return True


def refused(folder: Path, error: OSError) -> SpoolError:
    """The error to raise where a spool folder can't be made or written: a `SpoolFull` where there is no room."""
    full = error.errno in NO_ROOM
    kind = SpoolFull if full else SpoolError
    what = "has no room" if full else "can't be written"
    then = "free some, or raise TRACELET_MAX_BYTES" if full else "make it writable, or set TRACELET_DIR"
    if isinstance(error, TimeoutError):
        then = "try again; or end, or continue, the process that holds it up"
    return kind(f"the spool folder {folder} {what} ({error.strerror or error}): {then}", folder=str(folder))


# Here an allocated block takes a mapped store, whether or not the disk has any room left. On btrfs and ZFS a store
# needs new room, on NFS and FUSE an answer from somewhere else; a page that can't be had is SIGBUS, which kills
# training. A disk that fails can do that here, too: an XFS that has shut itself down does (docs/decisions/0128).
_SAFE = frozenset({"ext4", "xfs", "tmpfs"})


def _mounts(text: str) -> dict[str, tuple[str, str]]:
    """Device ("major:minor") to file system type and its own options, from the text of /proc/self/mountinfo."""
    found: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, more = left.split(" "), right.split(" ")
        if len(fields) > 2 and len(more) > 2:
            found[fields[2]] = (more[0], more[2])
    return found


def _unescape(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), path)


def may_map(folder: Path) -> bool:
    """Whether `folder` lies on ext4, xfs, tmpfs, or an overlay whose upper layer can be seen to lie on one of these."""
    if sys.platform != "linux":
        return False
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = _mounts(file.read())
        path = os.fspath(folder)
        for _ in range(4):  # an overlay may lie on an overlay
            device = os.stat(path).st_dev
            kind, options = mounts.get(f"{os.major(device)}:{os.minor(device)}", ("", ""))
            if kind != "overlay":
                return kind in _SAFE
            upper = re.search(r"(?:^|,)upperdir=((?:[^,\\]|\\.)*)", options)
            if upper is None:
                return False
            path = _unescape(upper.group(1))
    except OSError:
        return False
    return False


def allocate(fd: int, size: int, *, at: int = 0, keep_size: bool = False) -> None:
    """Give the file `size` bytes of real room from `at` on, by fallocate(2) itself. `keep_size`: it looks no longer.

    glibc's posix_fallocate (and so `os.posix_fallocate`) writes a byte into each block where the file system can't
    allocate, which looks like success and promises nothing.

    Raises:
        OSError: no room (see `NO_ROOM`), or not supported here.
    """
    code = errno.EINTR
    while code == errno.EINTR:
        code = _fallocate()(fd, _KEEP_SIZE if keep_size else 0, at, size)
    if code:
        raise OSError(code, os.strerror(code))


def is_refusal(error: OSError) -> bool:
    """Whether a flush failed because of the disk, which says so once: another try may look like success."""
    return error.errno not in _NOT_ASKED


def sync_file(path: str | Path) -> None:
    """Bring a file's bytes to the disk, whoever has written them.

    Raises:
        OSError: the disk would not have them, now or at an earlier try of the kernel's that nobody has heard of yet.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def sync_folder(path: str | Path) -> None:
    """Bring the names in a folder to the disk: of files that are new there, or were renamed.

    Raises:
        OSError: the disk would not have them.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(fd)


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    """fallocate(2), which answers with 0 or the number of its error."""
    try:
        import ctypes
    except ImportError:  # an interpreter built without libffi
        return lambda fd, mode, at, size: errno.ENOSYS

    found = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if found is None:
        return lambda fd, mode, at, size: errno.ENOSYS
    found.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return lambda fd, mode, at, size: ctypes.get_errno() if found(fd, mode, at, size) != 0 else 0
