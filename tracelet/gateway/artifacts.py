"""The gateway's door for artifacts: bytes put over HTTP, resumable, kept by run and digest until MLflow has them.

    HEAD  /v1/artifacts/<run>/<sha256>     how much is there
    PATCH /v1/artifacts/<run>/<sha256>     more of it (Upload-Offset, Upload-Length)

What is complete was compared with its digest and flushed to the disk before that was said, and stays until the event
that the sender names (`tracelet.artifact.event`) is delivered. Whose a run is decides who
may put files to it; of a run that nobody has heard of yet every token may, since files come before the event that names
them. Strangers can't be in each other's way there: a file under way is one token's, and a whole one is what its digest
says, whoever put it.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tracelet.errors import TraceletError
from tracelet.exporters.artifact_names import EVENT_HEADER, WHY_HEADER, is_digest, is_event_mark, plain_name
from tracelet.gateway.callers import Caller
from tracelet.gateway.held import HeldFiles, Place
from tracelet.gateway.limits import BUSY_AGAIN_S, Budget, Refused
from tracelet.guard import guard, logger

__all__ = ["Artifacts"]

_WIRE = {"tracelet.wire.version": "1.0"}  # by which a client tells our 404 from a stranger's
_BUFFER = 1 << 20
_PIECE = 1 << 16  # what the server hands over at once


class Artifacts:
    """Writes into `held`. `who(headers)` gives the caller, or raises `Refused`.

    `why_not(run_id, caller)` says why a caller may not write to a run, None if it may. `count(reason)` is told of each
    refusal for its token. A file larger than `max_bytes` is refused for good; beyond `quota_bytes` in all, files wait
    (507). `budget` bounds what all requests hold in memory. After `pause_s` without a byte, or `request_s` in all, a
    request is over: what came stays, and others may go on with the file.
    """

    def __init__(
        self,
        held: HeldFiles,
        who: Callable[[Mapping[str, str]], Caller],
        *,
        max_bytes: int,
        quota_bytes: int | None = None,
        why_not: Callable[[str, Caller], str | None] = lambda run_id, caller: None,
        count: Callable[[str], None] = lambda reason: None,
        budget: Budget | None = None,
        pause_s: float = 60.0,
        request_s: float = 600.0,
    ) -> None:
        self.held = held
        self._who = who
        self._max_bytes = max_bytes
        self._quota_bytes = quota_bytes
        self._why_not = why_not
        self._count = count
        self._budget = budget or Budget(1 << 62)
        self._pause_s, self._request_s = pause_s, request_s
        self._busy: set[Path] = set()
        self._to_come = 0  # bytes that requests under way may still write

    def routes(self) -> list[Route]:
        """To be mounted in the gateway's app."""
        path = "/v1/artifacts/{run}/{sha256}"
        return [Route(path, self._head, methods=["HEAD"]), Route(path, self._patch, methods=["PATCH"])]

    # ---- requests ------------------------------------------------------------------------------------------------

    async def _head(self, request: Request) -> Response:
        place = await self._place(request)
        if isinstance(place, Response):
            return place
        try:
            if await run_in_threadpool(self.held.promised, place):
                return _complete(place, 200)
        except OSError as error:
            return self._not_now(error)
        return _part(place, 200) if place.part.exists() else _no(404, "nothing of it yet")

    async def _patch(self, request: Request) -> Response:
        place = await self._place(request)
        if isinstance(place, Response):
            return place
        offset, length = _number(request, "upload-offset"), _number(request, "upload-length")
        if offset is None or length is None or offset > length:
            return _no(400, "Upload-Offset and Upload-Length have to be numbers, the first not above the second")
        if length > self._max_bytes:
            return _no(413, f"{length} bytes, and this gateway takes at most {self._max_bytes} a file")
        if place.part in self._busy:
            return _no(423, "another request is writing this file", retry_after=5)
        self._busy.add(place.part)
        try:
            if await run_in_threadpool(self.held.promised, place):
                return _complete(place, 201)
            if place.size() != offset:
                return _part(place, 409)
            if not await self._has_room(length - offset):
                return _no(507, "no room for more artifacts at this gateway until MLflow has some", retry_after=10)
            with self._budget.hold() as memory:
                memory.add(min(length - offset, _BUFFER + _PIECE))
                return await self._append(request, place, length)
        except Refused as busy:
            return _no(busy.http, busy.message, retry_after=round(busy.retry_after_s or BUSY_AGAIN_S))
        except OSError as error:
            return self._not_now(error)
        finally:
            self._busy.discard(place.part)

    async def _has_room(self, count: int) -> bool:
        if self._quota_bytes is None:
            return True
        if self.held.size() + self._to_come + count > self._quota_bytes:
            await run_in_threadpool(self.held.clear)
        return self.held.size() + self._to_come + count <= self._quota_bytes

    async def _place(self, request: Request) -> Place | Response:
        """What the request is about, if its sender may put it."""
        run, sha256 = request.path_params["run"], request.path_params["sha256"]
        event = request.headers.get(EVENT_HEADER, "")
        try:
            caller = self._who(request.headers)
            if plain_name(run) != run or not is_digest(sha256):
                return _no(400, "the path is /v1/artifacts/<run id>/<sha256 in 64 small digits>")
            if event and not is_event_mark(event):
                return _no(400, f"{EVENT_HEADER} has to be 16 small hexadecimal digits")
            why = await run_in_threadpool(self._why_not, run, caller)
            if why is not None:
                raise Refused(403, "foreign run", f"run {run}: {why}")
        except Refused as refused:
            return self._refusal(refused)
        except (TraceletError, OSError) as error:
            logger.error("gateway: whose run %s is can't be told, so its artifacts wait: %s", run, error)
            return _no(503, "whose run this is can't be told now", retry_after=30)
        return self.held.place(run, sha256, caller.name, event)

    @staticmethod
    def _not_now(error: OSError) -> Response:
        logger.error("gateway: an artifact can't be kept: %s", error)
        return _no(507, "this gateway can't write artifacts now", retry_after=30)

    def _refusal(self, refused: Refused) -> Response:
        """For its token: our client keeps the file, and says so; a person has to see it here as well."""
        self._count(refused.reason)
        guard.limited(
            f"refused artifact: {refused.reason}",
            "REFUSED (%s): an artifact: %s; it is answered with %s",
            refused.reason,
            refused.message,
            refused.http,
        )
        return _no(refused.http, refused.message)

    async def _append(self, request: Request, place: Place, length: int) -> Response:
        handle = await run_in_threadpool(self.held.open, place)
        room = length - os.fstat(handle).st_size
        self._to_come += room
        try:
            buffer = bytearray()
            stream = request.stream().__aiter__()
            try:
                until = time.monotonic() + self._request_s
                while True:
                    patience = min(self._pause_s, until - time.monotonic())
                    piece = await asyncio.wait_for(anext(stream, None), patience)
                    if piece is None:
                        break
                    buffer += piece
                    if len(buffer) > room:
                        return _no(400, "more bytes than Upload-Length says")
                    if len(buffer) >= _BUFFER:
                        written = await run_in_threadpool(self.held.write, handle, buffer)
                        room, self._to_come = room - written, self._to_come - written
                        buffer = bytearray()
            except (ClientDisconnect, TimeoutError):
                # What came is kept; the client asks how much that is.
                await run_in_threadpool(self.held.write, handle, buffer)
                return _no(408, "the connection ended, or the time for one request, before the file did")
            await run_in_threadpool(self.held.write, handle, buffer)
            if os.fstat(handle).st_size < length:
                return _part(place, 204)
            other = await run_in_threadpool(self.held.finish, handle, place)
            return _complete(place, 201) if other is None else _no(422, f"these bytes have the sha256 {other}")
        finally:
            self._to_come -= room
            self.held.close(handle, place)


def _complete(place: Place, status: int) -> Response:
    # The size is for people: of a file that has gone to MLflow it isn't known any more.
    headers = {"Upload-Offset": str(place.size()), "Upload-Complete": "?1", **_WIRE}
    return Response(status_code=status, headers=headers)


def _part(place: Place, status: int) -> Response:
    headers = {"Upload-Offset": str(place.size()), "Upload-Complete": "?0", **_WIRE}
    return Response(status_code=status, headers=headers)


def _no(status: int, why: str, retry_after: int | None = None) -> Response:
    headers = {**_WIRE, WHY_HEADER: why.encode("ascii", "backslashreplace").decode()}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    # The body may not have been read to its end: the connection is no longer of use.
    return Response(why + "\n", status, headers={**headers, "Connection": "close"}, media_type="text/plain")


def _number(request: Request, name: str) -> int | None:
    text = request.headers.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
