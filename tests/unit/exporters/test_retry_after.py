"""What is read of a server's wish to be left alone."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from tracelet.exporters.retry_after import granted, retry_after


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1", 1.0),
        (" 60 ", 60.0),
        ("3600", 3600.0),
        ("86400", 3600.0),
        ("9" * 12, 3600.0),
        ("9" * 400, 3600.0),
        ("Thu, 01 Jan 1970 00:00:30 GMT", 20.0),
        ("Thu, 01 Jan 1970 00:00:30 -0000", 20.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
    ],
)
def test_a_wish_is_granted_up_to_an_hour(header: str, seconds: float) -> None:
    assert retry_after(header, now_s=10.0) == seconds


@pytest.mark.parametrize(
    "header",
    [None, "", "0", "-5", "1e3", "nan", "inf", "soon", "Thu, 01 Jan 1970 00:00:05 GMT", "Mon, 99 Foo 2026 GMT"],
)
def test_what_asks_for_nothing_leaves_the_wait_to_our_own_back_off(header: str | None) -> None:
    assert retry_after(header, now_s=10.0) is None


def test_dates_are_read_by_this_machines_clock() -> None:
    assert retry_after(formatdate(time.time() + 100, usegmt=True)) == pytest.approx(100, abs=20)


@pytest.mark.parametrize("asked", [None, 0.0, 0.9, -1e11, float("nan")])
def test_less_than_a_second_is_left_to_our_own_back_off(asked: float | None) -> None:
    assert granted(asked) is None
