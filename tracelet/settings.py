"""Reads settings from arguments, config, environment and pyproject.toml, and remembers where each came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Keep", "Settings", "from_process", "resolve"]


@dataclass(frozen=True, slots=True)
class Keep:
    """How long, and how much, of what is delivered stays in the spool. None: no bound of that kind."""

    max_age_s: float | None
    max_bytes: int | None


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its value, checked; `origins` says where each came from."""

    backend: object  # None: not named; else as given: a name, a list, specifications
    tracking_uri: str | None  # of the mlflow destination; never from TRACELET_*: MLFLOW_TRACKING_URI is MLflow's own
    project: str
    experiment_name: str
    run_id: str | None
    dir: Path
    shipper: str  # "process" or "off"
    keep: Keep
    max_bytes: int | None
    grace_s: float
    flush_s: float
    origins: Mapping[str, str] = field(repr=False)  # setting's name -> "argument", "config", "TRACELET_DIR", ...
    environ: Mapping[str, str] = field(repr=False)  # as it was then; holds secrets, never printed or written
    cwd: Path = field(repr=False)
    argv: tuple[str, ...] = field(repr=False)


def resolve(
    arguments: Mapping[str, object],
    config: Mapping[str, object],
    *,
    environ: Mapping[str, str],
    cwd: Path,
    argv: Sequence[str],
) -> Settings:
    """Settings from `arguments`, else `config`, else TRACELET_*, else pyproject.toml, else the default. None: not given."""
    raise NotImplementedError


def from_process(arguments: Mapping[str, object] | None = None, config: Mapping[str, object] | None = None) -> Settings:
    """`resolve` with this process's environment, folder and command line."""
    raise NotImplementedError
