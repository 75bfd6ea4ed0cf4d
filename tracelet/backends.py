"""The frozen specifications of destinations, their names, and which one is meant when none is named.

No exporter code here: a specification becomes a destination (plain data for the manifest: absolute, without secrets)
and its secrets (for the shipper alone, by its standard input), from which the shipper builds the exporter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from tracelet.errors import ConfigError
from tracelet.settings import Settings, parse_duration

__all__ = [
    "OTLP",
    "Chosen",
    "Console",
    "File",
    "Live",
    "MLflow",
    "Prometheus",
    "Spec",
    "choose",
    "is_by_client",
    "parse",
    "sounds_secret",
    "to_destination",
    "tracking_uri",
    "without_credentials",
]

SIGNALS = ("metrics", "traces", "logs")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


@dataclass(frozen=True, slots=True)
class MLflow:
    """An MLflow tracking server (`http://`, `https://`) or database (`sqlite:///`, `postgresql://`, ...).

    Without an address: MLFLOW_TRACKING_URI, else `mlflow.db` in the working folder, as MLflow itself has it.

    Examples:
        >>> from tracelet.backends import MLflow
        >>> MLflow(tracking_uri="http://mlflow.example:5000")
        MLflow(tracking_uri='http://mlflow.example:5000')
    """

    tracking_uri: str | None = field(default=None)

    def __repr__(self) -> str:
        shown = None if self.tracking_uri is None else without_credentials(self.tracking_uri)
        return f"MLflow(tracking_uri={shown!r})"


@dataclass(frozen=True, slots=True)
class OTLP:
    """An OTLP receiver: an OpenTelemetry Collector, or a backend that speaks OTLP.

    What is None comes from the OTEL_EXPORTER_OTLP_* variables, else from OpenTelemetry's defaults. As in
    OpenTelemetry's variables, `endpoint` is the base address; over HTTP `v1/metrics`, `v1/traces` and `v1/logs`
    are appended to it. `protocol` is "http/protobuf" or "grpc", `compression` "gzip" or "none". `headers_file` holds a
    token, or lines `name: value`, and is read again when it changes and after every refusal
    (TRACELET_OTLP_HEADERS_FILE); `headers` win over it, and both over the variables.
    """

    endpoint: str | None = None
    protocol: str | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    compression: str | None = None
    timeout_s: float | None = None
    headers_file: str | os.PathLike[str] | None = None
    explicit: bool = True  # False: chosen by the environment, then only signals with an endpoint are sent

    def __repr__(self) -> str:
        shown = None if self.endpoint is None else without_credentials(self.endpoint)
        return f"OTLP(endpoint={shown!r}, protocol={self.protocol!r})"


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A Prometheus that takes OTLP (`--web.enable-otlp-receiver`), without a collector in between; metrics only.

    `url` is the server's address (`http://prometheus:9090`), its OTLP base (`.../api/v1/otlp`) or the whole address of
    metrics. What is None comes from the settings: TRACELET_PROMETHEUS_URL, TRACELET_METRIC_PREFIX, TRACELET_WINDOW_AGE,
    TRACELET_WINDOW_AHEAD. Points older than `window_age` or further ahead than `window_ahead` aren't sent, but counted.
    `headers_file` is as `OTLP` has it; `certificate` is the authority's file, `client_certificate` and `client_key`
    are what this side shows (PEM; TRACELET_PROMETHEUS_HEADERS_FILE, _CERTIFICATE, _CLIENT_CERTIFICATE, _CLIENT_KEY).

    Examples:
        >>> from tracelet.backends import Prometheus
        >>> Prometheus(url="http://prometheus:9090")
        Prometheus(url='http://prometheus:9090')
    """

    url: str | None = None
    prefix: str | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    window_age: float | str | None = None
    window_ahead: float | str | None = None
    timeout_s: float | None = None
    headers_file: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    client_certificate: str | os.PathLike[str] | None = None
    client_key: str | os.PathLike[str] | None = None

    def __repr__(self) -> str:
        shown = None if self.url is None else without_credentials(self.url)
        return f"Prometheus(url={shown!r})"


@dataclass(frozen=True, slots=True)
class Console:
    """The training program's standard output, for a look at what is sent."""


@dataclass(frozen=True, slots=True)
class File:
    """OTLP JSON lines in a file; without a path, `tracelet.otlp.jsonl` in the working folder."""

    path: str | os.PathLike[str] | None = None


@dataclass(frozen=True, slots=True)
class Live:
    """A live OpenTelemetry exporter object; `backend=` takes the object itself, this is what becomes of it.

    It can't cross to another process, so a thread of the training process serves it, as long as that process lives.
    `number` tells exporters of one class in one list apart.
    """

    exporter: object
    number: int = 0


Spec = MLflow | OTLP | Prometheus | Console | File | Live
_SPECS: Mapping[str, type[MLflow] | type[OTLP] | type[Prometheus] | type[Console] | type[File]] = {
    "mlflow": MLflow,
    "otlp": OTLP,
    "prometheus": Prometheus,
    "console": Console,
    "file": File,
}
_KINDS: Mapping[type, str] = {**{spec: name for name, spec in _SPECS.items()}, Live: "live"}  # Live has no name to say

# By signal: the SDK's interface, and the module whose import is a precondition of having an object of it.
_INTERFACES = {
    "metrics": ("opentelemetry.sdk.metrics.export", "MetricExporter"),
    "traces": ("opentelemetry.sdk.trace.export", "SpanExporter"),
    "logs": ("opentelemetry.sdk._logs.export", "LogRecordExporter"),
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where a run goes: destinations for the manifest, their secrets for the shipper alone, and why, in a line.

    A live exporter rides among the secrets, {"exporter": object}: like them it is never written, and never pickled.
    """

    destinations: tuple[dict[str, Any], ...]
    secrets: dict[str, dict[str, Any]] = field(repr=False)  # destination id -> secrets; only those that have some
    why: str


# ---- names -------------------------------------------------------------------------------------------------------


def parse(backend: object) -> tuple[Spec, ...]:
    """Specifications of a name, names with commas, a specification, or a list of these; each destination once.

    Raises:
        ConfigError: a name that is none (with the nearest right one), one not built yet, or another kind of object.

    Examples:
        >>> from tracelet.backends import parse
        >>> parse("mlflow, otlp")
        (MLflow(tracking_uri=None), OTLP(endpoint=None, protocol=None))
    """
    specs = list(_each(backend))
    if not specs:
        raise ConfigError(f"backend {backend!r} names no destination: use {_names()}, or leave it out", backend=backend)
    unique: list[Spec] = []
    for spec in specs:  # headers make an OTLP unhashable, so no dict.fromkeys
        if isinstance(spec, Live):  # an exporter may compare itself as it likes; the object is what counts
            if not any(isinstance(one, Live) and one.exporter is spec.exporter for one in unique):
                of_its_class = (o for o in unique if isinstance(o, Live) and type(o.exporter) is type(spec.exporter))
                unique.append(Live(spec.exporter, sum(1 for _ in of_its_class)))
        elif spec not in unique:
            unique.append(spec)
    return tuple(unique)


def _each(backend: object) -> Iterable[Spec]:
    if isinstance(backend, (MLflow, OTLP, Prometheus, Console, File, Live)):
        yield backend
    elif isinstance(backend, str):
        for name in backend.split(","):
            if name.strip():
                yield _named(name.strip())
    elif isinstance(backend, (list, tuple)):
        for item in backend:
            yield from _each(item)
    elif isinstance(backend, type) and backend in _KINDS:
        raise ConfigError(f"backend is the class {backend.__name__}: write {backend.__name__}()", backend=backend)
    elif hasattr(backend, "export") and not isinstance(backend, type):
        if not _signals_taken(backend):
            raise ConfigError(
                f"backend {type(backend).__name__} is none of OpenTelemetry's exporters: make it a subclass of"
                " SpanExporter, MetricExporter or LogRecordExporter of opentelemetry.sdk, so that it is known what it"
                " takes",
                backend=backend,
            )
        yield Live(backend)
    else:
        raise ConfigError(
            f"backend can't be of type {type(backend).__name__}: use {_names()}, tracelet.MLflow(...),"
            " tracelet.OTLP(...), tracelet.Prometheus(...), an exporter object of OpenTelemetry's SDK, or a list of"
            " these",
            backend=backend,
        )


def _named(name: str) -> Spec:
    spec = _SPECS.get(name.lower())
    if spec is not None:
        return spec()
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(name.lower(), _SPECS, n=1, cutoff=0.4)
    advice = f"did you mean {near[0]!r}?" if near else f"there are {_names()}"
    raise ConfigError(f"backend {name!r} is none: {advice}", backend=name, nearest=near[0] if near else None)


def _signals_taken(exporter: object) -> tuple[str, ...]:
    """The signals that an exporter object of OpenTelemetry's SDK takes, by the interfaces it has."""
    taken = []
    for signal, (module, name) in _INTERFACES.items():
        interface = getattr(sys.modules.get(module), name, None)  # not loaded: nobody can have an object of it
        if isinstance(interface, type) and isinstance(exporter, interface):
            taken.append(signal)
    return tuple(taken)


def _names() -> str:
    return ", ".join(repr(name) for name in _SPECS)


# ---- from a specification to plain data --------------------------------------------------------------------------


def to_destination(spec: Spec, environ: Mapping[str, str], cwd: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `_to_destination`; an address that urllib can't take apart (half a pair of brackets) is named, too.

    Raises:
        ConfigError: an address that can't be right, or one of a kind that is not built yet.
    """
    try:
        return _to_destination(spec, environ, cwd)
    except (ValueError, RuntimeError) as error:  # RuntimeError: whose home is meant by a path's ~ can't be told
        kind = _KINDS[type(spec)]
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
        fields = {"exporter": name, "signals": list(_signals_taken(spec.exporter))}
        # The same exporters in the next attempt are the same destinations: what they had not taken, these get.
        secrets, address = {"exporter": spec.exporter}, [name, spec.number]
    else:
        fields, secrets, address = {}, {}, None
    kind = _KINDS[type(spec)]
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
    elif engine not in _DATABASES:
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
    return scheme not in ("http", "https") and scheme.partition("+")[0] not in _DATABASES


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
        f" database ({', '.join(_DATABASES)}; the local one is sqlite:///mlflow.db)"
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
        raise ConfigError(
            f"tracking_uri {uri!r} names no file, and another process has to find it: use sqlite:///mlflow.db", uri=uri
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
        raise ConfigError(
            f"OTLP endpoint {spec.endpoint!r} has no host: use one such as http://localhost:4318",
            endpoint=spec.endpoint,
        )
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
        "signals": list(SIGNALS if spec.explicit else _signals(environ)),
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


def _filled(spec: Spec, settings: Settings | None) -> Spec:
    """`spec` with what it leaves open taken from the settings."""
    if settings is None or not isinstance(spec, OTLP | Prometheus):
        return spec
    found: dict[str, Any] = {"headers_file": settings.otlp_headers_file}
    if isinstance(spec, Prometheus):
        found = {
            "url": settings.prometheus_url,
            "prefix": settings.metric_prefix,
            "window_age": settings.window_age_s,
            "window_ahead": settings.window_ahead_s,
            "headers_file": settings.prometheus_headers_file,
            "certificate": settings.prometheus_certificate,
            "client_certificate": settings.prometheus_client_certificate,
            "client_key": None if spec.client_certificate else settings.prometheus_client_key,
        }
    return dataclasses.replace(spec, **{name: value for name, value in found.items() if getattr(spec, name) is None})


def _signals(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The signals for which the environment has an endpoint; an empty variable counts as unset, as in OTel."""
    if environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip():
        return SIGNALS
    return tuple(s for s in SIGNALS if environ.get(f"OTEL_EXPORTER_OTLP_{s.upper()}_ENDPOINT", "").strip())


_SECRET_WORDS = ("password", "passwd", "pwd", "secret", "token", "key", "credential", "auth", "sig")


def without_credentials(uri: str) -> str:
    """`uri` without what lets somebody in: for the manifest, for logs and messages.

    Over HTTP all of `user:password@` goes (a token is often the user alone); a database's address keeps its user,
    which is part of it. Query parameters whose names sound secret go.

    Examples:
        >>> from tracelet.backends import without_credentials
        >>> without_credentials("postgresql://ml:s3cret@db/runs"), without_credentials("https://token@host/x")
        ('postgresql://ml@db/runs', 'https://host/x')
    """
    parts = urlsplit(uri)
    user_info, at, host = parts.netloc.rpartition("@")
    netloc = host
    if at and parts.scheme.partition("+")[0].lower() in _DATABASES:
        user = user_info.partition(":")[0]
        netloc = f"{user}@{host}" if user else host
    query = parts.query
    if any(sounds_secret(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
        pairs = [(n, v) for n, v in parse_qsl(query, keep_blank_values=True) if not sounds_secret(n)]
        query = urlencode(pairs, quote_via=quote)
    if netloc == parts.netloc and query == parts.query:
        return uri  # untouched: urlunsplit would write `sqlite:////x` with two slashes less
    return urlunsplit((parts.scheme, netloc, parts.path, query, parts.fragment))


def sounds_secret(name: str) -> bool:
    """Whether a parameter of this name would let somebody in."""
    return any(word in unquote(name).lower() for word in _SECRET_WORDS)


# ---- when none is named ------------------------------------------------------------------------------------------


def choose(
    backend: object,
    *,
    tracking_uri: str | None,
    environ: Mapping[str, str],
    cwd: Path,
    mlflow_installed: bool | None = None,
    settings: Settings | None = None,
) -> Chosen:
    """Where a run goes: what `backend` names, else what the environment does, else MLflow's local store.

    `tracking_uri` is the address of every MLflow without one of its own; given without a `backend`, it names mlflow.
    `mlflow_installed` None: looked up, without importing it. `settings`: what a Prometheus without an address,
    prefix or window gets; None: the defaults.

    Raises:
        ConfigError: see `parse` and `to_destination`.
    """
    if backend is not None and backend != "":
        specs, reason = parse(backend), "named by backend"
    else:
        specs, reason = _from_environment(tracking_uri, environ, mlflow_installed)
    if tracking_uri is not None:
        specs = tuple(MLflow(tracking_uri) if spec == MLflow() else spec for spec in specs)
    notes = []
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" and any(isinstance(s, OTLP) for s in specs):
        specs = tuple(spec for spec in specs if not isinstance(spec, OTLP))
        notes.append("nothing goes out by OTLP because OTEL_SDK_DISABLED=true")
    destinations: list[dict[str, Any]] = []
    secrets: dict[str, dict[str, Any]] = {}
    for spec in specs:
        destination, own = to_destination(_filled(spec, settings), environ, cwd)
        if settings is not None and destination["kind"] == "otlp":
            destination["spec"]["window_age_s"] = settings.window_age_s
        if any(destination["id"] == other["id"] for other in destinations):
            continue
        destinations.append(destination)
        if own:
            secrets[destination["id"]] = own
        if destination["kind"] == "live":
            continue
        silent = [s for s in SIGNALS if s not in destination["spec"].get("signals", SIGNALS)]
        if destination["kind"] == "prometheus" and len(specs) == 1:
            notes.append("Prometheus takes metrics only: params, tags, spans and files stay in the spool")
        if silent:
            notes.append(f"{', '.join(silent)} not sent: no OTLP endpoint is set for them")
    live = [destination for destination in destinations if destination["kind"] == "live"]
    if live:
        notes.append(_ends_with_the_program(live))
    where = " and ".join(_shown(destination) for destination in destinations)
    line = f"goes to {where} ({reason})" if destinations else f"stays in the spool ({reason})"
    return Chosen(tuple(destinations), secrets, "; ".join([line, *notes]))


def _ends_with_the_program(live: Iterable[Mapping[str, Any]]) -> str:
    """What whoever hands over exporter objects has to know of them."""
    each = [f"the {' and '.join(d['spec']['signals'])} to {d['spec']['exporter'].rpartition('.')[2]}" for d in live]
    return (
        f"a thread of this program hands {', '.join(each)}, and it dies with the program: what has not been taken by"
        " then stays in the spool"
    )


def _from_environment(
    tracking_uri: str | None, environ: Mapping[str, str], mlflow_installed: bool | None
) -> tuple[tuple[Spec, ...], str]:
    specs: list[Spec] = []
    reasons = []
    if tracking_uri is not None:
        specs.append(MLflow(tracking_uri))
        reasons.append("named by tracking_uri")
    elif environ.get("MLFLOW_TRACKING_URI", "").strip():
        specs.append(MLflow())
        reasons.append("MLFLOW_TRACKING_URI")
    if _signals(environ):
        specs.append(OTLP(explicit=False))
        names = [f"OTEL_EXPORTER_OTLP_{s}ENDPOINT" for s in ("", *(f"{signal.upper()}_" for signal in SIGNALS))]
        reasons.append(next(name for name in names if environ.get(name, "").strip()))
    if specs:
        return tuple(specs), " and ".join(reasons)
    if mlflow_installed is None:
        # mlflow-skinny comes without SQLAlchemy, and can't open the local store.
        mlflow_installed = _installed("mlflow") and _installed("sqlalchemy")
    if mlflow_installed:
        return (MLflow(),), "MLflow's local store: nothing else is named, and mlflow is installed"
    return (), "no destination is named; set TRACELET_BACKEND, MLFLOW_TRACKING_URI or OTEL_EXPORTER_OTLP_ENDPOINT"


def _installed(package: str) -> bool:
    """Whether it can be imported, without importing it; a mere folder of that name (a namespace) doesn't count."""
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _shown(destination: Mapping[str, Any]) -> str:
    spec = destination["spec"]
    if destination["kind"] == "otlp":
        named = spec["endpoint"] or next(
            iter(v for n, v in spec["environment"].items() if n.endswith("ENDPOINT")), None
        )
        return f"OTLP at {named or 'its default address on localhost'}"
    if destination["kind"] == "prometheus":
        return f"Prometheus at {spec['url']}"
    if destination["kind"] == "mlflow":
        return f"MLflow at {spec['tracking_uri']}"
    if destination["kind"] == "live":
        return f"the live exporter {spec['exporter'].rpartition('.')[2]}"
    return f"the file {spec['path']}" if destination["kind"] == "file" else "the console"
