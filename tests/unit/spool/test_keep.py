"""What of the delivered may go: by age and size, and never what somebody has still to read."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.spool.pens import end, pen
from tracelet.spool import keep, store
from tracelet.spool.cursor import Journal, rank_mark
from tracelet.spool.keep import KeepRule, awaited, beyond_keep, release, retain
from tracelet.spool.reader import SpoolReader

NOTHING = KeepRule(0, 0)


def destination(name: str, **more: object) -> dict[str, object]:
    return {"id": name, "kind": "file", "spec": {}, **more}


def delivered_run(folder: Path, *destinations: dict[str, object]) -> Path:
    """A run of four segments, all of it at these destinations and in delivered/."""
    names = [str(one["id"]) for one in destinations]
    attempt = store.Attempt("k", 1, 42, 0, tuple(destinations), ended={"status": "FINISHED", "end_unix_nano": 2})
    store.update_manifest(folder, lambda _: store.Manifest("r", "p", "e", "n", attempts=(attempt,)))
    writer = pen(folder, slots_per_segment=64)
    for i in range(200):
        writer.log("loss", float(i), i)
    end(writer)
    for number in SpoolReader(folder).segments(writer.writer_id):
        assert store.seal(folder, writer.writer_id, number, dead=True)
    for name in names:
        deliver(folder, name)
    positions = [Journal(folder, name).positions for name in names]
    assert store.move_delivered(folder, positions, over=[writer.writer_id]) == 4
    return folder


def deliver(folder: Path, name: str, *, segments: int = 9, ends: bool = True) -> None:
    """What a lane writes down of the first segments."""
    reader, journal = SpoolReader(folder), Journal(folder, name)
    for writer in reader.writers():
        position = journal.positions.get(writer, (1, 0, ()))
        while True:
            ranges, after = reader.poll(writer, store.Position(*position), 10_000, dead=True)
            taken = [piece for piece in ranges if piece.segment <= segments]
            if taken:
                last = taken[-1]
                at = after if taken == list(ranges) else store.Position(last.segment, last.end, ())
                journal.ack(journal.intend(taken, {writer: at}, {}, {}), delivered=1, refused=0)
            if after == position or taken != list(ranges):
                break
            position = after
    if ends:
        journal.close_attempt("k")
    journal.close()
    reader.close()


def name_another(folder: Path, **more: object) -> None:
    def change(manifest: store.Manifest | None) -> store.Manifest:
        assert manifest is not None
        (attempt,) = manifest.attempts
        return manifest.with_attempt(replace(attempt, destinations=(*attempt.destinations, destination("new", **more))))

    store.update_manifest(folder, change, make=False)


def there(folder: Path) -> list[str]:
    return sorted(path.name[17:] for path in (folder / "delivered").iterdir())


def test_delivered_files_go_by_age_and_size_oldest_first(tmp_path: Path) -> None:
    folders = [delivered_run(tmp_path / name / "h", destination("a")) for name in "xy"]
    for age, folder in ((1, folders[0]), (2, folders[1])):
        for path in (folder / "delivered").iterdir():
            number = int(path.name[17:23]) if path.suffix != ".frames" else 0
            os.utime(path, (1000 - age - 10 * number, 1000 - age - 10 * number))
    size = (folders[0] / "delivered").joinpath(*[p.name for p in (folders[0] / "delivered").glob("*4.points")]).stat()

    def numbers() -> list[list[str]]:
        return [[name[:6] for name in there(folder) if name.endswith("points")] for folder in folders]

    assert retain(folders, KeepRule(50, 10**9), now_s=1000) == 0
    beyond = beyond_keep(folders, KeepRule(35, 10**9), now_s=1000)
    assert {folder: [path.name[17:] for path, _ in files] for folder, files in beyond.items()} == {
        folder: ["000004.points", "000004.seal"] for folder in folders
    }
    assert retain(folders, KeepRule(35, 10**9), now_s=1000) >= 2 * size.st_size
    assert numbers() == [["000001", "000002", "000003"]] * 2
    left = sum(size for folder in folders for _, size, _ in keep.delivered_files(folder))
    assert retain(folders, KeepRule(50, left - 1), now_s=1000) > 0
    assert numbers() == [["000001", "000002", "000003"], ["000001", "000002"]]
    retain([*folders, tmp_path / "none"], NOTHING, now_s=1000)
    assert [there(folder) for folder in folders] == [[], []]


def test_what_a_destination_that_was_named_later_has_not_passed_stays(tmp_path: Path) -> None:
    folder = delivered_run(tmp_path / "r" / "h", destination("a"))
    everything = there(folder)
    name_another(folder)
    assert retain([folder], NOTHING, now_s=10**12) == 0
    assert there(folder) == everything
    deliver(folder, "new", segments=2, ends=False)
    assert retain([folder], NOTHING, now_s=10**12) > 0
    assert there(folder) == [name for name in everything if not name.startswith(("000001.p", "000001.s", "000002"))]
    deliver(folder, "new", ends=False)
    assert retain([folder], NOTHING, now_s=10**12) > 0
    assert there(folder) == ["000001.frames"], "of which the end that it lacks is made"
    deliver(folder, "new")
    assert retain([folder], NOTHING, now_s=10**12) > 0
    assert there(folder) == []


@pytest.mark.parametrize(("kind", "stays"), [("console", False), ("live", True)])
def test_an_object_of_the_program_is_waited_for_and_its_console_is_not(tmp_path: Path, kind: str, stays: bool) -> None:
    folder = delivered_run(tmp_path / "r" / "h", destination("a"))
    name_another(folder, kind=kind, in_process=True)
    retain([folder], NOTHING, now_s=10**12)
    assert bool(there(folder)) is stays


@pytest.mark.parametrize("damage", ["no manifest", "no manifest that can be read", "no destination"])
def test_where_nothing_tells_who_waits_everything_stays(tmp_path: Path, damage: str) -> None:
    folder = delivered_run(tmp_path / "r" / "h", destination("a"))
    everything = there(folder)
    if damage == "no destination":
        attempt = store.Attempt("k", 1, 42, 0)
        store.update_manifest(folder, lambda _: store.Manifest("r", "p", "e", "n", attempts=(attempt,)))
    for path in (folder / store.MANIFEST, folder / store.COPY):
        if damage == "no manifest":
            path.unlink()
        elif damage == "no manifest that can be read":
            path.write_text("{")
    assert len(awaited(folder)) == len(everything)
    assert retain([folder], NOTHING, now_s=10**12) == 0
    assert there(folder) == everything


def test_a_destination_that_is_named_between_the_choice_and_the_deletion_is_seen(tmp_path: Path) -> None:
    folder = delivered_run(tmp_path / "r" / "h", destination("a"))
    chosen = [path for path, _ in beyond_keep([folder], NOTHING, now_s=10**12)[folder]]
    assert len(chosen) == 9
    name_another(folder)
    assert release(folder, chosen) == 0
    assert len(there(folder)) == 9


def test_nobody_is_named_while_files_go_and_who_comes_after_a_deletion_finds_no_run(tmp_path: Path) -> None:
    folder = delivered_run(tmp_path / "r" / "h", destination("a"))
    failed: list[BaseException] = []

    def name_it() -> None:
        try:
            name_another(folder)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failed.append(error)

    with store.held_manifest(folder):
        waiting = threading.Thread(target=name_it)
        waiting.start()
        manifest = store.read_manifest(folder)
        assert manifest is not None
        assert set(manifest.destinations) == {"a"}
        store.remove_run(folder)
    waiting.join(20)
    assert [type(error).__name__ for error in failed] == ["SpoolError"]
    assert not folder.exists()


def test_the_frames_of_a_rank_whose_end_a_destination_lacks_stay(tmp_path: Path) -> None:
    folder = delivered_run(tmp_path / "r" / "h", destination("a"))

    def end_rank_1(manifest: store.Manifest | None) -> store.Manifest:
        assert manifest is not None
        (attempt,) = manifest.attempts
        ended = {"1": {"status": "FINISHED", "end_unix_nano": 2}}
        return manifest.with_attempt(replace(attempt, ranks_ended=ended))

    store.update_manifest(folder, end_rank_1, make=False)
    assert retain([folder], NOTHING, now_s=10**12) > 0
    assert there(folder) == ["000001.frames"]
    journal = Journal(folder, "a")
    journal.close_attempt(rank_mark("k", 1))
    journal.close()
    assert retain([folder], NOTHING, now_s=10**12) > 0
    assert there(folder) == []


def test_nothing_goes_whose_delivery_the_disk_would_not_keep(tmp_path: Path) -> None:
    folder = delivered_run(tmp_path / "r" / "h", destination("a"))
    everything = there(folder)
    (folder / "journal-b").symlink_to("/dev/zero")  # a flush of it fails, as on a disk that does
    with pytest.raises(OSError, match="Invalid argument"):
        retain([folder], NOTHING, now_s=10**12)
    assert there(folder) == everything
