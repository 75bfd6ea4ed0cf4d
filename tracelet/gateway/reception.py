"""One request, whatever brought it: who sends it, what it says, into the spool; or the refusal its sender understands.

HTTP and gRPC both end here. `taken` returns only when the spool has the data on the disk: what it returned for may be
acknowledged.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

from tracelet.errors import TraceletError
from tracelet.gateway.aside import Aside
from tracelet.gateway.auth import WIRE_VERSION_HEADER, Auth
from tracelet.gateway.callers import Caller, Forbidden, Full, IntakeInfo, Taken
from tracelet.gateway.limits import BUSY_AGAIN_S, Budget, Encoding, Held, Limits, Refused, Turns, inflate, too_many
from tracelet.gateway.metrics import GatewayMetrics
from tracelet.guard import guard
from tracelet.otlp import decode, measure
from tracelet.otlp.decode import Decoded

__all__ = ["DECODERS", "SIGNALS", "Reception", "Sent", "Signal", "TakesDecoded", "Taking"]

Signal = Literal["metrics", "logs", "traces"]
SIGNALS: tuple[Signal, ...] = ("metrics", "logs", "traces")

FULL_AGAIN_S = 30.0
"""What a client is told to wait when the spool is full, or when its credentials are to be mended first."""

DECODERS: Mapping[str, Callable[[Any], Decoded]] = {
    "metrics": decode.decode_metrics,
    "logs": decode.decode_logs,
    "traces": decode.decode_traces,
}


class Sent(NamedTuple):
    """A request's body as it came."""

    signal: Signal
    data: bytes
    encoding: Encoding
    content_type: str  # the media type alone


class Taking:
    """One request's way through the reception, with the room that it holds there meanwhile."""

    def __init__(self, reception: Reception, caller: Caller, held: Held, room: ExitStack) -> None:
        self._reception = reception
        self._caller = caller
        self._room = room
        self.held = held

    async def taken(self, sent: Sent, pool: ThreadPoolExecutor) -> None:
        """Return once what was sent is stored; in a thread of `pool`.

        Raises:
            Refused: it isn't acknowledged; see `Refused.http`.
        """
        work = pool.submit(self._reception.take, sent, self._caller, self.held)
        # Whoever waits here may be gone (a deadline, a cancelled call) while the thread is still at it: the room is
        # the thread's now. Work that has not begun by then is not begun.
        room = self._room.pop_all()
        work.add_done_callback(lambda _: room.close())
        await asyncio.wrap_future(work)


class TakesDecoded(Protocol):
    """What stands behind the door; `tracelet.gateway.intake.Intake` is the one that keeps things."""

    def take(self, decoded: Decoded, caller: Caller) -> Taken:
        """Store what is ours of a request; returns only when it is on the disk."""

    def run_info(self) -> IntakeInfo:
        """The numbers for /metrics."""


class Reception:
    """Everything between a transport and the intake."""

    def __init__(
        self,
        intake: TakesDecoded,
        auth: Auth,
        limits: Limits,
        metrics: GatewayMetrics,
        aside: Aside,
        *,
        decoders: Mapping[str, Callable[[Any], Decoded]] = DECODERS,
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self.budget = Budget(limits.max_in_flight)
        self._turns = Turns(limits.max_in_flight)
        self.stopping = threading.Event()
        """Set: nothing new is taken (503), what is being taken is finished."""
        self._intake = intake
        self._auth = auth
        self._aside = aside
        self._decoders = decoders

    def admit(self, headers: Mapping[str, str]) -> Caller:
        """Who sends a request with these headers (names in lower case), before its body is read.

        Raises:
            Refused: the gateway is about to stop, or the credentials won't do.
        """
        if self.stopping.is_set():
            raise self.is_stopping()
        return self._auth.caller(headers)

    @staticmethod
    def is_stopping() -> Refused:
        """What is said to whoever comes too late."""
        return Refused(503, "stopping", "the gateway is about to stop: come again", retry_after_s=1.0)

    def is_full(self) -> bool:
        """Whether the spool has no room for one more run; it may look at the disk."""
        return self._intake.run_info().is_full

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Iterator[Taking]:
        """Admit one request, and keep count of what it holds until nobody needs it any more.

        Raises:
            Refused: as `admit`.
        """
        caller = self.admit(headers)
        with ExitStack() as room:
            yield Taking(self, caller, room.enter_context(self.budget.hold()), room)

    def take(self, sent: Sent, caller: Caller, held: Held) -> None:
        """Inflate, decode and store one request; called in a worker thread.

        Raises:
            Refused: it isn't acknowledged; see `Refused.http`.
        """
        body = inflate(sent.data, sent.encoding, self.limits.max_body, held)
        decoded = self._understood(sent.signal, body, sent.content_type)
        if decoded is None:
            return
        taken = self._stored(decoded, caller)
        self.metrics.took(sent.signal, taken, foreign=decoded.foreign, unknown=sum(decoded.unknown.values()))

    def _understood(self, signal: Signal, body: bytes, content_type: str) -> Decoded | None:
        """What a body says; what can't be understood of it is set aside."""
        if measure.holds_more(signal, body, content_type, self.limits.max_items):
            raise too_many(self.limits.max_items)
        with self._turns.of(body):  # without the waiting for the disk, in which all requests are together
            return self._read(signal, body, content_type)

    def _read(self, signal: Signal, body: bytes, content_type: str) -> Decoded | None:
        message = self._parsed(signal, body, content_type)
        decoded = self._decoded(signal, message)
        if decoded is not None and decoded.unknown:
            versions = ", ".join(repr(version)[:40] for version in sorted(decoded.unknown)[:5])
            why = f"its wire version ({versions}) is of a major this release doesn't know"
            self._set_aside(signal, message, "unknown wire version", why)
        return decoded

    def _parsed(self, signal: Signal, body: bytes, content_type: str) -> Any:
        try:
            return decode.parse(signal, body, content_type)
        except (TraceletError, ValueError) as error:
            raise Refused(400, "malformed", str(error)) from None

    def _decoded(self, signal: Signal, message: Any) -> Decoded | None:
        try:
            return self._decoders[signal](message)
        except Exception as error:  # noqa: BLE001 - a fault of ours; the same request would meet it for ever, and hold
            # up the queue of the collector that sends it: so it is kept aside, and acknowledged
            guard.note(f"decode a request of {signal}", error)
            self._set_aside(signal, message, "fault", f"decoding it failed: {type(error).__name__}")
            return None

    def _stored(self, decoded: Decoded, caller: Caller) -> Taken:
        if not decoded.arrivals:
            return Taken()
        try:
            return self._intake.take(decoded, caller)
        except Forbidden as error:
            raise Refused(403, "foreign run", str(error)) from None
        except Full as error:
            guard.limited("full", "nothing is taken: %s", error)
            raise Refused(503, "full", str(error), retry_after_s=FULL_AGAIN_S) from None
        except (TraceletError, OSError) as error:
            guard.limited("spool", "nothing is taken: %s: %s", type(error).__name__, error)
            raise Refused(503, "spool", f"the spool can't be written: {error}", retry_after_s=BUSY_AGAIN_S) from None

    def _set_aside(self, signal: Signal, message: Any, reason: str, why: str) -> None:
        try:
            kept = self._aside.keep(signal, message.SerializeToString(), why)
        except OSError as error:
            raise Refused(503, "spool", f"can't write aside: {error.strerror}", retry_after_s=BUSY_AGAIN_S) from None
        self.metrics.put_aside(reason, kept)

    def toward(self, refused: Refused, headers: Mapping[str, str]) -> Refused:
        """The refusal as this client should get it; logged and counted.

        A collector drops its backlog at a 401 or 403, whoever's fault it is, and its clients' tokens never arrive
        here; it drops a request at a 408 too, which OTLP doesn't list as one to repeat. So only a client that names
        our wire version, and keeps what is refused, is told so; others wait.
        """
        self.metrics.refused(refused.reason)
        if refused.http not in (401, 403, 408):
            return refused
        ours = bool(headers.get(WIRE_VERSION_HEADER, "").strip())
        guard.limited(
            f"refused: {refused.reason}",
            "REFUSED (%s): %s; it is answered with %s",
            refused.reason,
            refused.message,
            refused.http if ours else "503, so that a collector keeps it and asks again",
        )
        if ours:
            return refused
        return Refused(
            503,
            refused.reason,
            f"not taken now ({refused.reason}): {refused.message}; keep it, and send it again once this is mended",
            retry_after_s=refused.retry_after_s or FULL_AGAIN_S,
        )
