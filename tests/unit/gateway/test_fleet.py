"""Many runs share the shipper: in fair turns, closed when quiet, opened by news, cleared away when over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.arrivals import Memory, arrival, ended, started, take
from tests.shipping import until
from tracelet.exporters.base import Delivered, RetryLater
from tracelet.gateway import intake as intake_module
from tracelet.spool.lease import ShipperLock


def test_more_runs_than_may_be_open_are_all_delivered(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        intake._fleet._ceiling, intake._fleet._turn_s = 3, 0.2
        for n in range(20):
            take(intake, arrival(f"run-{n}", points=[("a", float(n), i) for i in range(10)]))
        until(lambda: all(len(memory.points(f"run-{n}")) == 10 for n in range(20)))
        assert intake.run_info().open_runs <= 3


def test_runs_whose_destination_is_stuck_make_way_for_the_others(tmp_path: Path) -> None:
    memory = Memory()
    memory.answer = lambda batch: (
        RetryLater("not now", after_s=0.05) if batch.run.run_id.startswith("stuck") else Delivered()
    )
    with started(tmp_path, memory) as intake:
        intake._fleet._ceiling, intake._fleet._turn_s = 2, 0.2
        for n in range(4):
            take(intake, arrival(f"stuck-{n}", points=[("a", 1.0, 1)]))
        for n in range(4):
            take(intake, arrival(f"run-{n}", points=[("a", 1.0, 1)]))
        until(lambda: all(len(memory.points(f"run-{n}")) == 1 for n in range(4)))
        memory.answer = lambda batch: Delivered()
        until(lambda: all(len(memory.points(f"stuck-{n}")) == 1 for n in range(4)))


def test_a_quiet_run_is_closed_and_news_open_it_again_with_what_it_remembered(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        intake._fleet._quiet_s = 0.1
        take(intake, arrival(points=[("a", 1.0, 1)]))
        until(lambda: memory.points("run-1") and intake.run_info().open_runs == 0)
        lock = ShipperLock(tmp_path / "run-1/gateway")
        assert lock.acquire()  # nobody has it now
        lock.release()
        take(intake, arrival(points=[("a", 2.0, 2)]))
        until(lambda: len(memory.points("run-1")) == 2)


def test_news_are_with_the_destination_within_two_seconds(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        until(lambda: memory.points("run-1"))
        for n in range(5):
            began = time.monotonic()
            take(intake, arrival(points=[("a", 2.0, n)]))
            until(lambda n=n: len(memory.points("run-1")) == n + 2)
            assert time.monotonic() - began < 2.0


def test_a_run_that_is_over_is_cleared_away_and_its_late_data_still_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "CLOSE_ENDED_AFTER_S", 0.0)
    memory = Memory()
    folder = tmp_path / "run-1/gateway"
    with started(tmp_path, memory) as intake:
        intake._fleet._quiet_s, intake._fleet._tidy_after_s = 0.1, 0.2
        take(intake, arrival(points=[("a", float(i), i) for i in range(20_000)], ended=ended()))
        until(lambda: len(memory.points("run-1")) == 20_000)
        until(lambda: not list(folder.glob("*.points")) and not list(folder.glob("*.frames")))
        assert len(list((folder / "delivered").glob("*.points"))) == 3
        take(intake, arrival(points=[("late", 1.0, 1)]))
        until(lambda: len(memory.points("run-1")) == 20_001)
    again = Memory()
    with started(tmp_path, again) as intake:
        take(intake, arrival(points=[("later", 1.0, 1)]))
        until(lambda: again.points("run-1"))
        assert len(again.points("run-1")) == 1


def test_a_folder_that_another_process_ships_is_left_to_it_and_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    from tracelet.gateway import fleet

    monkeypatch.setattr(fleet, "AGAIN_S", 0.1)
    memory = Memory()
    folder = tmp_path / "run-1/gateway"
    code = (
        "import sys, pathlib; from tracelet.spool.lease import ShipperLock;"
        "lock = ShipperLock(pathlib.Path(sys.argv[1])); assert lock.acquire();"
        "print('held', flush=True); sys.stdin.read()"
    )
    folder.mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "held\n"
        with started(tmp_path, memory) as intake:
            take(intake, arrival(points=[("a", 1.0, 1)]))
            until(lambda: intake.run_info().waiting_runs == 1)
            assert memory.points("run-1") == []
            other.stdin.close()
            other.wait(10)
            until(lambda: memory.points("run-1"))
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_closing_delivers_what_is_there_within_the_grace(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        for n in range(5):
            take(intake, arrival(f"run-{n}", points=[("a", float(i), i) for i in range(3000)]))
        intake.close(10.0)
    assert all(len(memory.points(f"run-{n}")) == 3000 for n in range(5))


def test_a_running_run_whose_writers_are_gone_is_settled_and_closed(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        until(lambda: memory.points("run-1"))
    with started(tmp_path, memory) as intake:
        intake._fleet._quiet_s = 0.1
        until(lambda: intake._fleet.is_settled() and intake.run_info().open_runs == 0)
        assert intake.run_info().undelivered == 0
        take(intake, arrival(points=[("a", 2.0, 2)]))
        until(lambda: len(memory.points("run-1")) == 2)
        intake._runs["run-1"].close_quiet(0.0, time.monotonic() + 1)
        until(lambda: intake._fleet.is_settled() and intake.run_info().open_runs == 0)


def test_trouble_at_the_destination_shows_in_the_numbers(tmp_path: Path) -> None:
    memory = Memory()
    memory.answer = lambda batch: RetryLater("MLflow is away", after_s=0.05)
    with started(tmp_path, memory) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        until(lambda: intake.run_info().trouble == {"run-1": "MLflow is away"})
        assert intake.run_info().undelivered > 0
        memory.answer = lambda batch: Delivered()
        until(lambda: intake.run_info().delivered == 1 and not intake.run_info().trouble)
        until(lambda: intake.run_info().undelivered == 0)
