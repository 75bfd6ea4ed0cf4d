"""Bytes put to the gateway: in pieces, cut off and gone on with, compared, owned, limited; a real server each time."""

from __future__ import annotations

import hashlib
import http.client
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.applications import Starlette

from tracelet.exporters.artifact_gateway import GatewayPlace
from tracelet.exporters.artifact_names import held_at
from tracelet.exporters.artifact_place import NeverTaken, Waiting
from tracelet.exporters.original import Changed, Original
from tracelet.gateway.artifacts import Artifacts
from tracelet.gateway.callers import Caller
from tracelet.gateway.held import HeldFiles
from tracelet.gateway.limits import Budget, Refused
from tracelet.records import ArtifactLogged

BYTES = os.urandom(20_000_000)
SHA = hashlib.sha256(BYTES).hexdigest()
TOKENS = {"Bearer a-token": Caller("team-a"), "Bearer b-token": Caller("team-b")}


class Gateway:
    """A uvicorn server with the artifacts' routes alone."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.folder = folder
        self.held = HeldFiles(folder, **{k: limits.pop(k) for k in ("clock", "is_over") if k in limits})
        fields: dict[str, Any] = {"max_bytes": 10**9, **limits}
        self.artifacts = Artifacts(self.held, self._who, **fields)
        app = Starlette(routes=list(self.artifacts.routes()))
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))

    @staticmethod
    def _who(headers: Mapping[str, str]) -> Caller:
        caller = TOKENS.get(headers.get("authorization", ""))
        if caller is None:
            raise Refused(401, "wrong token", "the token is not one this gateway knows")
        return caller

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> tuple[int, dict[str, str]]:
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=30)
        connection.request(method, path, body, {"Authorization": "Bearer a-token", **headers})
        reply = connection.getresponse()
        reply.read()
        connection.close()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}

    def append(self, data: bytes, offset: int, length: int, sha: str, run: str = "r1") -> int:
        headers = {"Upload-Offset": str(offset), "Upload-Length": str(length)}
        return self.ask("PATCH", f"/v1/artifacts/{run}/{sha}", headers, data)[0]


@contextmanager
def running(folder: Path, **limits: Any) -> Iterator[Gateway]:
    gateway = Gateway(folder, **limits)
    thread = threading.Thread(target=gateway.server.run)
    thread.start()
    until = time.monotonic() + 30
    while not gateway.server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield gateway
    finally:
        gateway.server.should_exit = True
        thread.join(30)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    with running(tmp_path / "artifacts") as one:
        yield one


def put(gateway: Gateway, file: Path, *, run: str = "r1", token: str = "a-token", sha: str = SHA) -> None:
    place = GatewayPlace(gateway.address, {"TRACELET_ARTIFACT_TOKEN": token})
    size = file.stat().st_size
    with file.open("rb") as opened:
        logged = ArtifactLogged(1, "best.pt", str(file), None, size, sha, "text/plain")
        place.put(run, sha, "best.pt", Original(opened, logged, str(file)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "best.pt"
    file.write_bytes(BYTES)
    return file


def small(text: bytes) -> tuple[bytes, str]:
    return text, hashlib.sha256(text).hexdigest()


def test_a_file_arrives_whole_and_a_repeat_sends_nothing(gateway: Gateway, file: Path) -> None:
    put(gateway, file)
    held = gateway.folder / held_at("r1", SHA)
    assert held.read_bytes() == BYTES
    before = held.stat().st_mtime_ns
    put(gateway, file)
    assert held.stat().st_mtime_ns == before
    assert gateway.held.size() >= len(BYTES)
    assert not list(gateway.folder.rglob("*.part"))


def test_an_empty_file_arrives_too(gateway: Gateway, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    sha = hashlib.sha256(b"").hexdigest()
    put(gateway, empty, sha=sha)
    assert (gateway.folder / held_at("r1", sha)).read_bytes() == b""


def test_what_was_cut_off_goes_on_where_it_was_cut(gateway: Gateway, file: Path) -> None:
    connection = http.client.HTTPConnection(urlsplit(gateway.address).netloc, timeout=30)
    connection.putrequest("PATCH", f"/v1/artifacts/r1/{SHA}")
    sent = {"Authorization": "Bearer a-token", "Upload-Offset": "0", "Upload-Length": str(len(BYTES))}
    for name, value in {**sent, "Content-Length": str(len(BYTES))}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(BYTES[:5_000_000])
    connection.close()
    until = time.monotonic() + 30
    while not [part for part in gateway.folder.glob(f"r1/{SHA}.*.part") if part.stat().st_size == 5_000_000]:
        assert time.monotonic() < until
        time.sleep(0.01)
    (part,) = gateway.folder.glob("r1/*.part")
    status, headers = gateway.ask("HEAD", f"/v1/artifacts/r1/{SHA}", {})
    assert (status, headers["upload-offset"], headers["upload-complete"]) == (200, "5000000", "?0")
    inode = part.stat().st_ino
    _persist(lambda: put(gateway, file))
    held = gateway.folder / held_at("r1", SHA)
    assert held.read_bytes() == BYTES
    assert held.stat().st_ino == inode


def _persist(action: Any) -> None:
    """Again while somebody else is still at it."""
    until = time.monotonic() + 30
    while True:
        try:
            return action()
        except Waiting:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_bytes_of_another_digest_are_thrown_away(gateway: Gateway, tmp_path: Path) -> None:
    data, sha = small(b"good")
    assert gateway.append(b"evil", 0, 4, sha) == 422
    assert gateway.ask("HEAD", f"/v1/artifacts/r1/{sha}", {})[0] == 404
    assert gateway.append(data, 0, 4, sha) == 201
    other = tmp_path / "other"
    other.write_bytes(b"evil")
    with pytest.raises(Changed):
        put(gateway, other, sha=hashlib.sha256(b"live").hexdigest())


def test_an_upload_goes_on_at_its_offset_only(gateway: Gateway) -> None:
    data, sha = small(b"0123456789")
    assert gateway.append(data[:4], 0, 10, sha) == 204
    assert gateway.append(data[:4], 0, 10, sha) == 409
    assert gateway.append(data[6:], 6, 10, sha) == 409
    assert gateway.append(data[4:] + b"more", 4, 10, sha) == 400
    assert gateway.append(data[4:], 4, 10, sha) == 201
    assert (gateway.folder / held_at("r1", sha)).read_bytes() == data


def test_a_token_that_is_not_known_puts_nothing(gateway: Gateway, file: Path) -> None:
    for token in ("unknown", ""):
        with pytest.raises(Waiting, match="401") as no:
            put(gateway, file, token=token)
        assert no.value.loud
    assert not list(gateway.folder.iterdir())


def test_a_run_that_a_token_may_not_write_is_refused_and_counted(tmp_path: Path, file: Path) -> None:
    counted: list[str] = []

    def why_not(run_id: str, caller: Caller) -> str | None:
        return f"not {caller.name}'s" if run_id == "theirs" else None

    with running(tmp_path / "artifacts", why_not=why_not, count=counted.append) as gateway:
        put(gateway, file, run="mine")
        with pytest.raises(Waiting, match=r"403.*not team-a's") as no:
            put(gateway, file, run="theirs")
        assert no.value.loud
        with pytest.raises(Waiting, match="401"):
            put(gateway, file, run="mine", token="unknown")
    assert counted == ["foreign run", "wrong token"]


def test_two_tokens_at_one_file_of_a_run_nobody_knows_are_not_in_each_others_way(gateway: Gateway) -> None:
    data, sha = small(b"0123456789")
    path, theirs = f"/v1/artifacts/r1/{sha}", {"Authorization": "Bearer b-token"}
    spoiling = {**theirs, "Upload-Offset": "0", "Upload-Length": "10"}
    assert gateway.ask("PATCH", path, spoiling, b"evil")[0] == 204
    assert gateway.ask("HEAD", path, {})[0] == 404
    assert gateway.append(data, 0, 10, sha) == 201
    assert (gateway.folder / held_at("r1", sha)).read_bytes() == data
    assert gateway.ask("HEAD", path, theirs)[1]["upload-complete"] == "?1"
    assert gateway.held.size() == 14


def test_too_large_is_never_taken_and_no_room_is_waited_for(tmp_path: Path, file: Path) -> None:
    with running(tmp_path / "a", max_bytes=len(BYTES) - 1) as gateway, pytest.raises(NeverTaken):
        put(gateway, file)
    with running(tmp_path / "b", quota_bytes=len(BYTES) - 1) as gateway:
        with pytest.raises(Waiting, match="507") as no:
            put(gateway, file)
        assert no.value.loud
        data, sha = small(b"x" * 1000)
        assert gateway.append(data, 0, 1000, sha) == 201


def begun(gateway: Gateway, data: bytes, length: int, sha: str) -> http.client.HTTPConnection:
    """A PATCH that has sent `data` of `length` bytes, and goes on."""
    connection = http.client.HTTPConnection(urlsplit(gateway.address).netloc, timeout=0.05)
    connection.putrequest("PATCH", f"/v1/artifacts/r1/{sha}")
    sent = {"Authorization": "Bearer a-token", "Upload-Offset": "0", "Upload-Length": str(length)}
    for name, value in {**sent, "Content-Length": str(length)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(data)
    return connection


def test_a_request_that_drips_for_too_long_gives_its_file_free_and_keeps_what_came(tmp_path: Path) -> None:
    with running(tmp_path / "artifacts", request_s=1.0) as gateway:
        data, sha = small(b"0123456789" * 100)
        dripping = begun(gateway, data[:1], len(data), sha)
        sent, answer, until = 1, b"", time.monotonic() + 30
        while not answer:
            assert time.monotonic() < until
            try:
                answer = dripping.sock.recv(1000)
            except TimeoutError:  # not yet: one byte more, twenty times a second
                dripping.send(data[sent : sent + 1])
                sent += 1
        dripping.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
        status, headers = gateway.ask("HEAD", f"/v1/artifacts/r1/{sha}", {})
        there = int(headers["upload-offset"])
        assert (status, 0 < there <= sent) == (200, True)
        assert gateway.append(data[there:], there, len(data), sha) == 201


def test_what_uploads_hold_in_memory_counts_with_all_requests_in_flight(tmp_path: Path) -> None:
    budget = Budget(2_000_000)
    with running(tmp_path / "artifacts", budget=budget) as gateway:
        (large, sha), (other, other_sha) = small(os.urandom(2_000_000)), small(os.urandom(1_500_000))
        slow = begun(gateway, large[:10], len(large), sha)
        _persist_until(lambda: budget.in_flight > 1_000_000)
        assert gateway.append(other, 0, len(other), other_sha) == 503
        assert gateway.append(b"small", 0, 5, hashlib.sha256(b"small").hexdigest()) == 201
        slow.close()
        _persist_until(lambda: budget.in_flight == 0)
        assert gateway.append(other, 0, len(other), other_sha) == 201


def _persist_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/artifacts/r1/" + "A" * 64,
        "/v1/artifacts/r1/abc",
        "/v1/artifacts/../" + "a" * 64,
        "/v1/artifacts/%2e%2e/" + "a" * 64,
        "/v1/artifacts/.hidden/" + "a" * 64,
        "/v1/artifacts/a%2fb/" + "a" * 64,
        "/v1/artifacts/r1/%2e%2e%2f" + "a" * 58,
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(gateway: Gateway, path: str) -> None:
    status, _ = gateway.ask("PATCH", path, {"Upload-Offset": "0", "Upload-Length": "1"}, b"x")
    assert status in (400, 404)
    assert [found for found in gateway.folder.parent.rglob("*") if found.is_file()] == []


@pytest.mark.parametrize(
    ("offset", "length"), [("", "5"), ("0", ""), ("-1", "5"), ("6", "5"), ("0x1", "5"), ("٣", "5")]
)
def test_numbers_that_are_none_are_refused(gateway: Gateway, offset: str, length: str) -> None:
    headers = {"Upload-Offset": offset.encode("utf-8").decode("latin-1"), "Upload-Length": length}
    assert gateway.ask("PATCH", "/v1/artifacts/r1/" + "a" * 64, headers, b"x")[0] == 400


def test_unfinished_uploads_go_after_a_day_and_finished_ones_stay(tmp_path: Path, file: Path) -> None:
    ahead = 0.0
    with running(tmp_path / "artifacts", clock=lambda: time.time() + ahead) as gateway:
        put(gateway, file)
        data, sha = small(b"half and half")
        assert gateway.append(data[:4], 0, len(data), sha) == 204
        assert gateway.held.sweep() == 0
        before = gateway.held.size()
        ahead = 25 * 3600.0
        assert gateway.held.sweep() == 1
        assert gateway.held.size() == before - 4
        assert (gateway.folder / held_at("r1", SHA)).exists()


def test_what_is_held_is_counted_anew_after_a_restart(tmp_path: Path, file: Path) -> None:
    with running(tmp_path / "artifacts") as gateway:
        put(gateway, file)
    with running(tmp_path / "artifacts", quota_bytes=len(BYTES) + 100) as gateway:
        data, sha = small(b"x" * 1000)
        assert gateway.append(data, 0, 1000, sha) == 507
