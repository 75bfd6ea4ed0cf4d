"""OTLP over HTTP, and what a person, a scraper and a load balancer ask for: the Starlette application.

Answers are in the format of the request: an `Export*ServiceResponse`, or a `google.rpc.Status` that says what was
wrong. A body is read only as far as the limits go; what a refused client still sends is thrown away by the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urlsplit

from google.rpc.status_pb2 import Status
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from tracelet.gateway.limits import BUSY_AGAIN_S, Encoding, Held, Refused, too_large
from tracelet.gateway.reception import SIGNALS, Reception, Sent, Signal
from tracelet.guard import guard
from tracelet.spool.cursor import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GRPC_CODES", "build_app"]

PROTOBUF, JSON = "application/x-protobuf", "application/json"
_ENCODINGS: Mapping[str, Encoding] = {"": "identity", "identity": "identity", "gzip": "gzip", "deflate": "deflate"}

# google.rpc.Code, which both a Status in HTTP and gRPC itself speak.
GRPC_CODES: Mapping[int, int] = {
    400: 3,  # INVALID_ARGUMENT
    401: 16,  # UNAUTHENTICATED
    403: 7,  # PERMISSION_DENIED
    408: 4,  # DEADLINE_EXCEEDED
    413: 8,  # RESOURCE_EXHAUSTED
    415: 3,
    503: 14,  # UNAVAILABLE
}


def build_app(
    reception: Reception,
    pool: ThreadPoolExecutor,
    *,
    runs: Path,
    routes: Sequence[BaseRoute] = (),
    mlflow_public: str | None = None,
) -> Starlette:
    """The application over `reception`; blocking work runs in `pool`.

    `runs` is the folder of the spool: it has to be writable for /readyz. `routes` are served beside it (artifacts).
    `mlflow_public` is where people's browsers find MLflow, if that isn't where the gateway does.
    """
    door = _Door(reception, pool, runs, mlflow_public)
    own: list[BaseRoute] = [
        *(Route(f"/v1/{signal}", door.export(signal), methods=["POST"]) for signal in SIGNALS),
        Route("/healthz", _healthy),
        Route("/readyz", door.ready),
        Route("/metrics", door.numbers),
        Route("/runs/{run_id}", door.show),
    ]
    return Starlette(routes=[*own, *routes])


async def _healthy(_: Request) -> Response:
    return PlainTextResponse("alive\n")


class _Door:
    def __init__(
        self, reception: Reception, pool: ThreadPoolExecutor, runs: Path, mlflow_public: str | None = None
    ) -> None:
        self._reception = reception
        self._pool = pool
        self._runs = runs
        self._mlflow_public = mlflow_public
        self._under_way = 0

    def export(self, signal: Signal) -> Callable[[Request], object]:
        """The endpoint of one signal."""

        async def endpoint(request: Request) -> Response:
            started = time.monotonic()
            kind = _media_type(request)
            answer_kind = JSON if kind == JSON else PROTOBUF
            try:
                await self._receive(signal, kind, request)
                # An empty Export*ServiceResponse: full success.
                answer = Response(b"{}" if answer_kind == JSON else b"", media_type=answer_kind)
            except Refused as refused:
                answer = _refusal(self._reception.toward(refused, request.headers), answer_kind)
            except ClientDisconnect:
                self._reception.metrics.refused("client left")
                answer = Response(status_code=400)  # nobody reads it
            except Exception as error:  # noqa: BLE001 - a fault of ours: a 500 would make a collector drop its data
                self._reception.metrics.refused("fault")
                guard.note(f"take a request of {signal}", error)
                fault = Refused(503, "fault", "the gateway met a fault; its log says more", retry_after_s=BUSY_AGAIN_S)
                answer = _refusal(fault, answer_kind)
            self._reception.metrics.answered(signal, "http", answer.status_code, time.monotonic() - started)
            return answer

        return endpoint

    async def _receive(self, signal: Signal, kind: str, request: Request) -> None:
        reception, headers = self._reception, request.headers
        with self._one_of_many(), reception.request(headers) as taking:
            sent = await self._sent(signal, kind, request, taking.held)
            await taking.taken(sent, self._pool)

    @contextmanager
    def _one_of_many(self) -> Iterator[None]:
        """Here and not in uvicorn: its answer has no time to come again and isn't counted, and a probe gets it too."""
        if self._under_way >= self._reception.limits.max_requests:
            message = f"{self._under_way} requests are under way: come again"
            raise Refused(503, "busy", message, retry_after_s=BUSY_AGAIN_S)
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def _sent(self, signal: Signal, kind: str, request: Request, held: Held) -> Sent:
        headers, limits = request.headers, self._reception.limits
        if kind not in (PROTOBUF, JSON):
            raise Refused(415, "content type", f"the content type {kind[:100]!r} is not {PROTOBUF} or {JSON}")
        encoding = _ENCODINGS.get(headers.get("content-encoding", "").strip().lower())
        if encoding is None:
            raise Refused(415, "content encoding", "the content encoding is not gzip, deflate or identity")
        longest = limits.max_body if encoding == "identity" else limits.max_compressed
        return Sent(signal, await self._body(request, longest, held), encoding, kind)

    async def _body(self, request: Request, longest: int, held: Held) -> bytes:
        """The body, as far as it may be long, and fast enough."""
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > longest:
            raise too_large(longest)
        limits = self._reception.limits
        parts: list[bytes] = []
        size, until = 0, time.monotonic() + limits.body_timeout_s
        stream = request.stream()
        while True:
            patience = min(limits.idle_timeout_s, until - time.monotonic())
            try:
                part = await asyncio.wait_for(anext(stream), patience)
            except TimeoutError:
                raise Refused(408, "slow", "the body did not arrive in time", retry_after_s=BUSY_AGAIN_S) from None
            except StopAsyncIteration:
                return b"".join(parts)
            size += len(part)
            if size > longest:
                raise too_large(longest)
            held.add(len(part))
            parts.append(part)

    async def ready(self, _: Request) -> Response:
        """Whether data can be taken now. MLflow's trouble is no reason to refuse it."""
        if self._reception.stopping.is_set():
            return PlainTextResponse("stopping\n", 503)
        if not os.access(self._runs, os.W_OK | os.X_OK):
            return PlainTextResponse(f"the spool {self._runs} can't be written\n", 503)
        room = os.statvfs(self._runs)
        if room.f_bavail == 0:
            return PlainTextResponse(f"the disk of the spool {self._runs} is full\n", 503)
        if await asyncio.to_thread(self._reception.is_full):
            return PlainTextResponse("the spool holds as much as it may (TRACELET_GATEWAY_MAX_BYTES)\n", 503)
        return PlainTextResponse("ready\n")

    async def numbers(self, _: Request) -> Response:
        """The metrics, in a thread: the intake may look at its disk."""
        text = await asyncio.to_thread(self._reception.metrics.text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def show(self, request: Request) -> Response:
        """To the run's page in MLflow, for links that know only the run's own id."""
        run_id = request.path_params["run_id"]
        link = await asyncio.to_thread(_link, self._runs, run_id, self._mlflow_public)
        if link is None:
            return PlainTextResponse("no such run, or not in MLflow yet\n", 404)
        return RedirectResponse(link)


def _link(runs: Path, run_id: str, mlflow_public: str | None) -> str | None:
    if run_id.startswith(".") or "/" in run_id or "\0" in run_id or len(run_id) > 255:
        return None
    folder = runs / run_id / "gateway"
    if not folder.is_dir():
        return None
    progress = Progress(folder)
    progress.refresh()
    for destination in progress.destinations.values():
        link = destination.memory.get("link")
        if mlflow_public is not None and link is not None:
            experiment, run = (quote(str(destination.memory[key]), safe="") for key in ("experiment_id", "run_id"))
            return f"{mlflow_public}/#/experiments/{experiment}/runs/{run}"
        if isinstance(link, str) and urlsplit(link).scheme in ("http", "https"):
            return link
    return None


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _refusal(refused: Refused, kind: str) -> Response:
    code = GRPC_CODES[refused.http]
    if kind == JSON:
        content = json.dumps({"code": code, "message": refused.message}).encode()
    else:
        content = cast(bytes, Status(code=code, message=refused.message).SerializeToString())
    headers = {}
    if refused.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(refused.retry_after_s)))
    if refused.http == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(content, refused.http, headers, kind)
