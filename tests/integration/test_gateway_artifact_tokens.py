"""Who may put files to which run, at the real `tracelet gateway`: its owner, in its project, whoever was first."""

from __future__ import annotations

import hashlib
import http.client
from pathlib import Path
from urllib.parse import urlsplit

from tests.gateway_fakes import points_request
from tests.gateway_process import GatewayProcess

NOWHERE = "http://127.0.0.1:9"  # an MLflow that is away
TOKENS = "".join(
    f'[[token]]\nname = "{name}"\ntoken = "{name}-token-of-a-length"\nprojects = {projects}\n'
    for name, projects in (("owner", '["p"]'), ("other", '["p"]'), ("stranger", '["speech"]'))
)


def sent_by(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-token-of-a-length", "tracelet.wire.version": "1.0"}


def put(gateway: GatewayProcess, run: str, data: bytes, headers: dict[str, str]) -> tuple[int, str]:
    """Status and text of the answer to one PATCH with the whole of a file."""
    host = urlsplit(gateway.http)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
    try:
        path = f"/v1/artifacts/{run}/{hashlib.sha256(data).hexdigest()}"
        connection.request("PATCH", path, data, {"Upload-Offset": "0", "Upload-Length": str(len(data)), **headers})
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def tokens_file(folder: Path) -> str:
    (folder / "tokens.toml").write_text(TOKENS)
    return str(folder / "tokens.toml")


def test_a_runs_files_come_from_its_owner_and_refusals_are_logged_and_counted(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "g", NOWHERE, "--tokens", tokens_file(tmp_path), "--grace", "1s") as gateway:
        assert gateway.post("metrics", points_request("r1").SerializeToString(), sent_by("owner"))[0] == 200
        status, why = put(gateway, "r1", b"evil", sent_by("stranger"))
        assert (status, "project" in why) == (403, True)
        status, why = put(gateway, "r1", b"evil", sent_by("other"))
        assert (status, "belongs to token 'owner'" in why) == (403, True)
        assert put(gateway, "r1", b"good", {})[0] == 401
        assert put(gateway, "r1", b"good", {**sent_by("owner"), "Authorization": "Bearer wrong"})[0] == 401
        assert put(gateway, "r1", b"good", sent_by("owner"))[0] == 201
        assert gateway.number('refused_total{reason="foreign run"}') == 2
        assert gateway.number('refused_total{reason="no token"}') == 1
        assert gateway.number('refused_total{reason="wrong token"}') == 1
        assert "REFUSED (foreign run): an artifact: run r1: " in gateway.log
        assert "REFUSED (no token): an artifact" in gateway.log


def test_whoever_puts_a_file_before_the_run_is_known_does_not_own_the_run(tmp_path: Path) -> None:
    """Files leave before their event, so this is the usual order; and anybody may guess a run's id."""
    with GatewayProcess(tmp_path / "g", NOWHERE, "--tokens", tokens_file(tmp_path), "--grace", "1s") as gateway:
        assert put(gateway, "r1", b"evil", sent_by("stranger"))[0] == 201
        assert put(gateway, "r1", b"good", sent_by("owner"))[0] == 201
        assert gateway.post("metrics", points_request("r1").SerializeToString(), sent_by("owner"))[0] == 200
        assert put(gateway, "r1", b"more evil", sent_by("stranger"))[0] == 403
        assert put(gateway, "r1", b"better", sent_by("owner"))[0] == 201


def test_tokens_that_come_later_go_on_with_what_was_put_without(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path / "g", NOWHERE, "--grace", "1s") as gateway:
        assert put(gateway, "r1", b"one", {})[0] == 201
        assert gateway.post("metrics", points_request("r1").SerializeToString())[0] == 200
    with GatewayProcess(tmp_path / "g", NOWHERE, "--tokens", tokens_file(tmp_path), "--grace", "1s") as gateway:
        assert put(gateway, "r1", b"two", sent_by("owner"))[0] == 201
        assert put(gateway, "r1", b"two", sent_by("stranger"))[0] == 403  # not its project
        more = points_request("r1", count=5).SerializeToString()
        assert gateway.post("metrics", more, sent_by("owner"))[0] == 200
        assert put(gateway, "r1", b"three", sent_by("other"))[0] == 403
        assert put(gateway, "r1", b"three", sent_by("owner"))[0] == 201
