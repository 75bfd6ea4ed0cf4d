"""Who is alive: locks that the kernel drops at a process's death, held on files in the spool folder.

`fcntl.lockf` locks belong to the process: a forked child doesn't inherit them, and they are free at the moment of
death, whoever else has the file open. In turn, closing *any* descriptor of the file drops them, and a second lock in
the same process is granted: so what this process holds is remembered, and nothing here opens such a file again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Collection
from pathlib import Path

from tracelet.errors import SpoolError
from tracelet.spool.disk import Identity, close_own, identity, is_open_on

__all__ = ["ShipperLock", "WriterLock", "is_alive", "is_mine", "lock_name", "require_own", "shipper_alive"]

SHIPPER_LOCK = "shipper.lock"
_OVERFLOW_UID = 65534  # "nobody": what a file system shows that can't tell the owner

_held: set[tuple[int, int, int]] = set()  # pid (a forked child holds none of them), device and inode
_taking: dict[tuple[int, str], object] = {}  # pid and path of what some thread is just about to take


def is_mine(path: Path) -> bool:
    """Whether this process itself holds the lock on `path`: by another experiment of the same run, for example."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (os.getpid(), found.st_dev, found.st_ino) in _held


def _let_go(fd: int, opened: Identity) -> None:
    """Close the descriptor of a lock, which drops it."""
    _held.discard((os.getpid(), *opened))
    close_own(fd, opened)


def lock_name(writer: str) -> str:
    """The file name of a writer's lock."""
    return f"{writer}.lock"


def require_own(folder: Path) -> None:
    """See that the run's folder belongs to the user of this process.

    Training and what ships it have to run under one user id: the folder is its owner's alone, and what another user
    (root too) writes into it is closed to its owner.

    Raises:
        SpoolError: it belongs to somebody else.
    """
    try:
        owner = os.stat(folder).st_uid
    except FileNotFoundError:
        return
    if owner not in (os.geteuid(), _OVERFLOW_UID):
        raise SpoolError(
            f"{folder} belongs to user {_user(owner)}, and this process runs as user {_user(os.geteuid())}:"
            " run training and what ships it under one user id",
            folder=str(folder),
            owner=owner,
        )


def _user(uid: int) -> str:
    import pwd  # only for an error's text

    try:
        return f"{uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return str(uid)


class WriterLock:
    """A writer's sign of life. It appears under its name already locked, so that nobody sees it free before."""

    def __init__(self, folder: Path, writer: str) -> None:
        self.path = folder / lock_name(writer)
        self._hidden = folder / f".{lock_name(writer)}"
        self.visible = False
        self._fd = os.open(self._hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._opened = identity(self._fd)
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _held.add((os.getpid(), *self._opened))
            if not self.is_there():  # stopped between the two for so long that it was taken for a dead one's
                raise FileNotFoundError(errno.ENOENT, "a lock that was just made is gone", str(self._hidden))
        except BaseException:
            self.discard()
            raise

    def appear(self) -> None:
        """Show the writer to readers; again is no harm."""
        try:
            os.rename(self._hidden, self.path)
        except FileNotFoundError:
            if not self.path.exists():
                raise
        self.visible = True

    def is_there(self) -> bool:
        """Whether readers can find it; also where nobody can tell, because the disk doesn't answer.

        Opens nothing: a descriptor that is closed would drop the lock.
        """
        try:
            return os.path.samestat(os.stat(self.path if self.visible else self._hidden), os.fstat(self._fd))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def is_open(self) -> bool:
        """Whether the descriptor that holds it is still open on its file."""
        return is_open_on(self._fd, self._opened)

    def discard(self) -> None:
        """Take back a lock that never appeared."""
        self.release()
        self._hidden.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go; the file stays, it is how readers know of the writer."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _let_go(fd, self._opened)


def _holder(path: Path) -> int | None:
    """The pid that holds a lock on `path` (0 or -1: one of another PID namespace); None where nobody does.

    F_GETLK asks without taking: a probe that took the lock, if only for a moment, could turn away its next owner.
    """
    if is_mine(path):
        return os.getpid()
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except PermissionError:
        require_own(path.parent)
        raise
    try:
        if sys.platform == "darwin":
            asked = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("qqihh", 0, 0, 0, fcntl.F_WRLCK, 0))
            _, _, pid, kind, _ = struct.unpack("qqihh", asked)
        else:
            asked = fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
            kind, _, _, _, pid = struct.unpack("hhqqi4x", asked)
        return None if kind == fcntl.F_UNLCK else int(pid)
    finally:
        os.close(fd)


def is_alive(folder: Path, writer: str, *, mine: Collection[str] = ()) -> bool:
    """Whether the process of `writer` still lives. `mine` names writers of this process, which count as alive."""
    return writer in mine or _holder(folder / lock_name(writer)) is not None


def shipper_alive(folder: Path) -> int | None:
    """The pid of the shipper that serves `folder`, this very process's too, or None."""
    return _holder(folder / SHIPPER_LOCK)


class ShipperLock:
    """The right to ship one folder; held by one process at a time, until release or death.

    `name`: of the lock's file, for a right to a part of it alone.

    Examples:
        >>> import tempfile, pathlib
        >>> lock = ShipperLock(pathlib.Path(tempfile.mkdtemp()))
        >>> lock.acquire()
        True
        >>> lock.release()
    """

    def __init__(self, folder: Path, name: str = SHIPPER_LOCK) -> None:
        self._path = folder / name
        self._fd = -1
        self._opened: Identity = (-1, -1)

    def acquire(self) -> bool:
        """Take it, if nobody has it, nor anybody else in this process; never waits.

        Raises:
            SpoolError: the folder belongs to another user.
            OSError: the lock's file can't be made.
        """
        if self._fd >= 0:
            return True
        require_own(self._path.parent)
        # Of two threads that ask at once the second one, closing the file, would drop the lock of the first. A claim
        # that is set in one step, not a lock, which a signal's handler could meet in its own thread.
        claim, mine = (os.getpid(), os.fspath(self._path)), object()
        if _taking.setdefault(claim, mine) is not mine:
            return False
        try:
            return not is_mine(self._path) and self._take()
        finally:
            del _taking[claim]

    def _take(self) -> bool:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._opened = identity(fd)
            _held.add((os.getpid(), *self._opened))
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        self._fd = fd
        return True

    def release(self) -> None:
        """Give it back; again is no harm."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _let_go(fd, self._opened)
