"""The few things tracelet asks of an MLflow tracking store, whichever way it is reached, and how they can fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["ExperimentView", "MetricRow", "NotNow", "Refused", "RunView", "Transport", "Unclear", "first_of"]

MetricRow = tuple[str, float, int, int]
"""Key, value, timestamp in milliseconds, step."""

Latest = tuple[int, int, float]
"""Step, timestamp in milliseconds, value: the order in which MLflow decides which value is a metric's latest."""


class NotNow(Exception):
    """Nothing was changed; later it may work. `loud`: a person has to do something."""

    def __init__(self, reason: str, after_s: float | None = None, *, loud: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_s = after_s
        self.loud = loud


class Unclear(NotNow):
    """The request went out and no answer came, or one that leaves open whether it was carried out.

    `may_be_running`: nobody hung up, so the server may still be at it (a timeout).
    """

    may_be_running = False


class Refused(Exception):
    """MLflow said no to this request for good; nothing of it was carried out."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class ExperimentView:
    """What is asked of an MLflow experiment."""

    experiment_id: str
    deleted: bool


@dataclass(frozen=True, slots=True)
class RunView:
    """What is asked of an MLflow run."""

    run_id: str
    experiment_id: str
    start_time: int
    status: str
    deleted: bool
    artifact_uri: str
    latest: Mapping[str, Latest] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def first_of(runs: Sequence[RunView]) -> RunView | None:
    """Of runs with one tag the one that counts: the earliest, if it can be one that is not deleted."""
    return min(runs, key=lambda run: (run.deleted, run.start_time, run.run_id), default=None)


class Transport(Protocol):
    """A tracking store. Every method raises `NotNow`, `Unclear` or `Refused`, and nothing else on purpose."""

    def experiment_by_name(self, name: str) -> ExperimentView | None:
        """The experiment of this name, deleted or not."""
        ...

    def create_experiment(self, name: str) -> None:
        """Create it; that it exists already is no error."""
        ...

    def runs_with_tag(self, experiment_id: str, key: str, value: str) -> Sequence[RunView]:
        """Runs, deleted ones too, whose tag `key` is `value`, earliest first."""
        ...

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, run_name: str, tags: Mapping[str, str]
    ) -> RunView:
        """Create a run; not idempotent."""
        ...

    def run(self, run_id: str) -> RunView | None:
        """The run with its latest metric values, params and tags; None if there is none."""
        ...

    def log_metrics(self, run_id: str, rows: Sequence[MetricRow]) -> None:
        """Store rows, all or none."""
        ...

    def log_params(self, run_id: str, params: Sequence[tuple[str, str]]) -> None:
        """Store params, all or none."""
        ...

    def log_tags(self, run_id: str, tags: Sequence[tuple[str, str]]) -> None:
        """Set tags, all or none."""
        ...

    def delete_tag(self, run_id: str, key: str) -> None:
        """Take a tag away; that there is none is no error."""
        ...

    def log_spans(self, experiment_id: str, run_id: str, resource_spans: Sequence[bytes]) -> None:
        """Store the spans of serialized OTLP `ResourceSpans`, all or none, and link traces whose root is among them."""
        ...

    def update_run(self, run_id: str, status: str, end_time: int | None) -> None:
        """Set the status, and the end time if given."""
        ...

    def delete_run(self, run_id: str) -> None:
        """Mark a run as deleted."""
        ...

    def has_metric_row(self, run_id: str, row: MetricRow) -> bool:
        """Whether exactly this row is stored; costs the reading of the key's history, so it is asked rarely."""
        ...

    def close(self) -> None:
        """Let connections go, without waiting."""
        ...
