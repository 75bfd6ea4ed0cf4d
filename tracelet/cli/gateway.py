"""`tracelet gateway`: takes OTLP from collectors and from training, and writes MLflow runs."""

from __future__ import annotations

import argparse
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tracelet.errors import IntegrationUnavailable
from tracelet.gateway.options import GATEWAY_SETTINGS, is_loopback, resolve

__all__ = ["EXAMPLES", "add", "run"]

EXAMPLES = """\
  tracelet gateway --mlflow http://mlflow:5000
  tracelet gateway --host 0.0.0.0 --tokens tokens.toml --dir /var/lib/tracelet --mlflow http://mlflow:5000
  tracelet gateway --probe http://127.0.0.1:4318/readyz"""

PROBE_S = 5.0

_METAVARS = {
    "host": "ADDRESS",
    "http_port": "PORT",
    "grpc_port": "PORT",
    "dir": "DIR",
    "mlflow": "URI",
    "mlflow_public": "URL",
    "tokens": "FILE",
    "tls_cert": "FILE",
    "tls_key": "FILE",
    "tls_client_ca": "FILE",
    "threads": "N",
    "lost_after": "TIME",
    "body_timeout": "TIME",
    "grace": "TIME",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Make the parser of this command."""
    command = commands.add_parser(
        "gateway",
        help="take OTLP from a collector, and write MLflow runs",
        description="Takes metrics, logs and traces by OTLP (HTTP and gRPC), acknowledges them when they are on its"
        " disk, and writes the runs among them to MLflow; what is not a run's is counted and passed by. Each option"
        " is also a variable, TRACELET_GATEWAY_<NAME>. Ends with SIGTERM; what is not delivered then waits for the"
        " next start.",
        allow_abbrev=False,
    )
    for setting in GATEWAY_SETTINGS:
        text = f"{setting.doc.replace('`', '')} (default: {setting.default.replace('`', '')})".replace("%", "%%")
        if setting.name == "allow_anonymous":
            command.add_argument("--allow-anonymous", action="store_true", default=None, help=text)
        elif setting.name == "artifact_prefixes":
            command.add_argument(
                "--artifact-prefix", metavar="URL", action="append", dest="artifact_prefixes", default=[], help=text
            )
        else:
            option = f"--{setting.name.replace('_', '-')}"
            command.add_argument(option, metavar=_METAVARS.get(setting.name, "SIZE"), help=text)
    command.add_argument("--ready-file", metavar="FILE", help="write its addresses there, as JSON, once it serves")
    command.add_argument(
        "--probe",
        metavar="URL",
        nargs="+",
        help="start nothing; ask these addresses, and exit with 0 if each answers with 2xx: a health check for"
        " containers without a shell",
    )
    return command


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, or probe."""
    if args.probe:
        return _probe(args.probe)
    given = {setting.name: getattr(args, setting.name) for setting in GATEWAY_SETTINGS}
    environ = dict(os.environ)
    options = resolve({**given, "artifact_prefixes": tuple(args.artifact_prefixes)}, environ)
    try:
        from tracelet.gateway.serve import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise IntegrationUnavailable(
            f"{error.name} is not installed: pip install 'tracelet-otel[gateway]'", package=error.name
        ) from None
    return serve(options, environ, ready_file=None if args.ready_file is None else Path(args.ready_file))


def _probe(urls: list[str]) -> int:
    wrong = 0
    for url in urls:
        said = _ask(url)
        if said is not None:
            print(f"{url}: {said}", file=sys.stderr)
            wrong += 1
    return 1 if wrong else 0


def _ask(url: str) -> str | None:
    """None if it answers with 2xx, else what it does instead."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is no http:// or https:// address"
    context = None
    if parts.scheme == "https" and is_loopback(parts.hostname):
        # A certificate names the host that others use; and nothing secret is sent.
        context = ssl._create_unverified_context()
    try:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])
        )
        with opener.open(url, timeout=PROBE_S) as reply:
            return None if 200 <= reply.status < 300 else f"answers with {reply.status}"
    except urllib.error.HTTPError as error:
        return f"answers with {error.code}"
    except (OSError, ValueError) as error:
        return f"can't be reached: {getattr(error, 'reason', error)}"
