"""uvicorn's HTTP connection, with a limit for slow headers and for what a refused client still sends."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["connection_class"]


def connection_class(header_timeout_s: float) -> type[asyncio.Protocol]:
    """A protocol class for `uvicorn.Config(http=...)`.

    A client that opens a connection, or has begun to send headers, has `header_timeout_s` until they are there; and
    one that was refused has as long to end its body, which is thrown away meanwhile. Then the connection is closed
    without a word: an answer nobody asked for could be taken for that to a request (and a 408 drops a collector's
    data).
    """

    class Connection(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # From here uvicorn's own timer runs, until the next byte comes.
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self._calm()
            super().connection_lost(exc)

        def _look(self) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            if not waits or self.transport.is_closing():
                self._calm()
            elif self._patience is None:
                self._patience = self.loop.call_later(header_timeout_s, self._give_up)

        def _calm(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _give_up(self) -> None:
            self._patience = None
            kept_alive = self.cycle is not None and self.timeout_keep_alive_task is not None
            if kept_alive:  # idle between two requests: uvicorn's timer decides
                return
            self.transport.close()

    return Connection
