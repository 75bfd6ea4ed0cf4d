"""Which calls of gRPC may receive a message just now: as many as there is room for, and nobody holds up the others.

A message of gRPC is whole in memory before anything of it is seen, so only so many are received at once. A call that
has a place and sends nothing looks like one whose message is on its way; while others wait, it has to go.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Crowded", "Places"]


class Crowded(Exception):
    """The place is needed by others: come again."""


class Places:
    """`count` places, and a queue of at most `max_waiting`; in one event loop.

    Nobody who waits finds a place held for more than `crowded_s`. While nobody waits, a place may be held as long as
    its holder likes.
    """

    def __init__(self, count: int, *, crowded_s: float, max_waiting: int) -> None:
        self._free = count
        self._crowded_s = crowded_s
        self._max_waiting = max_waiting
        self._is_closed = False
        self._holders: dict[asyncio.Timeout, float] = {}  # since when, the longest first
        self._leaving = 0  # holders that were told to go, and are not gone yet
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """A place for the time of the block, in the order of coming.

        Raises:
            Crowded: too many wait already, the block took too long while others waited, or the places are closed.
        """
        await self._turn()
        mine = asyncio.timeout(None)
        try:
            async with mine:
                self._holders[mine] = asyncio.get_running_loop().time()
                self._look()
                yield
        except TimeoutError:
            if mine.expired():
                raise Crowded("its message did not come while others waited for the place") from None
            raise
        finally:
            if self._holders.pop(mine, None) is None:
                self._leaving -= 1
            self._release()

    def close(self) -> None:
        """From now on nobody comes in or waits, and nobody holds a place for more than `crowded_s`."""
        self._is_closed = True
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():
                first.set_exception(Crowded("there are no places any more"))
        self._look()

    def _wanted(self) -> int:
        """How many holders have to go."""
        return len(self._holders) if self._is_closed else max(0, len(self._waiting) - self._leaving)

    async def _turn(self) -> None:
        if self._is_closed:
            raise Crowded("there are no places any more")
        if self._free and not self._waiting:
            self._free -= 1
            return
        if len(self._waiting) >= self._max_waiting:
            raise Crowded(f"{self._max_waiting} others wait already")
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        self._look()
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():  # it was given to us at the same moment
                self._release()
            elif mine in self._waiting:
                self._waiting.remove(mine)
            raise

    def _release(self) -> None:
        self._free += 1
        self._look()

    def _look(self) -> None:
        """Give away what is free; where that is not enough, see to it that a place becomes free."""
        while self._free and self._waiting:
            first = self._waiting.popleft()
            if not first.done():  # else it is cancelled, and its task doesn't know yet
                self._free -= 1
                first.set_result(None)
        if self._timer is None and self._holders and self._wanted():
            longest = next(iter(self._holders.values()))
            self._timer = asyncio.get_running_loop().call_at(longest + self._crowded_s, self._make_way)

    def _make_way(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for holder, since in list(self._holders.items()):
            if not self._wanted() or now < since + self._crowded_s:
                break
            del self._holders[holder]
            self._leaving += 1
            holder.reschedule(now)
        self._look()
