"""One destination, one step at a time, on a clock that stands still."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.shipping import Alive, add_attempt, destination, end, open_writer, put, shipment, start, until
from tracelet import ids
from tracelet.errors import IntegrationUnavailable
from tracelet.exporters.base import Exporter
from tracelet.guard import guard
from tracelet.records import FlushAsked, ParamsLogged, RankEnded, SpanStarted, TagsSet, WriterOpened
from tracelet.shipper.deadletter import DeadLetters
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.loop import Lane
from tracelet.shipper.retry import BackOff
from tracelet.shipper.site import FIRST_RANK_WAIT_S, Site
from tracelet.spool import store
from tracelet.spool.cursor import Journal
from tracelet.spool.writer import Writer
from tracelet.testing import Delivered, InMemoryExporter, ManualClock, MemoryStore, Refusal, Rejected, RetryLater


class Bench:
    """A folder with one attempt and one writer, and a lane that a test steps by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = ManualClock(time.time_ns())  # of the day that the writers see
        self.alive = Alive()
        self.attempt = add_attempt(folder, "a")
        self.writer = open_writer(folder, self.attempt)
        self.lanes: list[Lane] = []

    def lane(self, exporter: Exporter | Callable[[], Exporter]) -> Lane:
        manifest = store.read_manifest(self.folder)
        assert manifest is not None
        deaths = Deaths(self.folder, is_alive=self.alive, every_s=0.0, clock=self.clock.monotonic)
        self.site = Site(self.folder, manifest, deaths, clock=self.clock)
        build = exporter if not isinstance(exporter, InMemoryExporter) else lambda: exporter
        lane = Lane(self.site, destination("a"), build, clock=self.clock, backoff=BackOff(random=lambda: 1.0))
        self.lanes.append(lane)
        self.site.look()
        return lane

    def settle(self, lane: Lane, steps: int = 50) -> float:
        """Look and step until the lane wants to wait; for how long."""
        for _ in range(steps):
            self.site.look()
            delay = lane.step()
            if delay > 0:
                return delay
        raise AssertionError("it never came to rest")

    def letters(self) -> list[dict[str, Any]]:
        path = self.folder / "rejected-memory-a.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(guard, "_logged_at", {})  # each test hears what is said once a minute
    made = Bench(tmp_path / "run" / "host-boot")
    yield made
    for lane in made.lanes:
        lane.close()


# ---- when a batch leaves --------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_full_waits_for_its_linger_and_no_longer(bench: Bench) -> None:
    exporter = InMemoryExporter(linger_s=1.0)
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    bench.settle(lane)
    assert not exporter.store.batches
    bench.clock.advance(0.5)
    bench.writer.log("loss", 2.0, 1)
    bench.settle(lane)
    assert not exporter.store.batches
    bench.clock.advance(0.5)
    bench.settle(lane)
    assert [value for _, value, _, _ in exporter.store.points()] == [1.0, 2.0]
    assert len(exporter.store.batches) == 1


def test_a_full_batch_leaves_at_once_and_holds_exactly_its_slots(bench: Bench) -> None:
    exporter = InMemoryExporter(linger_s=1e9, max_points=10)
    lane = bench.lane(exporter)
    for i in range(25):
        bench.writer.log("loss", float(i), i)
    bench.settle(lane)
    # Slots, not points: the opening and the name's frame have taken two of the first ten.
    assert [len(part.points) for batch in exporter.store.in_order() for part in batch.parts] == [8, 10]


@pytest.mark.parametrize("how", ["flush", "end"])
def test_a_flush_and_an_end_leave_at_once(bench: Bench, how: str) -> None:
    exporter = InMemoryExporter(linger_s=1e9)
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    if how == "flush":
        put(bench.writer, FlushAsked(time.time_ns()))
    else:
        end(bench.writer)
    bench.settle(lane)
    assert len(exporter.store.points()) == 1
    assert not any(isinstance(record, FlushAsked) for record in exporter.store.records())


def test_an_idle_lane_looks_ever_less_often(bench: Bench) -> None:
    lane = bench.lane(InMemoryExporter())
    bench.writer.log("loss", 1.0, 0)
    waits = [bench.settle(lane)]
    for passed in (5.0, 60.0):
        bench.clock.advance(passed)
        waits.append(bench.settle(lane))
    assert waits == [0.05, 0.1, 0.2]


# ---- answers --------------------------------------------------------------------------------------------------------


def test_retry_later_asks_the_same_delivery_again_when_it_is_due(bench: Bench) -> None:
    exporter = InMemoryExporter(answers=[RetryLater("down"), RetryLater("down", after_s=7.0)])
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    assert bench.settle(lane) == 0.5
    assert lane.trouble == "down"
    assert lane.step() == 0.5  # not asked before its time
    assert exporter.attempts == 1
    bench.clock.advance(0.5)
    assert bench.settle(lane) == 7.0
    bench.clock.advance(7.0)
    bench.settle(lane)
    assert exporter.attempts == 3
    assert len(exporter.notes) == 1  # begun once
    assert len(exporter.store.points()) == 1
    assert lane.trouble is None


def test_what_is_refused_is_on_disk_with_its_reason_before_the_batch_counts_as_done(bench: Bench) -> None:
    refusal = Refusal("param", "too long", {"key": "k", "value": "v"})
    exporter = InMemoryExporter(answers=[Rejected((refusal,))])
    lane = bench.lane(exporter)
    put(bench.writer, ParamsLogged(1, {"k": "v"}))
    bench.settle(lane)
    (line,) = bench.letters()
    assert line.pop("time_unix_nano") == bench.clock.time_ns()
    assert line.pop("opened")["attempt_key"] == bench.attempt.key
    assert line == {
        "version": 1,
        "destination": "memory-a",
        "batch": 1,
        "what": "param",
        "reason": "too long",
        "at": {"writer": bench.writer.writer_id, "attempt": bench.attempt.key, "rank": 0},
        "facts": {"key": "k", "value": "v"},
    }
    assert lane.counts == (0, 1)
    bench.writer.log("loss", 1.0, 0)
    bench.settle(lane)
    assert lane.counts == (1, 1)


def test_refused_points_do_not_count_as_delivered(bench: Bench) -> None:
    exporter = InMemoryExporter(answers=[Rejected((Refusal("point", "too old", {"count": 2}),))])
    lane = bench.lane(exporter)
    for i in range(5):
        bench.writer.log("loss", 1.0, i)
    bench.settle(lane)
    assert lane.counts[0] == 3


def test_an_exception_from_an_exporter_is_counted_and_tried_again(bench: Bench) -> None:
    before = guard.counts.get("ship to memory-a", 0)
    exporter = InMemoryExporter(answers=[ValueError("a bug"), Delivered()])
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    assert bench.settle(lane) == 0.5
    assert guard.counts["ship to memory-a"] == before + 1
    bench.clock.advance(0.5)
    bench.settle(lane)
    assert len(exporter.store.points()) == 1


def test_a_destination_that_cannot_be_built_is_said_loudly_and_its_data_waits(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    exporters: list[Any] = [IntegrationUnavailable("pip install tracelet-otel[mlflow]"), InMemoryExporter()]

    def build() -> Exporter:
        made = exporters.pop(0)
        if isinstance(made, Exception):
            raise made
        return made  # type: ignore[no-any-return]

    store_ = exporters[1].store
    lane = bench.lane(build)
    bench.writer.log("loss", 1.0, 0)
    with caplog.at_level(logging.WARNING, "tracelet"):
        delay = bench.settle(lane)
    assert "pip install tracelet-otel[mlflow]" in caplog.text
    bench.clock.advance(delay)
    bench.settle(lane)
    assert len(store_.points()) == 1


def test_opening_is_asked_for_until_it_works_with_what_was_remembered(bench: Bench) -> None:
    exporter = InMemoryExporter(open_answers=[RetryLater("no"), Rejected((Refusal("run", "bad name"),)), Delivered()])
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    for reason in ("no", "bad name"):
        delay = bench.settle(lane)
        assert reason in (lane.trouble or "")
        bench.clock.advance(delay)
    bench.settle(lane)
    assert len(exporter.store.points()) == 1
    lane.close()
    again = InMemoryExporter(exporter.store)
    bench.settle(bench.lane(again))
    assert again.opened[0][1] == {"run_id": "memory-run", "link": "memory://run"}


# ---- heartbeats -----------------------------------------------------------------------------------------------------


def test_a_live_attempt_beats_at_the_start_and_every_thirty_seconds(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    bench.settle(lane)
    bench.clock.advance(29.0)
    bench.settle(lane)
    assert len(exporter.store.beats) == 1
    bench.clock.advance(1.0)
    bench.settle(lane)
    batch, beat = exporter.store.beats[1]
    assert (beat.state, beat.time_unix_nano) == ("RUNNING", bench.clock.time_ns())
    assert beat.last_iteration_unix_nano is not None
    assert batch.parts[0].writer_id == bench.writer.writer_id
    assert len(batch.parts[0].points) == 0
    end(bench.writer)
    bench.settle(lane)
    bench.clock.advance(60.0)
    bench.settle(lane)
    assert len(exporter.store.beats) == 2


def test_a_heartbeat_says_when_the_run_began_that_was_taken_up_again(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    end(bench.writer)
    bench.settle(lane)
    bench.clock.advance(3600.0)
    second = add_attempt(bench.folder, "a", started=bench.attempt.started_unix_nano + 3600 * 10**9)
    open_writer(bench.folder, second).log("loss", 1.0, 0)
    bench.settle(lane)
    batch, beat = exporter.store.beats[-1]
    assert batch.parts[0].opened.attempt_key == second.key
    assert beat.run_started_unix_nano == bench.attempt.started_unix_nano


def test_a_heartbeat_that_fails_holds_up_nothing(bench: Bench) -> None:
    class Beatless(InMemoryExporter):
        def beat(self, batch: object, heartbeat: object) -> None:
            raise OSError("no route")

    exporter = Beatless()
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    bench.settle(lane)
    assert len(exporter.store.points()) == 1


# ---- restarts -------------------------------------------------------------------------------------------------------


def test_a_restart_between_intent_and_answer_sends_the_same_batch_with_its_note(bench: Bench) -> None:
    for i in range(5):
        bench.writer.log("loss", float(i), i)  # within one millisecond: their stamps depend on the state
    store_ = MemoryStore()
    # The answer is lost, although the batch arrived: what comes again has to be equal.
    first = bench.lane(InMemoryExporter(store_, answers=[RetryLater("unclear")], lost=[0]))
    bench.settle(first)
    first.close()
    bench.writer.log("loss", 99.0, 99)  # not in the batch, which is fixed
    again = InMemoryExporter(store_)
    second = bench.lane(again)
    bench.settle(second)
    assert again.notes == [{"number": 1}, None]
    assert store_.unequal == []
    assert store_.arrivals == [1, 1, 2]
    assert [value for _, value, _, _ in store_.points()] == [0.0, 1.0, 2.0, 3.0, 4.0, 99.0]


def test_names_from_before_a_restart_are_known_after_it(bench: Bench) -> None:
    store_ = MemoryStore()
    first = bench.lane(InMemoryExporter(store_))
    bench.writer.log("loss", 1.0, 0)
    bench.settle(first)
    first.close()
    bench.writer.log("loss", 2.0, 1)
    bench.settle(bench.lane(InMemoryExporter(store_)))
    assert [(name, value) for name, value, _, _ in store_.points()] == [("loss", 1.0), ("loss", 2.0)]


def test_a_crash_after_the_dead_letter_writes_it_once(bench: Bench) -> None:
    refused = Rejected((Refusal("param", "no", {"key": "k"}),))
    put(bench.writer, ParamsLogged(1, {"k": "v"}))
    first = bench.lane(InMemoryExporter(answers=[refused]))
    acknowledge, Journal.ack = Journal.ack, _crash  # type: ignore[method-assign]
    try:
        bench.settle(first)
    finally:
        Journal.ack = acknowledge  # type: ignore[method-assign]
    first.close()
    with open(bench.folder / "rejected-memory-a.jsonl", "ab") as file:
        file.write(b'{"torn')
    bench.settle(bench.lane(InMemoryExporter(answers=[refused])))
    lines = (bench.folder / "rejected-memory-a.jsonl").read_bytes().splitlines()
    assert len([line for line in lines if line.endswith(b"}")]) == 1


def test_an_answer_that_could_not_be_written_down_is_written_later_and_nothing_is_sent_again(bench: Bench) -> None:
    exporter = InMemoryExporter(answers=[Rejected((Refusal("param", "no", {"key": "k"}),))])
    put(bench.writer, ParamsLogged(1, {"k": "v"}))
    lane = bench.lane(exporter)
    acknowledge, Journal.ack = Journal.ack, _crash  # type: ignore[method-assign]
    try:
        for _ in range(3):
            bench.clock.advance(bench.settle(lane))
            assert lane.trouble is not None
    finally:
        Journal.ack = acknowledge  # type: ignore[method-assign]
    bench.settle(lane)
    assert lane.trouble is None
    assert exporter.attempts == 1
    assert len(bench.letters()) == 1
    assert lane.counts == (0, 1)


def test_a_dead_letter_that_found_no_room_leaves_no_half_line(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, "a")
    letters.write(1, [Refusal("param", "no", {})], time_unix_nano=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (letters.path.stat().st_size + 10, hard))
        with pytest.raises(OSError, match=r"space|large"):
            letters.write(2, [Refusal("param", "no", {})], time_unix_nano=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    letters.write(2, [Refusal("param", "no", {})], time_unix_nano=3)
    assert [json.loads(line)["batch"] for line in letters.path.read_text().splitlines()] == [1, 2]


def _crash(*_: object, **__: object) -> None:
    raise OSError("the power went")


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_the_end_comes_last_and_holds_what_the_records_add_up_to(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    start(bench.writer)
    put(bench.writer, ParamsLogged(1, {"lr": 1, "seed": 7}))
    put(bench.writer, ParamsLogged(2, {"lr": 2}))
    put(bench.writer, TagsSet(1, {"team": "ml"}))
    put(bench.writer, SpanStarted("00000000000000b1", "00000000000000b0", "train", 5))
    bench.writer.log("loss", 1.0, 0)
    bench.writer.log("loss", 1.0, 1)
    end(bench.writer)
    bench.settle(lane)
    (ended,) = exporter.store.ends()
    assert ended is exporter.store.records()[-1]
    assert (ended.status, ended.newest, ended.error) == ("FINISHED", True, None)
    assert ended.start_unix_nano == bench.attempt.started_unix_nano
    assert ended.params == {"lr": 2, "seed": 7}
    assert ended.tags == {"team": "ml"}
    assert [span.name for span in ended.open_spans] == ["train"]
    last_ms = exporter.store.points()[-1][3] // 1_000_000
    assert ended.series == {bench.writer.writer_id: (("loss", last_ms * 1_000_000),)}
    assert lane.is_done(bench.attempt.key)
    bench.settle(lane)
    assert len(exporter.store.ends()) == 1


def test_a_restart_while_the_end_is_on_its_way_repeats_it_equally(bench: Bench) -> None:
    store_ = MemoryStore()
    bench.writer.log("loss", 1.0, 0)
    child = open_writer(bench.folder, bench.attempt, "child")
    child.log("loss", 2.0, 0)
    end(bench.writer)
    first = bench.lane(InMemoryExporter(store_, answers=[Delivered(), RetryLater("unclear")], lost=[1]))
    bench.settle(first)
    bench.clock.advance(11.0)  # the child lives, and holds the end open no longer
    bench.settle(first)
    assert len(store_.ends()) == 1
    first.close()
    put(child, ParamsLogged(3, {"late": True}))
    second = bench.lane(InMemoryExporter(store_))
    bench.settle(second)
    assert store_.unequal == []
    assert len(store_.ends()) == 1
    assert second.is_done(bench.attempt.key)


def test_a_child_holds_an_end_open_for_ten_seconds_and_its_late_points_still_arrive(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    start(bench.writer)
    child = open_writer(bench.folder, bench.attempt, "child")
    child.log("loss", 1.0, 0)
    end(bench.writer)
    bench.settle(lane)
    bench.clock.advance(9.0)
    bench.settle(lane)
    assert not exporter.store.ends()
    bench.clock.advance(1.5)
    bench.settle(lane)
    assert len(exporter.store.ends()) == 1
    child.log("loss", 2.0, 1)
    bench.settle(lane)
    assert exporter.store.points()[-1][1] == 2.0
    end(child, None)
    bench.settle(lane)
    assert len(exporter.store.ends()) == 1


def test_a_death_without_an_end_is_killed_at_the_time_of_notice(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    bench.settle(lane)
    bench.clock.advance(3.0)
    bench.alive.dead.add(str(bench.writer.writer_id))
    bench.settle(lane)
    (ended,) = exporter.store.ends()
    assert (ended.status, ended.end_unix_nano) == ("KILLED", bench.clock.time_ns())
    manifest = store.read_manifest(bench.folder)
    assert manifest is not None
    assert manifest.attempts[0].ended is not None
    assert manifest.attempts[0].ended["seen_by"] == "death"


def test_a_death_found_later_is_dated_by_the_last_record(bench: Bench) -> None:
    before = time.time_ns()
    for i in range(3000):
        bench.writer.log("loss", 1.0, i)
    after = time.time_ns()
    bench.alive.dead.add(str(bench.writer.writer_id))
    exporter = InMemoryExporter()
    bench.settle(bench.lane(exporter))
    (ended,) = exporter.store.ends()
    assert ended.status == "KILLED"
    assert before < ended.end_unix_nano <= after
    points = exporter.store.points()
    assert ended.end_unix_nano >= points[0][3]


def test_the_manifest_word_on_an_end_stands(bench: Bench) -> None:
    start(bench.writer)
    end(bench.writer, "FINISHED")
    bench.settle(bench.lane(InMemoryExporter()))
    (bench.folder / "journal-memory-a").unlink()  # a destination that comes later hears the same
    manifest = store.read_manifest(bench.folder)
    assert manifest is not None
    kept = {**dict(manifest.attempts[0].ended or {}), "status": "FAILED", "end_unix_nano": 42}
    store.update_manifest(bench.folder, lambda m: m.with_attempt(_with_end(m.attempts[0], kept)))  # type: ignore[union-attr]
    exporter = InMemoryExporter()
    bench.settle(bench.lane(exporter))
    (ended,) = exporter.store.ends()
    assert (ended.status, ended.end_unix_nano) == ("FAILED", 42)


def _with_end(attempt: store.Attempt, ended: dict[str, Any]) -> store.Attempt:
    return dataclasses.replace(attempt, ended=ended)


def test_only_the_newest_attempt_may_set_the_run_status(bench: Bench) -> None:
    exporter = InMemoryExporter()
    newer = add_attempt(bench.folder, "a", started=bench.attempt.started_unix_nano + 1)
    again = open_writer(bench.folder, newer)
    start(bench.writer)
    start(again)
    end(bench.writer, "FAILED")
    lane = bench.lane(exporter)
    bench.settle(lane)
    end(again, "FINISHED")
    bench.settle(lane)
    assert [(ended.status, ended.newest) for ended in exporter.store.ends()] == [("FAILED", False), ("FINISHED", True)]


def launch(bench: Bench, *ranks: int, all_here: bool) -> list[Writer]:
    """The first writers of these ranks of a launch, which the bench's attempt becomes."""
    extra = {"launch": {"world": 4, "restarts": [0], "all_here": all_here, "ranks": {}}}

    def put(manifest: store.Manifest | None) -> store.Manifest:
        assert manifest is not None
        (attempt,) = manifest.attempts
        return manifest.with_attempt(dataclasses.replace(attempt, extra=extra))

    store.update_manifest(bench.folder, put)
    return [rank_of(bench, rank) for rank in ranks]


def rank_of(bench: Bench, rank: int) -> Writer:
    key, started = bench.attempt.key, bench.attempt.started_unix_nano
    writer = open_writer(
        bench.folder, bench.attempt, opened=WriterOpened(started, "first", os.getpid(), rank, key, started, {})
    )
    start(writer)
    return writer


@pytest.mark.parametrize(("rank", "all_here", "speaks"), [(0, False, True), (2, True, True), (2, False, False)])
def test_ranks_beside_rank_0_of_another_machine_set_no_status(
    bench: Bench, rank: int, all_here: bool, speaks: bool
) -> None:
    exporter = InMemoryExporter()
    (writer,) = launch(bench, rank, all_here=all_here)
    end(writer, "FINISHED")
    lane = bench.lane(exporter)
    bench.settle(lane)
    bench.clock.advance(FIRST_RANK_WAIT_S)
    bench.settle(lane)
    assert [ended.newest for ended in exporter.store.ends()] == [speaks]


def test_the_end_waits_for_a_rank_0_that_has_not_begun_and_not_for_good(bench: Bench) -> None:
    exporter = InMemoryExporter()
    (other,) = launch(bench, 1, all_here=True)
    end(other, "FINISHED")
    lane = bench.lane(exporter)
    bench.settle(lane)
    bench.clock.advance(FIRST_RANK_WAIT_S - 1.0)
    bench.settle(lane)
    assert exporter.store.ends() == []
    first = rank_of(bench, 0)
    bench.settle(lane)
    bench.clock.advance(2.0)
    bench.settle(lane)
    assert exporter.store.ends() == []
    end(first, "FAILED")
    bench.settle(lane)
    assert [ended.status for ended in exporter.store.ends()] == ["FAILED"]


def of_rank(bench: Bench, rank: int) -> Writer:
    key, started = bench.attempt.key, bench.attempt.started_unix_nano
    opened = WriterOpened(started + rank, "first", os.getpid(), rank, key, started, {})
    return open_writer(bench.folder, bench.attempt, opened=opened)


def test_each_rank_has_an_end_of_its_own_with_its_own_phases_and_series(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    other = of_rank(bench, 1)
    for writer, name in ((bench.writer, "a"), (other, "b")):
        writer.log(name, 1.0, 0)
        put(writer, SpanStarted(name * 16, "f" * 16, f"phase of {name}", 1))
        put(writer, ParamsLogged(1, {name: 1}))
    bench.settle(lane)
    bench.alive.dead.add(str(other.writer_id))
    bench.settle(lane)
    bench.clock.advance(60.0)
    bench.settle(lane)
    (rank,) = [record for record in exporter.store.records() if isinstance(record, RankEnded)]
    assert (rank.status, rank.start_unix_nano) == ("KILLED", bench.attempt.started_unix_nano + 1)
    assert [phase.name for phase in rank.open_spans] == ["phase of b"]
    assert not exporter.store.ends()
    assert not lane.is_done(bench.attempt.key)
    end(bench.writer)
    bench.settle(lane)
    (run,) = exporter.store.ends()
    assert (run.status, dict(run.params)) == ("FINISHED", {"a": 1, "b": 1})
    assert [phase.name for phase in run.open_spans] == ["phase of a"]
    assert lane.is_done(bench.attempt.key)


def test_a_rank_that_comes_after_the_attempts_end_has_its_end_all_the_same(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    start(bench.writer)
    end(bench.writer)
    bench.settle(lane)
    assert lane.is_done(bench.attempt.key)
    late = of_rank(bench, 3)
    late.log("loss", 1.0, 0)
    bench.settle(lane)
    assert not lane.is_done(bench.attempt.key)
    end(late, "FAILED")
    bench.settle(lane)
    assert [one.status for one in exporter.store.records() if isinstance(one, RankEnded)] == ["FAILED"]
    assert [one.status for one in exporter.store.ends()] == ["FINISHED"]
    manifest = store.read_manifest(bench.folder)
    assert manifest is not None
    (attempt,) = manifest.attempts
    assert attempt.ended is not None
    assert (attempt.ended["rank"], {rank: one["status"] for rank, one in attempt.ranks_ended.items()}) == (
        0,
        {"3": "FAILED"},
    )


def test_a_rank_0_that_comes_after_anothers_end_speaks_for_the_run(bench: Bench) -> None:
    exporter = InMemoryExporter()
    early = of_rank(bench, 1)
    lane = bench.lane(exporter)
    early.log("loss", 1.0, 0)
    end(early, "FAILED")
    bench.settle(lane)
    assert [(one.status, one.newest) for one in exporter.store.ends()] == [("FAILED", False)]
    zero = of_rank(bench, 0)
    put(zero, ParamsLogged(1, {"lr": 1}))
    end(zero, "FINISHED")
    bench.settle(lane)
    told = [(one.status, one.newest, dict(one.params)) for one in exporter.store.ends()]
    assert told == [("FAILED", False, {}), ("FINISHED", True, {"lr": 1})]
    assert lane.is_done(bench.attempt.key)


def test_a_rank_0_that_comes_after_anothers_end_speaks_alone_where_neither_was_told_yet(bench: Bench) -> None:
    exporter = InMemoryExporter()
    early = of_rank(bench, 1)
    lane = bench.lane(exporter)
    early.log("loss", 1.0, 0)
    end(early, "FAILED")
    bench.site.look()  # decided and written down, while the destination is away
    zero = of_rank(bench, 0)
    zero.log("loss", 1.0, 0)
    end(zero, "FINISHED")
    bench.settle(lane)
    told = {one.status: (one.newest, one.speaks) for one in exporter.store.ends()}
    assert told == {"FINISHED": (True, True), "FAILED": (False, False)}
    assert lane.is_done(bench.attempt.key)


@pytest.mark.parametrize("resumed", [False, True])
def test_where_repeats_show_nothing_leaves_before_the_journal_is_on_the_disk(
    bench: Bench, resumed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shown(InMemoryExporter):
        shows_repeats = True

    def die(*_: object, **__: object) -> None:
        raise OSError("killed")

    memory = MemoryStore()
    start(bench.writer)
    bench.writer.log("loss", 1.0, 0)
    end(bench.writer)
    if resumed:  # an entry that a shipper left which was killed before it had flushed it
        with monkeypatch.context() as broken:
            broken.setattr(Journal, "ack", die)
            killed = bench.lane(InMemoryExporter(memory))
            bench.settle(killed)
            killed.close()
    before = len(memory.arrivals)
    fails = [OSError("no"), OSError("no")]
    seen: list[int] = []

    def sync(journal: Journal) -> None:
        if fails:
            seen.append(len(memory.arrivals) - before)
            raise fails.pop()

    monkeypatch.setattr(Journal, "sync", sync)
    lane = bench.lane(Shown(memory))
    for _ in range(4):
        bench.settle(lane)
        bench.clock.advance(60.0)
    assert seen == [0, 0]
    assert lane.is_done(bench.attempt.key)
    assert memory.unequal == []


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_points_whose_name_is_damaged_go_to_the_dead_letters_and_the_rest_goes_on(bench: Bench) -> None:
    bench.writer.log("good", 1.0, 0)
    bench.writer.log("broken", 2.0, 5)
    bench.writer.log("good", 3.0, 1)
    (frames,) = bench.folder.glob("*.frames")
    frames.write_bytes(frames.read_bytes().replace(b'"broken"', b'"BROKEN"'))
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    end(bench.writer)
    bench.settle(lane)
    assert [(name, value) for name, value, _, _ in exporter.store.points()] == [("good", 1.0), ("good", 3.0)]
    letters = bench.letters()
    assert [line["what"] for line in letters] == ["damage", "point"]
    assert letters[1]["facts"]["value"] == 2.0
    assert letters[1]["facts"]["iteration"] == 5
    assert lane.counts == (2, 2)
    assert [ended.status for ended in exporter.store.ends()] == ["FINISHED"]


def test_points_of_a_writer_whose_opening_is_damaged_are_delivered_by_what_the_manifest_says(bench: Bench) -> None:
    for i in range(3):
        bench.writer.log("loss", float(i), i)
    end(bench.writer, "FAILED")
    (frames,) = bench.folder.glob("*.frames")
    frames.write_bytes(frames.read_bytes().replace(b'"pid"', b'"PID"'))
    bench.alive.dead.add(str(bench.writer.writer_id))
    exporter = InMemoryExporter()
    bench.settle(bench.lane(exporter))
    assert [value for _, value, _, _ in exporter.store.points()] == [0.0, 1.0, 2.0]
    assert [ended.status for ended in exporter.store.ends()] == ["FAILED"]
    resource = exporter.store.in_order()[0].parts[0].opened.resource
    assert resource["service.instance.id"] == ids.instance_id("run", bench.attempt.key, 0)
    assert [line["what"] for line in bench.letters()] == ["damage"]


def test_a_live_writer_whose_opening_is_damaged_is_served_too(bench: Bench) -> None:
    bench.writer.log("loss", 1.0, 0)
    (frames,) = bench.folder.glob("*.frames")
    frames.write_bytes(frames.read_bytes().replace(b'"pid"', b'"PID"'))
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    bench.settle(lane)
    bench.clock.advance(10.0)
    bench.settle(lane)
    assert len(exporter.store.points()) == 1


def test_a_manifest_that_is_damaged_while_the_run_is_shipped_stops_nothing(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    (bench.folder / "manifest.json").write_bytes(b"{")
    end(bench.writer)
    bench.settle(lane)
    assert len(exporter.store.points()) == 1
    assert [ended.status for ended in exporter.store.ends()] == ["FINISHED"]


def test_frames_of_a_newer_version_are_named_and_wait_and_the_run_is_not_taken_for_delivered(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.writer.log("loss", 1.0, 0)
    end(bench.writer)
    (frames,) = bench.folder.glob("*.frames")
    data = bytearray(frames.read_bytes())
    data[8:12] = (2).to_bytes(4, "little")
    data[32:36] = zlib.crc32(data[:32]).to_bytes(4, "little")
    frames.write_bytes(data)
    made = shipment(bench.folder, {"a": InMemoryExporter()}, bench.alive)
    made.tick()
    assert not made.is_complete()
    assert "has format 2, this tracelet reads 1" in caplog.text
    outcome = made.close()
    assert not outcome.complete
    assert "doesn't know" in outcome.reasons["memory-a"]


def test_a_deleted_folder_is_no_news_for_a_shipper_that_is_leaving(bench: Bench) -> None:
    bench.writer.log("loss", 1.0, 0)
    made = shipment(bench.folder, {"a": InMemoryExporter()}, bench.alive)
    made.tick()
    assert not made.site.has_news()
    made.close()
    shutil.rmtree(bench.folder)
    assert not made.site.has_news()  # it would take the lock again, find nothing, leave, and so on for ever


def test_a_writer_that_was_taken_for_dead_and_lives_is_not_sealed(bench: Bench) -> None:
    asked: list[str] = []

    def alive(name: str) -> bool:
        asked.append(name)
        return len(asked) > 1  # the first answer came too early

    bench.writer.log("loss", 1.0, 0)
    made = shipment(bench.folder, {"a": InMemoryExporter()}, alive)
    made.tick()
    assert not made.site.deaths.is_dead(asked[0])
    made.close()
    assert not list(bench.folder.glob("*.seal"))


def test_a_writer_that_was_taken_for_dead_and_lives_is_read_on(bench: Bench) -> None:
    exporter = InMemoryExporter()
    lane = bench.lane(exporter)
    bench.writer.log("loss", 1.0, 0)
    name = str(bench.writer.writer_id)
    bench.alive.dead.add(name)
    bench.settle(lane)
    bench.alive.dead.discard(name)
    assert not bench.site.deaths.is_surely_dead(name)
    bench.writer.log("loss", 2.0, 1)
    bench.settle(lane)
    assert len(exporter.store.points()) == 2


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it has no words")


@pytest.mark.parametrize(
    "raised", [SystemExit(3), GeneratorExit(), Wordless()], ids=["SystemExit", "GeneratorExit", "wordless"]
)
def test_nothing_that_an_exporter_raises_ends_the_thread_of_its_destination(
    bench: Bench, raised: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "strict", False)
    exporter = InMemoryExporter(answers=[raised, Delivered()])
    bench.writer.log("loss", 1.0, 0)
    made = shipment(bench.folder, {"a": exporter})
    made.tick()
    until(lambda: made.lanes["memory-a"].counts == (1, 0))
    made.close()
    assert len(exporter.store.points()) == 1
