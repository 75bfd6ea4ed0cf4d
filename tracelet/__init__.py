"""tracelet: log ML experiments into the OpenTelemetry stack you already run, and into MLflow.

Importing it starts nothing and loads next to nothing: each name is fetched at its first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracelet.backends import OTLP, Console, File, MLflow, Prometheus
    from tracelet.core.experiment import Experiment, ExperimentConfig
    from tracelet.errors import (
        ConfigError,
        ExportError,
        IntegrationUnavailable,
        InvalidValue,
        RunClosed,
        SpoolError,
        SpoolFull,
        TraceletError,
    )
    from tracelet.session import get_active_experiment, start_logging, stop_logging
    from tracelet.version import __version__

__all__ = [
    "ConfigError",
    "Console",
    "Experiment",
    "ExperimentConfig",
    "ExportError",
    "File",
    "IntegrationUnavailable",
    "InvalidValue",
    "MLflow",
    "OTLP",
    "Prometheus",
    "RunClosed",
    "SpoolError",
    "SpoolFull",
    "TraceletError",
    "__version__",
    "get_active_experiment",
    "start_logging",
    "stop_logging",
]

_HOME = {
    "ConfigError": "errors",
    "Console": "backends",
    "Experiment": "core.experiment",
    "ExperimentConfig": "core.experiment",
    "ExportError": "errors",
    "File": "backends",
    "IntegrationUnavailable": "errors",
    "InvalidValue": "errors",
    "MLflow": "backends",
    "OTLP": "backends",
    "Prometheus": "backends",
    "RunClosed": "errors",
    "SpoolError": "errors",
    "SpoolFull": "errors",
    "TraceletError": "errors",
    "__version__": "version",
    "get_active_experiment": "session",
    "start_logging": "session",
    "stop_logging": "session",
}


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'tracelet' has no attribute {name!r}")
    value = getattr(import_module(f"tracelet.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
