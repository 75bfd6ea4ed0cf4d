"""The lease of a folder's shipper, as another host sees it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tests.sinks import until
from tracelet.spool import home, store
from tracelet.spool.home import Beat, Watch, is_here, is_of_an_earlier_boot, read_lease

HERE = store.Manifest("run", "project", "experiment", "a run")


class Hands:
    """A clock that goes when it is pushed."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_that_is_renewed_is_never_missed_and_one_that_stands_still_is(tmp_path: Path) -> None:
    there, here = Hands(), Hands()
    beat = Beat(tmp_path, clock=there)
    beat.renew()
    watch = Watch(tmp_path, clock=here)
    for _ in range(20):
        there.now += home.RENEW_S
        here.now += home.RENEW_S * 2.9  # however badly the two clocks agree
        beat.renew()
        assert not watch.is_missed()
    here.now += home.MISSED_S - 0.1
    assert not watch.is_missed()
    here.now += 0.2
    assert watch.is_missed()
    there.now += home.RENEW_S
    beat.renew()
    assert not watch.is_missed()  # it speaks again


def test_a_lease_is_written_no_more_often_than_promised(tmp_path: Path) -> None:
    clock = Hands()
    beat = Beat(tmp_path, clock=clock)
    for _ in range(50):
        beat.renew()
        clock.now += home.RENEW_S / 10
    lease = read_lease(tmp_path)
    assert lease is not None
    assert lease.beat == 5
    assert lease.host == store.host_name()


def test_the_next_shippers_lease_is_another_one(tmp_path: Path) -> None:
    Beat(tmp_path).renew()
    first = read_lease(tmp_path)
    Beat(tmp_path).renew()
    assert read_lease(tmp_path) != first


def test_silence_after_an_orderly_leave_says_nothing(tmp_path: Path) -> None:
    clock, beat = Hands(), Beat(tmp_path)
    beat.renew()
    watch = Watch(tmp_path, clock=clock)
    beat.withdraw()
    clock.now += 10 * home.MISSED_S
    assert not watch.is_missed()
    assert read_lease(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_damaged_lease_is_none(tmp_path: Path) -> None:
    for text in (b"", b"{", b"[]", b'{"holder": "a"}', b'{"holder": "a", "beat": "x"}', b"\xff\xfe"):
        (tmp_path / home.LEASE).write_bytes(text)
        assert read_lease(tmp_path) is None


def test_whose_a_folder_is() -> None:
    assert is_here(HERE)
    assert is_here(dataclasses.replace(HERE, host="another-container"))  # of this machine: the same kernel
    other = dataclasses.replace(HERE, host="node7", boot_id="0123456789ab")
    assert not is_here(other)
    assert not is_of_an_earlier_boot(other)
    before = dataclasses.replace(HERE, boot_id="0123456789ab")
    assert not is_here(before)
    assert is_of_an_earlier_boot(before)
    nameless = dataclasses.replace(HERE, host="localhost", boot_id="0123456789ab")
    assert not is_of_an_earlier_boot(nameless)  # half of the world has that name


def test_a_shipper_at_home_keeps_a_lease_and_takes_it_back(tmp_path: Path) -> None:
    import threading

    from tests.shipping import add_attempt, end, open_writer, shipment
    from tests.shipping import start as begin
    from tracelet.testing import InMemoryExporter

    folder = store.make_folder(tmp_path / "run" / "host-boot")
    writer = open_writer(folder, add_attempt(folder, "a"))
    begin(writer)
    running, stop = shipment(folder, {"a": InMemoryExporter()}), threading.Event()
    thread = threading.Thread(target=lambda: running.run(follow=True, stop=stop), daemon=True)
    thread.start()
    until(lambda: read_lease(folder) is not None)
    end(writer)
    thread.join(20)
    assert running.close().complete
    assert read_lease(folder) is None
