"""The folder as a whole: manifest, what is where, how much, what is deleted; and who is alive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from tests.unit.spool.pens import drain, end, only, pen
from tracelet.errors import SpoolError, SpoolFormatError
from tracelet.spool.disk import _mounts, may_map
from tracelet.spool.lease import ShipperLock, is_alive, shipper_alive
from tracelet.spool.reader import Position
from tracelet.spool.seal import seal_name
from tracelet.spool.store import (
    Attempt,
    Manifest,
    held_manifest,
    list_runs,
    make_spares,
    move_delivered,
    read_manifest,
    remove_run,
    run_folder,
    seal,
    update_manifest,
    usage,
)

ENDED = {"status": "FINISHED", "end_unix_nano": 2}
LAUNCH = {"world": 2, "restarts": [0, 0], "ranks": {"0": 1}}
MANIFEST = Manifest("run-1", "project", "experiment", "name")


def attempt(key: str, started: int = 1, **more: object) -> Attempt:
    return replace(Attempt(key, started, 42, 0), **more)  # type: ignore[arg-type]


# ---- the manifest -----------------------------------------------------------------------------------------------


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert read_manifest(folder) is None
    ended = {"status": "F", "end_unix_nano": 2, "error": {"type": "E", "message": "é", "stacktrace": ""}}
    one = attempt("k", destinations=({"id": "file-1", "kind": "file", "spec": {"path": "/x"}},), ended=ended)
    written = update_manifest(folder, lambda old: MANIFEST.with_attempt(one))
    assert read_manifest(folder) == written == MANIFEST.with_attempt(one)
    assert (folder / "manifest.json").stat().st_mode & 0o777 == 0o600


def test_an_attempt_replaces_the_one_of_its_key(tmp_path: Path) -> None:
    manifest = MANIFEST.with_attempt(attempt("a")).with_attempt(attempt("b", 2))
    ended = manifest.with_attempt(attempt("a", ended={"status": "FINISHED"}))
    assert [one.key for one in ended.attempts] == ["a", "b"]
    found = ended.attempt("a")
    assert found is not None
    assert found.ended == {"status": "FINISHED"}
    assert ended.attempt("c") is None


def test_the_destinations_are_those_of_all_attempts_and_the_newest_word_stands() -> None:
    old = {"id": "x", "kind": "file", "spec": {"path": "/old"}}
    new = {"id": "x", "kind": "file", "spec": {"path": "/new"}}
    other = {"id": "y", "kind": "file", "spec": {}}
    manifest = MANIFEST.with_attempt(attempt("b", 2, destinations=(new,)))
    manifest = manifest.with_attempt(attempt("a", 1, destinations=(old, other)))
    assert manifest.destinations == {"x": new, "y": other}


def test_what_a_newer_minor_version_added_is_kept(tmp_path: Path) -> None:
    update_manifest(tmp_path, lambda old: MANIFEST.with_attempt(attempt("k")))
    path = tmp_path / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["crc32"]  # as for a change by hand
    fields["colour"] = "red"
    fields["attempts"][0]["shape"] = [1]
    path.write_text(json.dumps(fields))
    update_manifest(tmp_path, lambda old: (old or MANIFEST).with_attempt(attempt("l")))
    fields = json.loads(path.read_text())
    assert fields["colour"] == "red"
    assert fields["attempts"][0]["shape"] == [1]
    assert len(fields["attempts"]) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "attempts": 5}', "\xff"])
def test_a_manifest_that_cannot_be_read_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(SpoolFormatError, match="manifest"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version_is_refused_by_name_though_its_copy_is_not(tmp_path: Path) -> None:
    update_manifest(tmp_path, lambda old: MANIFEST)
    fields = json.loads((tmp_path / "manifest.json").read_text())
    fields.pop("crc32")
    (tmp_path / "manifest.json").write_text(json.dumps(fields | {"format": 2}))
    with pytest.raises(SpoolFormatError, match="format 2"):
        read_manifest(tmp_path)


def test_no_damage_to_a_manifest_loses_or_changes_it(tmp_path: Path) -> None:
    one = attempt("k", destinations=({"id": "file-1", "kind": "file", "spec": {"path": "/x"}},))
    written = update_manifest(tmp_path, lambda old: MANIFEST.with_attempt(one))
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        for changed in (
            whole[:at] + bytes((whole[at] ^ 1,)) + whole[at + 1 :],
            whole[:at] + bytes((whole[at] ^ 0x80,)) + whole[at + 1 :],
            whole[:at],
            whole[:at] + bytes(len(whole) - at),
        ):
            path.write_bytes(changed)
            found = read_manifest(tmp_path)
            assert found is not None
            assert replace(found, extra={}) == written  # a damaged *name* of the checksum is one key more
    update_manifest(tmp_path, lambda old: old or MANIFEST)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"run_id": 1},
        {"host": None},
        {"attempts": [1]},
        {"attempts": [{"key": "k", "started_unix_nano": "1", "pid": 1, "rank": 0}]},
        {"attempts": [{"key": "k", "started_unix_nano": 1, "pid": True, "rank": 0}]},
        {"attempts": [{"key": "k", "started_unix_nano": 1, "pid": 1, "rank": 0, "destinations": [{"kind": "file"}]}]},
        {"attempts": [{"key": "k", "started_unix_nano": 1, "pid": 1, "rank": 0, "destinations": ["file"]}]},
        {"attempts": [{"key": "k", "started_unix_nano": 1, "pid": 1, "rank": 0, "ended": {"status": "FAILED"}}]},
        {"attempts": [{"key": "k", "started_unix_nano": 1, "pid": 1, "rank": 0, "ranks_ended": {"one": ENDED}}]},
        {"attempts": [{"key": "k", "started_unix_nano": 1, "pid": 1, "rank": 0, "launch": LAUNCH | {"agents": []}}]},
        {
            "attempts": [
                {"key": "k", "started_unix_nano": 1, "pid": 1, "rank": 0, "launch": LAUNCH | {"agents": {"a": 1}}}
            ]
        },
        {
            "attempts": [
                {
                    "key": "k",
                    "started_unix_nano": 1,
                    "pid": 1,
                    "rank": 0,
                    "destinations": [{"id": "../x", "kind": "file"}],
                }
            ]
        },
    ],
)
def test_a_manifest_with_a_field_of_another_type_is_refused_by_name(tmp_path: Path, wrong: dict[str, object]) -> None:
    fields = {"format": 1, "run_id": "r", "project": "p", "experiment_name": "e", "run_name": "n", "attempts": []}
    (tmp_path / "manifest.json").write_text(json.dumps({**fields, **wrong}))
    with pytest.raises(SpoolFormatError, match="manifest"):
        read_manifest(tmp_path)


def test_a_folder_that_cannot_be_used_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SpoolError, match="TRACELET_DIR"):
        update_manifest(tmp_path / "file" / "run", lambda old: MANIFEST)
    with pytest.raises(SpoolError, match="TRACELET_DIR"):
        update_manifest(tmp_path / "deleted", lambda old: MANIFEST, make=False)
    assert not (tmp_path / "deleted").exists()


def test_a_deleted_folder_is_not_made_anew_by_moving_what_is_delivered(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        move_delivered(tmp_path / "deleted", [{}])
    assert not (tmp_path / "deleted").exists()


def test_updates_at_once_all_arrive(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for i in range(10):
            one = attempt(f"{number}-{i}")
            update_manifest(tmp_path, lambda old, one=one: (old or MANIFEST).with_attempt(one))  # type: ignore[misc]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert len(manifest.attempts) == 40


# ---- what is where ----------------------------------------------------------------------------------------------


def test_runs_are_found_with_their_manifests_or_what_is_wrong_with_them(tmp_path: Path) -> None:
    assert list(list_runs(tmp_path / "none")) == []
    for run in ("b", "a", "broken"):
        update_manifest(run_folder(tmp_path, run), lambda old: MANIFEST)
    for path in run_folder(tmp_path, "broken").glob("manifest*.json"):
        path.write_text("{")
    (tmp_path / "empty" / "host").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "died at its start" / "host").mkdir(parents=True)
    (tmp_path / "died at its start" / "host" / "manifest.lock").touch()
    found = list(list_runs(tmp_path))
    assert [run.run_id for run in found] == ["a", "b", "broken"]
    assert found[0].manifest == MANIFEST
    assert found[0].folder == run_folder(tmp_path, "a")
    assert found[2].manifest is None
    assert "can't be read" in str(found[2].problem)
    remove_run(found[0].folder)
    assert not (tmp_path / "a").exists()


def test_usage_counts_all_files_but_the_delivered(tmp_path: Path) -> None:
    assert usage(tmp_path / "none") == 0
    for name, size in (("x", 10), ("artifacts/y", 200), ("delivered/z", 4000)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    assert usage(tmp_path) == 210


def test_spares_are_made_once_and_are_whole(tmp_path: Path) -> None:
    assert make_spares(tmp_path, 100) == 2
    assert make_spares(tmp_path, 100) == 0
    assert {path.stat().st_size for path in tmp_path.glob("spare-*.points")} == {4096 + 3200}


# ---- delivered --------------------------------------------------------------------------------------------------


def sealed(folder: Path) -> str:
    writer = pen(folder, slots_per_segment=64)
    for i in range(200):
        writer.log("a", 1.0, i)
    end(writer)
    name = str(writer.writer_id)
    for number in (1, 2, 3, 4):
        assert seal(folder, name, number, dead=True)
    return name


def test_only_what_every_destination_has_passed_is_moved(tmp_path: Path) -> None:
    name = sealed(tmp_path)
    ahead, behind = {name: Position(4, 0)}, {name: Position(2, 10, ((1, 5),))}
    assert move_delivered(tmp_path, []) == 0
    assert move_delivered(tmp_path, [ahead, {}]) == 0
    assert move_delivered(tmp_path, [ahead, behind]) == 0  # segment 1 has a slot that was in flight
    assert move_delivered(tmp_path, [ahead, {name: Position(2, 10)}]) == 1
    assert move_delivered(tmp_path, [ahead, {name: Position(3, 63)}]) == 1
    assert move_delivered(tmp_path, [ahead, ahead]) == 1
    assert len(list((tmp_path / "delivered").glob("*.points"))) == 3
    assert len(list((tmp_path / "delivered").glob("*.seal"))) == 3
    assert len(only(drain(tmp_path)).points) == 200


def test_frames_of_a_writer_that_has_just_come_are_not_moved_with_those_of_a_run_that_is_over(tmp_path: Path) -> None:
    name = sealed(tmp_path)
    newcomer = pen(tmp_path)
    newcomer.log("loss", 1.0, 0)
    assert move_delivered(tmp_path, [{name: Position(5, 0)}], over=[name]) == 4
    assert [path.name[:16] for path in tmp_path.glob("*.frames")] == [newcomer.writer_id]
    assert [path.name[:16] for path in (tmp_path / "delivered").glob("*.frames")] == [name]


# ---- who is alive -----------------------------------------------------------------------------------------------

CHILD = """
import sys, pathlib
from tests.unit.spool.pens import pen
from tracelet.spool.lease import ShipperLock
folder = pathlib.Path(sys.argv[1])
lock = ShipperLock(folder)
assert lock.acquire() and lock.acquire()
writer = pen(folder)
writer.log("a", 1.0, 1)
print(writer.writer_id, flush=True)
sys.stdin.read()
"""


def test_a_writer_is_alive_until_its_process_dies_and_so_is_a_shipper(tmp_path: Path) -> None:
    assert shipper_alive(tmp_path) is None
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        name = child.stdout.readline().strip()
        for _ in range(3):  # asking takes nothing away
            assert is_alive(tmp_path, name)
            assert shipper_alive(tmp_path) == child.pid
        assert not ShipperLock(tmp_path).acquire()
    finally:
        child.kill()
        child.communicate()
    assert not is_alive(tmp_path, name)
    assert is_alive(tmp_path, name, mine=(name,))
    assert shipper_alive(tmp_path) is None
    lock = ShipperLock(tmp_path)
    assert lock.acquire()
    lock.release()
    lock.release()


# ---- the file system --------------------------------------------------------------------------------------------


def test_mounts_are_read_from_the_kernels_own_table() -> None:
    table = _mounts(
        "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,discard\n"
        "36 35 0:30 / /merged rw master:1 - overlay overlay rw,lowerdir=/l,upperdir=/u\\040x,workdir=/w\n"
        "garbage\n"
    )
    assert table == {
        "254:1": ("ext4", "rw,discard"),
        "0:30": ("overlay", "rw,lowerdir=/l,upperdir=/u\\040x,workdir=/w"),
    }


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs Linux")
def test_kernel_file_systems_are_never_mapped(tmp_path: Path) -> None:
    assert not may_map(Path("/proc"))
    assert not may_map(Path("/sys"))
    assert not may_map(tmp_path / "none")


def test_a_seal_of_another_version_is_named_and_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = pen(tmp_path, slots_per_segment=64)
    for i in range(10):
        writer.log("a", float(i), i)
    end(writer)
    name = str(writer.writer_id)
    assert seal(tmp_path, name, 1, dead=True)
    path = tmp_path / seal_name(name, 1)
    data = bytearray(path.read_bytes())
    data[8] = 2
    data[-4:] = crc32(data[:-4]).to_bytes(4, "little")
    path.write_bytes(data)
    assert seal(tmp_path, name, 1, dead=True)
    assert path.read_bytes() == data
    assert "has format 2, this tracelet reads 1" in caplog.text
    assert len(only(drain(tmp_path, dead=True)).points) == 10
    assert move_delivered(tmp_path, [{name: Position(2, 0)}]) == 0


def test_a_manifest_that_is_locked_for_good_is_a_spool_error_not_a_wait_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracelet.spool.store.LOCK_WAIT_S", 0.1)
    update_manifest(tmp_path, lambda _: Manifest("r", "p", "e", "n"))

    def by_a_handler(before: Manifest | None) -> Manifest:
        assert before is not None
        with pytest.raises(SpoolError, match=r"locked by another for .*: try again"):
            update_manifest(tmp_path, lambda _: before)
        return before

    update_manifest(tmp_path, by_a_handler)
    assert update_manifest(tmp_path, lambda before: before or Manifest("x", "p", "e", "n")).run_id == "r"


def test_a_child_forked_while_the_manifest_was_held_does_not_hold_it_for_its_life(tmp_path: Path) -> None:
    update_manifest(tmp_path, lambda _: MANIFEST)
    reading, writing = os.pipe()
    with held_manifest(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until its parent is through
            os._exit(0)
    os.close(reading)
    try:
        assert update_manifest(tmp_path, lambda before: before or attempt("x")) == MANIFEST  # type: ignore[arg-type]
    finally:
        os.close(writing)
        os.waitpid(child, 0)
