"""Which destinations a run has: those it names, else those of the environment, else MLflow's local store."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracelet.backends import OTLP, SIGNALS, MLflow, Prometheus, Spec, parse
from tracelet.destinations import signals_with_endpoint, to_destination
from tracelet.settings import Settings

__all__ = ["Chosen", "choose"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where a run goes: destinations for the manifest, their secrets for the shipper alone, and why, in a line.

    A live exporter rides among the secrets, {"exporter": object}: like them it is never written, and never pickled.
    """

    destinations: tuple[dict[str, Any], ...]
    secrets: dict[str, dict[str, Any]] = field(repr=False)  # destination id -> secrets; only those that have some
    why: str


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
    if signals_with_endpoint(environ):
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
