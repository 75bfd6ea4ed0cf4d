"""The variants of collector-config/, each doing what its head says, with the real programs."""

from __future__ import annotations

import hashlib
import http.client
import signal
import socket
import ssl
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.otlp_batches import points
from tests.sinks import GrpcSink, HttpSink, attributes, certificate, until
from tests.stack.collectors import (
    MINUTE,
    MS,
    Collector,
    Prometheus,
    Sender,
    as_sent,
    made,
    now_ns,
    refuse,
    send,
    stored_points,
)
from tracelet.otlp.encode import EventsLoad, SpansLoad, resource_bytes


class Guarded:
    """A recording proxy in front of a tenant's Prometheus: refuses every request without exactly its header."""

    def __init__(self, tenant: str, target: str) -> None:
        self.seen: list[tuple[str | None, bytes]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                named = self.headers.get("X-Scope-OrgID")
                proxy.seen.append((named, body))
                self.answer(*(forward(target + self.path, body, self.headers) if named == tenant else (403, b"")))

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/api/v1/otlp"

    def __enter__(self) -> Guarded:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def forward(url: str, body: bytes, headers: Any) -> tuple[int, bytes]:
    kept = {name: headers[name] for name in ("Content-Type", "Content-Encoding") if name in headers}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, kept), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
    except OSError:
        return 503, b""


def test_no_request_mixes_two_tenants_and_a_stopped_server_holds_up_its_own_alone(tmp_path: Path) -> None:
    with (
        Prometheus(tmp_path / "a") as prometheus_a,
        Prometheus(tmp_path / "b") as prometheus_b,
        Guarded("a", prometheus_a.at) as a,
        Guarded("b", prometheus_b.at) as b,
        Collector(
            tmp_path / "collector", "collector.yaml", "tenants.yaml", prometheus=a.url, TRACELET_PROMETHEUS_B_URL=b.url
        ) as collector,
    ):
        start = now_ns(MINUTE)
        batch = made(2_000, "loss", start=start)

        def sent_by_turns(at: int) -> None:
            for number in range(at, at + 1_000, 100):
                for tenant in ("a", "b"):
                    bodies = Sender(f"run-{tenant}").bodies(batch.slice(number, number + 100))
                    assert send(collector.http, bodies, X_Scope_OrgID=tenant) == [200]

        sent_by_turns(0)
        # Who names no tenant, or one that isn't known, is in nobody's data.
        assert send(collector.http, Sender("run-none").bodies(batch)) == [200]
        assert send(collector.http, Sender("run-c").bodies(batch), X_Scope_OrgID="c") == [200]
        until(lambda: (prometheus_a.count("ml_loss"), prometheus_b.count("ml_loss")) == (1_000, 1_000))
        prometheus_b.stop()
        sent_by_turns(1_000)
        until(lambda: prometheus_a.count("ml_loss") == 2_000)
        prometheus_b.start()
        until(lambda: prometheus_b.count("ml_loss") == 2_000, 40)
        for tenant, proxy, server in (("a", a, prometheus_a), ("b", b, prometheus_b)):
            assert {named for named, _ in proxy.seen} == {tenant}
            runs = {series.labels["tracelet_run_id"] for series in server.samples('{tracelet_run_id!=""}')}
            assert runs == {f"run-{tenant}"}
            assert server.count("tracelet_iteration") == 2_000


def test_logs_and_traces_of_two_tenants_are_never_in_one_request_and_never_with_the_others_header(
    tmp_path: Path,
) -> None:
    """In the shipped file both tenants' Loki is one address, and so is their Tempo: the header is all that divides."""
    tenants = {tenant: [Sender(f"run-{tenant}-{number}") for number in range(3)] for tenant in ("a", "b")}
    with (
        HttpSink() as loki,
        GrpcSink() as tempo,
        Collector(
            tmp_path / "collector", "collector.yaml", "tenants.yaml", loki=loki.url, tempo=f"127.0.0.1:{tempo.port}"
        ) as collector,
    ):
        for _ in range(10):
            for tenant, runs in tenants.items():
                for run in runs:
                    event = EventsLoad(resource_bytes(run.resource), (LogRecord(time_unix_nano=now_ns()),))
                    span = Span(trace_id=b"t" * 16, span_id=b"s" * 8, name=run.run_id)
                    spans = SpansLoad(resource_bytes(run.resource), (span,))
                    for load in (event, spans):
                        said = send(collector.http, [load.encode()], signal=load.signal, X_Scope_OrgID=tenant)
                        assert said == [200]
        # Of no tenant, or an unknown one: in nobody's.
        stray = EventsLoad(resource_bytes(Sender("run-c").resource), (LogRecord(time_unix_nano=now_ns()),)).encode()
        assert send(collector.http, [stray], signal="logs") == [200]
        assert send(collector.http, [stray], signal="logs", X_Scope_OrgID="c") == [200]
        until(lambda: len(loki.events()) == len(tempo.spans()) == 10 * 6)
        until(lambda: collector.waiting() == 0)
        assert len(loki.events()) == len(tempo.spans()) == 10 * 6
        for sink, part in ((loki, "resource_logs"), (tempo, "resource_spans")):
            for received in sink.stored:
                named = {attributes(each.resource)["tracelet.run.id"] for each in getattr(received.message, part)}
                tenant = received.headers["x-scope-orgid"]
                assert named <= {run.run_id for run in tenants[tenant]}


@pytest.mark.parametrize(
    "files", [("second-port.yaml", "gateways.yaml"), ("gateways.yaml", "second-port.yaml")], ids="+".join
)
def test_behind_a_second_port_each_run_goes_to_exactly_one_gateway_too(tmp_path: Path, files: tuple[str, ...]) -> None:
    runs = [Sender(f"run-{number}") for number in range(16)]
    batch = made(100, "loss", start=now_ns(MINUTE))
    with (
        HttpSink() as first,
        HttpSink() as second,
        Collector(
            tmp_path / "collector", "collector.yaml", *files, gateway=first.url, TRACELET_GATEWAY_2_URL=second.url
        ) as collector,
    ):
        for run in runs:
            assert send(collector.http, run.bodies(batch)) == [200]  # for Prometheus alone
            assert send(collector.second, run.bodies(batch)) == [200]
        until(lambda: len(first.points()) + len(second.points()) == len(runs) * len(batch))
        for run in runs:
            mine = hashlib.sha256(run.run_id.encode()).hexdigest()[0] in "01234567"
            assert stored_points(first if mine else second, run.run_id) == as_sent(batch)
            assert not stored_points(second if mine else first, run.run_id)


def test_each_run_goes_to_exactly_one_gateway_and_a_dead_one_holds_up_only_its_own(tmp_path: Path) -> None:
    runs = [Sender(f"run-{number}") for number in range(60)]
    first_digit = {run.run_id: hashlib.sha256(run.run_id.encode()).hexdigest()[0] for run in runs}
    assert len(set(first_digit.values())) == 16
    batch = made(100, "loss", start=now_ns(MINUTE))
    with HttpSink() as first, HttpSink() as second:
        first.rule = lambda _: refuse()
        with Collector(
            tmp_path / "collector",
            "collector.yaml",
            "gateways.yaml",
            gateway=first.url,
            TRACELET_GATEWAY_2_URL=second.url,
        ) as collector:
            for run in runs:
                assert send(collector.http, run.bodies(batch)) == [200]
            mine = {run.run_id for run in runs if first_digit[run.run_id] in "01234567"}
            others = {run.run_id for run in runs} - mine
            until(lambda: {r for r in others if stored_points(second, r) == as_sent(batch)} == others)
            assert not first.stored
            collector.stop(signal.SIGKILL)
            collector.start()
            first.rule = None
            until(lambda: {r for r in mine if stored_points(first, r) == as_sent(batch)} == mine, 40)
            assert not any(stored_points(second, r) for r in mine)
            assert not any(stored_points(first, r) for r in others)


def test_remote_write_has_the_companion_exact_and_the_end_markers(tmp_path: Path) -> None:
    run, start = Sender("written"), now_ns(10_000 * MS)
    with (
        Prometheus(tmp_path / "prometheus", "7d", "--web.enable-remote-write-receiver") as prometheus,
        Collector(
            tmp_path / "collector",
            "collector.yaml",
            "remote-write.yaml",
            prometheus="",  # a branch of its own
            TRACELET_REMOTE_WRITE_URL=f"{prometheus.at}/api/v1/write",
        ) as collector,
    ):
        batch = made(5_000, "train/loss", "acc", start=start)
        assert set(send(collector.http, run.bodies(batch))) == {200}
        until(lambda: prometheus.count('{__name__=~"ml_.*"}') == prometheus.count("tracelet_iteration") == 5_000)
        iterations = {s.same_labels(): s.values for s in prometheus.samples("tracelet_iteration")}
        for each in prometheus.samples('{__name__=~"ml_.*"}'):
            assert {at: value * 2 for at, value in each.values.items()} == iterations[each.same_labels()]
            assert each.labels["tracelet_run_id"] == "written"
            assert "tracelet_iteration" not in each.labels
        selector = '{__name__=~"ml_.*|tracelet_iteration"}'
        assert len(prometheus.now(selector)) == 4
        ends = [("train/loss", start + 4_998 * MS), ("acc", start + 4_999 * MS)]
        assert send(collector.http, [run.ends(ends)]) == [200]
        until(lambda: not prometheus.now(selector))


def test_a_wrong_token_is_401_and_each_listed_one_is_taken(tmp_path: Path) -> None:
    public, key = certificate(tmp_path)
    tokens, mine = tmp_path / "tokens", tmp_path / "gateway-token"
    tokens.write_text("first-token the old one, until Friday\nsecond-token\n")
    mine.write_text("for-the-gateway\n")
    context = ssl.create_default_context(cafile=str(public))
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(public, key)
    (body,) = Sender("tls").bodies(made(10, "loss", start=now_ns()))
    with (
        HttpSink(tls=served) as gateway,
        Collector(
            tmp_path / "collector",
            "collector.yaml",
            "auth-tls.yaml",
            gateway=gateway.url,
            TRACELET_TOKENS_FILE=str(tokens),
            TRACELET_GATEWAY_TOKEN_FILE=str(mine),
            TRACELET_GATEWAY_CA=str(public),
            TRACELET_TLS_CERT=str(public),
            TRACELET_TLS_KEY=str(key),
        ) as collector,
    ):
        url = collector.http.replace("http://127.0.0.1", "https://localhost")

        def status(token: str | None) -> int:
            headers = {"Content-Type": "application/x-protobuf"} | (
                {"Authorization": f"Bearer {token}"} if token else {}
            )
            request = urllib.request.Request(f"{url}/v1/metrics", body, headers)
            try:
                with urllib.request.urlopen(request, context=context, timeout=10) as answer:
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        assert [status(each) for each in (None, "wrong", "first-token", "second-token")] == [401, 401, 200, 200]
        until(lambda: len(gateway.stored) == 2)
        assert {each.headers["authorization"] for each in gateway.stored} == {"Bearer for-the-gateway"}
        # Rotated while it runs: the file is read again, no restart.
        tokens.write_text("second-token\n")
        until(lambda: status("first-token") == 401)
        assert status("second-token") == 200
    held = b"".join(path.read_bytes() for path in collector.queues.iterdir() if path.is_file())
    assert b"name of tls" in held  # what was sent passed through these files
    assert b"-token" not in held
    assert b"for-the-gateway" not in held


@pytest.mark.parametrize(
    "files",
    [("auth-tls.yaml",), ("second-port.yaml", "auth-tls.yaml"), ("auth-tls.yaml", "second-port.yaml")],
    ids="+".join,
)
def test_every_open_port_asks_for_a_token_and_tls(tmp_path: Path, files: tuple[str, ...]) -> None:
    public, key = certificate(tmp_path)
    tokens, mine = tmp_path / "tokens", tmp_path / "gateway-token"
    tokens.write_text("sesame\n")
    mine.write_text("for-the-gateway\n")
    context = ssl.create_default_context(cafile=str(public))
    (body,) = Sender("doors").bodies(made(10, "loss", start=now_ns()))
    with (
        HttpSink() as gateway,
        Collector(
            tmp_path / "collector",
            "collector.yaml",
            *files,
            gateway=gateway.url,
            TRACELET_TOKENS_FILE=str(tokens),
            TRACELET_GATEWAY_TOKEN_FILE=str(mine),
            TRACELET_TLS_CERT=str(public),
            TRACELET_TLS_KEY=str(key),
        ) as collector,
    ):
        both = "second-port.yaml" in files
        for address in (collector.http, collector.second):
            port = int(address.rpartition(":")[2])
            if address is collector.second and not both:
                with socket.socket() as asked:
                    assert asked.connect_ex(("127.0.0.1", port)) != 0
                continue
            assert not taken_in_clear(address, body)
            for token, status in ((None, 401), ("wrong", 401), ("sesame", 200)):
                given = {"Content-Type": "application/x-protobuf"} | (bearer(token) if token else {})
                asking = http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
                asking.request("POST", "/v1/metrics", body, given)
                assert asking.getresponse().status == status
                asking.close()
        for address in (collector.grpc, collector.second_grpc)[: 1 + both]:
            seen = [
                over_grpc(address, body, root, token)
                for root, token in ((None, "sesame"), (public, None), (public, "wrong"), (public, "sesame"))
            ]
            no = grpc.StatusCode.UNAUTHENTICATED
            assert seen == [grpc.StatusCode.UNAVAILABLE, no, no, grpc.StatusCode.OK]
        until(lambda: len(gateway.stored) == 2)
        assert {each.headers["authorization"] for each in gateway.stored} == {"Bearer for-the-gateway"}


def taken_in_clear(address: str, body: bytes) -> bool:
    try:
        return send(address, [body], Authorization="Bearer sesame") != [400]
    except ConnectionError:
        return False


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def over_grpc(address: str, body: bytes, root: Path | None, token: str | None) -> grpc.StatusCode:
    """The status of one request, by TLS with this certificate or in clear."""
    at = address.replace("127.0.0.1", "localhost")
    channel = (
        grpc.insecure_channel(at)
        if root is None
        else grpc.secure_channel(at, grpc.ssl_channel_credentials(root.read_bytes()))
    )
    with channel:
        call = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
        try:
            call(body, timeout=10, metadata=[("authorization", f"Bearer {token}")] if token else [])
        except grpc.RpcError as error:
            return error.code()  # type: ignore[attr-defined,no-any-return]
        return grpc.StatusCode.OK


def test_the_older_names_do_the_same(tmp_path: Path) -> None:
    run, start = Sender("older"), now_ns(MINUTE)
    batch, old = (
        made(1_000, "train/loss", start=start, dense=range(900, 1_000)),
        made(10, "x", start=1_700_000_000 * 10**9),
    )
    ahead = points([("tracelet.x", 1.0, 1)], start=start)
    with (
        HttpSink() as gateway,
        Prometheus(tmp_path / "prometheus") as prometheus,
        Collector(
            tmp_path / "collector", "legacy-names.yaml", prometheus=prometheus.otlp, gateway=gateway.url
        ) as collector,
    ):
        others = Sender("none")
        del others.resource["tracelet.run.id"]
        for batches, sender in (((batch, old, ahead), run), ((batch,), others)):
            for each in batches:
                assert send(collector.http, sender.bodies(each)) == [200]
        until(lambda: prometheus.count("ml_train_loss") == prometheus.count("tracelet_iteration") == 900)
        until(lambda: stored_points(gateway, "older") == as_sent(batch) | as_sent(old) | as_sent(ahead))
        assert len(prometheus.samples('{__name__=~".*loss|tracelet_.*"}')) == 2
        filtered = {
            name: collector.number("otelcol_processor_filter_datapoints_filtered", f'filter="filter/{name}"')
            for name in ("runs", "names", "too_old", "ahead", "dense")
        }
        assert filtered == {"runs": 2 * 1_000, "names": 1, "too_old": 10, "ahead": 0, "dense": 100}
        assert {resource["tracelet.run.id"] for resource, _, _ in gateway.metrics()} == {"older"}


@pytest.mark.parametrize("files", [("collector.yaml",), ("legacy-names.yaml",)], ids="+".join)
def test_events_older_than_lokis_limit_are_left_out_of_loki_alone_and_counted(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    old, young = now_ns(144 * 60 * MINUTE), now_ns()
    records = [
        LogRecord(time_unix_nano=old, body=AnyValue(string_value="old")),
        LogRecord(time_unix_nano=young, body=AnyValue(string_value="young")),
        LogRecord(observed_time_unix_nano=old, body=AnyValue(string_value="old, only observed")),
        LogRecord(observed_time_unix_nano=young, body=AnyValue(string_value="young, only observed")),
    ]
    run = Sender("events")
    with (
        HttpSink() as gateway,
        HttpSink() as loki,
        Collector(tmp_path / "collector", *files, gateway=gateway.url, loki=loki.url) as collector,
    ):
        body = EventsLoad(resource_bytes(run.resource), tuple(records)).encode()
        assert send(collector.http, [body], signal="logs") == [200]
        until(lambda: len(gateway.events()) == 4)
        until(lambda: {e.body.string_value for e in loki.events()} == {"young", "young, only observed"})
        # The Resource is whole: service.instance.id is what keeps runs apart in Loki.
        resource = loki.stored[0].message.resource_logs[0].resource
        assert {each.key for each in resource.attributes} == run.resource.keys()
        assert collector.number("otelcol_processor_filter_logs_filtered", 'filter="filter/log_age"') == 2
