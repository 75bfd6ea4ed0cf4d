"""The frozen specifications of destinations, their names, and which one is meant when none is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OTLP", "Chosen", "Console", "File", "MLflow", "Spec", "choose", "parse", "to_destination"]


@dataclass(frozen=True, slots=True)
class MLflow:
    """An MLflow tracking server or database."""

    tracking_uri: str | None = None


@dataclass(frozen=True, slots=True)
class OTLP:
    """An OTLP receiver: a collector, or a backend that speaks OTLP."""

    endpoint: str | None = None
    protocol: str | None = None
    headers: Mapping[str, str] | None = field(default=None, repr=False)
    compression: str | None = None
    timeout_s: float | None = None
    explicit: bool = True


@dataclass(frozen=True, slots=True)
class Console:
    """The training program's standard output."""


@dataclass(frozen=True, slots=True)
class File:
    """OTLP JSON lines in a file."""

    path: str | None = None


Spec = MLflow | OTLP | Console | File


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where a run goes: destinations for the manifest, their secrets for the shipper alone, and why, in a line."""

    destinations: tuple[dict[str, Any], ...]
    secrets: dict[str, dict[str, Any]] = field(repr=False)  # destination id -> secrets; only those that have some
    why: str = ""


def parse(backend: object) -> tuple[Spec, ...]:
    """Specifications of a name, several names, a specification or a list of these."""
    raise NotImplementedError


def to_destination(spec: Spec, environ: Mapping[str, str], cwd: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's entry of `spec` (absolute, without secrets), and its secrets."""
    raise NotImplementedError


def choose(
    backend: object,
    *,
    tracking_uri: str | None,
    environ: Mapping[str, str],
    cwd: Path,
    mlflow_installed: bool | None = None,
) -> Chosen:
    """Where a run goes: what `backend` names, else what the environment does, else MLflow's local store."""
    raise NotImplementedError
