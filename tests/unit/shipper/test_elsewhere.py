"""What is known of another host's writers, on a clock that stands still: alive, silent, gone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.shipping import add_attempt, destination, open_writer, start
from tracelet.records import StateNoted
from tracelet.shipper.deaths import Deaths
from tracelet.shipper.elsewhere import Elsewhere
from tracelet.shipper.loop import Lane
from tracelet.shipper.site import Site
from tracelet.spool import home, store
from tracelet.testing import InMemoryExporter, ManualClock

NOBODY = "0" * 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run whose first attempt has begun."""
    made = tmp_path / "run" / "node7-boot"
    writer = open_writer(made, add_attempt(made, "a"))
    start(writer)
    return made


def there(folder: Path, clock: ManualClock) -> Elsewhere:
    manifest = store.read_manifest(folder)
    assert manifest is not None
    return Elsewhere(folder, manifest, clock=clock.monotonic)


def written(folder: Path, seconds_ago: float) -> None:
    then = time.time() - seconds_ago
    for path in (*folder.glob("*.points"), *folder.glob("*.frames")):
        os.utime(path, (then, then))


def test_a_lease_is_silent_when_one_was_missed_and_its_writers_gone_after_three(folder: Path) -> None:
    clock = ManualClock()
    beat = home.Beat(folder, clock=clock.monotonic)
    beat.renew()
    elsewhere = there(folder, clock)
    told = []
    for _ in range(3):
        clock.advance(10.0)
        told.append((elsewhere.is_silent([NOBODY]), elsewhere.is_alive(NOBODY)))
    assert told == [(False, True), (True, True), (True, False)]
    beat.renew()
    assert (elsewhere.is_silent([NOBODY]), elsewhere.is_alive(NOBODY)) == (False, True)


def test_without_a_lease_an_hour_without_a_record_is_silence_and_the_next_one_ends_it(folder: Path) -> None:
    clock = ManualClock()
    written(folder, 600.0)
    elsewhere = there(folder, clock)
    clock.advance(2990.0)
    assert not elsewhere.is_silent([NOBODY])
    clock.advance(20.0)
    assert elsewhere.is_silent([NOBODY])
    assert elsewhere.is_alive(NOBODY)  # silence is no end
    written(folder, 0.0)
    assert not elsewhere.is_silent([NOBODY])
    assert there(folder, clock).is_silent([NOBODY]) is False
    written(folder, 4000.0)
    assert there(folder, clock).is_silent([NOBODY])


def test_a_file_that_is_delivered_and_moved_is_no_sign_of_life(folder: Path) -> None:
    clock = ManualClock()
    written(folder, 4000.0)
    done = folder / f"{NOBODY}-000001.points"
    done.write_bytes(b"")
    then = time.time() - 3700.0
    os.utime(done, (then, then))
    elsewhere = there(folder, clock)
    assert elsewhere.is_silent([NOBODY])
    done.unlink()
    assert elsewhere.is_silent([NOBODY])


class Bench:
    """A folder whose silence a test decides, and lanes that it steps by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.silent = folder, ManualClock(), False
        self.exporter = InMemoryExporter()

    def lane(self) -> Lane:
        manifest = store.read_manifest(self.folder)
        assert manifest is not None
        deaths = Deaths(
            self.folder, is_alive=lambda writer: True, every_s=0.0, clock=self.clock.monotonic, from_elsewhere=True
        )
        self.site = Site(self.folder, manifest, deaths, clock=self.clock, silent=lambda writers: self.silent)
        return Lane(self.site, destination("a"), lambda: self.exporter, clock=self.clock)

    def told(self, lane: Lane) -> list[str]:
        """What has been told so far, a good while later."""
        self.clock.advance(60.0)
        for _ in range(20):
            self.site.look()
            if lane.step() > 0:
                break
        return [word.state for word in self.exporter.store.records() if isinstance(word, StateNoted)]


def test_each_change_is_told_once_also_by_the_shipper_that_comes_next(folder: Path) -> None:
    bench = Bench(folder)
    first = bench.lane()
    assert bench.told(first) == []
    bench.silent = True
    assert bench.told(first) == ["LOST"]
    assert bench.told(first) == ["LOST"]
    first.close()
    second = bench.lane()
    assert bench.told(second) == ["LOST"]
    bench.silent = False
    assert bench.told(second) == ["LOST", "RUNNING"]
    bench.silent = True
    assert bench.told(second) == ["LOST", "RUNNING", "LOST"]
    second.close()


def test_an_old_attempt_is_never_lost(folder: Path) -> None:
    later = folder.parent / "node8-boot"
    add_attempt(later, "a")
    bench = Bench(folder)
    bench.silent = True
    lane = bench.lane()
    assert bench.told(lane) == []
    lane.close()


def test_an_attempt_of_another_host_that_nobody_saw_die_sends_no_heartbeat_once_a_newer_one_has_begun(
    folder: Path,
) -> None:
    """Without a lease nothing ever shows that it is dead: its RUNNING would stand beside the end of the newer one."""
    bench = Bench(folder)
    lane = bench.lane()
    bench.told(lane)
    assert len(bench.exporter.store.beats) == 1
    add_attempt(folder, "a")
    bench.site.manifest = store.read_manifest(folder) or bench.site.manifest
    bench.told(lane)
    bench.told(lane)
    assert len(bench.exporter.store.beats) == 1
    lane.close()
