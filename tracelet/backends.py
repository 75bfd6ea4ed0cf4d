"""The frozen specifications of destinations, and their names; plain values, without exporter code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tracelet.addresses import shown_names, without_credentials
from tracelet.errors import ConfigError

__all__ = [
    "KINDS",
    "OTLP",
    "SIGNALS",
    "Console",
    "File",
    "Live",
    "MLflow",
    "Prometheus",
    "Spec",
    "parse",
    "signals_taken",
]

SIGNALS = ("metrics", "traces", "logs")


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
KINDS: Mapping[type, str] = {**{spec: name for name, spec in _SPECS.items()}, Live: "live"}  # Live has no name to say

# By signal: the SDK's interface, and the module whose import is a precondition of having an object of it.
_INTERFACES = {
    "metrics": ("opentelemetry.sdk.metrics.export", "MetricExporter"),
    "traces": ("opentelemetry.sdk.trace.export", "SpanExporter"),
    "logs": ("opentelemetry.sdk._logs.export", "LogRecordExporter"),
}


def parse(backend: object) -> tuple[Spec, ...]:
    """Specifications of a name, names with commas, a specification, or a list of these; each destination once.

    Raises:
        ConfigError: a name that is none (with the nearest right one), or an object of another kind.

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
    elif isinstance(backend, type) and backend in KINDS:
        raise ConfigError(f"backend is the class {backend.__name__}: write {backend.__name__}()", backend=backend)
    elif hasattr(backend, "export") and not isinstance(backend, type):
        if not signals_taken(backend):
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
    shown = shown_names(name)
    if shown != name:
        advice = "an address goes into tracelet.MLflow(...), OTLP(...) or Prometheus(...), or into their variables"
    raise ConfigError(f"backend {shown!r} is none: {advice}", backend=shown, nearest=near[0] if near else None)


def signals_taken(exporter: object) -> tuple[str, ...]:
    """The signals that an exporter object of OpenTelemetry's SDK takes, by the interfaces it has."""
    taken = []
    for signal, (module, name) in _INTERFACES.items():
        interface = getattr(sys.modules.get(module), name, None)  # not loaded: nobody can have an object of it
        if isinstance(interface, type) and isinstance(exporter, interface):
            taken.append(signal)
    return tuple(taken)


def _names() -> str:
    return ", ".join(repr(name) for name in _SPECS)
