"""Keeps our own faults out of the training loop: counted, logged at most once a minute, raised under test.

The one place where `except Exception` needs no excuse.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tracelet.errors import TraceletError

__all__ = ["Guard", "guard", "logger"]


class _Said(logging.LoggerAdapter[logging.Logger]):
    """The logger `tracelet`; what the program's handlers and filters raise ends here, and not in a training loop.

    Python's own handlers raise too where `sys.stderr` is closed or no file: their report of the fault meets it again.
    """

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        try:
            if self.isEnabledFor(level):
                kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # the line that says it, not this one
                self.logger.log(level, msg, *args, **kwargs)
        except Exception:
            if guard.strict:
                raise


logger = _Said(logging.getLogger("tracelet"), None)


class Guard:
    """Counts faults by what was being done, and logs each kind at most once every `interval_s` seconds.

    Under test (`strict`) a fault is raised instead, so that no test passes over one.

    Examples:
        >>> from tracelet.guard import Guard
        >>> quiet = Guard(strict=False)
        >>> with quiet("show an example"):
        ...     1 / 0
        >>> quiet.counts
        {'show an example': 1}
    """

    def __init__(
        self,
        *,
        strict: bool | None = None,
        interval_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts: dict[str, int] = {}
        self.strict = "PYTEST_CURRENT_TEST" in os.environ if strict is None else strict
        self._interval_s = interval_s
        self._clock = clock
        self._logged_at: dict[str, float] = {}
        self._lock = threading.RLock()

    def after_fork_in_child(self) -> None:
        """Renew the lock: a thread of the parent may have held it, and in the child nobody would ever let it go."""
        self._lock = threading.RLock()

    @contextmanager
    def __call__(self, doing: str) -> Iterator[None]:
        """Run the block; a `TraceletError` passes (it is meant for the caller), anything else is counted."""
        try:
            yield
        except TraceletError:
            raise
        except Exception as error:
            if self.strict:
                raise
            self.note(doing, error)

    def note(self, doing: str, error: BaseException, words: str | None = None) -> None:
        """Count one fault met while `doing` something, and log it unless that was done within the interval.

        `words` are said in place of the error's own, which may hold a secret.
        """
        with self._lock:
            count = self.counts[doing] = self.counts.get(doing, 0) + 1
            now = self._clock()
            quiet = now - self._logged_at.get(doing, -self._interval_s) < self._interval_s
            if not quiet:
                self._logged_at[doing] = now
        if not quiet:
            logger.error("could not %s (%d so far): %s: %s", doing, count, type(error).__name__, words or error)

    def limited(self, kind: str, message: str, *args: object) -> None:
        """Log a warning of this `kind` at most once every interval; every call is counted."""
        with self._lock:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            now = self._clock()
            if now - self._logged_at.get(kind, -self._interval_s) < self._interval_s:
                return
            self._logged_at[kind] = now
        logger.warning(message, *args)


guard = Guard()
