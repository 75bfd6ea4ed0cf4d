"""Places for messages under way: in the order of coming, and none is held by somebody idle while others wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tracelet.gateway.places import Crowded, Places

FOREVER = 1e6


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


class Holder:
    """Somebody who asks for a place and keeps it until told to let it go."""

    def __init__(self, places: Places) -> None:
        self.has = asyncio.Event()
        self.may_go = asyncio.Event()
        self.task = asyncio.create_task(self._hold(places))

    async def _hold(self, places: Places) -> None:
        async with places.one():
            self.has.set()
            await self.may_go.wait()

    async def leave(self) -> None:
        self.may_go.set()
        await self.task


def test_a_place_is_given_on_in_the_order_of_coming() -> None:
    async def test() -> None:
        places = Places(1, crowded_s=FOREVER, max_waiting=10)
        first, second, third = (Holder(places) for _ in range(3))
        await first.has.wait()
        assert not second.has.is_set()
        await first.leave()
        await second.has.wait()
        assert not third.has.is_set()
        await second.leave()
        await third.has.wait()
        await third.leave()

    run(test)


def test_whoever_holds_a_place_for_nothing_goes_when_another_wants_it() -> None:
    async def test() -> None:
        places = Places(2, crowded_s=0.0, max_waiting=10)
        idle = [Holder(places) for _ in range(2)]
        for one in idle:
            await one.has.wait()
        wanting = Holder(places)
        await wanting.has.wait()
        with pytest.raises(Crowded, match="while others waited"):
            await idle[0].task
        assert not idle[1].task.done()  # nobody else waits: only as many go as have to
        await wanting.leave()
        await idle[1].leave()

    run(test)


def test_a_place_may_be_held_for_long_while_nobody_wants_it() -> None:
    async def test() -> None:
        places = Places(1, crowded_s=0.0, max_waiting=10)
        alone = Holder(places)
        await alone.has.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert not alone.task.done()
        await alone.leave()

    run(test)


def test_many_idle_callers_keep_nobody_out() -> None:
    async def test() -> None:
        places = Places(4, crowded_s=0.0, max_waiting=1000)
        idle = [Holder(places) for _ in range(100)]
        wanting = Holder(places)
        await wanting.has.wait()
        await wanting.leave()
        for one in idle:
            one.may_go.set()
        ended = await asyncio.gather(*(one.task for one in idle), return_exceptions=True)
        assert sum(isinstance(one, Crowded) for one in ended) >= 97

    run(test)


def test_the_queue_is_bounded() -> None:
    async def test() -> None:
        places = Places(1, crowded_s=FOREVER, max_waiting=1)
        first, second = Holder(places), Holder(places)
        await first.has.wait()
        with pytest.raises(Crowded, match="wait already"):
            await Holder(places).task
        await first.leave()
        await second.has.wait()
        await second.leave()

    run(test)


def test_when_the_places_close_those_who_wait_go_at_once_and_holders_when_their_time_is_over() -> None:
    async def test() -> None:
        places = Places(1, crowded_s=0.0, max_waiting=10)
        holding, waiting = Holder(places), Holder(places)
        await holding.has.wait()
        places.close()
        for one in (waiting, holding, Holder(places)):
            with pytest.raises(Crowded):
                await one.task

    run(test)


def test_a_place_is_not_lost_with_one_who_is_cancelled_waiting_or_holding_it_or_as_it_is_given() -> None:
    async def test() -> None:
        places = Places(1, crowded_s=FOREVER, max_waiting=10)
        first, second, third, fourth = (Holder(places) for _ in range(4))
        await first.has.wait()
        first.may_go.set()
        second.task.cancel()  # while it waits; the place is free before it knows that it is cancelled
        await first.task
        with pytest.raises(asyncio.CancelledError):
            await second.task
        third.task.cancel()  # the place has just been given to it
        with pytest.raises(asyncio.CancelledError):
            await third.task
        await fourth.has.wait()
        fourth.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fourth.task
        last = Holder(places)
        await last.has.wait()
        await last.leave()

    run(test)
