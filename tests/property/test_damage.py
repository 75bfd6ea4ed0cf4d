"""Any byte of any file of a folder flipped, cut or zeroed: the rest is delivered, once, and what is lost is on record.

A whole shipment goes over a folder that an earlier one left half delivered, with one file damaged. Its faults raise
under test, so a run that returns has met none.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_spool_model import DAMAGE, harm
from tests.shipping import Alive, add_attempt, end, open_writer, put, shipment, start
from tracelet import codec
from tracelet.records import MetricNamed, ParamsLogged
from tracelet.shipper.deadletter import DeadLetters, Letter, letters_in
from tracelet.spool.frames import scan
from tracelet.spool.points import FRAME, HEADER_SIZE, POINT, SLOT, SLOT_SIZE, Header
from tracelet.spool.seal import PAGE
from tracelet.testing import Delivered, InMemoryExporter, MemoryStore, RetryLater

EXAMPLES = 2000 if os.environ.get("TRACELET_SOAK") else 25
POINTS = 600
KINDS = ["points", "frames", "seal", "journal", "manifest", "lock"]
Sent = dict[tuple[str, int], int]


def value_of(name: str, iteration: int) -> float:
    return iteration / 2 + len(name)


class Stood(NamedTuple):
    """Where something stands that was logged: its slot, and, unless it is a point, its frame's bytes."""

    segment: int
    slot: int
    frame: tuple[int, int] | None = None


@dataclass
class Half:
    """A folder whose run is over, three batches of which have arrived and a fourth is under way."""

    home: Path
    folder: Path
    before: Sent  # what has arrived
    params_before: set[str]
    files: dict[str, bytes]  # as they are undamaged
    points: dict[tuple[str, int], Stood] = field(default_factory=dict)
    params: dict[str, Stood] = field(default_factory=dict)
    names: dict[str, tuple[int, int]] = field(default_factory=dict)  # each name's frame

    def learn(self) -> None:
        """Find out where everything stands."""
        (path,) = (self.home / self.folder).glob("*.frames")
        frames: dict[int, tuple[int, Any]] = {}
        with path.open("rb") as file:
            for one in scan(file.fileno()):
                frames[one.end - len(one.payload) - 16] = (one.end, codec.decode(one.kind, one.payload))
        ids = {record.metric_id: record.name for _, record in frames.values() if isinstance(record, MetricNamed)}
        self.names = {record.name: (at, end) for at, (end, record) in frames.items() if isinstance(record, MetricNamed)}
        for name, data in self.files.items():
            if not name.endswith(".points"):
                continue
            header = Header.unpack(data[:HEADER_SIZE])
            assert header is not None
            for slot, (_, _, number, metric_id, marker) in enumerate(SLOT.iter_unpack(data[HEADER_SIZE:])):
                if marker == header.base | POINT:
                    self.points[ids[metric_id], number] = Stood(header.segment, slot)
                elif marker == header.base | FRAME and isinstance(frames[number][1], ParamsLogged):
                    (key,) = frames[number][1].params
                    self.params[key] = Stood(header.segment, slot, (number, frames[number][0]))

    def harmed_slots(self, name: str, now: bytes) -> set[tuple[int, int]]:
        """The slots of a segment in whose pages something is not as it was."""
        if not name.endswith(".points"):
            return set()
        was, number = self.files[name], int(name.rpartition("-")[2].partition(".")[0])
        pages = [at for at in range(HEADER_SIZE, len(was), PAGE) if was[at : at + PAGE] != now[at : at + PAGE]]
        each = PAGE // SLOT_SIZE
        return {(number, (at - HEADER_SIZE) // SLOT_SIZE + i) for at in pages for i in range(each)}

    def may_lack(self, name: str, now: bytes) -> tuple[set[tuple[str, int]], set[str]]:
        """Which points, and which params, stood in the damage of this file."""
        slots = self.harmed_slots(name, now)

        def harmed(frame: tuple[int, int] | None) -> bool:
            if frame is None or not name.endswith(".frames"):
                return False
            return self.files[name][slice(*frame)] != now[slice(*frame)]

        nameless = {one for one, frame in self.names.items() if harmed(frame)}
        points = {one for one, at in self.points.items() if at[:2] in slots or one[0] in nameless}
        return points, {key for key, at in self.params.items() if at[:2] in slots or harmed(at.frame)}


@cache
def half_delivered() -> Half:
    """One that is made once; its segments have two pages each."""
    home = Path(tempfile.mkdtemp(prefix="damage-"))
    folder = home / "run" / "host"
    writer = open_writer(folder, add_attempt(folder, "a"), slots_per_segment=256)
    start(writer)
    for i in range(POINTS):
        name = ("loss", "rate", "a" * 40)[i % 3]
        writer.log(name, value_of(name, i), i)
        if i % 20 == 0:
            put(writer, ParamsLogged(i, {f"p{i}": i}))
    end(writer)
    alive = Alive()
    alive.dead.update(writer.writer_ids())
    arrived = MemoryStore()
    answers = [Delivered(), Delivered(), Delivered(), *[RetryLater("down")] * 1000]
    made = shipment(folder, {"a": InMemoryExporter(arrived, answers=answers, max_points=100)}, alive)
    made.run(follow=True, stop=threading.Event(), timeout_s=1.5)
    made.close()
    assert len(list(folder.rglob("*.seal"))) == 3
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    half = Half(home, folder.relative_to(home), sent(arrived), sent_params(arrived), files)
    half.learn()
    assert half.points.keys() == all_points()
    assert len(half.params) == POINTS // 20
    return half


def sent(arrived: MemoryStore) -> Sent:
    found = {(name, iteration): time for name, value, iteration, time in arrived.points()}
    assert len(found) == len(arrived.points())
    for name, value, iteration, _ in arrived.points():
        assert value == value_of(name, iteration)
    return found


def sent_params(arrived: MemoryStore) -> set[str]:
    found = [one for record in arrived.records() if isinstance(record, ParamsLogged) for one in record.params.items()]
    assert all(key == f"p{value}" for key, value in found)
    assert len(found) == len(set(found))
    return {key for key, _ in found}


@contextmanager
def copied() -> Iterator[tuple[Path, Half]]:
    half = half_delivered()
    with tempfile.TemporaryDirectory(prefix="damage-") as place:
        shutil.copytree(half.home, place, dirs_exist_ok=True)
        yield Path(place) / half.folder, half


@pytest.fixture(scope="module", autouse=True)
def _gone_afterwards() -> Iterator[None]:
    yield
    shutil.rmtree(half_delivered().home)


def all_points() -> set[tuple[str, int]]:
    return {(("loss", "rate", "a" * 40)[i % 3], i) for i in range(POINTS)}


SAID = re.compile(r"segment=(\d+), first=(\d+), end=(\d+)")


def told_slots(letters: list[Letter]) -> set[tuple[int, int]]:
    """The slots that the dead letters say can't be delivered."""
    found = [SAID.search(str(letter.line["reason"])) for letter in letters if letter.what == "damage"]
    ranges = [tuple(map(int, one.groups())) for one in found if one is not None]
    return {(segment, slot) for segment, first, end in ranges for slot in range(first, end)}


def is_torn(was: bytes, now: bytes) -> bool:
    """Whether a journal is as a death may leave one: whole lines, and at the end perhaps the beginning of another."""
    end = next((at for at, (one, other) in enumerate(zip(was, now, strict=False)) if one != other), len(now))
    rest = now[now.rfind(b"\n", 0, end) + 1 :]
    return all(0x20 <= byte < 0x7F for byte in rest)


@pytest.mark.parametrize("kind", KINDS)
def test_one_damaged_file_costs_no_more_than_what_stood_in_its_damage(
    kind: str, record_property: Callable[[str, object], None], caplog: pytest.LogCaptureFixture
) -> None:
    record_property("damaged folders", EXAMPLES)

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(DAMAGE, st.integers(0, 100))
    def check(damage: list[tuple[int, object]], which: int) -> None:
        with copied() as (folder, half):
            files = sorted(path for path in folder.rglob("*") if path.is_file() and kind in path.name)
            harmed = files[which % len(files)]
            if kind == "journal":
                damage = damage[:1]
            harm(harmed, damage)
            now = harmed.read_bytes()
            caplog.clear()
            alive = Alive()
            alive.dead.update(path.stem for path in folder.glob("*.lock"))
            arrived = MemoryStore()
            made = shipment(folder, {"a": InMemoryExporter(arrived, max_points=100)}, alive)
            made.run(follow=True, stop=threading.Event(), timeout_s=20)
            outcome = made.close()
            after, before = sent(arrived), half.before
            assert outcome.complete, outcome
            letters = list(letters_in(DeadLetters(folder, "memory-a").path))
            missing = all_points() - before.keys() - after.keys()
            lacking = half.params.keys() - half.params_before - sent_params(arrived)
            points, params = half.may_lack(harmed.name, now)
            assert missing <= points
            assert lacking <= params
            told = told_slots(letters)
            named = {letter.facts["iteration"] for letter in letters if letter.what == "point"}
            assert all(half.points[one][:2] in told or one[1] in named for one in missing)
            assert all(half.params[key][:2] in told for key in lacking)
            again = before.keys() & after.keys()
            if kind != "journal":
                assert not again
            elif not is_torn(half.files[harmed.name], now):
                assert f"{harmed} is damaged" in caplog.text
            if kind == "journal" and damage[0][1] in ("zero", "noise"):  # several lines: said, and sent again
                assert len(arrived.ends()) == 1
                return
            assert all(before[one] == after[one] for one in again)  # the same point to every backend
            assert [end.status for end in arrived.ends()] == ["FINISHED"] or kind in ("frames", "points")
            assert len(arrived.ends()) == 1

    check()


def test_the_names_of_the_damaged_are_in_the_dead_letters() -> None:
    with copied() as (folder, half):
        before = half.before
        (frames,) = folder.glob("*.frames")
        data = frames.read_bytes()
        assert codec.encode(MetricNamed(0, "loss"))[1] in data
        frames.write_bytes(data.replace(b'"loss"', b'"l0ss"'))
        alive = Alive()
        alive.dead.update(path.stem for path in folder.glob("*.lock"))
        arrived = MemoryStore()
        made = shipment(folder, {"a": InMemoryExporter(arrived)}, alive)
        made.run(follow=True, stop=threading.Event(), timeout_s=20)
        made.close()
        missing = all_points() - before.keys() - sent(arrived).keys()
        assert Counter(name for name, _ in missing) == {"loss": len(missing)}
        text = DeadLetters(folder, "memory-a").path.read_text()
        assert "the frame with its metric's name is damaged" in text
        assert all(
            f'"iteration": {iteration}' in text or f'"iteration":{iteration}' in text for _, iteration in missing
        )
