"""The gateway's door for artifacts: bytes put over HTTP, resumable, kept by run and digest below its folder.

    HEAD  /v1/artifacts/<run>/<sha256>     how much is there
    PATCH /v1/artifacts/<run>/<sha256>     more of it (Upload-Offset, Upload-Length)

What is complete was compared with its digest and flushed to the disk before that was said. Whose a run is decides who
may put files to it; of a run that nobody has heard of yet every token may, since files come before the event that names
them. Strangers can't be in each other's way there: a file under way is one token's, and a whole one is what its digest
says, whoever put it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tracelet.errors import TraceletError
from tracelet.exporters.artifact_names import WHY_HEADER, is_digest, plain_name
from tracelet.gateway.callers import Caller
from tracelet.gateway.limits import Refused
from tracelet.guard import guard, logger

__all__ = ["Artifacts"]

_WIRE = {"tracelet.wire.version": "1.0"}  # by which a client tells our 404 from a stranger's
_BUFFER = 1 << 20
_UNFINISHED_S = 24 * 3600.0
_SLOW_S = 60.0  # without a byte, and the connection is given up: what came stays


@dataclass(frozen=True, slots=True)
class _Upload:
    folder: Path
    whole: Path
    part: Path
    sha256: str


class Artifacts:
    """Holds `folder`. `who(headers)` gives the caller, or raises `Refused`.

    `why_not(run_id, caller)` says why a caller may not write to a run, None if it may. `count(reason)` is told of each
    refusal for its token. A file larger than `max_bytes` is refused for good; beyond `quota_bytes` in all, files wait
    (507).
    """

    def __init__(
        self,
        folder: Path,
        who: Callable[[Mapping[str, str]], Caller],
        *,
        max_bytes: int,
        quota_bytes: int | None = None,
        why_not: Callable[[str, Caller], str | None] = lambda run_id, caller: None,
        count: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._who = who
        self._max_bytes = max_bytes
        self._quota_bytes = quota_bytes
        self._why_not = why_not
        self._count = count
        self._clock = clock
        self._busy: set[Path] = set()
        self._promised = 0  # bytes that requests under way may still write
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = _bytes_in(folder)

    def routes(self) -> list[Route]:
        """To be mounted in the gateway's app."""
        path = "/v1/artifacts/{run}/{sha256}"
        return [Route(path, self._head, methods=["HEAD"]), Route(path, self._patch, methods=["PATCH"])]

    def held_bytes(self) -> int:
        """What stands in the folder, unfinished uploads too."""
        return self._held

    def sweep(self) -> int:
        """Delete uploads that nobody went on with for a day; how many there were."""
        gone = 0
        for part in self._folder.glob("*/*.part"):
            try:
                stale = self._clock() - part.stat().st_mtime > _UNFINISHED_S
                if stale and part not in self._busy:
                    part.unlink()
                    gone += 1
            except FileNotFoundError:
                continue
        if gone:
            logger.info("gateway: %d artifact uploads that were not finished within a day are deleted", gone)
            self._held = _bytes_in(self._folder)
        return gone

    # ---- requests ------------------------------------------------------------------------------------------------

    async def _head(self, request: Request) -> Response:
        upload = await self._upload(request)
        if isinstance(upload, Response):
            return upload
        return _there(upload, 200) if upload.whole.exists() or upload.part.exists() else _no(404, "nothing of it yet")

    async def _patch(self, request: Request) -> Response:
        upload = await self._upload(request)
        if isinstance(upload, Response):
            return upload
        offset, length = _number(request, "upload-offset"), _number(request, "upload-length")
        if offset is None or length is None or offset > length:
            return _no(400, "Upload-Offset and Upload-Length have to be numbers, the first not above the second")
        if length > self._max_bytes:
            return _no(413, f"{length} bytes, and this gateway takes at most {self._max_bytes} a file")
        if upload.part in self._busy:
            return _no(423, "another request is writing this file", retry_after=5)
        self._busy.add(upload.part)
        promised = 0
        try:
            if upload.whole.exists():
                return _there(upload, 201)
            have = _size(upload.part)
            if have != offset:
                return _there(upload, 409)
            promised = length - offset
            if self._quota_bytes is not None and self._held + self._promised + promised > self._quota_bytes:
                promised = 0
                return _no(507, "no room for more artifacts at this gateway", retry_after=60)
            self._promised += promised
            return await self._append(request, upload, length)
        finally:
            self._promised -= promised
            self._busy.discard(upload.part)

    async def _upload(self, request: Request) -> _Upload | Response:
        """What the request is about, if its sender may put it."""
        run, sha256 = request.path_params["run"], request.path_params["sha256"]
        try:
            caller = self._who(request.headers)
            if plain_name(run) != run or not is_digest(sha256):
                return _no(400, "the path is /v1/artifacts/<run id>/<sha256 in 64 small digits>")
            why = await run_in_threadpool(self._why_not, run, caller)
            if why is not None:
                raise Refused(403, "foreign run", f"run {run}: {why}")
        except Refused as refused:
            return self._refusal(refused)
        except (TraceletError, OSError) as error:
            logger.error("gateway: whose run %s is can't be told, so its artifacts wait: %s", run, error)
            return _no(503, "whose run this is can't be told now", retry_after=30)
        folder = self._folder / run
        # The name of a token may be any text.
        mine = "." + hashlib.sha256(caller.name.encode()).hexdigest()[:16] if caller.name else ""
        return _Upload(folder, folder / sha256, folder / f"{sha256}{mine}.part", sha256)

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

    async def _append(self, request: Request, upload: _Upload, length: int) -> Response:
        upload.folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(upload.part, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            room = length - os.fstat(handle).st_size
            buffer = bytearray()
            stream = request.stream().__aiter__()
            try:
                while True:
                    piece = await asyncio.wait_for(anext(stream, None), _SLOW_S)
                    if piece is None:
                        break
                    buffer += piece
                    if len(buffer) > room:
                        return _no(400, "more bytes than Upload-Length says")
                    if len(buffer) >= _BUFFER:
                        room -= await run_in_threadpool(self._write, handle, bytes(buffer))
                        buffer.clear()
            except (ClientDisconnect, TimeoutError):
                # What came is kept; the client asks how much that is.
                await run_in_threadpool(self._write, handle, bytes(buffer))
                return _no(408, "the connection ended before the file did")
            await run_in_threadpool(self._write, handle, bytes(buffer))
            if os.fstat(handle).st_size < length:
                return _there(upload, 204)
            return await run_in_threadpool(self._finish, handle, upload)
        except OSError as error:
            logger.error("gateway: an artifact can't be kept below %s: %s", self._folder, error)
            return _no(507, "this gateway can't write artifacts now", retry_after=30)
        finally:
            os.close(handle)

    def _write(self, handle: int, data: bytes) -> int:
        view = memoryview(data)
        while view:
            written = os.write(handle, view)
            self._held += written
            view = view[written:]
        return len(data)

    def _finish(self, handle: int, upload: _Upload) -> Response:
        """Compare with the digest, flush, and give it its name; bytes that differ are thrown away."""
        digest = hashlib.sha256()
        with open(upload.part, "rb") as file:
            while piece := file.read(_BUFFER):
                digest.update(piece)
        if digest.hexdigest() != upload.sha256:
            self._held -= upload.part.stat().st_size
            upload.part.unlink()
            return _no(422, f"these bytes have the sha256 {digest.hexdigest()}")
        os.fsync(handle)
        self._held -= _size(upload.whole)  # another token's, of the same bytes
        os.replace(upload.part, upload.whole)
        _sync(upload.folder)
        _sync(self._folder)
        return _there(upload, 201)


def _there(upload: _Upload, status: int) -> Response:
    is_whole = upload.whole.exists()
    size = _size(upload.whole if is_whole else upload.part)
    headers = {"Upload-Offset": str(size), "Upload-Complete": "?1" if is_whole else "?0", **_WIRE}
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _bytes_in(folder: Path) -> int:
    return sum(_size(path) for path in folder.glob("*/*") if not path.name.startswith("."))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
