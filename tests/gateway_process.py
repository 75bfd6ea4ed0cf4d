"""A real `tracelet gateway` for tests: its own process, free ports, stopped by its pid."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit
from urllib.request import Request, urlopen


def wait_until(holds: Callable[[], bool], within_s: float = 30.0, what: str = "") -> None:
    """Return as soon as it holds; a failure after the limit."""
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, f"{what or holds} does not hold after {within_s} s"
        time.sleep(0.02)


class GatewayProcess:
    """`with GatewayProcess(folder, mlflow) as gateway:`; `again()` starts one more over the same folder."""

    def __init__(
        self,
        folder: Path,
        mlflow: str,
        *options: str,
        environ: Mapping[str, str] | None = None,
        ports: tuple[int, int] = (0, 0),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.mlflow = mlflow
        self.options = options
        self.environ = dict(environ or {})
        self.log_path = folder / "gateway.log"
        ready = folder / "ready.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tracelet", "gateway", "--dir", str(folder), "--mlflow", mlflow]
        command += ["--http-port", str(ports[0]), "--grpc-port", str(ports[1]), "--ready-file", str(ready), *options]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "TRACELET_DIR": str(folder), **self.environ},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        wait_until(lambda: ready.exists() or self.process.poll() is not None, 60, "the gateway's readiness")
        if not ready.exists():
            raise RuntimeError(f"the gateway did not start:\n{self.log}")
        addresses = json.loads(ready.read_text())
        self.http: str = addresses["http"]
        self.grpc: str = addresses["grpc"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def log(self) -> str:
        """All that it has written."""
        return self.log_path.read_text(errors="replace")

    @property
    def ports(self) -> tuple[int, int]:
        """Where it listens, for one that takes its place."""
        return (urlsplit(self.http).port or 0, int(self.grpc.rpartition(":")[2]))

    def again(self) -> GatewayProcess:
        """A new process over the same folder, at the same addresses."""
        return GatewayProcess(self.folder, self.mlflow, *self.options, environ=self.environ, ports=self.ports)

    def stop(self, within_s: float = 60.0) -> int:
        """SIGTERM, and its exit code."""
        self.process.terminate()
        return self.process.wait(within_s)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        """Whatever it does, it is gone afterwards."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def post(
        self, signal_: str, body: bytes, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to one OTLP/HTTP request."""
        host = urlsplit(self.http)
        connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=60)
        try:
            given = {"Content-Type": "application/x-protobuf", **(headers or {})}
            connection.request("POST", f"/v1/{signal_}", body, given)
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def get(self, path: str) -> bytes:
        """The body of a 200."""
        with urlopen(Request(f"{self.http}{path}"), timeout=10) as reply:
            content: bytes = reply.read()
            return content

    def number(self, name: str) -> float:
        """The sum of the series of a metric (without the prefix) whose name and labels begin so."""
        return sum(
            float(line.rpartition(" ")[2])
            for line in self.get("/metrics").decode().splitlines()
            if line.startswith(f"tracelet_gateway_{name}")
        )

    def connect(self) -> socket.socket:
        """A raw connection to its HTTP port."""
        host = urlsplit(self.http)
        return socket.create_connection((host.hostname or "", host.port or 0), timeout=30)
