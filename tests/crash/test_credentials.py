"""Tokens and certificates that are wrong, run out, or change under a run that goes on: nothing is lost in between.

Pattern: as tests/crash/test_network.py, with receivers that look at who is calling; files are replaced as agents do it,
by a rename; MLflow is a real server behind a front that speaks TLS. Limit: 20 s of real time for each wait.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.crash.test_network import Line, MlflowLine
from tests.otlp_batches import otlp_spec
from tests.servers import MlflowServer, Spoil, recording_proxy, rows_of
from tests.sinks import GrpcSink, HttpSink, Received, Say, certificate
from tracelet.backends import OTLP, Prometheus
from tracelet.cli.reach import check
from tracelet.destinations import to_destination
from tracelet.exporters.base import Exporter
from tracelet.exporters.mlflow.exporter import MLflowExporter
from tracelet.exporters.otlp import OTLPExporter
from tracelet.exporters.prometheus import PrometheusExporter
from tracelet.guard import guard
from tracelet.ids import new_run_id

KINDS = ("http", "grpc", "prometheus")


def put(path: Path, text: str | bytes) -> None:
    """Replace a file as an agent does: all of it at once."""
    new = path.with_suffix(".new")
    new.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.replace(new, path)


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def line(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(guard, "_logged_at", {})
    with ExitStack() as stack:
        yield Line(tmp_path / "run" / "host-boot", request.param, stack)


every_kind = pytest.mark.parametrize("line", KINDS, indirect=True)


def only(line: Line, token: str) -> Callable[[Received], Say | None]:
    """A rule: who doesn't show this token gets 401."""

    def rule(received: Received) -> Say | None:
        if received.headers.get("authorization") == f"Bearer {token}":
            return None
        return line.say(401, "UNAUTHENTICATED", message="who are you?")

    return rule


@every_kind
def test_after_a_401_the_next_token_of_the_file_is_used_and_all_arrives(line: Line, tmp_path: Path) -> None:
    file = tmp_path / "token"
    put(file, "old\n")
    line.lane = line.new_lane(headers_file=str(file))
    line.sink.rule = only(line, "new")
    line.log()
    line.run_until(lambda: len(line.waits) >= 2)
    assert {received.headers.get("authorization") for received in line.sink.requests} == {"Bearer old"}
    put(file, "new\n")
    line.run_until(line.has_all())
    assert line.letters() == []


@every_kind
def test_a_token_that_is_renewed_in_time_is_never_refused(line: Line, tmp_path: Path) -> None:
    file = tmp_path / "token"
    put(file, "first")
    line.lane = line.new_lane(headers_file=str(file))
    line.sink.rule = only(line, "first")
    line.log(100)
    line.run_until(line.has_all(100))
    put(file, "Authorization: Bearer second\nx-team: ml\n")
    line.sink.rule = only(line, "second")
    for i in range(100, 300):
        line.writer.log("loss", i + 0.5, i)
    line.run_until(line.has_all())
    assert line.waits == []
    assert line.sink.requests[-1].headers["x-team"] == "ml"


@every_kind
@pytest.mark.parametrize("content", [None, b"", b"no token, but words"])
def test_a_file_that_is_not_there_or_not_right_is_said_and_waited_for(
    line: Line, tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    if content is not None:
        put(file, content)
    line.lane = line.new_lane(headers_file=str(file))
    line.log()
    line.run_until(lambda: len(line.waits) >= 2)
    assert line.sink.requests == []
    assert str(file) in caplog.text
    assert "no token, but words" not in caplog.text
    put(file, b"right")
    line.run_until(line.has_all())


@every_kind
def test_a_file_goes_before_the_variables_and_an_argument_before_it(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20of-the-variable,x-other=kept")
    file = tmp_path / "headers"
    put(file, "authorization: Bearer of-the-file\nx-key: of-the-file\n")
    line.secrets = {"headers": {"X-Key": "of-the-argument"}}
    line.lane = line.new_lane(headers_file=str(file))
    line.log()
    line.run_until(line.has_all())
    headers = line.sink.requests[-1].headers
    assert (headers["authorization"], headers["x-key"]) == ("Bearer of-the-file", "of-the-argument")
    assert headers.get("x-other") == (None if line.kind == "prometheus" else "kept")


@every_kind
def test_who_ships_from_another_machine_names_a_file_of_its_own(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "mine", "of-the-login-node")
    which = "PROMETHEUS" if line.kind == "prometheus" else "OTLP"
    monkeypatch.setenv(f"TRACELET_{which}_HEADERS_FILE", str(tmp_path / "mine"))
    line.lane = line.new_lane(headers_file="/nowhere/on/the/compute/node/token")
    line.sink.rule = only(line, "of-the-login-node")
    line.log()
    line.run_until(line.has_all())


@every_kind
def test_the_doctor_asks_with_the_token_of_the_file(line: Line, tmp_path: Path) -> None:
    file = tmp_path / "token"
    at = f"http://127.0.0.1:{line.port}"
    spec = Prometheus(url=f"{at}/v1/metrics", headers_file=file)
    chosen = spec if line.kind == "prometheus" else OTLP(at, "grpc" if line.kind == "grpc" else None, headers_file=file)
    destination, secrets = to_destination(chosen, {}, tmp_path)
    line.sink.rule = only(line, "right")
    for content, ok in (("wrong", False), ("right", True)):
        put(file, content)
        reached = check(destination, secrets, {}, project="p")
        assert reached.ok is ok, reached.said
    file.unlink()
    assert str(file) in check(destination, secrets, {}, project="p").said


def test_files_are_named_in_the_manifest_absolute_and_their_content_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2")
    otlp = to_destination(OTLP(endpoint="http://h:1", headers_file="token"), {}, tmp_path)
    files = {"headers_file": "token", "certificate": "ca", "client_certificate": "mine", "client_key": "key"}
    prometheus = to_destination(Prometheus(**files), {}, tmp_path)  # type: ignore[arg-type]
    assert otlp[0]["spec"]["headers_file"] == str(tmp_path / "token")
    assert {name: prometheus[0]["spec"][name] for name in files} == {n: str(tmp_path / f) for n, f in files.items()}
    assert "hunter2" not in str((otlp, prometheus))


# ---- certificates ---------------------------------------------------------------------------------------------------


class Secure(Line):
    """The same over TLS: `tls` has the server's certificate, `callers` is the authority of those it lets in."""

    def __init__(self, folder: Path, kind: str, stack: ExitStack, tls: Path, callers: Path | None = None) -> None:
        self._tls, self._callers = tls, callers
        super().__init__(folder, kind, stack)

    def _sink(self) -> Any:
        public, key = self._tls / "cert.pem", self._tls / "key.pem"
        if self.kind == "grpc":
            pairs = [(key.read_bytes(), public.read_bytes())]
            authority = None if self._callers is None else self._callers.read_bytes()
            return GrpcSink(grpc.ssl_server_credentials(pairs, authority, authority is not None))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(public, key)
        if self._callers is not None:
            context.load_verify_locations(self._callers)
            context.verify_mode = ssl.CERT_REQUIRED
        return HttpSink(context)

    def exporter(self, **more: Any) -> Exporter:
        at = f"https://localhost:{self.port}"
        if self.kind == "prometheus":
            spec = {"url": f"{at}/v1/metrics", "prefix": "ml.", "window_age_s": 1e6, "window_ahead_s": 1e6}
            return PrometheusExporter(spec | {"timeout_s": 2.0} | more, {}, {})
        protocol = "grpc" if self.kind == "grpc" else "http/protobuf"
        return OTLPExporter(otlp_spec(at, protocol=protocol, timeout_s=2.0), {}, os.environ)


@contextlib.contextmanager
def trusting(kind: str, monkeypatch: pytest.MonkeyPatch, **files: Path) -> Iterator[dict[str, str]]:
    """Name certificate files, in a specification or in OpenTelemetry's variables; what to give to the exporter."""
    if kind == "prometheus":
        yield {name: str(path) for name, path in files.items()}
        return
    for name, path in files.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name.upper()}", str(path))
    yield {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", ["another authority", "expired", "another name"])
def test_a_wrong_certificate_is_said_loudly_and_all_arrives_once_it_is_right(
    kind: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "_logged_at", {})
    good, bad = tmp_path / "good", tmp_path / "bad"
    certificate(good)
    certificate(bad, "elsewhere" if wrong == "another name" else "localhost", expired=wrong == "expired")
    trusted = tmp_path / "trusted.pem"
    put(trusted, (good if wrong == "another authority" else bad).joinpath("cert.pem").read_bytes())
    folder = tmp_path / "run" / "host-boot"
    with ExitStack() as stack, trusting(kind, monkeypatch, certificate=trusted) as spec:
        with ExitStack() as first:
            line = Secure(folder, kind, first, bad)
            line.lane = line.new_lane(**spec)
            line.log()
            line.run_until(lambda: len(line.waits) >= 2)
            assert line.sink.requests == []
            assert "certificate" in caplog.text.lower()
            assert any(record.levelname == "WARNING" for record in caplog.records)
            if wrong == "another authority":  # the trust is mended, and the same lane goes on
                put(trusted, bad.joinpath("cert.pem").read_bytes())
                line.run_until(line.has_all())
                return
            line.lane.close()
        put(trusted, good.joinpath("cert.pem").read_bytes())
        mended = Secure(folder, kind, stack, good)
        mended.lane = mended.new_lane(**spec)
        mended.run_until(mended.has_all())


@pytest.mark.parametrize("kind", KINDS)
def test_mutual_tls_lets_in_who_shows_its_certificate_also_a_renewed_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, known, strange = tmp_path / "server", tmp_path / "known", tmp_path / "strange"
    for folder in (server, known, strange):
        certificate(folder)
    mine, key = tmp_path / "mine.pem", tmp_path / "mine.key"

    def show(folder: Path) -> None:
        put(mine, folder.joinpath("cert.pem").read_bytes())
        put(key, folder.joinpath("key.pem").read_bytes())

    show(strange)
    files = {"certificate": server / "cert.pem", "client_certificate": mine, "client_key": key}
    with ExitStack() as stack, trusting(kind, monkeypatch, **files) as spec:
        line = Secure(tmp_path / "run" / "host-boot", kind, stack, server, known / "cert.pem")
        line.lane = line.new_lane(**spec)
        line.log()
        line.run_until(lambda: len(line.waits) >= 2)
        assert line.sink.requests == []
        show(known)
        line.run_until(line.has_all())
        assert line.letters() == []


# ---- MLflow ---------------------------------------------------------------------------------------------------------


class SecureMlflow(MlflowLine):
    """A real MLflow server behind a front that speaks TLS, and can be given another certificate at any time."""

    def __init__(self, folder: Path, server: MlflowServer, stack: ExitStack, tls: Path, **environ: Path) -> None:
        self.front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.has(tls)
        self.proxy = stack.enter_context(recording_proxy(server.uri, self.front))
        self.environ = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", **{name: str(path) for name, path in environ.items()}}
        super().__init__(folder, server, stack)

    def has(self, tls: Path) -> None:
        """From now on this certificate, for whoever connects."""
        self.front.load_cert_chain(tls / "cert.pem", tls / "key.pem")

    def exporter(self, **more: Any) -> Exporter:
        return MLflowExporter({"tracking_uri": self.proxy.uri}, {}, self.environ)

    def rows(self) -> list[tuple[int, float]]:
        """What MLflow has stored, repeats included."""
        return sorted((row.step, row.value) for row in rows_of(self.server, self.lane.memory["run_id"], "loss"))


ONCE = [(i, i + 0.5) for i in range(300)]


@pytest.mark.parametrize("wrong", ["another authority", "expired", "another name"])
def test_a_wrong_certificate_before_mlflow_is_said_loudly_and_all_arrives_once_it_is_right(
    wrong: str,
    mlflow_server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(guard, "_logged_at", {})
    first, bad, renewed = tmp_path / "first", tmp_path / "bad", tmp_path / "renewed"
    for good in (first, renewed):
        certificate(good)
    certificate(bad, "elsewhere" if wrong == "another name" else "localhost", expired=wrong == "expired")
    trusted = tmp_path / "trusted.pem"

    def trust(*folders: Path) -> None:
        put(trusted, b"".join((folder / "cert.pem").read_bytes() for folder in folders))

    trust(*((first,) if wrong == "another authority" else (first, bad)))
    with ExitStack() as stack:
        folder = tmp_path / new_run_id() / "host-boot"
        line = SecureMlflow(folder, mlflow_server, stack, first, MLFLOW_TRACKING_SERVER_CERT_PATH=trusted)
        line.log(100)
        line.run_until(line.has_all(100))
        assert not any(record.levelname == "WARNING" for record in caplog.records)
        # In the middle of the run; whoever is connected is cut off.
        line.has(bad)
        line.proxy.rule = lambda _: Spoil(forward=False, hang_up=True)
        for i in range(100, 300):
            line.writer.log("loss", i + 0.5, i)
        line.run_until(lambda: len(line.waits) >= 1)
        before = len(line.proxy.seen)
        line.run_until(lambda: len(line.waits) >= 4)
        assert len(line.proxy.seen) == before, "nobody whose certificate is wrong is told anything"
        assert any("certificate" in r.getMessage().lower() for r in caplog.records if r.levelname == "WARNING")
        line.proxy.rule = lambda _: Spoil()
        line.has(renewed)
        trust(renewed)
        line.run_until(line.has_all())
        assert line.rows() == ONCE
        assert line.letters() == []


def test_mutual_tls_before_mlflow_lets_in_who_shows_its_certificate_also_one_renewed_under_way(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guard, "_logged_at", {})
    server, known, renewed, strange = (tmp_path / name for name in ("server", "known", "renewed", "strange"))
    for folder in (server, known, renewed, strange):
        certificate(folder)
    mine = tmp_path / "mine.pem"

    def show(folder: Path) -> None:
        put(mine, (folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())

    def der(folder: Path) -> bytes:
        return ssl.PEM_cert_to_DER_cert((folder / "cert.pem").read_text())

    show(strange)
    trust = {"MLFLOW_TRACKING_SERVER_CERT_PATH": server / "cert.pem", "MLFLOW_TRACKING_CLIENT_CERT_PATH": mine}
    with ExitStack() as stack:
        line = SecureMlflow(tmp_path / new_run_id() / "host-boot", mlflow_server, stack, server, **trust)
        line.front.verify_mode = ssl.CERT_REQUIRED
        line.front.load_verify_locations(known / "cert.pem")
        line.front.load_verify_locations(renewed / "cert.pem")
        line.log(100)
        line.run_until(lambda: len(line.waits) >= 3)
        assert line.proxy.seen == []
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert any("MLFLOW_TRACKING_CLIENT_CERT_PATH" in words for words in said), line.troubles
        show(known)
        line.run_until(line.has_all(100))
        assert {seen.caller for seen in line.proxy.seen} == {der(known)}
        show(renewed)
        arrived = len(line.proxy.seen)
        line.proxy.rule = lambda seen: Spoil(hang_up=seen is line.proxy.seen[arrived])  # carried out, but no answer
        for i in range(100, 300):
            line.writer.log("loss", i + 0.5, i)
        line.run_until(line.has_all())
        assert line.proxy.seen[-1].caller == der(renewed)
        assert line.rows() == ONCE
        assert line.letters() == []
