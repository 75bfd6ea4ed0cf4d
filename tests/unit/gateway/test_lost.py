"""A run that is silent for too long is noted as lost, once, and speaks again with its next arrival."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tests.arrivals import Memory, arrival, ended, started, take
from tests.shipping import START_NS, until
from tracelet.gateway.lost import Silence
from tracelet.records import LOST, RUNNING, StateNoted


class Clock:
    """The time of day can be moved; the rest goes on as it does."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic()

    def time_ns(self) -> int:
        return time.time_ns() + int(self.ahead_s * 1e9)


def states(memory: Memory, run_id: str = "run-1") -> list[str]:
    return [note.state for note in memory.records(run_id, StateNoted)]


def test_a_silent_run_is_lost_once_and_any_arrival_takes_it_back(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        clock.ahead_s = 99.0
        intake.keep_house()
        assert intake.run_info().lost == 0
        clock.ahead_s = 150.0
        intake.keep_house()
        intake.keep_house()
        until(lambda: states(memory) == [LOST])
        assert (intake.run_info().running, intake.run_info().lost) == (0, 1)
        take(intake, arrival())  # nothing to store in it
        until(lambda: states(memory) == [LOST, RUNNING])
        assert (intake.run_info().running, intake.run_info().lost) == (1, 0)
        take(intake, arrival(points=[("a", 2.0, 2)]))
        until(lambda: len(memory.points("run-1")) == 2)
    assert states(memory) == [LOST, RUNNING]


def test_a_lost_run_stays_lost_over_a_restart_and_is_not_noted_again(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        clock.ahead_s = 150.0
        intake.keep_house()
        until(lambda: states(memory) == [LOST])
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        assert intake.run_info().lost == 1
        clock.ahead_s = 400.0
        intake.keep_house()
        take(intake, arrival(points=[("a", 2.0, 2)]))
        until(lambda: states(memory) == [LOST, RUNNING])


def test_silence_counts_while_the_gateway_is_down_but_its_senders_get_time_to_come_back(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=1000.0) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        until(lambda: memory.points("run-1"))
    clock.ahead_s = 5000.0
    with started(tmp_path, memory, clock=clock, lost_after_s=1000.0) as intake:
        intake.keep_house()
        assert intake.run_info().lost == 0
        clock.ahead_s = 5301.0
        intake.keep_house()
        until(lambda: states(memory) == [LOST])


def test_a_sender_that_calls_its_run_lost_is_believed_and_is_no_sign_of_life(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        take(intake, arrival(attempt="old", points=[("a", 1.0, 1)], started=START_NS))
        take(intake, arrival(attempt="new", points=[("a", 2.0, 2)], started=START_NS + 10**9))
        until(lambda: len(memory.points("run-1")) == 2)
        take(intake, replace(arrival(attempt="old"), lost=True))
        assert intake.run_info().lost == 0
        for first in range(2):
            take(intake, replace(arrival(attempt="new", first=START_NS + first), lost=True))
            until(lambda: states(memory) == [LOST])
            assert (intake.run_info().running, intake.run_info().lost) == (0, 1)
        take(intake, arrival(attempt="new", points=[("a", 3.0, 3)]))
        until(lambda: states(memory) == [LOST, RUNNING])
        assert intake.run_info().lost == 0


def test_a_run_is_not_lost_while_a_rank_on_another_host_speaks(tmp_path: Path) -> None:
    """The shipper of rank 0's folder, which is silent, says LOST every 30 s; rank 4's heartbeats come in between."""
    memory, clock = Memory(), Clock()
    silent = replace(arrival(host="node1"), lost=True)
    with started(tmp_path, memory, clock=clock) as intake:
        take(intake, arrival(rank=4, host="node2", points=[("a", 1.0, 1)]))  # the first sign of the run counts, too
        take(intake, arrival(host="node1", points=[("a", 1.0, 1)]))
        take(intake, silent)
        assert intake.run_info().lost == 0
        for _ in range(4):
            clock.ahead_s += 30.0
            take(intake, arrival(rank=4, host="node2"))
            take(intake, arrival(rank=1, host="node1", points=[("late", 1.0, 1)]))  # of the silent host, shipped late
            clock.ahead_s += 30.0
            take(intake, silent)
            assert intake.run_info().lost == 0
        clock.ahead_s += 60.0
        take(intake, silent)
        until(lambda: states(memory) == [LOST])
        take(intake, arrival(rank=4, host="node2"))
        until(lambda: states(memory) == [LOST, RUNNING])


def test_ranks_of_the_silent_host_whose_backlog_has_just_come_are_no_sign_of_life(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        for rank in range(3):
            take(intake, arrival(rank=rank, host="node1", points=[("a", 1.0, 1)]))
        take(intake, replace(arrival(host="node1"), lost=True))
        until(lambda: states(memory) == [LOST])


def test_a_gateway_whose_clock_is_set_back_believes_who_says_lost(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock) as intake:
        take(intake, arrival(host="node1", points=[("a", 1.0, 1)]))
        take(intake, arrival(rank=4, host="node2", points=[("a", 1.0, 1)]))
        clock.ahead_s = -3_600.0
        take(intake, replace(arrival(host="node1"), lost=True))
        until(lambda: states(memory) == [LOST])


def test_an_old_attempt_that_is_said_to_be_lost_is_no_sign_of_life_of_the_newest(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        take(intake, arrival(attempt="old", points=[("a", 1.0, 1)], started=START_NS))
        take(intake, arrival(attempt="new", points=[("a", 2.0, 2)], started=START_NS + 10**9))
        clock.ahead_s = 10_000.0
        take(intake, replace(arrival(attempt="old"), lost=True))
        intake.keep_house()
        assert intake.run_info().lost == 1


def test_a_run_that_has_ended_is_never_lost(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)], ended=ended()))
        clock.ahead_s = 10_000.0
        intake.keep_house()
        assert (intake.run_info().running, intake.run_info().lost) == (0, 0)
        take(intake, arrival(points=[("late", 1.0, 1)]))
        clock.ahead_s = 20_000.0
        intake.keep_house()
        until(lambda: len(memory.points("run-1")) == 2)
    assert states(memory) == []


def test_a_repeat_is_no_sign_of_life(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        once = arrival(points=[("a", 1.0, 1)])
        take(intake, once)
        clock.ahead_s = 90.0
        take(intake, once)
        clock.ahead_s = 110.0
        intake.keep_house()
        until(lambda: states(memory) == [LOST])


def test_silence_is_counted_from_the_last_word() -> None:
    now = [1000.0]
    silence = Silence(60.0, now=lambda: now[0], after_start_s=0.0)
    silence.heard("a")
    now[0] += 59
    silence.heard("b")
    now[0] += 2
    assert silence.overdue() == ["a"]
    silence.lost("a")
    assert (silence.overdue(), silence.counts()) == ([], (1, 1))
    silence.heard("a")
    assert silence.counts() == (2, 0)


def test_a_run_that_cannot_be_noted_as_lost_now_is_noted_later_and_the_house_is_kept(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()
    with started(tmp_path, memory, clock=clock, lost_after_s=100.0) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        until(lambda: memory.points("run-1"))  # it is being shipped: a damaged manifest would put that off by a minute
        (manifest,) = tmp_path.rglob("manifest.json")
        whole = {path: path.read_bytes() for path in manifest.parent.glob("manifest*json*")}
        for path in whole:
            path.write_bytes(b"{ damaged")
        clock.ahead_s = 150.0
        intake.keep_house()
        assert intake.run_info().lost == 0
        for path, content in whole.items():
            path.write_bytes(content)
        intake.keep_house()
        until(lambda: states(memory) == [LOST])
