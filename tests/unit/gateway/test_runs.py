"""One run's folder as its shipper sees it, whenever it looks: also in the middle of a step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arrivals import Memory, arrival
from tests.shipping import START_NS, destination, until
from tracelet.gateway.runs import RunSpool, Terms
from tracelet.otlp.arrival import Piece
from tracelet.otlp.decode_events import whole
from tracelet.records import StateNoted
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.shipment import Shipment
from tracelet.spool.files import FileSet
from tracelet.spool.reader import SpoolReader


class Watched:
    """A run's folder and a shipment of it, which looks when it is told to: in `seen`, as soon as files appear."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.memory = Memory()
        self.terms = Terms(root, (destination("mlflow"),), lambda size: None, Piece, whole, sync=False)
        self.run = RunSpool(self.terms, arrival().run, "")
        self.run.keep(arrival(points=[("a", 0.0, 0)]))
        deaths = Deaths(self.run.folder, is_alive=lambda writer: writer in self.run.writers(), every_s=0.0)
        build = self.memory.build
        self.shipment = Shipment(self.run.folder, self.run.manifest, environ={}, secrets={}, build=build, deaths=deaths)
        self.shipment.tick()
        appear = FileSet.appear

        def appear_and_be_seen(files: FileSet) -> None:
            appear(files)
            self.shipment.nudge()  # the shipper may look at any moment: now

        patch.setattr(FileSet, "appear", appear_and_be_seen)

    def arrive(self, count: int) -> None:
        """Wait until so many points have arrived."""

        def there() -> bool:
            self.shipment.nudge()
            return len(self.memory.points("run-1")) == count

        until(there)

    def close(self) -> None:
        self.shipment.close()
        self.run.close()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    made = Watched(tmp_path, monkeypatch)
    yield made
    made.close()


def test_a_writer_that_is_seen_the_moment_it_appears_is_alive_and_all_it_writes_arrives(watched: Watched) -> None:
    run = watched.run
    for number in range(20):
        run.keep(arrival(rank=1, points=[("b", float(number), number)], first=START_NS + number * 10**9))
        watched.arrive(number + 2)
    assert not list(run.folder.glob("*.seal"))
    assert not any(watched.shipment.site.deaths.is_dead(writer) for writer in run.writers())


def test_a_writer_opened_for_the_note_that_a_run_is_lost_is_alive_when_it_is_seen(watched: Watched) -> None:
    run = watched.run
    run.flush()
    assert run.close_quiet(0.0, time.monotonic())
    assert run.note_lost()
    run.keep(arrival(points=[("b", 1.0, 1)], first=START_NS + 10**9))
    watched.arrive(2)
    assert [note.state for note in watched.memory.records("run-1", StateNoted)] == ["LOST", "RUNNING"]


def test_files_that_could_not_appear_are_nobodys_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = Terms(tmp_path, (destination("mlflow"),), lambda size: None, Piece, whole, sync=False)
    run = RunSpool(terms, arrival().run, "")
    appear = FileSet.appear

    def fail(files: FileSet) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileSet, "appear", fail)
    with pytest.raises(OSError, match="No space"):
        run.keep(arrival(points=[("a", 1.0, 1)]))
    assert run.writers() == frozenset()
    assert [path.name for path in run.folder.iterdir() if path.suffix in (".points", ".frames", ".lock")] == [
        "manifest.lock"
    ]
    monkeypatch.setattr(FileSet, "appear", appear)
    assert run.keep(arrival(points=[("a", 1.0, 1)])).points == 1
    assert SpoolReader(run.folder).writers() == tuple(run.writers())
    run.close()


@pytest.mark.parametrize("at", ["to_sync", "fdatasync"])
@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("bug")])
def test_what_a_flush_did_not_bring_to_the_disk_is_stored_again_and_flushed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: Exception
) -> None:
    terms = Terms(tmp_path, (destination("mlflow"),), lambda size: None, Piece, whole, sync=True)
    run = RunSpool(terms, arrival().run, "")
    one = arrival(points=[("a", 1.0, 1)])
    run.keep(one)

    def fail(*_: object) -> None:
        raise error

    synced: list[int] = []
    fdatasync = os.fdatasync
    with monkeypatch.context() as patch:
        patch.setattr(*((FileSet, "to_sync") if at == "to_sync" else (os, "fdatasync")), fail)
        with pytest.raises(type(error)):
            run.flush()
    assert not run.keep(one).repeat
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), fdatasync(fd)))
    run.flush()
    assert len(synced) == 2  # frames and slots
    assert run.keep(one).repeat
    run.close()
