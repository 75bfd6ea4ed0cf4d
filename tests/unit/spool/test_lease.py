"""Locks of this very process: asked for, looked at and taken twice, they stay what they are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from tests.unit.spool.pens import end, pen
from tracelet.shipper.deaths import lock_holder
from tracelet.spool.lease import ShipperLock, WriterLock, is_alive, lock_name, shipper_alive

ASK = "import pathlib, sys; from tracelet.spool.lease import _holder; print(_holder(pathlib.Path(sys.argv[1])))"


def as_others_see(path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_a_look_at_a_writer_of_this_process_does_not_drop_its_lock(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    writer.log("a", 1.0, 1)
    name = str(writer.writer_id)
    assert is_alive(tmp_path, name)
    assert lock_holder(tmp_path / lock_name(name)) == os.getpid()
    assert as_others_see(tmp_path / lock_name(name)) == str(os.getpid())
    end(writer)
    assert not is_alive(tmp_path, name)
    assert as_others_see(tmp_path / lock_name(name)) == "None"


def test_the_shippers_lock_is_not_given_twice_to_one_process(tmp_path: Path) -> None:
    first, second = ShipperLock(tmp_path), ShipperLock(tmp_path)
    assert first.acquire()
    assert not second.acquire()
    assert shipper_alive(tmp_path) == os.getpid()
    second.release()
    assert as_others_see(tmp_path / "shipper.lock") == str(os.getpid())
    first.release()
    assert second.acquire()
    second.release()
    assert shipper_alive(tmp_path) is None


def test_of_many_threads_that_ask_at_once_one_has_the_lock(tmp_path: Path) -> None:
    for _ in range(50):
        locks = [ShipperLock(tmp_path) for _ in range(8)]
        together, taken = threading.Barrier(len(locks)), []

        def ask(lock: ShipperLock, together: threading.Barrier = together, taken: list[ShipperLock] = taken) -> None:
            together.wait(30)
            if lock.acquire():
                taken.append(lock)

        threads = [threading.Thread(target=ask, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(taken) == 1
        taken[0].release()


def test_a_forked_child_holds_none_of_its_parents_locks(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path, "00000000000000aa")
    lock.appear()
    pid = os.fork()
    if pid == 0:  # what it says of it is the kernel's word: its parent's
        found = lock_holder(lock.path)
        os._exit(0 if found == os.getppid() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert as_others_see(lock.path) == str(os.getpid())
    lock.release()


def test_a_lock_of_a_folder_that_was_deleted_and_made_anew_is_another_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    old, new = ShipperLock(folder), ShipperLock(folder)
    assert old.acquire()
    os.unlink(folder / "shipper.lock")
    assert new.acquire()
    old.release()
    assert as_others_see(folder / "shipper.lock") == str(os.getpid())
    new.release()
