"""How long to wait before a destination is asked again: longer each time, never in step with others, without an end."""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["LONGEST_ASKED_S", "BackOff"]

LONGEST_ASKED_S = 3600.0


class BackOff:
    """Waiting times that double from half a second to a minute, each shortened at random by up to a half.

    There is no last one: the data is in files, and an outage of a week is delivered afterwards. The random half
    keeps a hundred shippers from asking a server that has just come back all at once.

    What is asked for is granted up to an hour: a slip in a server's header must not silence its destination for a year,
    and what is longer than a thread can wait would end it.

    Examples:
        >>> from tracelet.shipper.retry import BackOff
        >>> wait = BackOff(random=lambda: 1.0)
        >>> [wait.next_s() for _ in range(9)]
        [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
        >>> wait.next_s(asked_s=7.5), wait.next_s(asked_s=1e30)
        (7.5, 3600.0)
    """

    def __init__(
        self, *, shortest_s: float = 0.5, longest_s: float = 60.0, random: Callable[[], float] = random.random
    ) -> None:
        self.tries = 0
        self._shortest_s = shortest_s
        self._longest_s = longest_s
        self._random = random

    def next_s(self, asked_s: float | None = None) -> float:
        """Seconds to wait now; `asked_s` is what the exporter asks for, and wins, up to `LONGEST_ASKED_S`."""
        # The exponent is bounded: after a night of tries 2.0**tries would overflow.
        full = min(self._longest_s, self._shortest_s * 2.0 ** min(self.tries, 30))
        self.tries += 1
        if asked_s is not None and asked_s >= 0:  # not NaN
            return min(asked_s, LONGEST_ASKED_S)
        return max(self._shortest_s, full * (0.5 + 0.5 * self._random()))

    def reset(self) -> None:
        """The destination has answered; the next trouble starts again at the shortest wait."""
        self.tries = 0
