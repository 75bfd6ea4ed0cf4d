"""What may come in: a body is never longer in memory than its limit, and all of them together than theirs."""

from __future__ import annotations

import gzip
import threading
import tracemalloc
import zlib

import pytest

from tests.shipping import until
from tracelet.gateway.limits import Budget, Limits, Refused, Turns, inflate

BODY = b"point " * 1000


def test_each_compression_gives_back_what_was_compressed() -> None:
    raw = zlib.compressobj(wbits=-15)
    assert inflate(BODY, "identity", 10_000) == BODY
    assert inflate(gzip.compress(BODY), "gzip", 10_000) == BODY
    assert inflate(zlib.compress(BODY), "deflate", 10_000) == BODY
    assert inflate(raw.compress(BODY) + raw.flush(), "deflate", 10_000) == BODY


def test_a_gzip_of_several_members_is_one_body() -> None:
    assert inflate(gzip.compress(b"one ") + gzip.compress(b"two"), "gzip", 100) == b"one two"


def test_padding_between_members_and_at_the_end_is_passed_over() -> None:
    padded = gzip.compress(b"one ") + bytes(100_000) + gzip.compress(b"two") + bytes(100_000)
    assert inflate(padded, "gzip", 100) == b"one two"


def test_members_that_end_anywhere_in_what_is_fed_at_once_are_whole() -> None:
    pieces = [bytes([number % 256]) * (number * 97 % 20_000) for number in range(200)]
    noise = [zlib.compress(piece) + piece for piece in pieces]  # some of it doesn't compress
    packed = b"".join(map(gzip.compress, noise))
    assert inflate(packed, "gzip", 10_000_000) == b"".join(noise)


def test_a_stream_of_very_many_members_is_refused_when_they_are_too_many() -> None:
    nothing = gzip.compress(b"")
    assert inflate(nothing * 5_000 + gzip.compress(b"end"), "gzip", 100) == b"end"
    with pytest.raises(Refused) as refused:
        inflate(nothing * 100_000, "gzip", 100)
    assert refused.value.http == 413
    assert "members" in refused.value.message


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("cut", [0, 1, 5, 20, -1])
def test_a_stream_that_is_cut_off_is_malformed(encoding: str, cut: int) -> None:
    whole = gzip.compress(BODY) if encoding == "gzip" else zlib.compress(BODY)
    with pytest.raises(Refused) as refused:
        inflate(whole[:cut], encoding, 10_000)  # type: ignore[arg-type]
    assert refused.value.http == 400


def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not() -> None:
    packed = gzip.compress(bytes(5000))
    assert len(inflate(packed, "gzip", 5000)) == 5000
    with pytest.raises(Refused) as refused:
        inflate(packed, "gzip", 4999)
    assert refused.value.http == 413


def test_a_gzip_bomb_is_stopped_while_it_inflates() -> None:
    bomb = gzip.compress(bytes(500_000_000), 9)  # half a megabyte of zeros of zeros
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as refused:
            inflate(bomb, "gzip", 2_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.http == 413
    assert peak < 6_000_000


def test_what_inflates_is_counted_in_the_budget_while_it_does() -> None:
    budget = Budget(1_000_000)
    packed = gzip.compress(bytes(5_000_000))
    with budget.hold() as held, pytest.raises(Refused) as refused:
        inflate(packed, "gzip", 10_000_000, held)
    assert refused.value.http == 503
    assert refused.value.retry_after_s
    assert budget.in_flight == 0


def test_a_request_gives_its_bytes_back_whatever_ends_it() -> None:
    budget = Budget(100)
    with budget.hold() as held:
        held.add(70)
        with pytest.raises(Refused):
            held.add(70)
    with budget.hold() as held:
        held.add(70)
        with budget.hold() as other, pytest.raises(Refused):
            other.add(31)
        assert budget.in_flight == 70
    assert budget.in_flight == 0


def test_what_is_counted_after_a_request_gave_its_bytes_back_does_not_stay() -> None:
    budget = Budget(100)
    with budget.hold() as held:
        held.add(10)
    held.add(20)
    held.give_back()
    assert budget.in_flight == 0


def test_bodies_are_decoded_together_as_far_as_there_is_room_and_in_the_order_they_came() -> None:
    small, large = bytes(10), bytes(10**6)
    turns = Turns(128 * 25)
    order: list[str] = []
    entered = {name: threading.Event() for name in ("second", "large", "last")}

    def decode(name: str, body: bytes) -> None:
        with turns.of(body):
            order.append(name)
            entered[name].set()

    with turns.of(small):
        second = threading.Thread(target=decode, args=("second", small))
        second.start()
        assert entered["second"].wait(10)  # there is room for two
        second.join()
        threads = []
        for name, body in (("large", large), ("last", small)):
            thread = threading.Thread(target=decode, args=(name, body))
            thread.start()
            threads.append(thread)
            until(lambda: len(turns._queue) == len(threads))
        assert order == ["second"]  # the large one needs all the room there is, and whoever came later doesn't pass it
    for thread in threads:
        thread.join()
    assert order == ["second", "large", "last"]


def test_a_request_may_hold_one_message_for_each_eight_bytes_of_the_longest_body() -> None:
    assert Limits(max_body=16_000).max_items == 2_000
