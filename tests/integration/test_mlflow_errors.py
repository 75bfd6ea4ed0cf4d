"""What the MLflow exporter answers when the server, the network or the credentials are wrong."""

from __future__ import annotations

import base64
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.mlflow_batches import batch, deliver, exporters_closed, opened_exporter, persist, run_info, started
from tests.servers import MlflowServer, Proxy, Seen, Spoil, free_port, get_run, recording_proxy, rows_of
from tracelet.exporters.base import Delivered, RetryLater
from tracelet.exporters.mlflow import connection
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.records import RunInfo

__all__ = ["exporters_closed"]


@pytest.fixture
def run() -> RunInfo:
    return run_info(uuid.uuid4().hex)


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[Proxy]:
    with recording_proxy(mlflow_server.uri) as spoiling:
        yield spoiling


def answer_of(
    uri: str, run: RunInfo, environ: dict[str, str] | None = None, secret_uri: str | None = None
) -> RetryLater:
    """What open() says, which has to be: not now."""
    exporter = MLflowExporter({"tracking_uri": uri}, {"tracking_uri": secret_uri} if secret_uri else {}, environ or {})
    answer = exporter.open(run, {})
    exporter.close()
    assert isinstance(answer, RetryLater)
    return answer


def test_a_refused_host_name_names_the_option_that_allows_it(mlflow_server: MlflowServer, run: RunInfo) -> None:
    # The real server's own refusal: a name that resolves to it, but is none it knows.
    uri = f"http://ip6-localhost.example:{mlflow_server.port}"
    with recording_proxy(mlflow_server.uri) as proxy:
        # Not every machine resolves such a name: as an HTTP proxy the recorder passes the Host header on.
        answer = answer_of(uri, run, {"http_proxy": proxy.uri})
    assert answer.loud
    assert "--allowed-hosts" in answer.reason
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" in answer.reason
    assert f"ip6-localhost.example:{mlflow_server.port}" in answer.reason


@pytest.mark.parametrize(
    ("status", "body", "headers", "loud", "after_s", "says"),
    [
        (401, b"", {}, True, None, "MLFLOW_TRACKING_TOKEN"),
        (403, b'{"error_code":"PERMISSION_DENIED","message":"Permission denied"}', {}, True, None, "Permission denied"),
        (404, b"<html>not here</html>", {}, True, None, "check the tracking URI"),
        (200, b"<html>welcome</html>", {}, True, None, "not as an MLflow server does"),
        (301, b"", {"Location": "https://other/"}, True, None, "https://other/"),
        (429, b"slow down", {"Retry-After": "7"}, False, 7.0, "429"),
        (503, b"later", {"Retry-After": "3"}, False, 3.0, "503"),
        (502, b"bad gateway", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, False, None, "502"),
        (503, b"later", {"Retry-After": "0"}, False, None, "503"),
        (503, b"later", {"Retry-After": "inf"}, False, None, "503"),
        (429, b"slow down", {"Retry-After": "999999999999"}, False, 3600.0, "429"),
    ],
)
def test_each_answer_of_a_server_becomes_what_to_do(
    proxy: Proxy,
    run: RunInfo,
    status: int,
    body: bytes,
    headers: dict[str, str],
    loud: bool,
    after_s: float | None,
    says: str,
) -> None:
    proxy.rule = lambda seen: Spoil(forward=False, answer=(status, body, headers))
    answer = answer_of(proxy.uri, run)
    assert (answer.loud, answer.after_s) == (loud, after_s)
    assert says in answer.reason


def test_a_server_that_is_not_there_is_waited_for(run: RunInfo) -> None:
    answer = answer_of(f"http://127.0.0.1:{free_port()}", run)
    assert not answer.loud
    assert "Connection refused" in answer.reason


def test_a_server_that_never_answers_is_left_after_mlflows_timeout_and_given_time_to_finish(
    proxy: Proxy, mlflow_server: MlflowServer, run: RunInfo
) -> None:
    exporter = opened_exporter(proxy.uri, run, environ={"MLFLOW_HTTP_REQUEST_TIMEOUT": "1"})
    deliver(exporter, batch(run, started()))
    release = threading.Event()

    def rule(seen: Seen) -> Spoil:
        if b'"metrics"' in seen.body:
            release.wait(20)
        return Spoil()

    proxy.rule = rule
    delivery = exporter.begin(batch(run, rows=[("m", 1.0, 1, 1)], number=2))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.after_s == 10.0
    release.set()
    run_id = str(exporter.memory()["run_id"])
    until = time.monotonic() + 20
    while not rows_of(mlflow_server, run_id):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert persist(delivery) == Delivered()
    assert len([seen for seen in proxy.seen if b'"metrics"' in seen.body]) == 1


def test_an_idle_connection_is_not_reused_after_the_server_may_have_closed_it(
    proxy: Proxy, mlflow_server: MlflowServer, run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = opened_exporter(mlflow_server.uri, run)
    deliver(exporter, batch(run, started()))
    connection = exporter._connection
    assert connection is not None
    first = connection._http
    deliver(exporter, batch(run, rows=[("m", 1.0, 1, 1)], number=2))
    assert connection._http is first
    connection._used_at -= 4.5
    deliver(exporter, batch(run, rows=[("m", 2.0, 2, 2)], number=3))
    assert connection._http is not first


# ---- who we are --------------------------------------------------------------------------------------------------


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("secret", "environ", "file", "sent"),
    [
        (None, {}, None, None),
        (None, {"MLFLOW_TRACKING_TOKEN": "t0ken"}, None, "Bearer t0ken"),
        (
            None,
            {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p%", "MLFLOW_TRACKING_TOKEN": "t"},
            None,
            basic("u", "p%"),
        ),
        (None, {"MLFLOW_TRACKING_USERNAME": "only"}, None, None),
        (None, {}, ("filed", "p%w"), basic("filed", "p%w")),
        (None, {"MLFLOW_TRACKING_USERNAME": "env"}, ("filed", "word"), basic("env", "word")),
        ("a:b%40c", {"MLFLOW_TRACKING_TOKEN": "t"}, None, basic("a", "b@c")),
    ],
)
def test_credentials_are_mlflows_own_in_its_order(
    proxy: Proxy,
    run: RunInfo,
    tmp_path: Path,
    secret: str | None,
    environ: dict[str, str],
    file: tuple[str, str] | None,
    sent: str | None,
) -> None:
    if file is not None:
        (tmp_path / ".mlflow").mkdir()
        text = f"[mlflow]\nmlflow_tracking_username = {file[0]}\nmlflow_tracking_password = {file[1]}\n"
        (tmp_path / ".mlflow" / "credentials").write_text(text)
    secrets = {"tracking_uri": proxy.uri.replace("//", f"//{secret}@")} if secret else {}
    exporter = MLflowExporter({"tracking_uri": proxy.uri}, secrets, {**environ, "HOME": str(tmp_path)})
    assert exporter.open(run, {}) == Delivered()
    assert {seen.headers.get("Authorization") for seen in proxy.seen} == {sent}
    exporter.close()


def test_a_refused_password_is_read_anew_and_never_told(proxy: Proxy, run: RunInfo, tmp_path: Path) -> None:
    wanted = basic("me", "new-word")

    def rule(seen: Seen) -> Spoil:
        good = seen.headers.get("Authorization") == wanted
        return Spoil() if good else Spoil(forward=False, answer=(401, b"who are you", {}))

    proxy.rule = rule
    file = tmp_path / ".mlflow" / "credentials"
    file.parent.mkdir()
    file.write_text("[mlflow]\nmlflow_tracking_username=me\nmlflow_tracking_password=old-word\n")
    exporter = MLflowExporter({"tracking_uri": proxy.uri}, {}, {"HOME": str(tmp_path)})
    answer = exporter.open(run, {})
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert "word" not in answer.reason.replace("PASSWORD", "")
    file.write_text("[mlflow]\nmlflow_tracking_username=me\nmlflow_tracking_password=new-word\n")
    assert exporter.open(run, {}) == Delivered()
    deliver(exporter, batch(run, started()))
    assert "new-word" not in str(exporter.memory())
    exporter.close()


def test_credentials_of_an_address_stay_out_of_errors_and_links(run: RunInfo) -> None:
    port = free_port()
    answer = answer_of(f"http://127.0.0.1:{port}", run, secret_uri=f"http://me:s3cret@127.0.0.1:{port}")
    assert "s3cret" not in answer.reason


# ---- TLS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    both = folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += [
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(folder / "key.pem"),
        "-out",
        str(folder / "c.pem"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    both.write_text((folder / "c.pem").read_text() + (folder / "key.pem").read_text())
    return both


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[tuple[str, list[bool]]]:
    """A server that says 429 to everything over TLS; notes whether the client showed a certificate."""
    shown: list[bool] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(bool(self.connection.getpeercert(binary_form=True)))  # type: ignore[attr-defined]
            self.send_response(429)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on standard error."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_OPTIONAL
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a refused handshake is the test
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}", shown
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_authorities_are_known_without_the_systems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: Path
) -> None:
    (tmp_path / "none.pem").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))  # an image without the package ca-certificates
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    assert connection._tls({}).cert_store_stats()["x509_ca"] > 50
    assert connection._tls({"CURL_CA_BUNDLE": str(certificate)}).cert_store_stats()["x509"] == 1


def test_tls_follows_mlflows_variables(
    tls_server: tuple[str, list[bool]], certificate: Path, run: RunInfo, tmp_path: Path
) -> None:
    uri, shown = tls_server
    untrusted = answer_of(uri, run)
    assert untrusted.loud
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in untrusted.reason
    ca = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(certificate)}
    assert "429" in answer_of(uri, run, ca).reason
    assert "429" in answer_of(uri, run, {"MLFLOW_TRACKING_INSECURE_TLS": "true"}).reason
    assert "429" in answer_of(uri, run, {**ca, "MLFLOW_TRACKING_CLIENT_CERT_PATH": str(certificate)}).reason
    assert shown[0] is False
    assert shown[-1] is True
    missing = answer_of(uri, run, {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(tmp_path / "none.pem")})
    assert missing.loud
    assert "none.pem" in missing.reason


def test_a_proxy_named_by_the_usual_variables_is_used_unless_excepted(
    mlflow_server: MlflowServer, run: RunInfo
) -> None:
    with recording_proxy(mlflow_server.uri) as proxy:
        exporter = opened_exporter(mlflow_server.uri, run, environ={"HTTP_PROXY": proxy.uri})
        deliver(exporter, batch(run, started()))
        assert all(seen.path.startswith(mlflow_server.uri) for seen in proxy.seen)
        assert proxy.seen
        count = len(proxy.seen)
        deliver(opened_exporter(mlflow_server.uri, run, environ={"HTTP_PROXY": proxy.uri, "NO_PROXY": "127.0.0.1"}))
        assert len(proxy.seen) == count
    assert get_run(mlflow_server, str(exporter.memory()["run_id"])).info.status == "RUNNING"
