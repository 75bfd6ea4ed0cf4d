"""A value too long for one event is put together from its pieces, in any order, over restarts, and checked."""

from __future__ import annotations

import itertools
from hashlib import sha256
from pathlib import Path

import pytest

from tests.arrivals import Memory, arrival, make, started, take
from tests.shipping import START_NS, until
from tracelet.gateway.pieces import FILE, Pieces
from tracelet.otlp.arrival import Piece
from tracelet.records import ParamsLogged, TagsSet

TEXT = "αβγ" * 20_000


def pieces(text: str = TEXT, count: int = 3, key: str = "tracelet.param.long", event: str = "tracelet.params"):
    size = -(-len(text) // count)
    digest = sha256(text.encode()).hexdigest()
    return [
        Piece(event, key, index + 1, count, digest, text[index * size : (index + 1) * size], START_NS + index, "")
        for index in range(count)
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_pieces_may_come_in_any_order(tmp_path: Path, order: tuple[int, ...]) -> None:
    memory, made = Memory(), pieces()
    with started(tmp_path, memory) as intake:
        for index in order:
            take(intake, arrival(pieces=[made[index]]))
        assert until(lambda: memory.records("run-1", ParamsLogged))[0].params == {"long": TEXT}
    assert (tmp_path / "run-1/gateway" / FILE).stat().st_size == 0


def test_pieces_wait_over_a_restart_for_those_that_lack(tmp_path: Path) -> None:
    memory = Memory()
    one, two, three = pieces(event="tracelet.tags", key="tracelet.tag.note")
    for piece in (three, one):
        intake = make(tmp_path, Memory())
        take(intake, arrival(pieces=[piece]))
        intake.close()
    with started(tmp_path, memory) as intake:
        take(intake, arrival(pieces=[one]), arrival(pieces=[two]))
        assert until(lambda: memory.records("run-1", TagsSet))[0].tags == {"note": TEXT}


def test_pieces_that_do_not_add_up_to_the_digest_make_no_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Memory()
    one, two, three = pieces()
    forged = Piece(two.event, two.key, 2, 3, two.digest, "forged", two.time_unix_nano, "")
    with started(tmp_path, memory) as intake:
        take(intake, arrival(pieces=[one, forged, three]), arrival(points=[("a", 1.0, 1)]))
        until(lambda: memory.points("run-1"))
    assert memory.records("run-1", ParamsLogged) == []
    assert "don't add up to the digest" in caplog.text


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    one, two, three = pieces()
    first = Pieces(tmp_path, Piece)
    assert first.take("x", one) is None
    assert first.take("x", two) is None
    first.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-100])
    again = Pieces(tmp_path, Piece)
    assert again.take("x", three) is None
    whole = again.take("x", two)
    assert whole is not None
    assert whole.text == TEXT
    again.close()


def test_a_value_that_never_ends_does_not_make_the_file_grow_for_ever(tmp_path: Path) -> None:
    held = Pieces(tmp_path, Piece, slack=10_000)
    unfinished = pieces(key="tracelet.param.unfinished")
    held.take("x", unfinished[0])
    one_piece = (tmp_path / FILE).stat().st_size
    for n in range(30):
        for piece in pieces(text=f"{n} " * 5_000, key=f"tracelet.param.{n}"):
            if held.take("x", piece) is not None:
                held.done("x", piece)
    assert (tmp_path / FILE).stat().st_size < 3 * one_piece + 40_000
    held.close()
    again = Pieces(tmp_path, Piece, slack=10_000)
    assert again.unfinished == 1
    assert again.take("x", unfinished[2]) is None
    whole = again.take("x", unfinished[1])
    assert whole is not None
    assert whole.text == TEXT
    again.close()


def test_a_file_that_grew_before_is_short_after_a_start(tmp_path: Path) -> None:
    long = Pieces(tmp_path, Piece, slack=10**9)
    first, *_ = pieces(key="tracelet.param.unfinished")
    long.take("x", first)
    for piece in pieces(text="ab" * 500_000, key="tracelet.param.done"):
        if long.take("x", piece) is not None:
            long.done("x", piece)
    long.close()
    assert (tmp_path / FILE).stat().st_size > 1_000_000
    again = Pieces(tmp_path, Piece, slack=10_000)
    assert (tmp_path / FILE).stat().st_size < 300_000
    assert again.unfinished == 1
    again.close()


def test_pieces_without_text_are_bounded_as_well(tmp_path: Path) -> None:
    held = Pieces(tmp_path, Piece, max_bytes=100_000, slack=10_000)
    for index in range(1, 1001):
        held.take("x", Piece("tracelet.params", "tracelet.param.empty", index, 10**6, "0" * 64, "", START_NS, ""))
    assert (tmp_path / FILE).stat().st_size < 100_000  # a hundred of them at the most, and not all
    held.close()


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    held = Pieces(tmp_path, Piece, max_bytes=110_000)
    for n in range(10):
        held.take("x", pieces(key=f"tracelet.param.{n}")[0])
    assert held.unfinished == 5
    held.close()
    again = Pieces(tmp_path, Piece, max_bytes=110_000)
    assert again.unfinished == 5
    again.close()
