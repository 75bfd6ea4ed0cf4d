"""The guard: our faults stay out of training, are counted, and are logged once an interval."""

from __future__ import annotations

import logging
import threading

import pytest

from tracelet.errors import InvalidValue
from tracelet.guard import Guard


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_fault_is_kept_in_and_counted_and_logged_once_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    guard = Guard(strict=False, interval_s=60, clock=clock)
    for second in (0, 1, 59, 60, 61):
        clock.now = second
        with guard("count sheep"):
            raise ZeroDivisionError("no sheep")
    assert guard.counts == {"count sheep": 5}
    assert [record.getMessage() for record in caplog.records] == [
        "could not count sheep (1 so far): ZeroDivisionError: no sheep",
        "could not count sheep (4 so far): ZeroDivisionError: no sheep",
    ]


def test_what_is_meant_for_the_caller_passes() -> None:
    guard = Guard(strict=False)
    with pytest.raises(InvalidValue), guard("log"):
        raise InvalidValue("no")
    assert guard.counts == {}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_passes(stop: type[BaseException]) -> None:
    guard = Guard(strict=False)
    with pytest.raises(stop), guard("log"):
        raise stop


def test_under_test_a_fault_is_raised() -> None:
    guard = Guard()
    assert guard.strict
    with pytest.raises(ZeroDivisionError), guard("log"):
        raise ZeroDivisionError


def test_each_kind_has_its_own_interval(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(interval_s=60, clock=Clock())
    with caplog.at_level(logging.WARNING, "tracelet"):
        for kind in ("full", "full", "slow"):
            guard.limited(kind, "%s", kind)
    assert [record.getMessage() for record in caplog.records] == ["full", "slow"]
    assert guard.counts == {"full": 2, "slow": 1}


def test_many_threads_lose_no_count() -> None:
    guard = Guard(strict=False, interval_s=1e9)

    def faulty() -> None:
        for _ in range(500):
            guard.limited("full", "full")

    threads = [threading.Thread(target=faulty) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert guard.counts == {"full": 4000}
