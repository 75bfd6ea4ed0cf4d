"""Real servers for tests: an MLflow server of one worker, and a proxy that sees, and can spoil, what passes."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """A running `mlflow server` with one worker; its sqlite database and artifacts are in `folder`."""

    def __init__(self, folder: Path, options: tuple[str, ...], environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database = folder / "server.db"
        self.log = folder / "server.log"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        settings = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "OTEL_"))},
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TRACELET_DIR": str(folder),  # marks the process as one of this test session
            **environ,
        }
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, *options], cwd=folder, env=settings, stdout=out, stderr=out, start_new_session=True
            )

    def wait_until_ready(self, patience_s: float = 120.0) -> None:
        """Return once it answers; what it said is in the error if it never does."""
        until = time.monotonic() + patience_s
        while not _answers(f"{self.uri}/health"):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"mlflow server did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it; may be called again."""
        if self.process.poll() is not None:
            return
        # The supervisor and its worker share the session made for them; nobody else is in it.
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

    def artifacts(self, run_id: str) -> dict[str, int]:
        """Path and size of each file of a run."""
        roots = [path for path in (self.folder / "artifacts").glob(f"*/{run_id}/artifacts") if path.is_dir()]
        return {
            str(file.relative_to(root)): file.stat().st_size
            for root in roots
            for file in root.rglob("*")
            if file.is_file()
        }

    def ask(self, call: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer of the REST API, for checking what is there; errors raise."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.uri}/api/2.0/mlflow/{call}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as reply:
            return json.load(reply)


def start_mlflow(folder: Path, *options: str, environ: Mapping[str, str] | None = None) -> MlflowServer:
    """An MLflow server that answers, on a free loopback port; the caller stops it."""
    server = MlflowServer(folder, options, environ or {})
    try:
        server.wait_until_ready()
    except BaseException:
        server.stop()
        raise
    return server


_shared: list[MlflowServer] = []


@contextmanager
def shared_mlflow(folder: Path) -> Iterator[MlflowServer]:
    """One server for all tests of a session: the first who asks starts it, and ends it with the session."""
    if _shared:
        yield _shared[0]
        return
    server = start_mlflow(folder)
    _shared.append(server)
    try:
        yield server
    finally:
        _shared.clear()
        server.stop()


# ---- what stands in MLflow, without mlflow's client (importing it costs 3.6 s) -----------------------------------


class Row(NamedTuple):
    """One stored metric value."""

    key: str
    value: float
    timestamp: int
    step: int
    is_nan: bool


@dataclass(frozen=True, slots=True)
class Info:
    """As `mlflow.entities.RunInfo`."""

    run_id: str
    experiment_id: str
    run_name: str
    user_id: str
    status: str
    start_time: int
    end_time: int | None
    lifecycle_stage: str
    artifact_uri: str


@dataclass(frozen=True, slots=True)
class Data:
    """As `mlflow.entities.RunData`."""

    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class Run:
    """As `mlflow.entities.Run`."""

    info: Info
    data: Data


def rows_of(server: MlflowServer, run_id: str, key: str | None = None) -> list[Row]:
    """The rows of a run (of one metric), in the order in which they were stored; from the database itself."""
    with closing(sqlite3.connect(server.database)) as database:
        found = database.execute(
            "select key, value, timestamp, step, is_nan from metrics where run_uuid = ? and (? is null or key = ?)"
            " order by rowid",
            [run_id, key, key],
        ).fetchall()
    return [Row(key, value, timestamp, step, bool(is_nan)) for key, value, timestamp, step, is_nan in found]


def get_run(server: MlflowServer, run_id: str) -> Run:
    """A run, by its id."""
    return _run(server.ask(f"runs/get?run_id={run_id}")["run"])


def run_of(
    server: MlflowServer,
    run_name: str,
    *,
    project: str | None = None,
    status: str | None = None,
    within_s: float = 30.0,
) -> Run:
    """The run of this name (in that experiment), as soon as it is there (with that status)."""
    until = time.monotonic() + within_s
    while True:
        runs = _runs_named(server, run_name, project)
        fitting = [run for run in runs if status is None or run.info.status == status]
        if fitting:
            return fitting[0]
        if time.monotonic() > until:
            there = [(run.info.run_name, run.info.status) for run in runs]
            raise AssertionError(f"no run {run_name!r} with status {status} in {project} after {within_s} s: {there}")
        time.sleep(0.1)


def _runs_named(server: MlflowServer, run_name: str, project: str | None) -> list[Run]:
    experiments = server.ask("experiments/search", {"max_results": 1000}).get("experiments", [])
    ids = [e["experiment_id"] for e in experiments if project is None or e["name"] == project]
    if not ids:
        return []
    wanted = {"experiment_ids": ids, "filter": f"attributes.run_name = '{run_name}'", "max_results": 100}
    return [_run(run) for run in server.ask("runs/search", wanted).get("runs", [])]


def _run(run: dict[str, Any]) -> Run:
    info, data = run["info"], run["data"]
    fields = {f.name: info.get(f.name) for f in dataclasses.fields(Info)}
    return Run(
        Info(**fields),
        Data(
            {m["key"]: float(m["value"]) for m in data.get("metrics", [])},
            {p["key"]: p["value"] for p in data.get("params", [])},
            {t["key"]: t["value"] for t in data.get("tags", [])},
        ),
    )


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


# ---- a proxy that sees and spoils -------------------------------------------------------------------------------


PASSED_ON = ("content-type", "retry-after", "upload-", "tracelet.")  # beginnings of an answer's headers


@dataclass(slots=True)
class Seen:
    """One request that passed the proxy."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    caller: bytes | None = None  # the certificate that was shown (DER)
    status: int = 0


@dataclass(slots=True)
class Spoil:
    """What to do with a request: forward it or not, and what the client gets for it.

    `answer` None and `hang_up` False: the server's own answer. `hang_up`: the connection ends without one.
    `carried_out`: called once the server has answered, before the client hears of it.
    """

    forward: bool = True
    hang_up: bool = False
    answer: tuple[int, bytes, dict[str, str]] | None = None
    carried_out: Callable[[], None] | None = None


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
def recording_proxy(upstream: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A proxy in front of `upstream`, on a free loopback port, in threads of this process; with `tls` by https."""
    target = urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            caller = self.connection.getpeercert(True) if isinstance(self.connection, ssl.SSLSocket) else None
            seen = Seen(self.command, self.path, dict(self.headers), body, caller)
            proxy.seen.append(seen)
            spoil = proxy.rule(seen)
            status, content, headers = 502, b"", {}
            if spoil.forward:
                connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=120)
                address = urlsplit(self.path)  # absolute when we are asked as an HTTP proxy; then Host is passed on
                sent = {k: v for k, v in seen.headers.items() if address.netloc or k.lower() != "host"}
                path = address._replace(scheme="", netloc="").geturl()
                connection.request(self.command, path, body, sent)
                reply = connection.getresponse()
                status, content = reply.status, reply.read()
                headers = {k: v for k, v in reply.getheaders() if k.lower().startswith(PASSED_ON)}
                connection.close()
                if spoil.carried_out is not None:
                    spoil.carried_out()
            if spoil.hang_up:
                self.close_connection = True
                with suppress(OSError):  # who asked may be gone
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

        do_HEAD = do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        proxy.uri = f"https://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
