"""From a destination as the manifest names it to the exporter that serves it; loads only the one that is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

from tracelet.errors import ConfigError
from tracelet.exporters.base import Exporter

__all__ = ["KINDS", "build", "preload"]

KINDS: Mapping[str, tuple[str, str]] = {
    "mlflow": ("tracelet.exporters.mlflow.exporter", "MLflowExporter"),
    "otlp": ("tracelet.exporters.otlp", "OTLPExporter"),
    "prometheus": ("tracelet.exporters.prometheus", "PrometheusExporter"),
    "console": ("tracelet.exporters.console", "ConsoleExporter"),
    "file": ("tracelet.exporters.file", "FileExporter"),
    "live": ("tracelet.exporters.live", "LiveExporter"),
}
"""Each kind of destination: the module and the class that serve it."""


_WITH: Mapping[str, tuple[str, ...]] = {
    "otlp": (
        "tracelet.exporters.otlp_http",
        "opentelemetry.exporter.otlp.proto.common.trace_encoder",
        "opentelemetry.sdk.trace",
        "opentelemetry.sdk.metrics",
        "opentelemetry.sdk._logs",
    ),
    "live": (
        "opentelemetry.exporter.otlp.proto.common.trace_encoder",
        "opentelemetry.sdk.trace",
        "opentelemetry.sdk.metrics.export",
        "opentelemetry.sdk._logs",
    ),
    "prometheus": ("tracelet.exporters.prometheus_http",),
    "mlflow": ("tracelet.exporters.mlflow.rest",),
}


def preload(destination: Mapping[str, Any]) -> None:
    """Load now what serving `destination` would load at its first request.

    For exporters in a program that may end at any moment: on its way out an interpreter starts no threads, and some of
    these libraries do, or make ready for it, when they are loaded.
    """
    kind, spec = str(destination.get("kind")), destination.get("spec", {})
    names = [KINDS[kind][0], *_WITH.get(kind, ())] if kind in KINDS else []
    if kind == "otlp" and "grpc" in (spec.get("protocol"), *spec.get("environment", {}).values()):
        names.append("tracelet.exporters.otlp_grpc")
    if kind == "mlflow" and not str(spec.get("tracking_uri")).startswith("http"):
        names += ("tracelet.exporters.mlflow.store", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.db.utils")
    for name in names:
        importlib.import_module(name)


def build(destination: Mapping[str, Any], secrets: Mapping[str, Any], environ: Mapping[str, str]) -> Exporter:
    """The exporter for `destination` ({"id", "kind", "spec"}), with its `secrets` and the caller's environment.

    Raises:
        ConfigError: no such kind, or its specification can't be right.
        IntegrationUnavailable: the package it needs is missing.
    """
    kind = str(destination.get("kind"))
    if kind not in KINDS:
        raise ConfigError(
            f"destination {destination.get('id')!r} is of kind {kind!r}, which this release of tracelet doesn't know"
            f" (it knows {', '.join(KINDS)}); its data stays in the spool until one that does ships it",
            kind=kind,
        )
    module, name = KINDS[kind]
    made = getattr(importlib.import_module(module), name)(destination.get("spec", {}), secrets, environ)
    return cast(Exporter, made)
