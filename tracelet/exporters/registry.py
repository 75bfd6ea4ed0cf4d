"""From a destination as the manifest names it to the exporter that serves it; loads only the one that is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, cast

from tracelet.errors import ConfigError
from tracelet.exporters.base import Exporter

__all__ = ["KINDS", "build"]

KINDS: Mapping[str, tuple[str, str]] = {
    "mlflow": ("tracelet.exporters.mlflow.exporter", "MLflowExporter"),
    "otlp": ("tracelet.exporters.otlp", "OTLPExporter"),
    "prometheus": ("tracelet.exporters.prometheus", "PrometheusExporter"),
    "console": ("tracelet.exporters.console", "ConsoleExporter"),
    "file": ("tracelet.exporters.file", "FileExporter"),
}
"""Each kind of destination: the module and the class that serve it."""


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
