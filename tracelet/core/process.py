"""What one process owes its runs: what a fork, a signal and its end mean for them.

With `session`, the only module-level state of the library. The hooks are set when the first run starts and taken away
when the last one stops, so that importing tracelet, and a program that never logs, pay and change nothing.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, cast

from tracelet.collectors.environment import notebook_shell
from tracelet.guard import guard, logger
from tracelet.records import FAILED, FINISHED, KILLED, ErrorInfo

__all__ = [
    "Ending",
    "Member",
    "count_start",
    "describe",
    "ending_of",
    "enter",
    "leave",
    "renew_after_fork",
    "starting",
    "starts_of",
]


class Ending:
    """How a program ended, as far as the program itself can see it."""

    __slots__ = ("error", "exit_code", "seen_by", "status")

    def __init__(self, status: str, seen_by: str, error: ErrorInfo | None = None, exit_code: int | None = None) -> None:
        self.status, self.seen_by, self.error, self.exit_code = status, seen_by, error, exit_code


class Member(Protocol):
    """A run as this process takes part in it."""

    def forked(self) -> None:
        """Called in a forked child, before it runs anything else: no I/O, no locks of the parent."""

    def process_ends(self, ending: Ending) -> None:
        """The program is over; say so in the spool, and wait as long as the promise of exit allows."""


_members: list[Member] = []
_starts: dict[tuple[str, str], int] = {}
_renewals: list[Callable[[], None]] = [guard.after_fork_in_child]  # of locks that a fork may have caught held
_lock = threading.RLock()
_exit_code: int | None = None  # of the last sys.exit nobody caught
_exits = 0  # how many there were; tells an exit from the one after it
_exit: Callable[..., object] | None = None  # the sys.exit that was there before ours
_seen_before: BaseException | None = None  # an exception that was already on record when the first run started
_sigterm_ours = False
_hooked = False


def starting() -> threading.RLock:
    """The lock under which a run starts, so that threads which log first at once start one run; follows a fork."""
    _set_hooks()
    return _lock


def renew_after_fork(renew: Callable[[], None]) -> None:
    """Have `renew` called in every forked child, once a run has started in this process; it may only make a lock."""
    _renewals.append(renew)


def starts_of(project: str, name: str) -> int:
    """How many runs of this project and name have been started in this process, or in the one it was forked from."""
    return _starts.get((project, name), 0)


def count_start(project: str, name: str) -> None:
    """One more has been."""
    _starts[project, name] = starts_of(project, name) + 1


def enter(member: Member, *, drain_on_sigterm: bool) -> None:
    """Take `member` in: from now on it hears of forks and of the end of the program."""
    global _exit, _exit_code, _seen_before
    with _lock:
        _set_hooks()
        if not _members:
            _exit_code = None
            _seen_before = _last_exception()
            _exit = sys.exit
            sys.exit = cast(Any, _recording_exit)
        _members.append(member)
        if drain_on_sigterm:
            _take_sigterm()


def leave(member: Member) -> None:
    """Let `member` go; with the last one, what was changed in the process is put back."""
    global _exit, _sigterm_ours
    with _lock:
        if member in _members:
            _members.remove(member)
        if _members:
            return
        if _exit is not None:
            if sys.exit is _recording_exit:
                sys.exit = cast(Any, _exit)
            _exit = None
        if _sigterm_ours and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) is _on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _sigterm_ours = False


def describe(error: BaseException) -> ErrorInfo:
    """An exception as the run's record keeps it."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = str(error)
    except Exception as worse:  # noqa: BLE001 - an exception's own words; what ends with it has to end all the same
        message = f"(its text could not be had: {type(worse).__name__})"
    return ErrorInfo(name, message, "".join(traceback.format_exception(error)))


def ending_of(error: BaseException, seen_by: str) -> Ending:
    """The ending that `error`, leaving a `with` block or the program, stands for."""
    if isinstance(error, SystemExit):
        code = _code(error.code)
        return Ending(FAILED if code else FINISHED, seen_by, None, code)
    if isinstance(error, KeyboardInterrupt):
        return Ending(KILLED, seen_by, describe(error))
    return Ending(FAILED, seen_by, describe(error))


# ---- hooks ------------------------------------------------------------------------------------------------------


def _set_hooks() -> None:
    global _hooked
    if _hooked:
        return
    _hooked = True
    # Neither can be taken back, so both look at `_members` and do nothing when it is empty.
    os.register_at_fork(after_in_child=_after_fork_in_child)
    atexit.register(_at_exit)


def _after_fork_in_child() -> None:
    global _lock
    # A thread of the parent may have held it at the fork; in the child nobody would ever let it go.
    _lock = threading.RLock()
    for renew in _renewals:  # first: what follows may have to say something
        renew()
    for member in _members:
        with guard("follow a fork"):
            member.forked()


def _recording_exit(code: object = None, /) -> object:
    global _exit_code, _exits
    exit_ = _exit
    try:
        if exit_ is None:
            raise SystemExit(code)
        return exit_(code)
    except SystemExit as error:
        if threading.current_thread() is threading.main_thread():  # elsewhere it ends that thread alone
            _exits += 1
            _exit_code = _code(error.code)
            error.__dict__["_tracelet"] = _Rider(_exits)
        raise


class _Rider:
    """Goes with a SystemExit, and by where it goes tells whether the program does.

    Nobody caught it: the interpreter drops it when no Python code stands any more. Dropped while some does, it was
    caught, and the program went on. What is logged in between says nothing: a `with` block that the exception leaves
    logs its end too.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int) -> None:
        self._number = number

    def __del__(self, frame: Callable[[], FrameType] = sys._getframe) -> None:
        global _exit_code
        if frame().f_back is not None and self._number == _exits:
            _exit_code = None


def _code(code: object) -> int:
    if code is None:
        return 0
    return code & 0xFF if isinstance(code, int) else 1  # a string is printed, and the code is 1


def _last_exception() -> BaseException | None:
    # sys.last_exc is 3.12's; last_value is set beside it, and is all that 3.11 has.
    found = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return found if isinstance(found, BaseException) else None


def _at_exit() -> None:
    members = list(_members)
    if not members:
        return
    ending = _program_ending()
    for member in members:
        with guard("end a run at the end of the program"):
            member.process_ends(ending)


def _program_ending() -> Ending:
    if notebook_shell(sys.modules) is not None:
        # A kernel ends because somebody ends or restarts it, whatever its last cell came to: the work was cut off.
        return Ending(KILLED, "exit-final")
    error = _last_exception()
    # At a prompt a failed line is not the program's end.
    if error is not None and error is not _seen_before and not hasattr(sys, "ps1"):
        return ending_of(error, "exit-final")
    if _exit_code:
        return Ending(FAILED, "exit-code", None, _exit_code)
    return Ending(FINISHED, "exit")


# ---- SIGTERM, where nothing outlives the program ----------------------------------------------------------------


def _take_sigterm() -> None:
    global _sigterm_ours
    if _sigterm_ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    if threading.current_thread() is not threading.main_thread():
        logger.warning(
            "nothing outlives this process here, and a run was started outside the main thread, where no signal"
            " handler can be set: on SIGTERM what still waits stays in the spool; `tracelet ship` delivers it"
        )
        return
    signal.signal(signal.SIGTERM, _on_sigterm)
    _sigterm_ours = True


def _on_sigterm(number: int, _frame: FrameType | None) -> None:
    for member in list(_members):
        with guard("drain after SIGTERM"):
            member.process_ends(Ending(KILLED, "signal"))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    # Process 1 of a PID namespace: the kernel drops a signal at its default disposition.
    os._exit(128 + number)
