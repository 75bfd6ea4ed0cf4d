"""What a gateway takes is in the spool when it says so, once, under its owner, and reaches the destination."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.arrivals import ANYBODY, Memory, arrival, ended, make, started, take
from tests.shipping import START_NS, until
from tracelet.errors import SpoolError
from tracelet.gateway.intake import Caller, Forbidden, Full
from tracelet.gateway.repeats import FILE
from tracelet.otlp.arrival import Decoded
from tracelet.records import AttemptEnded, ErrorInfo, ParamsLogged
from tracelet.spool.store import list_runs, read_manifest


def manifest_of(root: Path, run_id: str = "run-1"):
    manifest = read_manifest(root / run_id / "gateway")
    assert manifest is not None
    return manifest


def test_what_was_taken_reaches_the_destination_with_its_own_time_and_iteration(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        points = [("loss", 1.0 / (i + 1), i) for i in range(3000)] + [("accuracy", 0.5, 7)]
        taken = take(intake, arrival(points=points, records=[ParamsLogged(START_NS, {"lr": 0.1})]))
        assert (taken.points, taken.repeats, taken.items) == (3001, 0, 3002)
        until(lambda: len(memory.points("run-1")) == 3001)
    assert memory.points("run-1") == [(*point, START_NS + i * 1_000_000) for i, point in enumerate(points)]
    assert memory.records("run-1", ParamsLogged) == [ParamsLogged(START_NS, {"lr": 0.1})]


def test_more_points_than_a_segment_holds_arrive_in_order(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory, sync=True) as intake:
        for block in range(5):
            points = [("loss", float(i), i) for i in range(block * 5000, block * 5000 + 5000)]
            take(intake, arrival(points=points, first=START_NS + block * 10**10))
        until(lambda: len(memory.points("run-1")) == 25_000)
    assert [iteration for _, _, iteration, _ in memory.points("run-1")] == list(range(25_000))


def test_a_repeat_is_acknowledged_and_not_stored_again(tmp_path: Path) -> None:
    memory = Memory()
    one, two = arrival(points=[("a", 1.0, 1)]), arrival(points=[("a", 2.0, 2)], first=START_NS + 5_000_000)
    with started(tmp_path, memory) as intake:
        take(intake, one, two)
        assert take(intake, two).repeats == 1
        assert take(intake, one).repeats == 1
    with started(tmp_path, memory) as intake:
        assert take(intake, two, one).repeats == 2
        assert take(intake, two, one).points == 0
        until(lambda: len(memory.points("run-1")) >= 2)
    assert sorted(memory.points("run-1")) == [("a", 1.0, 1, START_NS), ("a", 2.0, 2, START_NS + 5_000_000)]


def test_what_a_death_left_twice_in_the_spool_is_sent_once(tmp_path: Path) -> None:
    both = arrival(points=[("a", float("nan"), 1), ("b", 2.0, 2)])
    for _ in range(2):  # the second process never learnt that the first one had it
        dying = make(tmp_path, Memory())
        take(dying, both)
        dying.close()
        (tmp_path / "run-1/gateway" / FILE).unlink()
    memory = Memory()
    with started(tmp_path, memory) as intake:
        take(intake, arrival("run-1", points=[("c", 3.0, 3)]))
        until(lambda: ("c", 3.0, 3, START_NS) in memory.points("run-1"))
    assert sorted(name for name, *_ in memory.points("run-1")) == ["a", "b", "c"]


def test_a_run_belongs_to_the_first_named_caller(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]), caller=Caller("team-a"))
        with pytest.raises(Forbidden, match="belongs to token 'team-a'") as refused:
            take(intake, arrival("run-2"), arrival(points=[("a", 2.0, 2)]), caller=Caller("team-b"))
        assert not (tmp_path / "run-2").exists()
        assert (refused.value.run_id, refused.value.owner) == ("run-1", "team-a")
        take(intake, arrival(points=[("a", 3.0, 3)]), caller=Caller("team-a"))
        until(lambda: len(memory.points("run-1")) == 2)
    assert [value for _, value, _, _ in memory.points("run-1")] == [1.0, 3.0]
    with started(tmp_path, memory) as intake, pytest.raises(Forbidden):
        take(intake, arrival(points=[("a", 2.0, 2)]), caller=Caller("team-b"))


def test_a_caller_writes_only_its_projects(tmp_path: Path) -> None:
    with started(tmp_path, Memory()) as intake:
        with pytest.raises(Forbidden, match="project 'other'"):
            take(intake, arrival(project="other"), caller=Caller("a", ("project",)))
        assert list(list_runs(tmp_path)) == []
        take(intake, arrival(), caller=Caller("a", ("project",)))


def test_a_run_that_was_nobodys_is_its_first_named_callers(tmp_path: Path) -> None:
    with started(tmp_path, Memory()) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)]))
        take(intake, arrival(points=[("a", 2.0, 1)]), caller=Caller("team-a"))
        with pytest.raises(Forbidden):
            take(intake, arrival(points=[("a", 3.0, 1)]), caller=Caller("team-b"))


def test_a_run_id_that_could_leave_the_spool_makes_no_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with started(root, Memory()) as intake:
        assert take(intake, arrival("../../etc", points=[("a", 1.0, 1)])).points == 0
    assert [path.name for path in root.iterdir()] == [".gateway.lock"]


def test_a_full_spool_acknowledges_nothing_and_takes_it_later(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory, max_bytes=100_000) as intake:
        assert intake.run_info().is_full
        with pytest.raises(Full, match="MAX_BYTES"):
            take(intake, arrival("run-2", points=[("a", 1.0, 1)]))
    with started(tmp_path, memory, max_bytes=1_000_000) as intake:
        assert not intake.run_info().is_full
        assert take(intake, arrival("run-2", points=[("a", 1.0, 1)])).points == 1
        until(lambda: len(memory.points("run-2")) == 1)


def test_a_second_gateway_on_one_folder_is_told_who_has_it(tmp_path: Path) -> None:
    with started(tmp_path, Memory()), pytest.raises(SpoolError, match=r"another gateway \(pid \d+\)"):
        make(tmp_path, Memory()).start()


def test_nothing_is_taken_while_it_stops(tmp_path: Path) -> None:
    with started(tmp_path, Memory()) as intake:
        pass
    with pytest.raises(Full, match="stopping"):
        take(intake, arrival())


def test_the_exact_start_corrects_the_estimate(tmp_path: Path) -> None:
    with started(tmp_path, Memory()) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)], first=START_NS + 77))
        assert manifest_of(tmp_path).attempts[0].started_unix_nano == START_NS + 77
        take(intake, arrival(started=START_NS + 5))
        assert manifest_of(tmp_path).attempts[0].started_unix_nano == START_NS + 5
        take(intake, arrival(started=START_NS + 6, points=[("a", 2.0, 1)]))
        assert manifest_of(tmp_path).attempts[0].started_unix_nano == START_NS + 5


def test_an_end_reaches_the_destination_after_the_points(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        error = ErrorInfo("ValueError", "no", "")
        take(intake, arrival(points=[("a", 1.0, 1)], started=START_NS, ended=ended("FAILED", error=error)))
        end = until(lambda: memory.records("run-1", AttemptEnded))[0]
    assert (end.status, end.error, end.start_unix_nano, end.newest) == ("FAILED", error, START_NS, True)
    assert len(memory.points("run-1")) == 1


def test_the_better_witness_of_an_end_stands_whichever_comes_first(tmp_path: Path) -> None:
    event, status, span = (
        ended("FAILED", told_by, at=START_NS + n) for n, told_by in enumerate(("event", "status", "span"))
    )
    with started(tmp_path, Memory()) as intake:
        for run_id, order in (("up", (span, status, event)), ("down", (event, status, span))):
            for told in order:
                take(intake, arrival(run_id, ended=told))
            kept = manifest_of(tmp_path, run_id).attempts[0].ended
            assert (kept["seen_by"], kept["end_unix_nano"]) == ("event", START_NS)


def test_the_end_of_an_older_attempt_is_not_the_runs(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        take(intake, arrival(attempt="old", started=START_NS), arrival(attempt="new", started=START_NS + 10**9))
        take(intake, arrival(attempt="old", ended=ended("KILLED")))
        assert until(lambda: memory.records("run-1", AttemptEnded))[0].newest is False
        assert intake.run_info().running == 1
        take(intake, arrival(attempt="new", ended=ended()))
        until(lambda: [end for end in memory.records("run-1", AttemptEnded) if end.newest])
        assert intake.run_info().running == 0


def test_what_comes_after_the_end_is_delivered(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        take(intake, arrival(points=[("a", 1.0, 1)], ended=ended()))
        until(lambda: memory.records("run-1", AttemptEnded))
        take(intake, arrival(points=[("late", 2.0, 2)]))
        until(lambda: len(memory.points("run-1")) == 2)
    with started(tmp_path, memory) as intake:
        take(intake, arrival(points=[("later", 3.0, 3)]))
        until(lambda: len(memory.points("run-1")) == 3)
        assert len(memory.records("run-1", AttemptEnded)) == 1


def test_what_was_not_delivered_is_delivered_by_the_next_gateway(tmp_path: Path) -> None:
    first = make(tmp_path, Memory())
    take(first, arrival(points=[("a", float(i), i) for i in range(100)], ended=ended()))
    first.close()
    memory = Memory()
    with started(tmp_path, memory):
        until(lambda: memory.records("run-1", AttemptEnded))
    assert len(memory.points("run-1")) == 100


def test_many_callers_share_a_flush(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory, sync=True) as intake:
        threads = [
            threading.Thread(
                target=take, args=(intake, arrival(f"run-{i % 4}", points=[("a", float(i), i)], first=START_NS + i))
            )
            for i in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert intake.run_info().points == 40
        until(lambda: sum(len(memory.points(f"run-{i}")) for i in range(4)) == 40)
        assert intake._commit.rounds < 40


def test_the_manifest_says_that_a_run_came_over_the_wire_and_whose_it_is(tmp_path: Path) -> None:
    with started(tmp_path, Memory()) as intake:
        intake.take(Decoded((arrival(),)), Caller("team-a"))
    body = json.loads((tmp_path / "run-1" / "gateway" / "manifest.json").read_text())
    assert (body["received"], body["owner"]) == (True, "team-a")
    assert ANYBODY.projects is None


def test_a_run_of_very_many_instances_holds_few_files_open_and_loses_nothing(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory, sync=True) as intake:
        take(intake, *(arrival(rank=rank, points=[("a", float(rank), 1)]) for rank in range(400)))
        assert len(intake._runs["run-1"].writers()) <= 256
        until(lambda: len(memory.points("run-1")) == 400)
    assert {value for _, value, _, _ in memory.points("run-1")} == {float(rank) for rank in range(400)}


def test_a_run_whose_folder_could_not_be_made_is_made_once_it_can_be(tmp_path: Path) -> None:
    memory = Memory()
    with started(tmp_path, memory) as intake:
        (tmp_path / "run-1").write_text("in the way")
        one = arrival(points=[("a", 1.0, 1)])
        refused: list[BaseException] = []

        def ask() -> None:
            try:
                take(intake, one)
            except Full as error:
                refused.append(error)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 8
        assert intake._making == {}
        (tmp_path / "run-1").unlink()
        assert take(intake, one).points == 1
        until(lambda: memory.points("run-1"))
