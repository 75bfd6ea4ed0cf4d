"""What is known of a run's surroundings at its start: host, Python, git, job; the Resource; MLflow's own tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracelet.records import Scalar

__all__ = ["Surroundings", "boot_id", "host_name", "resource", "take"]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`attributes` for the `run.started` event, and the tags that MLflow's own client would have set."""

    attributes: Mapping[str, Scalar]
    mlflow_tags: Mapping[str, str]


def host_name() -> str:
    """This host's name."""
    raise NotImplementedError


def boot_id() -> str:
    """An id of this boot of this host."""
    raise NotImplementedError


def take(environ: Mapping[str, str], cwd: Path, argv: Sequence[str]) -> Surroundings:
    """Describe the surroundings of this process."""
    raise NotImplementedError


def resource(
    *,
    project: str,
    experiment_name: str,
    run_id: str,
    run_name: str,
    attempt_key: str,
    rank: int,
    environ: Mapping[str, str],
) -> dict[str, Scalar]:
    """The Resource of one rank of an attempt, exactly as the wire contract has it."""
    raise NotImplementedError
