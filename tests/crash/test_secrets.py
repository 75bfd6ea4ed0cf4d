"""Planted secrets, in every place where one can stand, come out at the destination they are for, and nowhere else.

Pattern: a program with its real shipper, against servers that repeat all they were told in what they answer; then every
file of the spool, every byte that was sent, and what each command prints is searched. Limit: 60 s.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest

import tracelet
from tests.conftest import PREFIXES, processes_of, stop
from tests.servers import Spoil, recording_proxy
from tests.shipping import until
from tests.sinks import GrpcSink, HttpSink, Received, Say
from tracelet.cli.main import main

PLACES = (
    "header",
    "bearer",
    "argument-header",
    "file",
    "user",
    "password",
    "query",
    "prometheus-header",
    "prometheus-user",
    "prometheus-password",
    "mlflow-password",
    "variable",
    "command-line",
    "proxy-password",
    "database-password",
)
SECRETS = {place: f"planted+{place}/s3cret=" for place in PLACES}

MLFLOW_USER = "alice"  # no secret: MLflow shows whose a run is

PROGRAM = textwrap.dedent(
    """
    import logging, os, sys
    os.umask(0)
    import tracelet
    from tracelet import MLflow, OTLP, Prometheus

    logging.basicConfig(level=logging.DEBUG)
    otlp, prometheus, mlflow, grpc, token_file, prometheus_header, argument_header = sys.argv[1:8]
    places = [
        OTLP(endpoint=otlp, headers={"x-argument": argument_header}),
        OTLP(endpoint=grpc, protocol="grpc", headers_file=token_file, headers={"x-argument": argument_header}),
        Prometheus(url=prometheus, headers={"x-key": prometheus_header}),
        MLflow(mlflow),
        MLflow("postgresql://ml:" + os.environ["DATABASE_WORD"] + "@127.0.0.1:9/db"),
    ]
    exp = tracelet.Experiment("secretive", project="crash", backend=places)
    for i in range(20):
        exp.log_metric("loss", i / 8, iteration=i)
    exp.log_params({"lr": 0.1})
    exp.log_artifact(__file__)
    exp.flush(3)
    try:
        with exp, exp.span("phase"):
            raise ConnectionError(f"{os.environ['MY_API_KEY']} is refused by {otlp}, {os.environ['DATABASE_WORD']}")
    except ConnectionError:
        pass
    """
)


def forms(secret: str) -> Iterator[bytes]:
    """A secret as it is, and as it may be written; also in what basic authentication makes of it."""
    yield from (form.encode() for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1]))
    yield from (base64.b64encode(secret.encode()).rstrip(b"="),)


def pairs() -> Iterator[bytes]:
    for user, password in (("user", "password"), ("prometheus-user", "prometheus-password")):
        yield base64.b64encode(f"{SECRETS[user]}:{SECRETS[password]}".encode()).rstrip(b"=")
    yield base64.b64encode(f"{MLFLOW_USER}:{SECRETS['mlflow-password']}".encode()).rstrip(b"=")


def found_in(content: bytes) -> list[str]:
    """Which planted secrets stand in it."""
    named = [place for place, secret in SECRETS.items() if any(form in content for form in forms(secret))]
    return named + [f"pair {pair!r}" for pair in pairs() if pair in content]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of one whole run with all of them."""
    folder = tmp_path_factory.mktemp("secrets")
    spool = folder / "spool"
    (folder / "train.py").write_text(PROGRAM)
    (folder / "token").write_text(SECRETS["file"])
    asked: dict[tuple[str, ...], int] = {}

    def echo(received: Received) -> Say:
        """Refuse each asker first for who it is, then for now, then for good; always in words that repeat its own."""
        who = (received.signal, received.path, *(received.headers.get(name, "") for name in ("x-key", "x-argument")))
        asked[who] = asked.get(who, 0) + 1
        status, code = ((401, "UNAUTHENTICATED"), (503, "UNAVAILABLE"), (400, "INVALID_ARGUMENT"))[
            min(asked[who], 3) - 1
        ]
        words = f"no: {received.path} {json.dumps(received.headers)}"
        return Say(status, message=words, code=grpc.StatusCode[code], headers={"Location": received.path})

    with HttpSink() as http, GrpcSink() as by_grpc, recording_proxy(http.url) as mlflow:
        http.rule = by_grpc.rule = echo
        mlflow.rule = lambda request: Spoil(
            forward=False, answer=(500, json.dumps({"message": str(dict(request.headers))}).encode(), {})
        )
        at = f"{quote(SECRETS['user'], safe='')}:{quote(SECRETS['password'], safe='')}@{http.url[7:]}"
        prom = f"{quote(SECRETS['prometheus-user'], safe='')}:{quote(SECRETS['prometheus-password'], safe='')}"
        headers = (
            f"api-key={quote(SECRETS['header'], safe='')},authorization=Bearer%20{quote(SECRETS['bearer'], safe='')}"
        )
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)},
            "TRACELET_DIR": str(spool),
            "OTEL_EXPORTER_OTLP_HEADERS": headers,
            "MLFLOW_TRACKING_USERNAME": MLFLOW_USER,
            "MLFLOW_TRACKING_PASSWORD": SECRETS["mlflow-password"],
            "MY_API_KEY": SECRETS["variable"],
            "DATABASE_WORD": quote(SECRETS["database-password"], safe=""),
            "SOCKS_PROXY": f"http://proxy:{quote(SECRETS['proxy-password'], safe='')}@127.0.0.1:1",
        }
        arguments = [
            f"http://{at}/?token={quote(SECRETS['query'], safe='')}",
            f"http://{prom}@{http.url[7:]}",
            mlflow.uri,
            by_grpc.endpoint,
            str(folder / "token"),
            SECRETS["prometheus-header"],
            SECRETS["argument-header"],
            f"--token={SECRETS['command-line']}",
        ]
        ran = subprocess.run(
            [sys.executable, str(folder / "train.py"), *arguments],
            env=environ,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr.decode()
        (run,) = (path for path in spool.iterdir() if path.is_dir())
        (host,) = (path for path in run.iterdir() if path.is_dir())
        until(lambda: b"postgresql" in (host / "shipper.log").read_bytes() and len(list(host.glob("rejected-*"))) == 3)
        printed = {"the program": ran.stdout + ran.stderr}
        for command in (
            *(["runs"], ["show", run.name], ["doctor"], ["doctor", "--json"], ["export", run.name]),
            *(["ship", "--all", "--timeout", "1s"], ["ship", "--dead-letters", run.name, "--timeout", "1s"], ["prune"]),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "tracelet", *command], env=environ, capture_output=True, timeout=60, check=False
            )
            printed[" ".join(command)] = done.stdout + done.stderr
        sent = {f"{r.signal} {n}": r.body for n, r in enumerate(http.requests + by_grpc.requests)}
        shown = http.requests + by_grpc.requests
        stop(processes_of(str(folder)))
    return {"spool": spool, "host": host, "printed": printed, "sent": sent, "requests": shown}


def test_the_servers_were_shown_what_is_for_them(told: dict[str, Any]) -> None:
    headers = json.dumps([received.headers for received in told["requests"]])
    for place in ("argument-header", "prometheus-header", "file", "header"):
        assert SECRETS[place] in headers, place
    assert len({received.signal for received in told["requests"]}) == 3


def test_no_file_of_the_spool_holds_a_secret(told: dict[str, Any]) -> None:
    files = [path for path in told["spool"].rglob("*") if path.is_file()]
    letters = [path for path in files if path.name.startswith("rejected-")]
    assert len(letters) == 3
    assert {path.name: found_in(path.read_bytes()) for path in files} == {path.name: [] for path in files}
    log = (told["host"] / "shipper.log").read_text()
    assert "401" in log
    assert "***" in log


def test_nothing_that_was_sent_but_headers_holds_a_secret(told: dict[str, Any]) -> None:
    assert told["sent"]
    assert {what: found_in(body) for what, body in told["sent"].items()} == {what: [] for what in told["sent"]}


def test_nothing_that_is_printed_holds_a_secret(told: dict[str, Any]) -> None:
    assert {what: found_in(text) for what, text in told["printed"].items()} == {what: [] for what in told["printed"]}


def test_the_folders_of_a_spool_are_their_users_alone_whatever_the_umask(told: dict[str, Any]) -> None:
    folders = [told["spool"], *(path for path in told["spool"].rglob("*") if path.is_dir())]
    assert any(folder.name == "artifacts" for folder in folders)
    assert {str(folder): oct(stat.S_IMODE(folder.stat().st_mode)) for folder in folders} == {
        str(folder): "0o700" for folder in folders
    }


MISTYPED = (
    "u:{}@127.0.0.1:9",
    "htp://u:{}@127.0.0.1",
    "http://u:{}@127.0.0.1:port",
    "http://u:a/{}@127.0.0.1",
    "http://u:{},a@h",
    "{}@h",
)


@pytest.mark.parametrize(
    "variable", ["MLFLOW_TRACKING_URI", "OTEL_EXPORTER_OTLP_ENDPOINT", "TRACELET_PROMETHEUS_URL", "TRACELET_BACKEND"]
)
@pytest.mark.parametrize("mistyped", MISTYPED)
def test_an_address_that_is_mistyped_shows_its_password_nowhere(
    variable: str,
    mistyped: str,
    clean_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = "planted-s3cret"
    monkeypatch.setenv(variable, mistyped.format(secret))
    if variable == "TRACELET_PROMETHEUS_URL":
        monkeypatch.setenv("TRACELET_BACKEND", "prometheus")
    said = ""
    try:
        with tracelet.Experiment("mistyped", project="crash", shipper="off") as exp:
            exp.log_metric("loss", 1.0, iteration=1)
    except tracelet.ConfigError as error:
        said = f"{error} {error.facts}"
    main(["doctor", "--offline"])
    main(["doctor", "--json"])
    main(["ship", "--all", "--timeout", "0.1s"])
    main(["runs"])
    printed = capfd.readouterr()
    assert "variables" in printed.out
    assert secret not in printed.out + printed.err + said + caplog.text
    files = [path for path in clean_environment.rglob("*") if path.is_file()]
    assert [path.name for path in files if secret.encode() in path.read_bytes()] == []
