"""Whether a destination can be reached from here, now, with these credentials: one cheap question, a short wait."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from tracelet.addresses import without_credentials
from tracelet.destinations import is_by_client, tracking_uri
from tracelet.errors import TraceletError

__all__ = ["TIMEOUT_S", "Reach", "check"]

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Reach:
    """What a destination answered. `advice` is what to do now, where that is known."""

    ok: bool
    said: str
    advice: str | None = None


def check(
    destination: Mapping[str, Any],
    secrets: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    project: str,
    timeout_s: float = TIMEOUT_S,
) -> Reach:
    """Ask `destination` something that changes nothing; its answer, or why there is none within about `timeout_s`.

    An MLflow server is asked for the project's experiment, a database is opened, an OTLP receiver gets an empty export
    for each signal, a file's folder is looked at. The words may hold what the other side said: sieve them.
    """
    kind, spec = destination["kind"], destination["spec"]
    if kind == "console":
        return Reach(True, "the program's own output")
    if kind == "file":
        return _file(str(spec["path"]))
    if kind == "otlp":
        ask: Callable[[], Reach] = lambda: _otlp(spec, secrets, environ, timeout_s)  # noqa: E731
    elif kind == "prometheus":
        ask = lambda: _prometheus(spec, secrets, environ, timeout_s)  # noqa: E731
    elif kind == "mlflow":
        uri = tracking_uri(destination, secrets)
        if uri.startswith("sqlite"):
            return _sqlite(uri)
        if urlsplit(uri).scheme.lower() in ("http", "https"):
            ask = lambda: _mlflow_server(uri, environ, project, timeout_s)  # noqa: E731
        elif is_by_client(uri):
            ask = lambda: _mlflow_client(uri, project)  # noqa: E731
        else:
            ask = lambda: _database(uri, timeout_s)  # noqa: E731
    else:
        return Reach(False, f"is of a kind ({kind}) that this release doesn't know")
    return _within(ask, 4 * timeout_s)


def _within(ask: Callable[[], Reach], limit_s: float) -> Reach:
    """The answer of `ask`, or that there was none: a name server or a driver may ignore every timeout it is given."""
    answers: list[Reach] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001 - the doctor names every illness, a driver's own errors among them
            answers.append(Reach(False, _words(error)))

    started = time.monotonic()
    thread = threading.Thread(target=run, name="tracelet-reach", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not answers:
        return Reach(False, f"no answer within {limit_s:.0f} s", "see whether a firewall or proxy stands in between")
    answer = answers[0]
    took = time.monotonic() - started
    return Reach(answer.ok, f"{answer.said} ({took * 1000:.0f} ms)" if answer.ok else answer.said, answer.advice)


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, TraceletError) else f"{type(error).__name__}: {text}" if text else repr(error)


# ---- MLflow ------------------------------------------------------------------------------------------------------


def _mlflow_server(uri: str, environ: Mapping[str, str], project: str, timeout_s: float) -> Reach:
    from tracelet.exporters.mlflow.connection import Connection
    from tracelet.exporters.mlflow.rest import RestTransport
    from tracelet.exporters.mlflow.transport import NotNow, Refused

    parts = urlsplit(uri)
    given = {"username": unquote(parts.username or ""), "password": unquote(parts.password or "")}
    brief = {**environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}
    transport = RestTransport(Connection(without_credentials(uri), given, brief))
    try:
        version = transport.connection.request("GET", "/version")
        found = transport.experiment_by_name(project)
    except NotNow as no:
        return Reach(False, no.reason, _mlflow_advice(no.reason))
    except Refused as no:
        return Reach(False, f"the MLflow server refuses to look for experiment {project!r}: {no}")
    finally:
        transport.close()
    answered = version.body.decode("ascii", "replace").strip() if version.status == 200 else ""
    name = f"MLflow {answered}" if answered and len(answered) < 20 else "an MLflow server"
    if found is None:
        return Reach(True, f"{name} answers; experiment {project!r} will be made")
    if found.deleted:
        return Reach(
            False,
            f"{name} answers, but its experiment {project!r} is deleted, so runs of this project will wait",
            f"`mlflow experiments restore -x {found.experiment_id}`, or use another project",
        )
    return Reach(True, f"{name} answers, and has experiment {project!r}")


def _mlflow_client(uri: str, project: str) -> Reach:
    """By mlflow's own client, as the shipper would; it imports mlflow."""
    from tracelet.exporters.mlflow.client import ClientTransport
    from tracelet.exporters.mlflow.transport import NotNow, Refused

    try:
        found = ClientTransport(uri, without_credentials(uri)).experiment_by_name(project)
    except NotNow as no:
        return Reach(False, no.reason)
    except Refused as no:
        return Reach(False, f"MLflow refuses to look for experiment {project!r}: {no}")
    return Reach(True, f"mlflow's client reaches it; experiment {project!r} {'is there' if found else 'will be made'}")


def _mlflow_advice(reason: str) -> str | None:
    if reason.startswith(("can't reach", "no answer from")):
        return "start the server (`mlflow server`), or correct MLFLOW_TRACKING_URI; until then the data waits here"
    return None  # the reason itself says what to do


def _database(uri: str, timeout_s: float) -> Reach:
    try:
        import sqlalchemy
    except ImportError:
        return Reach(
            False,
            "MLflow's databases need the package mlflow, which is not installed",
            "pip install 'tracelet-otel[mlflow]'",
        )
    parts = urlsplit(uri)
    if parts.hostname and parts.port:
        # A driver's own timeout is often minutes, and each spells it another way.
        socket.create_connection((parts.hostname, parts.port), timeout=timeout_s).close()
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
    except ImportError as error:
        return Reach(False, f"the database's driver is missing: {error}", "install it into this environment")
    finally:
        engine.dispose()
    return Reach(True, "the database opens")


def _sqlite(uri: str) -> Reach:
    import importlib.util
    import sqlite3

    if importlib.util.find_spec("mlflow") is None:
        return Reach(
            False,
            "MLflow's databases need the package mlflow, which is not installed",
            "pip install 'tracelet-otel[mlflow]'",
        )
    path = uri.partition(":///")[2].partition("?")[0]
    if not os.path.exists(path):
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            return Reach(False, f"the folder {folder} doesn't exist", f"mkdir -p {folder}")
        if not os.access(folder, os.W_OK | os.X_OK):
            return Reach(False, f"the folder {folder} can't be written", "use another folder, or ask its owner")
        return Reach(True, f"{path} will be made")
    try:
        # mode=rw: never make a file; a read is enough to see that it is a database, and what it holds.
        connection = sqlite3.connect(f"file:{_quoted(path)}?mode=rw", uri=True, timeout=1.0)
        try:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        return Reach(False, f"{path}: {error}", "name another file, or mend this one")
    if not os.access(path, os.W_OK):
        return Reach(False, f"{path} can't be written", "ask its owner, or name another file")
    return Reach(True, f"{path} opens")


def _quoted(path: str) -> str:
    from urllib.parse import quote

    return quote(path, safe="/")


# ---- OTLP --------------------------------------------------------------------------------------------------------


def _otlp(spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float) -> Reach:
    """An empty export for each signal, by the very senders that a shipper uses: address, TLS and headers are tried."""
    from tracelet.exporters.otlp_wire import Sender, options_for

    given = spec.get("timeout_s")
    brief = {**spec, "timeout_s": timeout_s if given is None else min(given, timeout_s)}
    taken, amiss = [], []
    for signal in spec["signals"]:
        options = options_for(signal, brief, secrets, environ).ready()
        sender: Sender
        if options.protocol == "grpc":
            from tracelet.exporters.otlp_grpc import GrpcSender

            sender = GrpcSender(options)
        else:
            from tracelet.exporters.otlp_http import HttpSender

            sender = HttpSender(options)
        try:
            reply = sender.send(b"")
        finally:
            sender.close()
        if reply.kind in ("accepted", "refused", "too_large"):
            taken.append(signal)  # a receiver that dislikes an empty export was reached, and let us in
            continue
        amiss.append(f"{signal}: {reply.reason}")
        if not reply.elsewhere:
            break  # the same address again would be the same wait again
    if not amiss:
        return Reach(True, f"takes {', '.join(taken)}")
    return Reach(False, "; ".join(amiss), None if reply.loud else _OTLP_ADVICE)


_OTLP_ADVICE = (
    "start the receiver, or correct OTEL_EXPORTER_OTLP_ENDPOINT (and OTEL_EXPORTER_OTLP_PROTOCOL: http/protobuf is"
    " mostly port 4318, grpc 4317); until then the data waits here"
)


# ---- Prometheus --------------------------------------------------------------------------------------------------


def _prometheus(
    spec: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float
) -> Reach:
    """An empty export by the shipper's own sender: the address, TLS, headers and the receiver's switch are tried."""
    from tracelet.exporters.prometheus_http import PrometheusSender

    sender = PrometheusSender.of({**spec, "timeout_s": timeout_s}, secrets, environ)
    try:
        reply = sender.send(b"")
    finally:
        sender.close()
    if reply.kind in ("accepted", "refused"):
        return Reach(True, "takes metrics")
    return Reach(False, reply.reason, None if reply.loud else "start Prometheus, or correct TRACELET_PROMETHEUS_URL")


# ---- file --------------------------------------------------------------------------------------------------------


def _file(path: str) -> Reach:
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        return Reach(False, f"{path} is a folder", "name a file")
    if os.path.exists(path):
        if os.access(path, os.W_OK):
            return Reach(True, f"{path} can be written")
        return Reach(False, f"{path} can't be written", "ask its owner, or name another file")
    if not os.path.isdir(folder):
        return Reach(False, f"the folder {folder} doesn't exist", f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Reach(False, f"the folder {folder} can't be written", "name another one, or ask its owner")
    return Reach(True, f"{path} will be made")
