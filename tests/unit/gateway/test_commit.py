"""A flush that serves many: each of them hears whether what it waited for is on the disk."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.shipping import until
from tracelet.gateway.commit import GroupCommit


class Thing:
    """Something to flush that counts, waits or raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.flushes = 0
        self.may_go = threading.Event()
        self.may_go.set()

    def flush(self) -> None:
        assert self.may_go.wait(10)
        self.flushes += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("bug"), MemoryError()])
def test_everybody_who_waits_for_a_flush_that_fails_hears_of_it_and_nobody_else(error: BaseException) -> None:
    commit = GroupCommit()
    slow, good, bad, last = Thing(), Thing(), Thing(error), Thing()
    slow.may_go.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(commit.wait, [slow])
        until(lambda: commit._busy)
        # In the order of a round: what comes after the one that fails is flushed all the same.
        waiting: list[tuple[Thing, Future[None]]] = []
        for thing in (good, bad, bad, last):
            waiting.append((thing, pool.submit(commit.wait, [thing])))
            until(lambda: set(commit._gathering.things) >= {one for one, _ in waiting})
        slow.may_go.set()
        first.result(10)
        for thing, future in waiting:
            if thing is bad:
                assert future.exception(10) is error
            else:
                future.result(10)
    assert (good.flushes, bad.flushes, last.flushes) == (1, 1, 1)
    assert commit.rounds == 2
    commit.wait([good])
    assert good.flushes == 2
