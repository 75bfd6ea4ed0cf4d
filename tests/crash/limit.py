"""A limit in time for what may wait without one of its own: it fails the test, and lets it put away what it started."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

AGAIN_S = 60.0
"""How long the putting away may take, in turn."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Fail the test that is still in the block after `seconds`, wherever its main thread waits: a read, a lock, a loop.

    By SIGALRM, so that no thread more is there when a test forks. Every thread's stack is in what it wrote to stderr.
    """

    def over(number: int, frame: object) -> None:
        faulthandler.dump_traceback(sys.__stderr__)
        pytest.fail(f"it was not over after {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, over)
    before = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


# A forked child has no such timer; one that sets its own means to end by it.
os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGALRM, signal.SIG_DFL))
