"""A roll-over that comes to nothing at first: what is logged afterwards is read by whoever was reading meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.unit.spool.pens import TEXT, end, pen
from tracelet.spool import appended, files, points
from tracelet.spool.points import SLOT_SIZE, segment_name
from tracelet.spool.reader import START, Position, SpoolReader
from tracelet.spool.seal import read_seal
from tracelet.spool.store import make_spares, seal
from tracelet.spool.writer import Writer

MAKES_SEGMENTS = {files.__file__, points.__file__, appended.__file__}
CAPACITY = 16

both_ways = pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "appended"])


class Interrupt(BaseException):
    """What a signal's handler raises."""


def interrupted(writer: Writer, number: int) -> bool:
    """Log one point and raise at the line with this `number` among those that make a segment; whether it came to it."""
    left = number

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in MAKES_SEGMENTS:
            return None if event == "call" else trace
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        writer.log("a", -1.0, -1)
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


class Follower:
    """A reader that stays, as a living shipper's does."""

    def __init__(self, folder: Path, writer: str) -> None:
        self.reader = SpoolReader(folder)
        self.writer = writer
        self.position: Position = START
        self.iterations: list[int] = []

    def read(self, *, dead: bool = False) -> None:
        while True:
            ranges, after = self.reader.poll(self.writer, self.position, 1000, dead=dead)
            for piece in ranges:
                records = memoryview(self.reader.read(piece).records).cast("q")
                self.iterations += records[2 :: SLOT_SIZE // 8].tolist()
            if after == self.position:
                return
            self.position = after


@both_ways
@pytest.mark.parametrize("spares", [False, True], ids=["no spares", "spares"])
def test_an_exception_at_any_line_of_a_roll_over_hides_nothing_from_a_living_reader(
    tmp_path: Path, mapped: bool, spares: bool
) -> None:
    number, came = 0, True
    while came:
        number += 1
        folder = tmp_path / str(number)
        writer = pen(folder, slots_per_segment=CAPACITY, mapped=mapped)
        for i in range(CAPACITY - 3):  # behind the opening and the name, before the slot that is kept
            writer.log("a", 1.0, i)
        follower = Follower(folder, str(writer.writer_id))
        follower.read()
        if spares:
            make_spares(folder, CAPACITY)
        came = interrupted(writer, number)
        follower.read()
        if spares:
            make_spares(folder, CAPACITY)
        for i in range(100, 130):
            writer.log("a", 1.0, i)
        follower.read()
        end(writer)
        follower.read(dead=True)
        logged = [*range(CAPACITY - 3), *range(100, 130)]
        assert [i for i in follower.iterations if i >= 0] == logged, number
        assert follower.iterations.count(-1) <= 1
        follower.reader.close()
    assert number > 20


@both_ways
def test_a_segment_whose_next_one_was_made_but_not_entered_is_not_sealed(tmp_path: Path, mapped: bool) -> None:
    for number in range(1, 200):
        folder = tmp_path / str(number)
        writer = pen(folder, slots_per_segment=CAPACITY, mapped=mapped)
        for i in range(CAPACITY - 3):
            writer.log("a", 1.0, i)
        name = str(writer.writer_id)
        if not interrupted(writer, number):
            return
        if len(SpoolReader(folder).segments(name)) < 2:
            continue
        seal(folder, name, 1)  # as a shipper's housekeeping does, at any moment
        writer.frame(TEXT, b"in the last slot of the first segment, unless it is full", 1)
        assert seal(folder, name, 1)
        found = read_seal(folder, name, 1)
        assert found is not None
        assert found.slots == CAPACITY, number
    raise AssertionError("there were more lines than that")


def test_a_file_in_which_no_segment_was_begun_goes_with_its_dead_writer(tmp_path: Path) -> None:
    writer = pen(tmp_path, slots_per_segment=CAPACITY)
    writer.log("a", 1.0, 1)
    name = str(writer.writer_id)
    path = tmp_path / segment_name(name, 2)
    path.touch()
    assert not seal(tmp_path, name, 2)
    assert path.exists()
    end(writer)
    assert seal(tmp_path, name, 2, dead=True)
    assert not path.exists()
