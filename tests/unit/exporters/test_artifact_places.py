"""Where a training host puts an artifact's bytes before its event leaves by OTLP, and what becomes of each failure."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.otlp_batches import RUN, START, batch, otlp_spec
from tests.sinks import HttpSink, attributes, certificate
from tracelet.errors import ConfigError
from tracelet.exporters.artifact_place import Waiting
from tracelet.exporters.artifact_store import place_for, where_artifacts_go
from tracelet.exporters.base import Delivered, Rejected, RetryLater
from tracelet.exporters.original import Original
from tracelet.exporters.otlp import OTLPExporter
from tracelet.records import ArtifactLogged

BYTES = b"weights" * 1000
SHA = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def sink() -> Iterator[HttpSink]:
    with HttpSink() as running:
        yield running


def exporter(sink: HttpSink, environ: dict[str, str], **spec: Any) -> OTLPExporter:
    made = OTLPExporter(otlp_spec(sink.endpoint, **spec), {}, environ)
    made.open(RUN, {})
    return made


def reference(file: Path, **other: Any) -> ArtifactLogged:
    """A file taken as a reference: its digest isn't known yet."""
    status = file.stat()
    fields = {"mtime_ns": status.st_mtime_ns, "inode": status.st_ino, **other}
    return ArtifactLogged(START, "models/best.pt", str(file), None, status.st_size, None, "text/plain", **fields)


def file_of(folder: Path) -> Path:
    file = folder / "best.pt"
    file.write_bytes(BYTES)
    return file


def events(sink: HttpSink) -> list[dict[str, Any]]:
    return [
        attributes(record)
        for received in sink.stored
        if received.signal == "logs"
        for resource in received.message.resource_logs
        for scope in resource.scope_logs
        for record in scope.log_records
    ]


def test_bytes_are_in_the_store_before_the_event_names_them(sink: HttpSink, tmp_path: Path) -> None:
    seen: list[bool] = []
    store = tmp_path / "a store"

    def rule(received: Any) -> None:
        if received.signal == "logs":
            seen.append(any(path.is_file() for path in store.rglob("best.pt")))

    sink.rule = rule
    made = exporter(sink, {"TRACELET_ARTIFACT_STORE": f"file://{tmp_path}/a%20store"})
    assert made.begin(batch((), [reference(file_of(tmp_path))])).attempt() == Delivered()
    assert seen == [True]
    event = events(sink)[0]
    assert event["tracelet.artifact.digest"] == f"sha256:{SHA}"
    at = Path(unquote(urlsplit(event["tracelet.artifact.uri"]).path))
    assert at == store / "run-1" / SHA[:2] / SHA / "best.pt"
    assert at.read_bytes() == BYTES
    assert [path.name for path in at.parent.iterdir()] == ["best.pt"]


def test_what_is_there_with_its_size_is_not_written_again(sink: HttpSink, tmp_path: Path) -> None:
    environ = {"TRACELET_ARTIFACT_STORE": str(tmp_path / "store")}
    record = reference(file_of(tmp_path))
    assert exporter(sink, environ).begin(batch((), [record])).attempt() == Delivered()
    (at,) = (path for path in (tmp_path / "store").rglob("best.pt"))
    before = at.stat()
    assert exporter(sink, environ).begin(batch((), [record])).attempt() == Delivered()
    assert (at.stat().st_ino, at.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    at.write_bytes(BYTES[:-1])  # cut by something
    assert exporter(sink, environ).begin(batch((), [record])).attempt() == Delivered()
    assert at.read_bytes() == BYTES


def test_events_whose_files_are_there_leave_before_those_that_wait(sink: HttpSink, tmp_path: Path) -> None:
    """A gateway without room gets it only by them: what it holds goes once it is delivered."""
    records = []
    for number in range(5):
        file = tmp_path / f"{number}.pt"
        file.write_bytes(BYTES + b"%d" % number)
        records.append(replace(reference(file), path=f"models/{number}.pt", time_unix_nano=START + number))
    sha = hashlib.sha256(BYTES + b"3").hexdigest()
    in_the_way = tmp_path / "store" / "run-1" / sha[:2] / sha
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    delivery = exporter(sink, {"TRACELET_ARTIFACT_STORE": str(tmp_path / "store")}).begin(batch((), records))
    names = lambda: [event["tracelet.artifact.name"] for event in events(sink)]  # noqa: E731
    assert isinstance(delivery.attempt(), RetryLater)
    assert names() == [f"models/{number}.pt" for number in range(3)]
    assert isinstance(delivery.attempt(), RetryLater)
    assert len(names()) == 3
    in_the_way.unlink()
    assert delivery.attempt() == Delivered()
    assert names() == [f"models/{number}.pt" for number in range(5)]


def test_a_store_through_fsspec_gets_them_too(sink: HttpSink, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    made = exporter(sink, {"TRACELET_ARTIFACT_STORE": "memory://places/runs"})
    assert made.begin(batch((), [reference(file_of(tmp_path))])).attempt() == Delivered()
    uri = events(sink)[0]["tracelet.artifact.uri"]
    assert uri == f"memory://places/runs/run-1/{SHA[:2]}/{SHA}/best.pt"
    assert fsspec.filesystem("memory").cat("/places/runs" + uri.partition("/runs")[2]) == BYTES


def test_without_a_place_the_event_says_where_the_file_was(sink: HttpSink, tmp_path: Path) -> None:
    file = file_of(tmp_path)
    assert exporter(sink, {}).begin(batch((), [reference(file)])).attempt() == Delivered()
    event = events(sink)[0]
    assert event["tracelet.artifact.uri"] == file.as_uri()
    assert "tracelet.artifact.digest" not in event


def test_points_do_not_wait_for_a_store_that_is_away(sink: HttpSink, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("in the way")
    made = exporter(sink, {"TRACELET_ARTIFACT_STORE": str(tmp_path / "store")})
    delivery = made.begin(batch([("loss", 1.0, 1)], [reference(file_of(tmp_path))]))
    answer = delivery.attempt()
    assert isinstance(answer, RetryLater)
    assert answer.loud
    assert [received.signal for received in sink.stored] == ["metrics"]
    (tmp_path / "store").unlink()
    assert delivery.attempt() == Delivered()
    assert [received.signal for received in sink.stored] == ["metrics", "logs"]


def test_a_changed_or_missing_file_is_refused_and_its_event_still_goes(sink: HttpSink, tmp_path: Path) -> None:
    file = file_of(tmp_path)
    gone = replace(reference(file), source=str(tmp_path / "gone"), path="gone.pt")
    changed = replace(reference(file), size=3, path="changed.pt")
    good = replace(reference(file), path="good.pt")
    made = exporter(sink, {"TRACELET_ARTIFACT_STORE": str(tmp_path / "store")})
    answer = made.begin(batch((), [gone, changed, good])).attempt()
    assert isinstance(answer, Rejected)
    assert [item.facts["path"] for item in answer.items] == ["gone.pt", "changed.pt"]
    uris = {event["tracelet.artifact.name"]: event["tracelet.artifact.uri"] for event in events(sink)}
    assert uris["gone.pt"] == (tmp_path / "gone").as_uri()
    assert uris["good.pt"].startswith(f"file://{tmp_path}/store/run-1/")


def test_a_file_that_changes_between_the_note_and_the_sending_is_refused(sink: HttpSink, tmp_path: Path) -> None:
    file = file_of(tmp_path)
    made = exporter(sink, {"TRACELET_ARTIFACT_STORE": str(tmp_path / "store")})
    delivery = made.begin(batch((), [reference(file)]))
    file.write_bytes(BYTES[::-1])
    assert isinstance(delivery.attempt(), Rejected)
    assert not list((tmp_path / "store").rglob("best.pt"))


def test_a_repeat_after_a_restart_names_the_same_address(sink: HttpSink, tmp_path: Path) -> None:
    one = batch((), [reference(file_of(tmp_path))])
    first = exporter(sink, {"TRACELET_ARTIFACT_STORE": str(tmp_path / "store")}).begin(one)
    again = exporter(sink, {"TRACELET_ARTIFACT_STORE": str(tmp_path / "another")}).begin(one, first.note)
    assert first.attempt() == Delivered()
    assert again.attempt() == Delivered()
    bodies = [received.body for received in sink.stored]
    assert bodies[0] == bodies[1]


def test_an_address_that_training_knew_is_remembered(sink: HttpSink, tmp_path: Path) -> None:
    made = exporter(sink, {}, environment={"TRACELET_ARTIFACT_STORE": str(tmp_path / "store")})
    assert made.begin(batch((), [reference(file_of(tmp_path))])).attempt() == Delivered()
    assert list((tmp_path / "store").rglob("best.pt"))


@pytest.mark.parametrize(
    "environ",
    [
        {"TRACELET_ARTIFACT_STORE": "relative/folder"},
        {"TRACELET_ARTIFACT_STORE": "file://otherhost/x"},
        {"TRACELET_ARTIFACT_STORE": "https://example.com/x"},
        {"TRACELET_ARTIFACT_GATEWAY": "gateway:4318"},
        {"TRACELET_ARTIFACT_STORE": "/x", "TRACELET_ARTIFACT_GATEWAY": "http://gateway:4318"},
    ],
)
def test_what_can_not_be_a_place_is_said_at_once(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        place_for(environ)


def test_a_place_is_told_without_its_password() -> None:
    told = where_artifacts_go({"TRACELET_ARTIFACT_GATEWAY": "https://me:secret@gateway:4318"})
    assert "gateway:4318" in told
    assert "secret" not in told


def test_a_gateway_that_asks_for_a_certificate_is_shown_the_one_of_otlps_variables(tmp_path: Path) -> None:
    public, key = certificate(tmp_path / "server")
    mine, my_key = certificate(tmp_path / "mine")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, key)
    context.load_verify_locations(mine)
    context.verify_mode = ssl.CERT_REQUIRED

    class Gateway(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Upload-Offset", str(len(BYTES)))
            self.send_header("Upload-Complete", "?1")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a refused handshake is the test
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        known = {
            "TRACELET_ARTIFACT_GATEWAY": f"https://localhost:{server.server_port}",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(public),
        }
        shown = {"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(mine), "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(my_key)}
        file = file_of(tmp_path)
        for environ, let_in in ((known, False), (known | shown, True)):
            place = place_for(environ)
            assert place is not None
            with file.open("rb") as opened:
                original = Original(opened, reference(file), str(file))
                if let_in:
                    place.put("run", SHA, "best.pt", original)
                else:
                    with pytest.raises(Waiting):
                        place.put("run", SHA, "best.pt", original)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
