"""What may come in: a body is never longer in memory than its limit, and all of them together than theirs."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest

from tracelet.gateway.limits import Budget, Refused, inflate

BODY = b"point " * 1000


def test_each_compression_gives_back_what_was_compressed() -> None:
    raw = zlib.compressobj(wbits=-15)
    assert inflate(BODY, "identity", 10_000) == BODY
    assert inflate(gzip.compress(BODY), "gzip", 10_000) == BODY
    assert inflate(zlib.compress(BODY), "deflate", 10_000) == BODY
    assert inflate(raw.compress(BODY) + raw.flush(), "deflate", 10_000) == BODY


def test_a_gzip_of_several_members_is_one_body() -> None:
    assert inflate(gzip.compress(b"one ") + gzip.compress(b"two"), "gzip", 100) == b"one two"


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
