"""The journal keeps its word over restarts, cuts and compaction; a follower in another process sees the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tracelet.errors import SpoolError, SpoolFormatError
from tracelet.spool.cursor import Journal, Progress, copy_name, journal_name
from tracelet.spool.journal import head_is_whole, split
from tracelet.spool.points import Address
from tracelet.spool.reader import Position, SlotRange
from tracelet.spool.store import Attempt, Manifest, update_manifest

W = "00000000000000aa"


def journal(folder: Path, one: str = "file-1") -> Journal:
    return Journal(folder, one, clock=lambda: 1.0)


def batch(kept: Journal, first: int, end: int, **more: Any) -> None:
    intent = kept.intend(
        [SlotRange(W, 1, first, end)], {W: Position(1, end)}, {"note": first}, {"s": (end, end + 1)}, **more
    )
    kept.ack(intent, delivered=end - first, refused=1)


def manifest(folder: Path, *ids: str) -> None:
    destinations = tuple({"id": one, "kind": "file", "spec": {}} for one in ids)
    attempt = Attempt("k", 1, 1, 0, destinations)
    update_manifest(folder, lambda old: (old or Manifest("r", "p", "e", "n")).with_attempt(attempt))


def test_a_restart_finds_the_pending_batch_and_what_held_before_it(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    batch(kept, 0, 10)
    ranges = [SlotRange(W, 1, 10, 15), SlotRange(W, 2, 0, 5)]
    intent = kept.intend(
        ranges, {W: Position(2, 5, ((1, 14),))}, {"id": "x"}, {"s": (20, 21), "t": (1, 2)}, {"end": {"a": 1}}
    )
    kept.close()
    again = journal(tmp_path)
    assert again.pending == intent
    assert again.pending is not None
    assert again.pending.extra == {"end": {"a": 1}}
    assert again.positions == {W: Position(1, 10)}
    assert again.stamps == {"s": (10, 11)}
    assert (again.number, again.delivered, again.refused) == (2, 10, 1)
    again.ack(again.pending, delivered=9, refused=1)
    assert again.pending is None
    assert again.positions == {W: Position(2, 5, ((1, 14),))}
    assert again.stamps == {"s": (20, 21), "t": (1, 2)}
    assert (again.number, again.delivered, again.refused) == (2, 19, 2)
    again.close()
    third = journal(tmp_path)
    assert (third.positions, third.stamps, third.pending) == (again.positions, again.stamps, None)
    third.close()


def test_memory_and_closed_attempts_are_kept(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    kept.remember({"run_id": "abc"})
    size = (tmp_path / journal_name("file-1")).stat().st_size
    kept.remember({"run_id": "abc"})
    assert (tmp_path / journal_name("file-1")).stat().st_size == size
    kept.close_attempt("k1")
    kept.close_attempt("k1")
    kept.close()
    again = journal(tmp_path)
    assert (again.memory, again.done) == ({"run_id": "abc"}, {"k1": True})
    again.close()


def test_two_batches_at_once_and_an_ack_of_another_are_faults(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    intent = kept.intend([], {}, {}, {})
    with pytest.raises(SpoolError):
        kept.intend([], {}, {}, {})
    kept.ack(intent, delivered=0, refused=0)
    with pytest.raises(SpoolError):
        kept.ack(intent, delivered=0, refused=0)
    kept.close()


def test_a_torn_last_line_is_cut_at_any_byte(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    batch(kept, 0, 10)
    path = tmp_path / journal_name("file-1")
    before = path.stat().st_size
    kept.intend([SlotRange(W, 1, 10, 20)], {W: Position(1, 20)}, {}, {})
    kept.close()
    whole = path.read_bytes()
    for cut in range(before, len(whole)):
        path.write_bytes(whole[:cut])
        again = journal(tmp_path)
        assert again.pending is None
        assert again.positions == {W: Position(1, 10)}
        assert path.stat().st_size == before
        again.close()
    path.write_bytes(whole)
    again = journal(tmp_path)
    assert again.pending is not None
    again.close()


def test_a_damaged_ack_is_proved_by_the_next_intent(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    batch(kept, 0, 10)
    batch(kept, 10, 20)
    kept.close()
    path = tmp_path / journal_name("file-1")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"ack", b"akc")
    path.write_bytes(b"".join(lines))
    again = journal(tmp_path)
    assert again.positions == {W: Position(1, 20)}
    assert again.stamps == {"s": (20, 21)}
    again.close()


def test_a_journal_of_another_format_is_refused(tmp_path: Path) -> None:
    from tracelet.spool.journal import line

    (tmp_path / journal_name("file-1")).write_bytes(line("journal", {"format": 99, "destination": "file-1"}))
    with pytest.raises(SpoolFormatError, match="format 99"):
        journal(tmp_path)


def test_each_line_can_be_read_without_this_code(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    batch(kept, 0, 10)
    kept.close()
    kinds = []
    for line in (tmp_path / journal_name("file-1")).read_text().splitlines():
        _, kind, body = line.split(" ", 2)
        json.loads(body)
        kinds.append(kind)
    assert kinds == ["journal", "intent", "ack"]


def test_a_long_journal_is_compacted_and_says_the_same(tmp_path: Path) -> None:
    manifest(tmp_path, "file-1")
    kept = journal(tmp_path)
    path = tmp_path / journal_name("file-1")
    progress = Progress(tmp_path)
    kept.remember({"link": "x" * 1000})
    kept.close_attempt("k0")
    first = path.stat().st_ino
    sizes = []
    for i in range(6000):
        intent = kept.intend([SlotRange(W, 1, i, i + 1)], {W: Position(1, i + 1)}, {"pad": "x" * 900}, {"s": (i, i)})
        kept.ack(intent, delivered=1, refused=0)
        sizes.append(path.stat().st_size)
        if i % 100 == 0:
            progress.refresh()
            assert progress.destinations["file-1"].positions == {W: Position(1, i + 1)}
    assert max(sizes) < 4 * 2**20 + 4096
    assert path.stat().st_ino != first
    progress.refresh()
    seen = progress.destinations["file-1"]
    assert (seen.positions, seen.delivered, seen.done) == ({W: Position(1, 6000)}, 6000, {"k0": True})
    kept.close()
    again = journal(tmp_path)
    assert again.positions == {W: Position(1, 6000)}
    assert (again.stamps, again.delivered, again.number) == ({"s": (5999, 5999)}, 6000, 6000)
    assert again.memory == {"link": "x" * 1000}
    again.close()


def test_many_series_are_not_written_again_with_each_batch(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    path = tmp_path / journal_name("file-1")
    many = {f"instance/metric_{i}": (1_700_000_000_000 + i, 1_700_000_000_000 + i) for i in range(100_000)}
    kept.ack(kept.intend([], {}, {}, many), delivered=0, refused=0)
    size = path.stat().st_size
    inode = path.stat().st_ino
    for i in range(200):
        kept.ack(kept.intend([], {}, {}, {"instance/metric_1": (i, i)}), delivered=0, refused=0)
    assert path.stat().st_size - size < 200 * 400
    assert path.stat().st_ino == inode
    kept.close()
    again = journal(tmp_path)
    assert len(again.stamps) == 100_000
    assert again.stamps["instance/metric_1"] == (199, 199)
    again.close()


def test_progress_says_passed_only_when_every_destination_is(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.refresh()
    assert not progress.passed(Address(W, 1, 0))
    manifest(tmp_path)
    progress.refresh()
    assert not progress.passed(Address(W, 1, 0))  # no destination: undelivered
    assert not progress.reached(Address(W, 1, 5))
    manifest(tmp_path, "file-1", "file-2")
    one = journal(tmp_path)
    batch(one, 0, 10)
    progress.refresh()
    assert not progress.passed(Address(W, 1, 0))  # the second has no journal yet
    two = journal(tmp_path, "file-2")
    intent = two.intend([SlotRange(W, 1, 0, 9)], {W: Position(1, 10, ((1, 9),))}, {}, {})
    progress.refresh()
    assert not progress.passed(Address(W, 1, 0))  # under way
    assert progress.destinations["file-2"].pending == intent
    two.ack(intent, delivered=9, refused=0)
    progress.refresh()
    assert progress.passed(Address(W, 1, 8))
    assert not progress.passed(Address(W, 1, 9))  # in flight when it was passed
    assert not progress.passed(Address(W, 1, 10))
    assert not progress.passed(Address("bb", 1, 0))
    assert progress.reached(Address(W, 1, 9))
    assert not progress.reached(Address(W, 1, 10))
    assert progress.reached(Address("bb", 1, 0))
    one.close()
    two.close()


def test_progress_sees_through_a_torn_line_that_was_cut_and_written_anew(tmp_path: Path) -> None:
    manifest(tmp_path, "file-1")
    kept = journal(tmp_path)
    batch(kept, 0, 10)
    kept.close()
    path = tmp_path / journal_name("file-1")
    with open(path, "ab") as file:
        file.write(b"00000000 intent {torn}\n" + b"0000000")
    progress = Progress(tmp_path)
    progress.refresh()
    assert progress.passed(Address(W, 1, 9))
    kept = journal(tmp_path)
    for i in range(10, 30):
        batch(kept, i, i + 1)
    kept.close()
    progress.refresh()
    assert progress.passed(Address(W, 1, 29))
    assert progress.destinations["file-1"].delivered == 30


def test_a_refresh_with_nothing_new_reads_nothing(tmp_path: Path) -> None:
    manifest(tmp_path, "file-1")
    kept = journal(tmp_path)
    batch(kept, 0, 10)
    progress = Progress(tmp_path)
    progress.refresh()
    path = tmp_path / journal_name("file-1")
    data = path.read_bytes()
    path.write_bytes(b"\0" * len(data))  # same file, same size: not looked at
    os.utime(path)
    progress.refresh()
    assert progress.passed(Address(W, 1, 9))
    kept.close()


def test_a_line_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    batch(kept, 0, 10)
    intent = kept.intend([SlotRange(W, 1, 10, 12)], {W: Position(1, 12)}, {}, {})
    full = os.open("/dev/full", os.O_RDWR)
    good = kept._fd
    kept._fd = full
    with pytest.raises(OSError, match="space"):
        kept.ack(intent, delivered=2, refused=0)
    kept._fd = good
    os.close(full)
    assert kept.positions == {W: Position(1, 10)}
    assert kept.pending == intent
    kept.ack(intent, delivered=2, refused=0)
    kept.close()


# ---- damage -----------------------------------------------------------------------------------------------------


def compacted(folder: Path, batches: int = 5) -> Journal:
    """A journal with a head of several lines of stamps, and some batches behind it."""
    kept = journal(folder)
    many = {f"series {i}": (i, i + 1) for i in range(2500)}
    kept.ack(kept.intend([], {"00000000000000bb": Position(3, 7)}, {}, many), delivered=2500, refused=0)
    kept.remember({"run_id": "abc"})
    kept.close_attempt("k0")
    kept._compact(anyway=True)
    for i in range(batches):
        batch(kept, i, i + 1)
    return kept


def harmed(whole: bytes, step: int) -> Iterator[bytes]:
    """`whole` with a byte flipped, a page zeroed, a piece cut out; at every `step`th place."""
    for at in range(0, len(whole), step):
        yield whole[:at] + bytes((whole[at] ^ 4,)) + whole[at + 1 :]
        yield whole[:at] + bytes(len(whole[at : at + 4096])) + whole[at + 4096 :]
        yield whole[:at] + whole[at + 100 :]


def test_no_damage_to_the_head_of_a_compacted_journal_loses_any_of_it(tmp_path: Path) -> None:
    kept = compacted(tmp_path)
    positions, stamps = dict(kept.positions), dict(kept.stamps)
    kept.close()
    path, copy = tmp_path / journal_name("file-1"), tmp_path / copy_name("file-1")
    whole, second = path.read_bytes(), copy.read_bytes()
    tail = whole[len(second) :]
    assert whole == second + tail
    for changed in harmed(second, 997):
        path.write_bytes(changed.removesuffix(b"\n") + b"\n" + tail)
        copy.write_bytes(second)
        again = journal(tmp_path)
        assert (again.positions, again.stamps) == (positions, stamps)
        assert (again.number, again.delivered, again.memory) == (6, 2505, {"run_id": "abc"})
        again.close()
        assert head_is_whole(split(path.read_bytes())[0])  # mended, for followers and for the next damage
    for changed in harmed(second, 9973):  # of the copy alone: nobody needs it
        path.write_bytes(whole)
        copy.write_bytes(changed)
        again = journal(tmp_path)
        assert (again.positions, again.stamps) == (positions, stamps)
        again.close()


def test_a_copy_that_is_newer_than_its_journal_is_not_set_back_by_it(tmp_path: Path) -> None:
    kept = compacted(tmp_path, 0)
    older = (tmp_path / journal_name("file-1")).read_bytes()
    for i in range(5):
        batch(kept, i, i + 1)
    long = (tmp_path / journal_name("file-1")).read_bytes()
    kept._compact(anyway=True)
    batch(kept, 5, 6)
    positions, stamps = dict(kept.positions), dict(kept.stamps)
    tail = (tmp_path / journal_name("file-1")).read_bytes()[(tmp_path / copy_name("file-1")).stat().st_size :]
    kept.close()
    # As if death had come between the two renames, and the disk had then lost the old head.
    (tmp_path / journal_name("file-1")).write_bytes(bytes(len(older)) + b"\n" + long[len(older) :] + tail)
    again = journal(tmp_path)
    assert (again.positions, again.stamps) == (positions, stamps)
    again.close()


def test_without_any_whole_head_what_is_sent_again_gets_the_times_it_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compacted(tmp_path).close()
    path = tmp_path / journal_name("file-1")
    path.write_bytes(path.read_bytes().replace(b" snapshot {", b" snapshoT {"))
    (tmp_path / copy_name("file-1")).unlink()
    again = journal(tmp_path)
    assert again.positions == {W: Position(1, 5)}  # what stands behind the head
    assert again.stamps == {"s": (5, 6)}  # none of those whose points are sent again
    assert "damaged (1 lines)" in caplog.text
    again.close()


def test_a_damaged_intent_is_made_good_by_its_ack(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    for i in range(4):
        batch(kept, i, i + 1)
    kept.close()
    path = tmp_path / journal_name("file-1")
    whole = path.read_bytes().splitlines(keepends=True)
    for damaged in (1, 3, 5, 7):
        path.write_bytes(
            b"".join([*whole[:damaged], whole[damaged].replace(b"intent", b"intend"), *whole[damaged + 1 :]])
        )
        again = journal(tmp_path)
        assert again.positions == {W: Position(1, 4)}
        assert (again.number, again.pending) == (4, None)
        again.close()


def test_a_journal_that_was_taken_away_begins_anew(tmp_path: Path) -> None:
    compacted(tmp_path).close()
    (tmp_path / journal_name("file-1")).unlink()
    again = journal(tmp_path)
    assert (again.positions, again.stamps, again.number) == ({}, {}, 0)
    again.close()
