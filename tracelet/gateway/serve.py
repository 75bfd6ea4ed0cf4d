"""The gateway as a process: its servers, its signals, its end.

SIGTERM or SIGINT: nothing new is taken, what is being taken is finished, the runs are delivered for the time of
grace. A second one ends the process at once; what was acknowledged is on the disk. SIGHUP: certificate read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics

from tracelet.errors import ConfigError
from tracelet.gateway import options as gateway_options
from tracelet.gateway.app import build_app
from tracelet.gateway.artifacts import Artifacts
from tracelet.gateway.aside import Aside
from tracelet.gateway.auth import Auth
from tracelet.gateway.connections import connection_class
from tracelet.gateway.grpc_service import GrpcDoor
from tracelet.gateway.held import HeldFiles
from tracelet.gateway.intake import Intake
from tracelet.gateway.limits import Limits
from tracelet.gateway.metrics import GatewayMetrics
from tracelet.gateway.options import Options
from tracelet.gateway.reception import Reception
from tracelet.gateway.tls import Certificate
from tracelet.gateway.whose import nothing_waits, why_not
from tracelet.guard import guard, logger

__all__ = ["serve"]

_TICK_S = 1.0
_CLEAR_S = 5.0
_SWEEP_S = 3600.0
_DOORS_SHARE = 0.5
"""How much of the grace the requests under way may have; the rest is for delivering."""


def serve(options: Options, environ: Mapping[str, str], *, ready_file: Path | None = None) -> int:
    """Run the gateway until a signal ends it; its exit code.

    Raises:
        ConfigError: a setting, a file or an address that can't be used.
        SpoolError: the folder can't be used, or another gateway does.
    """
    _log_to_stderr()
    auth = Auth(options.tokens)
    certificate = None
    if options.tls_cert is not None and options.tls_key is not None:
        certificate = Certificate(options.tls_cert, options.tls_key, options.tls_client_ca)
    destination, secrets = gateway_options.destination(options, environ)
    runs = options.dir / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    intake = Intake(
        runs,
        [destination],
        {destination["id"]: secrets} if secrets else {},
        environ,
        lost_after_s=options.lost_after,
        max_bytes=options.max_bytes,
    )
    limits = Limits(
        max_body=options.max_body,
        max_compressed=options.max_compressed,
        max_in_flight=options.max_in_flight,
        idle_timeout_s=options.body_timeout / 6,
        header_timeout_s=options.body_timeout / 6,
        body_timeout_s=options.body_timeout,
        threads=options.threads,
    )
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for
    metrics = GatewayMetrics()
    reception = Reception(intake, auth, limits, metrics, Aside(options.dir / "unknown", options.unknown_bytes))
    held = HeldFiles(options.dir / "artifacts", is_over=partial(nothing_waits, runs))
    artifacts = _artifacts(options, held, auth, reception)
    metrics.watch(
        intake.run_info,
        in_flight=lambda: reception.budget.in_flight,
        tokens_bad=lambda: auth.is_bad,
        artifact_bytes=held.size,
    )
    intake.start()
    logger.info("runs go to %s; the folder is %s", destination["spec"]["tracking_uri"], options.dir)
    if auth.is_open:
        logger.warning("no tokens file: everybody who reaches %s may send", options.host)
    process = _Process(options, reception, intake, artifacts, certificate)
    try:
        asyncio.run(process.main(ready_file))
    except BaseException:
        intake.close(0.0)
        raise
    return 0


class _Quiet(uvicorn.Server):
    """uvicorn without its own handling of signals: ours decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    def __init__(
        self,
        options: Options,
        reception: Reception,
        intake: Intake,
        artifacts: Artifacts,
        certificate: Certificate | None,
    ) -> None:
        self._options = options
        self._reception = reception
        self._intake = intake
        self._artifacts = artifacts
        self._certificate = certificate
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="tracelet-take")
        self._ending = asyncio.Event()

    async def main(self, ready_file: Path | None) -> None:
        """From the first listening socket to the last delivered run."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        if self._certificate is not None:
            loop.add_signal_handler(signal.SIGHUP, self._certificate.refresh)
        else:
            loop.add_signal_handler(signal.SIGHUP, lambda: None)  # a closed terminal is no reason to end
        listener = _listen(self._options)
        http = self._http()
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        grpc_door, grpc_address = await self._grpc()
        while not http.started and not serving.done():
            await asyncio.sleep(0.01)
        self._announce(listener, grpc_address, ready_file)
        keeping = asyncio.create_task(self._keep())
        done, _ = await asyncio.wait(
            (serving, asyncio.create_task(self._ending.wait())), return_when=asyncio.FIRST_COMPLETED
        )
        keeping.cancel()
        if serving in done:
            serving.result()  # it ends by itself only by raising
        await self._drain(http, serving, grpc_door)

    def _http(self) -> uvicorn.Server:
        limits = self._reception.limits
        app = build_app(
            self._reception,
            self._pool,
            runs=self._options.dir / "runs",
            routes=self._artifacts.routes(),
            mlflow_public=self._options.mlflow_public,
        )
        return _Quiet(
            uvicorn.Config(
                app,
                http=connection_class(limits.header_timeout_s, limits.body_timeout_s),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,  # longer than a collector's interval: no connection is closed under its hands
                timeout_graceful_shutdown=max(1, round(self._options.grace * _DOORS_SHARE)),
                ssl_context_factory=None if self._certificate is None else self._context,
            )
        )

    def _context(self, *_: object) -> Any:
        assert self._certificate is not None
        return self._certificate.context

    async def _grpc(self) -> tuple[GrpcDoor | None, str | None]:
        port = self._options.grpc_port
        if port is None:
            return None, None
        door = GrpcDoor(self._reception, self._pool)
        host = self._options.host
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._certificate is None:
                bound = door.server.add_insecure_port(address)
            else:
                bound = door.server.add_secure_port(address, self._certificate.for_grpc())
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise ConfigError(f"can't listen on {address} for gRPC: is another program there?", address=address)
        await door.server.start()
        return door, _shown(host, bound)

    def _announce(self, listener: socket.socket, grpc_address: str | None, ready_file: Path | None) -> None:
        scheme = "http" if self._certificate is None else "https"
        http = f"{scheme}://{_shown(self._options.host, listener.getsockname()[1])}"
        sys.stderr.write(f"listening on {http}, grpc {grpc_address or 'off'}\n")
        sys.stderr.flush()
        if ready_file is not None:
            draft = ready_file.with_name(f"{ready_file.name}.part")
            draft.write_text(json.dumps({"http": http, "grpc": grpc_address}) + "\n")
            draft.rename(ready_file)

    async def _keep(self) -> None:
        """What has to be done now and then."""
        swept = cleared = -_SWEEP_S
        while True:
            if self._certificate is not None:
                self._certificate.refresh()
            now = time.monotonic()
            if now - cleared >= _CLEAR_S:
                cleared = now
                with guard("look after the artifacts that are held"):
                    await asyncio.to_thread(
                        self._artifacts.held.clear if now - swept < _SWEEP_S else self._artifacts.held.sweep
                    )
                swept = now if now - swept >= _SWEEP_S else swept
            await asyncio.sleep(_TICK_S)

    def _stop(self, number: signal.Signals) -> None:
        if self._ending.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        logger.info(
            "%s: takes nothing more, and delivers for %.0f s at most; once more ends it at once",
            number.name,
            self._options.grace,
        )
        self._reception.stopping.set()  # /readyz and new requests: 503
        self._ending.set()

    async def _drain(self, http: uvicorn.Server, serving: asyncio.Task[None], grpc_door: GrpcDoor | None) -> None:
        until = time.monotonic() + self._options.grace
        doors_s = self._options.grace * _DOORS_SHARE
        http.should_exit = True
        closing: list[asyncio.Task[None]] = [serving]
        if grpc_door is not None:
            closing.append(asyncio.create_task(grpc_door.close(doors_s)))
        await asyncio.wait(closing, timeout=max(1.0, doors_s))
        grace = max(0.0, until - time.monotonic())
        await asyncio.to_thread(self._intake.close, grace)
        await asyncio.to_thread(self._pool.shutdown)


def _listen(options: Options) -> socket.socket:
    host = options.host.strip("[]")
    try:
        family = socket.getaddrinfo(host, options.http_port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, options.http_port), family=family, backlog=512)
    except OSError as error:
        raise ConfigError(f"can't listen on {options.host}:{options.http_port}: {error.strerror}") from None


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _artifacts(options: Options, held: HeldFiles, auth: Auth, reception: Reception) -> Artifacts:
    return Artifacts(
        held,
        auth.caller,
        max_bytes=options.artifact_max_bytes if options.artifact_max_bytes is not None else 1 << 62,
        quota_bytes=options.artifact_quota,
        why_not=partial(why_not, options.dir / "runs"),
        count=reception.metrics.refused,
        budget=reception.budget,
    )


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("tracelet", logging.INFO), ("uvicorn", logging.ERROR)):
        log = logging.getLogger(name)
        log.addHandler(handler)
        log.setLevel(level)
        log.propagate = False
    # It writes a traceback for each message that is too large, which is answered all the same.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
