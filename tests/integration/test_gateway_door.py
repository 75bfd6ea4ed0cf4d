"""The real `tracelet gateway`, a real MLflow, real clients: what is logged arrives, and nobody brings it down."""

from __future__ import annotations

import gzip
import json
import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogs
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogs
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

import tracelet
from tests.gateway_fakes import points_request, service_request
from tests.gateway_process import GatewayProcess, wait_until
from tests.servers import MlflowServer, rows_of, run_of
from tests.sinks import certificate
from tracelet.cli.main import main

POINTS = points_request("door-1").SerializeToString()
METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
NOWHERE = "http://127.0.0.1:9"  # an MLflow that is away


@pytest.fixture
def gateway(tmp_path: Path, mlflow_server: MlflowServer) -> Iterator[GatewayProcess]:
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri, "--grace", "3s") as process:
        yield process


@pytest.fixture
def lonely(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway whose MLflow is away, with short limits."""
    options = ("--body-timeout", "3s", "--max-body", "2MiB", "--max-compressed", "1MiB", "--grace", "1s")
    with GatewayProcess(tmp_path / "gateway", NOWHERE, *options) as process:
        yield process


def call(address: str, body: bytes, metadata: Any = (), **more: Any) -> tuple[grpc.StatusCode, Any]:
    """Code of one Export, and the error if it is one."""
    with grpc.insecure_channel(address) as channel:
        export = channel.unary_unary(METHOD)
        try:
            export(body, metadata=metadata, timeout=30, **more)
            return grpc.StatusCode.OK, None
        except grpc.RpcError as error:
            return error.code(), error


# ---- runs, end to end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_run_sent_by_otlp_stands_in_mlflow_as_if_it_had_been_written_there(
    gateway: GatewayProcess, mlflow_server: MlflowServer, protocol: str
) -> None:
    endpoint = gateway.http if protocol == "http/protobuf" else f"http://{gateway.grpc}"
    name = f"door-{protocol.partition('/')[0]}"
    exp = tracelet.start_logging(
        exp_name=name, project="door", backend=tracelet.OTLP(endpoint=endpoint, protocol=protocol)
    )
    exp.log_params({"lr": 0.1, "layers": 3})
    exp.set_tags({"team": "a"})
    for step in range(200):
        exp.log_metric("loss", 1.0 / (step + 1), iteration=step)
    assert exp.flush(timeout=60)
    tracelet.stop_logging()

    run = run_of(mlflow_server, name, project="door", status="FINISHED", within_s=60)
    assert (run.data.params["lr"], run.data.params["layers"]) == ("0.1", "3")
    assert run.data.tags["team"] == "a"
    rows = rows_of(mlflow_server, run.info.run_id, "loss")
    assert sorted((row.step, row.value) for row in rows) == [(step, 1.0 / (step + 1)) for step in range(200)]
    assert run.info.end_time is not None
    assert run.info.end_time >= run.info.start_time
    wait_until(lambda: gateway.number("undelivered_records") == 0)
    assert gateway.number("points_total") == 200
    assert gateway.number("mlflow_trouble ") == 0


# ---- others' telemetry, by the official SDK -----------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_ordinary_telemetry_of_a_service_is_acknowledged_and_counted(
    gateway: GatewayProcess, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    resource = Resource.create({"service.name": "shop"})
    if protocol == "http":
        spans: Any = HttpSpans(endpoint=f"{gateway.http}/v1/traces")
        metrics: Any = HttpMetrics(endpoint=f"{gateway.http}/v1/metrics")
        logs: Any = HttpLogs(endpoint=f"{gateway.http}/v1/logs")
    else:
        spans = GrpcSpans(endpoint=gateway.grpc, insecure=True)
        metrics = GrpcMetrics(endpoint=gateway.grpc, insecure=True, compression=grpc.Compression.Gzip)
        logs = GrpcLogs(endpoint=gateway.grpc, insecure=True)
    tracing, metering, logging_ = TracerProvider(resource=resource), None, LoggerProvider(resource=resource)
    tracing.add_span_processor(BatchSpanProcessor(spans))
    with tracing.get_tracer("shop").start_as_current_span("sale"):
        pass
    metering = MeterProvider([PeriodicExportingMetricReader(metrics)], resource=resource)
    metering.get_meter("shop").create_counter("sales").add(1)
    metering.get_meter("shop").create_histogram("prices").record(3.5)
    logging_.add_log_record_processor(BatchLogRecordProcessor(logs))
    from opentelemetry._logs import LogRecord, SeverityNumber

    logging_.get_logger("shop").emit(LogRecord(timestamp=1, body="sold", severity_number=SeverityNumber.INFO))
    with caplog.at_level(logging.WARNING):
        assert tracing.force_flush()
        assert metering.force_flush()
        assert logging_.force_flush()
        for provider in (tracing, metering, logging_):
            provider.shutdown()
    assert [record for record in caplog.records if record.name.startswith("opentelemetry.exporter")] == []
    for signal_ in ("traces", "metrics", "logs"):
        assert gateway.number(f'items_foreign_total{{signal="{signal_}"}}') >= 1
        assert gateway.number(f'items_taken_total{{signal="{signal_}"}}') == 0
    assert not list((gateway.folder / "runs").glob("*/gateway"))


# ---- what is wrong, too much or too slow ----------------------------------------------------------------------------


def test_each_wrong_request_gets_its_status_and_the_gateway_stays_up(lonely: GatewayProcess) -> None:
    statuses = [
        lonely.post("metrics", b"\xff\xff")[0],
        lonely.post("metrics", b"{", {"Content-Type": "application/json"})[0],
        lonely.post("metrics", POINTS, {"Content-Type": "text/html"})[0],
        lonely.post("metrics", POINTS, {"Content-Encoding": "br"})[0],
        lonely.post("metrics", gzip.compress(bytes(400_000_000), 9), {"Content-Encoding": "gzip"})[0],
    ]
    assert statuses == [400, 400, 415, 415, 413]
    assert lonely.post("metrics", POINTS)[0] == 200
    memory = Path(f"/proc/{lonely.process.pid}/status").read_text()
    peak_kb = int(next(line for line in memory.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak_kb < 400_000


def test_a_body_of_100_megabytes_is_413_and_is_never_in_memory(lonely: GatewayProcess) -> None:
    before = _peak_kb(lonely)
    assert lonely.post("metrics", bytes(100_000_000))[0] == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1_000_000)

    assert lonely.post("metrics", pieces())[0] == 413  # type: ignore[arg-type]
    assert _peak_kb(lonely) - before < 30_000
    assert lonely.post("metrics", POINTS)[0] == 200


def _peak_kb(gateway: GatewayProcess) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"resourceMetrics":[' + b"{}," * 660_000 + b"{}]}", "application/json"),
        (b'{"x":[' + b"[]," * 660_000 + b"[]]}", "application/json"),
        (b"\x0a\x00" * 1_000_000, "application/x-protobuf"),
    ],
)
def test_two_kilobytes_that_would_become_a_million_objects_are_413_and_take_no_memory(
    lonely: GatewayProcess, body: bytes, content_type: str
) -> None:
    before = _peak_kb(lonely)
    packed = gzip.compress(body)
    assert len(packed) < 5_000
    headers = {"Content-Encoding": "gzip", "Content-Type": content_type}
    assert [lonely.post("metrics", packed, headers)[0] for _ in range(3)] == [413] * 3
    assert _peak_kb(lonely) - before < 15_000
    assert lonely.post("metrics", POINTS)[0] == 200


@pytest.mark.parametrize("signal_", ["metrics", "logs", "traces"])
def test_as_many_empty_messages_as_are_taken_at_once_take_bounded_memory(lonely: GatewayProcess, signal_: str) -> None:
    resource = points_request(count=0).resource_metrics[0].resource.SerializeToString()
    scope = b"\x0a\x0a\x0a\x08tracelet" + b"\x12\x00" * 260_000  # metrics, log records, spans: the same number
    inner = b"\x0a" + _length(resource) + resource + b"\x12" + _length(scope) + scope
    before = _peak_kb(lonely)
    threads = [
        threading.Thread(target=lonely.post, args=(signal_, b"\x0a" + _length(inner) + inner)) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _peak_kb(lonely) - before < 600_000  # 256 MiB for what is decoded at once, and what threads keep of it
    assert lonely.post("metrics", POINTS)[0] == 200


def _length(content: bytes) -> bytes:
    size, out = len(content), bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes((*out, size))


def test_grpc_is_told_the_same(lonely: GatewayProcess) -> None:
    assert call(lonely.grpc, POINTS)[0] is grpc.StatusCode.OK
    assert call(lonely.grpc, POINTS, compression=grpc.Compression.Gzip)[0] is grpc.StatusCode.OK
    assert call(lonely.grpc, POINTS, compression=grpc.Compression.Deflate)[0] is grpc.StatusCode.OK
    assert call(lonely.grpc, b"\xff\xff")[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert call(lonely.grpc, bytes(3_000_000))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    before = _peak_kb(lonely)
    bomb = call(lonely.grpc, bytes(200_000_000), compression=grpc.Compression.Gzip)[0]
    assert bomb is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert _peak_kb(lonely) - before < 30_000
    assert call(lonely.grpc, service_request().SerializeToString())[0] is grpc.StatusCode.OK


def test_slow_clients_are_left_and_hold_nobody_up(lonely: GatewayProcess) -> None:
    head = b"POST /v1/metrics HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\nContent-Length: 1000\r\n"
    silent = [lonely.connect() for _ in range(50)]
    stuck_head, stuck_body, ours, trickling = (lonely.connect() for _ in range(4))
    stuck_head.sendall(head)
    stuck_body.sendall(head + b"\r\nabc")
    ours.sendall(head + b"tracelet.wire.version: 1.0\r\n\r\nabc")
    trickling.sendall(head + b"\r\n")
    ended = threading.Event()

    def trickle() -> None:
        while not ended.wait(0.2):
            try:
                trickling.sendall(b"a")
            except OSError:
                return

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        assert lonely.post("metrics", POINTS)[0] == 200  # meanwhile
        assert stuck_body.recv(100).startswith(b"HTTP/1.1 503")
        assert ours.recv(100).startswith(b"HTTP/1.1 408")
        assert trickling.recv(100).startswith(b"HTTP/1.1 503")
        assert stuck_head.recv(100) == b""
        assert [sock.recv(100) for sock in silent] == [b""] * 50
    finally:
        ended.set()
        thread.join()
        for sock in (*silent, stuck_head, stuck_body, ours, trickling):
            sock.close()
    assert lonely.post("metrics", POINTS)[0] == 200


def test_noise_on_the_port_brings_nothing_down(lonely: GatewayProcess) -> None:
    for noise in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 1000, b"A" * 100_000):
        with lonely.connect() as connection:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    assert lonely.post("metrics", POINTS)[0] == 200


# ---- tokens ---------------------------------------------------------------------------------------------------------


def token_file(path: Path, **tokens: str) -> None:
    entries = [
        f'[[token]]\nname = "{name.rstrip("0123456789")}"\ntoken = "{token}"\nprojects = ["*"]\n'
        for name, token in tokens.items()
    ]
    draft = path.with_suffix(".new")
    draft.write_text("".join(entries))
    draft.rename(path)


def test_tokens_are_rotated_while_data_flows_and_nothing_is_lost(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    path = tmp_path / "tokens.toml"
    token_file(path, team="sesame-old")
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri, "--tokens", str(path)) as gateway:
        exp = tracelet.start_logging(
            exp_name="rotated",
            project="door",
            backend=tracelet.OTLP(endpoint=gateway.http, headers={"Authorization": "Bearer sesame-old"}),
        )
        for step in range(100):
            exp.log_metric("loss", float(step), iteration=step)
        assert exp.flush(timeout=60)
        token_file(path, team1="sesame-old", team2="sesame-new")
        for step in range(100, 200):
            exp.log_metric("loss", float(step), iteration=step)
        assert exp.flush(timeout=60)
        token_file(path, team="sesame-new")  # too early for this client: it keeps what is refused
        for step in range(200, 300):
            exp.log_metric("loss", float(step), iteration=step)
        wait_until(lambda: gateway.number('requests_total{code="401"') > 0)
        assert not exp.flush(timeout=1)
        token_file(path, team1="sesame-new", team2="sesame-old")
        assert exp.flush(timeout=90)
        tracelet.stop_logging()
        run = run_of(mlflow_server, "rotated", project="door", status="FINISHED", within_s=60)
        rows = rows_of(mlflow_server, run.info.run_id, "loss")
        assert sorted(row.step for row in rows) == list(range(300))
        seen = gateway.get("/metrics") + gateway.log.encode()
        for file in (gateway.folder / "runs").rglob("*"):
            if file.is_file():
                seen += file.read_bytes()
        assert b"sesame" not in seen


def test_a_collector_with_a_wrong_token_is_told_to_come_again_and_our_client_is_not(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token_file(path, team="sesame-right")
    with GatewayProcess(tmp_path / "gateway", NOWHERE, "--tokens", str(path), "--grace", "1s") as gateway:
        wrong = {"Authorization": "Bearer sesame-wrong"}
        status, headers, _ = gateway.post("metrics", POINTS, wrong)
        assert (status, headers["retry-after"]) == (503, "30")
        assert gateway.post("metrics", POINTS, {**wrong, "tracelet.wire.version": "1.0"})[0] == 401
        code, error = call(gateway.grpc, POINTS, (("authorization", "Bearer sesame-wrong"),))
        assert code is grpc.StatusCode.UNAVAILABLE
        trailing = dict(error.trailing_metadata())
        (detail,) = Status.FromString(trailing["grpc-status-details-bin"]).details
        info = RetryInfo()
        assert detail.Unpack(info)
        assert info.retry_delay.seconds == 30
        ours = (("authorization", "Bearer sesame-wrong"), ("tracelet.wire.version", "1.0"))
        assert call(gateway.grpc, POINTS, ours)[0] is grpc.StatusCode.UNAUTHENTICATED
        assert call(gateway.grpc, POINTS, (("authorization", "Bearer sesame-right"),))[0] is grpc.StatusCode.OK
        assert gateway.number('refused_total{reason="wrong token"}') == 4
        assert "REFUSED (wrong token)" in gateway.log
        assert "sesame" not in gateway.log


def test_a_run_of_another_token_is_refused_as_each_client_understands_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token_file(path, a="sesame-a", b="sesame-b")
    with GatewayProcess(tmp_path / "gateway", NOWHERE, "--tokens", str(path), "--grace", "1s") as gateway:
        first, second = ({"Authorization": f"Bearer sesame-{name}"} for name in "ab")
        assert gateway.post("metrics", POINTS, first)[0] == 200
        more = points_request("door-1", count=9).SerializeToString()
        assert gateway.post("metrics", more, {**second, "tracelet.wire.version": "1.0"})[0] == 403
        assert gateway.post("metrics", more, second)[0] == 503
        assert gateway.post("metrics", more, first)[0] == 200


# ---- TLS ------------------------------------------------------------------------------------------------------------


def test_with_a_certificate_both_doors_speak_tls(tmp_path: Path, mlflow_server: MlflowServer) -> None:
    public, key = certificate(tmp_path)
    tls = ("--tls-cert", str(public), "--tls-key", str(key), "--host", "localhost")
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri, *tls) as gateway:
        assert gateway.http.startswith("https://localhost:")
        trust = {"OTEL_EXPORTER_OTLP_CERTIFICATE": str(public)}
        for name, endpoint, protocol in (
            ("tls-http", gateway.http, "http/protobuf"),
            ("tls-grpc", f"https://{gateway.grpc}", "grpc"),
        ):
            with pytest.MonkeyPatch.context() as patch:
                for variable, value in trust.items():
                    patch.setenv(variable, value)
                exp = tracelet.start_logging(
                    exp_name=name, project="door", backend=tracelet.OTLP(endpoint=endpoint, protocol=protocol)
                )
                exp.log_metric("loss", 1.0, iteration=1)
                assert exp.flush(timeout=60)
                tracelet.stop_logging()
            run_of(mlflow_server, name, project="door", status="FINISHED", within_s=60)
        assert main(["gateway", "--probe", f"{gateway.http}/readyz"]) == 0


def test_a_changed_certificate_is_shown_to_new_connections_and_clients_may_have_to_show_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    public, key = certificate(tmp_path / "first")
    options = ("--tls-cert", str(public), "--tls-key", str(key), "--tls-client-ca", str(public), "--host", "localhost")
    with GatewayProcess(tmp_path / "gateway", NOWHERE, *options, "--grace", "1s") as gateway:
        host, port = "localhost", gateway.ports[0]

        def shown(with_certificate: bool = True) -> str:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if with_certificate:
                context.load_cert_chain(tmp_path / "mine.pem")
            with (
                socket.create_connection((host, port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname=host) as connection,
            ):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if not connection.recv(100).startswith(b"HTTP/1.1 200"):
                    raise ConnectionError("closed without an answer")
                return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")

        (tmp_path / "mine.pem").write_bytes(key.read_bytes() + public.read_bytes())
        before = shown()
        assert before.split() == public.read_text().split()
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shown(with_certificate=False)
        new_public, new_key = certificate(tmp_path / "second")
        new_public.replace(public)  # half of it: the old pair stays in force
        wait_until(lambda: "can't be used, the old one stays" in gateway.log)
        assert shown() == before
        new_key.replace(key)
        wait_until(lambda: shown() != before)
        assert shown().split() == public.read_text().split()
        authority, mine = (tmp_path / "mine.pem").read_bytes(), public.read_bytes()
        credentials = grpc.ssl_channel_credentials(mine, authority, authority)
        with grpc.secure_channel(gateway.grpc, credentials) as channel:
            channel.unary_unary(METHOD)(POINTS, timeout=30)


# ---- its life -------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_the_request_under_way_and_takes_no_other(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "gateway", NOWHERE, "--grace", "5s") as gateway:
        head = f"POST /v1/metrics HTTP/1.1\r\nHost: x\r\nContent-Length: {len(POINTS)}\r\n"
        head += "Content-Type: application/x-protobuf"
        with gateway.connect() as under_way, gateway.connect() as kept:
            under_way.sendall(f"{head}\r\n\r\n".encode() + POINTS[:-1])
            kept.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ready\n"):
                answer += kept.recv(1000)
            wait_until(lambda: gateway.number("in_flight_bytes") == len(POINTS) - 1)
            gateway.process.terminate()
            wait_until(lambda: "SIGTERM" in gateway.log)
            under_way.sendall(POINTS[-1:])
            assert under_way.recv(1000).startswith(b"HTTP/1.1 200")
            assert kept.recv(1000) == b""
        assert gateway.process.wait(30) == 0
    assert "Traceback" not in gateway.log


def test_a_call_that_says_nothing_does_not_use_up_the_grace(tmp_path: Path) -> None:
    said = threading.Event()

    def nothing() -> Iterator[bytes]:
        said.wait(60)
        yield from ()

    with (
        GatewayProcess(tmp_path / "gateway", NOWHERE, "--grace", "10m") as gateway,
        grpc.insecure_channel(gateway.grpc) as channel,
    ):
        silent = channel.stream_unary(METHOD).future(nothing())
        assert call(gateway.grpc, service_request().SerializeToString())[0] is grpc.StatusCode.OK  # it has begun by now
        gateway.process.terminate()
        assert silent.exception(60).code() is grpc.StatusCode.UNAVAILABLE
        assert gateway.process.wait(60) == 0
        said.set()


def test_a_gateway_that_holds_as_much_as_it_may_is_not_ready(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "gateway", NOWHERE, "--max-bytes", "800kB", "--grace", "1s") as gateway:
        assert gateway.get("/readyz") == b"ready\n"
        runs = iter(range(100))
        wait_until(lambda: gateway.post("metrics", points_request(f"run-{next(runs)}").SerializeToString())[0] == 503)
        with pytest.raises(HTTPError) as error:
            gateway.get("/readyz")
        assert error.value.code == 503
        error.value.close()
        assert gateway.get("/healthz") == b"alive\n"


def test_artifacts_are_put_with_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    token_file(path, team="sesame-right")
    with GatewayProcess(tmp_path / "gateway", NOWHERE, "--tokens", str(path), "--grace", "1s") as gateway:
        place = Request(f"{gateway.http}/v1/artifacts/run-1/{'0' * 64}", method="HEAD")
        with pytest.raises(HTTPError) as none:
            urlopen(place, timeout=10)
        place.add_header("Authorization", "Bearer sesame-right")
        with pytest.raises(HTTPError) as known:
            urlopen(place, timeout=10)
        none.value.close()
        known.value.close()
        assert (none.value.code, known.value.code) == (401, 404)


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "gateway", NOWHERE, "--grace", "10min") as gateway:
        assert gateway.post("metrics", POINTS)[0] == 200
        gateway.process.terminate()
        wait_until(lambda: "SIGTERM" in gateway.log)
        gateway.process.terminate()
        assert gateway.process.wait(10) == -signal.SIGTERM


def test_what_was_acknowledged_survives_a_kill_and_a_repeat_is_not_stored_again(
    tmp_path: Path, mlflow_server: MlflowServer
) -> None:
    run_id = f"killed-{time.time_ns()}"
    body = points_request(run_id, count=50).SerializeToString()
    with GatewayProcess(tmp_path / "gateway", mlflow_server.uri, "--grace", "1s") as first:
        assert first.post("metrics", body)[0] == 200
        first.kill()
        with first.again() as second:
            assert second.post("metrics", body)[0] == 200
            assert second.number("repeats_total") == 1

            def link() -> str:
                with second.connect() as connection:
                    connection.sendall(f"GET /runs/{run_id} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                    return connection.recv(4000).decode().lower()

            wait_until(lambda: "302" in link().splitlines()[0] or "307" in link().splitlines()[0], 60)
            where = next(line for line in link().splitlines() if line.startswith("location:"))
            mlflow_id = where.rpartition("/")[2].strip()
            wait_until(lambda: len(rows_of(mlflow_server, mlflow_id, "loss")) == 50, 60)
            assert where.split()[1].startswith(f"{mlflow_server.uri}/#/experiments/")
        # To browsers MLflow may have another name: also for runs that are there already, and nobody speaks of.
        second.options = (*second.options, "--mlflow-public", "http://localhost:5001/ml/")
        with second.again():
            public = next(line for line in link().splitlines() if line.startswith("location:"))
        assert public.split()[1] == where.split()[1].replace(mlflow_server.uri, "http://localhost:5001/ml")


def test_a_port_that_is_taken_is_an_error_in_a_line(
    lonely: GatewayProcess, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    http, rpc = lonely.ports
    with pytest.raises(RuntimeError, match="can't listen"):
        GatewayProcess(tmp_path / "other", NOWHERE, ports=(http, 0))
    with pytest.raises(RuntimeError, match="can't listen"):
        GatewayProcess(tmp_path / "third", NOWHERE, ports=(0, rpc))


def test_a_probe_says_whether_each_address_answers(lonely: GatewayProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "--probe", f"{lonely.http}/healthz", f"{lonely.http}/readyz"]) == 0
    assert main(["gateway", "--probe", f"{lonely.http}/healthz", f"{lonely.http}/nowhere"]) == 1
    assert main(["gateway", "--probe", "http://127.0.0.1:9/"]) == 1
    assert main(["gateway", "--probe", "file:///etc/hostname"]) == 1
    said = capsys.readouterr().err
    assert "answers with 404" in said
    assert "can't be reached" in said


def test_the_ready_file_holds_the_addresses(lonely: GatewayProcess) -> None:
    assert json.loads((lonely.folder / "ready.json").read_text()) == {"http": lonely.http, "grpc": lonely.grpc}
    assert f"listening on {lonely.http}, grpc {lonely.grpc}\n" in lonely.log
    assert sys.platform != "linux" or lonely.get("/readyz") == b"ready\n"
