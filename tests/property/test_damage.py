"""Any byte of any file of a folder flipped, cut or zeroed: the rest is delivered, once, and what is lost is on record.

A whole shipment goes over a folder that an earlier one left half delivered, with one file damaged. Its faults raise
under test, so a run that returns has met none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_spool_model import DAMAGE, harm
from tests.shipping import Alive, add_attempt, end, open_writer, put, shipment, start
from tracelet import codec
from tracelet.records import MetricNamed, ParamsLogged
from tracelet.shipper.deadletter import DeadLetters
from tracelet.testing import Delivered, InMemoryExporter, MemoryStore, RetryLater

EXAMPLES = 2000 if os.environ.get("TRACELET_SOAK") else 25
POINTS = 600
KINDS = ["points", "frames", "seal", "journal", "manifest", "lock"]
Sent = dict[tuple[str, int], int]


def value_of(name: str, iteration: int) -> float:
    return iteration / 2 + len(name)


@cache
def half_delivered() -> tuple[Path, Sent, Path]:
    """A folder whose run is over, three batches of which have arrived and a fourth is under way; and what arrived."""
    home = Path(tempfile.mkdtemp(prefix="damage-"))
    folder = home / "run" / "host"
    writer = open_writer(folder, add_attempt(folder, "a"), slots_per_segment=128)
    start(writer)
    for i in range(POINTS):
        name = ("loss", "rate", "a" * 40)[i % 3]
        writer.log(name, value_of(name, i), i)
        if i % 100 == 0:
            put(writer, ParamsLogged(i, {f"p{i}": i}))
    end(writer)
    alive = Alive()
    alive.dead.update(writer.writer_ids())
    arrived = MemoryStore()
    answers = [Delivered(), Delivered(), Delivered(), *[RetryLater("down")] * 1000]
    made = shipment(folder, {"a": InMemoryExporter(arrived, answers=answers, max_points=100)}, alive)
    made.run(follow=True, stop=threading.Event(), timeout_s=1.5)
    made.close()
    assert len(list(folder.rglob("*.seal"))) == 5
    return home, sent(arrived), folder.relative_to(home)


def sent(arrived: MemoryStore) -> Sent:
    found = {(name, iteration): time for name, value, iteration, time in arrived.points()}
    for name, value, iteration, _ in arrived.points():
        assert value == value_of(name, iteration)
    return found


@contextmanager
def copied() -> Iterator[tuple[Path, Sent]]:
    home, before, folder = half_delivered()
    with tempfile.TemporaryDirectory(prefix="damage-") as place:
        shutil.copytree(home, place, dirs_exist_ok=True)
        yield Path(place) / folder, before


@pytest.fixture(scope="module", autouse=True)
def _gone_afterwards() -> Iterator[None]:
    yield
    shutil.rmtree(half_delivered()[0])


def all_points() -> set[tuple[str, int]]:
    return {(("loss", "rate", "a" * 40)[i % 3], i) for i in range(POINTS)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_damaged_file_costs_no_more_than_what_stood_in_its_damage(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("damaged folders", EXAMPLES)

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(DAMAGE, st.integers(0, 100))
    def check(damage: list[tuple[int, object]], which: int) -> None:
        with copied() as (folder, before):
            files = sorted(path for path in folder.rglob("*") if path.is_file() and kind in path.name)
            harmed = files[which % len(files)]
            if kind == "journal":
                damage = damage[:1]
            harm(harmed, damage)
            alive = Alive()
            alive.dead.update(path.stem for path in folder.glob("*.lock"))
            arrived = MemoryStore()
            made = shipment(folder, {"a": InMemoryExporter(arrived, max_points=100)}, alive)
            made.run(follow=True, stop=threading.Event(), timeout_s=20)
            outcome = made.close()
            after = sent(arrived)
            assert outcome.complete, outcome
            letters = DeadLetters(folder, "memory-a").path
            missing = all_points() - before.keys() - after.keys()
            if kind in ("seal", "manifest", "lock", "journal"):
                assert not missing
            if kind == "points":  # nothing of another segment
                assert len(missing) <= 128
            if missing:
                assert letters.read_text()
            again = before.keys() & after.keys()
            if kind != "journal":
                assert not again
            if kind == "journal" and damage[0][1] in ("zero", "noise"):  # several lines: said, and sent again
                assert len(arrived.ends()) == 1
                return
            assert all(before[one] == after[one] for one in again)  # the same point to every backend
            assert [end.status for end in arrived.ends()] == ["FINISHED"] or kind in ("frames", "points")
            assert len(arrived.ends()) == 1

    check()


def test_the_names_of_the_damaged_are_in_the_dead_letters() -> None:
    with copied() as (folder, before):
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
