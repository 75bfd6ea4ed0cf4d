"""A whole folder on its way: lanes in their threads, the look-out, the housekeeping, and when a shipper leaves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.shipping import Alive, add_attempt, destination, end, open_writer, put, ship, shipment, start, until
from tracelet.records import ArtifactLogged, Batch, FlushAsked
from tracelet.shipper import inprocess, process
from tracelet.shipper.shipment import Shipment
from tracelet.spool import store
from tracelet.spool.cursor import Progress
from tracelet.spool.lease import ShipperLock
from tracelet.testing import Delivered, InMemoryExporter, MemoryStore, Refusal, Rejected, RetryLater


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return store.make_folder(tmp_path / "run" / "host-boot")


@contextmanager
def running(made: Shipment) -> Iterator[threading.Event]:
    """Run the shipment in a thread, as its process does."""
    stop = threading.Event()
    thread = threading.Thread(target=lambda: made.run(follow=True, stop=stop))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        made.wake()
        thread.join()
        made.close()


def wait_for(seconds: float) -> None:
    """Let a destination be slow."""
    threading.Event().wait(seconds)


# ---- delivery -------------------------------------------------------------------------------------------------------


def test_every_destination_gets_every_point_once_in_order(folder: Path) -> None:
    attempt = add_attempt(folder, "a", "b")
    writer = open_writer(folder, attempt, slots_per_segment=1024)
    start(writer)
    for i in range(10_000):
        writer.log(f"m{i % 10}", float(i), i)
    end(writer)
    exporters = {"a": InMemoryExporter(max_points=997), "b": InMemoryExporter(max_points=16_000, rising_limit_s=None)}
    outcome = ship(folder, exporters)
    assert outcome.complete
    assert outcome.delivered == {"memory-a": 10_000, "memory-b": 10_000}
    assert outcome.left == {"memory-a": 0, "memory-b": 0}
    for exporter in exporters.values():
        assert [(v, i) for _, v, i, _ in exporter.store.points()] == [(float(i), i) for i in range(10_000)]
        assert len(exporter.store.ends()) == 1
        assert exporter.closed


def test_one_destinations_trouble_delays_no_other(folder: Path) -> None:
    attempt = add_attempt(folder, "down", "slow", "well")
    writer = open_writer(folder, attempt)
    gate = threading.Event()

    def slow(batch: Batch) -> Delivered:
        assert gate.wait(20)
        return Delivered()

    exporters = {
        "down": InMemoryExporter(answers=[RetryLater("outage", after_s=3600.0)]),
        "slow": InMemoryExporter(answers=[slow]),
        "well": InMemoryExporter(),
    }
    made = shipment(folder, exporters)
    with running(made):
        for i in range(500):
            writer.log("loss", float(i), i)
        until(lambda: len(exporters["well"].store.points()) == 500)
        end(writer)
        (ended,) = until(exporters["well"].store.ends)
        assert ended.status == "FINISHED"
        assert not exporters["slow"].store.batches
        gate.set()
        until(exporters["slow"].store.ends)
        assert not made.is_complete()
    outcome = made.outcome()
    assert outcome.left["memory-down"] > 500
    assert outcome.reasons == {"memory-down": "outage"}
    assert not outcome.complete


def test_a_flush_is_delivered_within_a_tenth_of_a_second_while_training_logs(folder: Path) -> None:
    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt)
    exporter = InMemoryExporter(linger_s=10.0)
    with running(shipment(folder, {"a": exporter})):
        writer.log("loss", 0.0, 0)
        put(writer, FlushAsked(time.time_ns()))
        until(exporter.store.points)
        progress, waits = Progress(folder), []
        for i in range(10):
            writer.log("loss", 0.0, i)
            put(writer, FlushAsked(time.time_ns()))
            (head,), asked = writer.heads(), time.monotonic()

            def reached(head: Any = head) -> bool:
                progress.refresh()
                return progress.reached(head)

            until(reached)
            waits.append(time.monotonic() - asked)
    # Generous: the machine is shared. What is claimed is that nothing waits for the linger of ten seconds.
    assert sorted(waits)[5] < 1.0


def test_the_run_again_is_taken_up_by_the_shipper_that_is_still_there(folder: Path) -> None:
    first = add_attempt(folder, "a")
    writer = open_writer(folder, first)
    writer.log("loss", 1.0, 0)
    exporters = {"a": InMemoryExporter(), "b": InMemoryExporter()}
    made = shipment(folder, exporters)
    with running(made):
        until(exporters["a"].store.points)
        second = add_attempt(folder, "a", "b", started=first.started_unix_nano + 1)
        again = open_writer(folder, second)
        again.log("loss", 2.0, 1)
        end(writer, "FAILED")
        end(again)
        until(lambda: len(exporters["a"].store.ends()) == 2)
        until(lambda: len(exporters["b"].store.ends()) == 2)  # a destination of any attempt has the whole run
    assert {ended.status: ended.newest for ended in exporters["a"].store.ends()} == {"FAILED": False, "FINISHED": True}
    assert [v for _, v, _, _ in exporters["b"].store.points()] == [1.0, 2.0]


# ---- when a shipper leaves ------------------------------------------------------------------------------------------


def test_a_shipper_that_gets_nowhere_after_the_runs_end_leaves_the_rest(folder: Path) -> None:
    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt)
    writer.log("loss", 1.0, 0)
    end(writer)
    exporter = InMemoryExporter(answers=[RetryLater("no such host", after_s=0.01)] * 100_000)
    outcome = ship(folder, {"a": exporter}, give_up_s=0.3)
    assert not outcome.complete
    assert outcome.reasons == {"memory-a": "no such host"}
    assert exporter.attempts > 3


def test_a_writer_that_comes_when_the_lock_is_free_is_news(folder: Path) -> None:
    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt)
    writer.log("loss", 1.0, 0)
    end(writer)
    made = shipment(folder, {"a": InMemoryExporter()})
    made.run(follow=True, stop=threading.Event(), timeout_s=20.0)
    assert not made.site.has_news()
    again = add_attempt(folder, "a")
    assert made.site.has_news()
    made.tick()
    assert not made.site.has_news()
    open_writer(folder, again).log("loss", 1.0, 0)
    assert made.site.has_news()
    made.close()


def test_a_dead_run_without_an_end_in_the_manifest_is_ended_by_a_later_shipper(folder: Path) -> None:
    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt)
    writer.log("loss", 1.0, 0)
    alive = Alive()
    alive.dead.add(str(writer.writer_id))
    exporter = InMemoryExporter()
    assert ship(folder, {"a": exporter}, alive).complete
    assert [ended.status for ended in exporter.store.ends()] == ["KILLED"]


# ---- ship(): what `tracelet ship` calls -----------------------------------------------------------------------------


def off_run(folder: Path, *names: str) -> Any:
    """A run with TRACELET_SHIPPER=off that has ended."""
    attempt = add_attempt(folder, *names)
    writer = open_writer(folder, attempt)
    for i in range(100):
        writer.log("loss", float(i), i)
    end(writer)
    return attempt


def test_ship_drains_a_run_that_no_shipper_serves_and_returns(folder: Path) -> None:
    off_run(folder, "a")
    exporter = InMemoryExporter(linger_s=1e9)
    outcome = process.ship(folder, build=lambda *_: exporter)
    assert outcome.complete
    assert outcome.delivered == {"memory-a": 100}
    assert len(exporter.store.ends()) == 1
    assert ShipperLock(folder).acquire()


def test_ship_gives_a_run_without_destinations_those_of_its_caller(folder: Path) -> None:
    off_run(folder)
    exporter = InMemoryExporter()
    outcome = process.ship(folder, destinations=[destination("mine")], build=lambda *_: exporter)
    assert outcome.delivered == {"memory-mine": 100}
    manifest = store.read_manifest(folder)
    assert manifest is not None
    assert list(manifest.destinations) == ["memory-mine"]  # so that every later reader knows where it went


def test_ship_of_a_run_without_any_destination_touches_nothing(folder: Path) -> None:
    off_run(folder)
    assert process.ship(folder).delivered == {}
    assert not list(folder.glob("delivered/*"))
    assert list(folder.glob("*.frames"))


def test_ship_leaves_a_folder_to_the_shipper_that_has_it(folder: Path) -> None:
    off_run(folder, "a")
    code = (
        "import sys, pathlib; from tracelet.spool.lease import ShipperLock; l = ShipperLock(pathlib.Path(sys.argv[1]));"
        " print(l.acquire(), flush=True); sys.stdin.read()"
    )
    import subprocess
    import sys

    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        outcome = process.ship(folder, build=lambda *_: InMemoryExporter())
        assert outcome.joined
        assert not outcome.complete
        other.communicate("")


def test_ship_returns_when_its_time_is_over_and_says_why_something_is_left(folder: Path) -> None:
    off_run(folder, "a")
    exporter = InMemoryExporter(answers=[RetryLater("closed for lunch")] * 100)
    outcome = process.ship(folder, timeout_s=0.3, build=lambda *_: exporter)
    assert not outcome.complete
    assert outcome.left["memory-a"] > 100
    assert outcome.reasons == {"memory-a": "closed for lunch"}


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_what_all_destinations_passed_moves_to_delivered_and_nothing_before(folder: Path) -> None:
    attempt = add_attempt(folder, "a", "late")
    writer = open_writer(folder, attempt, slots_per_segment=128)
    late = InMemoryExporter(answers=[RetryLater("later", after_s=0.05)] * 40)
    made = shipment(folder, {"a": InMemoryExporter(), "late": late})
    with running(made):
        for i in range(1000):
            writer.log("loss", float(i), i)
        until(lambda: len(list(folder.glob("*.seal"))) >= 5)
        assert not list(folder.glob("delivered/*.points"))
        until(lambda: len(late.store.points()) == 1000)
        until(lambda: len(list(folder.glob("delivered/*.points"))) >= 5)
        assert len(list(folder.glob(f"{writer.writer_id}*.points"))) == 1  # the one that is written to


def test_a_finished_run_leaves_its_folder_tidy_and_readable(folder: Path) -> None:
    off_run(folder, "a")
    process.ship(folder, build=lambda *_: InMemoryExporter())
    assert not list(folder.glob("*.points"))
    assert not list(folder.glob("*.frames"))
    assert len(list(folder.glob("delivered/*.points"))) == 1
    again = InMemoryExporter()
    (folder / "journal-memory-a").unlink()
    process.ship(folder, build=lambda *_: again)  # what was delivered can still be read
    assert len(again.store.points()) == 100


def artifact(folder: Path, name: str) -> ArtifactLogged:
    stored = folder / "artifacts" / name
    stored.parent.mkdir(exist_ok=True)
    stored.write_bytes(b"model")
    return ArtifactLogged(time.time_ns(), name, f"/x/{name}", f"artifacts/{name}", 5, None, "text/plain")


def test_copies_of_artifacts_go_when_the_last_destination_has_them(folder: Path) -> None:
    attempt = add_attempt(folder, "a", "b")
    writer = open_writer(folder, attempt)
    put(writer, artifact(folder, "one"))
    gate = threading.Event()

    def slow(batch: Batch) -> Delivered:
        assert gate.wait(20)
        return Delivered()

    first, second = InMemoryExporter(), InMemoryExporter(answers=[slow])
    with running(shipment(folder, {"a": first, "b": second})):
        until(first.store.records)
        assert (folder / "artifacts/one").exists()
        gate.set()
        until(lambda: not (folder / "artifacts/one").exists())


def test_the_copy_of_a_refused_artifact_stays(folder: Path) -> None:
    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt)
    put(writer, artifact(folder, "refused"))
    end(writer)
    refusal = Refusal("artifact", "too large", {"stored": "artifacts/refused"})
    process.ship(folder, build=lambda *_: InMemoryExporter(answers=[Rejected((refusal,))]))
    assert (folder / "artifacts/refused").read_bytes() == b"model"


def test_spares_lie_ready_while_a_writer_that_may_roll_is_alive_and_no_longer(folder: Path) -> None:
    attempt = add_attempt(folder, "a")
    writer = open_writer(folder, attempt)
    made = shipment(folder, {"a": InMemoryExporter(max_points=16_000)})
    with running(made):
        for i in range(5000):
            writer.log("loss", float(i), i)
        until(lambda: list(folder.glob("spare-*.points")))
        end(writer)
        until(made.is_complete)
        made.tidy()
        assert not list(folder.glob("spare-*.points"))


# ---- in the training process ----------------------------------------------------------------------------------------


def test_an_in_process_destination_is_served_here_and_left_alone_by_the_shipper_process(folder: Path) -> None:
    here = {**destination("here"), "in_process": True}
    attempt = add_attempt(folder, "there")
    store.update_manifest(folder, lambda m: m.with_attempt(_with(m.attempts[0], here)))  # type: ignore[union-attr]
    writer = open_writer(folder, attempt)
    exporter, memory = InMemoryExporter(), MemoryStore()
    handle = inprocess.start(folder, [here], {}, {}, build=lambda *_: exporter)
    writer.log("loss", 1.0, 0)
    until(exporter.store.points)
    end(writer, "FINISHED", "exit")
    started = time.monotonic()
    handle.stop(20.0)
    assert time.monotonic() - started < 10.0  # it left because all was delivered
    assert [ended.status for ended in exporter.store.ends()] == ["FINISHED"]
    manifest = store.read_manifest(folder)
    assert manifest is not None
    assert manifest.attempts[0].ended is None  # whether the exit was a good one is for the shipper process to see
    asked: list[str] = []

    def build(known: Any, secrets: object, environ: object) -> InMemoryExporter:
        asked.append(known["id"])
        return InMemoryExporter(memory)

    assert process.ship(folder, build=build).complete
    assert asked == ["memory-there"]


def _with(attempt: store.Attempt, extra: Any) -> store.Attempt:
    import dataclasses

    return dataclasses.replace(attempt, destinations=(*attempt.destinations, extra))


def test_what_exporters_send_is_not_traced_by_the_programs_instrumentations() -> None:
    from opentelemetry import context

    assert context.get_value(context._SUPPRESS_INSTRUMENTATION_KEY) is None
    with process.suppress_instrumentation():
        assert context.get_value(context._SUPPRESS_INSTRUMENTATION_KEY) is True
    assert context.get_value(context._SUPPRESS_INSTRUMENTATION_KEY) is None


def test_secrets_are_one_line_on_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> dict[str, Any]:
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        saved = os.dup(0)
        os.dup2(reading, 0)
        os.close(reading)
        with os.fdopen(0, closefd=False) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            try:
                return process._read_secrets()
            finally:
                os.dup2(saved, 0)
                os.close(saved)

    assert read(b'{"otlp-1": {"headers": {"x": "y"}}}\n') == {"otlp-1": {"headers": {"x": "y"}}}
    assert read(b"") == {}
    assert read(b"not json\n") == {}


def test_a_journal_of_an_unknown_version_stops_its_destination_and_no_other(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    off_run(folder, "a", "b")
    journal = folder / "journal-memory-a"
    from tracelet.spool.journal import line

    journal.write_bytes(line("journal", {"format": 99, "destination": "memory-a"}))
    exporter = InMemoryExporter()
    outcome = process.ship(folder, timeout_s=1.0, build=lambda *_: exporter)
    assert len(exporter.store.points()) == 100
    assert list(outcome.delivered) == ["memory-b"]
    assert list(outcome.reasons) == ["memory-a"]
    assert "format 99" in caplog.text
    assert not list(folder.glob("delivered/*.points"))  # it is not delivered as long as one destination wants it
