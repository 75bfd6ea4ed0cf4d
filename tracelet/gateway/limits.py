"""How much may come in: sizes, bytes in flight, time; and the refusal that says what was too much.

Everything here is checked while bytes arrive, so that neither a huge body nor a small one that inflates to a huge one
is ever whole in memory; and before they are decoded, since small bytes may become large messages.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BUSY_AGAIN_S",
    "Budget",
    "Encoding",
    "Held",
    "Limits",
    "Refused",
    "Turns",
    "inflate",
    "too_large",
    "too_many",
]

MIB = 1 << 20

BUSY_AGAIN_S = 5.0
"""What a client is told to wait when the gateway has no room for its request just now."""

Encoding = Literal["identity", "gzip", "deflate"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, and all of them together, may take."""

    max_body: int = 16 * MIB  # bytes of a request once inflated
    max_compressed: int = 16 * MIB  # bytes of a request as sent, where it is compressed
    max_in_flight: int = 256 * MIB  # bytes of all requests that are being received or taken
    header_timeout_s: float = 10.0  # until a request's headers are there
    idle_timeout_s: float = 10.0  # between two pieces of a body
    body_timeout_s: float = 60.0  # for all of a body
    threads: int = 16  # requests being decoded and written at once
    max_requests: int = 1000  # of HTTP, received or taken at once; of gRPC, waiting for their turn
    crowded_s: float = 2.0  # how long a call of gRPC may take over its message while others wait for its place

    @property
    def max_items(self) -> int:
        """How many messages, JSON objects or lists a request may hold: far more than telemetry that means something.

        The densest we know, points of tracelet with nothing but their iteration, are one for each sixteen bytes.
        """
        return self.max_body // 8


class Refused(Exception):
    """A request that is not taken, with what its sender is told.

    `reason` is a word for the metric; `http` the status; `retry_after_s` when to come again, None for never.
    """

    def __init__(self, http: int, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.http = http
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class Held:
    """The bytes of one request in the budget."""

    def __init__(self, take: Callable[[int], None], give_back: Callable[[int], None]) -> None:
        self._take = take
        self._give_back = give_back
        self._lock = threading.Lock()
        self._is_given_back = False
        self.count = 0

    def add(self, count: int) -> None:
        """Count `count` bytes more.

        Raises:
            Refused: all requests together hold too much; 503.
        """
        with self._lock:  # with `give_back`: what is added after it would stay for good
            if self._is_given_back:
                return
            self._take(count)
            self.count += count

    def give_back(self) -> None:
        """Nothing of the request is in memory any more; again is no harm."""
        with self._lock:
            if not self._is_given_back:
                self._is_given_back = True
                self._give_back(self.count)


class Budget:
    """The bytes of all requests in flight, bounded.

    Examples:
        >>> from tracelet.gateway.limits import Budget
        >>> budget = Budget(100)
        >>> with budget.hold() as held:
        ...     held.add(60)
        ...     budget.in_flight
        60
        >>> budget.in_flight
        0
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._lock = threading.Lock()
        self.in_flight = 0

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Room for one request, given back at the end of the block."""
        held = Held(self._take, self._give_back)
        try:
            yield held
        finally:
            held.give_back()

    def _give_back(self, count: int) -> None:
        with self._lock:
            self.in_flight -= count

    def _take(self, count: int) -> None:
        with self._lock:
            if self.in_flight + count > self._max:
                raise Refused(
                    503,
                    "busy",
                    f"requests in flight hold {self.in_flight} of {self._max} bytes: come again",
                    retry_after_s=BUSY_AGAIN_S,
                )
            self.in_flight += count


_GROWS = 128
"""What a byte of a body may become while it is decoded: an empty message is two bytes of it, and then 90 to 250."""


class Turns:
    """Lets only so many bodies be decoded at once as there is room for what they may become, in the order they came.

    They all want the same interpreter: who waits here would wait for that. A body too large for the room has all of it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._taken = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def of(self, body: bytes) -> Iterator[None]:
        """Wait for room for this body; it is given back at the end of the block."""
        size, mine = min(len(body) * _GROWS, self._max), object()
        with self._changed:
            self._queue.append(mine)
            while self._queue[0] is not mine or self._taken + size > self._max:
                self._changed.wait()
            self._queue.popleft()
            self._taken += size
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


_STEP = 256 * 1024  # bytes that come out at once
_FED = 16 * 1024  # bytes that go in at once; zlib copies what a member leaves of them
_MEMBERS = 10_000
"""Of one gzip stream: what cuts its output into members makes some hundred of a body."""
_PADDING = re.compile(rb"\0*")


def inflate(data: bytes, encoding: Encoding, max_bytes: int, held: Held | None = None) -> bytes:
    """The body as it was before compression, at most `max_bytes` long.

    `gzip` may have several members; `deflate` is zlib's format, or a raw stream as some clients send it. What it
    inflates to is counted in `held` while it grows.

    Raises:
        Refused: it is longer or in very many members (413), is no such stream or is cut off (400), or there is no room
            just now (503).

    Examples:
        >>> import gzip
        >>> from tracelet.gateway.limits import inflate
        >>> inflate(gzip.compress(b"points"), "gzip", 100)
        b'points'
    """
    if encoding == "identity":
        if len(data) > max_bytes:
            raise too_large(max_bytes)
        return data
    try:
        return _inflate(data, 31 if encoding == "gzip" else 15, max_bytes, held)
    except zlib.error as error:
        if encoding == "deflate":
            try:
                return _inflate(data, -15, max_bytes, held)
            except zlib.error:
                pass
        raise Refused(400, "malformed", f"the body is no {encoding} stream: {error}") from None


def _inflate(data: bytes, window: int, max_bytes: int, held: Held | None) -> bytes:
    parts: list[bytes] = []
    size = at = 0
    given = memoryview(data)
    for _ in range(_MEMBERS):
        stream = zlib.decompressobj(window)
        while not stream.eof:
            fed: bytes | memoryview = stream.unconsumed_tail
            if not fed:
                fed = given[at : at + _FED]
                at += len(fed)
            piece = stream.decompress(fed, _STEP)
            size += len(piece)
            if size > max_bytes:
                raise too_large(max_bytes)
            if held is not None:
                held.add(len(piece))
            parts.append(piece)
            if not piece and not fed and not stream.eof:
                raise zlib.error("it is cut off")
        if window == 31:  # gzip: padding, or another member
            at = _end_of_padding(data, at - len(stream.unused_data))
        if window != 31 or at == len(data):
            return b"".join(parts)
    raise Refused(413, "too large", f"the gzip stream is cut into more than {_MEMBERS} members: send it as one")


def _end_of_padding(data: bytes, at: int) -> int:
    found = _PADDING.match(data, at)
    return at if found is None else found.end()


def too_many(max_items: int) -> Refused:
    """The refusal of a request that is small as bytes and would be huge once decoded."""
    return Refused(
        413,
        "too large",
        f"the request holds more than {max_items} messages or objects, which is one for each eight bytes of what this"
        " gateway takes: send smaller batches (TRACELET_GATEWAY_MAX_BODY is the limit here)",
    )


def too_large(max_bytes: int) -> Refused:
    """The refusal of a request beyond a limit."""
    return Refused(
        413,
        "too large",
        f"the request is larger than the {max_bytes} bytes this gateway takes: send smaller batches"
        " (TRACELET_GATEWAY_MAX_BODY is the limit here)",
    )
