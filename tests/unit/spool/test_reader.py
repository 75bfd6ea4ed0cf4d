"""Which slots a reader takes for closed, what it makes of open, damaged, moved and missing ones."""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path
from typing import Any

import pytest

from tests.unit.spool.pens import ENDED, NAMED, TEXT, Story, drain, end, only, pen
from tracelet.errors import SpoolFormatError
from tracelet.spool.pages import Pages
from tracelet.spool.points import HEADER_SIZE, SLOT_SIZE, Header, segment_name
from tracelet.spool.reader import START, Position, SlotRange, SpoolReader, _File
from tracelet.spool.seal import read_seal
from tracelet.spool.store import move_delivered, seal
from tracelet.spool.writer import Writer


def logged(folder: Path, count: int = 10, **options: object) -> Writer:
    """A writer whose slots are: its opening, the name "a", then `count` points with iterations 0, 1, 2, ..."""
    writer = pen(folder, **options)
    for i in range(count):
        writer.log("a", i / 2, i)
    return writer


class Slot:
    """One slot of a segment file, whose marker a test takes away and gives back."""

    def __init__(self, folder: Path, writer: Writer, slot: int, segment: int = 1) -> None:
        self._path = folder / segment_name(str(writer.writer_id), segment)
        self._at = HEADER_SIZE + SLOT_SIZE * slot + 28
        self.marker = self._access()

    def _access(self, data: bytes | None = None) -> bytes:
        with open(self._path, "r+b") as file:
            file.seek(self._at)
            if data is not None:
                file.write(data)
                return data
            return file.read(4)

    def open(self) -> None:
        self._access(b"\0\0\0\0")

    def close(self) -> None:
        self._access(self.marker)


def test_an_open_slot_is_passed_and_comes_first_when_it_has_closed(tmp_path: Path) -> None:
    writer = logged(tmp_path)
    name = str(writer.writer_id)
    slot = Slot(tmp_path, writer, 5)
    slot.open()
    reader = SpoolReader(tmp_path)
    ranges, position = reader.poll(name, START, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 0, 5), SlotRange(name, 1, 6, 12))
    assert position == Position(1, 12, ((1, 5),))
    assert not position.passed(1, 5)
    assert position.passed(1, 6)
    assert not position.passed(1, 12)
    assert reader.poll(name, position, 100, dead=False) == ((), position)
    writer.log("a", 9.0, 10)
    slot.close()
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 5, 6), SlotRange(name, 1, 12, 13))
    assert position == Position(1, 13, ())
    assert struct.unpack("<QdqII", reader.read(ranges[0]).records)[2] == 3
    end(writer)


def test_a_dead_writers_open_slots_are_passed_for_good(tmp_path: Path) -> None:
    writer = logged(tmp_path)
    name = str(writer.writer_id)
    Slot(tmp_path, writer, 5).open()
    Slot(tmp_path, writer, 11).open()
    reader = SpoolReader(tmp_path)
    _, waiting = reader.poll(name, START, 8, dead=False)
    assert waiting.open == ((1, 5),)
    ranges, position = reader.poll(name, waiting, 100, dead=True)
    assert ranges == (SlotRange(name, 1, 9, 11),)
    assert position == Position(1, 11, ())
    end(writer)


def test_an_open_slot_at_a_segments_end_does_not_hold_up_the_next_segment(tmp_path: Path) -> None:
    writer = logged(tmp_path, 20, slots_per_segment=16)
    name = str(writer.writer_id)
    slot = Slot(tmp_path, writer, 15)
    slot.open()
    reader = SpoolReader(tmp_path)
    ranges, position = reader.poll(name, START, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 0, 15), SlotRange(name, 2, 0, 6))
    assert position == Position(2, 6, ((1, 15),))
    slot.close()
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 15, 16),)
    assert position == Position(2, 6, ())
    end(writer)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
def test_a_limit_cuts_the_stream_anywhere_and_nothing_is_lost_or_repeated(tmp_path: Path, limit: int) -> None:
    writer = logged(tmp_path, 50, slots_per_segment=16)
    slot = Slot(tmp_path, writer, 3)
    slot.open()
    story = Story()
    reader = SpoolReader(tmp_path)
    for _ in range(200):
        ranges, story.position = reader.poll(str(writer.writer_id), story.position, limit, dead=False)
        assert sum(piece.end - piece.first for piece in ranges) <= limit
        story.take(reader, ranges)
    slot.close()
    ranges, story.position = reader.poll(str(writer.writer_id), story.position, limit, dead=False)
    story.take(reader, ranges)
    assert sorted(story.slots()) == [(1 + i // 16, i % 16) for i in range(52)]
    assert sorted(i for _, _, i in story.points) == list(range(50))
    end(writer)


def test_without_strong_order_a_slot_counts_only_when_its_marker_was_there_before(tmp_path: Path) -> None:
    writer = logged(tmp_path)
    name = str(writer.writer_id)
    reader = SpoolReader(tmp_path, strong_order=False)
    ranges, position = reader.poll(name, START, 100, dead=False)
    assert (ranges, position) == ((), START)
    writer.log("a", 1.0, 10)
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 0, 12),)
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 12, 13),)
    end(writer)
    assert reader.poll(name, position, 100, dead=True)[0] == (SlotRange(name, 1, 13, 14),)


def test_the_end_is_seen_by_a_reader_that_goes_on_from_behind_it(tmp_path: Path) -> None:
    writer = logged(tmp_path)
    name = str(writer.writer_id)
    end(writer)
    first = SpoolReader(tmp_path)
    assert not first.ended(name)
    _, position = first.poll(name, START, 100, dead=False)
    assert first.ended(name)
    for dead in (False, True):
        again = SpoolReader(tmp_path)
        assert again.poll(name, position, 100, dead=dead) == ((), position)
        assert again.ended(name)


def test_writers_come_in_order_of_appearance(tmp_path: Path) -> None:
    pens = [logged(tmp_path, 1) for _ in range(5)]
    assert sorted(SpoolReader(tmp_path).writers()) == sorted(str(one.writer_id) for one in pens)
    assert SpoolReader(tmp_path).writers()[0] in {str(one.writer_id) for one in pens}
    for one in pens:
        end(one)


# ---- sealed, moved, damaged -------------------------------------------------------------------------------------


def sealed(folder: Path, count: int = 1000) -> tuple[str, list[tuple[str, float, int]]]:
    writer = logged(folder, count, slots_per_segment=256)
    end(writer)
    name = str(writer.writer_id)
    points = only(drain(folder)).points
    for path in folder.glob("*.points"):
        assert seal(folder, name, int(path.stem.rpartition("-")[2]), dead=True)
    return name, points


def test_sealed_and_delivered_segments_are_read_as_before(tmp_path: Path) -> None:
    name, points = sealed(tmp_path)
    story = only(drain(tmp_path))
    assert story.points == points
    assert story.ended
    assert move_delivered(tmp_path, [{name: story.position}], over=[name]) == 4
    assert not list(tmp_path.glob("*.points"))
    assert not list(tmp_path.glob("*.frames"))
    again = only(drain(tmp_path))
    assert (again.points, again.frames, again.ended) == (points, story.frames, True)


def test_a_reader_holds_on_to_a_segment_that_is_moved_under_it(tmp_path: Path) -> None:
    name, points = sealed(tmp_path)
    reader = SpoolReader(tmp_path)
    story = Story()
    ranges, story.position = reader.poll(name, START, 100, dead=True)
    story.take(reader, ranges)
    move_delivered(tmp_path, [{name: Position(9, 0)}])
    while ranges:
        ranges, story.position = reader.poll(name, story.position, 100, dead=True)
        story.take(reader, ranges)
    assert story.points == points


def test_reading_goes_on_where_older_segments_were_deleted(tmp_path: Path) -> None:
    name, points = sealed(tmp_path)
    (tmp_path / segment_name(name, 1)).unlink()
    reader = SpoolReader(tmp_path)
    ranges, _ = reader.poll(name, START, 10_000, dead=True)
    assert ranges[0] == SlotRange(name, 2, 0, 256)
    assert sum(len(reader.read(piece).records) // SLOT_SIZE for piece in ranges) == len(points) - 254


def test_reading_goes_on_behind_a_segment_that_was_deleted_once_it_was_passed(tmp_path: Path) -> None:
    """A destination may stand at a segment's very end, from before there was a next one."""
    name, _ = sealed(tmp_path)
    (tmp_path / segment_name(name, 1)).unlink()
    ranges, _ = SpoolReader(tmp_path).poll(name, Position(1, 256, ()), 10_000, dead=True)
    assert ranges[0] == SlotRange(name, 2, 0, 256)


def test_a_damaged_page_is_named_and_the_rest_is_delivered(tmp_path: Path) -> None:
    name, points = sealed(tmp_path)
    path = tmp_path / segment_name(name, 2)
    with open(path, "r+b") as file:
        file.seek(HEADER_SIZE + 4096 + 700)  # slots 128 to 255 of the segment
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 4]))
    story = only(drain(tmp_path))
    assert [(one.segment, one.first, one.end) for one in story.damaged] == [(2, 128, 256)]
    lost = set(points) - set(story.points)
    assert len(lost) == 128
    assert story.points == [point for point in points if point not in lost]
    assert story.ended


def test_a_damaged_header_loses_nothing(tmp_path: Path) -> None:
    name, points = sealed(tmp_path)
    with open(tmp_path / segment_name(name, 1), "r+b") as file:
        file.write(os.urandom(60))
    assert only(drain(tmp_path)).points == points


def test_a_cut_segment_is_named_where_it_was_sealed_longer(tmp_path: Path) -> None:
    name, _ = sealed(tmp_path)
    os.truncate(tmp_path / segment_name(name, 2), HEADER_SIZE + 100 * SLOT_SIZE)
    story = only(drain(tmp_path))
    assert {(one.segment, one.reason.split()[0]) for one in story.damaged} == {(2, "the"), (2, "checksum")}
    assert story.ended


def test_a_segment_with_a_slot_in_flight_is_not_sealed_while_its_writer_lives(tmp_path: Path) -> None:
    writer = logged(tmp_path, 30, slots_per_segment=16)
    name = str(writer.writer_id)
    slot = Slot(tmp_path, writer, 4)
    slot.open()
    assert not seal(tmp_path, name, 1)
    assert not seal(tmp_path, name, 99)
    slot.close()
    assert seal(tmp_path, name, 1)
    assert seal(tmp_path, name, 1)
    found = read_seal(tmp_path, name, 1)
    assert found is not None
    assert found.slots == 16
    end(writer)


def test_a_torn_frame_in_mid_stream_is_passed_over_and_its_slot_named(tmp_path: Path) -> None:
    writer = pen(tmp_path)
    for text in (b"one", b"two", b"three"):
        writer.frame(TEXT, text, 1)
    end(writer)
    path = next(tmp_path.glob("*.frames"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"two", b"tvo"))
    story = only(drain(tmp_path))
    assert [payload for kind, payload in story.frames if kind == TEXT] == [b"one", b"three"]
    assert [(one.first, one.end) for one in story.damaged] == [(2, 3)]
    reader = SpoolReader(tmp_path)
    assert [kind for kind, _ in reader.scan_frames(str(writer.writer_id))] == [1, TEXT, TEXT, ENDED]
    assert reader.damaged_frames == 1


def test_all_frames_can_be_had_without_slots(tmp_path: Path) -> None:
    writer = logged(tmp_path, 3)
    end(writer)
    kinds = [kind for kind, _ in SpoolReader(tmp_path).scan_frames(str(writer.writer_id))]
    assert kinds == [1, NAMED, ENDED]


def test_a_segment_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    writer = logged(tmp_path)
    end(writer)
    path = tmp_path / segment_name(str(writer.writer_id), 1)
    data = bytearray(path.read_bytes())
    header = Header.unpack(bytes(data))
    assert header is not None
    data[8:12] = (2).to_bytes(4, "little")
    from zlib import crc32

    data[44:48] = crc32(bytes(data[:44])).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(SpoolFormatError, match="format 2"):
        drain(tmp_path)


def test_where_stores_may_be_late_nothing_is_read_before_what_was_closed_at_this_very_look(tmp_path: Path) -> None:
    writer = logged(tmp_path)
    name = str(writer.writer_id)
    slot = Slot(tmp_path, writer, 5)
    slot.open()
    reader = SpoolReader(tmp_path, strong_order=False)
    ranges, position = reader.poll(name, START, 100, dead=False)
    assert ranges == ()
    slot.close()  # what comes behind it may be of the same thread, and was seen at the look before
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 0, 5),)
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, 5, 12),)
    assert position == Position(1, 12, ())
    reader.close()


def test_where_stores_may_be_late_a_slot_of_an_older_segment_holds_up_a_newer_one_until_it_is_read(
    tmp_path: Path,
) -> None:
    writer = logged(tmp_path, slots_per_segment=16)
    name = str(writer.writer_id)
    slot = Slot(tmp_path, writer, 5)
    slot.open()
    reader, position = SpoolReader(tmp_path, strong_order=False), START
    for i in range(10, 20):
        writer.log("a", i / 2, i)
    for _ in range(6):
        _, position = reader.poll(name, position, 100, dead=False)
    assert position == Position(2, 6, ((1, 5),))
    writer.log("a", 10.0, 20)
    assert reader.poll(name, position, 100, dead=False) == ((), position)
    slot.close()
    assert reader.poll(name, position, 100, dead=False) == ((), position)
    ranges, position = reader.poll(name, position, 100, dead=False)
    assert ranges[0] == SlotRange(name, 1, 5, 6)
    for _ in range(2):
        more, position = reader.poll(name, position, 100, dead=False)
        ranges += more
    assert ranges == (SlotRange(name, 1, 5, 6), SlotRange(name, 2, 6, 7))
    reader.close()


def test_a_folder_without_writers_is_empty(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path)
    assert reader.writers() == ()
    assert reader.poll("0" * 16, START, 10, dead=True) == ((), START)
    assert reader.read(SlotRange("0" * 16, 1, 0, 4)).damaged[0].end == 4
    assert list(reader.scan_frames("0" * 16)) == []


class EarlyLook(_File):
    """A segment of whose slots the first look sees one as it was a moment before: still without its marker."""

    __slots__ = ("early",)

    def markers(self, first: int, end: int) -> memoryview:
        seen = array("I", super().markers(first, end).tolist())
        if self.early is not None:
            seen[self.early - first], self.early = 0, None
        return memoryview(seen)


@pytest.mark.parametrize("slot", [2, 5, 11])
def test_a_slot_that_was_filled_between_the_look_at_it_and_at_the_next_one_stays_in_its_place(
    tmp_path: Path, slot: int
) -> None:
    writer = logged(tmp_path, 12)
    name = str(writer.writer_id)
    reader, story = SpoolReader(tmp_path, strong_order=True), Story()
    file = reader._segment(name, 1)
    assert file is not None
    early = EarlyLook(file.fd, Pages())
    early.header, early.early = file.header, slot
    reader._files[name, "points", 1] = early
    ranges, story.position = reader.poll(name, START, 1000, dead=False)
    assert early.early is None
    story.take(reader, ranges)
    reader.close()
    end(writer)
    assert [iteration for _, _, iteration in story.points] == list(range(12))
    assert story.position.open == ()


class Overtaken(SpoolReader):
    """A reader that a writer overtakes between its two looks at a file that is just being made."""

    def __init__(self, folder: Path, path: Path, come: bytes) -> None:
        super().__init__(folder)
        self._path, self._come = path, come

    def _rebuilt(self, file: Any, writer: str, number: int) -> Header:
        if self._come:
            self._path.write_bytes(self._come)
            self._come = b""
        return super()._rebuilt(file, writer, number)


def test_a_segment_that_comes_between_two_looks_is_read_to_its_end(tmp_path: Path) -> None:
    writer = pen(tmp_path, slots_per_segment=700, mapped=False)
    for i in range(1500):
        writer.log("a", float(i), i)
    path = tmp_path / segment_name(str(writer.writer_id), 1)
    whole = path.read_bytes()
    path.write_bytes(b"")
    reader, story = Overtaken(tmp_path, path, whole[: HEADER_SIZE + 128 * SLOT_SIZE]), Story()
    for content in (None, whole):
        if content is not None:
            path.write_bytes(content)
        ranges, story.position = reader.poll(str(writer.writer_id), story.position, 10_000, dead=False)
        story.take(reader, ranges)
    reader.close()
    end(writer)
    assert sorted(iteration for _, _, iteration in story.points) == list(range(1500))


def test_files_of_another_host_are_opened_anew_when_they_may_show_an_old_state(tmp_path: Path) -> None:
    now = [0.0]
    writer = logged(tmp_path, 3)
    name = str(writer.writer_id)
    path = tmp_path / segment_name(name, 1)
    reader = SpoolReader(tmp_path, reopen_s=1.0, clock=lambda: now[0])
    _, position = reader.poll(name, START, 100, dead=False)
    old = path.read_bytes()
    writer.log("a", 1.5, 3)
    # What a file system over a network shows of an open file may be as old as its opening: here it is another file.
    new = path.read_bytes()
    path.rename(tmp_path / "old")
    (tmp_path / "old").write_bytes(old)
    path.write_bytes(new)
    assert reader.poll(name, position, 100, dead=False) == ((), position)
    now[0] = 1.5
    ranges, _ = reader.poll(name, position, 100, dead=False)
    assert ranges == (SlotRange(name, 1, position.next, position.next + 1),)


def test_a_writer_of_another_host_that_is_dead_is_looked_at_anew_before_anything_is_passed(tmp_path: Path) -> None:
    writer = logged(tmp_path, 3)
    name = str(writer.writer_id)
    path = tmp_path / segment_name(name, 1)
    slot = Slot(tmp_path, writer, 3)
    slot.open()
    reader = SpoolReader(tmp_path, reopen_s=1000.0)
    _, position = reader.poll(name, START, 100, dead=False)
    assert position.open == ((1, 3),)
    stale = path.read_bytes()
    slot.close()
    new = path.read_bytes()
    path.rename(tmp_path / "old")
    (tmp_path / "old").write_bytes(stale)
    path.write_bytes(new)
    ranges, position = reader.poll(name, position, 100, dead=True)
    assert ranges == (SlotRange(name, 1, 3, 4),)
    assert position.open == ()
