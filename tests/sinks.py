"""A real OTLP receiver for tests, over HTTP and gRPC, in a thread: keeps what it gets and answers as it is told."""

from __future__ import annotations

import gzip
import ssl
import subprocess
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

REQUESTS: dict[str, Any] = {
    "metrics": ExportMetricsServiceRequest,
    "traces": ExportTraceServiceRequest,
    "logs": ExportLogsServiceRequest,
}
RESPONSES: dict[str, Any] = {
    "metrics": ExportMetricsServiceResponse,
    "traces": ExportTraceServiceResponse,
    "logs": ExportLogsServiceResponse,
}
REJECTED = {"metrics": "rejected_data_points", "traces": "rejected_spans", "logs": "rejected_log_records"}


@dataclass(frozen=True)
class Received:
    """One request that came in."""

    signal: str
    message: Any
    body: bytes  # uncompressed
    headers: dict[str, str]
    size: int  # as it came, compressed or not
    path: str = ""  # HTTP's, with its query


@dataclass(frozen=True)
class Say:
    """One answer. `status` is HTTP's; over gRPC `code` counts instead."""

    status: int = 200
    body: bytes | None = None  # None: a proper OTLP answer
    headers: dict[str, str] = field(default_factory=dict)
    rejected: int = 0
    message: str = ""
    code: grpc.StatusCode = grpc.StatusCode.OK
    trailers: tuple[tuple[str, bytes], ...] = ()
    hang_s: float = 0.0
    reset: bool = False
    keep: bool | None = None  # whether the request counts as stored; None: when the answer is a success


class Point(NamedTuple):
    """One of the user's points."""

    name: str
    value: float
    iteration: int
    time_unix_nano: int


Rule = Callable[[Received], Say | None]


class Sink:
    """What both servers share: what was stored, and the script of answers."""

    def __init__(self) -> None:
        self.requests: list[Received] = []  # everything that came in
        self.stored: list[Received] = []  # what was answered with success
        self.script: deque[Say] = deque()  # answers to the next requests, one each
        self.rule: Rule | None = None  # asked when the script is empty
        self.stopping = threading.Event()
        self._lock = threading.Lock()

    def decide(self, received: Received) -> Say:
        with self._lock:
            self.requests.append(received)
            say = self.script.popleft() if self.script else (self.rule and self.rule(received)) or Say()
            if say.keep if say.keep is not None else say.status < 300 and say.code is grpc.StatusCode.OK:
                self.stored.append(received)
        if say.hang_s:
            self.stopping.wait(say.hang_s)
        return say

    def metrics(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        """Resource attributes, scope name and metric of everything stored."""
        for received in self.stored:
            if received.signal == "metrics":
                for resource in received.message.resource_metrics:
                    for scope in resource.scope_metrics:
                        for metric in scope.metrics:
                            yield attributes(resource.resource), scope.scope.name, metric

    def points(self, run_id: str | None = None) -> list[Point]:
        """The user's points in order of arrival."""
        return [
            Point(metric.name, point.as_double, attributes(point)["tracelet.iteration"], point.time_unix_nano)
            for resource, scope, metric in self.metrics()
            if scope == "tracelet" and run_id in (None, resource.get("tracelet.run.id"))
            for point in metric.gauge.data_points
            if not point.flags
        ]

    def spans(self) -> list[Any]:
        return [
            span
            for received in self.stored
            if received.signal == "traces"
            for resource in received.message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def events(self) -> list[Any]:
        return [
            record
            for received in self.stored
            if received.signal == "logs"
            for resource in received.message.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def ends(self, run_id: str) -> list[str]:
        """The states of the ends that were told of a run; a long traceback is told in further events."""
        return [
            attributes(event)["tracelet.run.state"]
            for received in list(self.stored)
            if received.signal == "logs"
            for resource in received.message.resource_logs
            if attributes(resource.resource)["tracelet.run.id"] == run_id
            for scope in resource.scope_logs
            for event in scope.log_records
            if event.event_name == "tracelet.run.ended" and "tracelet.run.state" in attributes(event)
        ]


def attributes(message: Any) -> dict[str, Any]:
    """The attributes of any OTLP message that has some."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in message.attributes}


def certificate(folder: Path, name: str = "localhost", *, expired: bool = False) -> tuple[Path, Path]:
    """A new self-signed certificate for `name` and its key, as files."""
    folder.mkdir(exist_ok=True)
    key, public = folder / "key.pem", folder / "cert.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {public} -days 2"
        f" -subj /CN={name} -addext subjectAltName=DNS:{name}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    if expired:
        again = f"openssl x509 -in {public} -signkey {key} -days 0 -out {public}"
        subprocess.run(again.split(), check=True, capture_output=True)
    return public, key


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class HttpSink(Sink):
    """OTLP over HTTP (HTTPS with `tls`) on a free port; a context manager."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        sink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                encoding = self.headers.get("Content-Encoding", "")
                body = gzip.decompress(raw) if encoding == "gzip" else zlib.decompress(raw) if encoding else raw
                signal = self.path.partition("?")[0].rpartition("/")[2]
                if signal not in REQUESTS:
                    self.reply(404, b"no such path", {})
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                received = Received(signal, REQUESTS[signal].FromString(body), body, headers, len(raw), self.path)
                say = sink.decide(received)
                if say.reset:
                    self.close_connection = True
                    self.connection.close()
                    return
                content = say.body
                if content is None:
                    content = response(signal, say) if say.status < 300 else say.message.encode()
                kind = "application/x-protobuf" if say.status < 300 else "text/plain"
                self.reply(say.status, content, {"Content-Type": kind} | say.headers)

            def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up waiting

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # a reset connection is part of the script

        self.server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        scheme, host = ("http", "127.0.0.1") if tls is None else ("https", "localhost")
        self.url = self.endpoint = f"{scheme}://{host}:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HttpSink:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class GrpcSink(Sink):
    """OTLP over gRPC on a free port (or one that was free before); a context manager."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        super().__init__()
        self.garbage: bytes | None = None  # said instead of an answer, and then nothing counts as stored
        self.server = grpc.server(ThreadPoolExecutor(4))
        for signal, service in (
            ("metrics", "opentelemetry.proto.collector.metrics.v1.MetricsService"),
            ("traces", "opentelemetry.proto.collector.trace.v1.TraceService"),
            ("logs", "opentelemetry.proto.collector.logs.v1.LogsService"),
        ):
            handler = grpc.unary_unary_rpc_method_handler(self._answering(signal))
            self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
        if credentials is None:
            self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            self.port = self.server.add_secure_port(f"localhost:{port}", credentials)
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def _answering(self, signal: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def answer(body: bytes, context: grpc.ServicerContext) -> bytes:
            headers = {str(key): str(value) for key, value in context.invocation_metadata()}
            received = Received(signal, REQUESTS[signal].FromString(body), body, headers, len(body))
            if self.garbage is not None:
                return self.garbage
            say = self.decide(received)
            if say.code is not grpc.StatusCode.OK:
                context.set_trailing_metadata(say.trailers)
                context.abort(say.code, say.message)
            return response(signal, say)

        return answer

    def __enter__(self) -> GrpcSink:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.server.stop(None).wait()


def response(signal: str, say: Say) -> bytes:
    """A proper OTLP answer."""
    message = RESPONSES[signal]()
    if say.rejected or say.message:
        setattr(message.partial_success, REJECTED[signal], say.rejected)
        message.partial_success.error_message = say.message
    return bytes(message.SerializeToString())
