"""uvicorn's HTTP connection, with a limit for slow headers and for what a refused client still sends."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["connection_class"]


def connection_class(header_timeout_s: float, body_timeout_s: float) -> type[asyncio.Protocol]:
    """A protocol class for `uvicorn.Config(http=...)`.

    A client that opens a connection, or has begun to send headers, has `header_timeout_s` until they are there; one
    that was refused has `body_timeout_s` to end its body, which is thrown away meanwhile. Then the connection is
    closed without a word: an answer nobody asked for could be taken for that to a request (and a 408 drops a
    collector's data).
    """
    patience = {"headers": header_timeout_s, "rest": body_timeout_s}

    class Connection(H11Protocol):
        _waits_for: Literal["headers", "rest"] | None = None
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_for(None)
            super().connection_lost(exc)

        def _look(self) -> None:
            if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
                self._wait_for(None)
            elif self.cycle is not None and self.conn.their_state is h11.SEND_BODY:
                self._wait_for("rest")
            elif self.timeout_keep_alive_task is not None:
                self._wait_for(None)  # idle between two requests: uvicorn has a timer for that
            else:
                self._wait_for("headers")

        def _wait_for(self, what: Literal["headers", "rest"] | None) -> None:
            if what == self._waits_for:
                return
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
            self._waits_for = what
            if what is not None:
                self._patience = self.loop.call_later(patience[what], self.transport.close)

    return Connection
