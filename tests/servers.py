"""Real servers for tests: an MLflow server of one worker, and a proxy that sees, and can spoil, what passes."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class MLflowServer:
    """A running `mlflow server`."""

    uri: str
    database: Path
    log: Path
    pid: int


@contextmanager
def mlflow_server(
    folder: Path, *options: str, environ: Mapping[str, str] | None = None, patience_s: float = 120.0
) -> Iterator[MLflowServer]:
    """An MLflow server on a free loopback port, its sqlite database and artifacts in `folder`; gone at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    port, database, log = free_port(), folder / "server.db", folder / "server.log"
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(folder / "artifacts")]
    settings = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "OTEL_"))},
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACELET_DIR": str(folder),  # marks the process as one of this test session
        **(environ or {}),
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options], cwd=folder, env=settings, stdout=out, stderr=out, start_new_session=True
        )
    try:
        until = time.monotonic() + patience_s
        while not _answers(f"{uri}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"mlflow server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
        yield MLflowServer(uri, database, log, process.pid)
    finally:
        # The supervisor and its worker share the session made for them; nobody else is in it.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


# ---- a proxy that sees and spoils -------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """One request that passed the proxy."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0


@dataclass(slots=True)
class Spoil:
    """What to do with a request: forward it or not, and what the client gets for it.

    `answer` None and `hang_up` False: the server's own answer. `hang_up`: the connection ends without one.
    """

    forward: bool = True
    hang_up: bool = False
    answer: tuple[int, bytes, dict[str, str]] | None = None


@dataclass(slots=True)
class Proxy:
    """A recording reverse proxy; `rule` decides about each request, by default to let it pass."""

    uri: str
    seen: list[Seen] = field(default_factory=list)
    rule: Callable[[Seen], Spoil] = field(default=lambda seen: Spoil())

    def calls(self, end: str) -> list[Seen]:
        """Requests whose path, without its query, ends in `end`."""
        return [seen for seen in self.seen if urlsplit(seen.path).path.endswith(end)]


@contextmanager
def recording_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of `upstream`, on a free loopback port, in threads of this process."""
    target = urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen = Seen(self.command, self.path, dict(self.headers), body)
            proxy.seen.append(seen)
            spoil = proxy.rule(seen)
            status, content, headers = 502, b"", {}
            if spoil.forward:
                connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=120)
                sent = {k: v for k, v in seen.headers.items() if k.lower() != "host"}
                connection.request(self.command, self.path, body, sent)
                reply = connection.getresponse()
                status, content = reply.status, reply.read()
                headers = {k: v for k, v in reply.getheaders() if k.lower() in ("content-type", "retry-after")}
                connection.close()
            if spoil.hang_up:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if spoil.answer is not None:
                status, content, headers = spoil.answer
            seen.status = status
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
