"""Any interleaving of logging, reading and restarting reads every record once, in order; any damage is survived."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.spool.pens import TEXT, Story, drain, end, pen
from tracelet.spool.cursor import Journal, Progress, journal_name
from tracelet.spool.reader import START, Position, SlotRange, SpoolReader
from tracelet.spool.store import Attempt, Manifest, move_delivered, seal, update_manifest

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("points"), st.integers(1, 40)),
        st.tuples(st.just("frame"), st.integers(0, 300)),
        st.tuples(st.just("many"), st.integers(1, 5)),
        st.tuples(st.just("poll"), st.integers(1, 60)),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("move"), st.just(0)),
    ),
    max_size=30,
)


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="spool-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.booleans(), st.booleans())
def test_every_record_is_read_once_and_in_order(steps: list[tuple[str, int]], mapped: bool, strong_order: bool) -> None:
    with folder() as place:
        writer = pen(place, slots_per_segment=16, mapped=mapped)
        writer.frame(TEXT, b"", 1)
        name = str(writer.writer_id)
        reader, story = SpoolReader(place, strong_order=strong_order), Story()
        points: list[tuple[str, float, int]] = []
        frames = [b""]

        def poll(limit: int) -> bool:
            ranges, story.position = reader.poll(name, story.position, limit, dead=False)
            story.take(reader, ranges)
            return bool(ranges)

        for step, number in steps:
            if step == "points":
                for i in range(number):
                    points.append((f"m{i % 3}", i / 3, i))
                    writer.log(*points[-1])
            elif step == "many":
                values = {f"k{i}": float(i) for i in range(number)}
                writer.log_many(values, number)
                points += [(one, value, number) for one, value in values.items()]
            elif step == "frame":
                frames.append(b"f" * number)
                writer.frame(TEXT, frames[-1], 1)
            elif step == "poll":
                poll(number)
            elif step == "restart":
                reader.close()
                reader = SpoolReader(place, strong_order=strong_order)
            else:
                for segment in range(1, story.position.segment):
                    assert seal(place, name, segment)
                move_delivered(place, [{name: story.position}])
        end(writer)
        while poll(7) or poll(7):  # twice: without strong order a slot counts at the second look
            pass
        reader.close()
        assert story.points == points
        assert [payload for kind, payload in story.frames if kind == TEXT] == frames
        assert story.position.open == ()
        assert reader.ended(name)
        assert len(set(story.slots())) == len(story.slots())
        assert not story.damaged


DAMAGE = st.lists(
    st.tuples(st.integers(0, 10**9), st.one_of(st.integers(1, 255), st.just("cut"), st.just("zero"), st.just("noise"))),
    min_size=1,
    max_size=6,
)


def harm(path: Path, damage: list[tuple[int, object]]) -> None:
    data = bytearray(path.read_bytes())
    for where, how in damage:
        if not data:
            break
        at = where % len(data)
        if how == "cut":
            del data[at:]
        elif how == "zero":
            data[at : at + 5000] = bytes(len(data[at : at + 5000]))
        elif how == "noise":
            data[at : at + 100] = bytes((at * 7 + i * 31) & 255 for i in range(len(data[at : at + 100])))
        else:
            data[at] ^= int(how)  # type: ignore[call-overload]
    path.write_bytes(data)


@settings(max_examples=150, deadline=None)
@given(DAMAGE, st.sampled_from(["points", "frames", "seal"]), st.booleans(), st.booleans())
def test_no_damage_to_a_segment_or_its_frames_stops_a_reader(
    damage: list[tuple[int, object]], kind: str, is_sealed: bool, dead: bool
) -> None:
    with folder() as place:
        writer = pen(place, slots_per_segment=256)
        for i in range(600):
            writer.log("a", i / 2, i)
            if i % 20 == 0:
                writer.frame(TEXT, b"frame %d" % i, 1)
        end(writer)
        name = str(writer.writer_id)
        before = drain(place)[name]
        if is_sealed or kind == "seal":
            for number in (1, 2, 3):
                assert seal(place, name, number, dead=True)
        harm(sorted(place.glob(f"*.{kind}"))[damage[0][0] % len(list(place.glob(f"*.{kind}")))], damage)
        # What is read: names may be lost with their frames, so records are compared as bytes.
        reader, position = SpoolReader(place), START
        polls, taken = 0, []
        while True:
            ranges, position = reader.poll(name, position, 100, dead=dead)
            if not ranges:
                break
            polls += 1
            assert polls < 200
            for piece in ranges:
                assert piece.first < piece.end
                taken.append(reader.read(piece))
                assert reader.read(piece) == taken[-1]
        list(reader.scan_frames(name))
        if kind != "points":
            assert sum(len(one.records) for one in taken) == 32 * len(before.points)
        elif is_sealed:
            # The checksums see every change: nothing that was not logged is delivered as if it had been.
            reread = SpoolReader(place)
            harmless = {iteration for _, _, iteration in before.points}
            import struct

            for one in taken:
                for _, value, iteration, _, _ in struct.iter_unpack("<QdqII", one.records):
                    assert iteration in harmless
                    assert value == iteration / 2
            reread.close()
        reader.close()


@settings(max_examples=150, deadline=None)
@given(DAMAGE, st.booleans())
def test_no_damage_to_a_journal_stops_its_reading(damage: list[tuple[int, object]], pending: bool) -> None:
    with folder() as place:
        destinations = ({"id": "file-1", "kind": "file", "spec": {}},)
        update_manifest(
            place, lambda old: Manifest("r", "p", "e", "n").with_attempt(Attempt("k", 1, 1, 0, destinations))
        )
        kept = Journal(place, "file-1")
        said = {None}
        for i in range(1, 20):
            where = Position(1, i, ((1, i - 1),) if i % 3 == 0 else ())
            intent = kept.intend([SlotRange("aa", 1, i - 1, i)], {"aa": where}, {"n": i}, {"s": (i, i)})
            said.add(where)  # type: ignore[arg-type]
            if i < 19 or not pending:
                kept.ack(intent, delivered=1, refused=0)
        kept.close()
        harm(place / journal_name("file-1"), damage)
        progress = Progress(place)
        progress.refresh()
        progress.refresh()
        again = Journal(place, "file-1")
        progress.refresh()
        assert again.positions.get("aa") in said
        assert progress.destinations["file-1"].positions == again.positions
        # And it can be written on.
        if again.pending is not None:
            again.ack(again.pending, delivered=1, refused=0)
        again.ack(again.intend([], {"aa": Position(9, 9)}, {}, {}), delivered=0, refused=0)
        progress.refresh()
        assert progress.destinations["file-1"].positions == again.positions
        again.close()
        last = Journal(place, "file-1")
        assert last.positions["aa"] == Position(9, 9)
        last.close()
