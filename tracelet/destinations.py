"""A specification as plain data: the manifest's entry, absolute and without secrets, and its secrets beside it.

The secrets are for the shipper alone, by its standard input; from both it builds the exporter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tracelet.addresses import DATABASES, without_credentials
from tracelet.backends import KINDS, OTLP, SIGNALS, File, Live, MLflow, Prometheus, Spec, signals_taken
from tracelet.errors import ConfigError
from tracelet.settings import parse_duration

__all__ = ["is_by_client", "signals_with_endpoint", "to_destination", "tracking_uri"]


def to_destination(spec: Spec, environ: Mapping[str, str], cwd: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `_to_destination`; an address that urllib can't take apart (half a pair of brackets) is named, too.

    Raises:
        ConfigError: an address that can't be right, or one of a kind that is not built yet.
    """
    try:
        return _to_destination(spec, environ, cwd)
    except (ValueError, RuntimeError) as error:  # RuntimeError: whose home is meant by a path's ~ can't be told
        kind = KINDS[type(spec)]
        raise ConfigError(
            f"an address of {kind} is none: {error}: look at the variables and arguments that name it", backend=kind
        ) from None


def _to_destination(spec: Spec, environ: Mapping[str, str], cwd: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's entry of `spec` {id, kind, spec}, absolute and without secrets; and its secrets.

    The id is made of the address alone, so that a new token or timeout stays the same destination.

    Raises:
        ConfigError: an address that can't be right, or one of a kind that is not built yet.
    """
    if isinstance(spec, MLflow):
        fields, secrets = _mlflow(spec, environ, cwd)
        address: object = fields["tracking_uri"]
    elif isinstance(spec, OTLP):
        fields, secrets = _otlp(spec, environ, cwd)
        address = [fields["endpoint"], fields["environment"] if fields["endpoint"] is None else None]
    elif isinstance(spec, Prometheus):
        fields, secrets = _prometheus(spec, cwd)
        address = [fields["url"], fields["prefix"]]
    elif isinstance(spec, File):
        path = os.path.abspath(cwd / Path(spec.path or "tracelet.otlp.jsonl").expanduser())
        fields, secrets, address = {"path": path}, {}, path
    elif isinstance(spec, Live):
        name = f"{type(spec.exporter).__module__}.{type(spec.exporter).__qualname__}"
        fields = {"exporter": name, "signals": list(signals_taken(spec.exporter))}
        # The same exporters in the next attempt are the same destinations: what they had not taken, these get.
        secrets, address = {"exporter": spec.exporter}, [name, spec.number]
    else:
        fields, secrets, address = {}, {}, None
    kind = KINDS[type(spec)]
    digest = hashlib.sha256(json.dumps([kind, address], sort_keys=True).encode()).hexdigest()[:8]
    destination: dict[str, Any] = {"id": f"{kind}-{digest}", "kind": kind, "spec": fields}
    if kind in ("console", "live"):
        # The training program's own terminal, or an object in it: a thread of that program serves it, no shipper.
        destination["in_process"] = True
    return destination, secrets


def tracking_uri(destination: Mapping[str, Any], secrets: Mapping[str, Any]) -> str:
    """The MLflow address of a destination of kind mlflow, with the credentials put back.

    `secrets` are that destination's own, or {} where they are not at hand.
    """
    return str(secrets.get("tracking_uri") or destination["spec"]["tracking_uri"])


def _mlflow(spec: MLflow, environ: Mapping[str, str], cwd: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    uri = spec.tracking_uri or environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    scheme = urlsplit(uri).scheme.lower()
    engine = scheme.partition("+")[0]
    shown = without_credentials(uri)
    if engine == "sqlite":
        uri = _absolute_sqlite(uri, cwd)
    elif scheme in ("http", "https"):
        if not urlsplit(uri).hostname:
            raise ConfigError(f"tracking_uri {shown!r} has no host: use one such as http://localhost:5000", uri=shown)
        uri = uri.rstrip("/")
    elif engine not in DATABASES:
        uri = _by_mlflow(uri, environ, cwd)
    public = without_credentials(uri)
    fields: dict[str, Any] = {"tracking_uri": public}
    if scheme not in ("http", "https"):
        # MLflow keeps a local database's artifacts in ./mlruns of whoever writes; this says whose folder that is.
        fields["artifact_root"] = str(cwd / "mlruns")
    return fields, {"tracking_uri": uri} if uri != public else {}


def is_by_client(uri: str) -> bool:
    """Whether only mlflow's own client can reach this MLflow: neither a server nor a database."""
    scheme = urlsplit(uri).scheme.lower()
    return scheme not in ("http", "https") and scheme.partition("+")[0] not in DATABASES


def _by_mlflow(uri: str, environ: Mapping[str, str], cwd: Path) -> str:
    """An address that is mlflow's own client's to know, made absolute; that it knows it is seen to here.

    The shipper would find out after training; and to ask mlflow costs seconds.
    """
    scheme = uri if uri in ("databricks", "databricks-uc", "uc") else urlsplit(uri).scheme.lower()
    shown = without_credentials(uri)
    if scheme == "databricks":
        return uri
    if scheme in ("", "file"):
        # mlflow's own switch; without it mlflow refuses, and with it the run goes there by its client.
        if environ.get("MLFLOW_ALLOW_FILE_STORE", "").strip().lower() not in ("true", "1"):
            raise ConfigError(
                f"tracking_uri {shown!r} is a folder, and MLflow refuses its file store, which gets no more updates,"
                " unless MLFLOW_ALLOW_FILE_STORE=true is set: use its local database sqlite:///mlflow.db",
                uri=shown,
            )
        return str(cwd / Path(uri).expanduser()) if scheme == "" else uri
    import importlib.metadata  # 18 ms that no other address costs

    plugins = sorted({point.name for point in importlib.metadata.entry_points(group="mlflow.tracking_store")})
    if scheme in plugins:
        return uri
    raise ConfigError(
        f"tracking_uri {shown!r} is of a kind that MLflow doesn't know here: use http://, https://, databricks, a"
        f" database ({', '.join(DATABASES)}; the local one is sqlite:///mlflow.db)"
        + (
            f", or a plugin's ({', '.join(plugins)})"
            if plugins
            else "; no plugin for mlflow.tracking_store is installed"
        ),
        uri=shown,
    )


def _absolute_sqlite(uri: str, cwd: Path) -> str:
    """`sqlite:///mlflow.db` with the path made absolute, as SQLAlchemy reads it: what follows the third slash."""
    head, slashes, rest = uri.partition(":///")
    path, mark, query = rest.partition("?")
    if not slashes or not path or path == ":memory:" or path.startswith("file:"):
        shown = without_credentials(uri)
        raise ConfigError(
            f"tracking_uri {shown!r} names no file, and another process has to find it: use sqlite:///mlflow.db",
            uri=shown,
        )
    # MLflow unquotes its own default and hands others to SQLAlchemy as they are; so nothing is quoted here.
    return f"{head}:///{os.path.abspath(os.path.join(cwd, path))}{mark}{query}"


def _otlp(spec: OTLP, environ: Mapping[str, str], cwd: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if spec.protocol not in (None, "http/protobuf", "grpc"):
        raise ConfigError(f"OTLP protocol is {spec.protocol!r}, but has to be 'http/protobuf' or 'grpc'")
    if spec.compression not in (None, "gzip", "none"):
        raise ConfigError(f"OTLP compression is {spec.compression!r}, but has to be 'gzip' or 'none'")
    if spec.timeout_s is not None and not spec.timeout_s > 0:
        raise ConfigError(f"OTLP timeout_s is {spec.timeout_s!r}, but has to be a number of seconds above 0")
    # gRPC takes a bare host:port, as OpenTelemetry's exporter does.
    grpc = (spec.protocol or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip()) == "grpc"
    if spec.endpoint is not None and not urlsplit(spec.endpoint).netloc and not grpc:
        shown = without_credentials(spec.endpoint)
        raise ConfigError(f"OTLP endpoint {shown!r} has no host: use one such as http://localhost:4318", endpoint=shown)
    variables = {
        name: value.strip()
        for name, value in sorted(environ.items())
        if (name.startswith("OTEL_EXPORTER_OTLP_") and name.endswith(("ENDPOINT", "PROTOCOL")) and value.strip())
        or (name in ("TRACELET_ARTIFACT_STORE", "TRACELET_ARTIFACT_GATEWAY") and value.strip())
    }
    public = {name: without_credentials(value) for name, value in variables.items()}
    endpoint = None if spec.endpoint is None else without_credentials(spec.endpoint)
    fields = {
        "explicit": spec.explicit,
        "endpoint": endpoint,
        "protocol": spec.protocol,
        "compression": spec.compression,
        "timeout_s": spec.timeout_s,
        "signals": list(SIGNALS if spec.explicit else signals_with_endpoint(environ)),
        "environment": public,
        **_files(spec, ("headers_file",), cwd),
    }
    secrets: dict[str, Any] = {}
    if spec.headers:
        secrets["headers"] = dict(spec.headers)
    if endpoint != spec.endpoint:
        secrets["endpoint"] = spec.endpoint
    if public != variables:
        secrets["environment"] = variables
    return fields, secrets


_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9_.:]*", re.ASCII)
_PROMETHEUS = "http://localhost:9090"


def _prometheus(spec: Prometheus, cwd: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    given = spec.url or _PROMETHEUS
    parts = urlsplit(given)
    shown = without_credentials(given)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"Prometheus' address {shown!r} has to be one such as {_PROMETHEUS}", url=shown)
    path = parts.path.rstrip("/")
    if not path.endswith("/v1/metrics"):
        # Mimir and VictoriaMetrics have other bases, which say what they are by their names.
        base = path if path.endswith(("/otlp", "/opentelemetry")) else f"{path}/api/v1/otlp"
        path = f"{base}/v1/metrics"
    url = urlunsplit(parts._replace(path=path))
    prefix = "ml." if spec.prefix is None else spec.prefix
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(f"the metric prefix is {prefix!r}, but has to begin with a letter, such as 'ml.'")
    windows = {}
    for name, given_window, default in (
        ("window_age", spec.window_age, 143 * 3600),
        ("window_ahead", spec.window_ahead, 540),
    ):
        try:
            windows[f"{name}_s"] = parse_duration(default if given_window is None else given_window)
        except ValueError as error:
            raise ConfigError(f"Prometheus' {name} is {given_window!r}, but has to be {error}") from None
    if spec.timeout_s is not None and not spec.timeout_s > 0:
        raise ConfigError(f"Prometheus' timeout_s is {spec.timeout_s!r}, but has to be a number of seconds above 0")
    public = without_credentials(url)
    secrets: dict[str, Any] = {} if public == url else {"url": url}
    if spec.headers:
        secrets["headers"] = dict(spec.headers)
    if spec.client_key is not None and spec.client_certificate is None:
        raise ConfigError("Prometheus has a client_key, but no client_certificate that it belongs to")
    files = _files(spec, ("headers_file", "certificate", "client_certificate", "client_key"), cwd)
    return {"url": public, "prefix": prefix, **windows, "timeout_s": spec.timeout_s, **files}, secrets


def _files(spec: OTLP | Prometheus, names: Iterable[str], cwd: Path) -> dict[str, str]:
    """Those of these files that the specification names, absolute: the shipper may have another working folder."""
    named = ((name, getattr(spec, name)) for name in names)
    return {name: os.path.abspath(cwd / Path(path).expanduser()) for name, path in named if path is not None}


def signals_with_endpoint(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The signals for which the environment has an endpoint; an empty variable counts as unset, as in OTel."""
    if environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip():
        return SIGNALS
    return tuple(s for s in SIGNALS if environ.get(f"OTEL_EXPORTER_OTLP_{s.upper()}_ENDPOINT", "").strip())
