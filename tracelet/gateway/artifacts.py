"""The gateway's door for artifacts: bytes put over HTTP, resumable, kept by run and digest below its folder.

    HEAD  /v1/artifacts/<run>/<sha256>     how much is there
    PATCH /v1/artifacts/<run>/<sha256>     more of it (Upload-Offset, Upload-Length)

What is complete was compared with its digest and flushed to the disk before that was said. A run's folder belongs to
the first token that puts something into it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tracelet.exporters.artifact_names import is_digest, plain_name
from tracelet.guard import logger

__all__ = ["Artifacts"]

_WIRE = {"tracelet.wire.version": "1.0"}  # by which a client tells our 404 from a stranger's
_BUFFER = 1 << 20
_UNFINISHED_S = 24 * 3600.0
_OWNER = ".owner"
_SLOW_S = 60.0  # without a byte, and the connection is given up: what came stays


@dataclass(frozen=True, slots=True)
class _Upload:
    folder: Path
    whole: Path
    part: Path
    sha256: str


class Artifacts:
    """Holds `folder`. `who(request)` gives the name of the caller's token (empty where none is asked for), or None.

    `may(name, run_id)` tells whether that token may write to a run at all. A file larger than `max_bytes` is refused
    for good; beyond `quota_bytes` in all, files wait (507).
    """

    def __init__(
        self,
        folder: Path,
        who: Callable[[Request], str | None],
        *,
        max_bytes: int,
        quota_bytes: int | None = None,
        may: Callable[[str, str], bool] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._who = who
        self._max_bytes = max_bytes
        self._quota_bytes = quota_bytes
        self._may = may
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
        upload = self._upload(request)
        if isinstance(upload, Response):
            return upload
        return _there(upload, 200) if upload.whole.exists() or upload.part.exists() else _no(404, "nothing of it yet")

    async def _patch(self, request: Request) -> Response:
        upload = self._upload(request)
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
            owned = await run_in_threadpool(self._own, upload.folder, self._who(request) or "")
            return owned or await self._append(request, upload, length)
        finally:
            self._promised -= promised
            self._busy.discard(upload.part)

    def _upload(self, request: Request) -> _Upload | Response:
        name = self._who(request)
        if name is None:
            return _no(401, "no token, or none that is known here")
        run, sha256 = request.path_params["run"], request.path_params["sha256"]
        if plain_name(run) != run or not is_digest(sha256):
            return _no(400, "the path is /v1/artifacts/<run id>/<sha256 in 64 small digits>")
        if self._may is not None and not self._may(name, run):
            return _no(403, "this token may not write to that run")
        folder = self._folder / run
        owner = _owner(folder)
        if owner is not None and owner != name:
            return _no(403, "another token's artifacts are kept for that run")
        return _Upload(folder, folder / sha256, folder / f"{sha256}.part", sha256)

    def _own(self, folder: Path, name: str) -> Response | None:
        """Take the run's folder for this token; of two at the same moment one gets it."""
        folder.mkdir(mode=0o700, exist_ok=True)
        temporary = folder / f".owner-{os.urandom(8).hex()}"
        if _owner(folder) is None:
            temporary.write_text(name, encoding="utf-8")
            try:
                os.link(temporary, folder / _OWNER)  # whole, or not at all
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
            _sync(folder)
            _sync(self._folder)
        return None if _owner(folder) == name else _no(403, "another token's artifacts are kept for that run")

    async def _append(self, request: Request, upload: _Upload, length: int) -> Response:
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
        os.replace(upload.part, upload.whole)
        _sync(upload.folder)
        return _there(upload, 201)


def _there(upload: _Upload, status: int) -> Response:
    is_whole = upload.whole.exists()
    size = _size(upload.whole if is_whole else upload.part)
    headers = {"Upload-Offset": str(size), "Upload-Complete": "?1" if is_whole else "?0", **_WIRE}
    return Response(status_code=status, headers=headers)


def _no(status: int, why: str, retry_after: int | None = None) -> Response:
    headers = _WIRE if retry_after is None else {**_WIRE, "Retry-After": str(retry_after)}
    # The body may not have been read to its end: the connection is no longer of use.
    return Response(why + "\n", status, headers={**headers, "Connection": "close"}, media_type="text/plain")


def _number(request: Request, name: str) -> int | None:
    text = request.headers.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _owner(folder: Path) -> str | None:
    try:
        return (folder / _OWNER).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


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
