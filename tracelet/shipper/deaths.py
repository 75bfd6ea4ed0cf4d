"""Notices that a writer's process is gone, and what the kernel tells of how it left.

A writer holds a POSIX lock on its own file for as long as its process lives; that is the truth everywhere. Where the
lock's holder is visible as a process (Linux, same PID namespace) a pidfd tells of its end within a millisecond.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tracelet.guard import guard
from tracelet.spool.lease import is_alive, is_mine

__all__ = ["Deaths", "exit_code", "lock_holder"]

_LINUX = sys.platform.startswith("linux")
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
# struct pidfd_info, version 0 (include/uapi/linux/pidfd.h): mask, cgroupid, eleven ids, exit_code.
_PIDFD_INFO = "QQ11Ii"
_PIDFD_GET_INFO = (3 << 30) | (struct.calcsize(_PIDFD_INFO) << 16) | (0xFF << 8) | 11
_PIDFD_INFO_EXIT = 1 << 3  # Linux 6.15: set once the process has been reaped


def lock_holder(path: Path) -> int | None:
    """Who holds the POSIX lock on `path`: a pid, 0 for a process of another PID namespace, None for nobody.

    Of a lock that this very process holds nothing is opened: closing any descriptor of the file would drop it.
    """
    if is_mine(path):
        return os.getpid()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else max(0, int(pid))
    finally:
        os.close(descriptor)


def exit_code(pidfd: int, pid: int) -> int | None:
    """How the process behind `pidfd` left: its exit code, minus the number of a signal, or None if nobody tells.

    Linux 6.15 keeps it for whoever holds the pidfd; before, and until its parent has reaped it, /proc shows it.
    """
    found = _asked_of_pidfd(pidfd)
    if found is None:
        found = _read_of_zombie(pidfd, pid)
    if found is None:  # reaped between the two questions
        found = _asked_of_pidfd(pidfd)
    return None if found is None else os.waitstatus_to_exitcode(found)


def _asked_of_pidfd(pidfd: int) -> int | None:
    info = bytearray(struct.pack(_PIDFD_INFO, _PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:  # ENOTTY: an older kernel; ESRCH: reaped, and an older kernel
        return None
    mask, *_, status = struct.unpack(_PIDFD_INFO, info)
    return int(status) if mask & _PIDFD_INFO_EXIT else None


def _read_of_zombie(pidfd: int, pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        # The number can't have been given to another process while ours is unreaped, which this signal proves.
        signal.pidfd_send_signal(pidfd, 0)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return None
    # Field 3 of proc(5) is the state, field 52 the exit code; without the right to see it the kernel shows 0.
    return int(fields[49]) if fields[0] == "Z" and len(fields) >= 50 else None


class Deaths:
    """Which writers of a folder are alive. One thread calls `look` and `wait`; any may ask `is_dead`."""

    def __init__(
        self,
        folder: Path,
        *,
        is_alive: Callable[[str], bool] | None = None,
        every_s: float = 1.0,
        parent: tuple[int, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        from_elsewhere: bool = False,
    ) -> None:
        """`is_alive` replaces the look at the lock files (for a shipper in the writers' own process).

        `from_elsewhere`: it is another host's folder, so the moment of a death is not known here.

        `parent`: a pidfd of the process that started this one, and its pid, taken before it could have gone.
        """
        self._parent = parent
        self._folder = folder
        self.from_elsewhere = from_elsewhere
        self._is_alive = is_alive
        self._every_s = every_s
        self._clock = clock
        self._pidfds: dict[str, tuple[int, int]] = {}  # writer -> (pidfd, pid)
        self._dead: set[str] = set()
        self._next_look: dict[str, float] = {}
        self._seen_alive: set[str] = set()
        self._exit_codes: dict[str, int] = {}

    @property
    def by_locks(self) -> bool:
        """Whether it is the writers' lock files that are asked: none of them is of this process, or of another host."""
        return self._is_alive is None

    def is_dead(self, writer: str) -> bool:
        """The writer's process was gone when last looked at; what it wrote is all there is."""
        return writer in self._dead

    def is_surely_dead(self, writer: str) -> bool:
        """The same, asked once more where that is possible: before what a living writer would not survive.

        A lock that is free is free for good. Only who has the writers in its own process can have answered too early;
        such a writer counts as alive again, and is read on.
        """
        if writer not in self._dead:
            return False
        if self._is_alive is None or not self._is_alive(writer):
            return True
        self._dead.discard(writer)
        guard.limited("dead too early", "writer %s was taken for dead, and lives: its files are read on", writer)
        return False

    def was_seen_alive(self, writer: str) -> bool:
        """This shipper saw the writer alive, so it knows when it died."""
        return writer in self._seen_alive

    def is_watched(self, writer: str) -> bool:
        """Its process is known to the kernel here, so how it leaves can be learnt."""
        return writer in self._pidfds or writer in self._exit_codes

    def is_gone(self, writer: str) -> bool:
        """The writer's process itself has ended (a writer that wrote its END is dead before)."""
        if writer in self._exit_codes:
            return True
        pidfd, _ = self._pidfds.get(writer, (-1, 0))
        return _has_ended(pidfd) if pidfd >= 0 else writer in self._dead

    def exit_code(self, writer: str) -> int | None:
        """The exit code of a dead writer's process, if the kernel tells (it may only once the parent has reaped it)."""
        if writer in self._pidfds and self.is_gone(writer):
            code = exit_code(*self._pidfds[writer])
            if code is not None:
                self._exit_codes[writer] = code
                # A notebook's forked workers come and go for days: their descriptors go with them.
                os.close(self._pidfds.pop(writer)[0])
        return self._exit_codes.get(writer)

    def look(self, writer: str, pid: int | None = None) -> bool:
        """Whether the writer is dead now: its process ended, or it let its lock go (at its END).

        A pidfd is asked each time, the lock at most once a second. `pid` is what the writer said its process was.
        """
        if writer in self._dead:
            return True
        if pid is not None and self._parent is not None and pid == self._parent[1] and writer not in self._pidfds:
            # The lock may be free already: a short run is over before its shipper has started.
            self._pidfds[writer] = (os.dup(self._parent[0]), pid)
        if self.is_watched(writer) and self.is_gone(writer):
            self._dead.add(writer)
            self.exit_code(writer)
            return True
        now = self._clock()
        if now < self._next_look.get(writer, now):
            return False
        self._next_look[writer] = now + self._every_s
        if not self._alive_by_lock(writer):
            self._dead.add(writer)
            return True
        self._seen_alive.add(writer)
        return False

    def _alive_by_lock(self, writer: str) -> bool:
        if self._is_alive is not None:
            return self._is_alive(writer)
        path = self._folder / f"{writer}.lock"
        if not _LINUX:
            return is_alive(self._folder, writer)
        holder = lock_holder(path)
        if holder and writer not in self._pidfds:
            self._watch(writer, holder)
        return holder is not None

    def _watch(self, writer: str, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):  # gone already, a seccomp filter, an old kernel: the lock is polled
            return
        # Each takes a descriptor for as long as its process lives: half of them are left for what is read and sent.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if most != resource.RLIM_INFINITY and pidfd >= most // 2:
            os.close(pidfd)
            return
        if lock_holder(self._folder / f"{writer}.lock") != pid:  # the number may be somebody else's by now
            os.close(pidfd)
            return
        self._pidfds[writer] = (pidfd, pid)

    def wait(self, timeout_s: float, wake: int, *, for_deaths: bool = True) -> None:
        """Until a watched process ends, `wake` (a descriptor) becomes readable, or the time is over.

        Not `for_deaths`: a death that was seen and could not be taken in would end every wait at once.
        """
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for writer, (pidfd, _) in self._pidfds.items():
            if for_deaths and writer not in self._dead:
                poll.register(pidfd, select.POLLIN)
        try:
            poll.poll(max(0.0, timeout_s) * 1000)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise

    def close(self) -> None:
        """Let the pidfds go."""
        for pidfd, _ in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
