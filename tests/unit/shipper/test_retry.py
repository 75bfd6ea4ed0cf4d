"""How long a destination is left alone before it is asked again."""

from __future__ import annotations

import pytest

from tracelet.shipper.retry import BackOff


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_waits_grow_from_half_a_second_to_a_minute_and_go_on(chance: float) -> None:
    wait = BackOff(random=lambda: chance)
    waits = [wait.next_s() for _ in range(2000)]
    assert waits[0] == 0.5
    assert all(0.5 <= one <= 60.0 for one in waits)
    assert waits == sorted(waits)
    assert waits[-1] == 30.0 + 30.0 * chance


def test_an_answer_resets_the_wait() -> None:
    wait = BackOff(random=lambda: 1.0)
    for _ in range(5):
        wait.next_s()
    wait.reset()
    assert wait.next_s() == 0.5


def test_what_the_destination_asks_for_wins_up_to_an_hour() -> None:
    assert BackOff().next_s(asked_s=0.1) == 0.1
    assert BackOff().next_s(asked_s=3600.0) == 3600.0
    for more in (3601.0, 9e11, 9e300, float("inf")):
        assert BackOff().next_s(asked_s=more) == 3600.0


@pytest.mark.parametrize("nonsense", [float("nan"), -1.0])
def test_a_wish_that_is_no_wait_is_none(nonsense: float) -> None:
    assert BackOff(random=lambda: 1.0).next_s(asked_s=nonsense) == 0.5
